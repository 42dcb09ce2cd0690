"""What rows buy: loss below plain's against rows per head, with a straight line in log2(rows) and its 95 % band."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from engram.lm.statistics import Interval, over_seeds, wider

from experiments.plots import ARM_COLOURS, SOFT, STYLE, hollow, load, new_figure, save
from experiments.report import Row, documents_of, interval
from experiments.slots.configs import BASELINE


def draw(home: Path) -> Path:
    groups = load(home, BASELINE)
    figure, panels = new_figure(7.2, [4.0] * len(groups))
    with matplotlib.rc_context(STYLE):
        for axes, (group, rows) in zip(panels, groups.items(), strict=True):
            plain = next((row for row in rows if row.label == BASELINE), None)
            if plain is None:
                raise ValueError(f"{home}: group {group!r} has no run of {BASELINE!r} to measure from")
            shown: set[int] = set()
            for arm in ("engram", "over-encoding"):
                colour = ARM_COLOURS[arm]
                cells = cells_of(rows, arm)
                if not cells:
                    continue
                x, differences = np.log2(list(cells)), [seed_differences(row, plain) for row in cells.values()]
                for place, values in zip(x, differences, strict=True):
                    axes.plot([place] * len(values), values, ".", color=colour, alpha=0.4)
                label = arm
                if len(cells) >= 3:
                    fit = log_fit(home, cells, plain)
                    label += (
                        f": {interval(fit.slope)} nats for each doubling, up to {abs(fit.off.mean):.3f} off the line"
                    )
                    axes.plot(x, fit.line[1], color=colour, linewidth=1, linestyle=":")
                    axes.fill_between(x, fit.line[0], fit.line[2], color=colour, alpha=0.15, linewidth=0)
                means = [float(np.mean(values)) for values in differences]
                axes.plot(x, means, "o-", color=colour, linewidth=1.4, label=label)
                hollow(axes, x, means, colour, [len(values) for values in differences])
                shown |= set(cells)
            axes.axhline(0, color=SOFT, linestyle="--", linewidth=1.2, label=f"{BASELINE}: {plain.mean('loss'):.4f}")
            axes.set_xticks(np.log2(sorted(shown)), [f"{rows:,}" for rows in sorted(shown)])
            axes.set_xlabel("rows per head")
            axes.set_ylabel("nats per token, minus plain's")
            axes.set_title(f"{home.name}, {group} (small dots: seeds; hollow: one seed; dotted: lines with 95 % bands)")
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14))
    return save(figure, home)


def cells_of(rows: list[Row], arm: str) -> dict[int, Row]:
    """{rows per head: row of the table}, ascending; only what has a seed in common with plain."""
    found = {r.runs[0]["setting"]["memory"]["rows_per_head"]: r for r in rows if r.runs[0]["arm"] == arm and r.paired}
    return dict(sorted(found.items()))


def seed_differences(row: Row, plain: Row) -> list[float]:
    """Nats per token minus plain's of the same seed."""
    base = {run["seed"]: run["loss"] for run in plain.runs}
    return [run["loss"] - base[run["seed"]] for run in row.runs if run["seed"] in base]


class LogFit(NamedTuple):
    """A line through loss - plain's loss over log2(rows), all in nats per token with 95 % intervals.

    Attributes:
        slope: for each doubling of the rows. line: [3, cells], low, middle and high of the line at each cell.
        off: the cell that is farthest from the line, minus the line.
    """

    slope: Interval
    line: np.ndarray
    off: Interval


def log_fit(home: Path, cells: dict[int, Row], plain: Row, draws: int = 2000) -> LogFit:
    """Least squares of (loss - plain's loss) on log2(rows), with the wider of a bootstrap over seeds and documents
    (both paired) and Student's interval over seeds.

    Args:
        cells: {rows per head: its runs}, at least two. Only seeds that all of them and plain have are used.

    Raises:
        ValueError: cells without a seed in common.
    """
    seeds = sorted(set.intersection(*({run["seed"] for run in row.runs} for row in [plain, *cells.values()])))
    if not seeds:
        raise ValueError(f"{home}: the cells have no seed in common to fit a line through")

    def nats(row: Row) -> list[np.ndarray]:
        by_seed = {run["seed"]: run for run in row.runs}
        return [documents_of(home, by_seed[seed])["nats"] for seed in seeds]

    difference = np.array([nats(row) for row in cells.values()]) - np.array(nats(plain))  # [cells, seeds, documents]
    weights = documents_of(home, plain.runs[0])["tokens"]
    design = np.stack([np.log2(list(cells)), np.ones(len(cells))], axis=1)
    fit = np.linalg.pinv(design)  # [2, cells]
    rng, (_, count, documents) = np.random.default_rng(0), difference.shape
    points = np.empty((draws, len(cells)))
    for draw in range(draws):
        times = np.bincount(rng.integers(documents, size=documents), minlength=documents)
        picked = rng.integers(count, size=count)
        points[draw] = (difference @ times)[:, picked].mean(axis=1) / (times @ weights)
    by_seed = difference.sum(axis=2) / weights.sum()  # [cells, seeds]
    lines, seed_lines = points @ fit.T @ design.T, design @ fit @ by_seed
    farthest = int(np.abs((by_seed - seed_lines).mean(axis=1)).argmax())

    def around(drawn: np.ndarray, of_seeds: np.ndarray) -> Interval:
        edges = np.quantile(drawn, (0.025, 0.975))
        return wider(Interval(float(of_seeds.mean()), float(edges[0]), float(edges[1])), over_seeds(of_seeds))

    line = [around(drawn, of_seeds) for drawn, of_seeds in zip(lines.T, seed_lines, strict=True)]
    return LogFit(
        around(points @ fit[0], fit[0] @ by_seed),
        np.array([(at.low, at.mean, at.high) for at in line]).T,
        around((points - lines)[:, farthest], (by_seed - seed_lines)[farthest]),
    )
