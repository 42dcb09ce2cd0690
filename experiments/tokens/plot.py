"""What the memory gains against the number of training tokens, and where the text begins to repeat."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from experiments.plots import COLOURS, SOFT, STYLE, beside, curve, first_run, gain, load, new_figure, save
from experiments.report import Row
from experiments.tokens.configs import BASELINE


def draw(home: Path) -> Path:
    curves: dict[str, list[tuple[int, Row]]] = {}
    for group, rows in load(home, BASELINE).items():
        for row in rows:
            if row.bits is not None:
                name = group.rsplit(",", 1)[0] + row.label.removeprefix("engram")  # without the budget
                curves.setdefault(name, []).append((first_run(row)["tokens"], row))
    figure, (axes,) = new_figure(7.2, [4.0])
    with matplotlib.rc_context(STYLE):
        for which, (colour, (name, points)) in enumerate(zip(COLOURS, curves.items(), strict=False)):
            points.sort(key=lambda point: point[0])
            gains, seeds = [gain(row) for _, row in points], [len(row.paired) for _, row in points]
            curve(axes, beside([tokens / 1e6 for tokens, _ in points], which, len(curves)), gains, colour, name, seeds)
            once = first_run(points[0][1])["text_tokens"]
            if points[0][0] < once < points[-1][0]:
                axes.axvline(once / 1e6, color=colour, linestyle=":", linewidth=1.2)
                place = {"xycoords": ("data", "axes fraction"), "xytext": (-3, 0), "textcoords": "offset points"}
                axes.annotate(
                    "one pass", (once / 1e6, 0.03), rotation=90, ha="right", color=colour, fontsize=8, **place
                )
        axes.axhline(0, color=SOFT, linewidth=1)
        axes.set_xscale("log")
        ticks = sorted({tokens / 1e6 for points in curves.values() for tokens, _ in points})
        axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("training tokens, millions")
        axes.set_ylabel("gain over plain, bits per byte")
        axes.set_title(f"{home.name}: engram against plain (bars: 95 % intervals; open: one seed)")
        axes.legend()
    return save(figure, home)
