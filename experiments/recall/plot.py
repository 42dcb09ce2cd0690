"""Draw how soon each arm learns each task, and its share of right answers with the memory on and off."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes

from experiments.lab.measures import mean_of, measured, share_of
from experiments.lab.plots import ARM_COLOURS, INK, SOFT, STYLE, dot, new_figure, save
from experiments.lab.results import Record
from experiments.recall.configs import ARMS, SLOW
from experiments.recall.summary import accuracy, half_way


def draw(home: Path) -> Path:
    groups = {group: labels for group, labels in measured(home).items() if any(labels.values())}
    if not groups:
        raise ValueError(f"{home / 'results.jsonl'} has no runs yet: python -m experiments run {home.name}")
    figure, panels = new_figure(6.4, [2.3, 2.2] * len(groups))
    with matplotlib.rc_context(STYLE):
        for pair, (group, labels) in enumerate(groups.items()):
            _curves(panels[2 * pair], labels)
            _accuracy(panels[2 * pair + 1], labels)
            panels[2 * pair].set_title(f"{home.name}, {group}")
        panels[0].legend(loc="upper right", fontsize=8)
        panels[-1].set_xlabel(
            "share of answers right\n(bars: 95 % over seeds, cut at 0 and 1; dotted: plain without keys)"
        )
    return save(figure, home)


def _curves(axes: Axes, labels: dict[str, dict[int, Record]]) -> None:
    """Draw the loss over training, one line per seed."""
    looks = {**{arm: (ARM_COLOURS[arm], "-") for arm in ARMS}, SLOW: (ARM_COLOURS["engram"], "--")}
    level = half_way(next(run for runs in labels.values() for run in runs.values()))
    for label, (colour, style) in looks.items():
        for which, run in enumerate(labels.get(label, {}).values()):
            tokens, nats = zip(*run["curve"], strict=True)
            axes.plot([t / 1e6 for t in tokens], nats, style, color=colour, lw=1.2, label=None if which else label)
    axes.axhline(level, color=SOFT, linewidth=1.2, linestyle=":")
    axes.set_ylim(0, 3 * level)
    axes.set_xlabel("training tokens, millions (one line per seed; dotted: learned)")
    axes.set_ylabel("nats per answer")


def _accuracy(axes: Axes, labels: dict[str, dict[int, Record]]) -> None:
    """Draw shares of right answers, one line per arm and state of its memory."""
    names = []
    for label, runs in labels.items():
        colour = ARM_COLOURS["engram" if label == SLOW else label]
        for state, marker in (("on", "o"), ("off", "v")):
            share = share_of(runs, accuracy(state))
            if share is None:
                continue
            dot(axes, len(names), share, colour, marker, size=6)
            names.append(label if state == "on" else f"{label}, memory off")
    keyless = mean_of(labels.get("plain", {}), accuracy("on", "keyless"))
    if keyless is not None:
        axes.axvline(keyless.mean, color=SOFT, linewidth=1.2, linestyle=":")
    axes.set_yticks(range(len(names)), names, color=INK)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(-0.03, 1.03)
    axes.grid(axis="y", visible=False)
