"""The generated part of the lab's README: the sizes, and what another CPU does to one run."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from experiments.lab.cell import HOME, SETTINGS, cell_of
from experiments.lab.measures import table
from experiments.lab.report import write_between_marks
from experiments.lab.results import read_lines, read_results

MACHINES = HOME / "lab" / "machines.jsonl"  # losses of runs that were made again on another CPU
RECORDED = "as recorded (the lines do not name the CPU)"


def sizes() -> str:
    """Return a table of the two sizes as Markdown."""
    rows = []
    for name, setting in SETTINGS.items():
        model, memory, train = setting.model, setting.memory, setting.train
        rows.append(
            (
                *(
                    name,
                    f"{model.layers}",
                    f"{model.hidden_size}",
                    f"{train.tokens / 1e6:.2f}",
                    f"{setting.vocab_size:,}",
                ),
                *(f"{memory.columns}", f"{memory.head_dim}", f"{sum(memory.row_counts) * memory.heads:,}"),
            )
        )
    head = ("size", "layers", "hidden size", "training tokens, M", "vocabulary")
    return table((*head, "rows read per position", "values per row", "rows per layer"), rows)


def machines(home: Path = HOME, file: Path = MACHINES) -> str:
    """Return a table of one run on several CPUs as Markdown: engram of sceptic at tiny, by seed."""
    recorded = {}
    for record in read_results(home / "sceptic" / "results.jsonl"):
        cell = cell_of(record)
        if (cell.variant, cell.size, cell.text) == ("engram", "tiny", SETTINGS["tiny"].corpus):
            recorded[record["seed"]] = record["loss"]
    by_cpu: dict[str, dict[int, float]] = {RECORDED: recorded}
    for line in read_lines(file):
        by_cpu.setdefault(line["processor"], {})[line["seed"]] = line["loss"]
    seeds = sorted(recorded)
    rows = [
        (cpu, *(f"{losses[seed]:.5g}" if seed in losses else "" for seed in seeds)) for cpu, losses in by_cpu.items()
    ]
    moved = max(abs(loss - recorded[seed]) for losses in by_cpu.values() for seed, loss in losses.items())
    return (
        "`sceptic`, tiny, engram, nats per token on several CPUs:\n\n"
        f"{table(('CPU', *(f'seed {seed}' for seed in seeds)), rows)}\n\n"
        f"Another CPU moves the loss of one seed by up to {moved:.3f}; the standard deviation of the recorded seeds is "
        f"{np.std([*recorded.values()], ddof=1):.3f}."
    )


def write_readme(readme: Path = HOME / "README.md") -> None:
    """Write both tables between the marks of the lab's README."""
    write_between_marks(readme, f"{sizes()}\n\n{machines()}")
