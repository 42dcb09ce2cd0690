"""Read-ahead for the rows of a mapped file: page ranges of row ids, passed to the system in batches."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import Callable

import numpy as np

_MERGE = 4  # pages: ranges nearer than this become one request
_BATCH = 1024  # ranges per system call (IOV_MAX)
_PROCESS_MADVISE = 440  # the same number on every Linux architecture
_SAMPLE, _FEW = 64, 4  # with fewer than 4 of 64 rows missing, requests for all rows cost more than they save
NORMAL, RANDOM, _WILLNEED, _DONTNEED = 0, 1, 3, 4  # for madvise


def page_ranges(
    row_ids: np.ndarray, row_bytes: int, nbytes: int, page: int = mmap.PAGESIZE, offset: int = 0
) -> np.ndarray:
    """Return the pages of some rows, as few byte ranges.

    Args:
        row_ids: int64, any shape, each in the table. row_bytes: bytes per row. nbytes: bytes of the file up to the
            table's end. offset: first byte of the table in its file.

    Returns:
        int64 [ranges, 2], (first byte, bytes), ascending and page-aligned except at the end of the table.
    """
    first = (np.unique(row_ids) * row_bytes + offset) // page
    if not len(first):
        return np.empty((0, 2), np.int64)
    last = (np.unique(row_ids) * row_bytes + offset + row_bytes - 1) // page
    gap = np.flatnonzero(first[1:] - last[:-1] > _MERGE)
    start = first[np.concatenate([[0], gap + 1])] * page
    end = np.minimum((last[np.concatenate([gap, [len(last) - 1]])] + 1) * page, nbytes)
    return np.stack([start, end - start], axis=1)


def in_memory(file: int, address: int, row_ids: np.ndarray, row_bytes: int, offset: int = 0) -> bool:
    """Return True if the page cache holds nearly all of these rows of a table mapped from `file` at `address`, judged
    by a sample of 64; about 0.1 ms. Return False if the system cannot tell."""
    ids = row_ids.reshape(-1)
    if sys.platform != "linux" or not len(ids):
        return False
    missing, resident = 0, _resident_pages(file, address)
    for row in ids[:: max(1, len(ids) // _SAMPLE)][:_SAMPLE].tolist():
        missing += not resident(offset + row * row_bytes)
        if missing >= _FEW:
            return False
    return True


def _resident_pages(file: int, address: int) -> Callable[[int], bool]:
    """Return a function that tells if the page of a byte of a mapped file is in memory, by calls open to this user."""
    owner = os.fstat(file).st_uid
    if os.geteuid() in (
        0,
        owner,
    ):  # mincore reads nothing, but for files of other users it reports every page as resident
        mincore, state = ctypes.CDLL(None).mincore, ctypes.c_ubyte()
        mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
        address_of_state = ctypes.addressof(state)

        def resident(byte: int) -> bool:
            failed = mincore((address + byte) // mmap.PAGESIZE * mmap.PAGESIZE, 1, address_of_state)
            return not failed and bool(state.value & 1)
    else:  # preadv starts a read if the page is missing; a very fast disk counts as memory
        buffer = bytearray(1)

        def resident(byte: int) -> bool:
            try:
                os.preadv(file, [buffer], byte, os.RWF_NOWAIT)
            except BlockingIOError:  # it would wait for the disk
                return False
            except OSError:  # a file system in memory
                pass
            return True

    return resident


def will_need(file: int, address: int, row_ids: np.ndarray, row_bytes: int, nbytes: int, offset: int = 0) -> int:
    """Start to read the pages of some rows of a table mapped from `file` at `address`. Return the bytes requested."""
    ranges = page_ranges(row_ids, row_bytes, nbytes, offset=offset)
    done = _advise_batches(ranges, address) if sys.platform == "linux" else 0
    if hasattr(os, "posix_fadvise"):
        for start, size in ranges[done:].tolist():  # an older system: one call per range
            os.posix_fadvise(file, start, size, os.POSIX_FADV_WILLNEED)
    return int(ranges[:, 1].sum())


def _advise_batches(ranges: np.ndarray, address: int) -> int:
    """Request ranges with process_madvise, about a thousand per call. Return how many ranges were accepted."""
    if not hasattr(os, "pidfd_open"):
        return 0
    vectors = ranges.copy()
    vectors[:, 0] += address
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        process = os.pidfd_open(os.getpid())
    except OSError:
        return 0
    try:
        for start in range(0, len(vectors), _BATCH):
            batch = vectors[start : start + _BATCH]
            accepted = libc.syscall(
                ctypes.c_long(_PROCESS_MADVISE),
                ctypes.c_int(process),
                ctypes.c_void_p(batch.ctypes.data),
                ctypes.c_size_t(len(batch)),
                ctypes.c_int(_WILLNEED),
                ctypes.c_uint(0),
            )
            if accepted < 0 and ctypes.get_errno() != errno.EAGAIN:  # this kernel lacks it, or does not allow it
                return start
    finally:
        os.close(process)
    return len(vectors)


def advise(address: int, nbytes: int, advice: int) -> None:
    """Call madvise on complete pages. A system that lacks the advice ignores it."""
    if hasattr(mmap, "MADV_RANDOM"):
        start = address - address % mmap.PAGESIZE
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(address + nbytes - start), ctypes.c_int(advice))


def will_read(data: np.ndarray) -> None:
    """Start to read a contiguous array if it is mapped from a file; return at once if it is in memory."""
    if data.nbytes:
        advise(data.ctypes.data, data.nbytes, _WILLNEED)


def drop(file: int, address: int, nbytes: int) -> None:
    """Unmap the pages of a mapped file and drop them from the page cache. The file must be synced."""
    if hasattr(os, "posix_fadvise"):
        advise(address, nbytes, _DONTNEED)  # pages that are still mapped stay in the cache
        os.posix_fadvise(file, 0, nbytes, os.POSIX_FADV_DONTNEED)
