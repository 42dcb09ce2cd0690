"""open_tables: the rows of a released checkpoint, mapped where they lie and decoded while they are gathered."""

from __future__ import annotations

import mmap
import os
import warnings
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram.addressing import TokenMap
from engram.config import EngramConfig
from engram.integrations.formats.gguf_memory import QuantisedRows
from engram.integrations.formats.readers import open_source
from engram.integrations.formats.safetensors_io import DTYPES, Stored
from engram.integrations.formats.scales import Scale
from engram.integrations.formats.stored_rows import Rows
from engram.storage import readahead
from engram.storage.mapping import lock, unlock
from engram.storage.untrusted import check_regular
from engram.tables import Table
from engram.tables.arguments import as_ids, as_output
from engram.tables.codecs import get_codec


def open_tables(
    checkpoint: str | os.PathLike[str], config: EngramConfig | None = None, token_map: TokenMap | None = None
) -> dict[int, Table]:
    """Map the tables of a released checkpoint or GGUF file where they lie: no row is copied or read.

    Such a table is read-only: it gathers float32 rows and prefetches. `EngramMemory(config, token_map,
    hidden_size, streams, tables=...)` takes these tables, and such a memory can be attached, explained and timed, not
    trained or saved: `convert` writes the checkpoint as a saved memory.

    Args:
        checkpoint: safetensors of a dialect, a file or a folder with config.json; or a GGUF file.
        config: needed if the checkpoint has no config.json. token_map: that of the model's tokenizer, to check the
            addresses.

    Returns:
        {layer: table}.

    Raises:
        FileNotFoundError: the path does not exist. ValueError: a saved memory; a shard is missing, or a tensor has
        another shape, dtype or block size than the layout needs, by name. BlockingIOError: a table trains the file.

    Example:
        >>> import engram, tempfile, torch
        >>> config = engram.EngramConfig(layers=(0,), orders=(2,), heads=2, head_dim=4, rows_per_head=50)
        >>> memory = engram.EngramMemory(config, engram.TokenMap.identity(20), hidden_size=8)
        >>> folder = tempfile.mkdtemp()
        >>> report = engram.convert(memory.save(folder + "/memory"), folder + "/memory.gguf", "gguf")
        >>> tables = engram.open_tables(folder + "/memory.gguf")
        >>> tables[0].gather(torch.tensor([[3, 7]])).shape
        torch.Size([1, 2, 4])
    """
    path = Path(checkpoint)
    if (path / "manifest.json").is_file():
        raise ValueError(f'{path} is a saved memory: open it with EngramMemory.load({str(path)!r}, mode="shared")')
    opened: dict[int, Table] = {}
    try:
        for layer, rows in open_source(path, config, token_map, fusions=False).rows.items():
            opened[layer] = OpenedTable(rows)
    except BaseException:
        for table in opened.values():
            table.close()
        raise
    return opened


class _File:
    """A file mapped for reading, under a shared lock."""

    def __init__(self, path: Path):
        check_regular(path, "a file of rows")
        self.path = path
        self.number = os.open(path, os.O_RDONLY)
        try:
            lock(self.number, path, exclusive=False)
            self.size = os.fstat(self.number).st_size
            memory = mmap.mmap(self.number, self.size, access=mmap.ACCESS_READ)
        except BaseException:
            os.close(self.number)
            raise
        if hasattr(mmap, "MADV_RANDOM"):  # otherwise each cold row reads megabytes around it
            memory.madvise(mmap.MADV_RANDOM)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            self.bytes = torch.from_numpy(np.frombuffer(memory, dtype=np.uint8))
        self._process = os.getpid()
        self._let_go = weakref.finalize(self, os.close, self.number)
        self._let_go.atexit = False

    def check(self) -> None:
        """Raise OSError if the file is too short: reading a mapped page beyond its end is a SIGBUS."""
        if (size := os.fstat(self.number).st_size) < self.size:
            raise OSError(f"{self.path} was truncated from {self.size:,} to {size:,} bytes: close its tables")

    def close(self) -> None:
        if os.getpid() == self._process:  # a forked process shares the lock
            unlock(self.number)
        self._let_go()


@dataclass(frozen=True)
class _Bytes:
    """The rows of a tensor in a mapped file, uint8 [rows, bytes per row]."""

    file: _File
    stored: Stored
    data: Tensor

    def prefetch(self, ids: np.ndarray) -> int:
        number, start, size = self.file.number, self.file.bytes.data_ptr(), self.stored.row_bytes
        at, end = self.stored.offset, self.stored.offset + self.stored.nbytes
        if readahead.in_memory(number, start, ids, size, at):
            return 0
        return readahead.will_need(number, start, ids, size, end, at)


@dataclass(frozen=True)
class _Part:
    """Rows first, first + 1, ... of a table, with their scales: a tensor of them, or one value, or none."""

    first: int
    values: _Bytes
    scale: Scale | None
    scales: _Bytes | None
    factor: float


class OpenedTable:
    """A read-only table of rows in a released checkpoint; see `open_tables`. It has all that `Table` has.

    Attributes:
        rows, dim, nbytes: as `Table`; nbytes with the scales. name: of the tensor. form: its dtype and scales.
    """

    writable = on_meta = False
    init, std, seed, dtype = "zero", 1.0, 0, torch.uint8

    def __init__(self, rows: Rows):
        self._rows, self.rows, self.dim, self.nbytes = rows, rows.rows, rows.dim, rows.nbytes
        self.name, self.form = rows.name, rows.description
        self.path: Path | None = rows.parts[0][1].path
        self._files: dict[Path, _File] = {}
        self._parts: list[_Part] = []
        try:
            for first, values, scale in rows.parts:
                per_row = scale is not None and scale.block > 0
                scales = self._open(scale.stored) if scale is not None and per_row else None
                factor = 1.0 if scale is None or per_row else float(scale.values(0, 1, rows.dim))
                self._parts.append(_Part(first, self._open(values), scale, scales, factor))
        except BaseException:
            self.close()
            raise

    def _open(self, stored: Stored) -> _Bytes:
        file = self._files.get(stored.path) or self._files.setdefault(stored.path, _File(stored.path))
        if stored.offset + stored.nbytes > file.size:
            raise ValueError(f"{stored.path} was truncated: tensor {stored.name} ends beyond it")
        data = file.bytes[stored.offset : stored.offset + stored.nbytes]
        return _Bytes(file, stored, data.view(stored.shape[0], stored.row_bytes))

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Rows, and bytes per row without separate scales."""
        return self.rows, self._rows.parts[0][1].row_bytes

    @property
    def tensor(self) -> Tensor:
        """Raise ValueError: the rows may lie in several files, and are decoded by gather."""
        raise ValueError(
            f"the rows of {self.name} lie in {self.path}, in the checkpoint's own form: gather them, or write the "
            f"checkpoint as a saved memory (engram convert) to save, copy or train them"
        )

    def check(self, row_ids: Tensor | np.ndarray) -> Tensor:
        """Return row ids as a contiguous int64 CPU tensor, after a check that each is a row of the table.

        Raises:
            TypeError: not int64. IndexError: a row outside the table. OSError: a file was truncated. ValueError: a
            closed table.
        """
        if not self._files:
            raise ValueError(f"this table of {self.rows:,} x {self.dim} is closed and holds no rows")
        for file in self._files.values():
            file.check()
        ids = as_ids(row_ids)
        outside = ids[(ids < 0) | (ids >= self.rows)]
        if len(outside):
            raise IndexError(
                f"row {int(outside[0])} is outside {self.name} of {self.rows:,} rows: the hash layout does not belong "
                f"to this table"
            )
        return ids

    def gather(self, row_ids: Tensor | np.ndarray, out: Tensor | None = None) -> Tensor:
        """Return float32 rows [..., dim] of int64 row ids [...], in `out` if it is passed.

        Raises:
            IndexError, TypeError, ValueError, OSError: see `check`; `out` of another shape, dtype or layout.
        """
        ids = self.check(row_ids)
        out = as_output(out, (*ids.shape, self.dim), torch.float32)
        flat, rows = ids.flatten(), out.view(-1, self.dim)
        for part, positions, local in self._split(flat):
            rows.index_copy_(0, positions, self._decode(part, local))
        return out

    def _split(self, ids: Tensor) -> list[tuple[_Part, Tensor, Tensor]]:
        """Return (part, positions in `ids`, rows of the part) for each part that has some of the rows."""
        found = []
        for part in self._parts:
            inside = (ids >= part.first) & (ids < part.first + part.values.stored.shape[0])
            positions = inside.nonzero().flatten()
            if len(positions):
                found.append((part, positions, ids[positions] - part.first))
        return found

    def _decode(self, part: _Part, local: Tensor) -> Tensor:
        """Return the rows [n, dim] of a part in float32."""
        packed, scale, dtype = part.values.data.index_select(0, local), part.scale, part.values.stored.dtype
        if isinstance(self._rows, QuantisedRows):
            return self._rows.unpack(part.values.stored, packed)
        if self._rows.codec == "fp8" and scale is None:
            return get_codec("fp8", self.dim).decode(packed, self.dim)
        values = packed.view(DTYPES[dtype]).float()
        if scale is None or part.scales is None:
            return values if scale is None else values.mul_(part.factor)
        factors = part.scales.data.index_select(0, local + scale.first)
        return values.mul_(scale.widen(factors.view(DTYPES[scale.stored.dtype]), self.dim))

    def prefetch(self, row_ids: Tensor | np.ndarray) -> int:
        """Start reading the file pages of these rows and their scales. Return the bytes requested."""
        asked = 0
        for part, _, local in self._split(self.check(row_ids).flatten()):
            asked += part.values.prefetch(local.numpy())
            if part.scales is not None and part.scale is not None:
                asked += part.scales.prefetch((local + part.scale.first).numpy())
        return asked

    def check_writable(self) -> None:
        """Raise PermissionError: the checkpoint of another program is never changed."""
        raise PermissionError(
            f"{self.name} in {self.path} is opened read-only: write the checkpoint as a saved memory (engram convert) "
            f"to train its rows"
        )

    def write(self, row_ids: Tensor | np.ndarray, rows: Tensor) -> None:
        """Raise PermissionError; see `check_writable`."""
        self.check_writable()

    def materialize(self) -> None:
        """Do nothing: the rows are in files."""

    def info(self) -> dict[str, Any]:
        """Return rows, dim, form, bytes, mode, location and tensor name, for logs."""
        facts = {"rows": self.rows, "dim": self.dim, "dtype": self.form, "bytes": self.nbytes, "mode": "r"}
        return {**facts, "where": str(self.path), "tensor": self.name, "huge_pages": None, "kernels": "torch"}

    def flush(self) -> None:
        """Do nothing: no row changes."""

    def drop(self) -> None:
        """Release the files' pages from memory; rows are read from the disk again."""
        for file in self._files.values():
            readahead.drop(file.number, file.bytes.data_ptr(), file.size)

    def close(self) -> None:
        """Release the rows; further use raises ValueError. Closing twice does nothing more."""
        files, self._files, self._parts = self._files, {}, []
        for file in files.values():
            file.close()

    def __deepcopy__(self, memo: Any) -> OpenedTable:
        """Return a table that maps the same files again."""
        twin = memo[id(self)] = OpenedTable(self._rows)
        return twin

    def __reduce__(self) -> Any:
        raise TypeError("an OpenedTable is not pickled: it may be larger than memory. Open the checkpoint again")

    def __repr__(self) -> str:
        return f"OpenedTable({self.rows:,} x {self.dim}, {self.form}, {self.path})"
