"""Accuracy of each task: plain, with the memory on, with it off."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from experiments.measures import mean_of, measured, share_of
from experiments.plots import COLOURS, INK, SOFT, STYLE, dot, new_figure, save
from experiments.recall.summary import accuracy


def draw(home: Path) -> Path:
    groups = {group: labels for group, labels in measured(home).items() if any(labels.values())}
    if not groups:
        raise ValueError(f"{home / 'results.jsonl'} has no runs yet: python -m experiments run {home.name}")
    figure, panels = new_figure(6.4, [1.9] * len(groups))
    with matplotlib.rc_context(STYLE):
        for axes, (group, labels) in zip(panels, groups.items(), strict=True):
            names = []
            for label, runs in labels.items():
                for state, marker, colour in (("on", "o", COLOURS[0]), ("off", "v", COLOURS[1])):
                    found = share_of(runs, accuracy(state))
                    if found is None:
                        continue
                    dot(axes, len(names), found, colour, marker, size=6)
                    names.append(label if state == "on" else f"{label}, memory off")
            keyless = mean_of(labels.get("plain", {}), accuracy("on", "keyless"))
            if keyless is not None:
                axes.axvline(keyless.mean, color=SOFT, linewidth=1.2, linestyle=":")
            axes.set_yticks(range(len(names)), names, color=INK)
            axes.set_ylim(len(names) - 0.4, -0.6)
            axes.set_xlim(-0.03, 1.03)
            axes.grid(axis="y", visible=False)
            axes.set_title(f"{home.name}, {group}")
        panels[-1].set_xlabel(
            "share of answers right\n(bars: 95 % over seeds, cut at 0 and 1; dotted: plain without keys)"
        )
    return save(figure, home)
