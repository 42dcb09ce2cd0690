"""GGUF files: the documented container (version 3), read, and written a block of rows at a time."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engram.integrations.formats.safetensors_io import Stored, Streamed
from engram.storage.untrusted import check_regular, open_regular

MAGIC = b"GGUF"
ALIGNMENT = 32
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
NUMBERS = {name: number for number, (name, _, _) in TYPES.items()}
_WRITTEN = {"F32": 4, "BF16": 2, "I8": 1}
_UINT32, _INT32, _STRING, _ARRAY, _UINT64, _INT64 = 4, 5, 8, 9, 10, 11
_SCALARS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "?", 10: "u8", 11: "i8", 12: "f8"}
_LONGEST_HEADER = 256 << 20  # bytes; a vocabulary of 250,000 tokens and its merges take 15 MiB
_LONGEST_ARRAY = 1 << 23
_MOST = 1 << 20  # tensors, and keys

Value = int | str | np.uint32 | np.ndarray  # arrays are int32 or int64


def _string(text: str) -> bytes:
    """Encode a text as GGUF does: its length, then UTF-8."""
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    """Encode a metadata value: its type, then its bytes."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, np.ndarray):
        kind = {"int32": _INT32, "int64": _INT64}[value.dtype.name]
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + value.astype(value.dtype.newbyteorder("<")).tobytes()
    if isinstance(value, np.uint32):
        return struct.pack("<II", _UINT32, value)
    return struct.pack("<IQ", _UINT64, value)


class GgufWriter(Streamed):
    """Writer of a GGUF file, whose tensors [rows, columns] are filled in order, with a digest of each.

    Args:
        specs: name -> ("F32", "BF16" or "I8", (rows, columns)). metadata: strings, integers, and arrays of them.
    """

    def __init__(self, path: Path, specs: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, Value]):
        metadata = {"general.architecture": "engram", **metadata}
        head = b"GGUF" + struct.pack("<IQQ", 3, len(specs), len(metadata) + 1)
        head += _string("general.alignment") + struct.pack("<II", _UINT32, ALIGNMENT)
        head += b"".join(_string(key) + _value(value) for key, value in metadata.items())
        at, offsets = 0, {}
        for name, (dtype, shape) in specs.items():
            if dtype not in _WRITTEN:
                raise ValueError(f"tensor {name} is {dtype}: GGUF export writes {', '.join(_WRITTEN)}")
            offsets[name] = at
            dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))  # the fastest dimension first
            head += _string(name) + dims + struct.pack("<IQ", NUMBERS[dtype], at)
            size = _WRITTEN[dtype] * math.prod(shape)
            at += size + -size % ALIGNMENT
        head += bytes(-len(head) % ALIGNMENT)
        stored = {}
        for name, (dtype, shape) in specs.items():
            size = _WRITTEN[dtype] * math.prod(shape)
            stored[name] = Stored(name, path, dtype, shape, len(head) + offsets[name], size)
        super().__init__(path, head, at, stored)


class _Reader:
    """Reader of the little-endian values of a header, never beyond the file's end or the longest allowed header."""

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
        raise ValueError(f"{self.path}: unknown GGUF value type {kind}, or arrays nested too deeply: torn")


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Return True for a regular file that begins as GGUF files do, whatever its name."""
    try:
        with open_regular(path) as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def read_gguf(path: Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    """Return the tensors and metadata of a GGUF file, version 2 or 3. Types that are not in TYPES are "type <number>".

    Raises:
        OSError: the file does not exist, or is not a regular one. ValueError: the file is torn, or is not GGUF.
    """
    reader = _Reader(path)
    with reader.file:
        if reader.take(4) != MAGIC or (version := reader.number("I")) not in (2, 3):
            raise ValueError(f"{path} is not a GGUF file of version 2 or 3")
        tensors, count = reader.count("tensors", _MOST), reader.count("keys", _MOST)
        metadata = {reader.string(): reader.value(reader.number("I")) for _ in range(count)}
        infos = []
        for _ in range(tensors):
            name, dims = reader.string(), reader.number("I")
            if dims > 4:
                raise ValueError(f"{path}: tensor {name} has {dims} dimensions, GGUF has at most 4: torn")
            shape = tuple(reversed([reader.number("Q") for _ in range(dims)]))
            infos.append((name, shape, reader.number("I"), reader.number("Q")))
        at, alignment = reader.file.tell(), metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"{path}: general.alignment is {alignment!r}, expected a number of bytes")
    start = at + -at % alignment
    stored: dict[str, Stored] = {}
    for name, shape, number, offset in infos:
        dtype, block, width = TYPES.get(number, (f"type {number}", 1, 0))
        if name in stored or (shape and shape[-1] % block):
            raise ValueError(
                f"{path}: tensor {name} {list(shape)} is listed twice, or its rows are not a multiple of {dtype}'s "
                f"blocks"
            )
        size = math.prod(shape) // block * width
        if start + offset + size > reader.size:
            raise ValueError(f"{path}: tensor {name} ends at byte {start + offset + size:,} of {reader.size:,}: torn")
        stored[name] = Stored(name, path, dtype, shape, start + offset, size)
    return stored, {"version": version, **metadata}
