"""Folders that are written completely or not at all, and read as one state even while a writer replaces them."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from engram.storage.files import NotSynced, sync, sync_name
from engram.storage.locks import try_lock
from engram.storage.partial import matching, new_partial, remove_partial, remove_unless_locked

_TRIES = 20  # of read_folder
T = TypeVar("T")


@contextmanager
def whole_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """Make a new folder to fill. It becomes `target` if the block ends without an error, and is removed otherwise.

    At every moment, also after a kill, `target` is the old folder, the new one or, if it did not exist before, absent.
    If the system cannot exchange two folders in one step (not Linux), there is one moment between two renames at
    which the old folder has the name .<target>.old-*. All files are synced before the exchange. The next writer
    removes the leftovers of killed writers. The last reader of a pinned old folder (see pinned_folder) removes it.

    Raises:
        FileExistsError: the target exists, and overwrite is False; raised before the block if it exists already.
        NotSynced: the new folder is in place, but the disk did not confirm it.
    """
    target = Path(os.path.realpath(target))  # a link stays a link
    if target.exists() and not overwrite:
        raise _exists(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_partial(target.parent, re.escape(target.name))
    partial, handle = new_partial(target)
    try:
        try:
            yield partial
        except NotSynced as error:  # of a file inside: the new folder is removed, so it is not at `target`
            raise OSError(error.errno, os.strerror(error.errno or errno.EIO)) from error
        for folder, _, names in os.walk(partial):
            for path in (*(Path(folder) / name for name in names), Path(folder)):
                sync(path)
        _place(partial, target, overwrite)
        if handle is not None:  # from here on readers lock the new folder
            os.close(handle)
            handle = None
        sync_name(target)
    finally:
        if handle is not None:
            os.close(handle)
        remove_unless_locked(partial)  # after an exchange this is the old folder


def _exists(target: Path) -> FileExistsError:
    return FileExistsError(f"{target} exists: give a new folder")


def _place(partial: Path, target: Path, overwrite: bool) -> None:
    """Rename `partial` to `target`. An old target is then called `partial`, or is removed."""
    while True:
        if not target.exists():
            try:
                os.rename(partial, target)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                continue  # another writer came first
        if not overwrite:
            raise _exists(target)
        if _exchange(partial, target):
            return
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
        try:
            os.rename(target, old / target.name)
        except OSError as error:
            os.rmdir(old)
            if isinstance(error, FileNotFoundError):  # another writer is between its two renames
                continue
            raise
        try:
            os.rename(partial, target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # another writer came between
                shutil.rmtree(old, ignore_errors=True)
                continue
            os.rename(old / target.name, target)
            os.rmdir(old)
            raise
        shutil.rmtree(old, ignore_errors=True)
        return


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step (Linux renameat2). Return False if the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    at, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(at, os.fsencode(a), at, os.fsencode(b), ctypes.c_uint(swap)) == 0


class Replaced(OSError):
    """A folder was replaced by another one while its files were read."""


@contextmanager
def pinned_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Return a path that names the present folder until the block ends, also if a writer replaces it.

    The folder is opened once, and its files are opened through that descriptor (/proc/self/fd). A shared lock keeps
    whole_folder from deleting the old folder before the block ends. If the system has no such paths, the path is the
    folder's own, and the folder at the end must be the one of the beginning. Errors that leave the block name the
    folder itself. If `folder` is not a folder, the path is returned unchanged.

    Raises:
        Replaced: the block failed, or may have read two folders, because the folder was replaced or removed.
    """
    shown = Path(folder)
    handle = _open_folder(shown)
    through = Path(f"/proc/self/fd/{handle}")
    path = through if handle is not None and through.is_dir() else shown
    before = _identity(path)
    try:
        yield path
        if path == shown and _identity(shown) != before:
            raise replaced(shown)
    except Exception as error:
        if before is not None and not isinstance(error, Replaced) and _identity(shown) != before:
            raise replaced(shown) from error
        _rename_in(error, str(path), str(shown))
        raise
    finally:
        if handle is not None:
            _unpin(handle, shown)


def read_folder(folder: str | os.PathLike[str], read: Callable[[Path], T]) -> T:
    """Return read(path) with the folder pinned. If the folder is replaced meanwhile, repeat with the new one.

    Raises:
        Replaced: the folder was replaced during each of 20 attempts.
    """
    for _ in range(_TRIES - 1):
        try:
            with pinned_folder(folder) as path:
                return read(path)
        except Replaced:
            continue
    with pinned_folder(folder) as path:
        return read(path)


def replaced(folder: Path) -> Replaced:
    """Make the error for a folder that changed while it was read."""
    return Replaced(
        errno.ESTALE, f"{folder} was replaced or removed by another process while it was read: read it again"
    )


def _open_folder(folder: Path) -> int | None:
    """Open a folder, and lock it against removal if the system has locks. Return None if it is not a folder."""
    flags = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0)
    for _ in range(100):
        try:
            handle = os.open(folder, flags)
            break
        except OSError:
            if not between_renames(folder):
                return None
            time.sleep(0.01)
    else:
        return None
    with suppress(OSError):
        try_lock(handle, shared=True)
    return handle


def between_renames(folder: Path) -> list[Path]:
    """Return the old folders of writers that are between two renames; empty if `folder` exists."""
    olds = matching(folder.parent, re.compile(rf"\.{re.escape(folder.name)}\.old-\w+"))
    return [old / folder.name for old in olds if (old / folder.name).exists()] if not folder.exists() else []


def _unpin(handle: int, shown: Path) -> None:
    """Close a pinned folder. If it was replaced and this is its last reader, remove it."""
    leftover = None
    with suppress(OSError):
        if not (shown.exists() and os.path.samestat(os.fstat(handle), os.stat(shown))):
            leftover = Path(os.readlink(f"/proc/self/fd/{handle}"))  # its present name; only Linux has this
    os.close(handle)
    if leftover is not None and (match := re.fullmatch(r"\.(.+)\.partial-\d+-\d+", leftover.name)):
        remove_partial(leftover.parent, re.escape(match[1]))


def _identity(folder: Path) -> tuple[int, int, bytes] | None:
    """Return the device, inode and manifest that tell a folder from its replacement; None if it is not a folder."""
    try:
        status = os.stat(folder)
        manifest = folder / "manifest.json"
        return (status.st_dev, status.st_ino, manifest.read_bytes() if manifest.is_file() else b"")
    except OSError:
        return None


def _rename_in(error: BaseException, old: str, new: str) -> None:
    """Replace a path in the texts of an error."""
    if old == new:
        return
    error.args = tuple(_renamed(a, old, new) for a in error.args)
    if isinstance(error, OSError):
        for name in ("strerror", "filename", "filename2"):
            if (value := getattr(error, name)) is not None:
                setattr(error, name, _renamed(value, old, new))


def _renamed(value: Any, old: str, new: str) -> Any:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    return value.replace(old, new) if isinstance(value, str) else value
