"""The memory of one model: it builds tables and fusions, recalls rows, and fuses them into the hidden state."""

from engram.memory.memory import EngramMemory, build_layout, check_processes, hash_layout, new_table, unwritten

__all__ = ["EngramMemory", "build_layout", "check_processes", "hash_layout", "new_table", "unwritten"]
