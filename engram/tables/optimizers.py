"""Row-sparse optimisers: row gradients -> updated rows. They touch the rows of the step and nothing else.

Duplicate rows of one step sum their gradients first, in the order in which they came, so a step is deterministic
whatever the number of threads. State lives beside the rows, in host memory or in a file next to the table's.
"""

from __future__ import annotations

import ctypes
import math
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from engram.tables import kernels, reference
from engram.tables.arguments import as_ids
from engram.tables.encoded import EncodedTable
from engram.tables.protocol import Table
from engram.tables.table import HostTable

SMALLEST = 512  # distinct rows below which one core is faster than two


class Gradient(ctypes.Structure):
    """Mirror of `Gradient` in kernels.c."""

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
        address: of the C struct. held: what it points into.

    Raises:
        IndexError: a row outside the table; nothing was changed.
    """

    def __init__(self, table: HostTable, ids: Tensor, grad: Tensor):
        n = ids.numel()
        if n >= 1 << 30:
            raise ValueError(f"one step updates fewer than 2**30 row ids, not {n:,}")
        capacity = 1 << (2 * n - 1).bit_length()
        self._arrays = getattr(_scratch, "arrays", None)
        _scratch.arrays = None  # not shared: a step that is cut short keeps them
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
        self.address = ctypes.byref(self._struct)
        self.held = (table.tensor, ids, grad, self)

    def give_back(self) -> None:
        """Leave the arrays to the next step; `unique` is not valid after that."""
        _scratch.arrays = self._arrays


class RowOptimizer:
    """What the row optimisers share: checks, the step count, learning rate, state in and out."""

    def __init__(self, table: Table, lr: float, eps: float, stochastic_rounding: bool):
        if isinstance(table, EncodedTable):
            raise ValueError(
                f"{table} cannot be trained: its rows are stored as {table.codec.name}. Train, then encode"
            )
        if not isinstance(table, HostTable):
            raise TypeError(f"a row optimizer trains the rows of a HostTable, not of a {type(table).__name__}")
        if not (0 <= lr < math.inf and 0 <= eps < math.inf):
            raise ValueError(f"lr and eps must be finite and not negative, got lr={lr}, eps={eps}")
        table.check_writable()
        self.table, self.lr, self.eps = table, float(lr), float(eps)
        self.stochastic_rounding = stochastic_rounding
        self.steps = 0
        self.state: dict[str, HostTable] = {}
        self._was_written = False  # the state was filled by a load
        self._unfinished: tuple[Tensor, Tensor] | None = None  # rows of a step under way, and which of them are done
        table.optimizers.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)  # of a deep copy, with the copy of its table
        self.table.optimizers.add(self)

    def _state_table(self, name: str, dim: int, each: int = 1) -> HostTable:
        """State with `each` rows of width `dim` for every row of the table, beside it in memory or on disk. Always new:
        a file from before says nothing of the steps that it was made in."""
        size = each * self.table.rows, dim, torch.float32
        if self.table.path is None:
            return HostTable(*size)
        path = self.table.path.with_name(f"{self.table.path.name}.{name}")
        if path.exists():
            try:
                HostTable(*size, path).close()  # raises if another optimiser has it, or if it is something else
            except BlockingIOError as error:
                raise BlockingIOError(
                    error.errno,
                    f"{path} is held by an earlier optimizer of these rows: close() that optimizer (a traceback or a "
                    f"notebook may keep it alive), or close() the memory and open it again",
                ) from None
            path.unlink()
        return HostTable(*size, path)

    def _prepare(self, row_ids: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Ids as they will be read (their range is checked with the grouping) and the gradient as float32 [n, dim]."""
        ids = as_ids(row_ids)
        if tuple(grad.shape) != (*row_ids.shape, self.table.dim) or grad.is_complex():
            kind = "" if grad.is_floating_point() else f" of {grad.dtype}"
            raise ValueError(
                f"row ids {tuple(row_ids.shape)} need a real gradient {(*row_ids.shape, self.table.dim)}, "
                f"not {tuple(grad.shape)}{kind}"
            )
        self.table.check_writable()
        if (left := self.interrupted) is not None:
            warnings.warn(
                f"the last step of this {type(self).__name__} was interrupted before it came to {len(left):,} of its "
                f"rows (.interrupted): they have not learned from that step. Load a checkpoint to repeat it as a whole",
                stacklevel=3,
            )
            self.resume()
        self.table.changed(ids)
        for state in self.state.values():
            if state.path is not None:  # the rows' own pages are here since the forward pass, their state's may not be
                state.prefetch(self.table.check(ids) * (state.rows // self.table.rows))
        return ids, grad.detach().to("cpu", torch.float32).reshape(-1, self.table.dim).contiguous()

    def step(self, row_ids: Tensor, grad: Tensor) -> int:
        """One update. row_ids int64 [...], grad [..., dim]. Returns the number of distinct rows touched."""
        raise NotImplementedError

    @property
    def interrupted(self) -> Tensor | None:
        """Rows int64 [n] that the last step has left as they were, with their state, because it was interrupted
        (KeyboardInterrupt); all its other rows are updated. None if it ended as a whole. The next step, or loading a
        state, sets it to None."""
        if self._unfinished is None:
            return None
        rows, done = self._unfinished
        left = rows[done == 0]
        return left if left.numel() else None

    def resume(self) -> None:
        """Go on after an interrupted step without a warning."""
        self._unfinished = None

    def _update(self, entries: Entries, work: Callable[[int, int], Any], *held: Any) -> int:
        """Spread an update over the rows of a step. If it is interrupted, each row is updated as a whole or not at all,
        and `interrupted` names those that are not."""
        self._unfinished = entries.unique, entries.done
        kernels.spread(len(entries.unique), SMALLEST, work, *held, *entries.held)
        self._unfinished = None
        entries.give_back()
        return len(entries.done)

    def _store(self, rows: Tensor, write: Callable[[], None]) -> int:
        """`_update` without kernels: `write` stores the new rows and their state, out of reach of interrupts."""
        done = torch.zeros(len(rows), dtype=torch.uint8, device="cpu")
        self._unfinished = rows, done

        def work() -> None:
            write()
            done.fill_(1)

        kernels.shielded(work)
        self._unfinished = None
        return len(rows)

    def _salt(self) -> int | None:
        """Seed of this step's stochastic rounding: a function of (table seed, step), so resuming repeats it."""
        rounds = self.stochastic_rounding and self.table.dtype == torch.bfloat16
        return (self.table.seed * 1_000_003 + self.steps) & (2**63 - 1) if rounds else None

    @property
    def nbytes(self) -> int:
        """Bytes of optimiser state."""
        return sum(state.nbytes for state in self.state.values())

    @property
    def _is_written(self) -> bool:
        return self._was_written or self.steps > 0

    def state_dict(self, whole: bool = False) -> dict[str, Any]:
        """{"steps": int, name: tensor view of the state}; the tensors are the live state, not a copy. {"steps": 0}
        where nothing was written yet, unless `whole`: who copies a fresh optimiser (accelerate does) writes none of its
        pages."""
        written = {name: state.tensor for name, state in self.state.items() if whole or self._is_written}
        return {"steps": self.steps, **written}

    def check_state(self, saved: dict[str, Any]) -> None:
        """Raises ValueError where load_state_dict would."""
        if saved == {"steps": 0}:
            return
        if set(saved) != {"steps", *self.state}:
            raise ValueError(f"{type(self).__name__} has state {sorted(self.state)}, the saved one {sorted(saved)}")
        for name, state in self.state.items():
            if saved[name].shape != state.tensor.shape:
                raise ValueError(
                    f"optimiser state {name!r} is {tuple(saved[name].shape)}, table needs {tuple(state.tensor.shape)}"
                )

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """{"steps": 0} makes any optimiser fresh.

        Raises:
            ValueError: state of another optimiser or table; nothing was changed.
        """
        self.check_state(saved)
        self.table.check_writable()
        self._unfinished = None
        if saved == {"steps": 0}:
            for state in self.state.values() if self._is_written else ():
                state.tensor.zero_()
            self.steps, self._was_written = 0, False
            return
        for name, state in self.state.items():
            if saved[name].data_ptr() != state.tensor.data_ptr():  # else it was read in place
                state.tensor.copy_(saved[name])
        self.steps, self._was_written = int(saved["steps"]), True

    def close(self) -> None:
        """Let the state go, with its files. A step after that raises ValueError. Twice is fine."""
        for state in self.state.values():
            state.close()


class _RowMoment(RowOptimizer):
    """One second moment per row, kept * moment + added * mean(grad^2): what RowRMS and RowAdagrad share."""

    def __init__(self, table: Table, lr: float, eps: float, stochastic_rounding: bool, name: str):
        super().__init__(table, lr, eps, stochastic_rounding)
        self._name = name
        self.state[name] = self._state_table(name, 1)

    def _factors(self) -> tuple[float, float]:
        raise NotImplementedError

    def step(self, row_ids: Tensor, grad: Tensor) -> int:
        """One update. row_ids int64 [...], grad [..., dim]. Returns the number of distinct rows touched."""
        ids, grad = self._prepare(row_ids, grad)
        if ids.numel() == 0:
            return 0
        salt, moment = self._salt(), self.state[self._name].tensor
        if kernels.native is None:
            return self._step_torch(ids, grad, moment, salt)
        entries = Entries(self.table, ids, grad)
        self.steps += 1
        update, table, address = kernels.native.engram_rms, self.table.struct, entries.address
        fixed = (entries.done.data_ptr(), self.lr, *self._factors(), self.eps, salt is not None, salt or 0)
        state = moment.data_ptr()
        return self._update(entries, lambda lo, hi: update(table, state, address, lo, hi, *fixed), moment)

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
        """One update. row_ids int64 [...], grad [..., dim]. Returns the number of distinct rows touched."""
        ids, grad = self._prepare(row_ids, grad)
        if ids.numel() == 0:
            return 0
        salt, moments = self._salt(), self.state["moments"].tensor
        if kernels.native is None:
            return self._step_torch(ids, grad, salt)
        entries = Entries(self.table, ids, grad)
        self.steps += 1
        b1, b2 = self.betas
        update, table, address = kernels.native.engram_adam, self.table.struct, entries.address
        rates = (self._step_size(), b1, 1 - b1, b2, 1 - b2, self.eps)
        fixed = (entries.done.data_ptr(), *rates, salt is not None, salt or 0)
        state = moments.data_ptr()
        return self._update(entries, lambda lo, hi: update(table, state, address, lo, hi, *fixed), moments)

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
