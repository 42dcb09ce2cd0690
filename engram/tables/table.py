"""HostTable: rows that live in host memory or in a mapped file. Row ids in, rows out."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram.tables import kernels, reference
from engram.tables.mapping import map_file, map_memory

_CODES = {torch.float32: 0, torch.bfloat16: 1}
_SMALLEST = 2048  # rows below which one core is faster than two


class _Table(ctypes.Structure):
    """Mirror of `Table` in kernels.c."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("normal", ctypes.c_int32),
        ("seed", ctypes.c_uint64),
        ("std", ctypes.c_float),
        ("quantiles", ctypes.c_void_p),
    ]


class HostTable:
    """A table of `rows` x `dim` values in host memory (path=None) or in a mapped file of raw rows.

    Neither creating nor reading a table touches pages that hold no written row: a fresh table is address space only.

    Args:
        rows: number of rows, any 64-bit size.
        dim: values per row, 1 .. 16384.
        dtype: torch.float32 or torch.bfloat16.
        path: file of rows * dim values in row-major order, native little-endian. Created (disk space reserved at once,
            so a full disk is an error here and not a crash later) or, if it exists with exactly that size, opened.
            One table at a time may hold a file.
        init: "zero", or "normal": never-written rows read as std * N(0, 1), a function of (seed, row, column) alone.
        std, seed: of the normal init.

    On the meta device (`with torch.device("meta")`) nothing is allocated and only sizes can be asked.

    Raises:
        ValueError: a size, dtype or init that cannot be; a file of another size.
        BlockingIOError: the file is held by another table.
        OSError: no disk space or address space for the table.
    """

    def __init__(
        self,
        rows: int,
        dim: int,
        dtype: torch.dtype = torch.float32,
        path: str | os.PathLike[str] | None = None,
        *,
        init: str = "zero",
        std: float = 1.0,
        seed: int = 0,
    ):
        if rows < 1 or not 1 <= dim <= 16384:
            raise ValueError(f"a table needs rows >= 1 and 1 <= dim <= 16384, not rows={rows}, dim={dim}")
        if dtype not in _CODES:
            raise ValueError(f"a HostTable holds torch.float32 or torch.bfloat16 rows, not {dtype}")
        if init not in ("zero", "normal"):
            raise ValueError(f'init is "zero" or "normal", not {init!r}')
        self.rows, self.dim, self.dtype = int(rows), int(dim), dtype
        self.nbytes = self.rows * self.dim * dtype.itemsize
        self.init, self.std, self.seed = init, float(std), int(seed)
        self.path = None if path is None else Path(path)
        self.huge_pages = False
        self._file: int | None = None
        self._tensor: Tensor | None = None
        self._struct: _Table | None = None
        self._meta = torch.get_default_device().type == "meta"
        if self._meta:
            return
        what = f"{self.rows:,} rows x {self.dim} x {dtype}"
        if self.path is None:
            memory, self.huge_pages = map_memory(self.nbytes, what)
        else:
            memory, self._file = map_file(self.path, self.nbytes, what)
        values = np.frombuffer(memory, dtype=np.uint8)
        self._tensor = torch.from_numpy(values).view(dtype).view(self.rows, self.dim)
        quantiles = reference.normal_quantiles()
        self._struct = _Table(
            self._tensor.data_ptr(),
            self.rows,
            self.dim,
            _CODES[dtype],
            init == "normal",
            self.seed & (2**64 - 1),
            self.std,
            quantiles.data_ptr(),
        )

    @property
    def tensor(self) -> Tensor:
        """The stored values [rows, dim] themselves, no copy. Never-written rows of a normal table are zeros here."""
        if self._tensor is None:
            state = "was made on the meta device" if self._meta else "is closed"
            raise ValueError(f"this table of {self.rows:,} x {self.dim} {state} and holds no rows")
        return self._tensor

    @property
    def struct(self) -> Any:
        """ctypes reference to the table for the kernels."""
        return ctypes.byref(self._struct) if self._struct is not None else self.tensor

    def check(self, row_ids: Tensor | np.ndarray) -> Tensor:
        """Row ids as a contiguous int64 CPU tensor, every one proven to lie in the table.

        Raises:
            TypeError: not int64 (32-bit row arithmetic overflows on real tables).
            IndexError: a row outside the table. Never clamped: it means that layout and table disagree.
        """
        ids = torch.from_numpy(row_ids) if isinstance(row_ids, np.ndarray) else row_ids
        if ids.dtype != torch.int64:
            raise TypeError(f"row ids must be int64, not {ids.dtype}")
        ids = ids.contiguous() if ids.device.type == "cpu" else ids.cpu().contiguous()
        if ids.numel() == 0:
            return ids
        if kernels.native is not None:
            check = kernels.native.engram_check
            check.restype = ctypes.c_int64
            bad = check(kernels.pointer(ids), ctypes.c_int64(ids.numel()), ctypes.c_int64(self.rows))
        else:
            outside = ((ids < 0) | (ids >= self.rows)).flatten()
            bad = int(outside.nonzero()[0]) if outside.any() else -1
        if bad >= 0:
            place = tuple(int(i) for i in np.unravel_index(bad, tuple(ids.shape)))
            raise IndexError(
                f"row {int(ids.flatten()[bad])} at position {place} is outside this table of {self.rows:,} rows: "
                f"the hash layout does not belong to this table"
            )
        return ids

    def gather(self, row_ids: Tensor | np.ndarray, out: Tensor | None = None) -> Tensor:
        """Rows by id.

        Args:
            row_ids: int64 [...], torch or NumPy.
            out: contiguous CPU tensor [..., dim] to fill, in the table's dtype or float32. Reusing one saves the page
                faults of a fresh buffer, which cost more than the copy.

        Returns:
            [..., dim], `out` if it was given, else a new tensor of the table's dtype.

        Raises:
            IndexError, TypeError: see `check`. ValueError: `out` of another shape, dtype or layout; a closed table.
        """
        stored = self.tensor
        ids = self.check(row_ids)
        shape = (*ids.shape, self.dim)
        if out is None:
            out = torch.empty(shape, dtype=self.dtype)
        elif tuple(out.shape) != shape or not out.is_contiguous() or out.device.type != "cpu":
            raise ValueError(f"out must be a contiguous CPU tensor of shape {shape}, not {tuple(out.shape)}")
        elif out.dtype not in (self.dtype, torch.float32):
            raise ValueError(f"out must be {self.dtype} or torch.float32, not {out.dtype}")
        if ids.numel() == 0:
            return out
        if kernels.native is not None:
            gather, table = kernels.native.engram_gather, self.struct
            source, target = kernels.pointer(ids), kernels.pointer(out)
            as_float = ctypes.c_int32(out.dtype == torch.float32)
            kernels.spread(
                ids.numel(),
                _SMALLEST,
                lambda lo, hi: gather(table, source, ctypes.c_int64(lo), ctypes.c_int64(hi), target, as_float),
            )
        else:
            rows = reference.read(stored, ids.flatten(), self.init == "normal", self.seed, self.std)
            out.copy_(rows.view(shape))
        return out

    def write(self, row_ids: Tensor | np.ndarray, rows: Tensor) -> None:
        """Stores rows [..., dim] under distinct row ids [...]; float32 is rounded to nearest for a bfloat16 table.

        Raises:
            ValueError: shapes that do not match, or a row id given twice (which row should win?).
        """
        stored = self.tensor
        ids = self.check(row_ids).flatten()
        values = rows.detach().to("cpu", torch.float32).reshape(-1, self.dim).contiguous()
        if tuple(rows.shape[:-1]) != tuple(row_ids.shape) or rows.shape[-1] != self.dim:
            raise ValueError(f"row ids {tuple(row_ids.shape)} need rows {(*row_ids.shape, self.dim)}, not {rows.shape}")
        if torch.unique(ids).numel() != ids.numel():
            raise ValueError("a row id occurs twice in one write")
        if kernels.native is not None:
            kernels.native.engram_scatter(
                self.struct,
                kernels.pointer(ids),
                ctypes.c_int64(0),
                ctypes.c_int64(ids.numel()),
                kernels.pointer(values),
            )
        else:
            reference.write(stored, ids, values, self.init == "normal")

    def info(self) -> dict[str, Any]:
        """Facts for logs: rows, dim, dtype, bytes, where it lives, whether huge pages were granted, which path runs."""
        return {
            "rows": self.rows,
            "dim": self.dim,
            "dtype": str(self.dtype).removeprefix("torch."),
            "bytes": self.nbytes,
            "where": str(self.path) if self.path else ("meta" if self._meta else "memory"),
            "huge_pages": self.huge_pages,
            "kernels": "native" if kernels.native is not None else "torch",
        }

    def flush(self) -> None:
        """Forces a mapped file's rows to disk; nothing to do in memory."""
        if self._file is not None:
            os.fsync(self._file)

    def close(self) -> None:
        """Lets the rows go (flushed first, if mapped). Further use raises ValueError. Twice is fine."""
        self.flush()
        self._tensor = self._struct = None
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __deepcopy__(self, memo: Any) -> HostTable:
        raise TypeError(
            "a HostTable is not copied in passing: it may be larger than memory. Build a second one instead"
        )

    def __reduce__(self) -> Any:
        raise TypeError("a HostTable is never pickled: save its rows with state_dict() or a checkpoint")

    def __repr__(self) -> str:
        return f"HostTable({self.rows:,} x {self.dim}, {self.dtype}, {self.info()['where']}, init={self.init})"
