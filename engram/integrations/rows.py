"""The tables of a checkpoint: which tensors hold the rows of a layer, checked against the layout, read in blocks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from engram.addressing import HashLayout
from engram.config import EngramConfig
from engram.integrations.dialects import TABLE
from engram.integrations.tensors import Checkpoint, Stored
from engram.tables import EncodedTable, HostTable
from engram.tables.codecs import BLOCK

FORMS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F8_E4M3": "fp8", "U8": "fp8"}


class Rows:
    """One table's rows, in one or several parts on disk.

    form: "float32", "bfloat16", "float16", or "fp8": e4m3 values and e8m0 scales, read as uint8 [n, dim + dim / 32].
    parts: (first row, values, scales or None); scales None with fp8 means that each stored row holds both.
    """

    def __init__(self, name: str, dim: int, form: str, parts: list[tuple[int, Stored, Stored | None]], rows: int):
        self.name, self.dim, self.form, self.parts, self.rows = name, dim, form, parts, rows

    def read(self, first: int, stop: int) -> Tensor:
        """Rows first .. stop - 1: [n, dim] in the form's dtype, or uint8 [n, dim + dim / 32]."""
        pieces = []
        for start, values, scales in self.parts:
            lo, hi = max(first - start, 0), min(stop - start, values.shape[0])
            if lo >= hi:
                continue
            piece = values.read(lo, hi)
            if self.form == "fp8":
                piece = piece.view(torch.uint8)
                if scales is not None:
                    piece = torch.cat([piece, scales.read(lo, hi).view(torch.uint8)], dim=1)
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class TableRows(Rows):
    """Rows of a table that must be decoded to be read: int8, int4 and pq codecs, and never-written normal rows."""

    def __init__(self, name: str, table: HostTable):
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
        number = int(match[3] or 0) if kind == "qwen" else 0
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
    dim, parts, at, forms = config.head_dim, [], 0, set()
    for number in sorted(shards):
        name = shards[number]
        checkpoint.require(name)
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
            scale = scales[rank] if rank < len(scales) else None
            if values.dtype == "F8_E4M3":
                _check_scale(name, scale_name, values, scale, dim)
            elif scale is not None:
                raise ValueError(
                    f"{scale.path}: tensor {scale.name} scales {name}, which is {values.dtype}, not F8_E4M3"
                )
            parts.append((at, values, scale))
            at += values.shape[0]
            forms.add(FORMS[values.dtype])
    name = shards[0]
    if at != rows:
        held = f" in {len(parts)} parts" if len(parts) > 1 else ""
        swapped = [other for other, count in layout.rows.items() if count == at]
        hint = f"; that is the size of layer {swapped[0]}'s table: the layers are swapped" if swapped else ""
        raise ValueError(
            f"{parts[0][1].path}: tensor {name} has {at:,} rows{held}, expected {rows:,}: the primes of layer {layer} "
            f"above {config.row_counts}{hint}"
        )
    if len(forms) > 1:
        raise ValueError(f"the parts of {name} are stored differently: {', '.join(sorted(forms))}")
    return Rows(name, dim, forms.pop(), parts, rows)


def scale_of(checkpoint: Checkpoint, name: str) -> str | None:
    stem = name.removesuffix("weight")
    known = [stem + end for end in ("scale", "weight_scale_inv", "weight_scale", "scale_inv")]
    missing = {name for names in checkpoint.missing.values() for name in names}
    found = [n for n in known if n in checkpoint.tensors or n in missing]
    if found:
        checkpoint.require(found[0])
    return found[0] if found else None


def _check_scale(name: str, scale_name: str | None, values: Stored, scale: Stored | None, dim: int) -> None:
    expected = [values.shape[0], dim // BLOCK]
    if scale is None:
        stem = name.removesuffix("weight")
        raise ValueError(
            f"tensor {scale_name or stem + 'scale'} is missing: {name} is e4m3 and needs scales {expected}"
        )
    if dim % BLOCK or scale.dtype not in ("F8_E8M0", "U8") or list(scale.shape) != expected:
        raise ValueError(
            f"{scale.path}: tensor {scale.name} is {scale.dtype} {list(scale.shape)}, expected F8_E8M0 {expected}: one "
            f"scale per {BLOCK} values of a row of {name}. Another block size decodes without an error, to wrong values"
        )


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
