"""Settings that must be made before torch is imported, if this process is the command line and not a user's program.

OpenMP reads its settings once, when torch loads it. By default its threads spin for about a millisecond at the end of
each parallel loop. On cores that are shared with other processes this takes time from them, and from the other threads:
with two cores and a load of 11, `engram evaluate` took 24 s with threads that sleep and 46 s with threads that spin.
"""

from __future__ import annotations

import os
import sys
from itertools import pairwise
from pathlib import Path

_SETTINGS = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"  # if one of them is set, the user has decided


def is_command(program: str, command_line: list[str]) -> bool:
    """Return True if sys.argv[0] and sys.orig_argv are those of `engram` or `python -m engram`."""
    by_name = Path(program).name.removesuffix(".exe").removesuffix("-script.py") == "engram"
    return by_name or ("-m", "engram") in pairwise(command_line)


def sleep_while_waiting() -> None:
    """Let the OpenMP threads of this process sleep while they wait, unless the environment sets how they wait."""
    if not any(name in os.environ for name in _SETTINGS):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


if is_command(sys.argv[0] if sys.argv else "", sys.orig_argv) and sys.argv[1:2] != ["bench"]:
    sleep_while_waiting()
