"""The hot loops: loads the compiled kernels and spreads their work over the cores.

kernels.c (rows) and ../addressing/hash.c (addresses) are plain C behind ctypes, which drops the GIL for the length of
a call. Threads come from one Python pool instead of OpenMP, because torch already brings an OpenMP runtime and two of
them spin against each other on a small machine.

Set ENGRAM_KERNELS=torch to run without the compiled library; every result stays the same bit for bit.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def _load() -> ctypes.CDLL | None:
    if os.environ.get("ENGRAM_KERNELS") == "torch":
        return None
    spec = importlib.util.find_spec("engram.tables._native")
    if spec is None or spec.origin is None:
        warnings.warn(
            "engram was installed without its compiled kernels (no C compiler was found), so the slower torch path "
            "runs. Install a compiler and reinstall, or set ENGRAM_KERNELS=torch to accept this silently.",
            stacklevel=3,
        )
        return None
    return ctypes.CDLL(spec.origin)


native: ctypes.CDLL | None = _load()
_pool = ThreadPoolExecutor(max(CORES - 1, 1), thread_name_prefix="engram-kernel")


def spread(n: int, smallest: int, work: Callable[[int, int], None]) -> None:
    """Calls work(lo, hi) over pieces of range(n) on all cores; the calling thread takes the last piece.

    Pieces are never smaller than `smallest`, below which handing work to a thread costs more than it saves.
    """
    pieces = max(1, min(CORES, n // smallest))
    if pieces == 1:
        work(0, n)
        return
    bounds = [n * i // pieces for i in range(pieces + 1)]
    futures = [_pool.submit(work, bounds[i], bounds[i + 1]) for i in range(pieces - 1)]
    work(bounds[-2], n)
    for future in futures:
        future.result()


def pointer(array, offset: int = 0) -> ctypes.c_void_p:
    """Address of a contiguous torch tensor or NumPy array plus `offset` bytes."""
    base = array.data_ptr() if hasattr(array, "data_ptr") else array.ctypes.data
    return ctypes.c_void_p(base + offset)
