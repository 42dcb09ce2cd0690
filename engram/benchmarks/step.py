"""Time of training steps beside the plain model's, and against the number of rows stored."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram.addressing import TokenMap
from engram.benchmarks.compare import Row, compare
from engram.config import EngramConfig
from engram.lm.train import train_step
from engram.lm.transformer import Transformer, TransformerConfig
from engram.memory import EngramMemory
from engram.memory.recall import Recall
from engram.optimizer import build_optimizer

VOCAB, BATCH, TIME = 4096, 8, 256


def _text(batches: int = 64) -> Tensor:
    """Draw int64 [batches, BATCH, TIME + 1]: Zipf-distributed ids, as skewed as text."""
    draws = np.random.default_rng(0).zipf(1.2, (batches, BATCH, TIME + 1))
    return torch.from_numpy(np.minimum(draws - 1, VOCAB - 1))


class Trainer:
    """A model that takes one training step per call, on the next of a few batches.

    Args:
        hidden_size: width of the 4-layer decoder.
        config: configuration of its memory, None for a plain model.
        fetch_ahead: recall the next batch before the current step, as engram.train does.
        folder: folder for the table's file; None keeps the table in memory.
    """

    def __init__(
        self, hidden_size: int, config: EngramConfig | None, fetch_ahead: bool = True, folder: str | None = None
    ):
        torch.manual_seed(0)
        memory = None
        if config is not None:
            memory = EngramMemory(config, TokenMap.identity(VOCAB), hidden_size, folder=folder)
        torch.manual_seed(0)
        self.model = Transformer(TransformerConfig(vocab_size=VOCAB, hidden_size=hidden_size), memory)
        self.optimizer, self.memory, self.fetch_ahead = build_optimizer(self.model), memory, fetch_ahead
        self.text, self.documents = _text(), torch.zeros(BATCH, TIME, dtype=torch.int64)
        self.turn = 0
        self.ahead: Recall | None = None

    def __call__(self) -> None:
        now, following = (self.text[i % len(self.text)] for i in (self.turn, self.turn + 1))
        recall = self.ahead
        if self.memory is not None and self.fetch_ahead:
            recall = recall or self.memory.recall(now[:, :-1], self.documents)
            self.ahead = self.memory.recall(following[:, :-1], self.documents)
        float(train_step(self.model, self.optimizer, (now[:, :-1], now[:, 1:], self.documents), 1.0, recall))
        self.turn += 1


def main_job(rows_per_head: int = 65_536) -> EngramConfig:
    return EngramConfig(layers=(1,), orders=(2, 3), heads=4, head_dim=32, rows_per_head=rows_per_head)


def bench_step(rounds: int = 25) -> list[Row]:
    """Time the main job's step (1.8M dense parameters) and a 5M one with 16 rows of 128 B per token, beside plain."""
    rows: list[Row] = []
    sixteen = EngramConfig(layers=(1,), orders=(2, 3), heads=8, head_dim=32, rows_per_head=65_536)
    for name, hidden_size, config in (("d 128, 8 rows/token", 128, main_job()), ("d 256, 16 rows/token", 256, sixteen)):
        arms: dict[str, Callable[[], Any]] = {
            f"with engram, {name}": Trainer(hidden_size, config),
            f"plain, {name}": Trainer(hidden_size, None),
        }
        rows += compare(arms, per_round=1e-3, unit="ms/step", rounds=rounds, times=True)
    return rows


def bench_prefetch(rounds: int = 25) -> list[Row]:
    """Time steps that fetch ahead and steps that fetch on demand, with the share of a step that waits for rows."""
    ahead, demand = Trainer(128, main_job()), Trainer(128, main_job(), fetch_ahead=False)
    arms: dict[str, Callable[[], Any]] = {"next batch fetched ahead": ahead, "fetched on demand": demand}
    rows = compare(arms, per_round=1e-3, unit="ms/step", rounds=rounds, times=True)
    for row, trainer in zip(rows, (ahead, demand), strict=True):
        assert trainer.memory is not None
        for name in trainer.memory.clock:
            trainer.memory.clock[name] = 0.0
        began = time.perf_counter()
        for _ in range(rounds):
            trainer()
        spent = time.perf_counter() - began
        row.update({f"{name}_share": seconds / spent for name, seconds in trainer.memory.clock.items()})
    return rows


def bench_scale(rounds: int = 15, folder: str | None = None) -> list[Row]:
    """Time steps against rows stored: 2^17 and 2^24 rows per head in memory (8 heads of 128-byte rows)."""
    arms: dict[str, Callable[[], Any]] = {
        f"2^{k} rows per head": Trainer(128, main_job(2**k), folder=folder) for k in (17, 24)
    }
    for trainer in arms.values():
        for _ in range(64):  # one epoch: the first touch of a page is a cost of the start, not of a step
            trainer()
    return compare(arms, per_round=1e-3, unit="ms/step", rounds=rounds, times=True)
