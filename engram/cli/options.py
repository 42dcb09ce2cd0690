"""The application of the command line, the options that commands share, and how their values are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Corpus = Annotated[
    str,
    typer.Option(
        help="Names joined by '+' out of wiki, shakespeare, kjv, stdlib, botocore; or a folder or file: .txt, .md, "
        'or .jsonl, .json and .parquet with a field "text"; also .gz.'
    ),
]
Budget = Annotated[str, typer.Option(help="Training tokens per run: 1100000, 1.1M, 500k.")]
Memory = Annotated[Path | None, typer.Option(help="Saved memory to attach to a model of transformers.")]
Device = Annotated[
    str, typer.Option(help="Device of the dense weights, such as cuda or cuda:1; tables stay in host memory.")
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=1024,
        callback=lambda count: _use_threads(count),
        help="CPU threads; default: the cores that this process may use (affinity and control groups).",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _use_threads(count: int | None) -> None:
    """Set the threads of torch and of the kernels. torch's own default ignores the quota of a control group."""
    import torch

    from engram.tables import kernels

    if count is None:
        torch.set_num_threads(min(torch.get_num_threads(), kernels.CORES))
    else:
        torch.set_num_threads(count)
        kernels.set_threads(count)


def _print_version(requested: bool) -> None:
    if not requested:
        return
    from importlib.metadata import PackageNotFoundError, version

    import torch

    import engram
    from engram.tables import kernels

    try:
        hf = f"transformers {version('transformers')}"
    except PackageNotFoundError:
        hf = "without transformers"
    path = "without compiled kernels" if kernels.native is None else "with compiled kernels"
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
    """Read a count: "1.1M" -> 1100000. Raise ValueError unless it is a positive number, with or without k, M or G."""
    units = {"k": 1e3, "m": 1e6, "g": 1e9}
    try:
        number = float(text[:-1]) * units[text[-1].lower()] if text[-1:].lower() in units else float(text)
    except ValueError:
        number = 0.0
    if not 1 <= number < 1e15:
        raise ValueError(f"a {what} must be a positive number such as 1100000, 1.1M or 500k, not {text!r}")
    return round(number)


def parse_seeds(text: str) -> list[int]:
    """Read seeds: "0,1,2" -> [0, 1, 2]. Raise ValueError for anything else."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"seeds must be integers joined by commas, such as 0,1,2, not {text!r}") from None
