"""Summarise what storing rows costs, over trained models and validation documents."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from engram.ablation.statistics import Interval, paired_interval
from experiments.lab.measures import shown, table
from experiments.lab.results import read_documents, read_lines

Runs = dict[str, dict[int, dict[str, Any]]]


def budgets(home: Path) -> dict[int, Runs]:
    """Return {training tokens: {codec: {seed: its line of results.jsonl}}}."""
    found: dict[int, Runs] = defaultdict(lambda: defaultdict(dict))
    for line in read_lines(home / "results.jsonl"):
        found[line["tokens"]][line["codec"]][line["seed"]] = line
    return found


def documents_key(tokens: int, seed: int) -> str:
    """Return the key in documents.npz of one trained model: summed nats of each document by codec, and their
    "tokens"."""
    return f"{tokens}-{seed}"


def cost(home: Path, runs: dict[int, dict[str, Any]]) -> Interval:
    """Return nats per token with the rows in a codec, minus those of the same trained models with float32 rows.

    Raises:
        ValueError: models that were validated on different texts.
    """
    if len({line["corpus"] for line in runs.values()}) > 1:
        raise ValueError(f"runs in {home / 'results.jsonl'} are of different texts: make all seeds again")
    stored, plain = [], []
    for seed, line in runs.items():
        arrays = read_documents(home, documents_key(line["tokens"], seed), (line["codec"], "float32", "tokens"))
        stored.append(arrays[line["codec"]])
        plain.append(arrays["float32"])
        sizes = arrays["tokens"]
    return paired_interval(np.stack(stored), np.stack(plain), sizes)


def summary(home: Path, tokens: int) -> str:
    """Return Markdown: a row for each codec, means over the trained models of one budget."""
    rows, codecs = [], budgets(home)[tokens]
    for codec, runs in codecs.items():
        first, *_ = runs.values()
        loss, error = (
            float(np.mean([value(line) for line in runs.values()]))
            for value in (lambda line: line["loss"], lambda line: line["rms_error"] / line["rms"])
        )
        change = "" if codec == "float32" else shown(cost(home, runs), "+.5f")
        rows.append((codec, f"{first['row_bytes']}", f"{first['ratio']:.4f}", f"{loss:.5f}", change, f"{error:.5f}"))
    head = (
        *("rows", "bytes per row", "of float32", "validation loss"),
        *("difference in nats per token, 95 % interval", "rms error / rms"),
    )
    seeds = ", ".join(f"{seed}" for seed in next(iter(codecs.values())))
    return f"{table(head, rows)}\n\n{tokens:,} training tokens; models of seeds {seeds}."
