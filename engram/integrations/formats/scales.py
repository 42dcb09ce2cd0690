"""Scales of stored values: the tensors that hold them, checked by shape, and read as e8m0 bytes or as float32."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engram.integrations.formats.safetensors_io import Checkpoint, Stored
from engram.tables.codecs import BLOCK

SCALES = ("F8_E8M0", "U8", "F32", "BF16", "F16")  # U8 is e8m0 in files from before the format had a name for it
_SCALE_NAMES = (
    "scale",
    "weight_scale_inv",
    "weight_scale",
    "scale_inv",
    "scales",
)  # values are multiplied by each of these
_OFFSET_NAMES = ("biases", "zero_point", "zero_points", "weight_zero_point", "zeros", "qzeros")
_SHARD = re.compile(r"(?:shard_|shards\.)\d+(?:\.weight)?$")


@dataclass(frozen=True)
class Scale:
    """Scales of a part of a table: value = fp32(stored value) * fp32(scale), whatever the tensor's name.

    stored: one scale, or one per row, or one per `block` values of a row (block 0: one scale for all). first: the row
    of `stored` that belongs to the part's first row.
    """

    stored: Stored
    block: int
    first: int = 0

    @property
    def path(self) -> Path:
        return self.stored.path

    @property
    def nbytes(self) -> int:
        return self.stored.nbytes

    def exponents(self, first: int, stop: int, dim: int) -> Tensor:
        """Return e8m0 bytes, uint8 [n, dim / 32]; only for scales whose `is_e8m0` is true."""
        count = dim // BLOCK
        if not self.block:
            exponent = int(math.log2(float(self._read(0, 1)))) + 127
            return torch.full((stop - first, count), exponent, dtype=torch.uint8)
        scales = self.stored.read(self.first + first, self.first + stop).view(torch.uint8).view(stop - first, -1)
        return scales.repeat_interleave(max(1, min(self.block, dim) // BLOCK), 1)[:, :count]

    def values(self, first: int, stop: int, dim: int) -> Tensor:
        """Return float32 scales to multiply with values [n, dim]."""
        if not self.block:
            return self._read(0, 1).view(1, 1)
        return self.widen(self.stored.read(self.first + first, self.first + stop).view(stop - first, -1), dim)

    def widen(self, scales: Tensor, dim: int) -> Tensor:
        """Return stored scales [n, scales per row] as float32 [n, 1] or [n, dim]."""
        scales = _as_float(scales)
        return scales if scales.shape[1] == 1 else scales.repeat_interleave(self.block, 1)[:, :dim]

    def is_e8m0(self, dim: int) -> bool:
        """Return True if our fp8 rows, with an e8m0 scale per 32 values, can hold e4m3 values of these scales."""
        if dim % BLOCK:
            return False
        if self.block:
            return self.stored.dtype in ("F8_E8M0", "U8") and (self.block >= dim or self.block % BLOCK == 0)
        scale = float(self._read(0, 1))
        return math.isfinite(scale) and scale > 0 and math.frexp(scale)[0] == 0.5 and -127 <= math.log2(scale) <= 127

    def _read(self, first: int, stop: int) -> Tensor:
        scales = self.stored.read() if not self.block else self.stored.read(first, stop)
        return _as_float(scales)


def _as_float(scales: Tensor) -> Tensor:
    return (scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales).float()


def scale_of(checkpoint: Checkpoint, name: str) -> str | None:
    """Return the name of the tensor that scales another, or None: beside it, or one for all shards of a table.

    Raises:
        ValueError: two tensors scale it, or the scales are in a missing file.
    """
    scales = [n for n in _beside(name, _SCALE_NAMES) if _is_named(checkpoint, n)]
    if (table := table_scale(checkpoint, name)) is not None and table not in scales:
        scales.append(table)
    if len(scales) > 1:
        raise ValueError(f"tensors {' and '.join(scales)} both scale {name}: remove the one that does not apply")
    if scales:
        checkpoint.require(scales[0])
    return scales[0] if scales else None


def table_scale(checkpoint: Checkpoint, name: str) -> str | None:
    """Return the name of the scales of all shards of a table; None if the tensor is not a shard or has none."""
    if (match := _SHARD.search(name)) is None:
        return None
    names = [name[: match.start()] + end for end in _SCALE_NAMES]
    return next((n for n in names if _is_named(checkpoint, n)), None)


def _beside(name: str, ends: tuple[str, ...]) -> list[str]:
    """Return the names with other ends in place of "weight"."""
    stem = name.removesuffix("weight") if name.endswith(".weight") else f"{name}."
    return [stem + end for end in ends]


def _is_named(checkpoint: Checkpoint, name: str) -> bool:
    """Return True if the files or the index list this tensor."""
    return name in checkpoint.tensors or any(name in names for names in checkpoint.missing.values())


def refuse_offsets(checkpoint: Checkpoint, name: str) -> None:
    """Raise ValueError if the rows are stored with offsets (biases or zero points)."""
    stem = _SHARD.sub("weight", name)
    for other in {*_beside(name, _OFFSET_NAMES), *_beside(stem, _OFFSET_NAMES)}:
        if _is_named(checkpoint, other):
            raise ValueError(f"tensor {other} shifts the values of {name}: rows with offsets cannot be read")


def read_scale(
    name: str,
    scale_name: str | None,
    values: Stored,
    stored: Stored | None,
    dim: int,
    table_rows: int | None,
    first: int,
) -> Scale:
    """Return the scales of one part, by their shape.

    table_rows: rows of the table, if the scales are those of all its parts. first: the part's first row.
    """
    rows, kind = values.shape[0], "e4m3" if values.dtype == "F8_E4M3" else "int8"
    if stored is None:
        stem = name.removesuffix("weight")
        needs = f"[{rows}, {dim // BLOCK}] or one per row or table"
        raise ValueError(f"tensor {scale_name or stem + 'scale'} is missing: {name} is {kind} and needs scales {needs}")
    shape = stored.shape
    count = rows if table_rows is None or not shape or shape[0] != table_rows else table_rows
    block = None
    if math.prod(shape) == 1 and len(shape) <= 2:
        block = 0
    elif shape in ((count,), (count, 1)):
        block = dim
    elif len(shape) == 2 and shape[0] == count:
        block = next((b for b in (1 << i for i in range(3, 15)) if -(-dim // b) == shape[1]), None)
    if block is None or stored.dtype not in SCALES:
        raise ValueError(
            f"{stored.path}: tensor {stored.name} is {stored.dtype} {list(shape)}, expected {', '.join(SCALES)}: one "
            f"scale, or one per row [{rows}, 1], or one per 8, 16, 32 ... values of a row, such as [{rows}, "
            f"{-(-dim // BLOCK)}]. Another block size decodes {name} without an error, to wrong values"
        )
    return Scale(stored, block, first if count == table_rows and table_rows != rows else 0)
