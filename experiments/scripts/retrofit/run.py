"""Train a pretrained model further on one text: with a memory, with LoRA, with both, with all its weights.

    python experiments/scripts/retrofit/run.py tune      # learning rates, on other facts and services
    python experiments/scripts/retrofit/run.py run       # every arm of each seed; goes on if it was stopped
    python experiments/scripts/retrofit/run.py report    # tables.md, from results.jsonl
    python experiments/scripts/retrofit/run.py plot      # figure.png

The script is a runner of its own because a run starts from a pretrained model that all runs share in memory.

Every run is a process of its own, forked from one that holds the model, and appends one line to results.jsonl (or
tune.jsonl). What is in the file is not run again.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[3]))  # so that the lab is found where this is run as a script

from engram import TokenMap
from engram.lm.corpus import overlap_13gram
from engram.lm.train import tune_allocator
from experiments.lab.results import append, read_results, write_documents
from experiments.scripts.retrofit import arms, summary
from experiments.scripts.retrofit.data import load_text
from experiments.scripts.retrofit.job import Base, Job, execute

HOME = Path(__file__).parent
# (lr, table lr) tried; 0: the arm has no table. The other arms take the rates of these (RATES_OF).
GRID: dict[str, list[tuple[float, float]]] = {
    "memory": [(3e-3, 0.1), (3e-3, 0.3), (3e-3, 1.0), (1e-3, 0.3)],
    "full": [(1e-4, 0), (3e-4, 0), (1e-3, 0)],
    "lora": [(5e-4, 0), (1e-3, 0), (2e-3, 0), (4e-3, 0), (8e-3, 0)],
}
# {arm: (the arm whose lr it takes, the arm whose table lr it takes)}.
RATES_OF = {
    **{arm: (arm, arm) for arm in GRID},
    "both": ("lora", "memory"),
    "full-seconds": ("full", "full"),
    "one-row": ("memory", "memory"),
}


def rates(arm: str, home: Path) -> tuple[float, float]:
    """Return (lr, table lr) of an arm: the best of tune.jsonl, without those at which a run of results.jsonl diverged.

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
    """Return every arm of the first seed, then of the next, and the control of all seeds at the end. The reference,
    which has no seed, is measured once."""
    planned = [
        Job(arm, seed, *rates(arm, home))
        for seed in seeds
        for arm in arms.NAMES
        if arm != "reference" or seed == seeds[0]
    ]
    return sorted(planned, key=lambda job: job.arm == "one-row")


def affordable_steps(job: Job, records: list[dict[str, Any]]) -> int:
    """Return the steps of all weights in the CPU seconds that `memory` took, by the median step of both in the same
    seed.

    Raises:
        ValueError: one of the two was not run yet.
    """
    mine = {r["arm"]: r for r in records if r["seed"] == job.seed}
    if "memory" not in mine or "full" not in mine:
        raise ValueError(f"full-seconds of seed {job.seed} needs the seconds of memory and full: run them first")
    memory, full = mine["memory"], mine["full"]
    steps = round(memory["steps"] * memory["step_cpu_seconds"] / full["step_cpu_seconds"])
    return min(max(1, steps), full["steps"])  # the text is read once


def sweep(planned: list[Job], base: Any, home: Path, file: Path) -> int:
    """Run what is not in `file` yet, each in a forked process, and return how many failed. base() loads the model."""
    failed, loaded = 0, None
    for job in planned:
        records = read_results(file)
        if job.key in {record["key"] for record in records}:
            continue
        loaded = loaded or base()
        try:
            if job.arm == "full-seconds":
                job = replace(job, steps=affordable_steps(job, records))
            record = _in_a_process(job, loaded, home)
        except (ValueError, RuntimeError) as error:
            failed += 1
            print(f"{job.arm} seed {job.seed} failed: {error}", file=sys.stderr, flush=True)
            continue
        append(file, record)
        found = " ".join(f"{name} {value:.3f}" for name, value in record["measures"].items())
        print(f"{job.arm} seed {job.seed} lr {job.lr:g} {job.table_lr:g}: {found}", flush=True)
    return failed


def _in_a_process(job: Job, base: Base, home: Path) -> dict[str, Any]:
    context = multiprocessing.get_context(
        "fork"
    )  # the parent has loaded the model, and its weights are shared until changed
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
        write_documents(home, job.key, arrays)
    pipe.send(record)


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
