"""Memories in the files of other programs: released checkpoints, GGUF, and what converts between them and ours."""

from engram.integrations.formats.conversion import convert, inspect_file

__all__ = ["convert", "inspect_file"]
