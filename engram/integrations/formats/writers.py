"""Writers of `engram convert`: each streams a source's rows into new files and reads them back to compare digests."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from engram.addressing import HashLayout
from engram.fusion import EngramFusion
from engram.integrations.formats.dialects import config_to_hf, fusion_to
from engram.integrations.formats.gguf import NAME, GgufWriter, Value, keys_of
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
    """Rows first .. stop - 1 in the target's form, a block at a time."""
    for lo in range(first, stop, recoder.block):
        yield recoder.read(lo, min(lo + recoder.block, stop))


def row_ranges(layout: HashLayout, layer: int, shards: int, by: str) -> list[tuple[int, int]]:
    """Rows of each tensor-parallel rank. by "row": as equal as the rows divide; "head": whole columns, order-major."""
    rows = layout.rows[layer]
    if by == "row":
        ends = [rows * rank // shards for rank in range(shards + 1)]
    else:
        if shards > layout.columns:
            raise ValueError(f"{layout.columns} columns cannot be given to {shards} ranks by head")
        starts = [*layout.offsets[layer], rows]
        ends = [starts[layout.columns * rank // shards] for rank in range(shards + 1)]
    return list(pairwise(ends))


def _compact(value: Tensor) -> Tensor:
    """A dense weight as bfloat16 where that loses nothing."""
    half = value.bfloat16()
    return half if torch.equal(half.float(), value.float()) else value.float()


def _specs(to: str, prefix: str, dim: int, form: str, ranges: list[tuple[int, int]]) -> dict[str, Any]:
    """name -> (dtype, shape) of the tensors that hold a table's rows."""
    if to == "qwen":
        stem = f"{prefix}ple_embedding.ngram_embedding.shard_"
        return {f"{stem}{i}.weight": (_FLOATS[form], (hi - lo, dim)) for i, (lo, hi) in enumerate(ranges)}
    rows = ranges[0][1] - ranges[0][0]
    if to == "demo":
        return {f"{prefix}multi_head_embedding.embedding.weight": (_FLOATS[form], (rows, dim))}
    if to == "deepseek-v4.1":
        scales = {f"{prefix}embed.scale": ("F8_E8M0", (rows, dim // 32))}
        return {f"{prefix}embed.weight": ("F8_E4M3", (rows, dim)), **scales}
    return {f"{prefix}embed.weight": ("U8", (rows, dim + dim // 32))}


def _buffers(to: str, prefix: str, layout: HashLayout, layer: int) -> dict[str, Tensor]:
    """The int64 tensors that say how rows are addressed, where a dialect keeps them with the weights."""
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
    """A released dialect: safetensors files, their index, config.json and, where ids are compressed, the token map."""
    dialect = to.removesuffix("-interleaved")
    layers = list(recoders)
    ranks = shards if dialect == "deepseek-v4.1" else 1
    weight_map: dict[str, str] = {}
    ranges: dict[int, list[tuple[int, int]]] = {}
    for layer in layers:
        if to == "qwen":  # as torch.chunk cuts
            size = -(-source.layout.rows[layer] // shards)
            starts = range(0, source.layout.rows[layer], size)
            ranges[layer] = [(lo, min(lo + size, source.layout.rows[layer])) for lo in starts]
        else:
            ranges[layer] = row_ranges(source.layout, layer, ranks, by)
    # One file per layer; or one per rank, which holds its part of every layer.
    files = [(f"model{r}-mp{ranks}.safetensors", layers, r) for r in range(ranks)]
    if ranks == 1:
        count = len(layers)
        files = [(f"model-{i + 1:05d}-of-{count:05d}.safetensors", [n], 0) for i, n in enumerate(layers)]
    for name, held, rank in files:
        specs: dict[str, tuple[str, tuple[int, ...]]] = {}
        small: dict[str, Tensor] = {}
        parts: list[tuple[int, list[str], int, int]] = []
        for layer in held:
            prefix = _PREFIX.get(dialect, "layers.{}.engram.").format(layer)
            mine = ranges[layer] if to == "qwen" else [ranges[layer][rank]]
            tensors = _specs(to, prefix, recoders[layer].rows.dim, recoders[layer].form, mine)
            names = [[n] for n in tensors] if to == "qwen" else [list(tensors)]
            parts += [(layer, group, lo, hi) for group, (lo, hi) in zip(names, mine, strict=True)]
            specs |= tensors
            small |= _buffers(to, prefix, source.layout, layer)
            weights = fusion_to(dialect, source.weights[layer], source.streams)
            small |= {prefix + key: _compact(value) for key, value in weights.items()}
        specs |= {key: (NAMES[value.dtype], tuple(value.shape)) for key, value in small.items()}
        facts = {"engram_dialect": to}
        if source.token_map is not None:  # without it the multipliers are unknown
            facts["engram_layout"] = source.layout.digest
        if ranks > 1:
            facts["engram_rank"] = f"{rank}/{ranks}"
        writer = Writer(home / name, specs, facts)
        for layer, group, lo, hi in parts:
            dim = recoders[layer].rows.dim
            for block in _stream(recoders[layer], lo, hi):
                pieces = [block] if len(group) == 1 else [block[:, :dim], block[:, dim:]]
                for key, piece in zip(group, pieces, strict=True):
                    writer.append(key, piece)
                step(block.nbytes)
        for key, value in small.items():
            writer.append(key, value)
        writer.close()
        verify(writer.stored, writer.digests, step)
        weight_map |= dict.fromkeys(specs, name)
    if ranks == 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (home / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    published = config_to_hf(source.config, dialect, source.hidden_size, source.streams)
    if to == "qwen":
        published["text_config"]["split_ngram_parts"] = len(ranges[layers[0]])
    (home / "config.json").write_text(json.dumps(published, indent=1))
    if source.token_map is not None and to != "qwen":
        source.token_map.save(home / "token_map.safetensors")


def write_engram(source: Source, recoders: dict[int, Recoder], home: Path, step: Step) -> None:
    """Our folder. The memory that is saved lives on the meta device; its rows are streamed into their files."""
    assert source.token_map is not None
    forms = {r.form for r in recoders.values()}
    if len(forms) != 1:
        raise ValueError(f"the tables are stored differently ({', '.join(sorted(forms))}): one memory has one kind")
    config, form = source.config.replace(table_init="zero", train_tables=True), forms.pop()
    if form != "fp8":
        config = config.replace(table_dtype=form)
    tables: dict[int, Table] = {}
    with torch.device("meta"):
        for layer, rows in source.layout.rows.items():
            fp8 = form == "fp8"
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
    """Fusion weights for tables that came without: those of a new memory, with a value projection of 0, so that nothing
    is added to the hidden state before they are trained."""
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
    """The tables alone, with the facts that address them."""
    assert source.token_map is not None
    specs: dict[str, tuple[str, tuple[int, ...]]] = {}
    for layer, recoder in recoders.items():
        dim = recoder.rows.dim
        width, dtype = (dim + dim // 32, "I8") if recoder.form == "fp8" else (dim, _FLOATS[recoder.form])
        specs[NAME.format(layer)] = (dtype, (recoder.rows.rows, width))
    facts: dict[str, Value] = {
        **keys_of(source.config, source.layout, source.token_map),
        "engram.config": source.config.to_json(),
        "engram.layout": source.layout.to_json(),
        "engram.layout_digest": source.layout.digest,
        "engram.token_map_digest": source.token_map.digest,
    }
    if source.hidden_size:
        facts |= {"engram.hidden_size": source.hidden_size, "engram.streams": source.streams}
    writer = GgufWriter(path, specs, facts)
    for layer, recoder in recoders.items():
        for block in _stream(recoder, 0, recoder.rows.rows):
            writer.append(NAME.format(layer), block)
            step(block.nbytes)
    writer.close()
    verify(writer.stored, writer.digests, step)


def verify(stored: dict[str, Stored], digests: dict[str, Any], step: Step, block: int = 64 << 20) -> None:
    """Reads every byte back and compares digests. Raises OSError where the disk gives back something else."""
    for name, tensor in stored.items():
        digest = xxhash.xxh3_128()
        for start in range(0, tensor.nbytes, block):
            piece = tensor.read_bytes(tensor.offset + start, min(block, tensor.nbytes - start))
            digest.update(piece.numpy().data)
            step(len(piece))
        if digest.digest() != digests[name].digest():
            raise OSError(f"{tensor.path}: tensor {name} does not read back as it was written")
