"""RowAdam: Adam on the touched rows."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

from torch import Tensor

from engram.tables import kernels, reference
from engram.tables.optimizers.base import RowOptimizer
from engram.tables.optimizers.entries import Entries
from engram.tables.protocol import Table


class RowAdam(RowOptimizer):
    """Adam on the touched rows, as torch.optim.SparseAdam defines it: untouched moments do not decay, and the bias
    correction counts the steps of the whole table. 8 bytes of state per element: "moments" [2 rows, dim] holds the
    first and the second moment of a row side by side, which is read 1.4 to 1.6 times as fast as two tables would be.

    Args:
        table, lr, eps, stochastic_rounding: see RowRMS. betas: decay of the first and second moment.
    """

    def __init__(
        self,
        table: Table,
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        stochastic_rounding: bool = True,
    ):
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are two numbers in [0, 1), got {tuple(betas)}")
        super().__init__(table, lr, eps, stochastic_rounding)
        self.betas = (float(betas[0]), float(betas[1]))
        self.state["moments"] = self._state_table("moments", table.dim, 2)

    def step(self, row_ids: Tensor, grad: Tensor) -> int:
        """Update rows once. row_ids: int64 [...]; grad: [..., dim]. Return the number of distinct rows touched."""
        ids, grad = self._prepare(row_ids, grad)
        if ids.numel() == 0:
            return 0
        salt, moments = self._salt(), self.state["moments"].tensor
        if kernels.native is None:
            return self._step_torch(ids, grad, salt)
        entries = Entries(self.table, ids, grad)
        self.steps += 1
        b1, b2 = self.betas
        table = self.table.struct
        addresses = (ctypes.addressof(table), moments.data_ptr(), entries.address, entries.done.data_ptr())
        rates = (self._step_size(), b1, 1 - b1, b2, 1 - b2, self.eps)
        call = kernels.Call("adam", *addresses, *rates, salt or 0, salt is not None)
        return self._update(entries, call, table, moments)

    def _step_size(self) -> float:
        b1, b2 = self.betas
        return self.lr * math.sqrt(1 - b2**self.steps) / (1 - b1**self.steps)

    def _step_torch(self, ids: Tensor, grad: Tensor, salt: int | None) -> int:
        f32, t = reference.f32, self.table
        m, v = self.state["moments"].tensor.view(t.rows, 2, t.dim).unbind(1)
        unique, summed = reference.group(t.check(ids).flatten(), grad)
        self.steps += 1
        b1, b2 = self.betas
        first = f32(b1) * m[unique] + f32(1 - b1) * summed
        second = f32(b2) * v[unique] + f32(1 - b2) * (summed * summed)
        rows = reference.read(t.tensor, unique, t.init == "normal", t.seed, t.std)
        rows = rows - f32(self._step_size()) * (first / (reference.sqrt(second) + f32(self.eps)))

        def write() -> None:
            m[unique], v[unique] = first, second
            reference.write(t.tensor, unique, rows, t.init == "normal", salt)

        return self._store(unique, write)
