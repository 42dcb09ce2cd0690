"""The hot loops: loads the compiled kernels and spreads their work over the cores.

The C files here (rows), ../addressing/hash.c (addresses) and ../counts/counts.c (n-grams) are called through ctypes,
which drops the GIL for the length of a call. The main thread spreads a call over torch's own OpenMP threads: these
still spin on the cores after the operation before, so that threads of another pool would have to wait for them. The
runtime is found in the running process, and the library is built without it.

A pool of Python threads does the work, with the same bits, where torch's threads cannot: in other threads than the main
one (rows that are fetched ahead must not delay the model), inside a parallel region, in a forked process, with
another number of threads than torch's, and where torch was built without OpenMP.

Set ENGRAM_KERNELS=torch to run without the compiled library; every result stays the same bit for bit. Set
ENGRAM_THREADS, or call set_threads, to use another number of threads than the cores that this process may use.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import struct
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch

from engram.config import as_integer
from engram.storage import limits

# The arguments of a kernel as `struct` packs them: P address, i int32, q int64, Q uint64, d double. The structs in C
# have the same fields; they are named in the order of the names here.
_ARGUMENTS = {
    "gather": "PPPi",
    "copy_rows": "PPPq",
    "read_words": "P",
    "touch_rows": "PPPPq",
    "rms": "PPPPddddQi",
    "adam": "PPPPddddddQi",
    "sinkhorn_look": "PPPPdqPP",
    "sinkhorn_sweep": "PPPdqqP",
    "sinkhorn_update": "PPPPPdqPPPPddQi",
    "decode": "PPP",
    "decode_check": "Pq",
    "encode": "PPPq",
    "hash": "PPPPqqqP",
    "counts_find": "PPPPPQq",
    "counts_add": "PPPPPPPPQqq",
    "counts_place": "PPQq",
    "counts_list": "PPPPPq",
}


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
    p, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    for name, result, arguments in (
        *((kernel, i64, (p, i64, i64)) for kernel in _ARGUMENTS),
        ("check", i64, (p, i64, i64)),
        ("scatter", None, (p, p, i64, i64, p)),
        ("group", i64, (p, i64, i64, p, i64, p, p, p, p)),
        ("find", i64, (p, i64, p, i64, p, i64, p)),
        ("use_openmp", None, (p, p, p)),
        ("parallel", i32, (p, p, p, i64, i64)),
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
_KERNELS: dict[str, tuple[Any, int | None, Any]] = {}  # (function, its address, what packs its arguments)
for _name, _fields in _ARGUMENTS.items() if native is not None else ():
    _function = getattr(native, f"engram_{_name}")
    _KERNELS[_name] = _function, ctypes.cast(_function, ctypes.c_void_p).value, struct.Struct(_fields).pack


class Call:
    """A kernel with its arguments. call(lo, hi) works on a piece of its items and returns -1, or the first item that it
    refuses.

    Args:
        name: the kernel's name. arguments: numbers, and addresses of memory that the caller keeps alive.
    """

    __slots__ = ("address", "arguments", "function")

    def __init__(self, name: str, *arguments: Any):
        self.function, self.address, pack = _KERNELS[name]
        self.arguments = pack(*arguments)

    def __call__(self, lo: int, hi: int) -> int:
        return self.function(self.arguments, lo, hi)


class Threads:
    """A pool of `count` threads. A forked process makes a new one, because no thread of its parent lives on there."""

    def __init__(self, count: int, name: str):
        self.count, self.name = count, name
        self._start()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._start)

    def _start(self) -> None:
        self.pool = ThreadPoolExecutor(self.count, thread_name_prefix=self.name)

    def grow(self, count: int) -> None:
        """Replace the pool by one of at least `count` threads. The old pool completes the work that it has begun."""
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
_SHARE = 4  # pieces per core: a core that does other work too takes fewer of them
_LARGEST = 64  # pieces are at most so many times as large as the smallest: an interrupt ends the call after one piece


def _openmp() -> list[int] | None:
    """Return the addresses of GOMP_parallel, omp_in_parallel and omp_get_max_threads in the OpenMP runtime that torch
    uses; None if torch has none, or one without these names (GNU's and LLVM's have them)."""
    if sys.platform == "win32" or not torch.backends.openmp.is_available():
        return None
    everywhere, of_torch = None, torch._C.__file__  # symbols of the process, and of torch and what it is linked with
    for scope in (of_torch, everywhere) if sys.platform == "darwin" else (everywhere, of_torch):  # as the linker looks
        try:
            library = ctypes.CDLL(scope)
            names = "GOMP_parallel", "omp_in_parallel", "omp_get_max_threads"
            return [ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in names]
        except (OSError, AttributeError):
            continue
    return None


def _join_torch() -> bool:
    """Give the kernels torch's OpenMP runtime; return False if there is none that they can use."""
    found = None if native is None else _openmp()
    if found is not None:
        native.engram_use_openmp(*found)
    return found is not None


_joined = _join_torch()
_MAIN = threading.main_thread().ident


def _part() -> None:
    global _joined
    _joined = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_part)  # the runtime counts on threads that ended with the fork, and would wait


def set_threads(count: int) -> None:
    """Use `count` threads for hashing, gathering, row updates and codecs; torch has torch.set_num_threads.

    The default is ENGRAM_THREADS if it is set, else the number of cores that affinity and control groups leave to this
    process, or fewer if OMP_NUM_THREADS or torch.set_num_threads is lower. If the number is torch's, the kernels run on
    torch's own threads, which is faster inside a model.

    Raises:
        ValueError: count below 1.
    """
    global CORES, _fixed
    if as_integer("count", count) < 1:
        raise ValueError(f"the number of threads must be 1 or more, not {count}")
    CORES = _fixed = int(count)
    _threads.grow(count - 1)


def threads() -> int:
    """Return the number of threads that a call spreads its work over."""
    return _team()[0]


def _team() -> tuple[int, bool]:
    """Return (threads of a call, True if they are as many as torch has and may be torch's own)."""
    torchs = torch.get_num_threads()
    if _fixed:
        return CORES, _joined and CORES == torchs > 1
    if _joined and 1 < torchs <= CORES:
        return torchs, True
    return CORES if torchs == _torch_began_with else min(CORES, torchs), False


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


def spread(n: int, smallest: int, work: Callable[[int, int], Any], *held: Any) -> int:
    """Call work(lo, hi) over pieces of range(n) on all cores; return when all are done, raise what a piece raised.

    The calling thread starts at once and each thread that is free takes the next piece, so neither a slow wake-up nor a
    busy core delays the rest. Pieces are never smaller than `smallest`, below which handing work to a thread costs
    more than it saves. The result of `work` must not depend on how range(n) is cut.

    Whatever ends the call early (an error in a piece, KeyboardInterrupt any number of times), pieces that were not
    begun are dropped, and the call returns only after the others have ended: no thread works on the buffers of a call
    that is over.

    Args:
        work: a Call, which can run on torch's threads, or a Python function, which runs on the pool.
        held: what owns the memory that `work` has addresses of; kept alive until its last piece has ended.

    Returns:
        The smallest item that a piece has returned; -1 if none returned one of 0 or more.
    """
    most = n // smallest
    if most <= 1 or native is None:
        return _item(work(0, n))
    count, with_torch = _team()
    pieces = min(most, max(count * _SHARE if count > 1 else 1, most // _LARGEST))
    if pieces <= 1:
        return _item(work(0, n))
    job = (ctypes.c_int64 * 4)(0, pieces, 0, _NONE)  # struct Job of spread.c
    if with_torch and isinstance(work, Call) and threading.get_ident() == _MAIN:
        while (state := native.engram_parallel(job, work.address, work.arguments, n, count)) > 0:
            pass  # an interrupt is raised here
        if state == 0:
            return -1 if job[3] == _NONE else job[3]
    return min(_on_pool(n, job, min(count, pieces) - 1, work, held), default=-1)


_NONE = 2**63 - 1


def _item(result: Any) -> int:
    return -1 if result is None else result


def _on_pool(n: int, job: Any, helpers: int, work: Callable[[int, int], Any], held: tuple[Any, ...]) -> list[int]:
    """`spread` on the calling thread and threads of the pool; returns the items of 0 or more that pieces returned."""
    quick, finish, pieces = native.quick, native.engram_finish, job[1]
    here, errors, items = ctypes.addressof(job), list[BaseException](), list[int]()
    box = [(work, held)]

    def run(piece: int) -> None:
        item = _item(box[0][0](n * piece // pieces, n * (piece + 1) // pieces))
        if item >= 0:
            items.append(item)

    def helper(_: Any) -> None:
        while (piece := quick.engram_take(here)) >= 0:
            try:
                run(piece)
            except BaseException as error:
                errors.append(error)
                quick.engram_drop(here)
            finally:
                quick.engram_leave(here)

    try:
        _ask(helpers, helper, job)
        while (piece := quick.engram_take_own(here)) >= 0:
            run(piece)
    finally:
        finish(here)  # one C call, straight after the jump here: no interrupt falls between
        box.clear()  # a helper that wakes up later finds no piece, and keeps no buffer alive
    if errors:
        raise errors[0]
    return items


def _ask(count: int, work: Callable[..., None], *arguments: Any) -> None:
    try:
        for _ in range(count):
            _threads.pool.submit(work, *arguments)
    except RuntimeError:  # no thread can be started, or the interpreter is ending: the calling thread does it all
        pass
