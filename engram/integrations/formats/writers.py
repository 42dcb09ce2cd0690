"""Writers of `engram convert`: each streams a source's rows into new files and reads them back to compare digests."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from engram.addressing import HashLayout
from engram.fusion import EngramFusion
from engram.integrations.formats.dialects import config_to_hf, fusion_to
from engram.integrations.formats.gguf import GgufWriter, Value
from engram.integrations.formats.gguf_memory import NAME, keys_of
from engram.integrations.formats.readers import Source
from engram.integrations.formats.recoder import Recoder
from engram.integrations.formats.safetensors_io import NAMES, Stored, Writer
from engram.memory import EngramMemory, new_table
from engram.memory.saved import save_memory
from engram.storage.files import bad_blocks, write_rows
from engram.tables import EncodedTable, Table

Step = Callable[[int], None]
_FLOATS = {"float32": "F32", "bfloat16": "BF16"}


def _stream(recoder: Recoder, first: int, stop: int) -> Iterator[Tensor]:
    """Yield rows first .. stop - 1 in the target's codec, a block at a time."""
    for lo in range(first, stop, recoder.block):
        yield recoder.read(lo, min(lo + recoder.block, stop))


def row_ranges(layout: HashLayout, layer: int, shards: int, by: str) -> list[tuple[int, int]]:
    """Return the range of rows of each tensor-parallel rank.

    by: "row", equal counts up to one row; "head", complete columns, order-major.
    """
    rows = layout.rows[layer]
    if by == "row":
        ends = [rows * rank // shards for rank in range(shards + 1)]
    else:
        if shards > layout.columns:
            raise ValueError(f"{layout.columns} columns cannot be given to {shards} ranks by head")
        starts = [*layout.offsets[layer], rows]
        ends = [starts[layout.columns * rank // shards] for rank in range(shards + 1)]
    return list(pairwise(ends))


def chunk_ranges(rows: int, chunks: int) -> list[tuple[int, int]]:
    """Return the ranges into which torch.chunk would cut this many rows."""
    size = -(-rows // chunks)
    return [(first, min(first + size, rows)) for first in range(0, rows, size)]


def _compact(value: Tensor) -> Tensor:
    """Return a dense weight as bfloat16 if that is exact, else as float32."""
    half = value.bfloat16()
    return half if torch.equal(half.float(), value.float()) else value.float()


@dataclass(frozen=True)
class _RowTensors:
    """Rows first .. stop - 1 of a table, and the tensors that hold them in one file.

    specs: name -> (dtype, shape); two tensors if values and scales are apart.
    """

    recoder: Recoder
    first: int
    stop: int
    specs: dict[str, tuple[str, tuple[int, ...]]]


def _row_tensors(to: str, prefix: str, recoder: Recoder, ranges: list[tuple[int, int]]) -> list[_RowTensors]:
    """Return the tensors of a table's rows in one file. prefix: of their names. ranges: of rows, one but for qwen."""
    dim, tensors = recoder.rows.dim, []
    for number, (first, stop) in enumerate(ranges):
        specs: dict[str, tuple[str, tuple[int, ...]]] = {
            f"{prefix}embed.weight": ("U8", (stop - first, dim + dim // 32))
        }
        if to == "qwen":
            name = f"{prefix}ple_embedding.ngram_embedding.shard_{number}.weight"
            specs = {name: (_FLOATS[recoder.codec], (stop - first, dim))}
        elif to == "demo":
            specs = {f"{prefix}multi_head_embedding.embedding.weight": (_FLOATS[recoder.codec], (stop - first, dim))}
        elif to == "deepseek-v4.1":
            specs = {f"{prefix}embed.weight": ("F8_E4M3", (stop - first, dim))}
            specs[f"{prefix}embed.scale"] = ("F8_E8M0", (stop - first, dim // 32))
        tensors.append(_RowTensors(recoder, first, stop, specs))
    return tensors


def _buffers(to: str, prefix: str, layout: HashLayout, layer: int) -> dict[str, Tensor]:
    """Return the int64 tensors of a layer's layout that the dialect stores with its weights."""
    offsets = torch.tensor(layout.offsets[layer])
    if to == "demo":
        return {f"{prefix}multi_head_embedding.offsets": offsets}
    if to == "qwen":
        return {
            f"{prefix}ple_embedding.ngram_heads_offsets": offsets,
            f"{prefix}ple_embedding.ngram_heads_vocab_sizes": torch.tensor(layout.moduli[layer]).flatten(),
            f"{prefix}ple_embedding.layer_multipliers": torch.tensor(layout.multipliers[layer]),
        }
    return {}


_PREFIX = {"demo": "layers.{}.engram.", "qwen": "model.language_model.layers.{}.ple."}


def write_safetensors(
    source: Source, recoders: dict[int, Recoder], home: Path, to: str, shards: int, by: str, step: Step
) -> None:
    """Write a released dialect: safetensors files, their index, config.json and, for compressed ids, the token map."""
    dialect = to.removesuffix("-interleaved")
    layers = list(recoders)
    ranks = shards if dialect == "deepseek-v4.1" else 1
    ranges = {
        layer: chunk_ranges(source.layout.rows[layer], shards)
        if to == "qwen"
        else row_ranges(source.layout, layer, ranks, by)
        for layer in layers
    }
    # One file per layer; or one per rank, which holds its part of every layer.
    files = [(f"model{rank}-mp{ranks}.safetensors", layers, rank) for rank in range(ranks)]
    if ranks == 1:
        count = len(layers)
        files = [(f"model-{i + 1:05d}-of-{count:05d}.safetensors", [n], 0) for i, n in enumerate(layers)]
    weight_map: dict[str, str] = {}
    for name, in_file, rank in files:
        tables: list[_RowTensors] = []
        small: dict[str, Tensor] = {}
        for layer in in_file:
            prefix = _PREFIX.get(dialect, "layers.{}.engram.").format(layer)
            tables += _row_tensors(
                to, prefix, recoders[layer], ranges[layer] if to == "qwen" else [ranges[layer][rank]]
            )
            small |= _buffers(to, prefix, source.layout, layer)
            weights = fusion_to(dialect, source.weights[layer], source.streams)
            small |= {prefix + key: _compact(value) for key, value in weights.items()}
        metadata = {"engram_dialect": to}
        if source.token_map is not None:  # without it the multipliers are unknown
            metadata["engram_layout"] = source.layout.digest
        if ranks > 1:
            metadata["engram_rank"] = f"{rank}/{ranks}"
        weight_map |= dict.fromkeys(_write_file(home / name, tables, small, metadata, step), name)
    if ranks == 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (home / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    published = config_to_hf(source.config, dialect, source.hidden_size, source.streams)
    if to == "qwen":
        published["text_config"]["split_ngram_parts"] = len(ranges[layers[0]])
    (home / "config.json").write_text(json.dumps(published, indent=1))
    if source.token_map is not None and to != "qwen":
        source.token_map.save(home / "token_map.safetensors")


def _write_file(
    path: Path, tables: list[_RowTensors], small: dict[str, Tensor], metadata: dict[str, str], step: Step
) -> list[str]:
    """Write one safetensors file and read it back to compare digests. Return the names of its tensors."""
    specs: dict[str, tuple[str, tuple[int, ...]]] = {}
    for table in tables:
        specs |= table.specs
    specs |= {name: (NAMES[value.dtype], tuple(value.shape)) for name, value in small.items()}
    writer = Writer(path, specs, metadata)
    for table in tables:
        dim = table.recoder.rows.dim
        for block in _stream(table.recoder, table.first, table.stop):
            pieces = [block] if len(table.specs) == 1 else [block[:, :dim], block[:, dim:]]
            for name, piece in zip(table.specs, pieces, strict=True):
                writer.append(name, piece)
            step(block.nbytes)
    for name, value in small.items():
        writer.append(name, value)
    writer.close()
    verify(writer.stored, writer.digests, step)
    return list(specs)


def write_engram(source: Source, recoders: dict[int, Recoder], home: Path, step: Step) -> None:
    """Write a saved memory. The memory is built on the meta device; its rows are streamed into their files."""
    assert source.token_map is not None
    codecs = {recoder.codec for recoder in recoders.values()}
    if len(codecs) != 1:
        raise ValueError(f"the tables have different codecs ({', '.join(sorted(codecs))}): a memory has one")
    config, codec = source.config.replace(table_init="zero", train_tables=True), codecs.pop()
    if codec != "fp8":
        config = config.replace(table_dtype=codec)
    tables: dict[int, Table] = {}
    with torch.device("meta"):
        for layer, rows in source.layout.rows.items():
            fp8 = codec == "fp8"
            tables[layer] = EncodedTable(rows, config.head_dim, "fp8") if fp8 else new_table(config, layer, rows)
        memory = EngramMemory(config, source.token_map, source.hidden_size, source.streams, tables=tables)
    for layer, weights in (source.weights or untrained_weights(source)).items():
        memory.fusions[str(layer)].load_state_dict(weights, assign=True)

    def write(layer: int, path: Path) -> dict[str, Any]:
        recoder = recoders[layer]
        entry = write_rows(path, _stream(recoder, 0, recoder.rows.rows), step)
        if bad := bad_blocks(path, entry, on_bytes=step):
            raise OSError(f"{path}: block {bad[0]} does not read back as it was written")
        return entry

    save_memory(memory, home, rows=write)


def untrained_weights(source: Source) -> dict[int, dict[str, Tensor]]:
    """Return fusion weights for a source that has only tables: those of a new memory with a value projection of 0, so
    that nothing is added to the hidden state before training."""
    weights: dict[int, dict[str, Tensor]] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for layer in source.config.layers:
            fusion = EngramFusion(source.config, source.hidden_size, source.streams)
            for name, weight in fusion.named_parameters():
                if name.startswith("value."):
                    torch.nn.init.zeros_(weight)
            weights[layer] = {name: value.detach() for name, value in fusion.state_dict().items()}
    return weights


def write_gguf(source: Source, recoders: dict[int, Recoder], path: Path, step: Step) -> None:
    """Write one GGUF file with the tables and the keys that address them."""
    assert source.token_map is not None
    specs: dict[str, tuple[str, tuple[int, ...]]] = {}
    for layer, recoder in recoders.items():
        dim = recoder.rows.dim
        width, dtype = (dim + dim // 32, "I8") if recoder.codec == "fp8" else (dim, _FLOATS[recoder.codec])
        specs[NAME.format(layer)] = (dtype, (recoder.rows.rows, width))
    metadata: dict[str, Value] = {
        **keys_of(source.config, source.layout, source.token_map),
        "engram.config": source.config.to_json(),
        "engram.layout": source.layout.to_json(),
        "engram.layout_digest": source.layout.digest,
        "engram.token_map_digest": source.token_map.digest,
    }
    if source.hidden_size:
        metadata |= {"engram.hidden_size": source.hidden_size, "engram.streams": source.streams}
    writer = GgufWriter(path, specs, metadata)
    for layer, recoder in recoders.items():
        for block in _stream(recoder, 0, recoder.rows.rows):
            writer.append(NAME.format(layer), block)
            step(block.nbytes)
    writer.close()
    verify(writer.stored, writer.digests, step)


def verify(stored: dict[str, Stored], digests: dict[str, Any], step: Step, block: int = 64 << 20) -> None:
    """Read every byte back and compare digests. Raise OSError if a tensor differs from what was written."""
    for name, tensor in stored.items():
        digest = xxhash.xxh3_128()
        for start in range(0, tensor.nbytes, block):
            piece = tensor.read_bytes(tensor.offset + start, min(block, tensor.nbytes - start))
            digest.update(piece.numpy().data)
            step(len(piece))
        if digest.digest() != digests[name].digest():
            raise OSError(f"{tensor.path}: tensor {name} does not read back as it was written")
