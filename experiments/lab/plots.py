"""One look for all figures: dot plots with intervals, and curves with intervals.

Every figure is drawn from results.jsonl and the per-document losses beside it (for the intervals), nothing else.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from engram.ablation.statistics import Interval
from engram.storage.files import write_whole
from experiments.lab.cell import Table
from experiments.lab.report import Row, rows_of, tables_of
from experiments.lab.results import Record, read_results

INK, SOFT, RULE = "#1f2328", "#59636e", "#d5d9de"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b1559c")  # Okabe and Ito's, which colour-blind readers can tell apart too
ARM_COLOURS = {"plain": SOFT, **dict(zip(("engram", "one-row", "short-conv", "over-encoding"), COLOURS, strict=True))}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": SOFT,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
}


def load(home: Path, baseline: str) -> dict[Table, list[Row]]:
    """Return {table: rows}. Raises ValueError if there is nothing to draw yet."""
    tables = tables_of(read_results(home / "results.jsonl"))
    if not tables:
        raise ValueError(f"{home / 'results.jsonl'} has no runs yet: python -m experiments run {home.name}")
    return {table: rows_of(home, runs, baseline) for table, runs in tables.items()}


def new_figure(width: float, heights: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """Return a figure with one panel below the other. Sizes in inches."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, sum(heights)), dpi=160, layout="constrained")
        panels = figure.subplots(len(heights), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    return figure, list(panels[:, 0])


def save(figure: Figure, home: Path) -> Path:
    """Write home/figure.png, complete or not at all."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        FigureCanvasAgg(figure).print_png(buffer)
    write_whole(home / "figure.png", buffer.getvalue())
    return home / "figure.png"


def dot_plots(home: Path, baseline: str) -> Path:
    """Draw the panels of dot_panels alone, as figure.png."""
    figure, _ = dot_panels(home, baseline, load(home, baseline))
    return save(figure, home)


def dot_panels(
    home: Path, baseline: str, tables: dict[Table, list[Row]], more: Sequence[float] = ()
) -> tuple[Figure, list[Axes]]:
    """Draw one panel per table, one line per arm, best first: difference to the baseline in bits per byte, which holds
    for arms with another tokenizer too. Dots are filled if the interval excludes zero and is of more than one seed. All
    panels have one scale; an arm that would stretch it by half is an arrow at its edge.

    Args:
        more: heights of empty panels below these, in inches.
    """
    tables = {name: [row for row in rows if row.bits] for name, rows in tables.items()}
    tables = {name: rows for name, rows in tables.items() if rows}
    if not tables:
        raise ValueError(f"{home / 'results.jsonl'} has no arm beside {baseline!r} with a seed in common to compare")
    figure, panels = new_figure(7.2, [*(1.2 + 0.23 * len(rows) for rows in tables.values()), *more])
    with matplotlib.rc_context(STYLE):
        scale = _scale([row for rows in tables.values() for row in rows])
        for axes, (name, rows) in zip(panels, tables.items(), strict=False):
            axes.set_xlim(*scale)
            _dots(axes, sorted(rows, key=lambda row: row.bits.mean))  # type: ignore[union-attr]
            axes.set_title(f"{home.name}, {name}")
            axes.set_xlabel(
                f"bits per byte, minus {baseline}'s; bars: 95 % intervals\n"
                "blue: clearly better, orange: clearly worse\nhollow: cannot tell, or one seed"
            )
    return figure, panels


def _scale(rows: list[Row]) -> tuple[float, float]:
    """Return both ends of the axis: around zero and all intervals, without one arm that is far to the right of the
    others."""
    bits = sorted((row.bits for row in rows if row.bits is not None), key=lambda interval: interval.high)
    most = bits[-1].high
    others = max(bits[-2].high if len(bits) > 1 else 0.0, 0.0)
    left = min(0.0, *(interval.low for interval in bits))
    right = others if most - left > 1.5 * (others - left) > 0 else max(most, 0.0)
    room = 0.05 * (right - left)
    return left - room, right + room


def _dots(axes: Axes, rows: list[Row]) -> None:
    edge = axes.get_xlim()[1]
    for y, row in enumerate(rows):
        assert row.bits is not None
        clear = len(row.paired) > 1 and (row.bits.low > 0 or row.bits.high < 0)
        colour = SOFT if not clear else COLOURS[0] if row.bits.mean < 0 else COLOURS[1]
        if row.bits.high > edge:
            words = f"{row.bits.mean:+.2f} \N{RIGHTWARDS ARROW}"
            axes.text(edge, y, words, color=colour, ha="right", va="center", fontsize=8)
            continue
        ends = [[row.bits.mean - row.bits.low], [row.bits.high - row.bits.mean]]
        axes.errorbar(row.bits.mean, y, xerr=ends, color=colour, linewidth=1.4, capsize=2.5)
        axes.plot(row.bits.mean, y, "o", color=colour, markerfacecolor=colour if clear else "white", markersize=4)
    names = [f"{row.variant}  ({len(row.paired)} seed{'s' if len(row.paired) > 1 else ''})" for row in rows]
    axes.set_yticks(range(len(rows)), names, color=INK)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.axvline(0, color=SOFT, linewidth=1)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(7))


def curve(
    axes: Axes,
    x: Sequence[float],
    intervals: Sequence[Interval],
    colour: str,
    label: str,
    seeds: Sequence[int],
) -> None:
    """Draw points joined by a line, each with its interval; open if it is of one seed."""
    mean, low, high = (np.array(part) for part in zip(*intervals, strict=True))
    bars = np.stack([mean - low, high - mean]).clip(min=0)
    axes.errorbar(x, mean, bars, color=colour, label=label, marker="o", markersize=4.5, linewidth=1.4, capsize=2.5)
    hollow(axes, x, mean, colour, seeds, 4.5)


def hollow(
    axes: Axes, x: Sequence[float], y: Sequence[float], colour: str, seeds: Sequence[int], size: float = 6
) -> None:
    """Draw open dots over those points of a line that are of one seed."""
    alone = [number for number, count in enumerate(seeds) if count == 1]
    axes.plot(np.array(x)[alone], np.array(y)[alone], "o", color=colour, mfc="white", markersize=size, zorder=3)


def dot(
    axes: Axes,
    y: float,
    value: Interval | None,
    colour: str,
    marker: str = "o",
    size: float = 5,
    label: str | None = None,
) -> None:
    """Draw a mean on a line of its own, with its interval if it has one; nothing for None."""
    if value is None:
        return
    if np.isfinite(value.low):
        axes.plot([value.low, value.high], [y] * 2, color=colour, linewidth=1.6, solid_capstyle="butt")
    axes.plot(value.mean, y, marker, color=colour, markersize=size, label=label)


def beside(x: Sequence[float], number: int, of: int) -> list[float]:
    """Return x on a logarithmic axis, moved a little to one side, so that the bars of `of` curves are side by side."""
    return [value * 1.03 ** (number - (of - 1) / 2) for value in x]


def gain(row: Row) -> Interval:
    """Return the bits per byte that an arm saves over its baseline: the difference with its sign turned."""
    assert row.bits is not None
    return Interval(-row.bits.mean, -row.bits.high, -row.bits.low)


def first_run(row: Row) -> Record:
    return row.runs[0]
