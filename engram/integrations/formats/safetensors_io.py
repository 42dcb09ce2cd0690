"""Safetensors files larger than memory: headers, rows read a block at a time, files written a block at a time.

The safetensors package maps a complete file, and a mapped table counts as resident memory. Here rows go through a
buffer whose size the caller chooses. The format is eight bytes of header length, a JSON header, the data.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from engram.config import as_integers
from engram.storage.untrusted import open_regular

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # bytes, as the safetensors package allows


@dataclass(frozen=True)
class Stored:
    """Position of a tensor's bytes in a file. dtype: the format's name for it ("BF16")."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def row_bytes(self) -> int:
        return self.nbytes // max(self.shape[0], 1)

    def read(self, first: int = 0, stop: int | None = None) -> Tensor:
        """Return rows first .. stop - 1 (by default all) in a new tensor.

        Raises:
            OSError: the file ends too early. ValueError: the dtype is not in DTYPES.
        """
        if self.dtype not in DTYPES:
            raise ValueError(f"{self.path}: tensor {self.name} is {self.dtype}: expected one of {', '.join(DTYPES)}")
        if not self.shape:
            return self.read_bytes(self.offset, self.nbytes).view(DTYPES[self.dtype]).view(())
        stop = self.shape[0] if stop is None else stop
        data = self.read_bytes(self.offset + first * self.row_bytes, (stop - first) * self.row_bytes)
        return data.view(DTYPES[self.dtype]).view(stop - first, *self.shape[1:])

    def read_bytes(self, offset: int, nbytes: int) -> Tensor:
        """Return bytes of the file as uint8 [nbytes]."""
        data = torch.empty(nbytes, dtype=torch.uint8)
        view, done = data.numpy().data, 0
        with open_regular(self.path) as file:
            file.seek(offset)
            while done < nbytes:
                count = file.readinto(view[done:])
                if not count:
                    raise OSError(f"{self.path} was truncated: tensor {self.name} ends at byte {offset + nbytes:,}")
                done += count
        return data


_RANK = re.compile(r"(\d+)-mp(\d+)\.safetensors$")  # of tensor parallelism


def read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Return all tensors of a safetensors file, by name, and the file's metadata.

    Raises:
        FileNotFoundError: the file does not exist. OSError: it is not a regular file. ValueError: it is torn or
        foreign: the header is not JSON, or tensors overlap, leave gaps, do not have the size of their shape, or end
        beyond the file.
    """
    with open_regular(path, "a safetensors file") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise ValueError(f"{path} is not a safetensors file, or torn: it holds {size:,} bytes")
        try:
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", {})
            tensors: dict[str, Any] = {
                str(name): (
                    str(v["dtype"]),
                    as_integers("shape", v["shape"]),
                    *as_integers("offset", v["data_offsets"]),
                )
                for name, v in header.items()
            }
            if not all(isinstance(value, str) for value in metadata.values()):
                raise TypeError("__metadata__ holds a value that is not text")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path} is not a safetensors file, or torn: its header cannot be read ({error})"
            ) from error
    at, stored = 0, {}
    for name, (dtype, shape, begin, end) in sorted(tensors.items(), key=lambda item: item[1][2:]):
        values = 1
        for n in shape:
            values *= n
        nbytes = values * DTYPES[dtype].itemsize if dtype in DTYPES else end - begin
        if begin != at or end - begin != nbytes or min(shape, default=0) < 0 or 8 + length + end > size:
            raise ValueError(
                f"{path}: tensor {name} ({dtype} {list(shape)}) has bytes {begin:,} to {end:,} of "
                f"{size:,}: expected {nbytes:,} bytes from {at:,} on. The file is torn, or two tensors share bytes"
            )
        at = end
        stored[name] = Stored(name, path, dtype, shape, 8 + length + begin, end - begin)
    return stored, metadata


@dataclass
class Checkpoint:
    """Tensors of one or several safetensors files, and the config beside them.

    home: the folder. tensors: name -> its parts, in rank order; several if tensor-parallel ranks each hold a part.
    config: of config.json, or None. metadata: of the files. missing: file that does not exist -> its tensors.
    """

    home: Path
    tensors: dict[str, list[Stored]]
    config: dict[str, Any] | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)

    def one(self, name: str, shape: tuple[int, ...] | None = None) -> Stored:
        """Return a tensor of which every rank has a copy. Raise ValueError if it is missing or has another shape."""
        self.require(name)
        copies = self.tensors[name]
        if any(copy.shape != copies[0].shape for copy in copies) or (shape is not None and copies[0].shape != shape):
            expected = f"expected {list(shape)}" if shape is not None else "expected one shape on all ranks"
            shapes = " and ".join(map(str, dict.fromkeys(str(list(p.shape)) for p in copies)))
            raise ValueError(f"{copies[0].path}: tensor {name} is {shapes}, {expected}")
        return copies[0]

    def require(self, name: str) -> None:
        """Raise ValueError if the tensor is missing."""
        for file, names in self.missing.items():
            if name in names:
                raise ValueError(f"tensor {name} is in the shard {self.home / file}, which is missing")
        if name not in self.tensors:
            raise ValueError(f"tensor {name} is missing from {self.home}")


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a safetensors file, or a folder of them: with an index, as model-00001-of-000NN, or model<rank>-mp<ranks>.

    Raises:
        FileNotFoundError: the path has no safetensors. OSError: it is a pipe, socket or device. ValueError: a file is
        torn, or a shard is missing.
    """
    path = Path(path)
    home = path if path.is_dir() else path.parent
    config = _read_json(home / "config.json") if (home / "config.json").is_file() else None
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a safetensors file or a folder of them")
    files = sorted(home.glob("*.safetensors")) if path.is_dir() else [path]
    files = [file for file in files if file.name != "token_map.safetensors"]
    checkpoint = Checkpoint(home, {}, config)
    index = home / "model.safetensors.index.json"
    if path.is_dir() and index.is_file():
        by_file: dict[str, list[str]] = {}
        for name, file in _read_json(index, "weight_map").items():
            by_file.setdefault(str(file), []).append(name)
        if any(Path(file).name != file for file in by_file):
            raise ValueError(f"{index} names a file outside its folder")
        checkpoint.missing = {file: names for file, names in by_file.items() if not (home / file).is_file()}
        files = [home / file for file in sorted(by_file) if file not in checkpoint.missing]
        listed: dict[str, str] = {name: file for file, names in by_file.items() for name in names}
    else:
        listed = {}
        if path.is_dir():
            _check_numbers(files)
    if not files and not checkpoint.missing:
        raise FileNotFoundError(f"{path} holds no safetensors file")
    files.sort(key=lambda file: int(m[1]) if (m := _RANK.search(file.name)) else -1)
    for file in files:
        tensors, metadata = read_header(file)
        rank = _RANK.search(file.name)
        if rank and metadata.get("engram_rank") not in (None, f"{int(rank[1])}/{int(rank[2])}"):
            raise ValueError(f"{file} was written as rank {metadata['engram_rank']}: files were swapped or renamed")
        checkpoint.metadata |= metadata
        for name, stored in tensors.items():
            if listed and listed.get(name) != file.name:
                continue  # the index names another file for this tensor
            if name in checkpoint.tensors and "-mp" not in file.name:
                raise ValueError(f"tensor {name} is in {checkpoint.tensors[name][0].path} and in {file}: remove one")
            checkpoint.tensors.setdefault(name, []).append(stored)
    for name, file in listed.items():
        if file not in checkpoint.missing and name not in checkpoint.tensors:
            raise ValueError(f"tensor {name} is not in {home / file}, the file that {index} names for it")
    return checkpoint


def _read_json(path: Path, key: str | None = None) -> dict[str, Any]:
    """Return the object in a JSON file, or the object under a key of it."""
    try:
        fields = json.loads(path.read_text())
        fields = fields if key is None else fields[key]
        if not isinstance(fields, dict):
            raise TypeError(f"expected an object, not {type(fields).__name__}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error!r}") from error
    return fields


def _check_numbers(files: list[Path]) -> None:
    """Raise ValueError if a file is missing, by names such as model-00001-of-00003 and model0-mp2."""
    numbers_of: dict[tuple[str, str, str], set[int]] = {}
    for match in filter(None, (re.fullmatch(r"(.*?)(\d+)(-of-|-mp)(\d+)\.safetensors", file.name) for file in files)):
        stem, number, word, count = match.groups()
        numbers_of.setdefault((stem, word, count), set()).add(int(number))
    for (stem, word, count), numbers in numbers_of.items():
        first = 1 if word == "-of-" else 0
        for number in range(first, int(count) + first):
            if number not in numbers:
                name = f"{stem}{number:0{len(count) if first else 1}}{word}{count}.safetensors"
                raise ValueError(f"the shard {files[0].parent / name} is missing: there are {count} of them")


def _write_at(file: io.FileIO, data: memoryview, at: int) -> int:
    """Write at an offset and return the number of bytes written, which may be fewer than given."""
    if hasattr(os, "pwrite"):
        return os.pwrite(file.fileno(), data, at)
    file.seek(at)  # Windows
    return file.write(data)


class Streamed:
    """Writer of a new file, whose tensors are filled in order, a block of rows at a time, with a digest of each.

    Args:
        head: the first bytes of the file. size: bytes after the head. stored: the position of each tensor.
    """

    def __init__(self, path: Path, head: bytes, size: int, stored: dict[str, Stored]):
        self.path, self.stored = path, stored
        self._file = open(path, "w+b", buffering=0)
        self._head = head
        view = memoryview(head)
        try:
            while len(view):  # a write may take only a part: at a limit, or if a signal interrupts it
                view = view[self._file.write(view) :]
            self._file.truncate(len(head) + size)
        except OSError as error:
            raise OSError(error.errno, f"could not write the header of {path}: {error.strerror}") from error
        self.digests = {name: xxhash.xxh3_128() for name in stored}
        self._written = dict.fromkeys(stored, 0)

    def append(self, name: str, rows: Tensor) -> None:
        """Write the next rows of a tensor, or all of a small one."""
        if NAMES[rows.dtype] != self.stored[name].dtype and rows.dtype != torch.uint8:
            raise TypeError(f"{self.path}: tensor {name} is {self.stored[name].dtype}, not {rows.dtype}")
        data = rows.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        self.digests[name].update(data.data)
        done, start = 0, self.stored[name].offset + self._written[name]
        try:
            while done < len(data):
                done += _write_at(self._file, data[done:].data, start + done)
        except OSError as error:
            raise OSError(error.errno, f"could not write tensor {name} to {self.path}: {error.strerror}") from error
        self._written[name] += len(data)

    def close(self) -> None:
        """Sync and close the file. Raise ValueError if a tensor is incomplete, OSError if the header differs."""
        for name, stored in self.stored.items():
            if self._written[name] != stored.nbytes:
                raise ValueError(f"{self.path}: {self._written[name]:,} of {stored.nbytes:,} bytes of {name} written")
        os.fsync(self._file.fileno())
        self._file.seek(0)
        head = b""
        while len(head) < len(self._head) and (piece := self._file.read(len(self._head) - len(head))):
            head += piece
        self._file.close()
        if head != self._head:
            raise OSError(f"{self.path}: the header does not read back as it was written")


class Writer(Streamed):
    """Writer of a safetensors file, whose tensors are filled in order, a block of rows at a time, with digests.

    Args:
        specs: name -> (dtype name, shape). `close` checks that all of it was written.
    """

    def __init__(self, path: Path, specs: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]):
        at = 0
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
        sizes: dict[str, int] = {}
        for name, (dtype, shape) in specs.items():
            sizes[name] = DTYPES[dtype].itemsize * int(torch.Size(shape).numel())
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + sizes[name]]}
            at += sizes[name]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        starts = {name: 8 + len(text) + header[name]["data_offsets"][0] for name in specs}
        head = len(text).to_bytes(8, "little") + text
        super().__init__(path, head, at, {n: Stored(n, path, *specs[n], starts[n], sizes[n]) for n in specs})
