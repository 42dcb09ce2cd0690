"""The hot loops: loads the compiled kernels and spreads their work over the cores.

kernels.c and codecs.c (rows) and ../addressing/hash.c (addresses) are plain C behind ctypes, which drops the GIL for
the length of a call. Threads come from one Python pool instead of OpenMP, because torch already brings an OpenMP
runtime and two of them spin against each other on a small machine.

Set ENGRAM_KERNELS=torch to run without the compiled library; every result stays the same bit for bit. Set
ENGRAM_THREADS, or call set_threads, to use another number of threads than the cores that this process may use.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch

from engram.config import whole
from engram.storage import limits


def _load() -> Any:
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
    library: Any = ctypes.CDLL(spec.origin)
    p, i32, i64, u64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_uint64
    f32, f64 = ctypes.c_float, ctypes.c_double
    for name, result, arguments in (
        ("check", i64, (p, i64, i64)),
        ("gather", i64, (p, p, i64, i64, p, i32)),
        ("copy_rows", None, (p, p, i64, i64, p, i64)),
        ("touch_rows", None, (p, p, p, i64, i64, p, i64)),
        ("read_words", u64, (p, i64, i64)),
        ("scatter", None, (p, p, i64, i64, p)),
        ("group", i64, (p, i64, i64, p, i64, p, p, p, p)),
        ("rms", None, (p, p, p, i64, i64, p, *[f32] * 4, i32, u64)),
        ("adam", None, (p, p, p, i64, i64, p, *[f32] * 6, i32, u64)),
        ("find", i64, (p, i64, p, i64, p, i64, p)),
        ("decode", None, (p, p, i64, i64, p)),
        ("decode_check", i64, (p, i64, i64)),
        ("encode", None, (p, p, p, i64, i64, i64)),
        ("sinkhorn_look", None, (p, p, p, p, i64, i64, f64, i64, p, p)),
        ("sinkhorn_sweep", None, (p, p, f32, p, i64, i64, i64, i64, p)),
        ("sinkhorn_update", None, (*[p] * 4, i64, i64, p, f64, i64, p, p, f32, p, p, f32, i32, u64)),
        ("hash", i64, (*[p] * 4, *[i64] * 5, p)),
        ("finish", None, (p,)),
    ):
        function = getattr(library, f"engram_{name}")
        function.restype, function.argtypes = result, arguments
    quick = ctypes.PyDLL(spec.origin)  # keeps the GIL: handing it over costs more than these take
    for name, result in (("take", i64), ("take_own", i64), ("leave", None), ("drop", None)):
        function = getattr(quick, f"engram_{name}")
        function.restype, function.argtypes = result, (p,)
    library.quick = quick
    return library


native: Any = _load()  # a ctypes.CDLL, or None


class Threads:
    """A pool of `count` threads, which a forked process makes anew: none of its parent's lives on there."""

    def __init__(self, count: int, name: str):
        self.count, self.name = count, name
        self._start()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._start)

    def _start(self) -> None:
        self.pool = ThreadPoolExecutor(self.count, thread_name_prefix=self.name)

    def grow(self, count: int) -> None:
        """Make it a pool of at least `count` threads. Work that the old pool has begun goes on there."""
        if count > self.count:
            self.count = count
            self._start()


def _from_environment() -> int | None:
    text = os.environ.get("ENGRAM_THREADS", "")
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"ENGRAM_THREADS is a number of threads, 1 or more, not {text!r}")
    return int(text)


_fixed = _from_environment()  # what the user has asked for
_torch_began_with = torch.get_num_threads()
CORES = _fixed or min(limits.cores(), _torch_began_with if os.environ.get("OMP_NUM_THREADS") else 1 << 16)
_threads = Threads(max(CORES - 1, 1), "engram-kernel")
_SHARE = 4  # pieces per core: a core that others keep busy takes fewer of them
_LARGEST = 64  # pieces are at most so many times as large as the smallest: an interrupt ends the call after one piece


def set_threads(count: int) -> None:
    """Use `count` threads for hashing, gathering, row updates and codecs; torch has torch.set_num_threads.

    The default is ENGRAM_THREADS if it is set, else the number of cores that affinity and control groups leave to this
    process, or fewer if OMP_NUM_THREADS or torch.set_num_threads is lower.

    Raises:
        ValueError: count below 1.
    """
    global CORES, _fixed
    if whole("count", count) < 1:
        raise ValueError(f"the number of threads must be 1 or more, not {count}")
    CORES = _fixed = int(count)
    _threads.grow(count - 1)


def threads() -> int:
    """Number of threads that a call spreads its work over."""
    now = torch.get_num_threads()
    return CORES if _fixed or now == _torch_began_with else min(CORES, now)


def shielded(work: Callable[[], None]) -> None:
    """Call work() where no signal handler runs, on a thread of the pool, and return when it has ended; interrupts are
    raised after that."""
    done = _threads.pool.submit(work)
    interrupt: BaseException | None = None
    while not done.done():
        try:
            wait([done])
        except BaseException as error:
            interrupt = interrupt or error
    if interrupt is not None:
        raise interrupt
    done.result()


def _ask(count: int, work: Callable[..., None], *arguments: Any) -> None:
    try:
        for _ in range(count):
            _threads.pool.submit(work, *arguments)
    except RuntimeError:  # no thread can be started, or the interpreter is ending: the calling thread does it all
        pass


def spread(n: int, smallest: int, work: Callable[[int, int], Any], *held: Any) -> None:
    """Call work(lo, hi) over pieces of range(n) on all cores; return when all are done, raise what a piece raised.

    The calling thread starts at once and each thread that is free takes the next piece, so neither a slow wake-up nor a
    busy core holds up the rest. Pieces are never smaller than `smallest`, below which handing work to a thread costs
    more than it saves. `work` must not care how range(n) is cut.

    Whatever ends the call early (an error in a piece, KeyboardInterrupt any number of times), pieces that were not
    begun are dropped, and the call returns only after the others have ended: no thread works on the buffers of a call
    that is over.

    Args:
        held: what owns the memory that `work` has addresses of; kept alive until its last piece has ended.
    """
    most, cores = n // smallest, threads()
    pieces = min(most, max(cores * _SHARE if cores > 1 else 1, most // _LARGEST))
    if pieces <= 1 or native is None:
        work(0, n)
        return
    quick, finish = native.quick, native.engram_finish
    job = (ctypes.c_int64 * 3)(0, pieces, 0)  # struct Job of spread.c
    here, errors, box = ctypes.addressof(job), list[BaseException](), [(work, held)]

    def helper(_: Any) -> None:
        while (piece := quick.engram_take(here)) >= 0:
            try:
                box[0][0](n * piece // pieces, n * (piece + 1) // pieces)
            except BaseException as error:
                errors.append(error)
                quick.engram_drop(here)
            finally:
                quick.engram_leave(here)

    try:
        _ask(min(cores, pieces) - 1, helper, job)
        while (piece := quick.engram_take_own(here)) >= 0:
            work(n * piece // pieces, n * (piece + 1) // pieces)
    finally:
        finish(here)  # one C call, straight after the jump here: no interrupt falls between
        box.clear()  # a helper that wakes up later finds no piece, and keeps no buffer alive
    if errors:
        raise errors[0]
