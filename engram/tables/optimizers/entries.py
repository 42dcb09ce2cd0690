"""Entries: the row gradients of one step sorted by row, as the fused updates read them."""

from __future__ import annotations

import ctypes
import threading

import torch
from torch import Tensor

from engram.tables import kernels
from engram.tables.table import HostTable

SMALLEST = 512  # distinct rows below which one core is faster than two


class Gradient(ctypes.Structure):
    """Mirror of `Gradient` in updates.h."""

    _fields_ = [
        ("unique", ctypes.c_void_p),
        ("start", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
    ]


_scratch = threading.local()  # of Entries: one set per thread, kept from step to step, so that no page of it is fresh


class Entries:
    """The entries of one step sorted by row: what the fused updates read, and which rows they have updated.

    Attributes:
        unique: int64 [distinct], the rows of the step in the order of their first appearance.
        done: uint8 [distinct], 1 for each row that was updated together with its state.
        address: of the C struct. buffers: the memory that it points into.

    Raises:
        IndexError: a row outside the table; nothing was changed.
    """

    def __init__(self, table: HostTable, ids: Tensor, grad: Tensor):
        n = ids.numel()
        if n >= 1 << 30:
            raise ValueError(f"one step updates fewer than 2**30 row ids, not {n:,}")
        capacity = 1 << (2 * n - 1).bit_length()
        self._arrays = getattr(_scratch, "arrays", None)
        _scratch.arrays = None  # not shared: a step that is interrupted keeps them
        if self._arrays is None or self._arrays[1].numel() < n:
            wide, narrow = torch.int64, torch.int32
            sizes = ((capacity, narrow), (n, narrow), (n, wide), (n + 1, narrow), (n, narrow))
            self._arrays = [torch.empty(size, dtype=d, device="cpu") for size, d in sizes]
        slots, which, unique, start, order = self._arrays
        assert kernels.native is not None
        distinct = kernels.native.engram_group(
            ids.data_ptr(),
            n,
            table.rows,
            slots.data_ptr(),
            capacity,
            *(a.data_ptr() for a in (which, unique, start, order)),
        )
        if distinct < 0:
            raise table.outside(ids, -1 - distinct)
        self.unique, self.done = unique[:distinct], torch.zeros(distinct, dtype=torch.uint8, device="cpu")
        self._struct = Gradient(*(a.data_ptr() for a in (unique, start, order, grad)))
        self.address = ctypes.addressof(self._struct)
        self.buffers = (table.tensor, ids, grad, self)

    def give_back(self) -> None:
        """Leave the arrays to the next step; `unique` is not valid after that."""
        _scratch.arrays = self._arrays
