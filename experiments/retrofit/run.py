"""A pretrained model goes on training on one text: with a memory, with LoRA, with both, with all its weights.

    python experiments/retrofit/run.py tune      # learning rates, on other facts and services than those reported
    python experiments/retrofit/run.py run       # every arm of seed 0, then of seeds 1 and 2; goes on if it was stopped
    python experiments/retrofit/run.py report    # the tables of README.md, from results.jsonl
    python experiments/retrofit/run.py plot      # figure.png

Every run is a process of its own, forked from one that holds the model, and appends one line to results.jsonl (or
tune.jsonl). What is in the file is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import resource
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import xxhash

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that the lab is found where this is run as a script

from engram import TokenMap, build_optimizer
from engram.lm.corpus import corpus_digest, overlap_13gram
from engram.lm.train import tune_allocator
from experiments.config import read_results
from experiments.retrofit import arms, summary
from experiments.retrofit.data import REPORTED, TUNING, Text, load_text, pack
from experiments.retrofit.measure import SIDES, measure
from experiments.version import code_version, sources_digest

HOME = Path(__file__).parent
WARM_UP, CLIP = 4, 1.0  # steps; norm of the dense gradient

# (lr, table lr) tried; 0: the arm has no table. The other arms take the rates of these (RATES_OF).
GRID: dict[str, list[tuple[float, float]]] = {
    "memory": [(3e-3, 0.1), (3e-3, 0.3), (3e-3, 1.0), (1e-3, 0.3)],
    "full": [(1e-4, 0), (3e-4, 0), (1e-3, 0)],
    "lora": [(5e-4, 0), (1e-3, 0), (2e-3, 0), (4e-3, 0), (8e-3, 0)],
}
# Whose lr and whose table lr an arm takes.
RATES_OF = {
    **{arm: (arm, arm) for arm in GRID},
    "both": ("lora", "memory"),
    "full-seconds": ("full", "full"),
    "one-row": ("memory", "memory"),
}


@dataclass(frozen=True)
class Job:
    """One run. `steps`: fewer than the text has, for `full-seconds`; 0 for all."""

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
    """What all runs start from. The model is changed by a run: each has its own process."""

    model: Any
    tokenizer: Any
    token_map: TokenMap
    text: Text
    overlap: dict[str, float]  # share of the 13-grams of each held-out side that the training text has


def train(model: Any, memory: Any, batches: Any, steps: int, lr: float, table_lr: float) -> dict[str, Any]:
    """Trains in bfloat16 (autocast; weights, rows and optimiser in float32). Warm-up, then linearly down to zero."""
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
    """(line of results.jsonl, arrays of the side file). Changes base.model: call it in a process of its own.

    Times are in seconds, of the wall and of this process's CPU; memory and optimiser state in bytes.
    """
    torch.manual_seed(job.seed)
    batches = pack(base.tokenizer, base.text.train, job.seed)
    steps = job.steps or len(batches.ids)
    loaded = _peak_memory()
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
        record |= train(model, memory, batches, steps, job.lr, job.table_lr)
        record["peak_memory"], record["loaded_memory"] = _peak_memory(), loaded
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
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    return record, {name: values.astype(np.float32) for name, values in arrays.items()}


def means(arrays: dict[str, np.ndarray], sides: tuple[str, ...]) -> dict[str, float]:
    """inside_bpb, outside_bpb: bits per byte. taught_, untaught_, rephrased_: nats per token; exact, rank as shares."""
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


def rates(arm: str, home: Path) -> tuple[float, float]:
    """(lr, table lr) of an arm: the best of tune.jsonl, without those at which a run of results.jsonl diverged.

    Raises:
        FileNotFoundError: they were not tuned yet.
    """
    if arm == "reference":
        return 0.0, 0.0
    runs = [record for record in read_results(home / "results.jsonl") if summary.diverged(record)]
    bad = {(r["arm"], r["lr"], r["table_lr"]) for r in runs}
    found = []
    for source, name in zip(RATES_OF[arm], ("lr", "table_lr"), strict=True):
        tuned = [r for r in read_results(home / "tune.jsonl") if r["arm"] == source]
        tuned = [r for r in tuned if (source, r["lr"], r["table_lr"]) not in bad]
        if not tuned:
            raise FileNotFoundError(f"tune.jsonl has no learning rates of {source} for {arm}: run `tune` first")
        found.append(min(tuned, key=lambda r: (summary.total(r), r["key"]))[name])
    return found[0], found[1]


def tuning_jobs() -> list[Job]:
    return [Job(arm, 0, lr, table_lr, "tune") for arm, grid in GRID.items() for lr, table_lr in grid]


def jobs(seeds: list[int], home: Path) -> list[Job]:
    """Every arm of the first seed, then of the next, and the control of all seeds at the end. The reference, which has
    no seed, is measured once."""
    planned = [
        Job(arm, seed, *rates(arm, home))
        for seed in seeds
        for arm in arms.NAMES
        if arm != "reference" or seed == seeds[0]
    ]
    return sorted(planned, key=lambda job: job.arm == "one-row")


def affordable_steps(job: Job, records: list[dict[str, Any]]) -> int:
    """Steps of all weights in the CPU seconds that `memory` took, by the median step of both in the same seed.

    Raises:
        ValueError: one of the two was not run yet.
    """
    mine = {r["arm"]: r for r in records if r["seed"] == job.seed}
    if "memory" not in mine or "full" not in mine:
        raise ValueError(f"full-seconds of seed {job.seed} needs the seconds of memory and full: run them first")
    memory, full = mine["memory"], mine["full"]
    steps = round(memory["steps"] * memory["step_cpu_seconds"] / full["step_cpu_seconds"])
    return min(max(1, steps), full["steps"])  # one pass over the text is all there is


def sweep(planned: list[Job], base: Any, home: Path, file: Path) -> int:
    """Runs what is not in `file` yet, each in a forked process, and returns how many failed. base() loads the model."""
    failed, loaded = 0, None
    for job in planned:
        records = read_results(file)
        if job.key in {record["key"] for record in records}:
            continue
        loaded = loaded or base()
        try:
            if job.arm == "full-seconds":
                job = Job(**{**asdict(job), "steps": affordable_steps(job, records)})
            record = _in_a_process(job, loaded, home)
        except (ValueError, RuntimeError) as error:
            failed += 1
            print(f"{job.arm} seed {job.seed} failed: {error}", file=sys.stderr, flush=True)
            continue
        with file.open("a") as results:
            results.write(json.dumps(record) + "\n")
        found = " ".join(f"{name} {value:.3f}" for name, value in record["measures"].items())
        print(f"{job.arm} seed {job.seed} lr {job.lr:g} {job.table_lr:g}: {found}", flush=True)
    return failed


def _in_a_process(job: Job, base: Base, home: Path) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")  # the model is there already and its weights are shared until changed
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(job, base, home, theirs))
    process.start()
    theirs.close()
    try:
        record = ours.recv()
    except EOFError:
        record = None
    process.join()
    if record is None:
        raise RuntimeError(f"its process ended with status {process.exitcode}")
    return record


def _child(job: Job, base: Base, home: Path, pipe: Any) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    try:
        record, arrays = execute(job, base)
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None
    if job.held_out == "validation":
        side = home / "documents" / f"{job.key}.npz"
        side.parent.mkdir(parents=True, exist_ok=True)
        partial = side.with_name(f".{job.key}.partial.npz")
        np.savez_compressed(partial, **arrays)  # type: ignore[arg-type]
        partial.replace(side)
    pipe.send(record)


def _peak_memory() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def load_base(held_out: str) -> Base:
    model, tokenizer = arms.pretrained()
    text = load_text(tokenizer, held_out)
    overlap = {side: float(overlap_13gram(text.train, getattr(text, side))) for side in ("inside", "outside")}
    return Base(model, tokenizer, TokenMap.from_tokenizer(tokenizer), text, overlap)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tune", "run", "report", "plot"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    if given.what == "report":
        summary.write(HOME)
    elif given.what == "plot":
        summary.draw(HOME)
    else:
        tune_allocator()
        tuning = given.what == "tune"
        planned = tuning_jobs() if tuning else jobs(given.seeds, HOME)
        file = HOME / ("tune.jsonl" if tuning else "results.jsonl")
        sys.exit(sweep(planned, lambda: load_base("tune" if tuning else "validation"), HOME, file) > 0)


if __name__ == "__main__":
    main()
