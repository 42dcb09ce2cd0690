"""Raw rows on disk: streamed in blocks, never a second copy in memory, with a digest over every byte."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

_BLOCK = 16 << 20  # bytes


def _bytes_of(rows: Tensor) -> np.ndarray:
    """The memory of a contiguous CPU tensor as uint8 [nbytes], no copy."""
    return rows.detach().flatten().view(torch.uint8).numpy()


def write_rows(path: Path, rows: Tensor) -> dict[str, int | str]:
    """Writes a tensor's bytes; all-zero blocks (rows never written) become holes. Returns {"bytes", "xxh3_128"}."""
    digest, data = xxhash.xxh3_128(), _bytes_of(rows)
    with open(path, "wb") as file:
        for start in range(0, len(data), _BLOCK):
            block = data[start : start + _BLOCK]
            digest.update(block.data)
            if block.any():
                file.write(block.data)
            else:
                file.seek(len(block), os.SEEK_CUR)
        file.truncate(len(data))
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(data), "xxh3_128": digest.hexdigest()}


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
    with open(path, "rb") as file:
        for start in range(0, len(data), _BLOCK):
            block = np.frombuffer(file.read(min(_BLOCK, len(data) - start)), dtype=np.uint8)
            digest.update(block.data)
            target = data[start : start + len(block)]
            if block.any() or target.any():  # leave untouched pages untouched
                target[:] = block
    if digest.hexdigest() != expected:
        raise ValueError(f"{path} does not have the digest its manifest names: it was changed or torn")


def file_digest(path: Path) -> str:
    """xxh3-128 of a file's bytes, hex."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
