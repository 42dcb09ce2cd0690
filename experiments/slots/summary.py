"""The line through loss over log2(rows), and the cells that it is fitted to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engram.ablation.statistics import Interval, over_seeds, wider
from experiments.lab.cell import Table
from experiments.lab.claims import Finding, compared
from experiments.lab.report import Row, documents_of, rows_of, tables_of
from experiments.lab.results import read_results


def cells_of(rows: list[Row], arm: str) -> dict[int, Row]:
    """Return {rows per head: row of the table}, ascending; only rows that have a seed in common with plain."""
    by_rows = {r.runs[0]["setting"]["memory"]["rows_per_head"]: r for r in rows if r.runs[0]["arm"] == arm and r.paired}
    return dict(sorted(by_rows.items()))


def seed_differences(row: Row, plain: Row) -> list[float]:
    """Return nats per token minus plain's of the same seed."""
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
    """Fit least squares of (loss - plain's loss) on log2(rows), with the wider of a bootstrap over seeds and documents
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


def fitted(part: str) -> Callable[[Path], list[Finding]]:
    """Return a part of the line through engram's loss over log2(rows): "slope" or "off"."""
    return lambda home: [Finding(getattr(fit, part), seeds, table) for table, fit, seeds in _fits(home)]


def _fits(home: Path) -> list[tuple[Table, LogFit, int]]:
    """Return (table, line, seeds) of every table with three sizes or more."""
    fits = []
    for table, runs in tables_of(read_results(home / "results.jsonl")).items():
        if "plain" not in runs:
            continue
        rows = rows_of(home, runs, "plain")
        cells = cells_of(rows, "engram")
        if len(cells) >= 3:
            seeds = set.intersection(*({run["seed"] for run in row.runs} for row in (rows[0], *cells.values())))
            if seeds:
                fits.append((table, log_fit(home, cells, rows[0]), len(seeds)))
    return fits


def ahead(home: Path) -> list[Finding]:
    """Return engram minus OverEncoding with as many rows, at the most rows that both ran with."""
    findings = []
    for table, runs in tables_of(read_results(home / "results.jsonl")).items():
        ours, theirs = (
            {one[0]["setting"]["memory"]["rows_per_head"]: name for name, one in runs.items() if one[0]["arm"] == arm}
            for arm in ("engram", "over-encoding")
        )
        if ours.keys() & theirs.keys():
            most = max(ours.keys() & theirs.keys())
            findings += compared(home, table, runs, ours[most], theirs[most], note=f", {most:,} rows")
    return findings
