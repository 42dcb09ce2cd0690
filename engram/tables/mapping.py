"""Bytes to keep rows in: anonymous memory, or a locked and mapped file."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path


def map_memory(nbytes: int, what: str) -> tuple[mmap.mmap, bool]:
    """Zeroed address space that becomes memory page by page as it is written, and whether huge pages were granted.

    Args:
        nbytes: how much. what: the table in words, for the error.

    Raises:
        OSError: no address space for it.
    """
    try:
        if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
            return mmap.mmap(-1, nbytes), False
        no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)  # in mmap since 3.13
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    except (OSError, OverflowError) as error:
        raise OSError(
            f"no {nbytes:,} bytes of address space for a table of {what}: {error}. "
            f"Give the table a path to keep it in a file, or fewer rows."
        ) from error
    try:  # before the first touch; fewer TLB misses on random rows
        memory.madvise(mmap.MADV_HUGEPAGE)
        return memory, True
    except (AttributeError, OSError):
        return memory, False


def map_file(path: Path, nbytes: int, what: str) -> tuple[mmap.mmap, int]:
    """A file of exactly `nbytes` bytes, mapped for reading and writing, and its descriptor, which holds the lock.

    A missing file is made with its disk space reserved at once; close the descriptor to let the file go.

    Raises:
        ValueError: a file of another size. BlockingIOError: the file is held by another table. OSError: no disk space.
    """
    fresh = not path.exists()
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock(file, path)
        if fresh:
            try:
                _reserve(file, nbytes)
            except OSError as error:
                path.unlink(missing_ok=True)
                raise OSError(
                    error.errno, f"no room for a table of {nbytes:,} bytes at {path}: {error.strerror}"
                ) from error
        found = os.fstat(file).st_size
        if found != nbytes:
            raise ValueError(
                f"{path} holds {found:,} bytes, but {what} need {nbytes:,}: it belongs to another layout or is torn"
            )
        return mmap.mmap(file, nbytes), file
    except BaseException:
        os.close(file)
        raise


def _lock(file: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(
            error.errno, f"{path} is already held by another table: two layers must never share one file"
        ) from None


def _reserve(file: int, nbytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, nbytes)
    else:
        os.ftruncate(file, nbytes)
