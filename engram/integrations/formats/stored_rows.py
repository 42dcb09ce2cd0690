"""The tables of a checkpoint: which tensors hold the rows of a layer, checked against the layout, read in blocks."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engram.addressing import HashLayout
from engram.config import EngramConfig
from engram.integrations.formats.dialects import TABLE
from engram.integrations.formats.safetensors_io import Checkpoint, Stored
from engram.tables import EncodedTable, Table
from engram.tables.codecs import BLOCK

FORMS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F8_E4M3": "fp8", "U8": "fp8", "I8": "int8"}
SCALES = ("F8_E8M0", "U8", "F32", "BF16", "F16")  # bytes are e8m0, as files had it before the format could name it


@dataclass(frozen=True)
class Scale:
    """The scales of a part of a table. value = fp32(stored value) * fp32(scale), whatever the tensor is called.

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
        """e8m0 bytes uint8 [n, dim / 32]; for scales whose `is_e8m0` is true."""
        count = dim // BLOCK
        if not self.block:
            exponent = int(math.log2(float(self._read(0, 1)))) + 127
            return torch.full((stop - first, count), exponent, dtype=torch.uint8)
        scales = self.stored.read(self.first + first, self.first + stop).view(torch.uint8).view(stop - first, -1)
        return scales.repeat_interleave(max(1, min(self.block, dim) // BLOCK), 1)[:, :count]

    def values(self, first: int, stop: int, dim: int) -> Tensor:
        """float32, to be multiplied with values [n, dim]."""
        if not self.block:
            return self._read(0, 1).view(1, 1)
        scales = self._read(self.first + first, self.first + stop).view(stop - first, -1)
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
        return (scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales).float()


class Rows:
    """One table's rows, in one or several parts on disk.

    form: as `read` gives them: "float32", "bfloat16", "float16", or "fp8": e4m3 values and e8m0 scales, as uint8
        [n, dim + dim / 32]. kept: the form in which our folder stores them.
    parts: (first row, values, scales or None); scales None with fp8 means that each stored row holds both.
    """

    def __init__(
        self,
        name: str,
        dim: int,
        form: str,
        parts: list[tuple[int, Stored, Scale | None]],
        rows: int,
        kept: str | None = None,
    ):
        self.name, self.dim, self.form, self.parts, self.rows = name, dim, form, parts, rows
        self.kept = kept or ("float32" if form == "float16" else form)

    def read(self, first: int, stop: int) -> Tensor:
        """Rows first .. stop - 1: [n, dim] in the form's dtype, or uint8 [n, dim + dim / 32]."""
        pieces = []
        for start, values, scales in self.parts:
            lo, hi = max(first - start, 0), min(stop - start, values.shape[0])
            if lo >= hi:
                continue
            piece = self._values(values, lo, hi)
            if self.form == "fp8":
                piece = piece.view(torch.uint8)
                if scales is not None:
                    piece = torch.cat([piece, scales.exponents(lo, hi, self.dim)], dim=1)
            elif scales is not None:
                piece = piece.float() * scales.values(lo, hi, self.dim)
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _values(self, stored: Stored, first: int, stop: int) -> Tensor:
        return stored.read(first, stop)

    @property
    def description(self) -> str:
        """The form, and where values are multiplied by scales that are not fp8 rows', how."""
        if not self.parts or (scale := self.parts[0][2]) is None or self.form == "fp8":
            return self.form
        per = "table" if not scale.block else "row" if scale.block >= self.dim else f"{scale.block} values"
        return f"{self.parts[0][1].dtype} x {scale.stored.dtype} per {per}"

    @property
    def nbytes(self) -> int:
        """Bytes of the rows as they are stored, scales included."""
        scales = {id(scale.stored): scale.nbytes for _, _, scale in self.parts if scale is not None}
        return sum(values.nbytes for _, values, _ in self.parts) + sum(scales.values())


class TableRows(Rows):
    """Rows of a table that must be decoded to be read: int8, int4 and pq codecs, and never-written normal rows."""

    def __init__(self, name: str, table: Table):
        form = str(table.dtype).removeprefix("torch.") if not isinstance(table, EncodedTable) else "float32"
        super().__init__(name, table.dim, form, [], table.rows)
        self.table = table

    def read(self, first: int, stop: int) -> Tensor:
        rows = self.table.gather(torch.arange(first, stop))
        self.table.drop()  # pages of a mapped file count as this process's memory
        return rows


def find_tables(
    checkpoint: Checkpoint, kind: str, config: EngramConfig
) -> tuple[dict[int, str], dict[int, dict[int, str]]]:
    """Per layer the prefix of its tensors, and the table's tensors by shard number (0 where it is one)."""
    prefixes: dict[int, str] = {}
    tables: dict[int, dict[int, str]] = {layer: {} for layer in config.layers}
    names = [*checkpoint.tensors, *(name for missing in checkpoint.missing.values() for name in missing)]
    for name in names:
        if (match := TABLE[kind].fullmatch(name)) is None:
            continue
        if match[2] is None and len(config.layers) > 1:
            raise ValueError(f"tensor {name} names no layer, but the config has layers {config.layers}")
        layer = config.layers[0] if match[2] is None else int(match[2])
        if layer not in tables:
            raise ValueError(f"tensor {name} is a table of layer {layer}; the config has layers {config.layers}")
        if prefixes.setdefault(layer, match[1]) != match[1]:
            raise ValueError(f"two tables of layer {layer}: below {prefixes[layer]!r} and {match[1]!r}")
        number = int(match[3] or match[4] or 0) if kind == "qwen" else 0
        if number in tables[layer]:
            raise ValueError(f"tensors {tables[layer][number]} and {name} are both of layer {layer}: which one counts?")
        tables[layer][number] = name
    for layer in config.layers:
        if not tables[layer]:
            raise ValueError(f"{checkpoint.home} holds no table of layer {layer}; the config has {config.layers}")
        absent = [i for i in range(max(tables[layer]) + 1) if i not in tables[layer]]
        if absent:
            raise ValueError(
                f"tensor {prefixes[layer]}ple_embedding.ngram_embedding.shard_{absent[0]}.weight is missing: shards "
                f"run up to {max(tables[layer])}"
            )
    return prefixes, tables


def table_rows(
    checkpoint: Checkpoint,
    kind: str,
    config: EngramConfig,
    layer: int,
    prefix: str,
    shards: Mapping[int, str],
    rows: int,
    layout: HashLayout,
) -> Rows:
    dim, at, dtypes = config.head_dim, 0, set[str]()
    parts: list[tuple[int, Stored, Scale | None]] = []
    for number in sorted(shards):
        name = shards[number]
        checkpoint.require(name)
        _refuse_offsets(checkpoint, name)
        scale_name = scale_of(checkpoint, name)
        scales = checkpoint.tensors.get(scale_name, []) if scale_name else []
        for rank, values in enumerate(checkpoint.tensors[name]):
            if values.dtype not in FORMS:
                raise ValueError(f"{values.path}: tensor {name} is {values.dtype}, expected one of {', '.join(FORMS)}")
            width = dim + dim // BLOCK if values.dtype == "U8" else dim
            if len(values.shape) != 2 or values.shape[1] != width:
                raise ValueError(
                    f"{values.path}: tensor {name} is {values.dtype} {list(values.shape)}, expected rows of {width}"
                )
            stored = scales[min(rank, len(scales) - 1)] if scales else None
            scale = None
            if values.dtype in ("F8_E4M3", "I8"):
                whole_table = stored is not None and scale_name == _table_scale(checkpoint, name)
                scale = _scale(name, scale_name, values, stored, dim, rows if whole_table else None, at)
            elif stored is not None:
                raise ValueError(
                    f"{stored.path}: tensor {stored.name} scales {name}, which is {values.dtype}, not F8_E4M3 or I8"
                )
            parts.append((at, values, scale))
            at += values.shape[0]
            dtypes.add(values.dtype)
    name = shards[0]
    if at != rows:
        held = f" in {len(parts)} parts" if len(parts) > 1 else ""
        swapped = [other for other, count in layout.rows.items() if count == at]
        hint = f"; that is the size of layer {swapped[0]}'s table: the layers are swapped" if swapped else ""
        raise ValueError(
            f"{parts[0][1].path}: tensor {name} has {at:,} rows{held}, expected {rows:,}: the primes of layer {layer} "
            f"above {config.row_counts}{hint}"
        )
    if len(dtypes) > 1:
        raise ValueError(f"the parts of {name} are stored differently: {', '.join(sorted(dtypes))}")
    dtype = dtypes.pop()
    scaled = [scale for _, _, scale in parts if scale is not None]
    if scaled and not (dtype == "F8_E4M3" and all(scale.is_e8m0(dim) for scale in scaled)):
        return Rows(name, dim, "float32", parts, rows, kept=config.table_dtype)
    return Rows(name, dim, FORMS[dtype], parts, rows)


_SCALE_NAMES = ("scale", "weight_scale_inv", "weight_scale", "scale_inv", "scales")  # all of them are multiplied by
_OFFSET_NAMES = ("biases", "zero_point", "zero_points", "weight_zero_point", "zeros", "qzeros")
_SHARD = re.compile(r"(?:shard_|shards\.)\d+(?:\.weight)?$")


def scale_of(checkpoint: Checkpoint, name: str) -> str | None:
    """Name of the tensor that scales another: beside it, or one for all shards of a table. ValueError for several."""
    found = [n for n in _beside(name, _SCALE_NAMES) if _is_named(checkpoint, n)]
    if (table := _table_scale(checkpoint, name)) is not None and table not in found:
        found.append(table)
    if len(found) > 1:
        raise ValueError(f"tensors {' and '.join(found)} both scale {name}: which one counts?")
    if found:
        checkpoint.require(found[0])
    return found[0] if found else None


def _table_scale(checkpoint: Checkpoint, name: str) -> str | None:
    """Name of the scales of all shards of a table; None if the tensor is not a shard or there are none."""
    if (match := _SHARD.search(name)) is None:
        return None
    names = [name[: match.start()] + end for end in _SCALE_NAMES]
    return next((n for n in names if _is_named(checkpoint, n)), None)


def _beside(name: str, ends: tuple[str, ...]) -> list[str]:
    stem = name.removesuffix("weight") if name.endswith(".weight") else f"{name}."
    return [stem + end for end in ends]


def _is_named(checkpoint: Checkpoint, name: str) -> bool:
    return name in checkpoint.tensors or any(name in names for names in checkpoint.missing.values())


def _refuse_offsets(checkpoint: Checkpoint, name: str) -> None:
    stem = _SHARD.sub("weight", name)
    for other in {*_beside(name, _OFFSET_NAMES), *_beside(stem, _OFFSET_NAMES)}:
        if _is_named(checkpoint, other):
            raise ValueError(f"tensor {other} shifts the values of {name}: rows with offsets cannot be read")


def _scale(
    name: str, scale_name: str | None, values: Stored, stored: Stored | None, dim: int, whole: int | None, first: int
) -> Scale:
    """The scales of one part, by their shape. whole: rows of the table, if the scales are those of all its parts."""
    rows, kind = values.shape[0], "e4m3" if values.dtype == "F8_E4M3" else "int8"
    if stored is None:
        stem = name.removesuffix("weight")
        needs = f"[{rows}, {dim // BLOCK}] or one per row or table"
        raise ValueError(f"tensor {scale_name or stem + 'scale'} is missing: {name} is {kind} and needs scales {needs}")
    shape = stored.shape
    count = rows if whole is None or not shape or shape[0] != whole else whole
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
    return Scale(stored, block, first if count == whole and whole != rows else 0)


def check_buffers(checkpoint: Checkpoint, kind: str, prefix: str, layout: HashLayout, layer: int) -> None:
    """Offsets, moduli and multipliers that a checkpoint states must be the layout's, as 64-bit integers."""
    moduli = [p for heads in layout.moduli[layer] for p in heads]
    stated: dict[str, list[int]] = {}
    if kind == "demo":
        stated = {"multi_head_embedding.offsets": list(layout.offsets[layer])}
    elif kind == "qwen":
        stated = {
            "ple_embedding.ngram_heads_offsets": list(layout.offsets[layer]),
            "ple_embedding.ngram_heads_vocab_sizes": moduli,
            "ple_embedding.layer_multipliers": list(layout.multipliers[layer]),
        }
    for name, expected in stated.items():
        if prefix + name not in checkpoint.tensors:
            continue  # not all savers keep buffers
        stored = checkpoint.one(prefix + name, (len(expected),))
        if stored.dtype != "I64":
            raise ValueError(
                f"{stored.path}: tensor {prefix + name} is {stored.dtype}, expected I64: row ids need 64 bits"
            )
        found = stored.read().tolist()
        if found != expected:
            place = next(i for i in range(len(expected)) if found[i] != expected[i])
            raise ValueError(
                f"{stored.path}: tensor {prefix + name} has {found[place]} at place {place}, expected "
                f"{expected[place]}: its rows were addressed by another layout"
            )
