"""`engram ...`: thin. Every command is a function of the library with the same name."""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from contextlib import ExitStack, closing
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from engram.storage.untrusted import printable

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Corpus = Annotated[
    str,
    typer.Option(
        help="Names joined by '+' out of wiki, shakespeare, kjv, stdlib, botocore; or a folder or file: .txt, .md, "
        'and .jsonl, .json or .parquet with a "text"; also .gz.'
    ),
]
Budget = Annotated[str, typer.Option(help="Training tokens of each run: 1100000, 1.1M, 500k.")]
Memory = Annotated[
    Path | None, typer.Option(help="Memory to attach to a model of transformers: what memory.save wrote.")
]
Device = Annotated[str, typer.Option(help="Of the dense weights, such as cuda or cuda:1; tables stay in host memory.")]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=1024,
        callback=lambda count: _use_threads(count),
        help="CPU threads; default: the cores that affinity and control groups leave to this process.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _use_threads(count: int | None) -> None:
    """Set the threads of torch and of the kernels. torch's own default does not see the quota of a control group."""
    import torch

    from engram.tables import kernels

    if count is None:
        torch.set_num_threads(min(torch.get_num_threads(), kernels.CORES))
    else:
        torch.set_num_threads(count)
        kernels.set_threads(count)


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    from importlib.metadata import PackageNotFoundError, version

    import torch

    import engram
    from engram.tables import kernels

    try:
        hf = f"transformers {version('transformers')}"
    except PackageNotFoundError:
        hf = "no transformers"
    path = "the torch path" if kernels.native is None else "compiled kernels"
    print(f"engram {engram.__version__} (torch {torch.__version__}, {hf}, {path})")
    raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Show versions and exit.")
    ] = False,
) -> None:
    """Conditional memory: hashed n-gram tables in host memory, gated into a transformer."""


def parse_count(text: str, what: str = "token budget") -> int:
    """ "1.1M" -> 1100000. Raises ValueError for anything else than a positive number with an optional k, M or G."""
    units = {"k": 1e3, "m": 1e6, "g": 1e9}
    try:
        number = float(text[:-1]) * units[text[-1].lower()] if text[-1:].lower() in units else float(text)
    except ValueError:
        number = 0.0
    if not 1 <= number < 1e15:
        raise ValueError(f"a {what} is a positive number such as 1100000, 1.1M or 500k, not {text!r}")
    return round(number)


def parse_seeds(text: str) -> list[int]:
    """ "0,1,2" -> [0, 1, 2]."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"seeds are integers joined by commas, such as 0,1,2, not {text!r}") from None


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
    seeds: Annotated[str, typer.Option(help="Seeds joined by commas; every arm runs once per seed.")] = "0",
    corpus: Corpus = "wiki+shakespeare+kjv",
    arms: Annotated[str, typer.Option(help="Arms joined by commas: plain, one-row, random, engram.")] = (
        "plain,one-row,engram"
    ),
    out: Annotated[
        Path, typer.Option(help="Folder for report.json, curves.png and report.html, written after each run.")
    ] = Path("runs/ablation"),
    lr: Annotated[float | None, typer.Option(help="Learning rate of the dense weights.")] = None,
    table_lr: Annotated[float | None, typer.Option(help="Learning rate of the table rows.")] = None,
    held_out: Annotated[str, typer.Option(help="validation; or tune, to choose learning rates on.")] = "validation",
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Train the same small transformer without memory, with a one-row memory and with Engram, and compare them.

    OUT/log.jsonl gets one JSON line per step of each model: arm, seed, step, loss (nats per token).
    """
    from engram.ablation import ablate as job
    from engram.ablation.tables import print_report
    from engram.lm.progress import Progress, Task
    from engram.lm.run_folder import StepLog, alone_in

    setting = _setting(corpus, budget, lr, table_lr)
    if held_out not in ("validation", "tune"):
        raise ValueError(f"held-out is validation or tune, not {held_out!r}")
    if (out / "run.json").exists():
        raise ValueError(f"{out} is the folder of a run of `engram train`, whose log.jsonl would be lost: give another")
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()  # a folder that cannot be written is refused before the work, not after it
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
            logs.append(stack.enter_context(closing(StepLog(out, 0))))  # now that the arguments are known to be good

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
            on_report=lambda report: job.write_report(report, out),  # a run that is killed leaves what it has
        )
    if as_json:
        print(json.dumps(report))
    else:
        print_report(report)
        print(f"wrote {out}/report.json, {out}/curves.png, {out}/report.html and {out}/log.jsonl")


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder of the run; one with checkpoints of this setting is resumed.")],
    arm: Annotated[str, typer.Option(help="plain, one-row, random or engram.")] = "engram",
    budget: Budget = "1M",
    seed: int = 0,
    corpus: Corpus = "wiki+shakespeare+kjv",
    lr: Annotated[float | None, typer.Option(help="Learning rate of the dense weights.")] = None,
    table_lr: Annotated[float | None, typer.Option(help="Learning rate of the table rows.")] = None,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    keep_checkpoints: Annotated[
        int, typer.Option(min=0, help="Checkpoints that stay, the newest; each holds the whole table. 0: all.")
    ] = 0,
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Train one small language model, with checkpoints; run it again after an interruption and it goes on.

    OUT/log.jsonl gets one JSON line per step: step, tokens, loss (nats per token), lr, tokens_per_second, seconds.
    """
    from engram.lm.progress import Progress
    from engram.lm.run import build_model, device_of, prepare, save_run
    from engram.lm.run_folder import alone_in
    from engram.lm.train import train as run

    place = device_of(device)  # before the text is made ready
    setting = _setting(corpus, budget, lr, table_lr).seeded(seed)
    with alone_in(out), Progress() as progress:
        text = progress.task("preparing the text")
        data = prepare(setting)
        text.finish()
        _describe(data)
        model = build_model(setting, arm, data.token_map).to(place)
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


@app.command()
def evaluate(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a run of `engram train`; with --tasks also a model folder.")
    ],
    corpus: Annotated[str | None, typer.Option(help="Text to score; default: the run's own validation part.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-eval, joined by commas, instead of a text.")] = None,
    task_files: Annotated[
        Path | None,
        typer.Option(
            help="Folder with the tasks' YAML files and their data. Task files are programs: their `!function` and "
            "templates run code, so use only files that you trust."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Documents of each task; default: all.")] = None,
    memory: Memory = None,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Score a trained model: nats per token and bits per byte, document by document; or tasks of lm-eval."""
    if tasks is not None:
        if corpus is not None:
            raise ValueError("--corpus scores a text and --tasks scores tasks: give one of them")
        _evaluate_tasks(folder, memory, tasks.split(","), task_files, limit, device, as_json)
        return
    if (task_files, limit, memory) != (None, None, None):
        raise ValueError("--task-files, --limit and --memory belong to --tasks, which names what to score")
    if not (folder / "run.json").is_file() and (folder / "config.json").is_file():
        raise ValueError(f"{folder} is a model of transformers: say with --tasks what to score it on")
    from engram.lm.corpus import load_corpus, split
    from engram.lm.evaluate import evaluate as score
    from engram.lm.progress import Progress
    from engram.lm.run import load_run
    from engram.lm.tokenizer import encode

    with Progress() as progress:
        reading = progress.task("reading model and text")
        model, tokenizer, setting, manifest = load_run(folder, device)
        documents = split(load_corpus(setting.corpus)).validation if corpus is None else load_corpus(corpus)
        encoded = encode(tokenizer, documents)
        reading.finish()
        result = score(model, encoded, on_tokens=progress.task("scoring", unit="tokens").update)
    figures = {
        "step": manifest["step"],
        "documents": len(documents),
        "tokens": int(result.document_tokens.sum()),
        "loss": result.loss,
        "bpb": result.bits_per_byte,
    }
    if as_json:
        print(json.dumps(figures))
    else:
        print("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v:,}" for k, v in figures.items()))


def _evaluate_tasks(
    folder: Path,
    memory: Path | None,
    names: list[str],
    task_files: Path | None,
    limit: int | None,
    device: str,
    as_json: bool,
) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if find_spec("lm_eval") is None:
        raise ValueError(
            "--tasks needs lm-eval, which is not installed: pip install -e '.[lm-eval]' in the project's folder"
        )
    if limit is not None and limit < 1:
        raise ValueError(f"--limit is a number of documents, 1 or more, not {limit}")
    from engram.lm.lm_eval import adapter, load_tasks, run_tasks
    from engram.lm.progress import Progress

    with Progress(live=False) as progress:  # lm-eval draws bars of its own
        progress.task(f"scoring {', '.join(names)}")
        tasks = load_tasks(names, task_files)  # before the model: a wrong name is found at once
        report = run_tasks(adapter(*_open(folder, memory, device)), tasks, limit)
    if as_json:
        print(json.dumps({"folder": str(folder), "memory": None if memory is None else str(memory), **report}))
        return
    table = Table()
    for heading in ("task", "metric", "value", "standard error", "documents"):
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right")
    for row in report["results"]:
        error = "–" if row["stderr"] is None else f"{row['stderr']:.4f}"
        table.add_row(
            Text(printable(row["task"])),
            Text(printable(row["metric"])),
            f"{row['value']:.4f}",
            error,
            f"{row['documents'] or '–'}",
        )
    Console().print(table)


def _open(folder: Path, memory: Path | None, device: str) -> tuple[Any, Any]:
    """Model and tokenizer of a run of `engram train`, or of a model folder of transformers with a memory attached."""
    if (folder / "run.json").is_file():
        if memory is not None:
            raise ValueError(f"{folder} is a run of `engram train`, which has its own memory: leave out --memory")
        from engram.lm.run import load_run

        return load_run(folder, device)[:2]
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds neither run.json (a run of `engram train`) nor config.json (a model of transformers)"
        )
    if find_spec("transformers") is None:
        raise ValueError(
            f"{folder} is a model of transformers, which is not installed: pip install -e '.[hf]' in the project's "
            f"folder"
        )
    from engram.integrations.transformers.pretrained import load_pretrained
    from engram.lm.run import device_of

    place = device_of(device)
    model, tokenizer = load_pretrained(folder, memory)
    return model.to(place), tokenizer


@app.command()
def generate(
    folder: Annotated[Path, typer.Argument(help="Folder of a run of `engram train`.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")] = "",
    tokens: Annotated[int, typer.Option(help="Tokens to add.")] = 100,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Continue a text with a trained model."""
    import torch

    from engram.lm.generate import generate as sample
    from engram.lm.progress import Progress
    from engram.lm.run import load_run

    model, tokenizer, _, _ = load_run(folder, device)
    text = [0, *tokenizer.encode(prompt).ids]  # 0: <|endoftext|>, which every document starts with
    ids = torch.tensor([text], device=device)
    if ids.shape[1] > model.config.max_length:
        raise ValueError(f"the prompt has {ids.shape[1]} tokens, the model holds {model.config.max_length}")
    tokens = min(tokens, model.config.max_length - ids.shape[1])
    with Progress() as progress:
        say = progress.task("writing", tokens, "tokens").update
        out = sample(model, ids, tokens, temperature=temperature, top_k=top_k, seed=seed, stop_id=0, on_token=say)
    print(printable(tokenizer.decode(out[0].tolist())))


@app.command()
def explain(
    folder: Annotated[Path, typer.Argument(help="Folder of a run of `engram train`, or of a model of transformers.")],
    text: Annotated[str, typer.Argument(help="Text to look at.")],
    memory: Memory = None,
    losses: Annotated[
        bool, typer.Option(help="Also switch the memory off at each token: one forward pass each.")
    ] = True,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Show what the memory did at each token of a text: n-grams, rows, gate, what it added and what that was worth."""
    from engram.inspect.explain import explain as run
    from engram.inspect.render import print_explanation
    from engram.lm.progress import Progress

    with Progress() as progress:
        progress.task("reading the text")
        model, tokenizer = _open(folder, memory, device)
        found = run(model, text, tokenizer, losses)
    if as_json:
        print(found.to_json())
    else:
        print_explanation(found)


@app.command()
def plan(
    config: Annotated[
        str,
        typer.Argument(help="A preset; or a model's or saved memory's folder or config.json; or an EngramConfig's."),
    ],
    hidden_size: Annotated[int | None, typer.Option(help="Of the model; default: what the config says.")] = None,
    streams: Annotated[
        int | None, typer.Option(help="Residual streams; default: what the config says, else 1.")
    ] = None,
    vocab: Annotated[int | None, typer.Option(help="Compressed vocabulary, where the config does not fix it.")] = None,
    ngrams: Annotated[
        str | None,
        typer.Option(help="Distinct n-grams of each order, such as 50M; default: one for each row of a head."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences of a step.")] = 32,
    context: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 4096,
    folder: Annotated[Path, typer.Option(help="Where the tables would lie: whose disk is looked at.")] = Path("."),
    as_json: Json = False,
) -> None:
    """Say what a memory costs before it is made: rows, bytes, reads, optimiser state, collisions. Allocates nothing."""
    from engram.inspect.plan import plan as run
    from engram.inspect.plan import read_shape
    from engram.inspect.render import print_plan
    from engram.integrations.formats.readers import read_config, unknown_fields

    if Path(config).is_dir():
        config = str(Path(config) / "config.json")
    wanted = read_config(config)
    if unknown := unknown_fields(config):
        print(printable(f"note: {config} has fields that are not read: {', '.join(unknown)}"), file=sys.stderr)
    known, usual = read_shape(config)
    hidden_size, streams = known if hidden_size is None else hidden_size, usual if streams is None else streams
    count = None if ngrams is None else parse_count(ngrams, "number of n-grams")
    found = run(wanted, hidden_size, streams, vocab, count, batch, context, folder)
    if as_json:
        print(found.to_json())
    else:
        print_plan(config, found)


@app.command()
def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="hash, lookup, update, codecs, step, prefetch, scale, disk, convert, attach, decode; default: some."
        ),
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure hashing, lookup, row updates and a training step beside the stock alternatives."""
    from rich.console import Console
    from rich.table import Table

    from engram.benchmarks import USUAL
    from engram.benchmarks import bench as run
    from engram.lm.progress import Progress

    with Progress() as progress:
        task = progress.task("measuring")
        results = run(tuple(names) if names else USUAL, on_name=lambda name: task.update(0, text=name))
    if as_json:
        print(json.dumps(results))
        return
    table = Table(title="medians; ratio: alternative's time / ours, above 1 ours is faster", title_justify="left")
    for heading in ("benchmark", "what", "value", "unit", "ratio"):
        table.add_column(heading, justify="right" if heading in ("value", "ratio") else "left")
    for name, rows in results.items():
        for i, row in enumerate(rows):
            ratio = "" if i == 0 else f"{row['ratio']:.2f}"
            table.add_row(name if i == 0 else "", row["what"], f"{row['value']:.3g}", row["unit"], ratio)
    Console().print(table)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A saved memory, a checkpoint, or the folder of a run.")],
    as_json: Json = False,
) -> None:
    """Read every byte of a saved memory or checkpoint and compare its digests; exit code 2 if anything is wrong."""
    from engram.lm.progress import Progress
    from engram.storage.files import verify as run

    with Progress() as progress:
        task = progress.task("reading", unit="bytes")
        totals: dict[str, int] = {}  # of the folders that were begun

        def on_bytes(file: str, count: int, total: int) -> None:
            totals[str(Path(file).parent)] = total
            task.update(task.done + count, sum(totals.values()), Path(file).name)

        results = run(folder, on_bytes)
    problems = [result["problem"] for result in results if result["problem"]]
    for note in filter(None, (result["note"] for result in results)):
        print(f"note: {printable(note)}", file=sys.stderr)
    if as_json:
        print(json.dumps({"folder": str(folder), "whole": not problems, "files": results}))
    elif not problems:
        total = sum(result["bytes"] for result in results)
        print(f"{printable(str(folder))} is whole: {len(results)} files, {total:,} bytes")
    for problem in problems:
        print(f"error: {printable(problem)}", file=sys.stderr)
    if problems:
        sys.exit(2)


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(help="A saved memory, or a released model: safetensors (file or folder) or a GGUF file."),
    ],
    target: Annotated[Path, typer.Argument(help="New folder; with --to gguf a new file.")],
    to: Annotated[
        str, typer.Option(help="engram, demo, deepseek-v4.1, deepseek-v4.1-interleaved, qwen or gguf.")
    ] = "engram",
    config: Annotated[str | None, typer.Option(help="A config.json, or a preset, where the source has none.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json, or a saved token map; default: looked for beside the source.")
    ] = None,
    shards: Annotated[int, typer.Option(help="Tensor-parallel ranks of deepseek-v4.1; parts of qwen's table.")] = 1,
    by: Annotated[str, typer.Option(help="row: ranks hold equally many rows; head: whole hash columns.")] = "row",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Write a memory in another format, streaming, and verify what was written."""
    from engram.integrations.formats import convert as run
    from engram.integrations.formats.readers import read_config, read_token_map
    from engram.lm.progress import Progress

    with Progress() as progress:
        task = progress.task(f"{source.name} to {to}, then reading it back", unit="bytes")
        report = run(
            source,
            target,
            to,
            config=None if config is None else read_config(config),
            token_map=None if tokenizer is None else read_token_map(tokenizer),
            shards=shards,
            by=by,
            on_bytes=task.update,
        )
    if as_json:
        print(json.dumps(report))
        return
    rows = ", ".join(f"layer {layer}: {count:,} rows" for layer, count in report["rows"].items())
    exact = "nothing was rounded" if report["lossless"] else f"largest rounding error {report['max_error']:.3g}"
    print(f"wrote {printable(str(target))} ({to}): {rows}, {report['bytes']:,} bytes; {exact}; read back and equal")
    if report["untrained"]:
        print("note: a GGUF file holds the tables alone: the projections of this memory are new and add nothing yet")


@app.command()
def inspect(
    path: Annotated[
        Path, typer.Argument(help="A saved memory, a run, a checkpoint, safetensors (file or folder), or a GGUF file.")
    ],
    config: Annotated[str | None, typer.Option(help="A config.json, or a preset, where the source has none.")] = None,
    as_json: Json = False,
) -> None:
    """Say what a checkpoint holds: tensors, which model's n-gram memory it is, rows and bytes. Reads headers only."""
    from engram.inspect.render import print_inspection
    from engram.integrations.formats import inspect as run
    from engram.integrations.formats.readers import read_config

    found = run(path, None if config is None else read_config(config))
    if as_json:
        print(json.dumps(found))
    else:
        print_inspection(found)


def main() -> None:
    """Entry point: what is wrong with the input is one line on stderr and exit code 2."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {printable(str(message))}\n"
    try:
        app()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, IndexError, FloatingPointError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
