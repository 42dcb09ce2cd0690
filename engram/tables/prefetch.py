"""Rows fetched ahead of their use, on a thread of their own, and read again if an update changed them since.

A Fetch reads rows while the model computes, and possibly while the optimizer changes some of them. So its rows are
used only after `patch` has read every row again that an update touched since: a model computes bit for bit what it
would compute without fetching ahead.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from engram.tables import kernels
from engram.tables.protocol import Table

Result = TypeVar("Result")

_thread = kernels.Threads(1, "engram-fetch")


class Task(Generic[Result]):
    """Work on the fetching thread, or done at once if waking a thread costs more than the work.

    A process that was forked meanwhile has no such thread, which may have held the lock of the future: the process
    repeats work that had not ended.
    """

    def __init__(self, work: Callable[[], Result], worth_a_thread: bool):
        self._ended: tuple[Result | None, BaseException | None] | None = None  # set in one step
        self._work: Callable[[], Result] | None = None
        self._process = os.getpid()
        if worth_a_thread:
            self._work = work
            self._future = _thread.pool.submit(self._run, work)
        else:
            self._ended = work(), None

    def _run(self, work: Callable[[], Result]) -> None:
        try:
            self._ended = work(), None
        except Exception as error:
            self._ended = None, error
        self._work = None  # and what it refers to

    def end(self) -> None:
        """Wait until the work has ended, with a result or an error."""
        work = self._work
        if self._ended is None:
            if self._process == os.getpid():
                self._future.result()
            elif work is not None:
                self._run(work)

    def result(self) -> Result:
        """Wait for the result and return it; raise what the work raised."""
        self.end()
        assert self._ended is not None
        result, error = self._ended
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def wait(self) -> tuple[Result, float]:
        """Return (result, seconds waited for it); raise what the work raised."""
        if self._ended is not None:
            return self.result(), 0.0
        began = time.perf_counter()
        return self.result(), time.perf_counter() - began


class Fetch:
    """The rows of one table for one batch, in a buffer of its own: host memory, and a copy on the device if it has one.

    Args:
        table: that has the rows. row_ids: int64 [...] on the CPU. device: where they are used. On a CUDA device
        the buffer is pinned and copied on a stream of its own, so neither the copy nor the gather delays the model.
    """

    def __init__(self, table: Table, row_ids: Tensor, device: torch.device):
        self.table, self.row_ids, self.device = table, row_ids, device
        on_gpu = device.type == "cuda"
        self.host = torch.empty((*row_ids.shape, table.dim), device="cpu", dtype=torch.float32, pin_memory=on_gpu)
        self.staged: Tensor | None = None
        self._ready: torch.cuda.Event | None = None
        table.prefetch(row_ids)
        table.gather(row_ids, self.host)
        if on_gpu:
            self._stage()

    def _stage(self) -> None:
        side = _side_stream(self.device)
        with torch.cuda.stream(side):
            if self.staged is None:
                self.staged = torch.empty_like(self.host, device=self.device)
            self.staged.copy_(self.host, non_blocking=True)
            self._ready = side.record_event()

    def rows(self) -> Tensor:
        """Return float32 [..., D] on the device; the current stream waits for the copy, the host does not."""
        if self.staged is None:
            return self.host
        assert self._ready is not None
        current = torch.cuda.current_stream(self.device)
        current.wait_event(self._ready)
        self.staged.record_stream(current)
        return self.staged

    def patch(self, touched: Tensor) -> int:
        """Read again every row that is in `touched` (int64, any shape). Return the number of positions renewed."""
        positions = find(touched.flatten(), self.row_ids.flatten())
        if positions.numel():
            fresh = self.table.gather(self.row_ids.flatten()[positions]).to(torch.float32)
            if self._ready is not None:
                self._ready.synchronize()  # the copy out of the pinned buffer must have ended
            self.host.view(-1, self.table.dim).index_copy_(0, positions, fresh)
            if self.staged is not None:
                self._stage()
        return positions.numel()


def find(touched: Tensor, query: Tensor) -> Tensor:
    """Return the ascending positions in `query` [m] of ids that are in `touched` [n]. All are int64 on the CPU."""
    if kernels.native is None:
        return torch.isin(query, touched).nonzero().flatten()
    capacity = 1 << max(1, 2 * touched.numel() - 1).bit_length()
    slots = torch.full((capacity,), -1, dtype=torch.int64, device="cpu")
    positions = torch.empty(query.numel(), dtype=torch.int64, device="cpu")
    count = kernels.native.engram_find(
        touched.data_ptr(),
        touched.numel(),
        slots.data_ptr(),
        capacity,
        query.data_ptr(),
        query.numel(),
        positions.data_ptr(),
    )
    return positions[:count]


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]
