"""Rows on disk: raw bytes with a digest over every block, and folders that appear whole or not at all.

    FOLDER/manifest.json      "files": {name: {"bytes", "xxh3_128", "blocks": [xxh3-128 of each 16 MiB]}} and facts
          /layer-<i>.rows     raw rows of one table; blocks that were never written are holes

Blocks are streamed, so no table is ever held in memory a second time. What the facts of a memory's folder mean is
engram/saved.py's matter; digests and `verify` are the same for memories and for training checkpoints.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from engram.tables import readahead
from engram.tables.mapping import NO_LOCKS
from engram.untrusted import open_regular, read_json

BLOCK = 16 << 20  # bytes


def _bytes_of(rows: Tensor) -> np.ndarray:
    """The memory of a contiguous CPU tensor as uint8 [nbytes], no copy."""
    return rows.detach().flatten().view(torch.uint8).numpy()


def _blocks_of(rows: Tensor | Iterable[Tensor]) -> Iterator[np.ndarray]:
    """The bytes of one tensor, or of many in turn, BLOCK at a time. Each is valid until the next is asked for."""
    if isinstance(rows, Tensor):
        data = _bytes_of(rows)
        for start in range(0, len(data), BLOCK):
            readahead.will_read(data[start + BLOCK : start + 2 * BLOCK])  # of a mapped table
            yield data[start : start + BLOCK]
        return
    block, filled = np.empty(BLOCK, np.uint8), 0
    for part in rows:
        data = _bytes_of(part.contiguous())
        while len(data):
            piece = data[: BLOCK - filled]
            block[filled : filled + len(piece)] = piece
            filled, data = filled + len(piece), data[len(piece) :]
            if filled == BLOCK:
                yield block
                filled = 0
    if filled:
        yield block[:filled]


def write_rows(
    path: Path, rows: Tensor | Iterable[Tensor], on_bytes: Callable[[int], Any] | None = None
) -> dict[str, Any]:
    """Writes a tensor's bytes, or those of tensors that come one by one, synced to the disk; all-zero blocks (rows
    never written) become holes.

    Nobody may write the rows meanwhile. on_bytes: told how many were written, block by block. Returns the file's entry
    of a manifest: {"bytes", "xxh3_128", "blocks"}.
    """
    digest, blocks, size = xxhash.xxh3_128(), [], 0
    with open(path, "wb") as file:
        for block in _blocks_of(rows):
            digest.update(block.data)
            blocks.append(xxhash.xxh3_128_hexdigest(block.data))
            if block.any():
                file.write(block.data)
            else:
                file.seek(len(block), os.SEEK_CUR)
            size += len(block)
            if on_bytes is not None:
                on_bytes(len(block))
        file.truncate(size)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "xxh3_128": digest.hexdigest(), "blocks": blocks}


def read_rows(path: Path, rows: Tensor, expected: str) -> None:
    """Fills `rows` with the file's bytes.

    Raises:
        ValueError: a file of another size, or whose bytes do not have the `expected` digest. `rows` is then partly
        overwritten, so the caller must not go on with it.
    """
    digest, data = xxhash.xxh3_128(), _bytes_of(rows)
    size = path.stat().st_size
    if size != len(data):
        raise ValueError(f"{path} holds {size:,} bytes where {len(data):,} are expected: it is truncated or foreign")
    with open_regular(path) as file:
        for start in range(0, len(data), BLOCK):
            block = np.frombuffer(file.read(min(BLOCK, len(data) - start)), dtype=np.uint8)
            digest.update(block.data)
            target = data[start : start + len(block)]
            if block.any() or target.any():  # leave untouched pages untouched
                target[:] = block
    if digest.hexdigest() != expected:
        raise ValueError(
            f"{path} does not have the digest its manifest names: it was changed or torn, or belongs to another one; "
            f"`engram verify {path.parent}` says which block"
        )


def file_digest(path: Path) -> str:
    """xxh3-128 of a file's bytes, hex."""
    digest = xxhash.xxh3_128()
    with open_regular(path) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def file_entry(path: Path) -> dict[str, Any]:
    """A whole file's entry of a manifest, and the file synced to the disk."""
    sync(path)
    return {"bytes": path.stat().st_size, "xxh3_128": file_digest(path)}


def sync(path: Path) -> None:
    """Forces a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def manifest_digest(manifest: dict[str, Any]) -> str:
    """xxh3-128 of a manifest's canonical JSON, its own "digest" left out."""
    facts = {k: v for k, v in manifest.items() if k != "digest"}
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode())


def check_digest(path: Path, manifest: dict[str, Any]) -> bool:
    """Compare a manifest with the digest it states. Return False if it was written before manifests stated one.

    Raises:
        ValueError: the manifest was altered, or its format has a digest and this one lacks it.
    """
    if "digest" not in manifest and manifest.get("format") in (None, 1):
        return False
    if manifest.get("digest") != manifest_digest(manifest):
        raise ValueError(f"{path} was altered: it does not have the digest it states")
    return True


def step_folders(folder: str | os.PathLike[str]) -> list[Path]:
    """Folders named step-<digits> in a run's folder, the highest step last. Other names are not checkpoints."""
    named = [(re.fullmatch(r"step-([0-9]+)", path.name), path) for path in Path(folder).glob("step-*/")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in named if match)]


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes the whole file or leaves what was there: a full disk or a kill never shows half a file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder to fill, which becomes `target` when the block ends without an error, and is removed otherwise.

    At every moment, also after a kill, `target` is the old folder, the new one or, if it was not there before, absent.
    Where the system cannot exchange two folders in one step (not Linux), there is one moment between two renames at
    which the old one has the name .<target>.old-*. Leftovers of killed writers are removed by the next one.

    Raises:
        FileExistsError: the target is there, without overwrite; before the block begins, if it is there by then.
    """
    target = Path(os.path.realpath(target))  # a link stays one
    there = FileExistsError(f"{target} exists: give a new folder")
    if target.exists() and not overwrite:
        raise there
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_partial(target.parent, target.name)
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}-{time.time_ns()}")
    partial.mkdir()
    handle = _hold(partial)
    try:
        yield partial
        sync(partial)
        if not target.exists():
            os.rename(partial, target)
        elif not overwrite:
            raise there  # since then
        elif not _exchange(partial, target):
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
            os.rename(target, old / target.name)
            os.rename(partial, target)
            sync(target.parent)
            shutil.rmtree(old, ignore_errors=True)
        sync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # after an exchange this is the old folder
        if handle is not None:
            os.close(handle)


def remove_partial(home: Path, name: str) -> None:
    """Removes what killed writers of whole_folder left in `home` beside folders of this name (a pattern of glob)."""
    for left in home.glob(f".{name}.partial-*"):
        if (handle := _hold(left)) is not None:  # nobody is writing it
            shutil.rmtree(left, ignore_errors=True)
            os.close(handle)


def try_lock(handle: int) -> bool | None:
    """Lock an open file or folder for as long as its descriptor is open; False if another one holds it, None if this
    system or this file system has no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        raise
    return True


def _hold(folder: Path) -> int | None:
    """Locks a folder for as long as this process lives; None if another process holds it."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two names in one step (Linux renameat2). False where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    at, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(at, os.fsencode(a), at, os.fsencode(b), ctypes.c_uint(swap)) == 0


def load_manifest(folder: str | os.PathLike[str], name: str = "manifest.json") -> dict[str, Any]:
    """A folder's manifest, parsed; of "files" every entry is well formed and every file is there with its size.

    name: of the manifest; a run's is its run.json.

    Raises:
        FileNotFoundError: no manifest.json there. ValueError: a damaged one, or a file missing, truncated or foreign.
    """
    home = Path(folder)
    path = home / name
    if not path.is_file():
        old = [str(p) for p in home.parent.glob(f".{home.name}.old-*/{home.name}")]
        hint = f"; a save was cut short, rename {old[0]} to {home}" if old and not home.exists() else ""
        raise FileNotFoundError(f"{home} is no saved memory or checkpoint: it has no {name}{hint}")
    manifest = read_json(path, "the manifest of a saved memory or checkpoint")
    try:
        files = {str(k): (int(v["bytes"]), v["xxh3_128"], v.get("blocks", [])) for k, v in manifest["files"].items()}
        if not all(isinstance(digest, str) and isinstance(blocks, list) for _, digest, blocks in files.values()):
            raise TypeError("a digest is a string, blocks are a list of them")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
    for name, (size, _, blocks) in files.items():
        if Path(name).name != name or not (home / name).is_file():
            raise ValueError(f"{home} lacks the file {name!r} that its manifest names")
        found = (home / name).stat().st_size
        if found != size:
            raise ValueError(
                f"{home / name} holds {found:,} bytes where {size:,} are expected: it is truncated or foreign"
            )
        if blocks and len(blocks) != -(-size // BLOCK):
            raise ValueError(f"{path} is damaged: {len(blocks)} block digests for {size:,} bytes of {name}")
    return manifest


def bad_blocks(
    path: Path, entry: dict[str, Any], only: Sequence[int] | None = None, on_bytes: Callable[[int], None] | None = None
) -> list[int]:
    """Numbers of the blocks whose bytes do not have their digest; a file without block digests counts as one block.

    Args:
        only: look at these blocks alone. on_bytes: told how many bytes were read.
    """
    blocks = entry.get("blocks") or [entry["xxh3_128"]]
    length = BLOCK if entry.get("blocks") else max(int(entry["bytes"]), 1)
    bad, whole = [], xxhash.xxh3_128()
    with open_regular(path) as file:
        for number in range(len(blocks)) if only is None else only:
            file.seek(number * length)
            digest, left = xxhash.xxh3_128(), length
            while left and (piece := file.read(min(left, BLOCK))):
                digest.update(piece)
                whole.update(piece)
                left -= len(piece)
                if on_bytes:
                    on_bytes(len(piece))
            if digest.hexdigest() != blocks[number]:
                bad.append(number)
    if only is None and not bad and whole.hexdigest() != entry["xxh3_128"]:
        raise ValueError(f"{path}: every block has its digest but the whole has not: the manifest was altered")
    return bad


def verify(
    folder: str | os.PathLike[str], on_bytes: Callable[[str, int, int], None] | None = None
) -> list[dict[str, Any]]:
    """Reads every byte of a saved memory, a checkpoint, or a run's folder of checkpoints, and compares digests.

    Args:
        on_bytes: called with (file, bytes just read, bytes of all files), for a progress bar.

    Returns:
        One {"file", "bytes", "blocks", "bad_blocks", "problem", "note"} per file, problem None where all is well.
        Blocks are numbered from 0 and 16 MiB long; a file without block digests (dense weights) is one block. note:
        why a file could not be checked (None if it was): it is older than its digests, or its name is not a step's.

    Raises:
        FileNotFoundError: nothing to verify there.
    """
    home = Path(folder)
    steps = [] if (home / "manifest.json").is_file() else step_folders(home)
    if not steps:
        return _verify_files(home, "manifest.json", on_bytes)
    results = _verify_files(home, "run.json", on_bytes) if (home / "run.json").is_file() else []
    for step in steps:
        if (step / "manifest.json").is_file():
            results += _verify_files(step, "manifest.json", on_bytes)
        else:
            results.append(_result(step, problem=f"{step} is no whole checkpoint: it has no manifest.json"))
    for other in sorted(set(home.glob("step-*/")) - set(steps)):
        results.append(_result(other, note=f"{other} was not checked: checkpoints are named step-<number>"))
    return results


def _result(path: Path, size: int = 0, problem: str | None = None, note: str | None = None) -> dict[str, Any]:
    return {"file": str(path), "bytes": size, "blocks": 0, "bad_blocks": [], "problem": problem, "note": note}


def _verify_files(
    home: Path, name: str, on_bytes: Callable[[str, int, int], None] | None = None
) -> list[dict[str, Any]]:
    """Verify the files that the manifest of this name lists, and the manifest itself."""
    path, results = home / name, []
    try:
        if name == "run.json" and not _has_files(path):  # older than its digests
            manifest: dict[str, Any] = {"files": {}}
        else:
            manifest = load_manifest(home, name)
        if not check_digest(path, manifest):
            note = f"{path} has no digest, because an older version wrote it: what it says was not checked"
            results.append(_result(path, path.stat().st_size, note=note))
    except ValueError as error:
        return [_result(home, problem=str(error))]
    total = sum(int(entry["bytes"]) for entry in manifest["files"].values())
    for name, entry in manifest["files"].items():
        path, problem, bad = home / name, None, []
        try:
            bad = bad_blocks(path, entry, on_bytes=lambda n, path=path: on_bytes and on_bytes(str(path), n, total))  # type: ignore[misc]
        except (OSError, ValueError) as error:
            problem = str(error)
        blocks = max(len(entry.get("blocks", [])), 1)
        if bad:
            listed = ", ".join(map(str, bad[:8])) + (f" and {len(bad) - 8} more" if len(bad) > 8 else "")
            where = f"block {listed} of {blocks} (16 MiB each, from byte {bad[0] * BLOCK:,})"
            problem = f"{path}: {where if blocks > 1 else 'the file'} does not have its digest: changed or torn"
        result = _result(path, int(entry["bytes"]), problem)
        results.append(result | {"blocks": blocks, "bad_blocks": bad})
    return results


def _has_files(path: Path) -> bool:
    """Return False if a run.json is one of the first version, which names no files."""
    try:
        values = read_json(path, "the record of a run")
    except ValueError:
        return True  # damaged: load_manifest says how
    return not {"format", "files", "digest"}.isdisjoint(values)
