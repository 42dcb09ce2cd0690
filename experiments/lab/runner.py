"""Make a list of runs, each in a process of its own, and append a line to results.jsonl for each that finished.

A sweep that was stopped goes on where it was: what is in the file is not run again.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engram.lm.run import Setting
from engram.storage.files import write_whole
from experiments.lab.caches import FOLDER
from experiments.lab.cell import HOME, Run, hook, names
from experiments.lab.execute import execute
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
from experiments.lab.trainings import FILE, training_of

SAME = 1e-6  # nats per token between a run and the same run again


def rekey(home: Path, experiment: str, file: Path) -> int:
    """Give runs from before the configuration gained a field the key that they have now, with the field's default,
    which they ran with. Their documents get the same key. Return how many changed; the caller holds the lock."""
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
        print(f"{file}: {len(renamed)} runs from before a field was added have new keys", file=sys.stderr)
    return len(renamed)


def sweep(
    runs: Sequence[Run],
    home: Path = HOME,
    workers: int = 1,
    threads: int = 1,
    limit_minutes: float | None = None,
    others: Iterable[str] | None = None,
) -> int:
    """Make every run that is not in its results file yet. Return how many failed; they are in failures.log.

    Args:
        runs: of any questions; home/<question>/results.jsonl (tune.jsonl for tuning runs) takes the lines.
        workers: runs side by side, each in a process of its own with `threads` threads.
        limit_minutes: no run starts later than this. others: questions whose finished runs are copied; default: all.
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

    def one(number: int, run: Run) -> bool | None:
        if limit_minutes is not None and time.monotonic() - began > 60 * limit_minutes:
            return None
        name = f"[{number}/{len(pending)}] {run.experiment} {run.variant} ({run.table})"
        training, shared = training_of(run), {FOLDER: prepared}
        if training is not None and trainings[training] > 1:
            shared[FILE] = os.path.join(prepared, f"trained-{training}.pt")
        return _one(home, run, threads, shared, name)

    print(f"{len(runs) - len(pending)} of {len(runs)} runs are made, {len(pending)} to do", flush=True)
    with tempfile.TemporaryDirectory(prefix="engram-lab-") as prepared, ThreadPoolExecutor(workers) as pool:
        ended = list(pool.map(one, range(1, len(pending) + 1), pending))
    if None in ended:
        print(f"{ended.count(None)} runs not started within {limit_minutes:g} minutes", flush=True)
    return ended.count(False)


def run_again(runs: Sequence[Run], home: Path = HOME, **how: Any) -> int:
    """Make finished runs once more in another folder, and print both losses. No result is written.

    Args:
        how: workers, threads, limit_minutes, as of `sweep`. Other threads than the first time's may change a loss.

    Returns:
        How many failed or differ by more than 1e-6 nats per token.

    Raises:
        ValueError: a run without a result to compare with.
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
        if first is None or second is None:  # it failed, or did not start in time: sweep has printed that
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
    """Return True if a record in the file of `experiment` is this run's. The key leaves out what is measured besides
    the loss: a question that measures more needs runs of its own, and runs from before it did are made again."""
    measured = experiment == run.experiment and "measures" in record
    return record["key"] == run.key and (measured or hook(run.experiment, "measure") is None)


def _take_over(home: Path, run: Run, others: Iterable[str]) -> bool:
    """Copy a finished run of the same key from another question, or from this one under an older name."""
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


def _one(home: Path, run: Run, threads: int, shared: dict[str, str], name: str) -> bool:
    """Make one run in its own process, so that its peak memory and its crash are its own. shared: environment variables
    that name what the runs of the sweep share."""
    size = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    python_path = os.pathsep.join(filter(None, (str(HOME.parent), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        _child_command(home, threads),
        input=run.to_json(),
        env={**os.environ, **size, "HF_HUB_OFFLINE": "1", "PYTHONPATH": python_path, **shared},
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
    """Make the run on standard input in this process; write its documents to the folder and its line to standard
    output."""

    def on_step(step: int, loss: float) -> None:
        if os.getppid() != parent:  # the sweep was killed, so the result would be lost
            raise SystemExit("the sweep is gone")

    run = Run.from_json(sys.stdin.read())
    with contextlib.redirect_stdout(sys.stderr):  # what an arm prints must not mix with the line
        record, documents = execute(run, threads, on_step)
    if run.held_out == "validation":
        write_documents(home / run.experiment, run.key, documents)
    print(json.dumps(record, default=float))  # extra_facts of an arm may be NumPy numbers


if __name__ == "__main__":
    _child(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
