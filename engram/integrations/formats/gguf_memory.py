"""The n-gram memory in a GGUF file: its tables, and the keys that give their addresses.

A layer's table is `blk.<layer>.engram_embd.weight`, as llama.cpp, ik_llama.cpp and ds4 name it
(`blk.<layer>.engram.weight` in older files of ours). The keys `<arch>.engram.*` give its addresses; the architectures
are `deepseek41` and `qwen4exp`, and any other memory is written under `engram`. Files of ours also have `engram.config`
and `engram.layout` (JSON), which give the rest. The other weights of a memory have no agreed names: a GGUF file has
only its tables.

Types: F32, F16 and BF16; I8 rows of dim + dim / 32 bytes, which are our fp8 rows (e4m3 values, then e8m0 scales); and,
read only, the types that the gguf package dequantises, such as Q8_0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram.addressing import HashLayout, TokenMap
from engram.config import EngramConfig, as_integer
from engram.integrations.formats.dialects import check_dialect, longest_orders, vocabulary
from engram.integrations.formats.gguf import NUMBERS, TYPES, Value
from engram.integrations.formats.safetensors_io import Stored
from engram.integrations.formats.stored_rows import Rows
from engram.storage.untrusted import parse_json
from engram.tables.codecs import BLOCK

TABLE = re.compile(r"blk\.(\d+)\.(?:engram_embd|engram)\.weight")
NAME = "blk.{}.engram_embd.weight"
ARCHITECTURES = {"deepseek41": "deepseek-v4.1", "qwen4exp": "qwen"}


def memory_keys(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys `<arch>.engram.*` without that prefix; empty for files that have none."""
    prefix = f"{metadata.get('general.architecture')}.engram."
    return {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}


def token_map_of(path: Path, metadata: Mapping[str, Any]) -> TokenMap | None:
    """Return the token map in a file's keys; for Qwen4-Exp, whose ids are raw, the identity; None if it has neither."""
    keys, arch = memory_keys(metadata), metadata.get("general.architecture")
    try:
        if "token_map" in keys:
            return TokenMap(np.array(_integers(keys, "token_map"), dtype=np.int64))
        tokens = metadata.get("tokenizer.ggml.tokens")
        vocab = metadata.get(f"{arch}.vocab_size") or (len(tokens) if isinstance(tokens, list) else None)
        return TokenMap.identity(vocabulary(as_integer("vocab_size", vocab))) if arch == "qwen4exp" and vocab else None
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from error


def config_of(path: Path, metadata: Mapping[str, Any], token_map: TokenMap | None) -> EngramConfig:
    """Return the configuration in a file's keys. rows_per_head is its first prime, which gives the same layout.

    Raises:
        ValueError: the architecture is unknown, or a key is missing or unknown; the caller has to give a configuration.
    """
    keys, arch = memory_keys(metadata), metadata.get("general.architecture")
    try:
        if "engram.config" in metadata:
            return EngramConfig.from_json(metadata["engram.config"])
        if arch not in ARCHITECTURES:
            raise ValueError(
                f"its architecture is {str(arch)[:40]!r}, not {' or '.join(ARCHITECTURES)}: give the configuration"
            )
        orders, heads = (
            longest_orders(as_integer("max_ngram_size", keys["max_ngram_size"])),
            as_integer("head_count", keys["head_count"]),
        )
        layers, primes = _integers(keys, "layer_ids"), _integers(keys, "primes")
        if not layers or heads < 1 or len(primes) != len(layers) * len(orders) * heads:
            raise ValueError(
                f"{arch}.engram.primes holds {len(primes)} numbers, expected {len(layers)} layers x "
                f"{len(orders)} orders x {heads} heads"
            )
        eps = float(metadata.get(f"{arch}.attention.layer_norm_rms_epsilon", 1e-20 if arch == "deepseek41" else 1e-6))
        dialect: dict[str, Any] = {"conv_kernel": 0, "boundary": "dead"}
        if arch == "qwen4exp":
            dialect = {"boundary": "eos", "generator": "splitmix64", "seed": 1234, "row_multiple": 128, "conv_eps": eps}
        config = EngramConfig(
            layers=tuple(layers),
            orders=orders,
            heads=heads,
            head_dim=as_integer("key_length", keys["key_length"]),
            rows_per_head=primes[0],
            pad_id=as_integer("pad_id", keys["pad_id"]),
            gate_eps=eps,
            table_dtype="bfloat16",
            compressed_vocab=None if token_map is None else token_map.size,
            **dialect,
        )
    except KeyError as error:
        raise ValueError(f"{path} lacks the key {arch}.engram.{error.args[0]}: give the configuration") from error
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from error
    return config


def check_keys(path: Path, metadata: Mapping[str, Any], config: EngramConfig, layout: HashLayout, mapped: bool) -> None:
    """Compare each key about the addresses of rows with the layout. mapped: the token map is known.

    Raises:
        ValueError: the first key that differs, with both values.
    """
    keys, arch = memory_keys(metadata), metadata.get("general.architecture")
    expected: dict[str, list[int]] = {name: [] for name in ("primes", "offsets", "multipliers")}
    for layer in layout.layers:
        expected["primes"] += [p for heads in layout.moduli[layer] for p in heads]
        expected["offsets"] += layout.offsets[layer]
        expected["multipliers"] += layout.multipliers[layer]
    single = {"head_count": config.heads, "key_length": config.head_dim, "max_ngram_size": config.orders[-1]}
    expected |= {name: [value] for name, value in {**single, "pad_id": config.pad_id}.items()}
    expected["layer_ids"] = list(config.layers)
    for name, values in expected.items():
        if name not in keys or (name == "multipliers" and not mapped):
            continue
        try:
            actual = _integers(keys, name)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {arch}.engram.{error}") from error
        if actual != values:
            index = next((i for i, (a, b) in enumerate(zip(actual, values, strict=False)) if a != b), len(values))
            what = f"{len(actual)} numbers" if len(actual) != len(values) else f"{actual[index]} at index {index}"
            expected_value = f"{len(values)}" if len(actual) != len(values) else f"{values[index]}"
            raise ValueError(
                f"{path}: the key {arch}.engram.{name} has {what}, but this configuration and vocabulary give "
                f"{expected_value}: rows would be read at other addresses. A layout cannot take multipliers or moduli "
                f"from a file yet; if the configuration is another one, give it"
            )
    if mapped and metadata.get("engram.layout_digest", layout.digest) != layout.digest:
        raise ValueError(
            f"{path}: the key engram.layout_digest is not the digest of this configuration's layout and token map"
        )


def _integers(keys: Mapping[str, Any], name: str) -> list[int]:
    """Return a key's integers, one or many. Texts of digits count: numbers above 2^53 may be written so."""
    value = keys[name]
    values = value if isinstance(value, list) else [value]
    return [int(v) if isinstance(v, str) and v.isdecimal() and len(v) < 20 else as_integer(name, v) for v in values]


class QuantisedRows(Rows):
    """Rows of a type that ggml packs in blocks, dequantised to float32 by the gguf package."""

    def _values(self, stored: Stored, first: int, stop: int) -> Tensor:
        data = stored.read_bytes(stored.offset + first * stored.row_bytes, (stop - first) * stored.row_bytes)
        return self.unpack(stored, data.view(stop - first, stored.row_bytes))

    def unpack(self, stored: Stored, packed: Tensor) -> Tensor:
        """Return packed rows, uint8 [n, bytes per row], as float32 [n, dim]."""
        try:
            from gguf import GGMLQuantizationType
            from gguf.quants import dequantize
        except ImportError:
            raise ValueError(
                f"{stored.path}: tensor {stored.name} is {stored.dtype}, which the gguf package reads: pip install gguf"
            ) from None
        try:
            rows = dequantize(packed.numpy(), GGMLQuantizationType(NUMBERS[stored.dtype]))
        except (NotImplementedError, ValueError) as error:
            raise ValueError(f"{stored.path}: tensor {stored.name} is {stored.dtype}: {error}") from error
        return torch.from_numpy(np.array(rows, dtype=np.float32)).view(len(packed), self.dim)


def rows_of(stored: Stored, config: EngramConfig, rows: int) -> Rows:
    """Return the rows of a layer's table. Raise ValueError if its shape or type is not what the layout needs."""
    dim, quantised = config.head_dim, stored.dtype in NUMBERS and TYPES[NUMBERS[stored.dtype]][1] > 1
    width = dim + dim // BLOCK if stored.dtype == "I8" and dim % BLOCK == 0 else dim
    if stored.shape != (rows, width):
        raise ValueError(f"{stored.path}: tensor {stored.name} is {list(stored.shape)}, expected {[rows, width]}")
    if quantised:
        return QuantisedRows(stored.name, dim, "float32", [(0, stored, None)], rows, kept=config.table_dtype)
    codecs = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "I8": "fp8"}
    if stored.dtype not in codecs or (stored.dtype == "I8" and width == dim):
        raise ValueError(
            f"{stored.path}: tensor {stored.name} is {stored.dtype}, expected F32, F16, BF16, a quantised type, or I8 "
            f"rows of dim + dim / 32 bytes with dim a multiple of 32"
        )
    return Rows(stored.name, dim, codecs[stored.dtype], [(0, stored, None)], rows)


def shape_of(tensors: Mapping[str, Stored], metadata: Mapping[str, Any], layers: Sequence[int]) -> tuple[int, int]:
    """Return (hidden size, streams) by our keys, the gains of the query's norm, or the model's width; else (0, 0)."""
    arch = metadata.get("general.architecture")
    gains = tensors.get(f"blk.{layers[0]}.engram_q_norm.weight")
    if "engram.hidden_size" in metadata and "engram.streams" in metadata:
        shape = metadata["engram.hidden_size"], metadata["engram.streams"]
    elif gains is not None and len(gains.shape) in (1, 2):
        shape = gains.shape[-1], math.prod(gains.shape[:-1])
    else:
        shape = metadata.get(f"{arch}.embedding_length", 0), 1
    hidden_size, streams = (n if isinstance(n, int) and 0 < n < 2**24 else 0 for n in shape)
    return (hidden_size, streams) if hidden_size and streams else (0, 0)


def keys_of(config: EngramConfig, layout: HashLayout, token_map: TokenMap) -> dict[str, Value]:
    """Return general.architecture and the keys `<arch>.engram.*` of a memory."""
    arch = "engram"
    for name, dialect in ARCHITECTURES.items():
        try:
            check_dialect(config, dialect)
            arch = name
        except ValueError:
            continue
    layers = layout.layers
    keys: dict[str, Value] = {
        "layer_ids": np.array(layers, dtype=np.int32),
        "head_count": np.uint32(config.heads),
        "key_length": np.uint32(config.head_dim),
        "max_ngram_size": np.uint32(config.orders[-1]),
        "multipliers": np.array([m for layer in layers for m in layout.multipliers[layer]], dtype=np.int64),
        "primes": np.array([p for layer in layers for h in layout.moduli[layer] for p in h], dtype=np.int64),
        "offsets": np.array([o for layer in layers for o in layout.offsets[layer]], dtype=np.int64),
        "token_map": token_map.table.astype(np.int32),
        "pad_id": np.uint32(config.pad_id),
    }
    return {"general.architecture": arch, **{f"{arch}.engram.{name}": value for name, value in keys.items()}}


def own_config(path: Path, metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return EngramConfig's fields in a file of ours, or None. Raise ValueError if they are not JSON."""
    if "engram.config" not in metadata:
        return None
    try:
        return parse_json(str(metadata["engram.config"]))
    except ValueError as error:
        raise ValueError(f"{path}: the key engram.config: {error}") from error
