"""HostTable: rows that live in host memory or in a mapped file. Row ids in, rows out."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram.tables import kernels, readahead, reference

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
            One table at a time may hold a file for writing, any number of tables and processes for reading.
        mode: "r+", or "r" to map an existing file read-only: its pages are shared by all who map it, and every write is
            refused. `tensor` itself cannot be protected: storing into it through torch would end the process.
        init: "zero", or "normal": never-written rows read as std * N(0, 1), a function of (seed, row, column) alone.
        std, seed: of the normal init.

    A file that somebody truncates under a live table is noticed by the next call (OSError). Not noticed, because the
    operating system reports them by a signal in the middle of a copy and not by an error: a file truncated while a
    gather is running, and a disk that fails under a page that is read for the first time. Bytes changed in place
    are found by `engram verify` alone. A file that is renamed or deleted stays whole for those who have it open.

    On the meta device (`with torch.device("meta")`) nothing is allocated and only sizes can be asked.

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
        if rows < 1 or not 1 <= dim <= 16384:
            raise ValueError(f"a table needs rows >= 1 and 1 <= dim <= 16384, not rows={rows}, dim={dim}")
        if dtype not in _CODES:
            raise ValueError(f"a HostTable holds torch.float32 or torch.bfloat16 rows, not {dtype}")
        if init not in ("zero", "normal"):
            raise ValueError(f'init is "zero" or "normal", not {init!r}')
        self.rows, self.dim, self.dtype = int(rows), int(dim), dtype
        if mode not in ("r+", "r") or (mode == "r" and path is None):
            raise ValueError(f'mode is "r+", or "r" with the path of an existing file, not {mode!r} with {path!r}')
        self.nbytes = self.rows * self.dim * dtype.itemsize
        self.init, self.std, self.seed = init, float(std), int(seed)
        self.path = None if path is None else Path(path)
        self.huge_pages = False
        self.writable = mode == "r+"
        self.watchers: weakref.WeakSet[Any] = weakref.WeakSet()  # caches of rows, told of every write
        self._file: int | None = None
        self._tensor: Tensor | None = None
        self._struct: _Table | None = None
        self._meta = torch.get_default_device().type == "meta"
        if self._meta:
            return
        memory = self._map_memory() if self.path is None else self._map_file(self.path)
        values = np.frombuffer(memory, dtype=np.uint8)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
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

    def _map_memory(self) -> mmap.mmap:
        try:
            if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
                return mmap.mmap(-1, self.nbytes)
            no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)  # in mmap since 3.13
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
            memory = mmap.mmap(-1, self.nbytes, flags=flags)
        except (OSError, OverflowError) as error:
            raise OSError(
                f"no {self.nbytes:,} bytes of address space for a table of {self.rows:,} x {self.dim}: {error}. "
                f"Give HostTable a path to keep it in a file, or fewer rows."
            ) from error
        try:  # before the first touch; fewer TLB misses on random rows
            memory.madvise(mmap.MADV_HUGEPAGE)
            self.huge_pages = True
        except (AttributeError, OSError):
            pass
        return memory

    def _map_file(self, path: Path) -> mmap.mmap:
        fresh = not path.exists()
        if fresh and not self.writable:
            raise FileNotFoundError(f"{path} does not exist: a table opened for reading needs its file of rows")
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT if self.writable else os.O_RDONLY, 0o644)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            hint = 'open it with mode="r" to read its rows' if self.writable else "ask its owner"
            what = "written" if self.writable else "read"
            raise PermissionError(error.errno, f"{path} cannot be {what} ({error.strerror}): {hint}") from None
        try:
            self._lock(file, path, exclusive=self.writable)
            # A file with holes (a saved memory) gets its space before the first write, not a crash at one.
            holes = self.writable and getattr(os.fstat(file), "st_blocks", 1 << 62) * 512 < self.nbytes
            if fresh or (holes and os.fstat(file).st_size == self.nbytes):
                try:
                    self._reserve(file)
                except OSError as error:
                    if fresh:
                        path.unlink(missing_ok=True)
                    raise OSError(
                        error.errno, f"no room for a table of {self.nbytes:,} bytes at {path}: {error.strerror}"
                    ) from error
            found = os.fstat(file).st_size
            if found != self.nbytes:
                raise ValueError(
                    f"{path} holds {found:,} bytes, but {self.rows:,} rows x {self.dim} x {self.dtype} need "
                    f"{self.nbytes:,}: it belongs to another layout or is torn"
                )
            memory = mmap.mmap(file, self.nbytes, access=mmap.ACCESS_WRITE if self.writable else mmap.ACCESS_READ)
            if hasattr(mmap, "MADV_RANDOM"):  # else every cold row reads megabytes around it
                memory.madvise(mmap.MADV_RANDOM)
        except BaseException:
            os.close(file)
            raise
        self._file = file
        return memory

    @staticmethod
    def _lock(file: int, path: Path, exclusive: bool) -> None:
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                error.errno,
                f"{path} is already held by another table: two layers must never share one file"
                if exclusive
                else f"{path} is held by a table that trains it: close that one, or save it and read the copy",
            ) from None

    def _reserve(self, file: int) -> None:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, self.nbytes)
        else:
            os.ftruncate(file, self.nbytes)

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
            OSError: the table's file was truncated.
        """
        if self._file is not None:
            self._check_file()
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

        Returns at once; the disk works on. The pages asked for should fit in free memory.

        Returns:
            Bytes asked for; 0 for a table in memory, which has nothing to wait for.

        Raises:
            IndexError, TypeError: see `check`. ValueError: a closed table.
        """
        stored, ids = self.tensor, self.check(row_ids)
        if self._file is None:
            return 0
        return readahead.will_need(self._file, stored.data_ptr(), ids.numpy(), self.nbytes // self.rows, self.nbytes)

    def drop(self) -> None:
        """Lets go of a mapped file's pages in memory: rows are read from the disk again, and none changes."""
        if self._file is not None:
            self.flush()
            readahead.drop(self._file, self.tensor.data_ptr(), self.nbytes)

    def check_writable(self) -> None:
        """Raises PermissionError for a table that was opened read-only."""
        if not self.writable:
            raise PermissionError(
                f"{self.path} is opened read-only, so its rows can be neither trained nor written: load the memory "
                f'with mode="copy", or open the table with mode="r+"'
            )

    def changed(self, row_ids: Tensor) -> None:
        """Whoever writes rows calls this with their checked ids, so that caches in front of the table forget them."""
        for watcher in list(self.watchers):
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
            PermissionError: a table opened read-only.
        """
        self.check_writable()
        stored = self.tensor
        ids = self.check(row_ids).flatten()
        values = rows.detach().to("cpu", torch.float32).reshape(-1, self.dim).contiguous()
        if tuple(rows.shape[:-1]) != tuple(row_ids.shape) or rows.shape[-1] != self.dim:
            raise ValueError(f"row ids {tuple(row_ids.shape)} need rows {(*row_ids.shape, self.dim)}, not {rows.shape}")
        if torch.unique(ids).numel() != ids.numel():
            raise ValueError("a row id occurs twice in one write")
        self.changed(ids)
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
            "mode": "r+" if self.writable else "r",
            "where": str(self.path) if self.path else ("meta" if self._meta else "memory"),
            "huge_pages": self.huge_pages,
            "kernels": "native" if kernels.native is not None else "torch",
        }

    def flush(self) -> None:
        """Forces a mapped file's rows to disk; nothing to do in memory."""
        if self._file is not None and self.writable:
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
