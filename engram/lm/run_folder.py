"""Lock the folder of a run while it trains, so that one process writes there, and append a line per step to its log."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from engram.storage.files import write_whole
from engram.storage.locks import try_lock

LOCK, LOG = ".lock", "log.jsonl"
_locked: ContextVar[frozenset[tuple[int, str]]] = ContextVar("held", default=frozenset())


@contextmanager
def alone_in(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Lock a folder during the block, so that no other process or thread writes a run there. Blocks of one thread nest.

    The operating system holds the lock, on FOLDER/.lock, so it ends with its process, also after a kill. If the file
    system has no locks, there is a warning. A folder that did not exist and is empty at the end is removed.

    Raises:
        BlockingIOError: another process or thread holds the folder. OSError: the folder cannot be written.
    """
    home = Path(folder)
    new = not home.exists()
    home.mkdir(parents=True, exist_ok=True)
    key = (os.getpid(), os.path.realpath(home))
    if key in _locked.get():
        yield
        return
    handle = _lock(home)
    token = _locked.set(_locked.get() | {key})
    try:
        yield
    finally:
        _locked.reset(token)
        if os.getpid() == key[0]:  # a forked child must not remove its parent's lock
            with suppress(OSError):
                (home / LOCK).unlink()
                if new:  # rmdir fails unless the folder is empty: then the run wrote nothing
                    home.rmdir()
        os.close(handle)


def _lock(home: Path) -> int:
    """Return a locked descriptor of the lock file, which holds the number of this process."""
    path = home / LOCK
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            locked = try_lock(handle)
            if locked is False:
                pid = os.read(handle, 20).decode("ascii", "replace").strip()
                who = f"another process (pid {pid})" if pid.isdigit() else "another process"
                who = "another thread of this process" if pid == str(os.getpid()) else who
                raise BlockingIOError(f"{who} trains in {home}: wait until it ends, or train in another folder")
            if locked is None:
                warnings.warn(
                    f"{home} is on a file system without locks (flock), so a second process that trains there is not "
                    f"detected: train there from one process at a time",
                    stacklevel=5,
                )
            if _is_at(handle, path):  # else its last holder removed it since it was opened
                os.ftruncate(handle, 0)
                os.write(handle, str(os.getpid()).encode())
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


class StepLog:
    """Append one JSON object per training step to FOLDER/log.jsonl, as soon as the step is done.

    Args:
        folder: folder of the run.
        step: step of the checkpoint from which the run continues. Lines of later steps (written by a run that was
            killed after its newest checkpoint) and an incomplete last line are removed, so that each step has one line.
    """

    def __init__(self, folder: str | os.PathLike[str], step: int):
        self.path = Path(folder) / LOG
        before = self.path.read_bytes() if self.path.exists() else b""
        kept = b"".join(line for line in before.splitlines(keepends=True) if _is_before(line, step))
        if kept != before:
            write_whole(self.path, kept)
        self._file = open(self.path, "ab", buffering=0)

    def write(self, values: dict[str, Any]) -> None:
        self._file.write((json.dumps(values) + "\n").encode())

    def sync(self) -> None:
        """Force the lines to the disk, before the checkpoint of their steps is written."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _is_before(line: bytes, step: int) -> bool:
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
