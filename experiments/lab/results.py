"""The results of a question: one line per run in results.jsonl, and documents.npz with the losses of every held-out
document of each run.

Both files are written under one lock, complete or not at all. documents.npz is a zip archive of NumPy arrays named
"<key of the run>/<name>"; np.load opens it, and reading the arrays of one run reads no others.
"""

from __future__ import annotations

import contextlib
import fcntl  # Unix only
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

Record = dict[str, Any]
DOCUMENTS = "documents.npz"


def read_results(file: Path) -> list[Record]:
    """Return the runs of a results.jsonl or tune.jsonl, oldest first; [] if the file does not exist.

    Raises:
        ValueError: a line that is not a result, with its number; an incomplete last line.
    """
    if not file.exists():
        return []
    text = file.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
        raise ValueError(f"the last line of {file} is incomplete: the next `python -m experiments run` removes it")
    results = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            results.append(json.loads(line))
            results[-1]["key"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{file}, line {number} is not a result: delete it, and its run is repeated") from error
    return results


def read_lines(file: Path) -> list[Record]:
    """Return the lines that a script of its own wrote, oldest first; [] if the file does not exist."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder of results: one writer at a time, over all sweeps on the machine."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # released when its process ends
        yield
    finally:
        os.close(handle)


def append(file: Path, record: Record) -> None:
    """Append one line in one write and wait until it is on the disk. Raises OSError if it did not fit."""
    line = (json.dumps(record) + "\n").encode()
    with alone(file.parent):
        handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            written = os.write(handle, line)
            if written != len(line):
                raise OSError(f"{file}: {written} of {len(line)} bytes written, is the disk full?")
            os.fsync(handle)
        finally:
            os.close(handle)


def repair(file: Path) -> int:
    """Truncate an incomplete last line, so that its run is repeated. Returns the number of bytes removed."""
    content = file.read_bytes() if file.exists() else b""
    complete = content.rfind(b"\n") + 1
    if complete < len(content):
        os.truncate(file, complete)
        print(f"{file}: removed an incomplete last line of {len(content) - complete} bytes", file=sys.stderr)
    return len(content) - complete


def read_documents(home: Path, key: str, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """Return the arrays of one run from home/documents.npz, or only those in `names`.

    Raises:
        FileNotFoundError: the file, the run or one of the names is missing.
    """
    file = home / DOCUMENTS
    if not file.exists():
        raise FileNotFoundError(
            f"{file} is missing, the per-document losses of all runs: restore it, or run them again"
        )
    version = file.stat()
    arrays = _opened(file, version.st_ino, version.st_mtime_ns, version.st_size)
    of_run = [name for name in arrays.files if name.startswith(f"{key}/")]
    chosen = of_run if names is None else [f"{key}/{name}" for name in names]
    missing = [name for name in chosen if name not in of_run]
    if missing or not of_run:
        raise FileNotFoundError(
            f"{file} has no array {', '.join(missing) or key + '/...'}: delete the line of run {key} from "
            f"{home / 'results.jsonl'} and run it again"
        )
    return {name.removeprefix(f"{key}/"): arrays[name] for name in chosen}


@lru_cache(maxsize=16)  # of all questions: claims go from one to another
def _opened(file: Path, *version: int) -> np.lib.npyio.NpzFile:
    """Open the archive of one version of the file. Reading its list of members takes longer than the arrays of a run,
    so it stays open; a file that was replaced is opened again."""
    return np.load(file)


def document_keys(home: Path) -> set[str]:
    """Return the keys of the runs that home/documents.npz has arrays of."""
    if not (home / DOCUMENTS).exists():
        return set()
    with zipfile.ZipFile(home / DOCUMENTS) as archive:
        return {name.partition("/")[0] for name in archive.namelist()}


def write_documents(home: Path, key: str, arrays: dict[str, np.ndarray]) -> None:
    """Add the arrays of one run to home/documents.npz, compressed; arrays that the run has in it are replaced.

    Raises:
        OSError: the disk is full; the file is unchanged then.
    """
    home.mkdir(parents=True, exist_ok=True)
    with alone(home):
        _write(home, {} if key not in document_keys(home) else {key: None}, {key: arrays})


def rename_documents(home: Path, keys: dict[str, str]) -> None:
    """Give the arrays of runs another key, {old: new}. The caller holds the lock; raises OSError."""
    renamed: dict[str, str | None] = {old: new for old, new in keys.items() if old in document_keys(home)}
    if renamed:
        _write(home, renamed, {})


def _write(home: Path, renamed: dict[str, str | None], added: dict[str, dict[str, np.ndarray]]) -> None:
    """Write a new archive beside the old one and replace the old one by it. renamed: {old key: new key, None
    to drop}."""
    file, partial = home / DOCUMENTS, home / f".documents.{os.getpid()}.partial"
    try:
        if file.exists() and not renamed:
            shutil.copyfile(file, partial)  # members that stay need not be compressed again
        with zipfile.ZipFile(partial, "a" if partial.exists() else "w", zipfile.ZIP_DEFLATED) as archive:
            if file.exists() and renamed:
                with zipfile.ZipFile(file) as old:
                    for name in old.namelist():
                        key, _, rest = name.partition("/")
                        new = renamed.get(key, key)
                        if new is not None:
                            _put(archive, f"{new}/{rest}", old.read(name))
            for key, arrays in added.items():
                for name, array in arrays.items():
                    with archive.open(_member(f"{key}/{name}.npy"), "w", force_zip64=True) as stream:
                        np.lib.format.write_array(stream, np.asanyarray(array), allow_pickle=False)
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _put(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    archive.writestr(_member(name), content)


def _member(name: str) -> zipfile.ZipInfo:
    """Describe a member without the time of writing, so that the same arrays make the same file."""
    info = zipfile.ZipInfo(name)
    info.compress_type = zipfile.ZIP_DEFLATED
    return info
