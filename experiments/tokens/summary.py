"""Summarise what the memory is worth in training: how many tokens plain needs to be as good."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import geometric_mean

from engram.ablation.statistics import Interval, over_seeds
from experiments.lab.cell import Table
from experiments.lab.claims import Finding, compared
from experiments.lab.measures import shown, table
from experiments.lab.report import tables_of
from experiments.lab.results import Record, read_results
from experiments.lab.tuning import budget_of

Curve = Sequence[tuple[float, float]]  # (tokens, bits per byte), fewest tokens first


def text_of(table: Table) -> Table:
    """Return the table without its budget: all budgets on one text share it."""
    return replace(table, tokens=None)


def tokens_for(loss: float, curve: Curve) -> tuple[float, float]:
    """Return (at least, at most) how many tokens a curve needs to get down to a loss: both are equal if it passes the
    loss, by a straight line over log(tokens) between two points."""
    if loss >= curve[0][1]:
        return 0.0, curve[0][0]
    for (fewer, high), (more, low) in pairwise(curve):
        if low <= loss:
            tokens = fewer * (more / fewer) ** ((high - loss) / (high - low))
            return tokens, tokens
    return curve[-1][0], math.inf


def worth(runs: Sequence[Record], plain: dict[int, Curve]) -> str:
    """Return how many times the tokens of `runs` plain needs for the same loss: the geometric mean over seeds with its
    interval. If the budgets of plain end too soon for one of the seeds, or begin too late, return a bound, and the mean
    of the others."""
    ends = [[end / run["tokens"] for end in tokens_for(run["bpb"], plain[run["seed"]])] for run in runs]
    known = [low for low, high in ends if low == high]
    if len(known) < len(ends):
        least, most = min(low for low, _ in ends), max(high for _, high in ends)
        bound = f"over {least:.1f}" if math.isinf(most) else f"under {most:.1f}"
        return f"{bound}, {geometric_mean(known):.2f} in {len(known)} of {len(ends)} seeds" if known else bound
    mean, low, high = over_seeds([math.log(times) for times in known])
    spread = (math.exp(low), math.exp(high)) if math.isfinite(low) else (low, high)
    return shown(Interval(math.exp(mean), *spread), ".2f")


def summary(home: Path) -> str:
    plain: dict[tuple[Table, int], list[tuple[float, float]]] = {}
    cells: dict[tuple[Table, str, int], list[Record]] = {}
    for place, variants in tables_of(read_results(home / "results.jsonl")).items():
        for variant, runs in variants.items():
            for run in runs:
                if variant == "plain":
                    plain.setdefault((text_of(place), run["seed"]), []).append((run["tokens"], run["bpb"]))
                else:
                    cells.setdefault((text_of(place), variant, run["tokens"]), []).append(run)
    lines = []
    for (text, label, tokens), runs in sorted(cells.items(), key=lambda item: (str(item[0][0]), *item[0][1:])):
        curves = {run["seed"]: sorted(plain.get((text, run["seed"]), [])) for run in runs}
        both = [run for run in runs if curves[run["seed"]]]
        if both:
            lines.append((text, label, f"{tokens / 1e6:.2f}", f"{len(both)}", worth(both, curves)))
    return (
        "### What the memory is worth in training tokens\n\nHow many times the tokens plain needs for the loss that an "
        "arm has: between two of its budgets by a straight line over the logarithm of the tokens, geometric means over "
        "seeds with 95 % intervals (Student's t); a bound where plain ran with no budget so large, or so small.\n\n"
        f"{table(('text', 'arm', 'tokens, M', 'seeds', 'times as many of plain'), lines, words=2)}"
    )


def twice_the_tokens(home: Path) -> list[Finding]:
    """Return plain minus engram that was trained on half as many tokens, on each text and at each budget."""
    found, tables = [], tables_of(read_results(home / "results.jsonl")).items()
    plain = {(text_of(place), budget_of(runs["plain"][0])): runs["plain"] for place, runs in tables if "plain" in runs}
    for place, runs in tables:
        longer = plain.get((text_of(place), 2 * budget_of(runs["engram"][0]))) if "engram" in runs else None
        if longer:
            found += compared(home, place, {"engram": runs["engram"], "plain": longer}, "plain", "engram")
    return found
