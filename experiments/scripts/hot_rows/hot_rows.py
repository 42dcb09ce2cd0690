"""HotRows: a bounded cache of the most recently used rows of a table, which this question counts the hits of."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engram.config import as_integer
from engram.tables import EncodedTable, Table

_WAYS = 8  # rows per set; a row can lie in one set only


class HotRows:
    """The most recently used rows of a table, in a fixed amount of memory. Same rows as the table's, bit for bit.

    Rows lie in sets of 8 by a hash of their id; in a set, the row that was used longest ago makes room (as of the last
    gather: the rows of one gather count as used at the same moment). Everything is vectorised over the rows of a call.
    Rows of the table must not change while the cache is used, and one thread uses it.

    Args:
        table: the rows. nbytes: memory for rows and their bookkeeping, at least one set.

    Raises:
        ValueError: nbytes is too small for one set of 8 rows.
    """

    def __init__(self, table: Table, nbytes: int):
        dtype = torch.float32 if isinstance(table, EncodedTable) else table.dtype  # of what a gather returns
        row, nbytes = table.dim * dtype.itemsize, as_integer("nbytes", nbytes)
        sets = nbytes // (_WAYS * (row + 16))  # a tag and a clock reading beside each row
        if sets < 1:
            raise ValueError(f"nbytes must be at least {_WAYS * (row + 16):,} for rows of {row} bytes, not {nbytes:,}")
        self.table, self.dim, self.dtype = table, table.dim, dtype
        self._sets = sets
        self._tags = np.full((sets, _WAYS), -1, np.int64)
        self._used = np.zeros((sets, _WAYS), np.int64)
        self._data = np.empty(sets * _WAYS, dtype=f"V{row}")  # NumPy: its copies need no thread pool
        self._clock = 0
        self.lookups = self.hits = 0

    @property
    def capacity(self) -> int:
        """Rows that fit."""
        return self._sets * _WAYS

    @property
    def nbytes(self) -> int:
        """Bytes of rows and bookkeeping."""
        return self._data.nbytes + self._tags.nbytes + self._used.nbytes

    @property
    def hit_rate(self) -> float:
        """Share of the rows looked up, duplicates included, that the cache held before their gather began."""
        return self.hits / self.lookups if self.lookups else 0.0

    def gather(self, row_ids: Tensor | np.ndarray, out: Tensor | None = None) -> Tensor:
        """Return rows by id, as HostTable.gather. out: a contiguous CPU tensor [..., dim] of the cache's dtype or
        float32."""
        ids = self.table.check(row_ids)
        rows = torch.empty((*ids.shape, self.dim), dtype=self.dtype, device="cpu")
        if out is not None and out.dtype == self.dtype:
            rows = out
        if ids.numel():
            self._gather(ids.flatten().numpy(), self._raw(rows))
        return rows if out is None or out is rows else out.copy_(rows)

    def _gather(self, flat: np.ndarray, target: np.ndarray) -> None:
        self._clock += 1
        slot, hit = self._find(flat)
        self._used.reshape(-1)[slot[hit]] = self._clock
        self.lookups += len(flat)
        self.hits += int(hit.sum())
        if hit.all():
            np.take(self._data, slot, out=target, mode="clip")  # clip: straight into target, all are in range
            return
        missing, back = np.unique(flat[~hit], return_inverse=True)
        fetched = self._raw(self.table.gather(missing))
        target[hit] = self._data[slot[hit]]
        target[~hit] = fetched[back.reshape(-1)]
        self._keep(missing, fetched)

    def _set_of(self, ids: np.ndarray) -> np.ndarray:
        mixed = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return ((mixed >> np.uint64(32)) * np.uint64(self._sets) >> np.uint64(32)).astype(np.int64)

    def _raw(self, rows: Tensor) -> np.ndarray:
        """Return rows as opaque bytes [n], no copy."""
        return rows.view(-1, self.dim).view(torch.uint8).numpy().view(self._data.dtype).reshape(-1)

    def _find(self, flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (slot of each id, True if the cache has it); the slot of a missing id means nothing."""
        sets = self._set_of(flat)
        match = self._tags[sets] == flat[:, None]
        return sets * _WAYS + match.argmax(1), match.any(1)

    def _keep(self, ids: np.ndarray, rows: np.ndarray) -> None:
        """Store distinct rows in place of those of their sets that were used longest ago, never of this gather."""
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
        self._used.reshape(-1)[slot] = self._clock
        self._data[slot] = rows[order]
        self._tags.reshape(-1)[slot] = ids[order]
