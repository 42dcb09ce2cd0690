"""Draw loss and gain against the number of training tokens, and where the text begins to repeat."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes

from experiments.lab.plots import COLOURS, SOFT, STYLE, beside, curve, first_run, gain, load, new_figure, save
from experiments.lab.report import Row
from experiments.tokens.configs import BASELINE
from experiments.tokens.summary import text_of

Points = list[tuple[float, Row]]  # (millions of training tokens, row)


def draw(home: Path) -> Path:
    curves: dict[str, Points] = {}
    plain: dict[str, Points] = {}
    for table, rows in load(home, BASELINE).items():
        text = str(text_of(table))
        for row in rows:
            point = (first_run(row)["tokens"] / 1e6, row)
            if row.variant == BASELINE:
                plain.setdefault(text, []).append(point)
            elif row.bits is not None:
                curves.setdefault(text + row.variant.removeprefix("engram"), []).append(point)
    for points in (*plain.values(), *curves.values()):
        points.sort(key=lambda point: point[0])
    figure, (losses, gains) = new_figure(7.2, [3.6, 4.0])
    with matplotlib.rc_context(STYLE):
        for which, (colour, (name, points)) in enumerate(zip(COLOURS, curves.items(), strict=False)):
            x = [tokens for tokens, _ in points]
            seeds = [len(row.paired) for _, row in points]
            curve(gains, beside(x, which, len(curves)), [gain(row) for _, row in points], colour, name, seeds)
            losses.plot(x, [row.mean("bpb") for _, row in points], "o-", color=colour, markersize=4, label=name)
            if name in plain:
                x, rows = zip(*plain[name], strict=True)
                means = [row.mean("bpb") for row in rows]
                losses.plot(x, means, "o--", color=colour, markersize=4, mfc="white", label=f"{name}, {BASELINE}")
            _one_pass(gains, points, colour)
        gains.axhline(0, color=SOFT, linewidth=1)
        ticks = sorted({tokens for points in curves.values() for tokens, _ in points})
        for axes in (losses, gains):
            axes.set_xscale("log")
            axes.set_xticks(ticks, [f"{tick:.2f}" for tick in ticks])
            axes.minorticks_off()
            axes.legend()
        gains.set_xlim(losses.get_xlim())
        gains.set_xlabel("training tokens, millions")
        losses.set_ylabel("bits per byte (dashed: plain)")
        gains.set_ylabel("gain over plain, bits per byte")
        losses.set_title(f"{home.name}: how far a line is to the left is what it saves in tokens (means over seeds)")
        gains.set_title("engram against plain (bars: 95 % intervals; hollow: one seed)")
    return save(figure, home)


def _one_pass(axes: Axes, points: Points, colour: str) -> None:
    """Draw a line where the text has been read once."""
    once = first_run(points[0][1])["text_tokens"] / 1e6
    if points[0][0] < once < points[-1][0]:
        axes.axvline(once, color=colour, linestyle=":", linewidth=1.2)
        place = {"xycoords": ("data", "axes fraction"), "xytext": (-3, 0), "textcoords": "offset points"}
        axes.annotate("one pass", (once, 0.03), rotation=90, ha="right", color=colour, fontsize=8, **place)
