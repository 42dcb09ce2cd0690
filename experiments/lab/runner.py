"""Runs a list of runs, each in a process of its own, and appends one line to results.jsonl for each that finished.

A sweep that was stopped goes on where it was: what is in the file is not run again.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource  # peak memory; Unix only
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from engram.ablation.ngram_counts import seen_counts, seen_losses
from engram.lm.evaluate import eval_mode, evaluate
from engram.lm.run import Data, Setting
from engram.lm.train import train
from engram.memory import EngramMemory
from engram.storage.files import write_whole
from experiments import arms
from experiments.lab.caches import FOLDER, prepare
from experiments.lab.cell import HOME, Run, hook, names
from experiments.lab.results import (
    alone,
    append,
    document_keys,
    read_documents,
    read_results,
    rename_documents,
    repair,
    write_documents,
)
from experiments.lab.trainings import FILE, train_once, training_of
from experiments.lab.version import code_version, processor, sources_digest

CURVE_POINTS, LAST_STEPS = 40, 50
SAME = 1e-6  # nats per token between a run and the same run again


def execute(run: Run, threads: int = 1, on_step: Callable[[int, float], Any] | None = None) -> tuple[Any, Any]:
    """Trains and evaluates one run in this process.

    Returns:
        (the line of results.jsonl as a dict, {"nats": float32, "tokens": int32, "bytes": int32} of each held-out
        document, and the arrays that the experiment measured besides). Times are in seconds, losses in nats per token.
        train_loss is the mean of the last 50 steps, training FLOPs are three times the forward ones, peak_memory is of
        this process and in bytes, seen is what engram.ablation.ngram_counts says.
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
    own, shared, used = hook(run.experiment, "train"), False, time.process_time()
    if own is None:
        file = Path(os.environ[FILE]) if FILE in os.environ else None
        log, used, shared = train_once(model, lambda: train(model, data.train, setting.train, on_step=on_step), file)
    else:
        log = own(replace(run, setting=setting), model, data, on_step)
        used = time.process_time() - used
    weights = [p for p in model.parameters() if p.requires_grad]
    model = arms.finish(run.arm, model, setting, data, **options)
    tested = time.perf_counter()
    score, measure = hook(run.experiment, "evaluate"), hook(run.experiment, "measure")
    result = evaluate(model, data.validation) if score is None else score(run, model, data)
    evaluated = time.perf_counter()
    measured = {} if measure is None else measure(replace(run, setting=setting), model, data)
    peak = peak_memory()  # before n-grams are counted
    usual = own is None and score is None  # else it was trained on something else, or something else is scored
    seen = seen_losses(result, seen_counts(data, setting.train)) if usual else {}
    arrays = {name: value for name, value in measured.items() if isinstance(value, np.ndarray)}
    table, losses = arms.tables(model), [loss for _, loss in log.curve]  # tables again: finish() may have added one
    record = {
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
        "parameters": {"dense": stored["parameters"] - looked_up["parameters"], "table": table["parameters"]},
        "bytes": {
            "dense": stored["bytes"] - looked_up["bytes"],
            "table": table["bytes"],
            "optimizer_dense": 2 * sum(p.nbytes for p in weights),  # AdamW keeps two moments
            "optimizer_rows": log.row_state_bytes,
        },
        "flops_per_token": {"forward": flops, "training": 3 * flops},
        "train_loss": float(np.mean(losses[-LAST_STEPS:])),
        "curve": [np.mean(part, axis=0).tolist() for part in np.array_split(log.curve, min(CURVE_POINTS, len(losses)))],
        "loss": result.loss,
        "bpb": result.bits_per_byte,
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


def forward_flops(model: nn.Module, data: Data, context: int) -> float:
    """FLOPs per token of a forward pass over one window of held-out text, as torch counts them: matrix products and
    attention (as two dense products: the causal half is not subtracted); lookups and what is elementwise are free."""
    ids = torch.from_numpy(data.validation.ids[:context]).long()[None]
    # The fused attention of the CPU is unknown to the counter; the plain one is made of products that it knows.
    with torch.no_grad(), eval_mode(model), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids)
    return counter.get_total_flops() / ids.numel()


def _stored(model: nn.Module) -> dict[str, int]:
    """Parameters and bytes of everything a model holds, tables in host memory included."""
    memories = [module for module in model.modules() if isinstance(module, EngramMemory)]
    host = sum(table.nbytes for memory in memories for table in memory.tables.values())
    return {
        "parameters": sum(p.numel() for p in model.parameters()) + sum(m.table_parameters() for m in memories),
        "bytes": sum(p.nbytes for p in model.parameters()) + host,
    }


def peak_memory() -> int:
    """Of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def rekey(home: Path, experiment: str, file: Path) -> int:
    """Give runs from before the configuration gained a field the key that they have now, with the field's default: it
    is what they ran with. Their documents move along. Returns how many changed; the caller holds the lock."""
    records, renamed = read_results(file), {}
    for record in records:
        setting, options = Setting.from_json(json.dumps(record["setting"])), tuple(record["options"].items())
        rest = {"held_out": record["held_out"], "device": record.get("device", "cpu")}
        run = Run(experiment, record["arm"], setting, options, **rest)
        if run.key != record["key"]:
            renamed[record["key"]] = run.key
            record |= {"key": run.key, "cell": run.kind, "setting": asdict(setting)}
    if renamed:
        rename_documents(home / experiment, renamed)
        write_whole(file, "".join(json.dumps(record) + "\n" for record in records).encode())
        print(f"{file}: {len(renamed)} runs from before a field was added keep their place", file=sys.stderr)
    return len(renamed)


def sweep(
    runs: Sequence[Run],
    home: Path = HOME,
    workers: int = 1,
    threads: int = 1,
    limit_minutes: float | None = None,
    others: Iterable[str] | None = None,
) -> int:
    """Makes every run that is not in its results file yet. Returns how many failed; they are in failures.log.

    Args:
        runs: of any experiments; home/<experiment>/results.jsonl (tune.jsonl for tuning runs) takes the lines.
        workers: runs side by side, each in a process of its own with `threads` threads.
        limit_minutes: after this long no new run begins. others: questions whose finished runs are taken over;
            default: all.
    """
    began, others = time.monotonic(), names() if others is None else tuple(others)
    for experiment, file in {(run.experiment, _file(home, run.experiment, run)) for run in runs}:
        file.parent.mkdir(parents=True, exist_ok=True)
        with alone(file.parent):
            repair(file)
            rekey(home, experiment, file)
    pending = []
    for run in {(run.experiment, run.key): run for run in runs}.values():
        if not _is_done(home, run) and not _take_over(home, run, others):
            pending.append(run)

    trainings = Counter(map(training_of, pending))

    def one(place: int, run: Run) -> bool | None:
        if limit_minutes is not None and time.monotonic() - began > 60 * limit_minutes:
            return None
        name = f"[{place}/{len(pending)}] {run.experiment} {run.variant} ({run.table})"
        training, places = training_of(run), {FOLDER: prepared}
        if training is not None and trainings[training] > 1:
            places[FILE] = os.path.join(prepared, f"trained-{training}.pt")
        return _one(home, run, threads, places, name)

    print(f"{len(runs) - len(pending)} of {len(runs)} runs are there, {len(pending)} to do", flush=True)
    with tempfile.TemporaryDirectory(prefix="engram-lab-") as prepared, ThreadPoolExecutor(workers) as pool:
        ended = list(pool.map(one, range(1, len(pending) + 1), pending))
    if None in ended:
        print(f"{ended.count(None)} runs not begun within {limit_minutes:g} minutes", flush=True)
    return ended.count(False)


def run_again(runs: Sequence[Run], home: Path = HOME, **how: Any) -> int:
    """Makes runs that are in their results files once more, elsewhere, and prints both losses. Nothing is written.

    Args:
        how: workers, threads, limit_minutes, as of `sweep`. Other threads than the first time's may change a loss.

    Returns:
        How many failed or differ by more than 1e-6 nats per token.

    Raises:
        ValueError: a run that is not there to compare with.
    """
    before = {run: _newest(home, run) for run in runs}
    missing = [f"{run.variant} seed {run.seed}" for run, line in before.items() if line is None]
    if missing:
        raise ValueError(f"nothing to compare with: {', '.join(missing)} did not run yet")
    with tempfile.TemporaryDirectory(prefix="engram-lab-") as elsewhere:
        wrong = sweep(runs, Path(elsewhere), others=(), **how)
        after = {run: _newest(Path(elsewhere), run) for run in runs}
    for run in runs:
        first, second = before[run], after[run]
        if first is None or second is None:  # it failed, or did not begin in time: sweep has said so
            continue
        apart = abs(second["loss"] - first["loss"])
        wrong += apart > SAME
        print(f"{run.variant} ({run.table}) seed {run.seed}: {first['loss']:.7f}, again {second['loss']:.7f}", end="")
        print(f", {apart:.1e} apart{'' if apart <= SAME else ': NOT THE SAME'}")
    return wrong


def _newest(home: Path, run: Run) -> dict[str, Any] | None:
    lines = [line for line in read_results(_file(home, run.experiment, run)) if line["key"] == run.key]
    return lines[-1] if lines else None


def _file(home: Path, experiment: str, run: Run) -> Path:
    return home / experiment / ("tune.jsonl" if run.held_out == "tune" else "results.jsonl")


def _is_done(home: Path, run: Run) -> bool:
    lines = [line for line in read_results(_file(home, run.experiment, run)) if _is_of(line, run, run.experiment)]
    return bool(lines) and (lines[-1]["variant"], lines[-1]["size"]) == (run.variant, run.size)


def _is_of(record: dict[str, Any], run: Run, experiment: str) -> bool:
    """Whether a record in the file of `experiment` is this run's. The key leaves out what is measured besides the loss:
    an experiment that does so needs runs of its own, and those from before it did are made again."""
    measured = experiment == run.experiment and "measures" in record
    return record["key"] == run.key and (measured or hook(run.experiment, "measure") is None)


def _take_over(home: Path, run: Run, others: Iterable[str]) -> bool:
    """Copies a finished run of the same key from another experiment, or from this one under an older name."""
    for other in (run.experiment, *others):
        for record in read_results(_file(home, other, run)):
            if not _is_of(record, run, other):
                continue
            if other != run.experiment and run.key in document_keys(home / other):
                write_documents(home / run.experiment, run.key, read_documents(home / other, run.key))
            its_own = {"experiment": run.experiment, "variant": run.variant, "size": run.size}
            append(_file(home, run.experiment, run), {**record, **its_own})
            return True
    return False


def _one(home: Path, run: Run, threads: int, places: dict[str, str], name: str) -> bool:
    """One run in its own process: so its peak memory is its own, and its crash too. places: where the sweep keeps what
    its runs share, as environment variables."""
    size = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    python_path = os.pathsep.join(filter(None, (str(HOME.parent), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        _child_command(home, threads),
        input=run.to_json(),
        env={**os.environ, **size, "HF_HUB_OFFLINE": "1", "PYTHONPATH": python_path, **places},
        capture_output=True,
        text=True,
    )
    try:
        record = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
        with (home / run.experiment / "failures.log").open("a", encoding="utf-8") as log:
            log.write(f"{when} {run.variant} ({run.table}) seed {run.seed} key {run.key}\n")
            log.write(f"exit status {done.returncode}\n{done.stderr}\n")
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        print(f"{name} seed {run.seed}: FAILED, see failures.log: {reason}", file=sys.stderr, flush=True)
        return False
    append(_file(home, run.experiment, run), record)
    print(f"{name} seed {run.seed}: {record['loss']:.4f} after {record['total_seconds']:.0f} s", flush=True)
    return True


def _child_command(home: Path, threads: int) -> list[str]:
    return [sys.executable, "-m", "experiments.lab.runner", str(home), str(threads), str(os.getpid())]


def _child(home: Path, threads: int, parent: int) -> None:
    """The other end of _one: run on standard input, side file into the folder, line to standard output."""

    def on_step(step: int, loss: float) -> None:
        if os.getppid() != parent:  # the sweep was killed: nobody would take the result
            raise SystemExit("the sweep is gone")

    run = Run.from_json(sys.stdin.read())
    with contextlib.redirect_stdout(sys.stderr):  # whatever an arm prints, the line is the line
        record, documents = execute(run, threads, on_step)
    if run.held_out == "validation":
        write_documents(home / run.experiment, run.key, documents)
    print(json.dumps(record, default=float))  # NumPy's numbers among an arm's facts


if __name__ == "__main__":
    _child(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
