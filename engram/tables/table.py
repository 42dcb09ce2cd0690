"""HostTable: rows that live in host memory or in a mapped file. Row ids in, rows out."""

from __future__ import annotations

import ctypes
import math
import os

import numpy as np
import torch
from torch import Tensor

from engram.config import as_integer
from engram.tables import kernels, reference
from engram.tables.arguments import as_ids, as_output
from engram.tables.stored import StoredRows

_CODES = {torch.float32: 0, torch.bfloat16: 1}
_SMALLEST = 1 << 17  # bytes of rows below which one core is faster than two


class _Table(ctypes.Structure):
    """Mirror of `Table` in rows.h."""

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


class HostTable(StoredRows):
    """A table of `rows` x `dim` values in host memory (path=None) or in a mapped file of raw rows.

    Creating or reading a table touches only pages with written rows: a fresh table is address space only.

    Args:
        rows: number of rows, any 64-bit size.
        dim: values per row, 1 .. 16384.
        dtype: torch.float32 or torch.bfloat16.
        path: file of rows * dim values in row-major order, native little-endian. Created (disk space reserved at once,
            so a full disk is an error here and not a crash later) or, if it exists with exactly that size, opened.
            One table at a time may hold a file for writing, any number of tables and processes for reading.
        mode: "r+", or "r" to map an existing file read-only: its pages are shared by all processes that map it, and
            every write is refused. `tensor` itself cannot be protected: storing into it would end the process.
        init: "zero", or "normal": never-written rows read as std * N(0, 1), a function of (seed, row, column) alone.
        std, seed: of the normal init.

    If the file of a live table is truncated, the next call raises OSError. Two failures raise nothing, because the
    operating system reports them by a signal in the middle of a copy: a file truncated while a gather runs, and a disk
    that fails under a page that is read for the first time. Only `engram verify` detects bytes that were changed in
    place. A file that is renamed or deleted stays complete for tables that have it open.

    On the meta device (`with torch.device("meta")`), nothing is allocated and only sizes are known, until
    materialize().

    Raises:
        ValueError: an impossible size, dtype or init; a file of another size.
        BlockingIOError: another table has locked the file. FileNotFoundError: mode "r" and no such file.
        OSError: no disk space or address space for the table.

    Example:
        >>> import torch
        >>> from engram import HostTable
        >>> table = HostTable(rows=1000, dim=4)  # path="layer-0.rows" keeps the rows in that file
        >>> table.write(torch.tensor([7, 9]), torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]]))
        >>> table.gather(torch.tensor([[9, 0], [7, 7]]))[0]
        tensor([[5., 6., 7., 8.],
                [0., 0., 0., 0.]])
        >>> table.gather(torch.tensor([1000]))
        Traceback (most recent call last):
        IndexError: row 1000 at position (0,) is outside this table of 1,000 rows: ...
    """

    def __init__(
        self,
        rows: int,
        dim: int,
        dtype: torch.dtype = torch.float32,
        path: str | os.PathLike[str] | None = None,
        *,
        mode: str = "r+",
        init: str = "zero",
        std: float = 1.0,
        seed: int = 0,
    ):
        rows, dim = as_integer("rows", rows), as_integer("dim", dim)
        if rows < 1 or not 1 <= dim <= 16384:
            raise ValueError(f"a table needs rows >= 1 and 1 <= dim <= 16384, not rows={rows}, dim={dim}")
        if dtype not in _CODES:
            raise ValueError(f"a HostTable holds torch.float32 or torch.bfloat16 rows, not {dtype}")
        if init not in ("zero", "normal"):
            raise ValueError(f'init must be "zero" or "normal", not {init!r}')
        super().__init__(rows, dim, dtype, dim, path, mode)
        self.init, self.std, self.seed = init, float(std), as_integer("seed", seed)
        if not (math.isfinite(self.std) and self.std >= 0):
            raise ValueError(f"std is a standard deviation, 0 or more, not {std}")
        self._begin()

    def _allocate(self) -> None:
        self._tensor = self._map(f"{self.rows:,} rows x {self.dim} x {self.dtype}")
        quantiles = reference.normal_quantiles()
        self._struct = _Table(
            self._tensor.data_ptr(),
            self.rows,
            self.dim,
            _CODES[self.dtype],
            self.init == "normal",
            self.seed & (2**64 - 1),
            self.std,
            quantiles.data_ptr(),
        )

    def gather(self, row_ids: Tensor | np.ndarray, out: Tensor | None = None) -> Tensor:
        """Return rows by id.

        Args:
            row_ids: int64 [...], torch or NumPy.
            out: contiguous CPU tensor [..., dim] to fill, in the table's dtype or float32. Reusing one saves the page
                faults of a fresh buffer, which cost more than the copy.

        Returns:
            [..., dim], `out` if it was passed, else a new tensor of the table's dtype.

        Raises:
            IndexError, TypeError: see `check`; `out` may then be partly filled. ValueError: `out` of another shape,
            dtype or layout; a closed table.
        """
        stored = self.tensor
        ids = as_ids(row_ids)
        shape = (*ids.shape, self.dim)
        out = as_output(out, shape, self.dtype)
        if ids.numel() == 0:
            return out
        if kernels.native is not None:
            table, as_float = self.struct, out.dtype == torch.float32
            call = kernels.Call("gather", ctypes.addressof(table), ids.data_ptr(), out.data_ptr(), as_float)
            smallest = _SMALLEST // (self.dim * out.element_size()) + 1
            bad = kernels.spread(ids.numel(), smallest, call, table, stored, ids, out)
            if bad >= 0:
                raise self.outside(ids, bad)
        else:
            self.check(ids)
            rows = reference.read(stored, ids.flatten(), self.init == "normal", self.seed, self.std)
            out.copy_(rows.view(shape))
        return out

    def write(self, row_ids: Tensor | np.ndarray, rows: Tensor) -> None:
        """Store rows [..., dim] under distinct row ids [...]; float32 is rounded to nearest for a bfloat16 table.

        Raises:
            ValueError: shapes that do not match, or a row id that occurs twice (either row could win).
            PermissionError: a table opened read-only.
        """
        stored, ids = self.tensor, self._begin_write(row_ids, rows)
        values = rows.detach().to("cpu", torch.float32).reshape(-1, self.dim).contiguous()
        if kernels.native is not None:
            kernels.native.engram_scatter(ctypes.byref(self.struct), ids.data_ptr(), 0, ids.numel(), values.data_ptr())
        else:
            reference.write(stored, ids, values, self.init == "normal")

    def __repr__(self) -> str:
        return f"HostTable({self.rows:,} x {self.dim}, {self.dtype}, {self._where}, init={self.init})"
