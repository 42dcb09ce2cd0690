"""RowOptimizer: checks, steps and state that the row optimizers share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engram.tables import kernels
from engram.tables.arguments import as_ids
from engram.tables.encoded import EncodedTable
from engram.tables.optimizers.entries import SMALLEST, Entries
from engram.tables.protocol import Table
from engram.tables.table import HostTable


class RowOptimizer:
    """A row-sparse optimizer of one table: checks, step count, learning rate, and state that is saved and loaded."""

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
        self._was_written = False  # True if a load filled the state
        self._unfinished: tuple[Tensor, Tensor] | None = None  # rows of a running step, and which of them are done
        table.optimizers.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)  # a deep copy, with the copy of its table
        self.table.optimizers.add(self)

    def _state_table(self, name: str, dim: int, each: int = 1) -> HostTable:
        """Make state with `each` rows of width `dim` per row of the table, beside it in memory or on disk. Always new:
        an existing file does not record the steps that it was made in."""
        size = each * self.table.rows, dim, torch.float32
        if self.table.path is None:
            return HostTable(*size)
        path = self.table.path.with_name(f"{self.table.path.name}.{name}")
        if path.exists():
            try:
                HostTable(*size, path).close()  # raises if another optimizer has it, or if it has another size
            except BlockingIOError as error:
                raise BlockingIOError(
                    error.errno,
                    f"{path} is locked by an earlier optimizer of these rows: close() that optimizer (a traceback or a "
                    f"notebook may keep it alive), or close() the memory and open it again",
                ) from None
            path.unlink()
        return HostTable(*size, path)

    def _prepare(self, row_ids: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ids (their range is checked when they are grouped) and the gradient as float32 [n, dim]."""
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
                f"the last step of this {type(self).__name__} was interrupted before it updated {len(left):,} of its "
                f"rows (.interrupted). Load a checkpoint to repeat that step completely",
                stacklevel=3,
            )
            self.resume()
        for state in self.state.values():
            if state.path is not None:  # the forward pass has read the pages of the rows, but not those of their state
                state.prefetch(self.table.check(ids) * (state.rows // self.table.rows))
        return ids, grad.detach().to("cpu", torch.float32).reshape(-1, self.table.dim).contiguous()

    def step(self, row_ids: Tensor, grad: Tensor) -> int:
        """Update rows once. row_ids: int64 [...]; grad: [..., dim]. Return the number of distinct rows touched."""
        raise NotImplementedError

    @property
    def interrupted(self) -> Tensor | None:
        """Rows int64 [n] that the last step did not change, nor their state, because it was interrupted
        (KeyboardInterrupt); all its other rows are updated. None if it was complete. The next step, or loading a state,
        sets it to None."""
        if self._unfinished is None:
            return None
        rows, done = self._unfinished
        left = rows[done == 0]
        return left if left.numel() else None

    def resume(self) -> None:
        """Continue after an interrupted step without a warning."""
        self._unfinished = None

    def _update(self, entries: Entries, work: Callable[[int, int], Any], *buffers: Any) -> int:
        """Spread an update over the rows of a step. If it is interrupted, each row is updated completely or not at all,
        and `interrupted` names those that are not."""
        self._unfinished = entries.unique, entries.done
        kernels.spread(len(entries.unique), SMALLEST, work, *buffers, *entries.buffers)
        self._unfinished = None
        entries.give_back()
        return len(entries.done)

    def _store(self, rows: Tensor, write: Callable[[], None]) -> int:
        """Do `_update` without kernels: `write` stores the new rows and their state, and no interrupt stops it."""
        done = torch.zeros(len(rows), dtype=torch.uint8, device="cpu")
        self._unfinished = rows, done

        def work() -> None:
            write()
            done.fill_(1)

        kernels.shielded(work)
        self._unfinished = None
        return len(rows)

    def _salt(self) -> int | None:
        """Return this step's seed of stochastic rounding, from the table's seed and the step: resuming repeats it."""
        rounds = self.stochastic_rounding and self.table.dtype == torch.bfloat16
        return (self.table.seed * 1_000_003 + self.steps) & (2**63 - 1) if rounds else None

    @property
    def nbytes(self) -> int:
        """Bytes of optimizer state."""
        return sum(state.nbytes for state in self.state.values())

    @property
    def _is_written(self) -> bool:
        return self._was_written or self.steps > 0

    def state_dict(self, unwritten: bool = False) -> dict[str, Any]:
        """Return {"steps": int, name: tensor view of the state}; the tensors are the live state, not a copy. Before the
        first step, return {"steps": 0} alone, unless `unwritten`: a copy of a fresh optimizer (accelerate makes one)
        then writes none of its pages."""
        written = {name: state.tensor for name, state in self.state.items() if unwritten or self._is_written}
        return {"steps": self.steps, **written}

    def check_state(self, saved: dict[str, Any]) -> None:
        """Raise ValueError if load_state_dict would."""
        if saved == {"steps": 0}:
            return
        if set(saved) != {"steps", *self.state}:
            raise ValueError(f"{type(self).__name__} has state {sorted(self.state)}, the saved one {sorted(saved)}")
        for name, state in self.state.items():
            if saved[name].shape != state.tensor.shape:
                raise ValueError(
                    f"optimizer state {name!r} is {tuple(saved[name].shape)}, table needs {tuple(state.tensor.shape)}"
                )

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Load what state_dict returned. {"steps": 0} makes any optimizer fresh.

        Raises:
            ValueError: state of another optimizer or table; nothing was changed.
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
            if saved[name].data_ptr() != state.tensor.data_ptr():  # equal if it was read in place
                state.tensor.copy_(saved[name])
        self.steps, self._was_written = int(saved["steps"]), True

    def close(self) -> None:
        """Release the state and its files. A later step raises ValueError. Closing twice does nothing more."""
        for state in self.state.values():
            state.close()
