"""What one forward pass takes from the memory: rows on their way, their gradients back, and what decoding remembers."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial, update_wrapper
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engram.tables.prefetch import Fetch, in_background, wait

if TYPE_CHECKING:
    from engram.memory import EngramMemory

_WORTH_A_THREAD = 1 << 16  # values to fetch below which waking a thread costs more than hashing and fetching them


class MemoryCache:
    """What decoding has to remember: the token ids so far, and the inputs of each layer's convolution.

    Both grow with the text, so `rewind` can drop rejected draft tokens exactly.
    """

    def __init__(self) -> None:
        self.ids: Tensor | None = None  # [B, positions] on the CPU, -1 at dead positions
        self.runs: Tensor | None = None  # [B, positions] on the CPU: run numbers; None while all is one run
        self.conv: dict[int, Tensor] = {}  # layer -> [B, positions, M*d]

    @property
    def length(self) -> int:
        """Positions held."""
        return 0 if self.ids is None else self.ids.shape[1]

    def extend(self, ids: Tensor, runs: Tensor | None, reach: int) -> tuple[Tensor | None, Tensor | None]:
        """Takes up ids [B, T] (-1 where dead) with their run numbers, of which the first goes on from the text held.

        Returns:
            The `reach` ids before them as NgramHasher's lookback, and the run numbers of all positions now held.
        """
        if self.ids is None or not self.length:
            self.ids, self.runs = ids, runs
            return None, runs
        if len(ids) != len(self.ids):
            raise ValueError(f"the decoding cache holds {len(self.ids)} sequences, these are {len(ids)}")
        lookback = self.ids[:, -reach:]
        if not ids.shape[1]:
            return lookback, self.runs
        if runs is not None or self.runs is not None:
            held = torch.zeros_like(self.ids) if self.runs is None else self.runs
            runs = torch.zeros_like(ids) if runs is None else runs
            runs = runs + held[:, -1:]
            lookback = lookback.masked_fill(held[:, -reach:] != runs[:, :1], -1)
            runs = torch.cat([held, runs], dim=1)
        self.ids, self.runs = torch.cat([self.ids, ids], dim=1), runs
        return lookback, runs

    def inputs_before(self, layer: int, positions: int) -> Tensor | None:
        """What went into a layer's convolution at the first `positions` of the text: what a piece that begins there
        looks back on. None for the first piece.

        Raises:
            RuntimeError: not all of them went through the layer.
        """
        held = self.conv.get(layer)
        found = 0 if held is None else held.shape[1]
        if found < positions:
            raise RuntimeError(
                f"layer {layer} has seen {found} of the {positions} positions before this piece, and its convolution "
                f"looks back on them: put the recall of every piece through every layer, in the order of the text"
            )
        return None if held is None or not positions else held[:, :positions]

    def select(self, sequences: Tensor) -> None:
        """Keeps these sequences of the batch (int64 [n], repeats allowed) in this order, as beam search does."""
        if self.ids is not None:
            self.ids = self.ids[sequences.to(self.ids.device)]
        if self.runs is not None:
            self.runs = self.runs[sequences.to(self.runs.device)]
        self.conv = {layer: inputs[sequences.to(inputs.device)] for layer, inputs in self.conv.items()}

    def rewind(self, positions: int) -> None:
        """Forgets the last `positions` tokens, as if they had never been seen."""
        if positions < 0 or self.ids is None or positions > self.length:
            raise ValueError(f"cannot rewind {positions} positions of {self.length}")
        keep = self.length - positions
        self.ids = self.ids[:, :keep]
        self.runs = None if self.runs is None else self.runs[:, :keep]
        self.conv = {layer: inputs[:, :keep] for layer, inputs in self.conv.items()}


def uncompiled(method: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps a method out of the reach of torch.compile (threads, C, host memory): a compiled graph breaks there. The
    compiler takes seconds to import, so it is asked only where somebody has."""
    disabled: list[Callable[..., Any]] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return method(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(method))
        return disabled[0](*args, **kwargs)

    return update_wrapper(call, method)


class Recall:
    """The rows of one forward pass, on their way. Made by EngramMemory.recall, which may be called well before the
    forward pass that uses it, and used again: rows that an optimiser step changes in between are renewed.

    Attributes:
        documents: run number of each position [B, T] on the model's device, with a cache [B, positions held]; or None.
        dead: True at DEAD positions [B, T] on the model's device; None where there are none.
    """

    def __init__(
        self,
        memory: EngramMemory,
        ids: Tensor,
        lookback: Tensor | None,
        documents: Tensor | None,
        device: torch.device,
        dead: Tensor | None = None,
    ):
        self.documents, self.device = documents, device
        self.dead = dead
        self.cache: MemoryCache | None = None
        self.start = 0  # positions that the cache held before this piece
        self._memory = memory
        if memory.collects_gradients:
            memory.check_writable()
        self._rows: dict[int, Tensor] = {}
        self._pending: dict[int, Future[Fetch]] = {}
        host_documents = None if documents is None else documents[:, documents.shape[1] - ids.shape[1] :].cpu()
        values = ids.numel() * memory.config.d_mem
        worth_a_thread = values >= _WORTH_A_THREAD

        def hash_ids() -> dict[int, Tensor]:
            began = time.perf_counter()
            row_ids = memory.hasher(ids, lookback=lookback, documents=host_documents)
            memory.clock["hashing"] += time.perf_counter() - began
            return row_ids

        def fetch(layer: int) -> Fetch:
            return Fetch(memory.tables[layer], self._hashed.result()[layer], device)

        self._hashed = in_background(hash_ids, worth_a_thread)
        for layer in memory.config.layers:
            self._pending[layer] = in_background(partial(fetch, layer), worth_a_thread)

    @property
    def row_ids(self) -> dict[int, Tensor]:
        """{layer: int64 [B, T, C]} on the CPU."""
        return self._hashed.result()

    @uncompiled
    def rows(self, layer: int) -> Tensor:
        """The concatenated rows of a layer, float32 [B, T, d_mem] on the model's device. Waits until they are there."""
        memory, rows = self._memory, self._rows.get(layer)
        if rows is None:
            if layer in self._pending:
                fetched, waited = wait(self._pending.pop(layer))
                memory.clock["waiting"] += waited
            else:  # they have changed since they were fetched
                fetched = Fetch(memory.tables[layer], self.row_ids[layer], self.device)
            rows = self._rows[layer] = fetched.rows()
        if memory.collects_gradients and not rows.requires_grad:
            memory.check_writable()
            live = None if self.dead is None else ~self.dead
            keep = partial(_keep_gradient, memory.gradients[layer], self.row_ids[layer], live)
            rows.requires_grad_().register_post_accumulate_grad_hook(keep)
        return rows.flatten(2)

    def renew(self) -> None:
        """Forgets all rows that were fetched, once no thread reads them any more: who uses them gets them anew."""
        for fetch in self._pending.values():
            fetch.exception()
        self._pending.clear()
        self._rows.clear()

    def patch(self, layer: int, touched: Tensor) -> int:
        """Renews rows fetched ahead that are in `touched`. Returns how many; 0 where the rows are already in use: who
        uses them again gets them anew."""
        self._rows.pop(layer, None)
        return self._pending[layer].result().patch(touched) if layer in self._pending else 0


def _keep_gradient(gradients: list[tuple[Tensor, Tensor]], row_ids: Tensor, live: Tensor | None, rows: Tensor) -> None:
    """Hands the gradient of fetched rows to the optimiser. No method of Recall: a cycle would keep the rows alive."""
    assert rows.grad is not None
    if gradients:  # of an earlier pass: what accumulates waits in host memory, where it is used
        ids, earlier = gradients[-1]
        gradients[-1] = ids, earlier.cpu()
    if live is None:
        gradients.append((row_ids, rows.grad))
    else:  # dead positions have used no row: an optimiser with momentum would move it all the same
        gradients.append((row_ids[live.to(row_ids.device)], rows.grad[live]))
    rows.grad = None
