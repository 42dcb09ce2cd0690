"""Memories in the files of other programs: released checkpoints and GGUF, read, written and converted."""

import warnings
from typing import Any

from engram.integrations.formats.conversion import convert
from engram.integrations.formats.inspection import inspect_file
from engram.integrations.formats.opened import open_tables

__all__ = ["convert", "inspect_file", "open_tables"]


def __getattr__(name: str) -> Any:
    """Serve the old name of inspect_file for one version."""
    if name == "inspect":
        warnings.warn("inspect is called inspect_file now", DeprecationWarning, stacklevel=2)
        return inspect_file
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
