"""HotRows: a bounded cache of rows in memory, in front of a table that is mapped from a file."""

from __future__ import annotations

import os
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram.config import whole
from engram.tables.arguments import as_output
from engram.tables.encoded import EncodedTable
from engram.tables.table import HostTable

_WAYS = 8  # rows a set holds; a row can lie in one set only


class HotRows:
    """The most recently used rows of a table, in a fixed amount of memory. Same rows as the table's, bit for bit.

    The page cache already keeps hot pages, but a 4 KiB page of 256-byte rows holds fifteen cold rows beside each hot
    one. A hit here costs more than a gather from a page that is in memory: use it where the page cache is too small.

    Rows lie in sets of 8 by a hash of their id; in a set the row that was used longest ago makes room (as of the last
    gather: the rows of one gather count as used at the same moment). Everything is vectorised over the rows of a call.

    Writes through `table.write` and the row optimisers forget the rows they touch. A gather on another thread at the
    very moment of an update may keep the row as it was before: do not run both at once.

    Args:
        table: any HostTable. nbytes: memory for rows and their bookkeeping, at least one set.

    Raises:
        ValueError: nbytes is too small for one set of 8 rows.
    """

    def __init__(self, table: HostTable, nbytes: int):
        dtype = torch.float32 if isinstance(table, EncodedTable) else table.dtype  # of what a gather gives
        row, nbytes = table.dim * dtype.itemsize, whole("nbytes", nbytes)
        sets = nbytes // (_WAYS * (row + 16))  # a tag and a clock reading beside each row
        if sets < 1:
            raise ValueError(f"nbytes must be at least {_WAYS * (row + 16):,} for rows of {row} bytes, not {nbytes:,}")
        self.table, self.rows, self.dim, self.dtype = table, table.rows, table.dim, dtype
        self._sets = sets
        self._tags = np.full((sets, _WAYS), -1, np.int64)
        self._used = np.zeros((sets, _WAYS), np.int64)
        self._data = np.empty(sets * _WAYS, dtype=f"V{row}")  # NumPy: its copies need no thread pool
        self._clock = 0
        self._lock = threading.Lock()  # prefetching gathers on a thread of its own
        self._process = os.getpid()
        self.lookups = self.hits = 0
        table.watchers.add(self)

    @property
    def capacity(self) -> int:
        """Rows that fit."""
        return self._sets * _WAYS

    @property
    def nbytes(self) -> int:
        return self._data.nbytes + self._tags.nbytes + self._used.nbytes

    @property
    def hit_rate(self) -> float:
        """Share of the rows asked for, duplicates included, that were here before their gather began."""
        return self.hits / self.lookups if self.lookups else 0.0

    def _own(self) -> threading.Lock:
        """The lock. A forked process inherits one that another thread may hold, and rows that it may be storing."""
        if self._process != os.getpid():
            self._tags.fill(-1)
            self._used.fill(0)
            self._lock, self._process = threading.Lock(), os.getpid()
        return self._lock

    def _set_of(self, ids: np.ndarray) -> np.ndarray:
        mixed = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return ((mixed >> np.uint64(32)) * np.uint64(self._sets) >> np.uint64(32)).astype(np.int64)

    def gather(self, row_ids: Tensor | np.ndarray, out: Tensor | None = None) -> Tensor:
        """Rows by id, as HostTable.gather: same arguments, result and errors."""
        ids = self.table.check(row_ids)
        shape = (*ids.shape, self.dim)
        out = as_output(out, shape, self.dtype)
        if ids.numel():
            with self._own():
                self._gather(ids.flatten().numpy(), out)
        return out

    def prefetch(self, row_ids: Tensor | np.ndarray) -> int:
        """Asks for the file pages of those rows that are not here, as HostTable.prefetch."""
        flat = self.table.check(row_ids).flatten()
        with self._own():
            _, hit = self._find(flat.numpy())
        return self.table.prefetch(flat[torch.from_numpy(~hit)])

    def _gather(self, flat: np.ndarray, out: Tensor) -> None:
        self._clock += 1
        place, hit = self._find(flat)
        self._used.reshape(-1)[place[hit]] = self._clock
        self.lookups += len(flat)
        self.hits += int(hit.sum())
        raw = out if out.dtype == self.dtype else torch.empty(out.shape, dtype=self.dtype, device="cpu")
        target = self._raw(raw)
        if hit.all():
            np.take(self._data, place, out=target, mode="clip")  # clip: straight into target, all are in range
        else:
            missing, back = np.unique(flat[~hit], return_inverse=True)
            fetched = self._raw(self.table.gather(missing))
            target[hit] = self._data[place[hit]]
            target[~hit] = fetched[back.reshape(-1)]
            self._keep(missing, fetched)
        if raw is not out:
            out.copy_(raw)

    def _raw(self, rows: Tensor) -> np.ndarray:
        """Rows as opaque bytes [n], no copy."""
        return rows.view(-1, self.dim).view(torch.uint8).numpy().view(self._data.dtype).reshape(-1)

    def _find(self, flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(slot of each id, whether it is there); the slot means nothing where it is not."""
        sets = self._set_of(flat)
        match = self._tags[sets] == flat[:, None]
        return sets * _WAYS + match.argmax(1), match.any(1)

    def _keep(self, ids: np.ndarray, rows: np.ndarray) -> None:
        """Takes distinct rows in, in place of those of their sets that were used longest ago, never of this gather."""
        sets = self._set_of(ids)
        order = np.argsort(sets, kind="stable")
        touched, first, count = np.unique(sets[order], return_index=True, return_counts=True)
        rank = np.arange(len(ids)) - np.repeat(first, count)  # 0, 1, ... within each set
        oldest = np.argsort(self._used[touched], axis=1, kind="stable")
        which = np.repeat(np.arange(len(touched)), count)
        fits = rank < _WAYS
        order, rank, which = order[fits], rank[fits], which[fits]
        slot = touched[which] * _WAYS + oldest[which, rank]
        free = self._used.reshape(-1)[slot] < self._clock
        order, slot = order[free], slot[free]
        tags = self._tags.reshape(-1)
        tags[slot] = -1  # until the rows are there: an interruption must leave no tag with another row
        self._used.reshape(-1)[slot] = self._clock
        self._data[slot] = rows[order]
        tags[slot] = ids[order]

    def invalidate(self, row_ids: Tensor) -> None:
        """Forgets rows; the next gather reads them from the table."""
        with self._own():
            place, hit = self._find(row_ids.flatten().numpy())
            self._tags.reshape(-1)[place[hit]] = -1
            self._used.reshape(-1)[place[hit]] = 0

    # What a memory asks of a table that is only read, so that memory.tables[layer] = HotRows(...) works.

    def check(self, row_ids: Tensor | np.ndarray) -> Tensor:
        """See HostTable.check."""
        return self.table.check(row_ids)

    def check_writable(self) -> None:
        """Raises PermissionError: rows are trained in the table itself, not through its cache."""
        raise PermissionError("these rows are read through a HotRows cache: put the table itself back to train them")

    @property
    def tensor(self) -> Tensor:
        """The table's stored values; see HostTable.tensor."""
        return self.table.tensor

    def close(self) -> None:
        """Closes the table."""
        self.table.close()

    def info(self) -> dict[str, Any]:
        """Facts for logs: capacity in rows, bytes of memory, lookups and hit rate since the start."""
        return {"capacity": self.capacity, "bytes": self.nbytes, "lookups": self.lookups, "hit_rate": self.hit_rate}
