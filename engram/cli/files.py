"""engram plan, bench, verify, convert and inspect: costs and files, without a model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from engram.cli.options import Json, Threads, app, parse_count
from engram.storage.untrusted import printable


@app.command()
def plan(
    config: Annotated[
        str,
        typer.Argument(
            help="A preset; or a folder or config.json of a model or saved memory; or an EngramConfig as JSON."
        ),
    ],
    hidden_size: Annotated[
        int | None, typer.Option(help="Hidden size of the model; default: that of the config.")
    ] = None,
    streams: Annotated[int | None, typer.Option(help="Residual streams; default: those of the config, else 1.")] = None,
    vocab: Annotated[int | None, typer.Option(help="Compressed vocabulary, if the config does not fix it.")] = None,
    ngrams: Annotated[
        str | None,
        typer.Option(help="Distinct n-grams of each order, such as 50M; default: one per row of a head."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences per step.")] = 32,
    context: Annotated[int, typer.Option(help="Tokens per sequence.")] = 4096,
    folder: Annotated[Path, typer.Option(help="Folder for the tables: its disk's free space is shown.")] = Path("."),
    as_json: Json = False,
) -> None:
    """Print what a memory costs before it is made: rows, bytes, reads, optimizer state, collisions.

    Nothing is allocated.
    """
    from engram.inspect.plan import plan as run
    from engram.inspect.plan import read_shape
    from engram.inspect.render import print_plan
    from engram.integrations.formats.readers import read_config, unknown_fields

    if Path(config).is_dir():
        config = str(Path(config) / "config.json")
    engram_config = read_config(config)
    if unknown := unknown_fields(config):
        print(printable(f"note: {config} has fields that are not read: {', '.join(unknown)}"), file=sys.stderr)
    width, count = read_shape(config)
    hidden_size, streams = width if hidden_size is None else hidden_size, count if streams is None else streams
    distinct = None if ngrams is None else parse_count(ngrams, "number of n-grams")
    planned = run(engram_config, hidden_size, streams, vocab, distinct, batch, context, folder)
    if as_json:
        print(planned.to_json())
    else:
        print_plan(config, planned)


@app.command()
def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="hash, lookup, update, codecs, step, prefetch, scale, disk, convert, attach, decode; default: hash, "
            "lookup, update and step."
        ),
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure hashing, lookup, row updates and a training step, each beside the usual alternatives.

    Hashing, lookup and updates are measured back to back, right after matrix products (as in a model) and after rest.
    """
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
    title = "medians; ratio: time of this line / time of the first one, above 1 engram is faster"
    table = Table(title=title, title_justify="left")
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
    from engram.storage.manifest import verify as run

    with Progress() as progress:
        task = progress.task("reading", unit="bytes")
        totals: dict[str, int] = {}  # bytes of each folder whose files are being read

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
        print(f"{printable(str(folder))} is complete and unchanged: {len(results)} files, {total:,} bytes")
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
    config: Annotated[str | None, typer.Option(help="A config.json, or a preset, if the source has none.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json, or a saved token map; default: the one beside the source.")
    ] = None,
    shards: Annotated[int, typer.Option(help="Tensor-parallel ranks of deepseek-v4.1; parts of qwen's table.")] = 1,
    by: Annotated[str, typer.Option(help="row: ranks have equally many rows; head: complete hash columns.")] = "row",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Write a memory in another format, in bounded memory, and verify what was written."""
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
        print("note: a GGUF file has only the tables: the projections of this memory are new and untrained")


@app.command()
def inspect(
    path: Annotated[
        Path, typer.Argument(help="A saved memory, a run, a checkpoint, safetensors (file or folder), or a GGUF file.")
    ],
    config: Annotated[str | None, typer.Option(help="A config.json, or a preset, if the source has none.")] = None,
    as_json: Json = False,
) -> None:
    """Print what a checkpoint holds: tensors, the format of its n-gram memory, rows and bytes.

    Only headers are read. In Python this command is engram.inspect_file.
    """
    from engram.inspect.render import print_inspection
    from engram.integrations.formats import inspect_file as run
    from engram.integrations.formats.readers import read_config

    inspected = run(path, None if config is None else read_config(config))
    if as_json:
        print(json.dumps(inspected))
    else:
        print_inspection(inspected)
