"""Layout, tables and fusion modules of a memory, from its configuration."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engram.addressing import HashLayout, NgramHasher, TokenMap
from engram.config import EngramConfig
from engram.fusion import EngramFusion
from engram.memory.state import Tables
from engram.tables import EncodedTable, HostTable


def build_layout(config: EngramConfig, compressed_vocab: int, pad_id: int) -> HashLayout:
    """Return the hash layout of a configuration. pad_id: compressed id that positions before a text read as."""
    return HashLayout.build(
        compressed_vocab=compressed_vocab,
        layers=config.layers,
        orders=config.orders,
        heads=config.heads,
        rows_per_head=config.rows_per_head,
        pad_id=pad_id,
        seed=config.seed,
        family=config.hash,
        boundary=config.boundary,
        generator=config.generator,
        row_multiple=config.row_multiple,
    )


def hash_layout(config: EngramConfig, token_map: TokenMap) -> HashLayout:
    """Return the hash layout of a configuration for the tokenizer of a token map."""
    return build_layout(config, token_map.size, int(token_map.table[config.pad_id]))


def check_arguments(config: EngramConfig, token_map: TokenMap, folder: str | os.PathLike[str] | None) -> None:
    """Raise ValueError if a token map cannot belong to a configuration, or if `folder` is a saved memory."""
    if config.compressed_vocab is not None and token_map.size != config.compressed_vocab:
        raise ValueError(
            f"this configuration's rows are addressed with {config.compressed_vocab:,} compressed ids, the token "
            f"map has {token_map.size:,}: it comes from another tokenizer, and every row would be the wrong one"
        )
    if config.pad_id >= len(token_map.table):
        raise ValueError(f"pad_id {config.pad_id} is outside the token map's vocabulary of {len(token_map.table):,}")
    if token_map.table[config.pad_id] < 0:
        raise ValueError(
            f"pad_id {config.pad_id} is a dead id of the token map: name one that the tokenizer had at first"
        )
    if folder is not None and (Path(folder) / "manifest.json").exists():
        raise ValueError(
            f"{folder} is a saved memory, which is not trained in place: load it with EngramMemory.load, with rows_in= "
            f"if the rows should stay in files, and save it again"
        )


def make_fusions(
    config: EngramConfig, hidden_size: int, streams: int, fusions: Mapping[int, nn.Module] | None
) -> Mapping[int, nn.Module]:
    """Return the fusion module of each layer: `fusions` if it has one for each, or new ones if it is None.

    Raises:
        ValueError: fusions of other layers.
    """
    if fusions is None:
        return {layer: EngramFusion(config, hidden_size, streams) for layer in config.layers}
    if set(fusions) != set(config.layers):
        raise ValueError(f"the fusions belong to layers {sorted(fusions)}, the configuration needs {config.layers}")
    return fusions


def extended_hasher(hasher: Any, layout: HashLayout, grown: Any) -> tuple[Any, int]:
    """Return a hasher for a tokenizer (or token map) that has grown, and the number of its ids; see TokenMap.extend.

    Raises:
        ValueError: another tokenizer; new classes with a hasher that is not an NgramHasher.
    """
    known, extended = len(hasher.token_map.table), hasher.token_map.extend(grown)
    if (extended.table[known:] < 0).all():
        return hasher, len(extended.table)
    if not isinstance(hasher, NgramHasher):
        kind = type(hasher).__name__
        raise ValueError(f"the rows are addressed by a {kind}, which cannot accept new tokens: build a new memory")
    return NgramHasher(layout, extended), len(extended.table)


def new_table(config: EngramConfig, layer: int, rows: int, path: Any = None, mode: str = "r+") -> HostTable:
    """Make the table of one layer with the float rows of the configuration, in memory or in the file `path`."""
    dtype, init, std = getattr(torch, config.table_dtype), config.table_init, config.table_std
    return HostTable(rows, config.head_dim, dtype, path, mode=mode, init=init, std=std, seed=table_seed(config, layer))


def table_seed(config: EngramConfig, layer: int) -> int:
    """Seed of the initial rows of a layer's table."""
    return config.seed * 1_000_003 + layer


def unwritten(dtype: Any, init: Any, std: Any, seed: Any) -> tuple[Any, ...]:
    """Return what decides how rows that were never written read: zeros do not depend on std and seed."""
    return (dtype, init) if init == "zero" else (dtype, init, std, seed)


def make_tables(
    config: EngramConfig,
    layout: HashLayout,
    folder: Path | None,
    open_rows: Callable[[Path], None],
    begin_rows: Callable[[Path], None],
    tables: Tables,
) -> None:
    """Fill `tables` with one float table per layer, in memory or in files of `folder`: open_rows(folder) checks
    existing rows, begin_rows(folder) prepares a folder without rows.

    Raises:
        ValueError: the folder holds rows of another memory, or of some layers only.
    """
    paths = {layer: None if folder is None else folder / f"layer-{layer}.rows" for layer in config.layers}
    existing = [layer for layer, path in paths.items() if path is not None and path.exists()]
    if folder is not None and existing:
        open_rows(folder)
        if missing := sorted({*config.layers} - {*existing}):
            raise ValueError(
                f"{folder} holds the rows of layers {existing} and not those of {missing}: restore them, or use "
                f"another folder"
            )
    elif folder is not None and torch.get_default_device().type == "meta":
        tables.before_rows = partial(begin_rows, folder)
    elif folder is not None:
        begin_rows(folder)
    try:
        for layer, path in paths.items():
            tables[layer] = new_table(config, layer, layout.rows[layer], path)
    except BaseException:
        for table in tables.values():
            table.close()
            if table.path is not None and not existing:  # so that the call can be repeated
                table.path.unlink(missing_ok=True)
        raise


def check_tables(config: EngramConfig, rows: Mapping[int, int], tables: Tables) -> str | None:
    """Compare tables with the configuration and the rows per layer. Return their codec's name (of tables in a
    released checkpoint, their form), None for float rows.

    Raises:
        ValueError: other shapes, codecs that differ, or other initial rows than the configuration makes.
    """
    shapes = {layer: (table.rows, table.dim) for layer, table in tables.items()}
    expected = {layer: (rows.get(layer), config.head_dim) for layer in config.layers}
    codecs = {t.codec.name if isinstance(t, EncodedTable) else getattr(t, "form", None) for t in tables.values()}
    if shapes != expected or len(codecs) != 1:
        raise ValueError(f"the tables have shapes {shapes}, stored as {codecs}; the configuration needs {expected}")
    codec = codecs.pop()
    for layer, table in tables.items() if codec is None else ():
        made = unwritten(config.table_dtype, config.table_init, config.table_std, table_seed(config, layer))
        actual = unwritten(str(table.dtype).removeprefix("torch."), table.init, table.std, table.seed)
        if actual != made:
            raise ValueError(
                f"the table of layer {layer} has (dtype, init, std, seed) {actual}, the configuration makes "
                f"{made}: rows never written would read differently after it is saved and loaded"
            )
    return codec
