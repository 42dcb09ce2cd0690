"""A memory in any of the formats, opened for reading: config, fusion weights, and rows a block at a time.

All that can be checked against the layout is checked: rows, widths, block sizes, offsets, moduli, vocabulary.
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
from engram.integrations.formats.dialects import (
    TABLE,
    check_dialect,
    config_from_hf,
    dialect_of_config,
    layout_of,
    refuse_unknown,
    unknown_in_hf,
)
from engram.integrations.formats.fusion_weights import read_fusion
from engram.integrations.formats.gguf import is_gguf, read_gguf
from engram.integrations.formats.gguf_memory import TABLE as GGUF_TABLE
from engram.integrations.formats.gguf_memory import check_keys, config_of, rows_of, shape_of, token_map_of
from engram.integrations.formats.safetensors_io import Checkpoint, Stored, open_checkpoint
from engram.integrations.formats.stored_rows import (
    CODECS,
    Rows,
    TableRows,
    check_buffers,
    find_tables,
    table_rows,
)
from engram.memory import EngramMemory
from engram.storage.untrusted import of_library, read_json, read_tokenizer
from engram.tables import EncodedTable


@dataclass
class Source:
    """An opened memory.

    kind: "engram", "gguf" or a dialect. token_map: None if neither the files nor the caller have one.
    hidden_size, streams: 0 if a GGUF file does not give them. rows: {layer: rows}.
    weights: {layer: EngramFusion's}, float32; empty if the file has only tables.
    """

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
    path: str | os.PathLike[str],
    config: EngramConfig | None = None,
    token_map: TokenMap | None = None,
    fusions: bool = True,
) -> Source:
    """Open a memory: a saved memory, safetensors of a released dialect (a file, or a folder with config.json), or GGUF.

    Args:
        config: needed if the source has no config.json (demo state dicts). token_map: that of the model's
            tokenizer; by default token_map.safetensors or tokenizer.json beside the tensors is read. fusions: False to
            read only tables.

    Raises:
        FileNotFoundError: the path does not exist. ValueError: a tensor is missing, or has another shape, dtype or
        block size than the layout needs, by name; or the token map has another size.
    """
    path = Path(path)
    if (path / "manifest.json").is_file():
        return _open_engram(path, token_map)
    if is_gguf(path):
        return _open_gguf(path, config, token_map)
    checkpoint = open_checkpoint(path)
    if config is None and checkpoint.config is not None:
        refuse_unknown(checkpoint.config)
    kind = dialect_of_tensors(checkpoint)
    if config is None:
        if checkpoint.config is None:
            raise ValueError(f"{checkpoint.home} has no config.json: give the configuration of its {kind} tensors")
        if dialect_of_config(checkpoint.config) != kind:
            raise ValueError(f"{checkpoint.home / 'config.json'} is not a {kind} config, but the tensors are {kind}'s")
        config = config_from_hf(checkpoint.config)
    check_dialect(config, kind)
    token_map = _token_map(checkpoint.home, kind, config, token_map)
    pad = 0 if token_map is None else int(token_map.table[config.pad_id])
    vocab = config.compressed_vocab or (None if token_map is None else token_map.size)
    layout = layout_of(config.replace(compressed_vocab=vocab), pad)
    written_for = checkpoint.metadata.get("engram_layout", layout.digest)
    if token_map is not None and written_for != layout.digest:
        raise ValueError(
            f"{checkpoint.home}: its tensors were written for the hash layout {written_for[:12]}, its config (or the "
            f"one given) and token map make {layout.digest[:12]}: every row would be the wrong one"
        )
    prefixes, tables = find_tables(checkpoint, kind, config)
    source = Source(kind, path, config, layout, token_map, 0, 0, {})
    for layer in config.layers:
        rows = layout.rows[layer]
        source.rows[layer] = table_rows(checkpoint, kind, config, layer, prefixes[layer], tables[layer], rows, layout)
        check_buffers(checkpoint, kind, prefixes[layer], layout, layer)
        if not fusions:
            continue
        weights, streams, width = read_fusion(kind, config, checkpoint, prefixes[layer])
        if source.streams and (source.streams, source.hidden_size) != (streams, width):
            raise ValueError(f"layer {layer} has {streams} streams x {width}, another has {source.streams}")
        source.weights[layer], source.streams, source.hidden_size = weights, streams, width
    return source


def read_config(name: str) -> EngramConfig:
    """Return the configuration of a preset (by name), of a published config.json, or of an EngramConfig's own JSON."""
    if not Path(name).exists():
        if "/" in name or name.endswith(".json"):
            raise FileNotFoundError(f"there is no file {name}, and no preset of that name")
        return EngramConfig.preset(name)
    fields = read_json(name, "a config")
    own = fields.get("config", fields)  # "config" in a saved memory
    try:
        if not isinstance(own, dict):
            raise ValueError(f"config is a JSON object, not {repr(own)[:80]}")
        if own is not fields or _is_own(own):
            return EngramConfig.from_json(json.dumps(own))
        return config_from_hf(own)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _is_own(values: dict[str, Any]) -> bool:
    """Return True for an EngramConfig's JSON, also if a field is misspelt; False for a published config.json."""
    fields = set(json.loads(EngramConfig().to_json()))
    return "text_config" not in values and ("rows_per_head" in values or len(fields & set(values)) > len(values) / 2)


def unknown_fields(name: str) -> list[str]:
    """Return the fields of a config file that seem to be about the memory and that `read_config` does not read."""
    if not Path(name).is_file():
        return []
    fields = read_json(name, "a config")
    if "config" in fields:
        return sorted(set(fields) - {"config", "hidden_size", "streams"})
    return [] if _is_own(fields) else unknown_in_hf(fields)


def read_token_map(path: Path) -> TokenMap:
    """Load a saved token map, or make the map of a tokenizer.json."""
    if path.suffix != ".json":
        return TokenMap.load(path)
    return of_library(lambda: TokenMap.from_tokenizer(read_tokenizer(path)), f"{path} gives no token map")


def dialect_of_tensors(checkpoint: Checkpoint) -> str:
    """Return the dialect of the tensors' names. Raise ValueError if there is none."""
    names = [*checkpoint.tensors, *(name for missing in checkpoint.missing.values() for name in missing)]
    for kind, pattern in TABLE.items():
        if any(pattern.fullmatch(name) for name in names):
            return kind
    raise ValueError(
        f"no n-gram table among the {len(names)} tensors of {checkpoint.home}: expected "
        f"multi_head_embedding.embedding.weight (demo), layers.<i>.engram.embed.weight (DeepSeek-V4.1) or "
        f"layers.<i>.ple.ple_embedding.ngram_embedding.shard_<n>.weight (Qwen4-Exp)"
    )


def _token_map(home: Path, kind: str, config: EngramConfig, token_map: TokenMap | None) -> TokenMap | None:
    """Return the token map in `home`, else the caller's; for Qwen4-Exp the identity. ValueError if two differ."""
    if kind == "qwen":
        assert config.compressed_vocab is not None
        identity = TokenMap.identity(config.compressed_vocab)
        if token_map is not None and token_map.digest != identity.digest:
            raise ValueError("Qwen4-Exp hashes raw token ids: give no token map")
        return identity
    saved = TokenMap.load(home / "token_map.safetensors") if (home / "token_map.safetensors").is_file() else None
    if saved is None and (home / "tokenizer.json").is_file():
        saved = read_token_map(home / "tokenizer.json")
        if token_map is not None and token_map.size == config.compressed_vocab != saved.size:
            saved, token_map = token_map, saved  # tokens were added to tokenizer.json
    if saved is not None:
        _check_same(saved, token_map, home)
    token_map = saved or token_map
    if token_map is not None:
        _check_map(config, token_map)
    return token_map


def _check_same(saved: TokenMap, token_map: TokenMap | None, home: Path) -> None:
    """Raise ValueError if the caller's token map is not the saved one, except for added tokens: they move no row."""
    try:
        if token_map is not None:
            saved.extend(token_map)
    except ValueError as error:
        raise ValueError(f"the token map given is not the one in {home}: {error}") from error


def _check_map(config: EngramConfig, token_map: TokenMap) -> None:
    """Raise ValueError if the token map and the configuration have different vocabularies."""
    if config.pad_id >= len(token_map.table):
        raise ValueError(
            f"the config's pad_id is {config.pad_id}, outside the token map's vocabulary of {len(token_map.table):,}: "
            f"it comes from another tokenizer"
        )
    if config.compressed_vocab not in (None, token_map.size):
        raise ValueError(
            f"the token map has {token_map.size:,} compressed ids, the config's engram_compressed_vocab_size is "
            f"{config.compressed_vocab:,}: it comes from another tokenizer version, every row would be wrong"
        )


def _open_gguf(path: Path, config: EngramConfig | None, token_map: TokenMap | None) -> Source:
    """Open the tables of a GGUF file, which has no other weights of the memory."""
    tensors, metadata = read_gguf(path)
    tables: dict[int, Stored] = {}
    for name, stored in tensors.items():
        if match := GGUF_TABLE.fullmatch(name):
            if int(match[1]) in tables:
                raise ValueError(
                    f"{path}: {name} and {tables[int(match[1])].name} are both of layer {match[1]}: remove one"
                )
            tables[int(match[1])] = stored
    if not tables:
        raise ValueError(f"{path} holds no n-gram table: expected blk.<layer>.engram_embd.weight")
    saved = token_map_of(path, metadata)
    if saved is not None:
        _check_same(saved, token_map, path)
    token_map = saved or token_map
    digest = metadata.get("engram.token_map_digest")
    if token_map is not None and digest not in (None, token_map.digest):
        raise ValueError(
            f"{path} was written with the token map {str(digest)[:12]}, this one is {token_map.digest[:12]}: give the "
            f"tokenizer as it was then, without tokens added since"
        )
    derived = config is None and "engram.config" not in metadata
    config = config_of(path, metadata, token_map) if config is None else config
    if set(config.layers) != set(tables):
        raise ValueError(f"{path} holds tables of layers {sorted(tables)}, expected {list(config.layers)}")
    if derived:  # no key tells whether tables are padded
        bare = config.replace(row_multiple=1)
        counts = {layer: stored.shape[0] for layer, stored in tables.items() if stored.shape}
        config = bare if layout_of(bare).rows == counts else config
    if token_map is not None:
        _check_map(config, token_map)
        config = config.replace(compressed_vocab=token_map.size)
    layout = layout_of(config, 0 if token_map is None else int(token_map.table[config.pad_id]))
    check_keys(path, metadata, config, layout, token_map is not None)
    rows = {layer: rows_of(tables[layer], config, layout.rows[layer]) for layer in config.layers}
    hidden_size, streams = shape_of(tensors, metadata, config.layers)
    return Source("gguf", path, config, layout, token_map, hidden_size, streams, rows)


def _open_engram(folder: Path, token_map: TokenMap | None) -> Source:
    """Open a saved memory. Rows are read from their files, or through their table if they have to be decoded."""
    memory = EngramMemory.load(folder, mode="shared")
    _check_same(memory.hasher.token_map, token_map, folder)
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
        rows[layer] = Rows(str(path), table.dim, CODECS[dtype], [(0, stored, None)], table.rows)
        table.close()
    config, hasher = memory.config, memory.hasher
    weights = {i: {k: v.float() for k, v in memory.fusions[str(i)].state_dict().items()} for i in config.layers}
    config = config.replace(compressed_vocab=config.compressed_vocab or hasher.token_map.size)
    return Source(
        "engram", folder, config, memory.layout, hasher.token_map, memory.hidden_size, memory.streams, rows, weights
    )
