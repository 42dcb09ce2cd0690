"""HostTable: rows that live in host memory or in a mapped file. Row ids in, rows out."""

from __future__ import annotations

import copy
import ctypes
import math
import mmap
import os
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram.config import whole
from engram.storage import limits, readahead
from engram.storage.mapping import lock, map_file, map_memory, unlock
from engram.storage.weak import WeakList
from engram.tables import kernels, reference

_CODES = {torch.float32: 0, torch.bfloat16: 1}
_SMALLEST = 1 << 17  # bytes of rows below which one core is faster than two


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


def as_ids(row_ids: Tensor | np.ndarray) -> Tensor:
    """Return row ids as a contiguous int64 CPU tensor, not checked against any table.

    Raises:
        TypeError: neither a tensor nor a NumPy array, or not int64.
    """
    if not isinstance(row_ids, (Tensor, np.ndarray)):
        raise TypeError(f"row ids must be a tensor or a NumPy array of int64, not {type(row_ids).__name__}")
    ids = torch.from_numpy(row_ids) if isinstance(row_ids, np.ndarray) else row_ids
    if ids.dtype != torch.int64:
        raise TypeError(f"row ids must be int64, not {ids.dtype}")
    return ids.contiguous() if ids.device.type == "cpu" else ids.cpu().contiguous()


def as_tensor(memory: mmap.mmap, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
    """A mapping as a tensor [rows, columns], no copy; it keeps the mapping alive."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(np.frombuffer(memory, dtype=np.uint8)).view(dtype).view(rows, columns)


def _on_huge_pages(address: int) -> bool | None:
    """Return True if most resident bytes around `address` lie on huge pages; None if none are resident."""
    resident = huge = 0
    inside = False
    try:
        with open("/proc/self/smaps") as lines:
            for line in lines:
                key, _, rest = line.partition(" ")
                if not key.endswith(":"):  # "7f00-7f80 rw-p ...": the next mapping
                    if inside:
                        break
                    low, _, high = key.partition("-")
                    inside = int(low, 16) <= address < int(high, 16)
                elif inside and key == "Rss:":
                    resident = int(rest.split()[0])
                elif inside and key in ("AnonHugePages:", "ShmemPmdMapped:", "FilePmdMapped:"):
                    huge += int(rest.split()[0])
    except (OSError, ValueError):
        return None
    return 2 * huge >= resident if resident else None


def as_output(out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A buffer for rows: the caller's, proven to fit (in `dtype` or float32), or a new one of `dtype`."""
    if out is None:
        return torch.empty(shape, dtype=dtype, device="cpu")
    if tuple(out.shape) != shape or not out.is_contiguous() or out.device.type != "cpu":
        raise ValueError(f"out must be a contiguous CPU tensor of shape {shape}, not {tuple(out.shape)}")
    if out.dtype not in (dtype, torch.float32):
        allowed = "torch.float32" if dtype == torch.float32 else f"{dtype} or torch.float32"
        raise ValueError(f"out must be {allowed}, not {out.dtype}")
    return out


class HostTable:
    """A table of `rows` x `dim` values in host memory (path=None) or in a mapped file of raw rows.

    Neither creating nor reading a table touches pages that hold no written row: a fresh table is address space only.

    Args:
        rows: number of rows, any 64-bit size.
        dim: values per row, 1 .. 16384.
        dtype: torch.float32 or torch.bfloat16.
        path: file of rows * dim values in row-major order, native little-endian. Created (disk space reserved at once,
            so a full disk is an error here and not a crash later) or, if it exists with exactly that size, opened.
            One table at a time may hold a file for writing, any number of tables and processes for reading.
        mode: "r+", or "r" to map an existing file read-only: its pages are shared by all who map it, and every write is
            refused. `tensor` itself cannot be protected: storing into it through torch would end the process.
        init: "zero", or "normal": never-written rows read as std * N(0, 1), a function of (seed, row, column) alone.
        std, seed: of the normal init.

    A file that somebody truncates under a live table is noticed by the next call (OSError). Not noticed, because the
    operating system reports them by a signal in the middle of a copy and not by an error: a file truncated while a
    gather is running, and a disk that fails under a page that is read for the first time. Bytes changed in place
    are found by `engram verify` alone. A file that is renamed or deleted stays whole for those who have it open.

    On the meta device (`with torch.device("meta")`) nothing is allocated and only sizes can be asked, until
    materialize().

    Raises:
        ValueError: a size, dtype or init that cannot be; a file of another size.
        BlockingIOError: the file is held by another table. FileNotFoundError: mode "r" and no such file.
        OSError: no disk space or address space for the table.
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
        rows, dim = whole("rows", rows), whole("dim", dim)
        if rows < 1 or not 1 <= dim <= 16384:
            raise ValueError(f"a table needs rows >= 1 and 1 <= dim <= 16384, not rows={rows}, dim={dim}")
        if dtype not in _CODES:
            raise ValueError(f"a HostTable holds torch.float32 or torch.bfloat16 rows, not {dtype}")
        if init not in ("zero", "normal"):
            raise ValueError(f'init is "zero" or "normal", not {init!r}')
        self.rows, self.dim, self.dtype = rows, dim, dtype
        if mode not in ("r+", "r") or (mode == "r" and path is None):
            raise ValueError(f'mode is "r+", or "r" with the path of an existing file, not {mode!r} with {path!r}')
        self.nbytes = self.rows * self.dim * dtype.itemsize
        self.init, self.std, self.seed = init, float(std), whole("seed", seed)
        if not (math.isfinite(self.std) and self.std >= 0):
            raise ValueError(f"std is a standard deviation, 0 or more, not {std}")
        self.path = None if path is None else Path(path)
        self.writable = mode == "r+"
        self.watchers: WeakList[Any] = WeakList()  # caches of rows, told of every write
        self.optimizers: WeakList[Any] = WeakList()  # row optimisers, closed with the table
        self._file: int | None = None
        self._tensor: Tensor | None = None
        self._struct: _Table | None = None
        self.on_meta = torch.get_default_device().type == "meta"
        if not self.on_meta:
            self._allocate()

    def _allocate(self) -> None:
        what = f"{self.rows:,} rows x {self.dim} x {self.dtype}"
        self._tensor = as_tensor(self._map(what), self.dtype, self.rows, self.dim)
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

    def materialize(self) -> None:
        """Gives a table that was made on the meta device its memory, or its file. Its rows read as the initial ones.

        Raises:
            ValueError, BlockingIOError, OSError: as the constructor.
        """
        if self.on_meta:
            with torch.device("cpu"):
                self._allocate()
            self.on_meta = False

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Shape of `tensor`."""
        return self.rows, self.dim

    def _map(self, what: str) -> mmap.mmap:
        """The table's bytes: memory, or its file. Without close(), it is released with the table."""
        if self.path is None:
            return map_memory(self.nbytes, what)
        memory, file = map_file(self.path, self.nbytes, what, self.writable)
        self._hold(file)
        return memory

    def _hold(self, file: int) -> None:
        """Keeps an open file until the table is closed or gone."""
        self._file, self._process = file, os.getpid()
        self._let_go = weakref.finalize(self, os.close, file)
        self._let_go.atexit = False

    @property
    def tensor(self) -> Tensor:
        """The stored values [rows, dim] themselves, no copy. Never-written rows of a normal table are zeros here.

        Raises:
            ValueError: a closed or meta table. OSError: the table's file was truncated.
        """
        if self._tensor is None:
            state = "was made on the meta device" if self.on_meta else "is closed"
            raise ValueError(f"this table of {self.rows:,} x {self.dim} {state} and holds no rows")
        if self._file is not None:
            self._check_file()
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
            OSError: the table's file was truncated.
        """
        if self._file is not None:
            self._check_file()
        ids = as_ids(row_ids)
        if ids.numel() == 0:
            return ids
        if kernels.native is not None:
            bad = kernels.native.engram_check(ids.data_ptr(), ids.numel(), self.rows)
        else:
            outside = ((ids < 0) | (ids >= self.rows)).flatten()
            bad = int(outside.nonzero()[0]) if outside.any() else -1
        if bad >= 0:
            raise self.outside(ids, bad)
        return ids

    def outside(self, ids: Tensor, position: int) -> IndexError:
        """The error for ids.flatten()[position], which is not a row of this table."""
        place = tuple(int(i) for i in np.unravel_index(position, tuple(ids.shape)))
        return IndexError(
            f"row {int(ids.flatten()[position])} at position {place} is outside this table of {self.rows:,} rows: "
            f"the hash layout does not belong to this table"
        )

    def _check_file(self) -> None:
        """Reading a mapped page beyond the end of its file is a SIGBUS; an fstat (1 to 3 us) makes it an error."""
        assert self._file is not None
        found = os.fstat(self._file).st_size
        if found < self.nbytes:
            raise OSError(
                f"{self.path} was truncated to {found:,} bytes under a table of {self.nbytes:,}: close the table and "
                f"restore the file"
            )

    def prefetch(self, row_ids: Tensor | np.ndarray) -> int:
        """Asks for the file pages of these rows, so that a later gather finds them in memory. For a long prefill.

        Returns at once; the disk works on. The pages asked for should fit in free memory. EngramMemory.recall does this
        for tables in files.

        Returns:
            Bytes asked for; 0 for a table in memory, or where a sample of the rows shows that the page cache has nearly
            all of them.

        Raises:
            IndexError, TypeError: see `check`. ValueError: a closed table.
        """
        stored, row = self.tensor, self.nbytes // self.rows
        if self._file is None:
            return 0
        ids = self.check(row_ids)
        if readahead.in_memory(self._file, stored.data_ptr(), ids.numpy(), row):
            return 0
        return readahead.will_need(self._file, stored.data_ptr(), ids.numpy(), row, self.nbytes)

    def drop(self) -> None:
        """Lets go of a mapped file's pages in memory: rows are read from the disk again, and none changes."""
        if self._file is not None:
            self.flush()
            readahead.drop(self._file, self.tensor.data_ptr(), self.nbytes)

    def check_writable(self) -> None:
        """Raises PermissionError for a table that was opened read-only, or whose file the parent of this process has
        opened: a fork shares the lock on it, and the parent would see every row change."""
        if not self.writable:
            raise PermissionError(
                f"{self.path} is opened read-only, so its rows can be neither trained nor written: load the memory "
                f'with mode="copy", or open the table with mode="r+"'
            )
        if self._file is not None and os.getpid() != self._process:
            raise PermissionError(
                f"{self.path} was opened by process {self._process}, from which this one was forked: its rows can be "
                f"read here, not written. Open the table after the fork, or train in the process that has opened it"
            )

    def changed(self, row_ids: Tensor) -> None:
        """Drop rows from the caches in front of the table. Each writer of rows calls this with their checked ids."""
        for watcher in self.watchers.living():
            watcher.invalidate(row_ids)

    def gather(self, row_ids: Tensor | np.ndarray, out: Tensor | None = None) -> Tensor:
        """Rows by id.

        Args:
            row_ids: int64 [...], torch or NumPy.
            out: contiguous CPU tensor [..., dim] to fill, in the table's dtype or float32. Reusing one saves the page
                faults of a fresh buffer, which cost more than the copy.

        Returns:
            [..., dim], `out` if it was given, else a new tensor of the table's dtype.

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
            gather, table, n = kernels.native.engram_gather, self.struct, ids.numel()
            source, target, as_float = ids.data_ptr(), out.data_ptr(), out.dtype == torch.float32
            smallest = _SMALLEST // (self.dim * out.element_size()) + 1
            if n < 2 * smallest:  # a decode step: spare it the thread pool
                bad = gather(table, source, 0, n, target, as_float)
            else:
                firsts: list[int] = []
                kernels.spread(
                    n,
                    smallest,
                    lambda lo, hi: firsts.append(gather(table, source, lo, hi, target, as_float)),
                    *(stored, ids, out),
                )
                bad = min((first for first in firsts if first >= 0), default=-1)
            if bad >= 0:
                raise self.outside(ids, bad)
        else:
            self.check(ids)
            rows = reference.read(stored, ids.flatten(), self.init == "normal", self.seed, self.std)
            out.copy_(rows.view(shape))
        return out

    def begin_write(self, row_ids: Tensor | np.ndarray, rows: Tensor) -> Tensor:
        """The flat, checked row ids of a write, after which caches in front of the table have forgotten them."""
        self.check_writable()
        ids = self.check(row_ids).flatten()
        if not isinstance(rows, Tensor) or rows.is_complex():
            kind = str(rows.dtype) if isinstance(rows, Tensor) else type(rows).__name__
            raise TypeError(f"rows must be a tensor of real numbers, not {kind}")
        if rows.dim() == 0 or tuple(rows.shape[:-1]) != tuple(row_ids.shape) or rows.shape[-1] != self.dim:
            raise ValueError(
                f"row ids {tuple(row_ids.shape)} need rows {(*row_ids.shape, self.dim)}, not {tuple(rows.shape)}"
            )
        if torch.unique(ids).numel() != ids.numel():
            raise ValueError("a row id occurs twice in one write")
        self.changed(ids)
        return ids

    def write(self, row_ids: Tensor | np.ndarray, rows: Tensor) -> None:
        """Stores rows [..., dim] under distinct row ids [...]; float32 is rounded to nearest for a bfloat16 table.

        Raises:
            ValueError: shapes that do not match, or a row id given twice (which row should win?).
            PermissionError: a table opened read-only.
        """
        stored, ids = self.tensor, self.begin_write(row_ids, rows)
        values = rows.detach().to("cpu", torch.float32).reshape(-1, self.dim).contiguous()
        if kernels.native is not None:
            kernels.native.engram_scatter(self.struct, ids.data_ptr(), 0, ids.numel(), values.data_ptr())
        else:
            reference.write(stored, ids, values, self.init == "normal")

    def info(self) -> dict[str, Any]:
        """Facts for logs: rows, dim, dtype, bytes, where it lives, whether huge pages were granted, which path runs.

        "huge_pages" is True where most of what is resident now lies on huge pages, None where that cannot be known:
        before any row was written, after close(), or on a system without /proc/self/smaps.
        """
        return {
            "rows": self.rows,
            "dim": self.dim,
            "dtype": str(self.dtype).removeprefix("torch."),
            "bytes": self.nbytes,
            "mode": "r+" if self.writable else "r",
            "where": self._where,
            "huge_pages": None if self._tensor is None else _on_huge_pages(self._tensor.data_ptr()),
            "kernels": "native" if kernels.native is not None else "torch",
        }

    @property
    def _where(self) -> str:
        return str(self.path) if self.path else ("meta" if self.on_meta else "memory")

    def flush(self) -> None:
        """Forces a mapped file's rows to disk; nothing to do in memory."""
        if self._file is not None and self.writable:
            os.fsync(self._file)

    def close(self) -> None:
        """Let the rows go (flushed first, if mapped), with the state that row optimisers keep of them. Further use
        raises ValueError. Twice is fine."""
        for optimizer in self.optimizers.living():
            optimizer.close()
        self.flush()
        self._tensor = self._struct = None
        if self._file is not None:
            if os.getpid() == self._process:  # a forked process shares the lock
                unlock(self._file)
            self._let_go()
            self._file = None

    def __deepcopy__(self, memo: Any) -> HostTable:
        """A table of its own in memory; one that was opened read-only shares its mapped rows instead.

        Raises:
            MemoryError: the written rows do not fit. ValueError: a closed table.
        """
        twin = memo[id(self)] = copy.copy(self)
        twin.watchers, twin.optimizers = WeakList(), WeakList()
        if self.on_meta:
            return twin
        stored = self.tensor
        if not self.writable and (file := self._open_again()) is not None:
            twin._hold(file)
            return twin
        twin.path, twin._file, twin.writable = None, None, True
        twin._allocate()
        block = max(1, (16 << 20) * self.rows // self.nbytes)
        for lo in range(0, self.rows, block):
            rows = stored[lo : lo + block]
            if not rows.any():  # reading makes no page resident, writing would
                continue
            if (free := limits.free_memory()) and free < 2 * rows.nbytes:
                twin.close()
                raise MemoryError(
                    f"the copy of {self} needs more memory than is free: row {lo:,} was not copied. Save the memory "
                    f"(memory.save) and load the copy with rows_in=, which keeps its rows in files"
                )
            twin.tensor[lo : lo + block] = rows
        return twin

    def _open_again(self) -> int | None:
        """A second descriptor of a file that is read, with a lock of its own; None if the path is another file now."""
        assert self.path is not None and self._file is not None
        try:
            file = os.open(self.path, os.O_RDONLY)
        except OSError:
            return None
        if os.path.samestat(os.fstat(file), os.fstat(self._file)):
            lock(file, self.path, exclusive=False)
            return file
        os.close(file)
        return None

    def __copy__(self) -> HostTable:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __reduce__(self) -> Any:
        raise TypeError("a HostTable is not pickled: it may be larger than memory. Save its rows with memory.save")

    def __repr__(self) -> str:
        return f"HostTable({self.rows:,} x {self.dim}, {self.dtype}, {self._where}, init={self.init})"
