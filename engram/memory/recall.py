"""Recall: the rows that one forward pass reads from the memory, and their gradients."""

from __future__ import annotations

import os
import threading
import time
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from engram.config import EngramConfig
from engram.memory.cache import MemoryCache
from engram.memory.compilation import uncompiled
from engram.memory.gradients import RowGradients, keep_gradient
from engram.memory.state import Tables
from engram.memory.switches import active, masks
from engram.storage.weak import WeakList
from engram.tables.prefetch import Fetch, Task

_WORTH_A_THREAD = 1 << 16  # values to fetch below which waking a thread costs more than hashing and fetching them


class RowSource(Protocol):
    """Parts of a memory that its recalls use: tables, the hashing call, and the lists for row gradients."""

    config: EngramConfig
    hasher: Any  # called like an NgramHasher
    tables: Tables
    gradients: RowGradients
    clock: dict[str, float]
    recalls: WeakList[Recall]
    recalls_are_stale: bool

    @property
    def collects_gradients(self) -> bool: ...

    @property
    def lag(self) -> int: ...

    def check_writable(self) -> None: ...

    def renew_recalls(self) -> None: ...


class Recall:
    """The rows of one forward pass, while they are fetched and used. Made by EngramMemory.recall.

    recall may be called well before the forward pass that uses it, and a Recall may be used again: rows that an
    optimizer step changes in between are fetched again. Other threads may patch and renew a Recall while one uses it.
    In a forked process it fetches its rows again.

    Attributes:
        documents: document number of each position [B, T] on the model's device, or None. With a cache [B, H + T], with
            the H positions before them, as many as the convolution reaches back (EngramMemory.lag) and the text has.
        dead: True at dead positions [B, T] on the model's device; None if there are none.
        switches: those of the memory when the recall was made; they apply to every use (EngramMemory.off).
        cache, start, number: decoding state, its positions before this piece, and the piece's number in it.
    """

    def __init__(
        self,
        memory: RowSource,
        ids: Tensor,
        lookback: Tensor | None,
        documents: Tensor | None,
        device: torch.device,
        dead: Tensor | None = None,
    ):
        self.documents, self.device = documents, device
        self.dead = dead
        self.switches = active(memory)  # also where a pass is computed again, outside their `with` block
        self.cache: MemoryCache | None = None
        self.start = self.number = 0
        self._memory = memory
        if memory.collects_gradients:
            memory.check_writable()
        self._histories: dict[int, Tensor | None] = {}  # of the layers that have used this recall
        host_documents = None if documents is None else documents[:, documents.shape[1] - ids.shape[1] :].cpu()
        values = ids.numel() * memory.config.d_mem
        worth_a_thread = values >= _WORTH_A_THREAD

        def hash_ids() -> dict[int, Tensor]:
            began = time.perf_counter()
            row_ids = memory.hasher(ids, lookback=lookback, documents=host_documents)
            memory.clock["hashing"] += time.perf_counter() - began
            return row_ids

        hashed = self._hashed = Task(hash_ids, worth_a_thread)

        def fetch(layer: int) -> Fetch:
            return Fetch(memory.tables[layer], hashed.result()[layer], device)

        self._begin()
        with self._lock:  # from here on, a writer of rows waits for the fetches and renews what they have read
            memory.recalls.add(self)
            for layer in memory.config.layers:
                self._pending[layer] = Task(partial(fetch, layer), worth_a_thread)

    def _begin(self) -> None:
        self._rows: dict[int, Tensor] = {}
        self._pending: dict[int, Task[Fetch]] = {}
        self._lock = threading.Lock()  # for both
        self._process = os.getpid()

    def _own(self) -> threading.Lock:
        """Return the lock. A forked process makes a new lock: it inherits one that another thread may hold, and rows
        that this thread may be patching."""
        if self._process != os.getpid():
            self._begin()
        return self._lock

    @property
    def row_ids(self) -> dict[int, Tensor]:
        """Row ids {layer: int64 [B, T, C]} on the CPU."""
        return self._hashed.result()

    @uncompiled
    def rows(self, layer: int) -> Tensor:
        """Return the concatenated rows of a layer, float32 [B, T, d_mem] on the model's device. Wait until they have
        arrived."""
        memory = self._memory
        if memory.recalls_are_stale:
            memory.renew_recalls()
        with self._own():
            rows = self._rows.get(layer)
            if rows is None:
                if layer in self._pending:
                    fetched, waited = self._pending.pop(layer).wait()
                    memory.clock["waiting"] += waited
                else:  # they have changed since they were fetched
                    fetched = Fetch(memory.tables[layer], self.row_ids[layer], self.device)
                rows = self._rows[layer] = fetched.rows()
            if memory.collects_gradients and not rows.requires_grad:
                memory.check_writable()
                live = None if self.dead is None else ~self.dead
                keep = partial(keep_gradient, memory.gradients[layer], self.row_ids[layer], live)
                rows.requires_grad_().register_post_accumulate_grad_hook(keep)
        return rows.flatten(2)

    @uncompiled
    def switched_rows(self, layer: int) -> tuple[Tensor, Tensor | bool | None]:
        """Return the rows [B, T, d_mem], zeros where a switch is off (EngramMemory.off), and where the layer's update
        is off: bool [B, T] on the model's device, True for everywhere, None for nowhere."""
        rows = self.rows(layer)
        current = active(self._memory)
        switches = (*self.switches, *(switch for switch in current if switch not in self.switches))
        if not switches:
            return rows, None
        columns, off = masks(switches, layer, self.row_ids[layer], self.start, self._memory.config.heads)
        if columns is not None:
            by_column = rows.unflatten(2, (columns.shape[2], -1))
            rows = by_column.masked_fill(columns.to(rows.device)[..., None], 0).flatten(2)
        return rows, off.to(rows.device) if isinstance(off, Tensor) else off

    @uncompiled
    def inputs_before(self, layer: int) -> Tensor | None:
        """Return the inputs of the layer's convolution before this piece [B, H, M*d]; None without a cache, and for
        the first piece.

        Raises:
            RuntimeError: see MemoryCache.inputs_before.
        """
        if self.cache is None:
            return None
        again = self._histories.get(layer)
        inputs = self.cache.inputs_before(layer, self.number, self.start, self._memory.lag, again)
        self._histories[layer] = inputs
        return inputs

    @uncompiled
    def keep_inputs(self, layer: int, inputs: Tensor) -> None:
        """Store the inputs of the layer's convolution at this piece [B, T, M*d] in the cache, if there is one."""
        if self.cache is not None:
            self.cache.keep_inputs(layer, self.number, inputs, self._histories.get(layer), self._memory.lag)

    def renew(self) -> None:
        """Wait for pending fetches, then drop all fetched rows. The next use fetches them again."""
        with self._own():
            for fetch in self._pending.values():
                fetch.end()
            self._pending.clear()
            self._rows.clear()

    def patch(self, layer: int, touched: Tensor) -> int:
        """Fetch again the rows fetched ahead that are in `touched`. Return how many; 0 if the rows are already in
        use, because their next use fetches them."""
        with self._own():
            self._rows.pop(layer, None)
            return self._pending[layer].result().patch(touched) if layer in self._pending else 0

    def drop(self, layer: int) -> None:
        """Drop the rows of a layer, fetched or not yet. The next use fetches them again."""
        with self._own():
            self._rows.pop(layer, None)
            self._pending.pop(layer, None)
