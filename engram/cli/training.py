"""engram ablate and train: the commands that train models."""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from engram.cli.options import Budget, Corpus, Device, Json, Threads, app, parse_count, parse_seeds


def _setting(corpus: str, budget: str, lr: float | None, table_lr: float | None) -> Any:
    from engram.lm.run import Setting

    setting = Setting(corpus=corpus)
    train = setting.train
    lr, table_lr = train.lr if lr is None else lr, train.table_lr if table_lr is None else table_lr
    return replace(setting, train=replace(train, tokens=parse_count(budget), lr=lr, table_lr=table_lr))


def _describe(data: Any) -> None:
    print(
        f"corpus {data.digest[:12]}: {len(data.train.ids):,} training tokens in {len(data.train.starts) - 1:,} "
        f"documents, "
        f"{len(data.validation.ids):,} held out in {len(data.validation.starts) - 1:,}; "
        f"13-gram overlap {float(data.overlap):.2%}",
        file=sys.stderr,
    )


@app.command()
def ablate(
    budget: Budget = "1M",
    seeds: Annotated[str, typer.Option(help="Seeds joined by commas; each arm runs once per seed.")] = "0",
    corpus: Corpus = "wiki+shakespeare+kjv",
    arms: Annotated[str, typer.Option(help="Arms joined by commas: plain, one-row, random, engram.")] = (
        "plain,one-row,engram"
    ),
    out: Annotated[
        Path, typer.Option(help="Folder for report.json, curves.png and report.html, written after each run.")
    ] = Path("runs/ablation"),
    lr: Annotated[float | None, typer.Option(help="Learning rate of the dense weights.")] = None,
    table_lr: Annotated[float | None, typer.Option(help="Learning rate of the table rows.")] = None,
    held_out: Annotated[
        str, typer.Option(help="Part of the text to compare on: validation; or tune, to choose learning rates.")
    ] = "validation",
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Train the same small transformer without memory, with a one-row memory and with Engram, and compare them.

    OUT/log.jsonl gets one JSON line per step of each model: arm, seed, step, loss (nats per token).
    """
    from engram._extras import require
    from engram.ablation import ablate as job
    from engram.ablation.tables import print_report
    from engram.lm.progress import Progress, Task
    from engram.lm.run_folder import StepLog, alone_in
    from engram.lm.train import tune_allocator

    require("the figure of `engram ablate`", "matplotlib", "PIL")  # before the work that it shows
    setting = _setting(corpus, budget, lr, table_lr)
    if held_out not in ("validation", "tune"):
        raise ValueError(f"--held-out must be validation or tune, not {held_out!r}")
    if (out / "run.json").exists():
        raise ValueError(
            f"{out} is the folder of a run of `engram train`, whose log.jsonl would be lost: give another folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()  # raises before the work if the folder cannot be written
    tune_allocator()
    with ExitStack() as stack:
        stack.enter_context(alone_in(out))
        progress = stack.enter_context(Progress())
        logs: list[StepLog] = []
        tasks: dict[tuple[str, int, str], Task] = {}
        text = progress.task("preparing the text")

        def task(arm: str, seed: int, what: str, total: int, unit: str) -> Task:
            if (arm, seed, what) not in tasks:
                tasks[arm, seed, what] = progress.task(f"{arm}, seed {seed}{what}", total, unit)
            return tasks[arm, seed, what]

        def on_data(data: Any) -> None:
            text.finish()
            _describe(data)
            logs.append(stack.enter_context(closing(StepLog(out, 0))))  # only after the arguments were checked

        def on_step(arm: str, seed: int, step: int, steps: int, loss: float) -> None:
            logs[0].write({"arm": arm, "seed": seed, "step": step, "loss": loss})
            one = task(arm, seed, "", steps, "steps")
            speed = step * setting.train.batch_size * setting.train.context / max(one.seconds, 1e-9)
            one.update(step, text=f"{speed if step > 1 else 0:,.0f} tok/s, loss {loss:.3f}")

        def on_evaluate(arm: str, seed: int, tokens: int, total: int) -> None:
            task(arm, seed, ", scoring", total, "tokens").update(tokens, total)

        report = job.ablate(
            setting,
            arms.split(","),
            parse_seeds(seeds),
            held_out=held_out,
            device=device,
            command=" ".join(["engram", *sys.argv[1:]]),
            on_step=on_step,
            on_evaluate=on_evaluate,
            on_data=on_data,
            on_report=lambda report: job.write_report(report, out),  # after each run, in case a later one is killed
        )
    if as_json:
        print(json.dumps(report))
    else:
        print_report(report)
        print(f"wrote {out}/report.json, {out}/curves.png, {out}/report.html and {out}/log.jsonl")


@app.command()
def train(
    out: Annotated[
        Path, typer.Option(help="Folder of the run. If it has checkpoints of the same setting, the run resumes.")
    ],
    arm: Annotated[str, typer.Option(help="The model: plain, one-row, random or engram.")] = "engram",
    budget: Budget = "1M",
    seed: int = 0,
    corpus: Corpus = "wiki+shakespeare+kjv",
    lr: Annotated[float | None, typer.Option(help="Learning rate of the dense weights.")] = None,
    table_lr: Annotated[float | None, typer.Option(help="Learning rate of the table rows.")] = None,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    keep_checkpoints: Annotated[
        int, typer.Option(min=0, help="Newest checkpoints to keep; each contains the tables. 0: all.")
    ] = 0,
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Train one small language model, with checkpoints. Run the command again after an interruption to resume.

    OUT/log.jsonl gets one JSON line per step: step, tokens, loss (nats per token), lr, tokens_per_second, seconds.
    """
    from engram.device import device_of
    from engram.lm.progress import Progress
    from engram.lm.run import build_model, prepare, save_run
    from engram.lm.run_folder import alone_in
    from engram.lm.train import train as run
    from engram.lm.train import tune_allocator

    torch_device = device_of(device)  # before the text is prepared, which takes time
    setting = _setting(corpus, budget, lr, table_lr).seeded(seed)
    tune_allocator()
    with alone_in(out), Progress() as progress:
        text = progress.task("preparing the text")
        data = prepare(setting)
        text.finish()
        _describe(data)
        model = build_model(setting, arm, data.token_map).to(torch_device)
        save_run(out, setting, arm, data)
        task = progress.task(f"{arm}, seed {seed}", setting.train.steps, "steps")
        start: list[int] = []

        def on_step(step: int, loss: float) -> None:
            start.append(step)
            done = (step - start[0]) * setting.train.batch_size * setting.train.context
            task.update(step, text=f"{done / max(task.seconds, 1e-9):,.0f} tok/s, loss {loss:.3f}")

        log = run(
            model,
            data.train,
            setting.train,
            folder=out,
            checkpoint_every=checkpoint_every,
            keep_checkpoints=keep_checkpoints,
            on_step=on_step,
        )
    print(f"{log.tokens:,} tokens in {log.seconds:.0f} s, last training loss {log.curve[-1][1]:.3f}; saved in {out}")
