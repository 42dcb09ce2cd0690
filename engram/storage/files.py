"""Rows on disk: raw bytes with a digest over every block, and files and folders that are whole or absent.

    FOLDER/manifest.json      "files": {name: {"bytes", "xxh3_128", "blocks": [xxh3-128 of each 16 MiB]}} and facts
          /layer-<i>.rows     raw rows of one table; blocks that were never written are holes

Blocks are streamed, so no table is ever held in memory a second time. What the facts of a memory's folder mean is
engram/memory/saved.py's matter; digests and `verify` are the same for memories and for training checkpoints.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import xxhash
from torch import Tensor

from engram.storage import readahead
from engram.storage.mapping import NO_LOCKS
from engram.storage.untrusted import open_regular, read_json

BLOCK = 16 << 20  # bytes
_TRIES = 20  # of read_folder
T = TypeVar("T")


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

    The rows must not be written meanwhile. on_bytes: told how many were written, block by block. Returns the file's
    entry of a manifest: {"bytes", "xxh3_128", "blocks"}.
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
    sync(path)
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


@cache
def zero_digest(count: int) -> str:
    """xxh3-128 of `count` zero bytes."""
    digest, zeros = xxhash.xxh3_128(), bytes(min(count, 1 << 20))
    for start in range(0, count, 1 << 20):
        digest.update(zeros[: count - start])
    return digest.hexdigest()


def written_blocks(entry: dict[str, Any]) -> list[int]:
    """Numbers of the blocks of a file that hold something else than zeros, by their digests in its manifest."""
    blocks, size = entry["blocks"], int(entry["bytes"])
    whole, last = zero_digest(BLOCK), zero_digest(size - (len(blocks) - 1) * BLOCK)
    return [i for i, digest in enumerate(blocks) if digest != (last if i == len(blocks) - 1 else whole)]


def sync(path: Path) -> None:
    """Force a file, or a folder's list of names, to the disk."""
    folder = path.is_dir()
    if folder and os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)  # Windows syncs no read-only descriptor
    try:
        os.fsync(handle)
    except OSError as error:
        if not folder or error.errno not in (errno.EBADF, errno.EINVAL, errno.ENOTSUP):
            raise  # some file systems cannot sync a folder, and say so by these
    finally:
        os.close(handle)


class NotSynced(OSError):
    """A file or folder is whole and in place, but the disk did not confirm its name."""


def _sync_name(path: Path) -> None:
    """Sync the folder that holds `path`, after a rename."""
    try:
        sync(path.parent)
    except OSError as error:
        raise NotSynced(
            error.errno,
            f"{path} is whole and in place, and what it replaced is gone, but the disk did not confirm the new name "
            f"({error.strerror or error}): after a power loss it may be missing. Check the disk and write it again",
        ) from error


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
    """Write the whole file, or leave what was there: a full disk, a kill or a power loss never shows half a file.

    Raises:
        OSError: the file cannot be written. NotSynced: it is in place, but the disk did not confirm it.
    """
    path = Path(path)
    with partial_folder(path) as partial:
        with open(partial / path.name, "xb") as file:
            file.write(content)
        sync(partial / path.name)
        put(partial / path.name, path)


def put(file: Path, target: Path) -> None:
    """Rename a synced file to its place, replacing what is there."""
    os.replace(file, target)
    _sync_name(target)


@contextmanager
def partial_folder(target: Path) -> Iterator[Path]:
    """A new empty folder beside `target`, to prepare files in that are then renamed to their places. It is removed
    when the block ends. The next writer of the same target removes what a killed one left."""
    remove_partial(target.parent, re.escape(target.name))
    partial, handle = _new_partial(target)
    try:
        yield partial
    finally:
        if handle is not None:
            os.close(handle)
        _remove(partial)


@contextmanager
def whole_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder to fill, which becomes `target` when the block ends without an error, and is removed otherwise.

    At every moment, also after a kill, `target` is the old folder, the new one or, if it was not there before, absent.
    Where the system cannot exchange two folders in one step (not Linux), there is one moment between two renames at
    which the old one has the name .<target>.old-*. Every file in it is synced before. Leftovers of killed writers are
    removed by the next one. An old folder that readers have pinned (see pinned_folder) is removed by the last of them.

    Raises:
        FileExistsError: the target is there, without overwrite; before the block begins, if it is there by then.
        NotSynced: the new folder is in place, but the disk did not confirm it.
    """
    target = Path(os.path.realpath(target))  # a link stays one
    if target.exists() and not overwrite:
        raise _exists(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_partial(target.parent, re.escape(target.name))
    partial, handle = _new_partial(target)
    try:
        try:
            yield partial
        except NotSynced as error:  # of a file inside: it goes with the folder, so nothing is in place
            raise OSError(error.errno, os.strerror(error.errno or errno.EIO)) from error
        for folder, _, names in os.walk(partial):
            for path in (*(Path(folder) / name for name in names), Path(folder)):
                sync(path)
        _place(partial, target, overwrite)
        if handle is not None:  # readers of the new folder lock it from here on
            os.close(handle)
            handle = None
        _sync_name(target)
    finally:
        if handle is not None:
            os.close(handle)
        _remove(partial)  # after an exchange this is the old folder


def _exists(target: Path) -> FileExistsError:
    return FileExistsError(f"{target} exists: give a new folder")


def _place(partial: Path, target: Path, overwrite: bool) -> None:
    """Rename `partial` to `target`. The old target, if there is one, is then called `partial` or is removed."""
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


def _new_partial(target: Path) -> tuple[Path, int | None]:
    """A new locked folder .<target>.partial-<pid>-<ns>, and its lock (None where the system has none)."""
    while True:
        partial = target.with_name(f".{target.name}.partial-{os.getpid()}-{time.time_ns()}")
        try:
            partial.mkdir()
        except FileExistsError:  # by another thread, or put there to be followed
            continue
        try:
            handle = _hold(partial)
            if handle is None or os.path.samestat(os.fstat(handle), os.stat(partial)):
                return partial, handle
            os.close(handle)
        except (BlockingIOError, FileNotFoundError):
            pass  # another writer took it for a leftover, before it was locked
        except BaseException:
            partial.rmdir()
            raise


def remove_partial(home: Path, names: str) -> None:
    """Remove what killed writers left in `home` beside targets of these names (a regular expression)."""
    pattern = re.compile(rf"\.(?:{names})\.partial-\d+(-\d+)?")
    for left in _listed(home, pattern):
        try:
            handle = _hold(left)
        except OSError:  # somebody writes or reads it, or it is gone
            continue
        if handle is not None:
            try:
                _delete(left)
            finally:  # a lock that outlives an interrupt would keep the leftover as long as this process
                os.close(handle)


def try_lock(handle: int, shared: bool = False) -> bool | None:
    """Lock an open file or folder for as long as its descriptor is open; False if another one holds it, None if this
    system or this file system has no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (*NO_LOCKS, errno.EINVAL, errno.EBADF):  # EBADF: NFS, for what is open for reading alone
            return None
        raise
    return True


def discard(folder: Path) -> None:
    """Remove a folder so that no part of it is ever seen under its name. Readers who have pinned it keep it."""
    old = folder.with_name(f".{folder.name}.partial-{os.getpid()}-{time.time_ns()}")
    os.rename(folder, old)
    _remove(old)


def _remove(path: Path) -> None:
    """Remove a folder with a partial name that this library made. If a reader holds it, the reader removes it."""
    try:
        handle = _hold(path)
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


def _listed(home: Path, pattern: re.Pattern[str]) -> list[Path]:
    """Entries of a folder whose whole name matches."""
    try:
        return sorted(home / name for name in os.listdir(home) if pattern.fullmatch(name))
    except OSError:
        return []


def _hold(path: Path) -> int | None:
    """Lock a file or folder for as long as the descriptor is open; None where the system has no such locks.

    Raises:
        BlockingIOError: another process or thread holds it. OSError: it cannot be opened.
    """
    if os.name == "nt":  # no such locks, and it opens no folders
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
    raise BlockingIOError(errno.EWOULDBLOCK, f"{path} is held by another process or thread")


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step (Linux renameat2). False where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    at, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(at, os.fsencode(a), at, os.fsencode(b), ctypes.c_uint(swap)) == 0


class Replaced(OSError):
    """A folder was replaced by another one while its files were read."""


@contextmanager
def pinned_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A path that goes on naming the folder that is there now, also if a writer replaces it meanwhile.

    The folder is opened once, and its files are opened through that descriptor (/proc/self/fd). A shared lock keeps
    whole_folder from deleting the old one before the block ends. Where the system has no such paths, the path is the
    folder's own, and the folder that is there at the end must be the one of the beginning. Errors that leave the block
    name the folder itself. A path that is not a folder is given back as it is.

    Raises:
        Replaced: the block failed, or may have read two folders, because the folder was replaced or removed.
    """
    shown = Path(folder)
    handle = _open_folder(shown)
    through = Path(f"/proc/self/fd/{handle}")
    path = through if handle is not None and through.is_dir() else shown
    before = _stamp(path)
    try:
        yield path
        if path == shown and _stamp(shown) != before:
            raise _replaced(shown)
    except Exception as error:
        if before is not None and not isinstance(error, Replaced) and _stamp(shown) != before:
            raise _replaced(shown) from error
        _rename_in(error, str(path), str(shown))
        raise
    finally:
        if handle is not None:
            _let_go(handle, shown)


def read_folder(folder: str | os.PathLike[str], read: Callable[[Path], T]) -> T:
    """read(path), with the folder pinned; again with the new folder, each time that it was replaced meanwhile.

    Raises:
        Replaced: it was replaced again and again.
    """
    for _ in range(_TRIES - 1):
        try:
            with pinned_folder(folder) as path:
                return read(path)
        except Replaced:
            continue
    with pinned_folder(folder) as path:
        return read(path)


def _replaced(folder: Path) -> Replaced:
    return Replaced(
        errno.ESTALE, f"{folder} was replaced or removed by another process while it was read: read it again"
    )


def _open_folder(folder: Path) -> int | None:
    """A descriptor of a folder, locked against removal where that can be; None for what is not a folder."""
    flags = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0)
    for _ in range(100):
        try:
            handle = os.open(folder, flags)
            break
        except OSError:
            if not _between_renames(folder):
                return None
            time.sleep(0.01)
    else:
        return None
    with suppress(OSError):
        try_lock(handle, shared=True)
    return handle


def _between_renames(folder: Path) -> list[Path]:
    """The old folders of writers that cannot exchange two names, while the new one has not its name yet."""
    olds = _listed(folder.parent, re.compile(rf"\.{re.escape(folder.name)}\.old-\w+"))
    return [old / folder.name for old in olds if (old / folder.name).exists()] if not folder.exists() else []


def _let_go(handle: int, shown: Path) -> None:
    """Close a pinned folder; the last reader of one that was replaced removes it."""
    left = None
    with suppress(OSError):
        if not (shown.exists() and os.path.samestat(os.fstat(handle), os.stat(shown))):
            left = Path(os.readlink(f"/proc/self/fd/{handle}"))  # where a writer has put it; Linux alone knows
    os.close(handle)
    if left is not None and (match := re.fullmatch(r"\.(.+)\.partial-\d+-\d+", left.name)):
        remove_partial(left.parent, re.escape(match[1]))


def _stamp(folder: Path) -> tuple[int, int, bytes] | None:
    """What tells a folder from one that replaced it; None for what is not a folder."""
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


def load_manifest(folder: str | os.PathLike[str], name: str = "manifest.json") -> dict[str, Any]:
    """A folder's manifest, parsed; of "files" every entry is well formed and every file is there with its size.

    name: of the manifest; a run's is its run.json.

    Raises:
        FileNotFoundError: no manifest.json there. ValueError: a damaged one, or a file missing, truncated or foreign.
    """
    home = Path(folder)
    path = home / name
    if not path.is_file():
        old = _between_renames(home)
        hint = f"; a save was cut short, rename {old[0]} to {home}" if old else ""
        raise FileNotFoundError(f"{home} is not a saved memory or checkpoint: it has no {name}{hint}")
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
    """Read every byte of a saved memory, a checkpoint, or a run's folder of checkpoints, and compare digests.

    Args:
        folder: what memory.save or `engram train` wrote.
        on_bytes: called with (file, bytes just read, bytes of all files), for a progress bar.

    Returns:
        One {"file", "bytes", "blocks", "bad_blocks", "problem", "note"} per file, problem None where all is well.
        Blocks are numbered from 0 and 16 MiB long; a file without block digests (dense weights) is one block. note:
        why a file could not be checked (None if it was): it is older than its digests, or its name is not a step's.

    Raises:
        FileNotFoundError: the folder holds nothing to verify.

    Example:
        >>> import engram, tempfile
        >>> config = engram.EngramConfig(layers=(0,), orders=(2,), heads=2, head_dim=4, rows_per_head=50)
        >>> memory = engram.EngramMemory(config, engram.TokenMap.identity(20), hidden_size=8)
        >>> folder = memory.save(tempfile.mkdtemp(), overwrite=True)
        >>> [entry["file"] for entry in engram.verify(folder) if entry["problem"]]
        []
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
            results.append(_result(step, problem=f"{step} is not a whole checkpoint: it has no manifest.json"))
    for other in sorted(set(home.glob("step-*/")) - set(steps)):
        results.append(_result(other, note=f"{other} was not checked: checkpoints are named step-<number>"))
    return results


def _result(path: Path, size: int = 0, problem: str | None = None, note: str | None = None) -> dict[str, Any]:
    return {"file": str(path), "bytes": size, "blocks": 0, "bad_blocks": [], "problem": problem, "note": note}


def _verify_files(
    home: Path, name: str, on_bytes: Callable[[str, int, int], None] | None = None
) -> list[dict[str, Any]]:
    """Verify the files that the manifest of this name lists, and the manifest itself."""
    return read_folder(home, lambda pinned: _verify_pinned(home, pinned, name, on_bytes))


def _verify_pinned(
    home: Path, pinned: Path, name: str, on_bytes: Callable[[str, int, int], None] | None
) -> list[dict[str, Any]]:
    path, results = home / name, list[dict[str, Any]]()
    try:
        if name == "run.json" and not _has_files(pinned / name):  # older than its digests
            manifest: dict[str, Any] = {"files": {}}
        else:
            manifest = load_manifest(pinned, name)
        if not check_digest(pinned / name, manifest):
            note = f"{path} has no digest, because an older version wrote it: what it says was not checked"
            results.append(_result(path, (pinned / name).stat().st_size, note=note))
    except ValueError as error:
        _check_same(home, pinned)
        return [_result(home, problem=str(error).replace(str(pinned), str(home)))]
    total = sum(int(entry["bytes"]) for entry in manifest["files"].values())
    for name, entry in manifest["files"].items():
        path, bad = home / name, list[int]()
        problem: str | None = None
        try:
            bad = bad_blocks(
                pinned / name,
                entry,
                on_bytes=lambda n, path=path: on_bytes and on_bytes(str(path), n, total),  # type: ignore[misc]
            )
        except (OSError, ValueError) as error:
            problem = str(error).replace(str(pinned), str(home))
        blocks = max(len(entry.get("blocks", [])), 1)
        if bad:
            listed = ", ".join(map(str, bad[:8])) + (f" and {len(bad) - 8} more" if len(bad) > 8 else "")
            where = f"block {listed} of {blocks} (16 MiB each, from byte {bad[0] * BLOCK:,})"
            problem = f"{path}: {where if blocks > 1 else 'the file'} does not have its digest: changed or torn"
        if problem:
            _check_same(home, pinned)
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


def _check_same(shown: Path, pinned: Path) -> None:
    """Raise Replaced if another folder has taken the place of the pinned one."""
    if not (shown.exists() and os.path.samefile(shown, pinned)):
        raise _replaced(shown)
