"""The memory of one model: it builds tables and fusions, recalls rows, and fuses them into the hidden state."""

from engram.memory.build import build_layout, hash_layout, new_table, unwritten
from engram.memory.gradients import check_processes
from engram.memory.memory import EngramMemory

__all__ = ["EngramMemory", "build_layout", "check_processes", "hash_layout", "new_table", "unwritten"]
