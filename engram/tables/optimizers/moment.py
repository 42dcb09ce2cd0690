"""RowRMS and RowAdagrad: row optimizers with one second moment per row."""

from __future__ import annotations

import ctypes

from torch import Tensor

from engram.tables import kernels, reference
from engram.tables.optimizers.base import RowOptimizer
from engram.tables.optimizers.entries import Entries
from engram.tables.protocol import Table


class _RowMoment(RowOptimizer):
    """One second moment per row, kept * moment + added * mean(grad^2): the update of RowRMS and RowAdagrad."""

    def __init__(self, table: Table, lr: float, eps: float, stochastic_rounding: bool, name: str):
        super().__init__(table, lr, eps, stochastic_rounding)
        self._name = name
        self.state[name] = self._state_table(name, 1)

    def _factors(self) -> tuple[float, float]:
        raise NotImplementedError

    def step(self, row_ids: Tensor, grad: Tensor) -> int:
        """Update rows once. row_ids: int64 [...]; grad: [..., dim]. Return the number of distinct rows touched."""
        ids, grad = self._prepare(row_ids, grad)
        if ids.numel() == 0:
            return 0
        salt, moment = self._salt(), self.state[self._name].tensor
        if kernels.native is None:
            return self._step_torch(ids, grad, moment, salt)
        entries = Entries(self.table, ids, grad)
        self.steps += 1
        table = self.table.struct
        addresses = (ctypes.addressof(table), moment.data_ptr(), entries.address, entries.done.data_ptr())
        rates = (self.lr, *self._factors(), self.eps)
        call = kernels.Call("rms", *addresses, *rates, salt or 0, salt is not None)
        return self._update(entries, call, table, moment)

    def _step_torch(self, ids: Tensor, grad: Tensor, moment: Tensor, salt: int | None) -> int:
        f32, t = reference.f32, self.table
        unique, summed = reference.group(t.check(ids).flatten(), grad)
        self.steps += 1
        kept, added = self._factors()
        new = f32(kept) * moment[unique, 0] + f32(added) * reference.mean_square(summed)
        scale = f32(self.lr) / (reference.sqrt(new) + f32(self.eps))
        rows = reference.read(t.tensor, unique, t.init == "normal", t.seed, t.std) - scale[:, None] * summed

        def write() -> None:
            moment[unique, 0] = new
            reference.write(t.tensor, unique, rows, t.init == "normal", salt)

        return self._store(unique, write)


class RowRMS(_RowMoment):
    """RMSprop with one second moment per row and no first moment (Adam with beta1 = 0, without bias correction).

        v   <- beta2 v + (1 - beta2) mean(grad^2)
        row <- row - lr grad / (sqrt(v) + eps)

    4 bytes of state per row. On rows of width 1 it is torch.optim.RMSprop(alpha=beta2) of the touched rows.

    Args:
        table: the rows to train. lr: learning rate. beta2: decay of v per step that touches the row. eps: as in torch.
        stochastic_rounding: for bfloat16 tables, round so that the expected row is exact.
    """

    def __init__(
        self,
        table: Table,
        lr: float = 0.01,
        beta2: float = 0.99,
        eps: float = 1e-8,
        stochastic_rounding: bool = True,
    ):
        if not 0 <= beta2 < 1:
            raise ValueError(f"beta2 must lie in [0, 1), got {beta2}")
        super().__init__(table, lr, eps, stochastic_rounding, "v")
        self.beta2 = float(beta2)

    def _factors(self) -> tuple[float, float]:
        return self.beta2, 1 - self.beta2


class RowAdagrad(_RowMoment):
    """Adagrad with one accumulator per row.

        sum <- sum + mean(grad^2)
        row <- row - lr grad / (sqrt(sum) + eps)

    4 bytes of state per row. On rows of width 1 it is torch.optim.Adagrad. Arguments: see RowRMS.
    """

    def __init__(self, table: Table, lr: float = 0.01, eps: float = 1e-10, stochastic_rounding: bool = True):
        super().__init__(table, lr, eps, stochastic_rounding, "sum")

    def _factors(self) -> tuple[float, float]:
        return 1.0, 1.0
