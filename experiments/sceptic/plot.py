"""Every arm's difference to plain, sorted; and what its rivals cost in bytes."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from experiments.plots import COLOURS, INK, SOFT, STYLE, dot_panels, load, save
from experiments.report import Row, size_of
from experiments.sceptic.configs import BASELINE

CONTROLS = ("one-row", "random", "shuffled", "gate-one", "switched-off")  # of engram, and no rivals to it


def draw(home: Path) -> Path:
    groups = load(home, BASELINE)
    figure, (*_, price) = dot_panels(home, BASELINE, groups, more=[4.2])
    name, rows = max(groups.items(), key=lambda group: len(group[1]))
    with matplotlib.rc_context(STYLE):
        _prices(price, [row for row in rows if row.label not in CONTROLS])
        price.set_title(f"{home.name}, {name}: at what price")
    return save(figure, home)


def _prices(axes: Axes, rows: list[Row]) -> None:
    """Bits a byte below plain over megabytes; names to the right of a dot, or to its left where that is taken."""
    taken: list[tuple[float, float]] = []
    axes.axhline(0, color=SOFT, linewidth=1)
    points = [(row.bits.mean, size_of(row) / 1e6, row.label) for row in rows if row.bits]
    points += [(0.0, size_of(row) / 1e6, row.label) for row in rows if row.label == BASELINE]
    for y, x, label in sorted(points):
        left = any(abs(y - v) < 0.012 and 0.5 < x / u < 2 for u, v in taken)
        taken.append((x, y))
        axes.plot(x, y, "o", color=COLOURS[1] if label == "engram" else COLOURS[0], markersize=5)
        place = {"xytext": (-6 if left else 6, 0), "textcoords": "offset points"}
        axes.annotate(label, (x, y), ha="right" if left else "left", va="center", color=INK, fontsize=8, **place)
    axes.set_xscale("log")
    axes.margins(x=0.3)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.minorticks_off()
    axes.invert_yaxis()
    axes.set_xlabel("MB of weights, tables and optimiser state")
    axes.set_ylabel(f"bits per byte, minus {BASELINE}'s (up is better)")
