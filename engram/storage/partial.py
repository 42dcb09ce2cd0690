"""Partial folders: where a writer prepares files beside their target, and what is removed after a killed writer."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from engram.storage.locks import open_locked


@contextmanager
def partial_folder(target: Path) -> Iterator[Path]:
    """Make an empty folder beside `target`, for files that are renamed to their final names when they are complete.

    The folder is removed when the block ends. If the writer is killed, the next writer of the same target removes it.
    """
    remove_partial(target.parent, re.escape(target.name))
    partial, handle = new_partial(target)
    try:
        yield partial
    finally:
        if handle is not None:
            os.close(handle)
        remove_unless_locked(partial)


def new_partial(target: Path) -> tuple[Path, int | None]:
    """Make and lock a folder .<target>.partial-<pid>-<ns>. Return it with the descriptor of its lock, or None if the
    system has no locks."""
    while True:
        partial = target.with_name(f".{target.name}.partial-{os.getpid()}-{time.time_ns()}")
        try:
            partial.mkdir()
        except FileExistsError:  # made by another thread, or a link that must not be followed
            continue
        try:
            handle = open_locked(partial)
            if handle is None or os.path.samestat(os.fstat(handle), os.stat(partial)):
                return partial, handle
            os.close(handle)
        except (BlockingIOError, FileNotFoundError):
            pass  # another writer removed it as a leftover before it was locked
        except BaseException:
            partial.rmdir()
            raise


def remove_partial(home: Path, names: str) -> None:
    """Remove the partial folders of killed writers in `home`. names: regular expression of their targets' names."""
    pattern = re.compile(rf"\.(?:{names})\.partial-\d+(-\d+)?")
    for leftover in matching(home, pattern):
        try:
            handle = open_locked(leftover)
        except OSError:  # a process writes or reads it, or it is gone
            continue
        if handle is not None:
            try:
                _delete(leftover)
            finally:  # after an interrupt too: a lock left open would keep the leftover until this process ends
                os.close(handle)


def discard(folder: Path) -> None:
    """Rename a folder, then remove it, so that its name never shows a part of it. Readers keep a pinned folder."""
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}-{time.time_ns()}")
    os.rename(folder, partial)
    remove_unless_locked(partial)


def remove_unless_locked(path: Path) -> None:
    """Remove a partial folder of this process. If a reader has locked it, the reader removes it at the end."""
    try:
        handle = open_locked(path)
    except OSError:
        return
    try:
        _delete(path)
    finally:
        if handle is not None:
            os.close(handle)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def matching(home: Path, pattern: re.Pattern[str]) -> list[Path]:
    """Return the entries of a folder whose full name matches, sorted; empty if it cannot be listed."""
    try:
        return sorted(home / name for name in os.listdir(home) if pattern.fullmatch(name))
    except OSError:
        return []
