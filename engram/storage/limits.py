"""Memory and cores that this process may use: the smallest of what hardware, affinity and control groups allow.

In a container, /proc shows the host's memory and cores, but the limits are those of the container's control group.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

GROUPS, PROC = Path("/sys/fs/cgroup"), Path("/proc")


def cores() -> int:
    """Return the number of CPU cores that this process may use, at least 1: its affinity, and the CPU quotas of its
    control groups."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, math.floor(min([count, *_quotas()])))


def free_memory() -> int:
    """Return the bytes of memory that are free or can be freed: the machine's, or the rest of a control group's limit.
    0 if the system does not report them."""
    try:
        with open(PROC / "meminfo") as lines:
            free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0
    return max(0, min([free, *_headrooms()]))


def _groups(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control groups for "cpu" or "memory", innermost first.

    In a container, a path that the process cannot see leaves those of its ancestors that it can.
    """
    try:
        lines = (PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        homes = [GROUPS / names, GROUPS / controller] if names else [GROUPS / "unified", GROUPS]
        home = next((home for home in homes if home.is_dir()), None)
        inner = PurePosixPath(path.lstrip("/"))
        if home is not None:
            yield from (home / group for group in (inner, *inner.parents) if ".." not in group.parts)


def _number(path: Path) -> float:
    """Return the number at the start of a control group's file; infinity for "max", or if it cannot be read."""
    try:
        return float(path.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return math.inf


def _quotas() -> Iterator[float]:
    """Yield the CPU quotas of this process's control groups, in cores."""
    for group in _groups("cpu"):
        try:
            quota, period = (group / "cpu.max").read_text().split()  # version 2
        except (OSError, ValueError):
            quota, period = (str(_number(group / f"cpu.cfs_{name}_us")) for name in ("quota", "period"))  # version 1
        if quota != "max" and 0 < float(quota) < math.inf and 0 < float(period) < math.inf:
            yield float(quota) / float(period)


def _headrooms() -> Iterator[int]:
    """Yield the bytes left below the memory limits of this process's control groups."""
    for group in _groups("memory"):
        limits = [_number(group / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
        used = min(_number(group / "memory.current"), _number(group / "memory.usage_in_bytes"))
        if min(limits) < math.inf and used < math.inf:
            yield int(min(limits) - used) + _reclaimable(group)


def _reclaimable(group: Path) -> int:
    """Return the bytes of a group's page cache that are freed under pressure, such as pages of old row files."""
    try:
        stats = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(stats.get("total_inactive_file", stats.get("inactive_file", 0)))
    except (OSError, ValueError):
        return 0
