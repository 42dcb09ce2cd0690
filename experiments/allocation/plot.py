"""Draw the loss against the table's share of the budget."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from engram.ablation.statistics import Interval
from experiments.allocation.configs import BASELINE, SHARES, label_of
from experiments.lab.plots import COLOURS, SOFT, STYLE, curve, load, new_figure, save


def draw(home: Path) -> Path:
    found = load(home, BASELINE)
    groups = {group: rows for group, rows in found.items() if any(row.variant == BASELINE for row in rows)}
    if not groups:
        raise ValueError(f"{home / 'results.jsonl'} has no run of {BASELINE!r} to compare with")
    figure, panels = new_figure(7.2, [3.6] * len(groups))
    with matplotlib.rc_context(STYLE):
        for axes, (group, rows) in zip(panels, groups.items(), strict=True):
            by_label = {row.variant: row for row in rows}
            shares = [share for share in SHARES if label_of(share) in by_label]
            points = []
            for share in shares:
                row = by_label[label_of(share)]
                loss, (mean, low, high) = row.mean("loss"), row.nats or Interval(0.0, 0.0, 0.0)
                points.append(Interval(loss, loss + low - mean, loss + high - mean))
            if points:
                label = "experts and table (bars: 95 % intervals of the difference to experts alone; hollow: one seed)"
                seeds = [len(by_label[label_of(share)].runs) for share in shares]
                curve(axes, [100 * share for share in shares], points, COLOURS[0], label, seeds)
            if "plain" in by_label:
                loss = by_label["plain"].mean("loss")
                axes.axhline(loss, color=SOFT, linestyle="--", linewidth=1.2, label="plain, without the budget")
            axes.set_xticks([100 * share for share in shares], [f"{100 * share:g}" for share in shares])
            axes.set_xlabel("share of the budget in the table, %")
            axes.set_ylabel("validation loss, nats per token")
            axes.set_title(f"{home.name}, {group}")
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return save(figure, home)
