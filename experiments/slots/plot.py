"""Draw what rows buy: loss below plain's against rows per head, with a straight line in log2(rows) and its 95
% band."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

from experiments.lab.plots import ARM_COLOURS, SOFT, STYLE, hollow, load, new_figure, save
from experiments.lab.report import interval
from experiments.slots.configs import BASELINE
from experiments.slots.summary import cells_of, log_fit, seed_differences


def draw(home: Path) -> Path:
    groups = load(home, BASELINE)
    figure, panels = new_figure(7.2, [4.0] * len(groups))
    with matplotlib.rc_context(STYLE):
        for axes, (group, rows) in zip(panels, groups.items(), strict=True):
            plain = next((row for row in rows if row.variant == BASELINE), None)
            if plain is None:
                raise ValueError(f"{home}: table {str(group)!r} has no run of {BASELINE!r} to measure from")
            shown: set[int] = set()
            for arm in ("engram", "over-encoding"):
                colour = ARM_COLOURS[arm]
                cells = cells_of(rows, arm)
                if not cells:
                    continue
                x, differences = np.log2(list(cells)), [seed_differences(row, plain) for row in cells.values()]
                for at, values in zip(x, differences, strict=True):
                    axes.plot([at] * len(values), values, ".", color=colour, alpha=0.4)
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
