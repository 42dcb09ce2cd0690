"""A memory in any of the formats, opened for reading: config, fusion weights, and rows a block at a time.

Nothing is believed that can be checked against the layout: rows, widths, block sizes, offsets, moduli, vocabulary.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engram.addressing import HashLayout, TokenMap
from engram.config import EngramConfig
from engram.fusion import EngramFusion
from engram.integrations.formats.dialects import (
    TABLE,
    check_dialect,
    config_from_hf,
    dialect_of_config,
    fusion_from,
    fusion_to,
    layout_of,
    refuse_unknown,
    unknown_in_hf,
)
from engram.integrations.formats.gguf import TABLE as GGUF_TABLE
from engram.integrations.formats.gguf import check_keys, config_of, is_gguf, read_gguf, rows_of, shape_of, token_map_of
from engram.integrations.formats.safetensors_io import Checkpoint, Stored, open_checkpoint
from engram.integrations.formats.stored_rows import (
    FORMS,
    SCALES,
    Rows,
    TableRows,
    check_buffers,
    find_tables,
    scale_of,
    table_rows,
)
from engram.memory import EngramMemory
from engram.storage.untrusted import of_library, read_json, read_tokenizer
from engram.tables import EncodedTable


@dataclass
class Source:
    """An opened memory. kind: "engram", "gguf" or a dialect; weights: {layer: EngramFusion's}, float32, empty if the
    file has none; token_map: None if none was found."""

    kind: str
    path: Path
    config: EngramConfig
    layout: HashLayout
    token_map: TokenMap | None
    hidden_size: int
    streams: int
    rows: dict[int, Rows]
    weights: dict[int, dict[str, Tensor]] = field(default_factory=dict)


def open_source(
    path: str | os.PathLike[str], config: EngramConfig | None = None, token_map: TokenMap | None = None
) -> Source:
    """Opens a memory: our folder, safetensors of a released dialect (a file, or a folder with config.json), or GGUF.

    Args:
        config: where no config.json says it (demo state dicts). token_map: of the model's tokenizer; else looked for
            beside the tensors, as token_map.safetensors or tokenizer.json.

    Raises:
        FileNotFoundError: nothing there. ValueError: a tensor that is missing, in another shape, dtype or block size
        than the layout needs, by name; a token map of another size.
    """
    given = Path(path)
    if (given / "manifest.json").is_file():
        return _open_engram(given, token_map)
    if is_gguf(given):
        return _open_gguf(given, config, token_map)
    checkpoint = open_checkpoint(given)
    if config is None and checkpoint.config is not None:
        refuse_unknown(checkpoint.config)
    kind = dialect_of_tensors(checkpoint)
    if config is None:
        if checkpoint.config is None:
            raise ValueError(f"{checkpoint.home} has no config.json: say which configuration its {kind} tensors follow")
        if dialect_of_config(checkpoint.config) != kind:
            raise ValueError(f"{checkpoint.home / 'config.json'} is not a {kind} config, but the tensors are {kind}'s")
        config = config_from_hf(checkpoint.config)
    check_dialect(config, kind)
    token_map = _token_map(checkpoint.home, kind, config, token_map)
    pad = 0 if token_map is None else int(token_map.table[config.pad_id])
    vocab = config.compressed_vocab or (None if token_map is None else token_map.size)
    layout = layout_of(config.replace(compressed_vocab=vocab), pad)
    stated = checkpoint.metadata.get("engram_layout", layout.digest)
    if token_map is not None and stated != layout.digest:
        raise ValueError(
            f"{checkpoint.home}: its tensors were written for the hash layout {stated[:12]}, its config (or the one "
            f"given) and token map make {layout.digest[:12]}: every row would be the wrong one"
        )
    prefixes, tables = find_tables(checkpoint, kind, config)
    source = Source(kind, given, config, layout, token_map, 0, 0, {})
    for layer in config.layers:
        rows = layout.rows[layer]
        source.rows[layer] = table_rows(checkpoint, kind, config, layer, prefixes[layer], tables[layer], rows, layout)
        check_buffers(checkpoint, kind, prefixes[layer], layout, layer)
        _read_fusion(source, checkpoint, layer, prefixes[layer])
    return source


def read_config(name: str) -> EngramConfig:
    """A preset by name, or a published config.json by path, or an EngramConfig's own JSON."""
    if not Path(name).exists():
        if "/" in name or name.endswith(".json"):
            raise FileNotFoundError(f"there is no file {name}, and no preset of that name")
        return EngramConfig.preset(name)
    found = read_json(name, "a config")
    own = found.get("config", found)  # of a saved memory
    try:
        if not isinstance(own, dict):
            raise ValueError(f"config is a JSON object, not {repr(own)[:80]}")
        if own is not found or _is_own(own):
            return EngramConfig.from_json(json.dumps(own))
        return config_from_hf(own)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _is_own(values: dict[str, Any]) -> bool:
    """Return True for an EngramConfig's JSON, also if a field is misspelt; False for a published config.json."""
    fields = set(json.loads(EngramConfig().to_json()))
    return "text_config" not in values and ("rows_per_head" in values or len(fields & set(values)) > len(values) / 2)


def unknown_fields(name: str) -> list[str]:
    """Fields of a config file that look as if they were about the memory, and that `read_config` does not read."""
    if not Path(name).is_file():
        return []
    found = read_json(name, "a config")
    if "config" in found:
        return sorted(set(found) - {"config", "hidden_size", "streams"})
    return [] if _is_own(found) else unknown_in_hf(found)


def read_token_map(path: Path) -> TokenMap:
    """A saved token map, or the map of a tokenizer.json."""
    if path.suffix != ".json":
        return TokenMap.load(path)
    return of_library(lambda: TokenMap.from_tokenizer(read_tokenizer(path)), f"{path} gives no token map")


def dialect_of_tensors(checkpoint: Checkpoint) -> str:
    """Which dialect the tensors' names belong to. Raises ValueError for none."""
    names = [*checkpoint.tensors, *(name for missing in checkpoint.missing.values() for name in missing)]
    for kind, pattern in TABLE.items():
        if any(pattern.fullmatch(name) for name in names):
            return kind
    raise ValueError(
        f"no n-gram table among the {len(names)} tensors of {checkpoint.home}: expected "
        f"multi_head_embedding.embedding.weight (demo), layers.<i>.engram.embed.weight (DeepSeek-V4.1) or "
        f"layers.<i>.ple.ple_embedding.ngram_embedding.shard_<n>.weight (Qwen4-Exp)"
    )


def _token_map(home: Path, kind: str, config: EngramConfig, given: TokenMap | None) -> TokenMap | None:
    if kind == "qwen":
        assert config.compressed_vocab is not None
        found = TokenMap.identity(config.compressed_vocab)
        if given is not None and given.digest != found.digest:
            raise ValueError("Qwen4-Exp hashes raw token ids: it takes no token map")
        return found
    saved = TokenMap.load(home / "token_map.safetensors") if (home / "token_map.safetensors").is_file() else None
    if saved is None and (home / "tokenizer.json").is_file():
        saved = read_token_map(home / "tokenizer.json")
        if given is not None and given.size == config.compressed_vocab != saved.size:  # it has grown, given has not
            saved, given = given, saved
    if saved is not None:
        _check_given(saved, given, home)
    found_map = saved or given
    if found_map is not None:
        _check_map(config, found_map)
    return found_map


def _check_given(saved: TokenMap, given: TokenMap | None, home: Path) -> None:
    """Refuse a token map that is not the saved one; tokens may have been added at its end, which move no row."""
    try:
        if given is not None:
            saved.extend(given)
    except ValueError as error:
        raise ValueError(f"the token map given is not the one in {home}: {error}") from error


def _check_map(config: EngramConfig, found_map: TokenMap) -> None:
    if config.pad_id >= len(found_map.table):
        raise ValueError(
            f"the config's pad_id is {config.pad_id}, outside the token map's vocabulary of {len(found_map.table):,}: "
            f"it comes from another tokenizer"
        )
    if config.compressed_vocab not in (None, found_map.size):
        raise ValueError(
            f"the token map has {found_map.size:,} compressed ids, the config's engram_compressed_vocab_size is "
            f"{config.compressed_vocab:,}: it comes from another tokenizer version, every row would be wrong"
        )


def _read_fusion(source: Source, checkpoint: Checkpoint, layer: int, prefix: str) -> None:
    streams, width = _streams(source.kind, checkpoint, prefix)
    if source.streams and (source.streams, source.hidden_size) != (streams, width):
        raise ValueError(f"layer {layer} has {streams} streams x {width}, another has {source.streams}")
    source.streams, source.hidden_size = streams, width
    with torch.device("meta"):
        wanted = EngramFusion(source.config, width, streams).state_dict()
    shapes = {name: tuple(value.shape) for name, value in fusion_to(source.kind, wanted, streams).items()}
    weights = fusion_from(source.kind, lambda n: _dense(checkpoint, prefix + n, shapes[n]), source.config, streams)
    source.weights[layer] = {name: weights[name].float().contiguous() for name in wanted}


def _streams(kind: str, checkpoint: Checkpoint, prefix: str) -> tuple[int, int]:
    """Residual streams and hidden size of a layer's fusion, by the shapes of its tensors."""
    first = checkpoint.one(prefix + ("q_weight" if kind == "deepseek-v4.1" else "value_proj.weight"))
    streams, width = (*first.shape, 0, 0)[:2]
    if kind == "demo":
        streams, width = sum(name.startswith(prefix + "norm1.") for name in checkpoint.tensors), streams
    elif kind == "qwen":
        gains = checkpoint.one(prefix + "norm_query.weight")
        streams, width = (*gains.shape, 0)[0] // max(streams, 1), streams
    if len(first.shape) != 2 or streams < 1 or width < 1:
        raise ValueError(f"{first.path}: tensor {first.name} is {list(first.shape)}: no weights of a memory")
    return streams, width


def _dense(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> Tensor:
    """A small tensor as float32; e4m3 weights are multiplied by their blocks' scales (32 x 32 in DeepSeek-V4.1)."""
    stored = checkpoint.one(name, shape)
    if stored.dtype not in ("F32", "BF16", "F16", "F8_E4M3"):
        raise ValueError(f"{stored.path}: tensor {name} is {stored.dtype}, expected F32, BF16, F16 or F8_E4M3")
    value = _alike(checkpoint, name).float()
    scale_name = scale_of(checkpoint, name)
    if stored.dtype == "F8_E4M3":
        value = value * _scales(checkpoint, name, scale_name, shape)
    elif scale_name is not None:
        raise ValueError(f"tensor {scale_name} scales {name}, which is {stored.dtype}, not F8_E4M3")
    if not value.isfinite().all():
        raise ValueError(f"{stored.path}: tensor {name} holds a value that is not finite")
    return value


def _alike(checkpoint: Checkpoint, name: str) -> Tensor:
    """A tensor that every rank holds whole. Raises ValueError where they disagree."""
    first, *others = checkpoint.tensors[name]
    held = first.read_bytes(first.offset, first.nbytes)
    for other in others:
        if other.dtype != first.dtype or not torch.equal(other.read_bytes(other.offset, other.nbytes), held):
            raise ValueError(
                f"tensor {name} is not the same in {first.path} and in {other.path}, as in one model it is"
            )
    return first.read()


def _scales(checkpoint: Checkpoint, name: str, scale_name: str | None, shape: tuple[int, ...]) -> Tensor:
    """The scale of every value of an e4m3 tensor."""
    if scale_name is None:
        raise ValueError(f"tensor {name.removesuffix('weight')}scale is missing: {name} is e4m3 and needs scales")
    stored = checkpoint.one(scale_name)
    scale = _alike(checkpoint, scale_name)
    if stored.dtype == "U8":  # as files were written before safetensors had a name for it
        scale = scale.view(torch.float8_e8m0fnu)
    if stored.shape in ((), (1,), (shape[0],)) and len(shape) == 2:  # of the whole tensor, or of each row
        scale = scale.view(-1, 1)
    blocks = [b for b in ((32, 32), (128, 128), (1, 32), (1, shape[1]), shape) if scale.shape == _blocks(shape, b)]
    if not blocks or stored.dtype not in SCALES or scale.float().isnan().any():
        raise ValueError(
            f"{stored.path}: tensor {scale_name} is {stored.dtype} {list(stored.shape)} for {name} {list(shape)}: "
            f"expected a scale per 32 x 32, 128 x 128 or 1 x 32 values, per row or for all, none of them NaN"
        )
    wide = scale.float().repeat_interleave(blocks[0][0], 0).repeat_interleave(blocks[0][1], 1)
    return wide[: shape[0], : shape[1]]


def _blocks(shape: tuple[int, ...], block: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-size // each) for size, each in zip(shape, block, strict=True))


def _open_gguf(path: Path, config: EngramConfig | None, token_map: TokenMap | None) -> Source:
    """The tables of a GGUF file; it has no other weights of the memory."""
    tensors, facts = read_gguf(path)
    tables: dict[int, Stored] = {}
    for name, stored in tensors.items():
        if match := GGUF_TABLE.fullmatch(name):
            if int(match[1]) in tables:
                raise ValueError(f"{path}: {name} and {tables[int(match[1])].name} are of one layer: which one counts?")
            tables[int(match[1])] = stored
    if not tables:
        raise ValueError(f"{path} holds no n-gram table: expected blk.<layer>.engram_embd.weight")
    saved = token_map_of(path, facts)
    if saved is not None:
        _check_given(saved, token_map, path)
    token_map = saved or token_map
    stated = facts.get("engram.token_map_digest")
    if token_map is not None and stated not in (None, token_map.digest):
        raise ValueError(
            f"{path} was written with the token map {str(stated)[:12]}, this one is {token_map.digest[:12]}: give the "
            f"tokenizer as it was then, without tokens added since"
        )
    derived = config is None and "engram.config" not in facts
    config = config_of(path, facts, token_map) if config is None else config
    if set(config.layers) != set(tables):
        raise ValueError(f"{path} holds tables of layers {sorted(tables)}, expected {list(config.layers)}")
    if derived:  # no key says whether tables are padded
        bare = config.replace(row_multiple=1)
        counts = {layer: stored.shape[0] for layer, stored in tables.items() if stored.shape}
        config = bare if layout_of(bare).rows == counts else config
    if token_map is not None:
        _check_map(config, token_map)
        config = config.replace(compressed_vocab=token_map.size)
    layout = layout_of(config, 0 if token_map is None else int(token_map.table[config.pad_id]))
    check_keys(path, facts, config, layout, token_map is not None)
    rows = {layer: rows_of(tables[layer], config, layout.rows[layer]) for layer in config.layers}
    hidden_size, streams = shape_of(tensors, facts, config.layers)
    return Source("gguf", path, config, layout, token_map, hidden_size, streams, rows)


def _open_engram(folder: Path, token_map: TokenMap | None) -> Source:
    """Our folder: rows are read from their files, except where only a table can say what they are."""
    memory = EngramMemory.load(folder, mode="shared")
    _check_given(memory.hasher.token_map, token_map, folder)
    manifest = read_json(folder / "manifest.json", "the manifest of a saved memory")
    rows: dict[int, Rows] = {}
    for layer, table in memory.tables.items():
        path = folder / manifest["tables"][str(layer)]["file"]
        encoded = isinstance(table, EncodedTable)
        if (encoded and memory.codec != "fp8") or (not encoded and table.init == "normal"):
            rows[layer] = TableRows(str(path), table)
            continue
        dtype = "U8" if encoded else {torch.float32: "F32", torch.bfloat16: "BF16"}[table.dtype]
        width = table.nbytes // table.rows if encoded else table.dim
        stored = Stored(path.name, path, dtype, (table.rows, width), 0, table.nbytes)
        rows[layer] = Rows(str(path), table.dim, FORMS[dtype], [(0, stored, None)], table.rows)
        table.close()
    config, hasher = memory.config, memory.hasher
    weights = {i: {k: v.float() for k, v in memory.fusions[str(i)].state_dict().items()} for i in config.layers}
    config = config.replace(compressed_vocab=config.compressed_vocab or hasher.token_map.size)
    return Source(
        "engram", folder, config, memory.layout, hasher.token_map, memory.hidden_size, memory.streams, rows, weights
    )
