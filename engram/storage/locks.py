"""Locks on files and folders (flock), and the errors of file systems that lack them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

# Errors of flock on file systems that cannot lock: Lustre without -o flock, NFS without its lock daemon, FUSE.
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}


def try_lock(handle: int, shared: bool = False) -> bool | None:
    """Lock an open file or folder until its descriptor is closed. Return False if another descriptor has locked it, and
    None if this system or this file system has no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (*NO_LOCKS, errno.EINVAL, errno.EBADF):  # EBADF: NFS, if it is opened for reading only
            return None
        raise
    return True


def open_locked(path: Path) -> int | None:
    """Open and lock a file or folder, and return its descriptor; None if the system has no such locks.

    Raises:
        BlockingIOError: another process or thread has locked it. OSError: it cannot be opened.
    """
    if os.name == "nt":  # it has no such locks, and cannot open folders
        return None
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        locked = try_lock(handle)
    except OSError:
        locked = None
    if locked:
        return handle
    os.close(handle)
    if locked is None:
        return None
    raise BlockingIOError(errno.EWOULDBLOCK, f"{path} is locked by another process or thread")
