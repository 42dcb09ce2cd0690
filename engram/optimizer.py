"""build_optimizer: dense weights and table rows in one torch optimizer, for any scheduler and training loop."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from engram.memory import EngramMemory, check_processes
from engram.memory.digests import match_weights, weight_digests
from engram.tables.optimizers import RowAdagrad, RowAdam, RowOptimizer, RowRMS, RowSinkhorn
from engram.tables.protocol import Table


class EngramOptimizer(torch.optim.AdamW):
    """AdamW on the dense weights and a row-sparse optimizer on each table. Made by build_optimizer.

    One of .param_groups is named "tables"; it holds no parameters, but its "lr" is the tables', so a learning rate
    scheduler moves both. .row_optimizers lists the row optimizers, .touched the distinct rows of the last step.
    """

    def __init__(
        self, groups: list[dict[str, Any]], memories: list[EngramMemory], rows: list[dict[int, Any]], **kwargs: Any
    ):
        super().__init__(groups, **kwargs)
        self.memories, self.rows = memories, rows
        self.touched = 0
        self._progress: list[str] | None = None  # what the running step has updated; None between steps
        # Memory number -> digests of the fusion weights that a loaded state belongs to
        self._saved_beside: dict[int, str | dict[str, str]] = {}
        for memory in memories:
            memory.gradients.has_optimizer = True
        self._check_processes()

    def __getstate__(self) -> dict[str, Any]:
        own = {name: self.__dict__[name] for name in ("memories", "rows", "touched", "_saved_beside", "_progress")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for memory in self.memories:
            memory.gradients.has_optimizer = True

    @property
    def row_optimizers(self) -> list[RowOptimizer]:
        """The row optimizers of all memories and layers."""
        return [optimizer for layers in self.rows for optimizer in layers.values()]

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state, of weights and rows."""
        dense = sum(v.nbytes for s in self.state.values() for v in s.values() if isinstance(v, torch.Tensor))
        return dense + sum(optimizer.nbytes for optimizer in self.row_optimizers)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Update the dense weights and the rows that the backward passes since zero_grad() touched.

        With torch.amp.GradScaler.step, row gradients are divided too; if the scaler or a row gradient has infinities,
        nothing is updated. If the step is interrupted, each row is unchanged or completely updated, and the gradients
        of updated layers are dropped, so that no later step applies them twice: see `interrupted`.

        Raises:
            RuntimeError: several processes train (engram.memory.check_processes). Or GradScaler.unscale_ was called,
            which does not divide row gradients.
        """
        self._check_processes()
        self.touched = 0
        scale, infinite = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if infinite is not None:  # GradScaler sets both during this call
            kept = [pending for memory in self.memories for pending in memory.gradients.values()]
            if scale is None and any(kept):
                del self.__dict__["grad_scale"], self.__dict__["found_inf"]  # an error would leave them set
                raise RuntimeError(
                    "GradScaler.unscale_ divides the gradients of weights, but not those of table rows: train in "
                    "bfloat16, or leave unscale_ out (with transformers' Trainer: bf16=True instead of fp16=True, or "
                    "max_grad_norm=0)"
                )
            if infinite or not all(grad.isfinite().all() for pending in kept for _, grad in pending):
                return None
        self._check_weights()
        if self.interrupted is not None:
            warnings.warn(f"the last step was interrupted: {self.interrupted}", stacklevel=2)
            for row_optimizer in self.row_optimizers:
                row_optimizer.resume()
        self._progress = []
        try:
            loss = _dense_step(self, closure)
            self._progress.append("the dense weights")
            lr = next(group["lr"] for group in self.param_groups if group.get("name") == "tables")
            for memory, layers in zip(self.memories, self.rows, strict=True):
                self._warn_of_unused_rows(memory, layers)
                for layer, optimizer in layers.items():
                    self._step_rows(memory, layer, optimizer, lr, scale)
                    self._progress.append(self._name(memory, layer))
        except BaseException as error:
            error.add_note(f"optimizer.step() was interrupted: {self.interrupted}")
            raise
        self._progress = None
        return loss

    def _step_rows(
        self, memory: EngramMemory, layer: int, optimizer: RowOptimizer, lr: float, scale: torch.Tensor | None
    ) -> None:
        """Update the rows of one layer with the gradients that wait for it. They are taken before the first row
        changes: if this is interrupted, no later step applies them again."""
        memory.gradients.drop_stale(layer, memory.fusions[str(layer)])
        pending = list(memory.gradients[layer])
        if not pending:
            return
        optimizer.lr = lr
        if len(pending) == 1:
            ids, grad = pending[0]
        else:  # gradient accumulation: duplicates across passes sum like those within one
            ids = torch.cat([ids.flatten() for ids, _ in pending])
            grad = torch.cat([grad.flatten(0, -2).cpu() for _, grad in pending])
        if scale is not None:
            grad = grad / scale.to(grad.device)
        began = time.perf_counter()
        memory.recalls_are_stale = True  # until they are patched, also if an error comes first
        memory.gradients[layer].clear()
        self.touched += optimizer.step(ids, grad)
        memory.patch(layer, ids)
        memory.recalls_are_stale = False
        memory.clock["updating"] += time.perf_counter() - began

    def _name(self, memory: EngramMemory, layer: int) -> str:
        which = f" of memory {self.memories.index(memory)}" if len(self.memories) > 1 else ""
        return f"the rows of layer {layer}{which}"

    def _warn_of_unused_rows(self, memory: EngramMemory, layers: dict[int, Any]) -> None:
        unused = layers and not memory.training and not any(memory.gradients.values())
        if unused and any(weight.grad is not None for weight in memory.fusions.parameters()):
            warnings.warn(
                "the fusion weights of this memory learn and its rows do not: it is in eval() mode, in which rows "
                "are only read. Call model.train() before training, or memory.requires_grad_(False) to freeze both",
                stacklevel=3,
            )

    @property
    def interrupted(self) -> str | None:
        """Text that names what the last step updated and what it did not, if it was interrupted (KeyboardInterrupt,
        an error) after it had begun; else None. Each row is unchanged or completely updated. The next step warns of it
        and continues from there, with the gradients of new backward passes; loading a state, as of a checkpoint, sets
        it to None."""
        if self._progress is None:
            return None
        left = []
        for memory, layers in zip(self.memories, self.rows, strict=True):
            for layer, optimizer in layers.items():
                name, rows = self._name(memory, layer), optimizer.interrupted
                if rows is not None:
                    left.append(f"{len(rows):,} of {name}")
                elif name not in self._progress:
                    left.append(name)
        done = " and ".join(self._progress) or "nothing, or some of the dense weights"
        return (
            f"it has updated {done}{', but not ' if left else ''}{' and '.join(left)}. Load the last checkpoint to "
            f"repeat it completely; training that continues from here leaves out the rest of that step"
        )

    def close(self) -> None:
        """Release the state of the rows and its files, so that another optimizer can be built. Later steps raise."""
        for row_optimizer in self.row_optimizers:
            row_optimizer.close()

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for memory in self.memories:
            for pending in memory.gradients.values():
                pending.clear()

    def _check_processes(self) -> None:
        if self.row_optimizers:
            check_processes()

    def state_dict(self) -> dict[str, Any]:
        """Return AdamW's state dict with the state of the rows.

        The state of a table's rows (live tensors) lies under "rows" in the state of a weight of its fusion module (of
        another weight, if none of them is trained), as "<number of the memory>.<layer>": code that moves the state of
        weights also moves that of rows. Digests of the fusion weights that it belongs to lie beside it.
        """
        if self.interrupted is not None:
            warnings.warn(f"this is the state after a step that was interrupted: {self.interrupted}", stacklevel=2)
        saved = super().state_dict()
        state = {key: dict(values) for key, values in saved["state"].items()}
        numbers = {id(p): i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        for number, (memory, layers) in enumerate(zip(self.memories, self.rows, strict=True)):
            digests = weight_digests(memory.fusions) if layers else {}
            for layer, optimizer in layers.items():
                weights = memory.fusions[str(layer)].parameters()
                # Without a trained weight, use a name: torch keeps keys that are not numbers too
                home = next((numbers[id(w)] for w in weights if id(w) in numbers), 0 if numbers else "tables")
                values = {**optimizer.state_dict(unwritten=bool(self.state)), "beside": digests}
                state.setdefault(home, {}).setdefault("rows", {})[f"{number}.{layer}"] = values
        return {**saved, "state": state}

    def _check_weights(self) -> None:
        """Raise RuntimeError if the loaded state belongs to other weights. Called at the first step after a load, when
        the weights have been loaded too."""
        for number, saved in self._saved_beside.items():
            if not match_weights(self.memories[number].fusions, saved):
                raise RuntimeError(
                    "this optimizer's state was saved beside other weights of the memory than it has now, so training "
                    "would continue with other rows: load the memory's state too (checkpoints that PEFT writes have "
                    "only adapters: add engram.MemoryCallback() to the Trainer, or memory.save beside them and "
                    "engram.attach(model, folder) to continue). To train the present rows, build a new optimizer"
                )
        self._saved_beside = {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what state_dict() returned, also in versions that kept "rows" and "memories" beside "state".

        Raises:
            ValueError: the saved state belongs to other tables or another kind of optimizer. RuntimeError: several
            processes train; at the next step, rows were trained in the saved state and the memory has other weights
            than it was saved beside.
        """
        self._check_processes()
        state, rows = _split(state_dict)
        own = {f"{m}.{layer}": o for m, layers in enumerate(self.rows) for layer, o in layers.items()}
        if set(rows) != set(own):
            raise ValueError(
                f"the saved optimizer state has the rows of {sorted(rows) or 'no table'}, this optimizer trains "
                f"{sorted(own) or 'none'} (number of the memory.layer): it belongs to another model"
            )
        for key, optimizer in own.items():
            optimizer.check_state(rows[key][0])
        super().load_state_dict({**state_dict, "state": state})
        self._saved_beside, self._progress = {}, None
        for key, optimizer in own.items():
            values, beside = rows[key]
            optimizer.load_state_dict(values)
            if optimizer.steps and beside:  # rows that were never trained are the current ones
                self._saved_beside[int(key.partition(".")[0])] = beside


def _split(state_dict: dict[str, Any]) -> tuple[dict[Any, Any], dict[str, tuple[dict[str, Any], Any]]]:
    """Return the state of the weights, and {"<number of the memory>.<layer>": (state of the rows, the digests that it
    was saved beside)}.

    Raises:
        ValueError: the state does not come from such an optimizer.
    """
    try:
        state = {key: {k: v for k, v in values.items() if k != "rows"} for key, values in state_dict["state"].items()}
        rows = {k: dict(v) for values in state_dict["state"].values() for k, v in values.get("rows", {}).items()}
        for number, layers in enumerate(state_dict.get("rows", ())):
            beside = dict(enumerate(state_dict.get("memories", ()))).get(number)
            rows |= {f"{number}.{layer}": {**values, "beside": beside} for layer, values in layers.items()}
        pairs = {key: (values, values.pop("beside", None)) for key, values in rows.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"this is not the state of an optimizer of build_optimizer: {error!r}") from error
    return {key: values for key, values in state.items() if values}, pairs


def _dense_step(optimizer: EngramOptimizer, closure: Callable[[], float] | None) -> Any:
    """Run AdamW's step without the hooks that torch adds to it once a plain AdamW exists: the optimizer's own step has
    them already, and each would be called twice."""
    step = torch.optim.AdamW.step
    if getattr(step, "hooked", False):
        step = getattr(step, "__wrapped__", step)
    return step(optimizer, closure)


def build_optimizer(
    model: nn.Module,
    lr: float = 3e-3,
    table_lr: float = 0.03,
    *,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    table_optimizer: str = "rms",
    table_betas: tuple[float, float] | None = None,
) -> EngramOptimizer:
    """Return one optimizer for all trained weights and rows of a model with (or without) engram memory.

    Args:
        model: any module; the tables of the EngramMemory modules in it are trained too. A memory alone works too.
        lr, betas, eps, weight_decay: AdamW of the dense weights. Only matrices decay: no gains, biases or convolutions.
        table_lr: learning rate of the rows, usually well above the dense one; rows never decay.
        table_optimizer: "rms" or "adagrad" (4 bytes of state per row), "adam" (8 bytes per value) or "sinkhorn" (4
            bytes per value and 4 per row).
        table_betas: decays of the row optimizer; default (0, 0.99) for rms, (0.9, 0.999) for adam, (0.95, 0) for
            sinkhorn, which uses only the first; adagrad has none.

    Returns:
        A torch.optim.Optimizer: step(), zero_grad(), state_dict() and load_state_dict() cover weights and rows.

    Raises:
        ValueError: an unknown table_optimizer; rates or decays that are out of range. RuntimeError: several processes
        train, which is not supported yet.

    Example:
        >>> import torch
        >>> from engram import EngramConfig, EngramMemory, TokenMap, build_optimizer
        >>> config = EngramConfig(layers=(1,), orders=(2, 3), heads=2, head_dim=8, rows_per_head=500)
        >>> memory = EngramMemory(config, TokenMap.identity(100), hidden_size=16)
        >>> optimizer = build_optimizer(memory, lr=1e-3, table_lr=0.03)
        >>> hidden = torch.randn(1, 4, 16)
        >>> memory[1](hidden, memory.recall(torch.tensor([[5, 7, 5, 7]]))).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.touched  # rows of 3 bigrams and 4 trigrams, 2 heads each
        14
    """
    make: dict[str, Callable[[Table], RowOptimizer]] = {
        "rms": lambda table: RowRMS(table, table_lr, (table_betas or (0.0, 0.99))[1]),
        "adam": lambda table: RowAdam(table, table_lr, table_betas or (0.9, 0.999)),
        "adagrad": lambda table: RowAdagrad(table, table_lr),
        "sinkhorn": lambda table: RowSinkhorn(table, table_lr, (table_betas or (0.95, 0.0))[0]),
    }
    if table_betas is not None and len(table_betas) != 2:
        raise ValueError(f"table_betas must be two numbers, not {table_betas}")
    if table_optimizer not in make:
        raise ValueError(f"table_optimizer must be one of {', '.join(map(repr, make))}, not {table_optimizer!r}")
    memories = [module for module in model.modules() if isinstance(module, EngramMemory)]
    rows: list[dict[int, Any]] = []
    try:
        for memory in memories:
            rows.append({})
            for layer, table in memory.tables.items() if memory.trains_tables else ():
                rows[-1][layer] = make[table_optimizer](table)
    except BaseException:
        for layers in rows:
            for made in layers.values():
                made.close()
        raise
    weights = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"name": "matrices", "params": [p for p in weights if p.dim() == 2 and min(p.shape) > 8]},
        {"name": "other", "params": [p for p in weights if p.dim() != 2 or min(p.shape) <= 8], "weight_decay": 0.0},
        {"name": "tables", "params": [], "lr": table_lr, "weight_decay": 0.0},
    ]
    return EngramOptimizer(groups, memories, rows, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
