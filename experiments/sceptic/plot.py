"""Draw every arm's difference to plain, sorted, and what its rivals cost in bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.ticker import LogLocator

from experiments.lab.plots import ARM_COLOURS, INK, SOFT, STYLE, dot_panels, load, save
from experiments.lab.report import Row, size_of
from experiments.sceptic.configs import BASELINE

# Offsets of a name from its dot: across and up.
PLACES = ((1, 0), (-1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1), (0, -1), (0, 1), (0, -2), (0, 2))
CONTROLS = ("one-row", "random", "shuffled", "gate-one", "switched-off")  # variants of engram, not rivals


def draw(home: Path) -> Path:
    groups = load(home, BASELINE)
    figure, (*_, price) = dot_panels(home, BASELINE, groups, more=[4.2])
    name, rows = max(groups.items(), key=lambda group: len(group[1]))
    with matplotlib.rc_context(STYLE):
        _prices(price, [row for row in rows if row.variant not in CONTROLS])
        price.set_title(f"{home.name}, {name}: at what price (no controls)")
    return save(figure, home)


def _prices(axes: Axes, rows: list[Row]) -> None:
    """Draw bits per byte below plain over megabytes; each name at the first of PLACES where it covers neither dot nor
    name."""
    points = [(size_of(row) / 1e6, row.bits.mean, row.variant) for row in rows if row.bits]
    points += [(size_of(row) / 1e6, 0.0, row.variant) for row in rows if row.variant == BASELINE]
    axes.axhline(0, color=SOFT, linewidth=1, zorder=0.5)
    for x, y, label in points:
        axes.plot(x, y, "o", color=ARM_COLOURS["engram"] if label == "engram" else SOFT, markersize=5)
    axes.set_xscale("log")
    axes.margins(x=0.36)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.minorticks_off()
    axes.invert_yaxis()
    axes.set_xlabel("MB of weights, tables and optimizer state")
    axes.set_ylabel(f"bits per byte, minus {BASELINE}'s (up is better)")
    FigureCanvasAgg(axes.get_figure(root=True)).draw()  # positions on the page are known from here on
    dots = axes.transData.transform([(x, y) for x, y, _ in points])
    white = {"facecolor": "white", "edgecolor": "none", "pad": 0.3}
    names: list[Any] = []
    for x, y, label in sorted(points, key=lambda point: point[1]):
        for across, up in PLACES:
            side = {-1: "right", 0: "center", 1: "left"}[across]
            place = {"xytext": (7 * across, 9 * up), "textcoords": "offset points", "ha": side, "va": "center"}
            name = axes.annotate(label, (x, y), color=INK, fontsize=8, zorder=1, bbox=white, **place)
            box = name.get_window_extent()
            if not box.count_contains(dots) and not box.count_overlaps(names):
                break
            if (across, up) != PLACES[-1]:
                name.remove()
        names.append(box)
