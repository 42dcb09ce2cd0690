"""Draw LogitLens KL by layer, and the likeness of each layer to each of plain's."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

from experiments.depth.configs import BASELINE
from experiments.depth.summary import compare, lens
from experiments.lab.measures import mean_of, measured
from experiments.lab.plots import ARM_COLOURS, INK, STYLE, curve, new_figure, save


def draw(home: Path) -> Path:
    groups = {group: labels for group, labels in measured(home).items() if any(labels.values())}
    if not groups:
        raise ValueError(f"{home / 'results.jsonl'} has no runs yet: python -m experiments run {home.name}")
    maps = []  # (title, [layers, plain's layers])
    for group, labels in groups.items():
        for label, runs in labels.items():
            compared = compare(home, runs, labels.get(BASELINE, {}))
            if compared:
                side = 1 if label == BASELINE else 0
                title = f"CKA, {group}: {label} against {BASELINE} of other seeds"
                maps.append((title, np.mean([pair[side] for pair in compared.values()], axis=0)))
    figure, panels = new_figure(7.2, [3.4] * len(groups) + [2.6] * len(maps))
    with matplotlib.rc_context(STYLE):
        for axes, (group, labels) in zip(panels, groups.items(), strict=False):
            means: list[list[float]] = []  # of each arm, by layer
            for label, runs in labels.items():
                depth = min((len(run["measures"]["lens_kl"]) for run in runs.values()), default=0)
                points = [mean_of(runs, lens(layer)) for layer in range(depth - 1)]  # KL is 0 at the last layer
                known = [point for point in points if point is not None]
                if known:
                    seeds = [len(runs)] * len(known)
                    curve(axes, range(len(known)), [_finite(p) for p in known], ARM_COLOURS[label], label, seeds)
                    means.append([point.mean for point in known])
            if means:
                axes.set_yscale("log")
                axes.set_ylim(bottom=0.3 * min(map(min, means)))
                axes.yaxis.set_major_formatter("{x:g}")
                axes.set_xticks(range(max(map(len, means))))
            axes.set_xlabel("layer (0: embedding; bars: 95 % over seeds, cut at the bottom; hollow: one seed)")
            axes.set_ylabel("KL to the final distribution, nats")
            axes.set_title(f"{home.name}, {group}: LogitLens")
            axes.legend()
        least, most = (edge([matrix for _, matrix in maps]) if maps else 0 for edge in (np.min, np.max))
        for axes, (title, matrix) in zip(panels[len(groups) :], maps, strict=True):
            axes.imshow(matrix, vmin=least, vmax=most, cmap="Blues", aspect="auto")  # one scale for all maps
            for i, j in np.ndindex(matrix.shape):
                colour = INK if matrix[i, j] < least + 0.6 * (most - least) else "white"
                weight = "bold" if j == matrix[i].argmax() else "normal"
                words = f"{matrix[i, j]:.3f}"
                axes.text(j, i, words, ha="center", va="center", color=colour, fontsize=7, fontweight=weight)
            axes.set_xticks(range(matrix.shape[1]), [f"{j + 1}" for j in range(matrix.shape[1])])
            axes.set_yticks(range(matrix.shape[0]), [f"{i + 1}" for i in range(matrix.shape[0])])
            axes.grid(visible=False)
            axes.set_xlabel(f"layer of {BASELINE} (bold: the likest)")
            axes.set_ylabel("layer")
            axes.set_title(title)
    return save(figure, home)


def _finite(point):
    """Return a mean with its interval; one seed has none and gets a bar of length 0."""
    return point if np.isfinite(point.low) else point._replace(low=point.mean, high=point.mean)
