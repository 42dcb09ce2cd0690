"""What the memory is worth in training: how many tokens plain needs to be as good."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import geometric_mean

from engram.lm.statistics import Interval, over_seeds

from experiments.config import read_results
from experiments.measures import shown, table
from experiments.report import Record, groups_of

Curve = Sequence[tuple[float, float]]  # (tokens, bits a byte), fewest tokens first


def text_of(group: str) -> str:
    """The name of a table without its budget."""
    return re.sub(r", [\d.]+M tokens", "", group)


def tokens_for(loss: float, curve: Curve) -> tuple[float, float]:
    """(at least, at most) as many tokens as a curve needs to get down to a loss: equal where it passes the loss, by a
    straight line over log(tokens) between two points."""
    if loss >= curve[0][1]:
        return 0.0, curve[0][0]
    for (fewer, high), (more, low) in pairwise(curve):
        if low <= loss:
            tokens = fewer * (more / fewer) ** ((high - loss) / (high - low))
            return tokens, tokens
    return curve[-1][0], math.inf


def worth(runs: Sequence[Record], plain: dict[int, Curve]) -> str:
    """How many times the tokens of `runs` plain needs for the same loss: the geometric mean over seeds with its
    interval. Where the budgets of plain end too soon for one of the seeds, or begin too late, a bound, and the mean of
    the others."""
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
    plain: dict[tuple[str, int], list[tuple[float, float]]] = {}
    cells: dict[tuple[str, str, int], list[Record]] = {}
    for group, labels in groups_of(read_results(home / "results.jsonl")).items():
        for label, runs in labels.items():
            for run in runs:
                if label == "plain":
                    plain.setdefault((text_of(group), run["seed"]), []).append((run["tokens"], run["bpb"]))
                else:
                    cells.setdefault((text_of(group), label, run["tokens"]), []).append(run)
    lines = []
    for (text, label, tokens), runs in sorted(cells.items()):
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
