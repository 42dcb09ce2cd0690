"""Every arm's difference to plain, sorted; and what its rivals cost in bytes."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from experiments.plots import COLOURS, INK, SOFT, STYLE, dot_panels, load, save
from experiments.report import Row, size_of
from experiments.sceptic.configs import BASELINE

SIDES = {
    "left": (6, 0),
    "right": (-6, 0),
    "center": (0, -9),
}  # what of a name is at its dot, and how far from it, points
CONTROLS = ("one-row", "random", "shuffled", "gate-one", "switched-off")  # of engram, and no rivals to it


def draw(home: Path) -> Path:
    groups = load(home, BASELINE)
    figure, (*_, price) = dot_panels(home, BASELINE, groups, more=[4.2])
    name, rows = max(groups.items(), key=lambda group: len(group[1]))
    with matplotlib.rc_context(STYLE):
        _prices(price, [row for row in rows if row.label not in CONTROLS])
        price.set_title(f"{home.name}, {name}: at what price (the controls left out)")
    return save(figure, home)


def _prices(axes: Axes, rows: list[Row]) -> None:
    """Bits a byte below plain over megabytes; names right of a dot, left of it or below, where there is room."""
    named: list[tuple[float, float, str]] = []
    axes.axhline(0, color=SOFT, linewidth=1, zorder=0.5)
    points = [(row.bits.mean, size_of(row) / 1e6, row.label) for row in rows if row.bits]
    points += [(0.0, size_of(row) / 1e6, row.label) for row in rows if row.label == BASELINE]
    for y, x, label in sorted(points):
        near = [u / x for v, u, _ in points if abs(v - y) < 0.009]
        beside = {side: [u / x for v, u, where in named if where == side and abs(v - y) < 0.009] for side in SIDES}
        if not any(1.03 < ratio < 2.5 for ratio in near) and not any(0.4 < ratio < 2.5 for ratio in beside["left"]):
            side = "left"
        elif not any(0.4 < ratio < 0.97 for ratio in near) and not any(0.4 < ratio < 2.5 for ratio in beside["right"]):
            side = "right"
        else:
            side = "center"
        named.append((y, x, side))
        axes.plot(x, y, "o", color=COLOURS[0] if label == "engram" else SOFT, markersize=5)
        white = {"facecolor": "white", "edgecolor": "none", "pad": 0.3}
        place = {"xytext": SIDES[side], "textcoords": "offset points", "bbox": white, "zorder": 1}
        axes.annotate(label, (x, y), ha=side, va="center", color=INK, fontsize=8, **place)
    axes.set_xscale("log")
    axes.margins(x=0.3)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.minorticks_off()
    axes.invert_yaxis()
    axes.set_xlabel("MB of weights, tables and optimiser state")
    axes.set_ylabel(f"bits per byte, minus {BASELINE}'s (up is better)")
