"""What is left of facts and of reading when the memory is switched off."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

from experiments.measures import mean_of, measured
from experiments.plots import COLOURS, INK, SOFT, STYLE, new_figure, save
from experiments.sensitivity.summary import LEVELS, SHARES, retention


def draw(home: Path) -> Path:
    found = []  # (title, {share: interval})
    for group, labels in measured(home).items():
        for label, runs in labels.items():
            kept = {name: mean_of(runs, retention(name)) for name in SHARES}
            if any(interval is not None for interval in kept.values()):
                found.append((f"{label}, {group}", kept))
    if not found:
        raise ValueError(f"{home / 'results.jsonl'} has no runs yet: python -m experiments run {home.name}")
    figure, panels = new_figure(7.2, [1.0 + 0.3 * len(SHARES)] * len(found))
    with matplotlib.rc_context(STYLE):
        for axes, (title, kept) in zip(panels, found, strict=True):
            for place, (name, interval) in enumerate(kept.items()):
                if interval is None:
                    continue
                colour = COLOURS[0] if name in ("taught_exact", *LEVELS) else COLOURS[1]  # said in training, or not
                if np.isfinite(interval.low):
                    axes.plot([interval.low, interval.high], [place, place], color=colour, linewidth=1.6)
                axes.plot(interval.mean, place, "o", color=colour, markersize=5)
            axes.set_yticks(range(len(kept)), [SHARES[name] for name in kept], color=INK)
            axes.set_ylim(len(kept) - 0.5, -0.5)
            axes.axvline(1, color=SOFT, linewidth=1)
            axes.axvline(0, color=SOFT, linewidth=1)
            axes.grid(axis="y", visible=False)
            axes.set_title(f"{home.name}: {title}")
            axes.set_xlabel("share left with the memory off (1: nothing lost; bars: 95 % over seeds)")
    return save(figure, home)
