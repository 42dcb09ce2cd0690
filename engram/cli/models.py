"""engram evaluate, generate and explain: the commands that run a trained model."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from engram.cli.options import Device, Json, Memory, Threads, app
from engram.storage.untrusted import printable


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
    limit: Annotated[int | None, typer.Option(help="Documents per task; default: all.")] = None,
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
        raise ValueError("--task-files, --limit and --memory need --tasks: give the tasks to score, or leave them out")
    if not (folder / "run.json").is_file() and (folder / "config.json").is_file():
        raise ValueError(f"{folder} is a model of transformers: give the tasks to score with --tasks")
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
        raise ValueError(f"--limit must be a number of documents, at least 1, not {limit}")
    from engram.lm.lm_eval import adapter, load_tasks, run_tasks
    from engram.lm.progress import Progress

    with Progress(live=False) as progress:  # lm-eval draws bars of its own
        progress.task(f"scoring {', '.join(names)}")
        tasks = load_tasks(names, task_files)  # before the model, so that a wrong name is reported at once
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
    """Load model and tokenizer of a run of `engram train`, or of a model folder of transformers, with its memory."""
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

    return load_pretrained(folder, memory, device)


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
        raise ValueError(
            f"the prompt has {ids.shape[1]} tokens, more than the model's {model.config.max_length}: shorten it"
        )
    tokens = min(tokens, model.config.max_length - ids.shape[1])
    with Progress() as progress:
        update = progress.task("writing", tokens, "tokens").update
        out = sample(model, ids, tokens, temperature=temperature, top_k=top_k, seed=seed, stop_id=0, on_token=update)
    print(printable(tokenizer.decode(out[0].tolist())))


@app.command()
def explain(
    folder: Annotated[Path, typer.Argument(help="Folder of a run of `engram train`, or of a model of transformers.")],
    text: Annotated[str, typer.Argument(help="Text to explain.")],
    memory: Memory = None,
    losses: Annotated[
        bool, typer.Option(help="Also show the loss with the memory off at each token: one forward pass per token.")
    ] = True,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Show what the memory did at each token of a text: n-grams, rows, gate, what it added and the loss without it."""
    from engram.inspect.explain import explain as run
    from engram.inspect.render import print_explanation
    from engram.lm.progress import Progress

    with Progress() as progress:
        progress.task("reading the text")
        model, tokenizer = _open(folder, memory, device)
        explanation = run(model, text, tokenizer, losses)
    if as_json:
        print(explanation.to_json())
    else:
        print_explanation(explanation)
