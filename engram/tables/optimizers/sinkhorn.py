"""RowSinkhorn: momentum balanced over rows and columns, on the rows of a step only (paper_notes/sinkhorn.md)."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import torch
from torch import Tensor

from engram.tables import kernels, reference
from engram.tables.optimizers.base import RowOptimizer
from engram.tables.optimizers.entries import SMALLEST, Entries
from engram.tables.protocol import Table

_SWEEPS = 5  # K = 11 normalisations: rows, then five times (columns, rows)
_RATE = 0.18  # the root mean square of a step's elements, in units of lr
_STRIP = 64  # as STRIP in sinkhorn.c


class RowSinkhorn(RowOptimizer):
    """Sinkhorn-balanced Nesterov momentum, the table optimizer of DeepSeek-V4.1, on touched rows only.

        m   <- beta^(steps since the row's last touch) m + grad       exactly the dense momentum of the row
        n    = grad + beta m                                          Nesterov look-ahead
        n    = 0 where |n| <= tau * mean |n| over the touched rows
        u    = n, normalised 11 times to unit L2 norm: rows, columns, ..., rows (columns over the touched rows)
        row <- row - 0.18 lr sqrt(dim) u

    State: 4 bytes per value and 4 per row. The step counter per row is a float32, exact for 16.7 million steps. Unlike
    the other row optimizers, one step couples its rows: a gradient that is not finite spoils all of them.

    Args:
        table: the rows to train. lr: learning rate; a step's elements have a root mean square of 0.18 lr.
        beta: decay of the momentum per step. tau: mask. stochastic_rounding: see RowRMS.
    """

    def __init__(
        self,
        table: Table,
        lr: float = 0.01,
        beta: float = 0.95,
        tau: float = 1e-3,
        stochastic_rounding: bool = True,
    ):
        super().__init__(table, lr, 0.0, stochastic_rounding)
        if not 0 <= beta < 1 or tau < 0:
            raise ValueError(f"beta must lie in [0, 1) and tau must not be negative, got beta={beta}, tau={tau}")
        self.beta, self.tau = float(beta), float(tau)
        self.state["m"] = self._state_table("m", table.dim)
        self.state["last"] = self._state_table("last", 1)
        self._buffer = torch.empty(0, device="cpu")

    def step(self, row_ids: Tensor, grad: Tensor) -> int:
        """Update rows once. row_ids: int64 [...]; grad: [..., dim]. Return the number of distinct rows touched."""
        ids, grad = self._prepare(row_ids, grad)
        if ids.numel() == 0:
            return 0
        salt, rate = self._salt(), _RATE * self.lr * math.sqrt(self.table.dim)
        if kernels.native is None:
            return self._step_torch(ids, grad, rate, salt)
        m, last, dim = self.state["m"].tensor, self.state["last"].tensor, self.table.dim
        entries = Entries(self.table, ids, grad)
        n = len(entries.unique)
        self.steps += 1
        strips = -(-n // _STRIP)
        if self._buffer.numel() < n * (dim + 1):
            self._buffer = torch.empty(n * (dim + 1), device="cpu")  # kept from step to step: no page of it is fresh
        norm, look = self._buffer[:n], self._buffer[n : n * (dim + 1)]
        sums, weight = torch.empty(strips, dim, device="cpu"), torch.ones(dim, device="cpu")
        table = self.table.struct
        buffers = (table, m, last, norm, look, sums, weight, *entries.buffers)
        rows = (ctypes.addressof(table), m.data_ptr(), last.data_ptr(), entries.address)
        moved = (self.beta, self.steps, look.data_ptr())
        kernels.spread(n, SMALLEST, kernels.Call("sinkhorn_look", *rows, *moved, norm.data_ptr()), *buffers)
        limit, masked = _limit(norm, self.tau), (norm.data_ptr(), weight.data_ptr())
        sweep = kernels.Call("sinkhorn_sweep", look.data_ptr(), *masked, limit, n, dim, sums.data_ptr())
        for _ in range(_SWEEPS):
            kernels.spread(strips, SMALLEST // _STRIP, sweep, *buffers)
            weight.copy_(_column_weight(sums))
        root, done = reference.sqrt(weight), entries.done.data_ptr()
        balanced = (*masked, root.data_ptr(), limit, rate, salt or 0, salt is not None)
        update = kernels.Call("sinkhorn_update", *rows, done, *moved, *balanced)
        return self._update(entries, update, table, m, last, norm, look, weight, root)

    def _step_torch(self, ids: Tensor, grad: Tensor, rate: float, salt: int | None) -> int:
        f32, t = reference.f32, self.table
        m, last = self.state["m"].tensor, self.state["last"].tensor
        unique, summed = reference.group(t.check(ids).flatten(), grad, in_order=True)
        self.steps += 1
        decay = reference.power(self.beta, self.steps - last[unique, 0].long())
        moment = decay[:, None] * m[unique] + summed
        look = summed + f32(self.beta) * moment
        norm = reference.sqrt(reference.mean_square(look) * f32(t.dim))
        look = look * torch.where(norm > 0, 1 / norm, 0.0)[:, None]
        keep = ~(norm <= _limit(norm, self.tau))
        weight = torch.ones(t.dim, device="cpu")
        for _ in range(_SWEEPS):
            factor = reference.row_factor(look, weight)
            terms = torch.where(keep[:, None], look * look * factor[:, None], 0.0)
            pad = torch.zeros(-len(terms) % _STRIP, t.dim, device="cpu")
            weight = _column_weight(reference.sum_in_order(torch.cat([terms, pad]).view(-1, _STRIP, t.dim)))
        scale = f32(rate) * reference.sqrt(reference.row_factor(look, weight))
        rows = reference.read(t.tensor, unique, t.init == "normal", t.seed, t.std)
        rows = rows - scale[:, None] * (look * reference.sqrt(weight))

        def write() -> None:
            m[unique], last[unique, 0] = moment, float(self.steps)
            reference.write(t.tensor, unique[keep], rows[keep], t.init == "normal", salt)

        return self._store(unique, write)


def _limit(norm: Tensor, tau: float) -> float:
    """Return the norm up to which rows are masked. The order of a NumPy sum does not depend on the threads."""
    return float(np.float32(tau * norm.numpy().mean(dtype=np.float64)))


def _column_weight(sums: Tensor) -> Tensor:
    """Return 1 / column sums [dim] of the strips' sums [strips, dim]; 0 for a column of zeros."""
    total = torch.from_numpy(np.add.reduce(sums.numpy(), axis=0))
    return torch.where(total > 0, 1 / total, 0.0)
