"""StoredRows: the bytes of a table, in host memory or in a mapped file. What HostTable and EncodedTable share."""

from __future__ import annotations

import copy
import ctypes
import mmap
import os
import warnings
import weakref
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from engram.storage import limits, readahead
from engram.storage.mapping import lock, map_file, map_memory, unlock
from engram.storage.weak import WeakList
from engram.tables import kernels
from engram.tables.arguments import as_ids


class StoredRows(ABC):
    """Stored values [rows, columns] of `dtype` in host memory (path=None) or in a mapped file.

    HostTable and EncodedTable add how rows are read and written. They call `_begin` once their own fields are set.
    """

    init: str
    std: float
    seed: int

    def __init__(self, rows: int, dim: int, dtype: torch.dtype, columns: int, path: Any, mode: str):
        if mode not in ("r+", "r") or (mode == "r" and path is None):
            raise ValueError(f'mode must be "r+", or "r" with the path of an existing file, not {mode!r} with {path!r}')
        self.rows, self.dim, self.dtype, self._columns = rows, dim, dtype, columns
        self.nbytes = rows * columns * dtype.itemsize
        self.path = None if path is None else Path(path)
        self.writable = mode == "r+"
        self.optimizers: WeakList[Any] = WeakList()  # row optimizers, closed with the table
        self.on_meta = torch.get_default_device().type == "meta"
        self._file: int | None = None
        self._tensor: Tensor | None = None
        self._struct: ctypes.Structure | None = None

    def _begin(self) -> None:
        if not self.on_meta:
            self._allocate()

    @abstractmethod
    def _allocate(self) -> None:
        """Set `_tensor` (see `_map`) and `_struct`, the kernels' description of it."""

    def materialize(self) -> None:
        """Allocate the memory or file of a table that was made on the meta device. Its rows read as the initial ones.

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
        return self.rows, self._columns

    def _map(self, what: str) -> Tensor:
        """Return the table's memory, or its mapped file, as a tensor, which keeps the mapping alive.

        Without close(), the file is released with the table."""
        if self.path is None:
            memory = map_memory(self.nbytes, what)
        else:
            memory, file = map_file(self.path, self.nbytes, what, self.writable)
            self._hold(file)
        return _as_tensor(memory, self.dtype, self.rows, self._columns)

    def _hold(self, file: int) -> None:
        """Keep an open file until the table is closed or collected."""
        self._file, self._process = file, os.getpid()
        self._let_go = weakref.finalize(self, os.close, file)
        self._let_go.atexit = False

    @property
    def tensor(self) -> Tensor:
        """The stored values themselves, no copy: [rows, dim], or [rows, bytes per row] of a codec. Never-written rows
        of a normal table are zeros here.

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
        """Table for the kernels, a ctypes structure; the caller keeps it while a kernel has its address."""
        return self._struct if self._struct is not None else self.tensor

    def check(self, row_ids: Tensor | np.ndarray) -> Tensor:
        """Return row ids as a contiguous int64 CPU tensor, after a check that each is a row of the table.

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
        """Return the error for ids.flatten()[position], which is not a row of this table."""
        index = tuple(int(i) for i in np.unravel_index(position, tuple(ids.shape)))
        return IndexError(
            f"row {int(ids.flatten()[position])} at position {index} is outside this table of {self.rows:,} rows: "
            f"the hash layout does not belong to this table"
        )

    def _check_file(self) -> None:
        """Raise OSError if the file is too short: reading a mapped page beyond its end is a SIGBUS. 1 to 3 us."""
        assert self._file is not None
        size = os.fstat(self._file).st_size
        if size < self.nbytes:
            raise OSError(
                f"{self.path} was truncated to {size:,} bytes under a table of {self.nbytes:,}: close the table and "
                f"restore the file"
            )

    def prefetch(self, row_ids: Tensor | np.ndarray) -> int:
        """Start reading the file pages of these rows, so that a later gather finds them in memory. For a long prefill.

        Return at once; the disk works on. The pages should fit in free memory. EngramMemory.recall does this for tables
        in files.

        Returns:
            Bytes requested; 0 for a table in memory, or if a sample of the rows shows that the page cache has nearly
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
        """Release a mapped file's pages from memory. Rows are read from the disk again; none changes."""
        if self._file is not None:
            self.flush()
            readahead.drop(self._file, self.tensor.data_ptr(), self.nbytes)

    def check_writable(self) -> None:
        """Raise PermissionError for a table that was opened read-only, or whose file the parent of this process has
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

    def _begin_write(self, row_ids: Tensor | np.ndarray, rows: Tensor) -> Tensor:
        """Return the flat row ids of a write, after a check of ids and rows."""
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
        return ids

    def info(self) -> dict[str, Any]:
        """Return values for logs: rows, dim, dtype, bytes, location, huge pages, and which kernels run.

        "huge_pages" is True if most of what is resident now lies on huge pages, None if that cannot be known: before
        any row was written, after close(), or on a system without /proc/self/smaps.
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
        """Force a mapped file's rows to the disk; do nothing for a table in memory."""
        if self._file is not None and self.writable:
            os.fsync(self._file)

    def close(self) -> None:
        """Release the rows (flushed first, if mapped), with the state that row optimizers keep of them. Further use
        raises ValueError. Closing twice does nothing more."""
        for optimizer in self.optimizers.living():
            optimizer.close()
        self.flush()
        self._tensor = self._struct = None
        if self._file is not None:
            if os.getpid() == self._process:  # a forked process shares the lock
                unlock(self._file)
            self._let_go()
            self._file = None

    def __deepcopy__(self, memo: Any) -> Self:
        """Return an independent copy in memory; the copy of a table opened read-only shares its mapped rows.

        Raises:
            MemoryError: the written rows do not fit. ValueError: a closed table.
        """
        twin = memo[id(self)] = copy.copy(self)
        twin.optimizers = WeakList()
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
        """Open the file a second time, with a lock of its own. Return the descriptor; None if the path is another file
        now."""
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

    def __copy__(self) -> Self:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __reduce__(self) -> Any:
        kind = type(self).__name__
        raise TypeError(f"a {kind} is not pickled: it may be larger than memory. Save its rows with memory.save")


def _as_tensor(memory: mmap.mmap, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
    """Return a mapping as a tensor [rows, columns], no copy; it keeps the mapping alive."""
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
