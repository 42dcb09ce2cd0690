"""One file on disk: raw rows with a digest per block, and files that are written completely or not at all.

Blocks are streamed, so that a table is never in memory a second time.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from engram import _moved
from engram.storage import readahead
from engram.storage.partial import partial_folder
from engram.storage.untrusted import open_regular

BLOCK = 16 << 20  # bytes


def _bytes_of(rows: Tensor) -> np.ndarray:
    """View the memory of a contiguous CPU tensor as uint8 [nbytes], without a copy."""
    return rows.detach().flatten().view(torch.uint8).numpy()


def _blocks_of(rows: Tensor | Iterable[Tensor]) -> Iterator[np.ndarray]:
    """Yield the bytes of one tensor, or of several in order, BLOCK at a time; each is valid until the next one."""
    if isinstance(rows, Tensor):
        data = _bytes_of(rows)
        for start in range(0, len(data), BLOCK):
            readahead.will_read(data[start + BLOCK : start + 2 * BLOCK])  # if the table is mapped from a file
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
    """Write the bytes of a tensor, or of several tensors in order, and sync the file. Return its entry for a manifest.

    All-zero blocks (rows never written) become holes. The rows must not change during the call.

    Args:
        path: the new file. rows: contiguous CPU tensors, or an iterable that makes them one by one.
        on_bytes: called after each block with the number of bytes written.

    Returns:
        {"bytes", "xxh3_128", "blocks": [xxh3-128 of each 16 MiB]}.
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
    """Read a file's bytes into `rows`.

    Raises:
        ValueError: the file has another size, or its bytes do not have the `expected` digest. `rows` is then partly
        overwritten and must not be used.
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
            f"{path} does not have the digest its manifest names: it was changed or torn, or belongs to another "
            f"manifest; `engram verify {path.parent}` names the block"
        )


def file_digest(path: Path) -> str:
    """Return the xxh3-128 of a file's bytes, in hex."""
    digest = xxhash.xxh3_128()
    with open_regular(path) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def file_entry(path: Path) -> dict[str, Any]:
    """Sync a complete file and return its entry for a manifest, without block digests."""
    sync(path)
    return {"bytes": path.stat().st_size, "xxh3_128": file_digest(path)}


@cache
def zero_digest(count: int) -> str:
    """Return the xxh3-128 of `count` zero bytes."""
    digest, zeros = xxhash.xxh3_128(), bytes(min(count, 1 << 20))
    for start in range(0, count, 1 << 20):
        digest.update(zeros[: count - start])
    return digest.hexdigest()


def written_blocks(entry: dict[str, Any]) -> list[int]:
    """Return the numbers of the blocks of a file that are not all zero, by their digests in its manifest."""
    blocks, size = entry["blocks"], int(entry["bytes"])
    full, last = zero_digest(BLOCK), zero_digest(size - (len(blocks) - 1) * BLOCK)
    return [i for i, digest in enumerate(blocks) if digest != (last if i == len(blocks) - 1 else full)]


def bad_blocks(
    path: Path, entry: dict[str, Any], only: Sequence[int] | None = None, on_bytes: Callable[[int], None] | None = None
) -> list[int]:
    """Return the numbers of the blocks whose bytes do not have their digest. A file without block digests is one block.

    Args:
        path: the file. entry: its entry in the manifest. only: the blocks to read (by default all).
        on_bytes: called with the number of bytes just read.

    Raises:
        ValueError: every block has its digest, but the file does not.
    """
    blocks = entry.get("blocks") or [entry["xxh3_128"]]
    length = BLOCK if entry.get("blocks") else max(int(entry["bytes"]), 1)
    bad, all_bytes = [], xxhash.xxh3_128()
    with open_regular(path) as file:
        for number in range(len(blocks)) if only is None else only:
            file.seek(number * length)
            digest, left = xxhash.xxh3_128(), length
            while left and (piece := file.read(min(left, BLOCK))):
                digest.update(piece)
                all_bytes.update(piece)
                left -= len(piece)
                if on_bytes:
                    on_bytes(len(piece))
            if digest.hexdigest() != blocks[number]:
                bad.append(number)
    if only is None and not bad and all_bytes.hexdigest() != entry["xxh3_128"]:
        raise ValueError(f"{path}: every block has its digest, but the file does not: the manifest was altered")
    return bad


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file completely or not at all: after a full disk, a kill or a power loss the old file is still there.

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
    """Rename a synced file to `target`, replace an existing file, and sync the new name."""
    os.replace(file, target)
    sync_name(target)


class NotSynced(OSError):
    """A file or folder is complete under its final name, but the disk did not confirm that name."""


def sync(path: Path) -> None:
    """Force a file, or a folder's list of names, to the disk."""
    folder = path.is_dir()
    if folder and os.name == "nt":  # Windows cannot open folders
        return
    handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)  # Windows cannot sync a read-only descriptor
    try:
        os.fsync(handle)
    except OSError as error:
        if not folder or error.errno not in (errno.EBADF, errno.EINVAL, errno.ENOTSUP):
            raise  # file systems that cannot sync a folder return one of these
    finally:
        os.close(handle)


def sync_name(path: Path) -> None:
    """Sync the folder that holds `path`, after a rename."""
    try:
        sync(path.parent)
    except OSError as error:
        raise NotSynced(
            error.errno,
            f"{path} is complete, and what it replaced is removed, but the disk did not confirm the new name "
            f"({error.strerror or error}): after a power loss it may be missing. Check the disk and write it again",
        ) from error


if not TYPE_CHECKING:  # a type checker that saw it would accept any name

    def __getattr__(name: str) -> Any:
        """Serve the names that have moved to other modules of this room, for one version."""
        return _moved.moved_name(__name__, name)
