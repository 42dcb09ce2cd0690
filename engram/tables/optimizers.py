"""Row-sparse optimisers: row gradients -> updated rows. They touch the rows of the step and nothing else.

Duplicate rows of one step sum their gradients first, in the order in which they came, so a step is deterministic
whatever the number of threads. State lives beside the rows, in host memory or in a file next to the table's.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from engram.tables import kernels, reference
from engram.tables.table import HostTable

_SMALLEST = 512  # distinct rows below which one core is faster than two


class _Gradient(ctypes.Structure):
    """Mirror of `Gradient` in kernels.c, with the tensors it points into."""

    _fields_ = [
        ("unique", ctypes.c_void_p),
        ("start", ctypes.c_void_p),
        ("order", ctypes.c_void_p),
        ("grad", ctypes.c_void_p),
    ]


def _group(ids: Tensor, grad: Tensor) -> tuple[_Gradient, int, list[Tensor]]:
    """Sorts the entries of one step by row: what the fused updates read."""
    n = ids.numel()
    capacity = 1 << (2 * n - 1).bit_length()
    slots = torch.full((capacity,), -1, dtype=torch.int64)
    which, unique, order = (torch.empty(n, dtype=torch.int64) for _ in range(3))
    start = torch.empty(n + 1, dtype=torch.int64)
    assert kernels.native is not None
    group = kernels.native.engram_group
    group.restype = ctypes.c_int64
    distinct = group(
        kernels.pointer(ids),
        ctypes.c_int64(n),
        kernels.pointer(slots),
        ctypes.c_int64(capacity),
        *(kernels.pointer(a) for a in (which, unique, start, order)),
    )
    keep = [ids, grad, unique, start, order]
    return _Gradient(*(a.data_ptr() for a in (unique, start, order, grad))), distinct, keep


class _RowOptimizer:
    """What both optimisers share: checks, the step count, learning rate, state in and out."""

    def __init__(self, table: HostTable, lr: float, eps: float, stochastic_rounding: bool):
        if lr < 0 or eps < 0:
            raise ValueError(f"lr and eps must not be negative, got lr={lr}, eps={eps}")
        table.check_writable()
        self.table, self.lr, self.eps = table, float(lr), float(eps)
        self.stochastic_rounding = stochastic_rounding
        self.steps = 0
        self.state: dict[str, HostTable] = {}

    def _state_table(self, name: str, dim: int) -> HostTable:
        path = None if self.table.path is None else self.table.path.with_name(f"{self.table.path.name}.{name}")
        return HostTable(self.table.rows, dim, torch.float32, path)

    def _prepare(self, row_ids: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        ids = self.table.check(row_ids).flatten()
        if grad.numel() != ids.numel() * self.table.dim:
            raise ValueError(
                f"row ids {tuple(row_ids.shape)} need a gradient {(*row_ids.shape, self.table.dim)}, "
                f"not {tuple(grad.shape)}"
            )
        self.table.changed(ids)
        return ids, grad.detach().to("cpu", torch.float32).reshape(-1, self.table.dim).contiguous()

    def _salt(self) -> int | None:
        """Seed of this step's stochastic rounding: a function of (table seed, step), so resuming repeats it."""
        rounds = self.stochastic_rounding and self.table.dtype == torch.bfloat16
        return (self.table.seed * 1_000_003 + self.steps) & (2**63 - 1) if rounds else None

    @property
    def nbytes(self) -> int:
        """Bytes of optimiser state."""
        return sum(state.nbytes for state in self.state.values())

    def state_dict(self) -> dict[str, Any]:
        """{"steps": int, name: tensor view of the state}; the tensors are the live state, not a copy."""
        return {"steps": self.steps, **{name: state.tensor for name, state in self.state.items()}}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Raises ValueError where the saved state belongs to another optimiser or table."""
        if set(saved) != {"steps", *self.state}:
            raise ValueError(f"{type(self).__name__} has state {sorted(self.state)}, the saved one {sorted(saved)}")
        for name, state in self.state.items():
            if saved[name].shape != state.tensor.shape:
                raise ValueError(
                    f"optimiser state {name!r} is {tuple(saved[name].shape)}, table needs {tuple(state.tensor.shape)}"
                )
            state.tensor.copy_(saved[name])
        self.steps = int(saved["steps"])

    def close(self) -> None:
        for state in self.state.values():
            state.close()


class RowRMS(_RowOptimizer):
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
        table: HostTable,
        lr: float = 0.01,
        beta2: float = 0.99,
        eps: float = 1e-8,
        stochastic_rounding: bool = True,
    ):
        super().__init__(table, lr, eps, stochastic_rounding)
        self.beta2 = float(beta2)
        self.state["v"] = self._state_table("v", 1)

    def step(self, row_ids: Tensor, grad: Tensor) -> int:
        """One update. row_ids int64 [...], grad [..., dim]. Returns the number of distinct rows touched."""
        ids, grad = self._prepare(row_ids, grad)
        if ids.numel() == 0:
            return 0
        salt, v = self._salt(), self.state["v"].tensor
        self.steps += 1
        if kernels.native is None:
            return self._step_torch(ids, grad, v, salt)
        gradient, distinct, keep = _group(ids, grad)
        update, table, c = kernels.native.engram_rms, self.table.struct, ctypes
        floats = (c.c_float(x) for x in (self.lr, self.beta2, 1 - self.beta2, self.eps))
        fixed = (*floats, c.c_int32(salt is not None), c.c_uint64(salt or 0))
        moment, entries = kernels.pointer(v), c.byref(gradient)
        kernels.spread(
            distinct,
            _SMALLEST,
            lambda lo, hi: update(table, moment, entries, c.c_int64(lo), c.c_int64(hi), *fixed),
        )
        del keep
        return distinct

    def _step_torch(self, ids: Tensor, grad: Tensor, v: Tensor, salt: int | None) -> int:
        f32, t = reference.f32, self.table
        unique, summed = reference.group(ids, grad)
        moment = f32(self.beta2) * v[unique, 0] + f32(1 - self.beta2) * reference.mean_square(summed)
        v[unique, 0] = moment
        scale = f32(self.lr) / (reference.sqrt(moment) + f32(self.eps))
        rows = reference.read(t.tensor, unique, t.init == "normal", t.seed, t.std) - scale[:, None] * summed
        reference.write(t.tensor, unique, rows, t.init == "normal", salt)
        return unique.numel()


class RowAdam(_RowOptimizer):
    """Adam on the touched rows, as torch.optim.SparseAdam defines it: untouched moments do not decay, and the bias
    correction counts the steps of the whole table. 8 bytes of state per element.

    Args:
        table, lr, eps, stochastic_rounding: see RowRMS. betas: decay of the first and second moment.
    """

    def __init__(
        self,
        table: HostTable,
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        stochastic_rounding: bool = True,
    ):
        super().__init__(table, lr, eps, stochastic_rounding)
        self.betas = (float(betas[0]), float(betas[1]))
        self.state["m"] = self._state_table("m", table.dim)
        self.state["v"] = self._state_table("v", table.dim)

    def step(self, row_ids: Tensor, grad: Tensor) -> int:
        """One update. row_ids int64 [...], grad [..., dim]. Returns the number of distinct rows touched."""
        ids, grad = self._prepare(row_ids, grad)
        if ids.numel() == 0:
            return 0
        salt, m, v = self._salt(), self.state["m"].tensor, self.state["v"].tensor
        self.steps += 1
        b1, b2 = self.betas
        step_size = self.lr * math.sqrt(1 - b2**self.steps) / (1 - b1**self.steps)
        if kernels.native is None:
            return self._step_torch(ids, grad, m, v, step_size, salt)
        gradient, distinct, keep = _group(ids, grad)
        update, table, c = kernels.native.engram_adam, self.table.struct, ctypes
        floats = (c.c_float(x) for x in (step_size, b1, 1 - b1, b2, 1 - b2, self.eps))
        fixed = (*floats, c.c_int32(salt is not None), c.c_uint64(salt or 0))
        first, second, entries = kernels.pointer(m), kernels.pointer(v), c.byref(gradient)
        kernels.spread(
            distinct,
            _SMALLEST,
            lambda lo, hi: update(table, first, second, entries, c.c_int64(lo), c.c_int64(hi), *fixed),
        )
        del keep
        return distinct

    def _step_torch(self, ids: Tensor, grad: Tensor, m: Tensor, v: Tensor, step_size: float, salt: int | None) -> int:
        f32, t = reference.f32, self.table
        b1, b2 = self.betas
        unique, summed = reference.group(ids, grad)
        first = f32(b1) * m[unique] + f32(1 - b1) * summed
        second = f32(b2) * v[unique] + f32(1 - b2) * (summed * summed)
        m[unique], v[unique] = first, second
        rows = reference.read(t.tensor, unique, t.init == "normal", t.seed, t.std)
        rows = rows - f32(step_size) * (first / (reference.sqrt(second) + f32(self.eps)))
        reference.write(t.tensor, unique, rows, t.init == "normal", salt)
        return unique.numel()
