"""One run of the lab in this process: build the arm, train, evaluate and measure it, and return its line of results."""

from __future__ import annotations

import os
import resource  # peak memory; Unix only
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from engram.ablation.ngram_counts import seen_counts, seen_losses
from engram.lm.evaluate import Evaluation, eval_mode, evaluate
from engram.lm.run import Data, Setting
from engram.lm.train import TrainLog, train, tune_allocator
from engram.memory import EngramMemory
from experiments import arms
from experiments.lab.caches import prepare
from experiments.lab.cell import Run, hook
from experiments.lab.trainings import FILE, train_once
from experiments.lab.version import code_version, processor, sources_digest

CURVE_POINTS, LAST_STEPS = 40, 50


def execute(run: Run, threads: int = 1, on_step: Callable[[int, float], Any] | None = None) -> tuple[Any, Any]:
    """Train and evaluate one run in this process.

    Returns:
        (the line of results.jsonl as a dict, {"nats": float32, "tokens": int32, "bytes": int32} of each held-out
        document, and the arrays that the question measured besides). Times are in seconds, losses in nats per token.
        train_loss is the mean of the last 50 steps, training FLOPs are three times the forward ones, peak_memory is of
        this process and in bytes, seen is what engram.ablation.ngram_counts returns.
    """
    torch.set_num_threads(threads)
    began = time.perf_counter()
    options = dict(run.options)
    epochs = options.pop("epochs", None)
    data = prepare(run.setting, run.held_out)
    setting = run.setting
    if epochs is not None:
        setting = replace(setting, train=replace(setting.train, tokens=round(epochs * len(data.train.ids))))
    model = arms.build(run.arm, setting, data, **options)
    stored, looked_up = _stored(model), arms.tables(model)
    flops = forward_flops(model, data, setting.train.context)
    model.to(run.device)
    log, used, shared = _train(run, setting, model, data, on_step)
    weights = [p for p in model.parameters() if p.requires_grad]
    model = arms.finish(run.arm, model, setting, data, **options)
    tested = time.perf_counter()
    score, measure = hook(run.experiment, "evaluate"), hook(run.experiment, "measure")
    result = evaluate(model, data.validation) if score is None else score(run, model, data)
    evaluated = time.perf_counter()
    measured = {} if measure is None else measure(replace(run, setting=setting), model, data)
    peak = peak_memory()  # before n-grams are counted
    usual = hook(run.experiment, "train") is None and score is None  # else another text is trained on or scored
    seen = seen_losses(result, seen_counts(data, setting.train)) if usual else {}
    arrays = {name: value for name, value in measured.items() if isinstance(value, np.ndarray)}
    record = _identity(run, data) | {
        "tokens": log.tokens,
        "text_tokens": len(data.train.ids),
        "train_seconds": log.seconds,
        "train_cpu_seconds": used,  # of all threads; other work on the machine disturbs it less than the clock
        "evaluation_seconds": evaluated - tested,
        "total_seconds": time.perf_counter() - began,
        "training_shared": shared,  # with another run of the sweep: the seconds of training are that one's
        "threads": threads,
        "device": run.device,
        "peak_memory": peak,
        # tables again: finish() may have added one
        **_sizes(stored, looked_up, arms.tables(model), weights, log.row_state_bytes),
        "flops_per_token": {"forward": flops, "training": 3 * flops},
        **_losses(log, result),
        "seen": seen,
        "extra": dict(getattr(model, "extra_facts", None) or {}),
    }
    if measure is not None:
        record["measures"] = {name: value for name, value in measured.items() if name not in arrays}
    documents = {
        "nats": result.document_nats.astype(np.float32),
        "tokens": result.document_tokens.astype(np.int32),
        "bytes": data.validation.bytes.astype(np.int32),
    }
    return record, documents | {f"measured_{name}": array for name, array in arrays.items()}


def _train(
    run: Run, setting: Setting, model: nn.Module, data: Data, on_step: Callable[[int, float], Any] | None
) -> tuple[TrainLog, float, bool]:
    """Train a run's model in place, as its question does it. Return (log, processor seconds, True if the training of
    another run was used)."""
    tune_allocator()
    own, used = hook(run.experiment, "train"), time.process_time()
    if own is not None:
        log = own(replace(run, setting=setting), model, data, on_step)
        return log, time.process_time() - used, False
    file = Path(os.environ[FILE]) if FILE in os.environ else None
    return train_once(model, lambda: train(model, data.train, setting.train, on_step=on_step), file)


def _identity(run: Run, data: Data) -> dict[str, Any]:
    """Return the fields of a result that name the run, the code, the machine and the text."""
    return {
        "key": run.key,
        "cell": run.kind,
        "experiment": run.experiment,
        "variant": run.variant,
        "size": run.size,
        "arm": run.arm,
        "options": dict(run.options),
        "held_out": run.held_out,
        "seed": run.seed,
        "setting": asdict(run.setting),
        "code": code_version(),
        "sources": sources_digest(),
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),  # other vector instructions round in another order
        "processor": processor(),
        "corpus": data.digest,
        "vocabulary": len(data.token_map.table),
        "token_map": data.token_map.digest[:16],  # the same text has given another tokenizer on another machine
        "overlap_13gram": float(data.overlap),
    }


def _sizes(
    stored: dict[str, int],
    looked_up: dict[str, int],
    table: dict[str, int],
    weights: list[nn.Parameter],
    row_state_bytes: int,
) -> dict[str, Any]:
    """Return parameters and bytes by kind. stored, looked_up: of the built model and its tables; table: of the tables
    of the finished model; weights: those that were trained."""
    return {
        "parameters": {"dense": stored["parameters"] - looked_up["parameters"], "table": table["parameters"]},
        "bytes": {
            "dense": stored["bytes"] - looked_up["bytes"],
            "table": table["bytes"],
            "optimizer_dense": 2 * sum(p.nbytes for p in weights),  # AdamW keeps two moments
            "optimizer_rows": row_state_bytes,
        },
    }


def _losses(log: TrainLog, result: Evaluation) -> dict[str, Any]:
    losses = [loss for _, loss in log.curve]
    points = np.array_split(log.curve, min(CURVE_POINTS, len(losses)))
    return {
        "train_loss": float(np.mean(losses[-LAST_STEPS:])),
        "curve": [np.mean(part, axis=0).tolist() for part in points],
        "loss": result.loss,
        "bpb": result.bits_per_byte,
    }


def forward_flops(model: nn.Module, data: Data, context: int) -> float:
    """Return the FLOPs per token of a forward pass over one window of held-out text, as torch counts them: matrix
    products and attention (as two dense products: the causal half is not subtracted). Lookups and elementwise work are
    not counted."""
    ids = torch.from_numpy(data.validation.ids[:context]).long()[None]
    # The counter does not know the fused attention of the CPU; the plain one is made of products that it knows.
    with torch.no_grad(), eval_mode(model), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids)
    return counter.get_total_flops() / ids.numel()


def _stored(model: nn.Module) -> dict[str, int]:
    """Return the parameters and bytes of everything in a model, tables in host memory included."""
    memories = [module for module in model.modules() if isinstance(module, EngramMemory)]
    host = sum(table.nbytes for memory in memories for table in memory.tables.values())
    return {
        "parameters": sum(p.numel() for p in model.parameters()) + sum(m.table_parameters() for m in memories),
        "bytes": sum(p.nbytes for p in model.parameters()) + host,
    }


def peak_memory() -> int:
    """Return the peak memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
