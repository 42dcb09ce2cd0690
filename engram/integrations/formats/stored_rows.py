"""The tables of a checkpoint: the tensors that hold a layer's rows, checked against the layout and read in blocks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from engram.addressing import HashLayout
from engram.config import EngramConfig
from engram.integrations.formats.dialects import TABLE
from engram.integrations.formats.safetensors_io import Checkpoint, Stored
from engram.integrations.formats.scales import Scale, read_scale, refuse_offsets, scale_of, table_scale
from engram.tables import EncodedTable, Table
from engram.tables.codecs import BLOCK

CODECS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F8_E4M3": "fp8", "U8": "fp8", "I8": "int8"}


class Rows:
    """Reader of one table's rows, in one or several parts on disk.

    codec: of the rows that `read` returns: "float32", "bfloat16", "float16", or "fp8" (e4m3 values and e8m0 scales, as
        uint8 [n, dim + dim / 32]). kept: the codec with which a saved memory stores them.
    parts: (first row, values, scales or None); with fp8, None means that each stored row holds values and scales.
    """

    def __init__(
        self,
        name: str,
        dim: int,
        codec: str,
        parts: list[tuple[int, Stored, Scale | None]],
        rows: int,
        kept: str | None = None,
    ):
        self.name, self.dim, self.codec, self.parts, self.rows = name, dim, codec, parts, rows
        self.kept = kept or ("float32" if codec == "float16" else codec)

    def read(self, first: int, stop: int) -> Tensor:
        """Return rows first .. stop - 1: [n, dim] in the codec's dtype, or uint8 [n, dim + dim / 32] for fp8."""
        pieces = []
        for start, values, scales in self.parts:
            lo, hi = max(first - start, 0), min(stop - start, values.shape[0])
            if lo >= hi:
                continue
            piece = self._values(values, lo, hi)
            if self.codec == "fp8":
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
        """Codec of the rows; if values have other scales than fp8 rows, their dtype and the dtype of the scales."""
        if not self.parts or (scale := self.parts[0][2]) is None or self.codec == "fp8":
            return self.codec
        per = "table" if not scale.block else "row" if scale.block >= self.dim else f"{scale.block} values"
        return f"{self.parts[0][1].dtype} x {scale.stored.dtype} per {per}"

    def bytes_as(self, codec: str) -> int:
        """Return the bytes of all rows in a codec."""
        width = self.dim + self.dim // BLOCK if codec == "fp8" else self.dim * getattr(torch, codec).itemsize
        return self.rows * width

    @property
    def nbytes(self) -> int:
        """Bytes of the rows as they are stored, scales included."""
        scales = {id(scale.stored): scale.nbytes for _, _, scale in self.parts if scale is not None}
        return sum(values.nbytes for _, values, _ in self.parts) + sum(scales.values())


class TableRows(Rows):
    """Rows that only their table can decode: int8, int4 and pq codecs, and never-written rows of a normal init."""

    def __init__(self, name: str, table: Table):
        codec = str(table.dtype).removeprefix("torch.") if not isinstance(table, EncodedTable) else "float32"
        super().__init__(name, table.dim, codec, [], table.rows)
        self.table = table

    def read(self, first: int, stop: int) -> Tensor:
        rows = self.table.gather(torch.arange(first, stop))
        self.table.drop()  # pages of a mapped file count as memory of this process
        return rows


def find_tables(
    checkpoint: Checkpoint, kind: str, config: EngramConfig
) -> tuple[dict[int, str], dict[int, dict[int, str]]]:
    """Return, for each layer, the prefix of its tensors, and its table's tensors by shard number (0 for one tensor)."""
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
            raise ValueError(f"tensors {tables[layer][number]} and {name} are both tables of layer {layer}: remove one")
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
    """Return the reader of a layer's rows, after a check of every part against the layout.

    Args:
        prefix: of the layer's tensors. shards: the table's tensors by number. rows: of the table, by the layout.

    Raises:
        ValueError: a part is missing or has another width or dtype, or the scales do not fit it, by name.
    """
    dim, at, dtypes = config.head_dim, 0, set[str]()
    parts: list[tuple[int, Stored, Scale | None]] = []
    for number in sorted(shards):
        name = shards[number]
        checkpoint.require(name)
        refuse_offsets(checkpoint, name)
        scale_name = scale_of(checkpoint, name)
        scales = checkpoint.tensors.get(scale_name, []) if scale_name else []
        for rank, values in enumerate(checkpoint.tensors[name]):
            if values.dtype not in CODECS:
                raise ValueError(f"{values.path}: tensor {name} is {values.dtype}, expected one of {', '.join(CODECS)}")
            width = dim + dim // BLOCK if values.dtype == "U8" else dim
            if len(values.shape) != 2 or values.shape[1] != width:
                raise ValueError(
                    f"{values.path}: tensor {name} is {values.dtype} {list(values.shape)}, expected rows of {width}"
                )
            stored = scales[min(rank, len(scales) - 1)] if scales else None
            scale = None
            if values.dtype in ("F8_E4M3", "I8"):
                of_all = stored is not None and scale_name == table_scale(checkpoint, name)
                scale = read_scale(name, scale_name, values, stored, dim, rows if of_all else None, at)
            elif stored is not None:
                raise ValueError(
                    f"{stored.path}: tensor {stored.name} scales {name}, which is {values.dtype}, not F8_E4M3 or I8"
                )
            parts.append((at, values, scale))
            at += values.shape[0]
            dtypes.add(values.dtype)
    name = shards[0]
    if at != rows:
        split = f" in {len(parts)} parts" if len(parts) > 1 else ""
        swapped = [other for other, count in layout.rows.items() if count == at]
        hint = f"; that is the size of layer {swapped[0]}'s table: the layers are swapped" if swapped else ""
        raise ValueError(
            f"{parts[0][1].path}: tensor {name} has {at:,} rows{split}, expected {rows:,}: the primes of layer {layer} "
            f"above {config.row_counts}{hint}"
        )
    if len(dtypes) > 1:
        raise ValueError(f"the parts of {name} have different dtypes: {', '.join(sorted(dtypes))}")
    dtype = dtypes.pop()
    scaled = [scale for _, _, scale in parts if scale is not None]
    if scaled and not (dtype == "F8_E4M3" and all(scale.is_e8m0(dim) for scale in scaled)):
        return Rows(name, dim, "float32", parts, rows, kept=config.table_dtype)
    return Rows(name, dim, CODECS[dtype], parts, rows)


def check_buffers(checkpoint: Checkpoint, kind: str, prefix: str, layout: HashLayout, layer: int) -> None:
    """Raise ValueError if a checkpoint's offsets, moduli or multipliers are not the layout's, as 64-bit integers."""
    moduli = [p for heads in layout.moduli[layer] for p in heads]
    buffers: dict[str, list[int]] = {}
    if kind == "demo":
        buffers = {"multi_head_embedding.offsets": list(layout.offsets[layer])}
    elif kind == "qwen":
        buffers = {
            "ple_embedding.ngram_heads_offsets": list(layout.offsets[layer]),
            "ple_embedding.ngram_heads_vocab_sizes": moduli,
            "ple_embedding.layer_multipliers": list(layout.multipliers[layer]),
        }
    for name, expected in buffers.items():
        if prefix + name not in checkpoint.tensors:
            continue  # some programs do not save buffers
        stored = checkpoint.one(prefix + name, (len(expected),))
        if stored.dtype != "I64":
            raise ValueError(
                f"{stored.path}: tensor {prefix + name} is {stored.dtype}, expected I64: row ids need 64 bits"
            )
        values = stored.read().tolist()
        if values != expected:
            index = next(i for i in range(len(expected)) if values[i] != expected[i])
            raise ValueError(
                f"{stored.path}: tensor {prefix + name} has {values[index]} at index {index}, expected "
                f"{expected[index]}: its rows were addressed by another layout"
            )
