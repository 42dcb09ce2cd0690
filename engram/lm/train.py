"""The training loop: batches in an order that depends on the seed alone, exact resume, one learning-rate schedule."""

from __future__ import annotations

import ctypes
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engram.lm.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from engram.lm.run_folder import StepLog, alone_in
from engram.lm.tokenizer import Encoded
from engram.lm.transformer import Transformer
from engram.memory import EngramMemory
from engram.memory.recall import Recall
from engram.optimizer import EngramOptimizer, build_optimizer


@dataclass(frozen=True)
class TrainConfig:
    """Settings of training.

    Attributes:
        tokens: budget, rounded up to whole batches. batch_size: windows per step. context: tokens per window.
        lr: of AdamW on the dense weights. table_lr: of the rows.
        warmup_steps: linear from 0. decay_share: share of the steps at the end with linear decay to 0.
        weight_decay: of dense matrices. clip: norm of the dense gradient.
        table_optimizer: "rms", "adagrad", "adam" or "sinkhorn", see build_optimizer.
        seed: of the weights and of the data order.
    """

    tokens: int = 1_000_000
    batch_size: int = 8
    context: int = 256
    lr: float = 3e-3
    table_lr: float = 0.03
    warmup_steps: int = 50
    decay_share: float = 0.4
    weight_decay: float = 0.1
    clip: float = 1.0
    table_optimizer: str = "rms"
    seed: int = 0

    @property
    def steps(self) -> int:
        return max(1, math.ceil(self.tokens / (self.batch_size * self.context)))


class Batches:
    """Windows of a packed token stream in an order that depends on (seed, epoch) alone, so every arm sees the same.

    Args:
        data: the encoded training text. context: tokens per window. batch_size: windows per batch.

    Raises:
        ValueError: a text shorter than one batch.
    """

    def __init__(self, data: Encoded, context: int, batch_size: int, seed: int = 0):
        self.data, self.context, self.batch_size, self.seed = data, context, batch_size, seed
        self.windows = (len(data.ids) - 1) // context
        if self.windows < batch_size:
            raise ValueError(
                f"the training text has {len(data.ids):,} tokens, but one batch needs {batch_size} windows of "
                f"{context} + 1 tokens: give more text, a smaller batch or a shorter context"
            )
        self.per_epoch = self.windows // batch_size

    def order(self, step: int) -> np.ndarray:
        """Return the window numbers [batch_size] of a step."""
        epoch, batch = divmod(step, self.per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.windows)
        return order[batch * self.batch_size : (batch + 1) * self.batch_size]

    def orders(self, steps: int) -> np.ndarray:
        """Return the window numbers [steps * batch_size] of the first steps; a second epoch repeats them."""
        return np.concatenate([self.order(step) for step in range(steps)])

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return (ids, targets, documents) of a step, each int64 [batch_size, context]."""
        starts = self.order(step)[:, None] * self.context + np.arange(self.context)
        take = torch.from_numpy(starts)
        ids, documents = torch.from_numpy(self.data.ids), torch.from_numpy(self.data.documents)
        return ids[take].long(), ids[take + 1].long(), documents[take].long()


@dataclass
class TrainLog:
    """Measurements of a run. curve and validation hold [tokens, nats per token]; seconds are those of training steps.

    row_state_bytes: of the row optimizers, for all rows stored.
    rows_read, rows_touched: rows gathered, and distinct rows updated, over all steps and layers.
    clock: seconds of hashing (in the background), of waiting for rows, and of updating rows.
    """

    tokens: int = 0
    seconds: float = 0.0
    row_state_bytes: int = 0
    rows_read: int = 0
    rows_touched: int = 0
    clock: dict[str, float] = field(default_factory=dict)
    curve: list[list[float]] = field(default_factory=list)
    validation: list[list[float]] = field(default_factory=list)


def memory_traffic(log: TrainLog, memory: EngramMemory) -> dict[str, Any]:
    """Return what the memory cost per training step: rows and bytes of tables and state, traffic, shares of the time.

    A row is read once per position in the batch that looks it up, and read and written once per step in which it is
    touched, together with its optimizer state.

    Args:
        log: of the run. memory: its tables.
    """
    steps = max(1, len(log.curve))
    row = memory.config.head_dim * next(iter(memory.tables.values())).dtype.itemsize
    rows = sum(table.rows for table in memory.tables.values())
    state = log.row_state_bytes // rows
    return {
        "rows": rows,
        "row_bytes": rows * row,
        "state_bytes": log.row_state_bytes,
        "rows_read_per_step": log.rows_read / steps,
        "rows_touched_per_step": log.rows_touched / steps,
        "unique_ratio": log.rows_touched / max(1, log.rows_read),
        "bytes_read_per_step": (log.rows_read * row + log.rows_touched * (row + state)) / steps,
        "bytes_written_per_step": log.rows_touched * (row + state) / steps,
        "seconds": {**log.clock, "training": log.seconds},
    }


def learning_rate_scale(step: int, config: TrainConfig) -> float:
    """Return the learning rates' factor: warm-up, plateau, linear decay over the last decay_share of the steps."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    left = (config.steps - step) / max(1.0, config.decay_share * config.steps)
    return min(warmup, left, 1.0)


def tune_allocator() -> None:
    """Keep freed memory in the process (glibc): page faults on fresh tensors cost up to half of CPU training time.

    The setting is of the whole process, so train() leaves it to the program: the `engram` command and the lab call this
    before they train, and a program that trains on a CPU should too. On other systems it does nothing.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 256 << 20)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        mallopt(option, value)


def train_step(
    model: Transformer,
    optimizer: EngramOptimizer,
    batch: tuple[Tensor, Tensor, Tensor],
    clip: float,
    recall: Recall | None = None,
) -> Tensor:
    """Make one update. Return the mean loss of the batch in nats per token. recall: of this batch, if fetched ahead."""
    ids, targets, documents = batch
    logits = model(ids, documents, recall=recall)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return loss.detach()


def train(
    model: Transformer,
    data: Encoded,
    config: TrainConfig,
    *,
    folder: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 0,
    keep_checkpoints: int = 0,
    evaluate: Callable[[], float] | None = None,
    evaluate_every: int = 0,
    on_step: Callable[[int, float], Any] | None = None,
    prefetch: bool = True,
    batches: Callable[[int], tuple[Tensor, Tensor, Tensor]] | None = None,
) -> TrainLog:
    """Train `model` in place and return the log.

    A run that was killed resumes at its newest checkpoint and ends with the weights and rows of an undisturbed run, bit
    for bit. With another number of torch threads (torch.set_num_threads) they differ in their last bits, because torch
    then sums in another order. Tables in files contain what the killed run left in them: if it had no checkpoint yet,
    they are refused. On a CPU, call tune_allocator() once before: training is then up to twice as fast.

    Args:
        model: weights to train, with or without a memory.
        data: the training text.
        config: rates, batch and budget.
        folder: folder of the checkpoints; if it has some, the run resumes. Its log.jsonl gets one line per step: step,
            tokens, loss (nats per token), lr, tokens_per_second, seconds (of all training steps so far), and
            validation_loss at the steps that evaluate.
        checkpoint_every: steps between checkpoints (0: only at the end).
        keep_checkpoints: number of newest checkpoints to keep; each contains all rows (0: keep all).
        evaluate: returns a held-out loss; called every evaluate_every steps (0: never) outside the timed part.
        on_step: called with (step, loss) after each step.
        batches: step -> (ids, targets, documents), each int64 [batch_size, context]; targets of -100 count for nothing.
            Default: Batches of `data`.
        prefetch: hash and fetch the next batch's rows during the current step. Results are the same bits either way.

    Returns:
        TrainLog: tokens trained, curve of (tokens, loss in nats per token), seconds and speed.

    Raises:
        ValueError: a text shorter than one batch; a count below 0; a folder with checkpoints of another configuration.
        BlockingIOError: another process trains in the folder.
        FloatingPointError: a loss is not finite.

    Example:
        >>> import engram, numpy
        >>> from engram.lm.tokenizer import Encoded
        >>> from engram.lm.train import TrainConfig
        >>> ids = numpy.arange(2000, dtype=numpy.int32) % 50  # one document; engram.lm.tokenizer.encode packs texts
        >>> data = Encoded(ids, numpy.zeros_like(ids), numpy.array([0, 2000]), numpy.array([2000]))
        >>> config = engram.EngramConfig(layers=(1,), heads=2, head_dim=8, rows_per_head=1000)
        >>> memory = engram.EngramMemory(config, engram.TokenMap.identity(64), hidden_size=32)
        >>> model = engram.Transformer(engram.TransformerConfig(64, hidden_size=32, layers=2, heads=2), memory)
        >>> log = engram.train(model, data, TrainConfig(tokens=4000, batch_size=4, context=32), folder="run")
        >>> log.tokens, log.curve[-1][1] < log.curve[0][1]  # nats per token
        (4096, True)
    """
    if min(checkpoint_every, keep_checkpoints) < 0:
        raise ValueError(f"{checkpoint_every=} and {keep_checkpoints=} count steps and checkpoints: 0 or more")
    with ExitStack() as stack:
        if folder is not None:
            stack.enter_context(alone_in(folder))
        batches = batches or Batches(data, config.context, config.batch_size, config.seed)
        device = next(model.parameters()).device

        def batch_at(step: int) -> tuple[Tensor, Tensor, Tensor]:
            ids, targets, documents = batches(step)
            return ids.to(device), targets.to(device), documents.to(device)

        optimizer = build_optimizer(
            model,
            lr=config.lr,
            table_lr=config.table_lr,
            weight_decay=config.weight_decay,
            table_optimizer=config.table_optimizer,
        )
        stack.enter_context(closing(optimizer))  # else a traceback would keep its files open
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        log, first = TrainLog(), 0
        newest = latest_checkpoint(folder) if folder is not None else None
        if newest is not None:
            manifest = load_checkpoint(newest, model, optimizer)
            try:
                trained_with, log, first = (
                    manifest["facts"]["config"],
                    TrainLog(**manifest["facts"]["log"]),
                    manifest["step"],
                )
            except (KeyError, TypeError) as error:
                raise ValueError(f"{newest} lacks the configuration and log that train() writes: {error!r}") from error
            if trained_with != asdict(config):
                raise ValueError(f"{newest} was trained with {trained_with}, not with {asdict(config)}")
        steps = None if folder is None else stack.enter_context(closing(StepLog(folder, first)))
        log.row_state_bytes = sum(row_optimizer.nbytes for row_optimizer in optimizer.row_optimizers)
        model.train()
        memory = model.memory
        if memory is not None and first < config.steps:
            memory.check_finished()
            memory.mark_unfinished(folder)
        ahead: Recall | None = None  # of the batch after the current one
        upcoming = batch_at(first) if first < config.steps else None
        for step in range(first, config.steps):
            began = time.perf_counter()
            assert upcoming is not None
            batch, recall = upcoming, ahead
            upcoming = batch_at(step + 1) if step + 1 < config.steps else None
            if memory is not None and prefetch:
                recall = recall or memory.recall(batch[0], batch[2])
                ahead = None if upcoming is None else memory.recall(upcoming[0], upcoming[2])
            scale, earlier = learning_rate_scale(step, config), log.seconds
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * scale
            loss = float(train_step(model, optimizer, batch, config.clip, recall))
            log.seconds += time.perf_counter() - began
            log.tokens += config.batch_size * config.context
            log.rows_touched += optimizer.touched
            if memory is not None:
                log.rows_read += batch[0].numel() * memory.config.columns * len(memory.tables)
                for name, spent in memory.clock.items():
                    log.clock[name] = log.clock.get(name, 0.0) + spent
                    memory.clock[name] = 0.0
            log.curve.append([log.tokens, loss])
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {step}: lower lr ({config.lr}) or table_lr")
            done = step + 1
            line = {
                "step": done,
                "tokens": log.tokens,
                "loss": loss,
                "lr": optimizer.param_groups[0]["lr"],
                "tokens_per_second": config.batch_size * config.context / max(log.seconds - earlier, 1e-9),
                "seconds": log.seconds,
            }
            if evaluate is not None and evaluate_every and (done % evaluate_every == 0 or done == config.steps):
                held_out = evaluate()
                if not math.isfinite(held_out):
                    raise FloatingPointError(f"the held-out loss is {held_out} at step {done}")
                log.validation.append([log.tokens, held_out])
                line["validation_loss"] = held_out
                model.train()
            if steps is not None:
                steps.write(line)
            if folder is not None and (done == config.steps or (checkpoint_every and done % checkpoint_every == 0)):
                facts = {"config": asdict(config), "log": asdict(log)}
                if steps is not None:
                    steps.sync()
                save_checkpoint(folder, model, optimizer, done, facts, keep_checkpoints)
            if on_step is not None:
                on_step(done, loss)
        if memory is not None:
            memory.mark_finished()
        return log
