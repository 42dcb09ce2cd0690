"""Draw loss below plain's against training tokens, and against the bytes of table and counts, at each setting."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes

from experiments.kneser_ney.configs import ARMS, BASELINE, ROWS, parts_of
from experiments.lab.plots import COLOURS, SOFT, STYLE, beside, curve, first_run, load, new_figure, save
from experiments.lab.report import Row

Points = dict[str, list[tuple[float, Row]]]  # for each arm, (position on the axis, row)


def draw(home: Path) -> Path:
    found: dict[tuple[str, str], Points] = {}  # for each size and axis
    for table, rows in load(home, BASELINE).items():
        by_tokens = found.setdefault((table.size, "training tokens, millions"), {})
        by_bytes = found.setdefault((table.size, "MB of float32 rows, or of counts at most"), {})
        cells = [(*parts_of(row.runs[0]), row) for row in rows if row.nats is not None]
        several = len({size for name, size, _ in cells if name != "engram"}) > 1
        for name, size, row in cells:
            if size == ROWS[-1]:
                by_tokens.setdefault(name, []).append((first_run(row)["tokens"] / 1e6, row))
            if several:
                memory = first_run(row)["setting"]["memory"]
                columns = len(memory["orders"]) * memory["heads"]
                by_bytes.setdefault(name, []).append((size * columns * memory["head_dim"] * 4 / 1e6, row))
    panels = [(f"{size}: {axis}", points) for (size, axis), points in sorted(found.items()) if points]
    if not panels:
        raise ValueError(f"{home / 'results.jsonl'} has no arm beside {BASELINE!r} with a seed in common to compare")
    figure, axes = new_figure(7.2, [3.8] * len(panels))
    with matplotlib.rc_context(STYLE):
        for place, (label, points) in zip(axes, panels, strict=True):
            _panel(place, label, points)
        axes[0].set_title(f"{home.name}: counts beside a trained table (bars: 95 % intervals; hollow: one seed)")
    return save(figure, home)


def _panel(axes: Axes, label: str, points: Points) -> None:
    for which, (colour, name) in enumerate(zip(COLOURS, ARMS, strict=True)):
        if name in points:
            ordered = sorted(points[name], key=lambda point: point[0])
            differences = [row.nats for _, row in ordered if row.nats is not None]
            seeds = [len(row.paired) for _, row in ordered]
            curve(axes, beside([place for place, _ in ordered], which, len(ARMS)), differences, colour, name, seeds)
    ticks = sorted({place for line in points.values() for place, _ in line})
    axes.axhline(0, color=SOFT, linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:.2f}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.set_ylabel(f"nats per token, minus {BASELINE}'s")
    axes.legend()
