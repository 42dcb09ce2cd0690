"""GGUF files of n-gram tables: the documented container (version 3), read, and written a block of rows at a time.

A layer's table is `blk.<layer>.engram_embd.weight`, as llama.cpp, ik_llama.cpp and ds4 name it
(`blk.<layer>.engram.weight` in older files of ours), and what says how it is addressed are keys `<arch>.engram.*`, with
the architectures `deepseek41` and `qwen4exp`; a memory that is neither is written under `engram`. Ours also hold
`engram.config` and `engram.layout` (JSON), which say what those keys leave out. The other weights of a memory have no
agreed names: a GGUF file holds its tables alone.

Types: F32, F16 and BF16; I8 rows of dim + dim / 32 bytes, which are our fp8 rows (e4m3 values, then e8m0 scales); and
what the gguf package dequantises, such as Q8_0, read only.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram.addressing import HashLayout, TokenMap
from engram.config import EngramConfig, whole
from engram.integrations.formats.dialects import check_dialect, longest_orders, vocabulary
from engram.integrations.formats.safetensors_io import Stored, Streamed
from engram.integrations.formats.stored_rows import Rows
from engram.storage.untrusted import check_regular, open_regular, parse_json
from engram.tables.codecs import BLOCK

MAGIC = b"GGUF"
ALIGNMENT = 32
TABLE = re.compile(r"blk\.(\d+)\.(?:engram_embd|engram)\.weight")
NAME = "blk.{}.engram_embd.weight"
ARCHITECTURES = {"deepseek41": "deepseek-v4.1", "qwen4exp": "qwen"}
# ggml's types: number -> (name, values in a block, bytes of a block)
TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip
_NUMBERS = {name: number for number, (name, _, _) in TYPES.items()}
_WRITTEN = {"F32": 4, "BF16": 2, "I8": 1}
_UINT32, _INT32, _STRING, _ARRAY, _UINT64, _INT64 = 4, 5, 8, 9, 10, 11
_SCALARS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "?", 10: "u8", 11: "i8", 12: "f8"}
_LONGEST_HEADER = 256 << 20  # bytes; a vocabulary of 250,000 tokens and its merges take 15 MiB
_LONGEST_ARRAY = 1 << 23
_MOST = 1 << 20  # tensors, and keys

Value = int | str | np.uint32 | np.ndarray  # arrays are int32 or int64


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, np.ndarray):
        kind = {"int32": _INT32, "int64": _INT64}[value.dtype.name]
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + value.astype(value.dtype.newbyteorder("<")).tobytes()
    if isinstance(value, np.uint32):
        return struct.pack("<II", _UINT32, value)
    return struct.pack("<IQ", _UINT64, value)


class GgufWriter(Streamed):
    """A GGUF file whose tensors [rows, columns] are filled in order, with a digest over each.

    Args:
        specs: name -> ("F32", "BF16" or "I8", (rows, columns)). metadata: strings, integers, and arrays of them.
    """

    def __init__(self, path: Path, specs: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, Value]):
        facts: dict[str, Value] = {"general.architecture": "engram", **metadata}
        head = b"GGUF" + struct.pack("<IQQ", 3, len(specs), len(facts) + 1)
        head += _string("general.alignment") + struct.pack("<II", _UINT32, ALIGNMENT)
        head += b"".join(_string(key) + _value(value) for key, value in facts.items())
        at, offsets = 0, {}
        for name, (dtype, shape) in specs.items():
            if dtype not in _WRITTEN:
                raise ValueError(f"tensor {name} is {dtype}: GGUF export writes {', '.join(_WRITTEN)}")
            offsets[name] = at
            dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))  # the fastest dimension first
            head += _string(name) + dims + struct.pack("<IQ", _NUMBERS[dtype], at)
            size = _WRITTEN[dtype] * math.prod(shape)
            at += size + -size % ALIGNMENT
        head += bytes(-len(head) % ALIGNMENT)
        stored = {}
        for name, (dtype, shape) in specs.items():
            size = _WRITTEN[dtype] * math.prod(shape)
            stored[name] = Stored(name, path, dtype, shape, len(head) + offsets[name], size)
        super().__init__(path, head, at, stored)


class _Reader:
    """Little-endian values of a file's beginning, never beyond its end, nor beyond the longest header."""

    def __init__(self, path: Path):
        self.path, self.size = path, check_regular(path, "a GGUF file")
        self.file = open_regular(path, "a GGUF file")

    def take(self, count: int) -> bytes:
        at = self.file.tell()
        if count > self.size - at:
            raise ValueError(f"{self.path} is a torn GGUF file: it holds {self.size:,} bytes")
        if at + count > _LONGEST_HEADER:
            raise ValueError(f"{self.path}: the header of a GGUF file has at most {_LONGEST_HEADER:,} bytes")
        return self.file.read(count)

    def number(self, kind: str) -> Any:
        return struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind)))[0]

    def count(self, what: str, most: int) -> int:
        count: int = self.number("Q")
        if count > most:
            raise ValueError(f"{self.path} has {count:,} {what}: torn, or more than the {most:,} that are read")
        return count

    def string(self) -> str:
        data = self.take(self.number("Q"))
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is damaged or torn: a text is not UTF-8 ({error})") from None

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return np.frombuffer(self.take(np.dtype(_SCALARS[kind]).itemsize), "<" + _SCALARS[kind])[0].item()
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY and depth < 4:
            inner, count = self.number("I"), self.count("values in one array", _LONGEST_ARRAY)
            if inner in _SCALARS:
                data = self.take(count * np.dtype(_SCALARS[inner]).itemsize)
                return np.frombuffer(data, "<" + _SCALARS[inner]).tolist()
            return [self.value(inner, depth + 1) for _ in range(count)]
        raise ValueError(f"{self.path}: unknown GGUF value type {kind}, or arrays too deep in each other: torn")


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Return True for a regular file that begins as GGUF files do, whatever it is called."""
    try:
        with open_regular(path) as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def read_gguf(path: Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    """Tensors and metadata of a GGUF file, version 2 or 3; types that TYPES does not have are named by their number.

    Raises:
        OSError: no such file, or not a regular one. ValueError: a torn file, or no GGUF.
    """
    reader = _Reader(path)
    with reader.file:
        if reader.take(4) != MAGIC or (version := reader.number("I")) not in (2, 3):
            raise ValueError(f"{path} is not a GGUF file of version 2 or 3")
        tensors, count = reader.count("tensors", _MOST), reader.count("keys", _MOST)
        facts = {reader.string(): reader.value(reader.number("I")) for _ in range(count)}
        found = []
        for _ in range(tensors):
            name, dims = reader.string(), reader.number("I")
            if dims > 4:
                raise ValueError(f"{path}: tensor {name} has {dims} dimensions, GGUF has at most 4: torn")
            shape = tuple(reversed([reader.number("Q") for _ in range(dims)]))
            found.append((name, shape, reader.number("I"), reader.number("Q")))
        at, alignment = reader.file.tell(), facts.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"{path}: general.alignment is {alignment!r}, expected a number of bytes")
    start = at + -at % alignment
    stored: dict[str, Stored] = {}
    for name, shape, number, offset in found:
        dtype, block, width = TYPES.get(number, (f"type {number}", 1, 0))
        if name in stored or (shape and shape[-1] % block):
            raise ValueError(f"{path}: tensor {name} {list(shape)} is there twice, or no multiple of {dtype}'s blocks")
        size = math.prod(shape) // block * width
        if start + offset + size > reader.size:
            raise ValueError(f"{path}: tensor {name} ends at byte {start + offset + size:,} of {reader.size:,}: torn")
        stored[name] = Stored(name, path, dtype, shape, start + offset, size)
    return stored, {"version": version, **facts}


def memory_keys(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The keys `<arch>.engram.*`, without that prefix; empty for files that have none."""
    prefix = f"{facts.get('general.architecture')}.engram."
    return {key.removeprefix(prefix): value for key, value in facts.items() if key.startswith(prefix)}


def token_map_of(path: Path, facts: Mapping[str, Any]) -> TokenMap | None:
    """The token map in a file's keys; of Qwen4-Exp, whose ids are raw, by the size of its vocabulary; or None."""
    keys, arch = memory_keys(facts), facts.get("general.architecture")
    try:
        if "token_map" in keys:
            return TokenMap(np.array(_whole(keys, "token_map"), dtype=np.int64))
        tokens = facts.get("tokenizer.ggml.tokens")
        vocab = facts.get(f"{arch}.vocab_size") or (len(tokens) if isinstance(tokens, list) else None)
        return TokenMap.identity(vocabulary(whole("vocab_size", vocab))) if arch == "qwen4exp" and vocab else None
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from error


def config_of(path: Path, facts: Mapping[str, Any], token_map: TokenMap | None) -> EngramConfig:
    """The configuration that a file's keys give. rows_per_head is its first prime, which gives the same layout.

    Raises:
        ValueError: an architecture or a key that is not known or missing: give the configuration.
    """
    keys, arch = memory_keys(facts), facts.get("general.architecture")
    try:
        if "engram.config" in facts:
            return EngramConfig.from_json(facts["engram.config"])
        if arch not in ARCHITECTURES:
            raise ValueError(
                f"its architecture is {str(arch)[:40]!r}, not {' or '.join(ARCHITECTURES)}: give the configuration"
            )
        orders, heads = (
            longest_orders(whole("max_ngram_size", keys["max_ngram_size"])),
            whole("head_count", keys["head_count"]),
        )
        layers, primes = _whole(keys, "layer_ids"), _whole(keys, "primes")
        if not layers or heads < 1 or len(primes) != len(layers) * len(orders) * heads:
            raise ValueError(
                f"{arch}.engram.primes holds {len(primes)} numbers, expected {len(layers)} layers x "
                f"{len(orders)} orders x {heads} heads"
            )
        eps = float(facts.get(f"{arch}.attention.layer_norm_rms_epsilon", 1e-20 if arch == "deepseek41" else 1e-6))
        dialect: dict[str, Any] = {"conv_kernel": 0, "boundary": "dead"}
        if arch == "qwen4exp":
            dialect = {"boundary": "eos", "generator": "splitmix64", "seed": 1234, "row_multiple": 128, "conv_eps": eps}
        config = EngramConfig(
            layers=tuple(layers),
            orders=orders,
            heads=heads,
            head_dim=whole("key_length", keys["key_length"]),
            rows_per_head=primes[0],
            pad_id=whole("pad_id", keys["pad_id"]),
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


def check_keys(path: Path, facts: Mapping[str, Any], config: EngramConfig, layout: HashLayout, mapped: bool) -> None:
    """Compare every key that says how rows are addressed with the layout. mapped: its token map is known.

    Raises:
        ValueError: the first key that differs, with both values.
    """
    keys, arch = memory_keys(facts), facts.get("general.architecture")
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
            found = _whole(keys, name)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {arch}.engram.{error}") from error
        if found != values:
            place = next((i for i, (a, b) in enumerate(zip(found, values, strict=False)) if a != b), len(values))
            what = f"{len(found)} numbers" if len(found) != len(values) else f"{found[place]} at place {place}"
            wanted = f"{len(values)}" if len(found) != len(values) else f"{values[place]}"
            raise ValueError(
                f"{path}: the key {arch}.engram.{name} has {what}, but this configuration and vocabulary give "
                f"{wanted}: rows would be read at other addresses. A layout takes no multipliers or moduli from a file "
                f"yet; if the configuration is another one, give it"
            )
    for name, digest in (("engram.layout_digest", layout.digest if mapped else None),):
        if digest is not None and facts.get(name, digest) != digest:
            raise ValueError(f"{path}: the key {name} is not the digest of this configuration's layout and token map")


def _whole(keys: Mapping[str, Any], name: str) -> list[int]:
    """A key's integers, one or many; texts of digits too, as numbers above 2^53 may be written."""
    value = keys[name]
    values = value if isinstance(value, list) else [value]
    return [int(v) if isinstance(v, str) and v.isdecimal() and len(v) < 20 else whole(name, v) for v in values]


class QuantisedRows(Rows):
    """Rows of a type that ggml packs in blocks, dequantised to float32 by the gguf package."""

    def _values(self, stored: Stored, first: int, stop: int) -> Tensor:
        try:
            from gguf import GGMLQuantizationType
            from gguf.quants import dequantize
        except ImportError:
            raise ValueError(
                f"{stored.path}: tensor {stored.name} is {stored.dtype}, which the gguf package reads: pip install gguf"
            ) from None
        data = stored.read_bytes(stored.offset + first * stored.row_bytes, (stop - first) * stored.row_bytes)
        packed = data.view(stop - first, stored.row_bytes).numpy()
        try:
            rows = dequantize(packed, GGMLQuantizationType(_NUMBERS[stored.dtype]))
        except (NotImplementedError, ValueError) as error:
            raise ValueError(f"{stored.path}: tensor {stored.name} is {stored.dtype}: {error}") from error
        return torch.from_numpy(np.array(rows, dtype=np.float32)).view(stop - first, self.dim)


def rows_of(stored: Stored, config: EngramConfig, rows: int) -> Rows:
    """The rows of a layer's table. Raises ValueError for another shape or type than the layout needs, by name."""
    dim, quantised = config.head_dim, stored.dtype in _NUMBERS and TYPES[_NUMBERS[stored.dtype]][1] > 1
    width = dim + dim // BLOCK if stored.dtype == "I8" and dim % BLOCK == 0 else dim
    if stored.shape != (rows, width):
        raise ValueError(f"{stored.path}: tensor {stored.name} is {list(stored.shape)}, expected {[rows, width]}")
    if quantised:
        return QuantisedRows(stored.name, dim, "float32", [(0, stored, None)], rows, kept=config.table_dtype)
    forms = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "I8": "fp8"}
    if stored.dtype not in forms or (stored.dtype == "I8" and width == dim):
        raise ValueError(
            f"{stored.path}: tensor {stored.name} is {stored.dtype}, expected F32, F16, BF16, a quantised type, or I8 "
            f"rows of dim + dim / 32 bytes with dim a multiple of 32"
        )
    return Rows(stored.name, dim, forms[stored.dtype], [(0, stored, None)], rows)


def shape_of(tensors: Mapping[str, Stored], facts: Mapping[str, Any], layers: Sequence[int]) -> tuple[int, int]:
    """(hidden size, streams) by our keys, the gains of the query's norm, or the model's width; (0, 0) without them."""
    arch = facts.get("general.architecture")
    gains = tensors.get(f"blk.{layers[0]}.engram_q_norm.weight")
    if "engram.hidden_size" in facts and "engram.streams" in facts:
        shape = facts["engram.hidden_size"], facts["engram.streams"]
    elif gains is not None and len(gains.shape) in (1, 2):
        shape = gains.shape[-1], math.prod(gains.shape[:-1])
    else:
        shape = facts.get(f"{arch}.embedding_length", 0), 1
    hidden_size, streams = (n if isinstance(n, int) and 0 < n < 2**24 else 0 for n in shape)
    return (hidden_size, streams) if hidden_size and streams else (0, 0)


def keys_of(config: EngramConfig, layout: HashLayout, token_map: TokenMap) -> dict[str, Value]:
    """general.architecture and the keys `<arch>.engram.*` of a memory."""
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


def own_facts(path: Path, facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """EngramConfig's fields that a file of ours states, or None. Raises ValueError for text that is not JSON."""
    if "engram.config" not in facts:
        return None
    try:
        return parse_json(str(facts["engram.config"]))
    except ValueError as error:
        raise ValueError(f"{path}: the key engram.config: {error}") from error
