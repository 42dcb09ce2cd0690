"""Memory for the rows of a table: anonymous, or a locked and mapped file."""

from __future__ import annotations

import errno
import mmap
import os
import sys
import warnings
from pathlib import Path

from engram.storage import limits
from engram.storage.locks import NO_LOCKS
from engram.storage.untrusted import check_regular
from engram.storage.weak import WeakList

_on_huge_pages: WeakList[mmap.mmap] = WeakList()  # memory that may be committed 2 MiB at a time
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)  # not on Windows


def map_memory(nbytes: int, what: str) -> mmap.mmap:
    """Reserve zeroed address space, which becomes memory page by page when written; on huge pages if possible.

    Args:
        nbytes: the size. what: the table in words, for the error.

    Raises:
        OSError: there is not enough address space.
    """
    try:
        if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
            return mmap.mmap(-1, nbytes)
        no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)  # in mmap since 3.13
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)
    except (OSError, OverflowError) as error:
        raise OSError(
            f"no {nbytes:,} bytes of address space for a table of {what}: {error}. "
            f"Give the table a path to keep it in a file, or fewer rows."
        ) from error
    # On huge pages a touched row commits 2 MiB: use them only if all such tables fit in memory together.
    free, others = limits.free_memory(), sum(len(mapped) for mapped in _on_huge_pages.living())
    if nbytes <= free // 2 and nbytes + others <= free // 4 * 3:
        try:  # before the first touch; fewer TLB misses on random rows
            memory.madvise(mmap.MADV_HUGEPAGE)
            _on_huge_pages.add(memory)
        except (AttributeError, OSError):
            pass
    return memory


def map_file(path: Path, nbytes: int, what: str, writable: bool = True) -> tuple[mmap.mmap, int]:
    """Map a file of exactly `nbytes` bytes. Return the mapping and the descriptor that keeps the lock.

    The lock is exclusive for writing and shared for reading; it ends when the descriptor is closed. If the file is
    missing, it is created with its disk space reserved.

    Raises:
        ValueError: the file has another size. BlockingIOError: another table has locked it. FileNotFoundError: there is
        no file to read. PermissionError: the file may not be opened in this mode. OSError: the disk is full, or the
        path is a pipe, socket, device or folder.
    """
    if writable and path.is_symlink():
        raise OSError(
            errno.ELOOP,
            f"{path} is a symbolic link, and rows are written in place: a link may lead to the rows of another "
            f"memory. Link their whole folder instead, or give the path of {os.path.realpath(path)} itself",
        )
    fresh = not path.exists()
    if not fresh:
        check_regular(path, "a file of rows")  # opening a pipe could block forever
    elif not writable:
        raise FileNotFoundError(f"{path} does not exist: a table opened for reading needs its file of rows")
    create = os.O_CREAT | os.O_EXCL if fresh else 0
    try:
        file = os.open(path, os.O_RDWR | _NOFOLLOW | create if writable else os.O_RDONLY, 0o644)
    except FileExistsError:  # another process created it since the check above
        return map_file(path, nbytes, what, writable)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        hint = 'open it with mode="r" to read its rows' if writable else "ask its owner"
        how = "written" if writable else "read"
        raise PermissionError(error.errno, f"{path} cannot be {how} ({error.strerror}): {hint}") from None
    try:
        lock(file, path, exclusive=writable)
        # Reserve the space of a file with holes (a saved memory) now: on a full disk a write to a hole is a crash.
        holes = writable and getattr(os.fstat(file), "st_blocks", 1 << 62) * 512 < nbytes
        if fresh or (holes and os.fstat(file).st_size == nbytes):
            try:
                _reserve(file, nbytes)
            except OSError as error:
                raise OSError(
                    error.errno, f"no room for a table of {nbytes:,} bytes at {path}: {error.strerror}"
                ) from error
        size = os.fstat(file).st_size
        if size != nbytes:
            raise ValueError(
                f"{path} holds {size:,} bytes, but {what} need {nbytes:,}: it belongs to another layout or is torn"
            )
        memory = mmap.mmap(file, nbytes, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_RANDOM"):  # otherwise each cold row reads megabytes around it
            memory.madvise(mmap.MADV_RANDOM)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        return memory, file
    except BaseException as error:
        os.close(file)
        if fresh:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            raise OSError(error.errno, f"no address space to map {path}, {nbytes:,} bytes: {error.strerror}") from error
        raise


def lock(file: int, path: Path, exclusive: bool) -> None:
    """Lock a file of rows, or warn if it is opened for writing where files cannot be locked.

    Raises:
        BlockingIOError: another table has locked it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(
            error.errno,
            f"{path} is already open in another table, or in its optimizer: two must never share one file"
            if exclusive
            else f"{path} is open in a table that trains it: close that table, or save it and read the copy",
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise OSError(error.errno, f"{path} cannot be locked: {error.strerror}") from error
        if exclusive:
            warnings.warn(
                f"{path} lies on a file system without locks ({error.strerror}), so a second process that opens it "
                f"for writing is not detected: let one process at a time train these rows, or keep the folder on a "
                f"local disk (Lustre: mount it with -o flock)",
                stacklevel=5,
            )


def unlock(file: int) -> None:
    """Unlock a file of rows. Closing its descriptor is not enough: a traceback, for example, can keep its mapping
    alive."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_UN)
    except (ImportError, OSError):
        pass


def _reserve(file: int, nbytes: int) -> None:
    """Reserve disk space for a file, so that later writes cannot run out of it (if the system supports this)."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, nbytes)
    else:
        os.ftruncate(file, nbytes)
