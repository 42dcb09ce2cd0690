"""One run of the retrofit: its fields, its training, and the line and arrays that it returns."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import xxhash

from engram import TokenMap, build_optimizer
from engram.lm.corpus import corpus_digest
from experiments.lab.execute import peak_memory
from experiments.lab.version import code_version, sources_digest
from experiments.scripts.retrofit import arms
from experiments.scripts.retrofit.data import REPORTED, TUNING, Batches, Text, pack
from experiments.scripts.retrofit.measure import SIDES, measure

WARM_UP, CLIP = 4, 1.0  # steps; norm of the dense gradient


@dataclass(frozen=True)
class Job:
    """One run. steps: fewer than the text has, for `full-seconds`; 0 for all."""

    arm: str
    seed: int
    lr: float = 0.0
    table_lr: float = 0.0
    held_out: str = "validation"
    steps: int = 0

    @property
    def key(self) -> str:
        """Digest (16 hex digits) of what decides the outcome. The steps of `full-seconds` were measured, not chosen."""
        size = TUNING if self.held_out == "tune" else REPORTED
        what = [{**asdict(self), "steps": 0}, asdict(size), json.loads(arms.MEMORY.to_json())]
        return xxhash.xxh3_64_hexdigest(json.dumps(what, sort_keys=True).encode())


class Base(NamedTuple):
    """What all runs start from. A run changes the model, so each has its own process."""

    model: Any
    tokenizer: Any
    token_map: TokenMap
    text: Text
    overlap: dict[str, float]  # share of the 13-grams of each held-out side that the training text has


def train(model: Any, batches: Batches, steps: int, lr: float, table_lr: float) -> dict[str, Any]:
    """Train in bfloat16 (autocast; weights, rows and optimizer in float32): warm-up, then linearly down to zero."""
    optimizer = build_optimizer(model, lr=lr, table_lr=table_lr, weight_decay=0.0)
    initial = [group["lr"] for group in optimizer.param_groups]
    weights = [p for p in model.parameters() if p.requires_grad]
    model.train()
    losses, began, clock = [], time.perf_counter(), time.process_time()
    step_seconds = []
    for step in range(steps):
        step_began = time.process_time()
        ids, positions = batches.ids[step], batches.positions[step]
        for group, rate in zip(optimizer.param_groups, initial, strict=True):
            group["lr"] = rate * min((step + 1) / WARM_UP, (steps - step) / max(1, steps - WARM_UP))
        with torch.autocast(ids.device.type, torch.bfloat16):
            logits = model(input_ids=ids[:, :-1], position_ids=positions[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, CLIP)
        optimizer.step()
        losses.append(loss.item())
        step_seconds.append(time.process_time() - step_began)
    return {
        "tokens": steps * batches.ids[0, :, 1:].numel(),
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - clock,
        "step_cpu_seconds": float(np.median(step_seconds)),
        "optimizer_bytes": optimizer.state_bytes,
        "curve": [round(loss, 4) for loss in losses],
    }


def execute(job: Job, base: Base) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return (line of results.jsonl, arrays of documents.npz). Changes base.model: call it in a process of its own.

    Times are in seconds, of the clock and of this process's CPU; memory and optimizer state in bytes.
    """
    torch.manual_seed(job.seed)
    batches = pack(base.tokenizer, base.text.train, job.seed)
    steps = job.steps or len(batches.ids)
    loaded = peak_memory()
    config = arms.MEMORY.replace(seed=job.seed)
    model, memory = arms.build(job.arm, base.model, base.token_map, config, batches)
    record: dict[str, Any] = {
        "key": job.key,
        **asdict(job),
        "steps": 0 if job.arm == "reference" else steps,
        "batches": batches.digest,
        "text": corpus_digest(base.text.train),
        "overlap_13gram": base.overlap,
        "memory": None if memory is None else json.loads(memory.config.to_json()),
        "trained_parameters": arms.trained_parameters(model, memory, batches),
        "dense_trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "total_parameters": arms.total_parameters(model, memory),
        "lora_rank": model.peft_config["default"].r if hasattr(model, "peft_config") else None,
    }
    if job.arm != "reference":
        record |= train(model, batches, steps, job.lr, job.table_lr)
        record["peak_memory"], record["loaded_memory"] = peak_memory(), loaded
    began = time.perf_counter()
    sides = ("inside", "taught") if job.held_out == "tune" else SIDES
    arrays = measure(model, base.tokenizer, base.text, sides)
    record["measures"] = means(arrays, sides)
    if job.arm == "both" and job.held_out == "validation":
        memory.detach()
        off = measure(model, base.tokenizer, base.text, sides)
        record["measures_off"] = means(off, sides)
        arrays |= {f"off_{name}": values for name, values in off.items()}
    record |= {
        "evaluation_seconds": time.perf_counter() - began,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "code": code_version(),
        "sources": sources_digest(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    return record, {name: values.astype(np.float32) for name, values in arrays.items()}


def means(arrays: dict[str, np.ndarray], sides: tuple[str, ...]) -> dict[str, float]:
    """Return means of the measures. inside_bpb, outside_bpb: bits per byte. taught_, untaught_, rephrased_: nats per
    token; exact, rank as shares."""
    found = {}
    for side in sides:
        nats = float(arrays[f"{side}_nats"].sum())
        if side in ("inside", "outside"):
            found[f"{side}_bpb"] = nats / float(arrays[f"{side}_bytes"].sum()) / math.log(2)
        else:
            found[f"{side}_nats"] = nats / float(arrays[f"{side}_tokens"].sum())
            shares = (name for name in (f"{side}_exact", f"{side}_rank") if name in arrays)
            found |= {name: float(arrays[name].mean()) for name in shares}
    return found
