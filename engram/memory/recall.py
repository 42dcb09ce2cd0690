"""What one forward pass takes from the memory: rows on their way, and their gradients back."""

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
from engram.storage.weak import WeakList
from engram.tables.prefetch import Fetch, Task

_WORTH_A_THREAD = 1 << 16  # values to fetch below which waking a thread costs more than hashing and fetching them


class RowSource(Protocol):
    """What a recall takes from its memory: tables, the hashing call, and the list that row gradients go to."""

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
    """The rows of one forward pass, on their way. Made by EngramMemory.recall, which may be called well before the
    forward pass that uses it, and used again: rows that an optimiser step changes in between are renewed.

    Other threads may patch and renew a recall while one uses it. In a forked process it fetches its rows again.

    Attributes:
        documents: run number of each position [B, T] on the model's device, or None. With a cache [B, H + T]: of the H
            positions before them too, as many as the convolution reaches back (EngramMemory.lag) and the text has.
        dead: True at DEAD positions [B, T] on the model's device; None where there are none.
        cache, start, number: decoding state, the positions that it held before this piece, and the piece's number in
            it.
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
        self.cache: MemoryCache | None = None
        self.start = self.number = 0
        self._memory = memory
        if memory.collects_gradients:
            memory.check_writable()
        self._histories: dict[int, Tensor | None] = {}  # of the layers that have used it
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
        with self._lock:  # a writer of rows from here on waits for the fetches, and renews what they have read
            memory.recalls.add(self)
            for layer in memory.config.layers:
                self._pending[layer] = Task(partial(fetch, layer), worth_a_thread)

    def _begin(self) -> None:
        self._rows: dict[int, Tensor] = {}
        self._pending: dict[int, Task[Fetch]] = {}
        self._lock = threading.Lock()  # of the two
        self._process = os.getpid()

    def _own(self) -> threading.Lock:
        """The lock. A forked process inherits one that another thread may hold, and rows that it may be patching."""
        if self._process != os.getpid():
            self._begin()
        return self._lock

    @property
    def row_ids(self) -> dict[int, Tensor]:
        """{layer: int64 [B, T, C]} on the CPU."""
        return self._hashed.result()

    @uncompiled
    def rows(self, layer: int) -> Tensor:
        """The concatenated rows of a layer, float32 [B, T, d_mem] on the model's device. Waits until they are there."""
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
    def inputs_before(self, layer: int) -> Tensor | None:
        """What the layer's convolution looks back on [B, H, M*d]; None without a cache, and for the first piece.

        Raises:
            RuntimeError: see MemoryCache.inputs_before.
        """
        if self.cache is None:
            return None
        again = self._histories.get(layer)
        found = self.cache.inputs_before(layer, self.number, self.start, self._memory.lag, again)
        self._histories[layer] = found
        return found

    @uncompiled
    def keep_inputs(self, layer: int, inputs: Tensor) -> None:
        """Hands what went into the layer's convolution at this piece [B, T, M*d] to the cache, if there is one."""
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

    def forget(self, layer: int) -> None:
        """Drop the rows of a layer, in use or on their way. The next use fetches them again."""
        with self._own():
            self._rows.pop(layer, None)
            self._pending.pop(layer, None)
