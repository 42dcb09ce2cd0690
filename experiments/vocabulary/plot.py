"""Draw what the memory gains at each size of the vocabulary."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from engram.lm.tokenizer import SMALLEST_VOCAB
from experiments.lab.plots import COLOURS, SOFT, STYLE, curve, first_run, gain, load, new_figure, save
from experiments.lab.report import Row
from experiments.vocabulary.configs import BASELINE


def draw(home: Path) -> Path:
    curves: dict[str, list[tuple[int, Row]]] = {}
    for table, rows in load(home, BASELINE).items():
        for row in rows:
            if row.bits is not None:
                curves.setdefault(table.size, []).append((first_run(row)["vocabulary"], row))
    figure, (axes,) = new_figure(6.4, [3.6])
    with matplotlib.rc_context(STYLE):
        sizes = sorted({entries for points in curves.values() for entries, _ in points})
        for colour, (size, points) in zip(COLOURS, curves.items(), strict=False):
            points.sort(key=lambda point: point[0])
            x = [sizes.index(entries) for entries, _ in points]
            seeds = [len(row.paired) for _, row in points]
            curve(axes, x, [gain(row) for _, row in points], colour, size, seeds)
        axes.axhline(0, color=SOFT, linewidth=1)
        axes.set_xticks(
            range(len(sizes)), ["bytes" if entries == SMALLEST_VOCAB else f"{entries:,}" for entries in sizes]
        )
        axes.set_xlabel("entries of the vocabulary")
        axes.set_ylabel("gain over plain, bits per byte")
        axes.set_title(f"{home.name}: engram against plain (bars: 95 % intervals; hollow: one seed)")
        axes.legend()
    return save(figure, home)
