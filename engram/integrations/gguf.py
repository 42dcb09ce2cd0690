"""GGUF files of n-gram tables: the documented container (version 3), written a block of rows at a time.

There is no agreed name for these tensors: a layer's table is `blk.<layer>.engram.weight`, and everything that says how
it is addressed stands in the metadata, as `engram.config` and `engram.layout` (JSON, multipliers as strings).
Types: F32 and BF16. ggml has no e4m3 with a scale per 32 values, so such rows become BF16.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from engram.integrations.tensors import Stored, Streamed

ALIGNMENT = 32
_TYPES = {"F32": 0, "BF16": 30}  # ggml's numbers
_NAMES = {number: name for name, number in _TYPES.items()}
_UINT32, _STRING, _UINT64 = 4, 8, 10


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: int | str) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    return struct.pack("<IQ", _UINT64, value)


class GgufWriter(Streamed):
    """A GGUF file whose tensors [rows, columns] are filled in order, with a digest over each.

    Args:
        specs: name -> ("F32" or "BF16", (rows, columns)). metadata: strings and 64-bit integers.
    """

    def __init__(self, path: Path, specs: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, int | str]):
        facts: dict[str, int | str] = {"general.architecture": "engram", **metadata}
        head = b"GGUF" + struct.pack("<IQQ", 3, len(specs), len(facts) + 1)
        head += _string("general.alignment") + struct.pack("<II", _UINT32, ALIGNMENT)
        head += b"".join(_string(key) + _value(value) for key, value in facts.items())
        at, offsets = 0, {}
        for name, (dtype, shape) in specs.items():
            if dtype not in _TYPES:
                raise ValueError(f"tensor {name} is {dtype}: GGUF export writes {', '.join(_TYPES)}")
            offsets[name] = at
            dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))  # the fastest dimension first
            head += _string(name) + dims + struct.pack("<IQ", _TYPES[dtype], at)
            size = (4 if dtype == "F32" else 2) * int(torch.Size(shape).numel())
            at += size + -size % ALIGNMENT
        head += bytes(-len(head) % ALIGNMENT)
        stored = {}
        for name, (dtype, shape) in specs.items():
            size = (4 if dtype == "F32" else 2) * int(torch.Size(shape).numel())
            stored[name] = Stored(name, path, dtype, shape, len(head) + offsets[name], size)
        super().__init__(path, head, at, stored)


class _Reader:
    """Little-endian values of a file's beginning, never beyond its end."""

    def __init__(self, path: Path):
        self.path, self.size = path, path.stat().st_size
        self.file = open(path, "rb")

    def take(self, count: int) -> bytes:
        if count > self.size - self.file.tell():
            raise ValueError(f"{self.path} is a torn GGUF file: it holds {self.size:,} bytes")
        return self.file.read(count)

    def number(self, kind: str) -> Any:
        return struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind)))[0]

    def string(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self, kind: int) -> Any:
        scalars = "BbHhIif?"
        if kind < len(scalars):
            return self.number(scalars[kind])
        if kind == _STRING:
            return self.string()
        if kind == 9:  # an array
            inner, count = self.number("I"), self.number("Q")
            return [self.value(inner) for _ in range(min(count, self.size))]
        if kind in (10, 11, 12):
            return self.number("Qqd"[kind - 10])
        raise ValueError(f"{self.path}: unknown GGUF value type {kind}")


def read_gguf(path: Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    """Tensors and metadata of a GGUF file, version 2 or 3; dtypes other than F32 and BF16 are named by their number.

    Raises:
        ValueError: a torn file, or no GGUF.
    """
    reader = _Reader(path)
    with reader.file:
        if reader.take(4) != b"GGUF" or (version := reader.number("I")) not in (2, 3):
            raise ValueError(f"{path} is no GGUF file of version 2 or 3")
        tensors, count = reader.number("Q"), reader.number("Q")
        facts = {reader.string(): reader.value(reader.number("I")) for _ in range(count)}
        found = []
        for _ in range(tensors):
            name, dims = reader.string(), reader.number("I")
            shape = tuple(reversed([reader.number("Q") for _ in range(dims)]))
            found.append((name, shape, reader.number("I"), reader.number("Q")))
        at, alignment = reader.file.tell(), facts.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"{path}: general.alignment is {alignment!r}, expected a number of bytes")
    start = at + -at % alignment
    stored = {}
    for name, shape, number, offset in found:
        size = {"F32": 4, "BF16": 2}.get(_NAMES.get(number, ""), 0) * int(torch.Size(shape).numel())
        if start + offset + size > reader.size:
            raise ValueError(f"{path}: tensor {name} ends at byte {start + offset + size:,} of {reader.size:,}: torn")
        stored[name] = Stored(name, path, _NAMES.get(number, f"type {number}"), shape, start + offset, size)
    return stored, {"version": version, **facts}
