"""The hot loops: loads the compiled kernels and spreads their work over the cores.

kernels.c and codecs.c (rows) and ../addressing/hash.c (addresses) are plain C behind ctypes, which drops the GIL for
the length of a call. Threads come from one Python pool instead of OpenMP, because torch already brings an OpenMP
runtime and two of them spin against each other on a small machine.

Set ENGRAM_KERNELS=torch to run without the compiled library; every result stays the same bit for bit.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

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
    library = ctypes.CDLL(spec.origin)
    p, i32, i64, u64, f32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_uint64, ctypes.c_float
    for name, result, arguments in (
        ("check", i64, (p, i64, i64)),
        ("gather", i64, (p, p, i64, i64, p, i32)),
        ("copy_rows", None, (p, p, i64, i64, p, i64)),
        ("touch_rows", None, (p, p, p, i64, i64, p, i64)),
        ("read_words", u64, (p, i64, i64)),
        ("scatter", None, (p, p, i64, i64, p)),
        ("group", i64, (p, i64, i64, p, i64, p, p, p, p)),
        ("rms", None, (p, p, p, i64, i64, *[f32] * 4, i32, u64)),
        ("adam", None, (p, p, p, i64, i64, *[f32] * 6, i32, u64)),
        ("find", i64, (p, i64, p, i64, p, i64, p)),
        ("decode", None, (p, p, i64, i64, p)),
        ("decode_check", i64, (p, i64, i64)),
        ("encode", None, (p, p, p, i64, i64, i64)),
        ("sinkhorn_look", None, (p, p, p, p, i64, i64, ctypes.c_double, i64, p, p)),
        ("sinkhorn_sweep", None, (p, p, f32, p, i64, i64, i64, i64, p)),
        ("sinkhorn_update", None, (p, p, i64, i64, p, p, f32, p, p, f32, i32, u64)),
    ):
        function = getattr(library, f"engram_{name}")
        function.restype, function.argtypes = result, arguments
    return library


native: ctypes.CDLL | None = _load()


class Threads:
    """A pool of `count` threads, which a forked process makes anew: none of its parent's lives on there."""

    def __init__(self, count: int, name: str):
        self.count, self.name = count, name
        self._start()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._start)

    def _start(self) -> None:
        self.pool = ThreadPoolExecutor(self.count, thread_name_prefix=self.name)


_threads = Threads(max(CORES - 1, 1), "engram-kernel")
_SHARE = 4  # pieces per core: a core that others keep busy takes fewer of them


def spread(n: int, smallest: int, work: Callable[[int, int], None]) -> None:
    """Calls work(lo, hi) over pieces of range(n) on all cores; returns when all are done, raises what a piece raised.

    The calling thread starts at once and whoever is free takes the next piece, so neither a slow wake-up nor a busy
    core holds up the rest. Pieces are never smaller than `smallest`, below which handing work to a thread costs more
    than it saves. `work` must not care how range(n) is cut.
    """
    pieces = min(CORES * _SHARE, n // smallest) if CORES > 1 else 1
    if pieces <= 1:
        work(0, n)
        return
    waiting = list(range(pieces))

    def run() -> None:
        while True:
            try:
                piece = waiting.pop()  # atomic
            except IndexError:
                return
            work(n * piece // pieces, n * (piece + 1) // pieces)

    futures = [_threads.pool.submit(run) for _ in range(min(CORES, pieces) - 1)]
    try:
        run()
    finally:
        started = [future for future in futures if not future.cancel()]
        wait(started)
    for future in started:
        future.result()
