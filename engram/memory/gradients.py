"""Row gradients: what backward passes collect for the optimizer, and when they are too old to be used."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from engram.memory.compilation import uncompiled


class RowGradients(dict[int, list[tuple[Tensor, Tensor]]]):
    """{layer: [(row ids, gradient)] of each backward pass since the optimizer's last step}."""

    def __init__(self, layers: Iterable[int]):
        super().__init__({layer: [] for layer in layers})
        self.has_optimizer = False  # True once an EngramOptimizer was made for it
        self._looked: dict[int, int] = {}  # layer -> the last backward pass that called drop_stale

    def drop(self) -> None:
        """Drop all row gradients."""
        for pending in self.values():
            pending.clear()

    def drop_stale(self, layer: int, fusion: nn.Module) -> None:
        """Drop the row gradients of passes whose weight gradients are gone (model.zero_grad()), which cannot reach
        rows. Warn if gradients wait and no optimizer will use them. fusion: the layer's module."""
        pending = self[layer]
        if not pending:
            return
        if not self.has_optimizer:
            warnings.warn(
                "gradients of table rows are collected, but no optimizer was made for them: the rows are not trained. "
                "Make it with engram.build_optimizer(model), or freeze the memory: memory.requires_grad_(False)",
                stacklevel=3,
            )
        weights = [weight for weight in fusion.parameters() if weight.requires_grad]
        gone = all(weight.grad is None for weight in weights)  # zeros do not count: rows of zeros have such gradients
        if gone and (weights or not self.has_optimizer):  # with an optimizer, frozen weights prove nothing
            pending.clear()

    @uncompiled
    def look_before_backward(self, layer: int, update: Tensor, fusion: nn.Module) -> None:
        """Call drop_stale once per backward pass, before this pass adds gradients: otherwise gradients that the
        caller cleared between a forward and a backward pass would count as current again."""
        gradients = weakref.ref(self)

        def look(grad: Tensor) -> None:
            alive, running = gradients(), backward_pass()
            if alive is not None and alive._looked.get(layer) != running:
                alive._looked[layer] = running
                alive.drop_stale(layer, fusion)

        if update.requires_grad:
            update.register_hook(look)


def backward_pass() -> int:
    """Return the number of the running backward pass. torch has no public name for it: the hooks it offers run once per
    tensor or once per set of tensors, and one pass reaches the updates of several forward passes."""
    return torch._C._current_graph_task_id()


def keep_gradient(gradients: list[tuple[Tensor, Tensor]], row_ids: Tensor, live: Tensor | None, rows: Tensor) -> None:
    """Add the gradient of fetched rows to `gradients`. A method of Recall would keep the rows alive in a cycle."""
    assert rows.grad is not None
    if gradients:  # of an earlier pass: accumulated gradients wait in host memory, where they are used
        ids, earlier = gradients[-1]
        gradients[-1] = ids, earlier.cpu()
    if live is None:
        gradients.append((row_ids, rows.grad))
    else:  # dead positions have used no row, and an optimizer with momentum would move it
        gradients.append((row_ids[live.to(row_ids.device)], rows.grad[live]))
    rows.grad = None


def check_processes() -> None:
    """Raise RuntimeError if several processes train: row gradients stay in the process that computed them, so each
    process would get different tables beside equal weights."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if several and (processes := torch.distributed.get_world_size()) > 1:
        raise RuntimeError(
            f"{processes} processes train this memory, which is not supported yet: row gradients are not summed over "
            f"processes. Train in one, or with rows that do not learn (train_tables=False, encoded tables, "
            f"memory.requires_grad_(False))"
        )
