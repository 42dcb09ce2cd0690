"""curves.png of a report: validation loss while training, and the gain over plain by how often an n-gram was seen."""

from __future__ import annotations

import io
import itertools
import os
import re
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from engram._extras import require
from engram.ablation.tables import (
    BUCKETS,
    Report,
    arms_of,
    percent,
    runs_of,
    seen_of,
    title_of,
)
from engram.lm.units import format_count
from engram.storage.files import write_whole

# Okabe and Ito's palette, which colour-blind readers can distinguish too; lighter on dark.
_LIGHT = {
    "page": "#ffffff",
    "ink": "#1f2328",
    "soft": "#59636e",
    "rule": "#d5d9de",
    "plain": "#57606a",
    "engram": "#0072b2",
    "others": ("#d55e00", "#009e73", "#b1559c", "#b58900", "#3aa0d8", "#882255"),
}
_DARK = {
    "page": "#14181d",
    "ink": "#e6e9ed",
    "soft": "#9aa4af",
    "rule": "#343b44",
    "plain": "#b4bcc6",
    "engram": "#56b4e9",
    "others": ("#f28a4a", "#2fc79a", "#dc8fc9", "#e6b84a", "#9dd3f2", "#d980a3"),
}


class _Look(NamedTuple):
    colour: str
    line: str


def _looks(arms: Sequence[str], palette: Mapping[str, Any]) -> dict[str, _Look]:
    """Return a colour per arm. If there are more arms than colours, the later ones are dashed, then dotted."""
    others = itertools.cycle(_Look(colour, line) for line in ("-", "--", ":") for colour in palette["others"])
    return {arm: _Look(palette[arm], "-") if arm in ("plain", "engram") else next(others) for arm in arms}


def draw_curves(report: Report, path: str | os.PathLike[str]) -> None:
    """Draw curves.png: validation loss while training, and the gain over plain by seen count. It is written
    completely or not at all."""
    write_whole(path, figure_png(report))


def css_colours(dark: bool) -> str:
    """Return the declarations of the CSS variables that the figure's SVG panels refer to."""
    return " ".join(f"{name}: {value};" for name, value in _variables(_DARK if dark else _LIGHT))


def _variables(palette: Mapping[str, Any]) -> list[tuple[str, str]]:
    named = [(f"--{name}", palette[name]) for name in ("page", "ink", "soft", "rule", "plain", "engram")]
    return named + [(f"--arm-{i}", colour) for i, colour in enumerate(palette["others"])]


def _style(palette: Mapping[str, Any]) -> dict[Any, Any]:
    return {
        "font.size": 9.5,
        "font.family": "DejaVu Sans",
        "text.parse_math": False,  # a dollar sign in a path is a dollar sign
        "text.color": palette["ink"],
        "axes.labelcolor": palette["soft"],
        "axes.edgecolor": palette["rule"],
        "axes.facecolor": palette["page"],
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.facecolor": palette["page"],
        "grid.color": palette["rule"],
        "grid.alpha": 0.6,
        "grid.linewidth": 0.6,
        "xtick.color": palette["soft"],
        "ytick.color": palette["soft"],
        "ytick.major.size": 0,
    }


class _Room(NamedTuple):
    """Inches around the axes of a panel: ticks at the left and below, titles above, names of arms at the right."""

    left: float
    right: tuple[float, float]  # of the first and the second panel
    axes: float  # height of the axes
    below: float = 0.9
    above: float = 0.55


def _room(looks: Mapping[str, _Look]) -> _Room:
    letters = max(len(arm) for arm in looks)
    names = (0.35 + 0.075 * (letters + 7), 0.3 + (0.08 * letters if len(looks) <= 5 else 0))
    return _Room(0.5, names, 2.5 + 0.17 * max(0, len(looks) - 14))


def figure_png(report: Report) -> bytes:
    """Draw both panels side by side as PNG bytes, 1800 pixels wide, with a title and the command that made them."""
    require("the figure of an ablation", "matplotlib", "PIL")
    import matplotlib
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    looks = _looks(arms_of(report), _LIGHT)
    room = _room(looks)
    width, height = 9.0, room.below + room.axes + room.above + 0.4
    panel = (width - 2 * room.left - sum(room.right)) / 2
    with matplotlib.rc_context(_style(_LIGHT)):
        figure = Figure(figsize=(width, height), dpi=200)
        canvas = FigureCanvasAgg(figure)
        left, right = (
            figure.add_axes((x / width, room.below / height, panel / width, room.axes / height))
            for x in (room.left, 2 * room.left + panel + room.right[0])
        )
        _draw_losses(left, report, looks)
        _draw_gains(right, report, looks)
        made = f"{report['command']}  ·  engram {report['version']}  ·  {report['date']}"
        title, made = _wrap(title_of(report), 110), _wrap(made, 145)
        figure.text(0.12 / width, 1 - 0.12 / height, title, fontsize=11.5, weight="bold", va="top")
        figure.text(0.12 / width, 0.1 / height, made, fontsize=7, color=_LIGHT["soft"], va="bottom")
        canvas.draw()
    # 256 colours are enough for lines and text and make a third of the bytes.
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    image.save(buffer, format="png", optimize=True, dpi=(200, 200))
    return buffer.getvalue()


def figure_svg(report: Report) -> list[str]:
    """Draw each panel as an `<svg>` element for an HTML page, with text as text and colours as the variables of
    css_colours(), so that one drawing fits a light and a dark page."""
    require("the figure of an ablation", "matplotlib")
    import matplotlib
    from matplotlib.figure import Figure

    looks = _looks(arms_of(report), _LIGHT)
    room, width = _room(looks), 4.2
    height = room.below + room.axes + room.above
    panels = []
    for draw, names, label in zip((_draw_losses, _draw_gains), room.right, _LABELS, strict=True):
        with matplotlib.rc_context(_style(_LIGHT) | {"svg.fonttype": "none", "svg.hashsalt": label}):
            figure, buffer = Figure(figsize=(width, height)), io.StringIO()
            box = room.left / width, room.below / height, 1 - (room.left + names) / width, room.axes / height
            draw(figure.add_axes(box), report, looks)
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        panels.append(_for_page(buffer.getvalue(), label))
    return panels


_LABELS = (
    "Validation loss against training tokens for each arm. The tables hold the same numbers.",
    "Gain over plain by how often training saw the last n-gram. The tables hold the same numbers.",
)


def _for_page(svg: str, label: str) -> str:
    """Turn a file of matplotlib into an element of a page, with the page's font and colours, and no names of groups."""
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg role="img" aria-label="{label}" \1>', svg, count=1)
    return re.sub(r"<[^>]*>", lambda tag: _tag_for_page(tag[0]), svg)  # tags alone: text may hold anything


def _tag_for_page(tag: str) -> str:
    tag = re.sub(r'<g id="[^"]*"', "<g", tag)  # both panels use the same names, and nothing refers to them
    tag = re.sub(r"(font: [^;]*?px )[^;]*?(?=[;\"])", r"\1system-ui, sans-serif", tag).replace("xlink:href", "href")
    for name, colour in _variables(_LIGHT):
        tag = tag.replace(colour, f"var({name})")
    return re.sub(r"(?<=\d\.\d\d)\d+", "", tag)  # hundredths of a point are enough


def _wrap(text: str, letters: int) -> str:
    return "\n".join(textwrap.fill(line, letters) for line in text.splitlines())


def _draw_losses(axes: Any, report: Report, looks: Mapping[str, _Look]) -> None:
    ends: list[tuple[str, float, float, str]] = []
    visible: list[float] = []
    for arm, (colour, line) in looks.items():
        runs = runs_of(report, arm)
        train = _mean_curve([_points(run["train_curve"]) for run in runs])
        mean = _mean_curve([_points(run["validation_curve"]) for run in runs])
        axes.plot(*train, color=colour, linewidth=0.6, alpha=0.25, zorder=1)
        # plain is drawn wide and below, so that an arm that equals it shows on top of it.
        width, order = (3.2, 2.0) if arm == "plain" else (1.7, 3.0)
        for run in runs if len(runs) > 1 else []:
            axes.plot(*_points(run["validation_curve"]), color=colour, linewidth=0.6, alpha=0.6, zorder=order)
        axes.plot(*mean, color=colour, linestyle=line, linewidth=width, zorder=order)
        # The curve may be judged on a part of the validation text; the dot and its number are the reported loss.
        tokens, loss = (statistics.fmean(run[key] for run in runs) for key in ("tokens", "loss"))
        axes.plot(tokens, loss, "o", color=colour, markersize=width + 3, zorder=order + 0.5, clip_on=False)
        ends.append((f"{arm}  {loss:.3f}", tokens, loss, colour))
        # The first tenth falls so steeply that the differences would vanish if it were inside the frame.
        visible += [loss, *mean[1, mean[0] >= 0.1 * tokens]]
    margin = 0.06 * (max(visible) - min(visible)) or 0.1
    axes.set_ylim(min(visible) - margin, max(visible) + margin)
    axes.set_xlim(0, max(end[1] for end in ends) * 1.02)
    axes.xaxis.set_major_formatter(lambda value, _: re.sub(r"\.0+(?=\D)", "", format_count(value)))
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel("training tokens")
    _panel_title(axes, "Validation loss while training", "nats per token; dot: all validation text; faint: training")
    _label_ends(axes, ends)


def _draw_gains(axes: Any, report: Report, looks: Mapping[str, _Look]) -> None:
    plain = runs_of(report, "plain") if len(looks) > 1 else []
    compared = [arm for arm in looks if not (plain and arm == "plain")]
    ends, ticks, labels = [], [], []
    for order, first in (("bigram", 0.0), ("trigram", len(BUCKETS) + 0.4)):
        for arm in compared:
            runs, (colour, line) = runs_of(report, arm), looks[arm]
            for run in runs if len(runs) > 1 else []:
                paired = [other for other in plain if other["seed"] == run["seed"]]
                x, y = _by_bucket([run], order, paired or plain)
                axes.plot(x + first, y, "_", color=colour, markersize=8, markeredgewidth=0.8, zorder=2)
            x, y = _by_bucket(runs, order, plain)
            axes.plot(x + first, y, "o", color=colour, linestyle=line, linewidth=1.7, markersize=4.5, zorder=3)
            if order == "trigram" and len(x):
                ends.append((arm, x[-1] + first, y[-1], colour))
        shares = seen_of(report["runs"], order)
        ticks += [first + i for i in range(len(BUCKETS))]
        labels += [f"{name}\n{percent(shares[bucket][0])}" for bucket, name in BUCKETS.items()]
        middle = first + (len(BUCKETS) - 1) / 2
        below = {"xytext": (0, -28), "textcoords": "offset points", "ha": "center", "va": "top"}
        axes.annotate(f"last {order}", (middle, 0), xycoords=axes.get_xaxis_transform(), **below)
    axes.set_xticks(ticks, labels)
    axes.tick_params(axis="x", length=0, labelsize=8)
    axes.set_xlim(-0.5, ticks[-1] + 0.4)
    axes.margins(y=0.1)
    if plain:
        axes.axhline(0, color=looks["plain"].colour, linewidth=1.2, zorder=1)
        ends.append(("plain", ticks[-1], 0.0, looks["plain"].colour))
    what, base = ("Gain", " below plain") if plain else ("Loss", "")
    _panel_title(axes, f"{what} by n-gram count in training", f"nats per token{base}; % of validation tokens")
    if len(looks) <= 5:  # with more, the left panel's labels name the colours
        _label_ends(axes, ends)


def _by_bucket(runs: Sequence[Report], order: str, plain: Sequence[Report]) -> tuple[Any, Any]:
    """Return the numbers of the buckets with tokens, and plain's loss minus the runs' there; without plain, theirs."""
    import numpy as np

    losses, base = seen_of(runs, order), seen_of(plain, order)
    points = []
    for i, bucket in enumerate(BUCKETS):
        loss, reference = losses[bucket][1], base[bucket][1] if plain else 0.0
        if loss is not None and reference is not None:
            points.append((i, reference - loss if plain else loss))
    return np.array([i for i, _ in points], dtype=int), np.array([value for _, value in points])


def _points(curve: Sequence[Sequence[float]]) -> Any:
    """Return [[tokens, loss], ...] as float64 [2, points]."""
    import numpy as np

    return np.asarray(curve, dtype=np.float64).reshape(-1, 2).T


def _mean_curve(curves: Iterable[Any]) -> Any:
    """Return the mean over seeds, float64 [2, points], at the token counts of the first seed."""
    import numpy as np

    curves = [curve for curve in curves if curve.size]
    if not curves:
        return _points([])
    tokens = curves[0][0]
    return np.stack([tokens, np.mean([np.interp(tokens, *curve) for curve in curves], axis=0)])


def _panel_title(axes: Any, title: str, subtitle: str) -> None:
    axes.set_title(f"{title}\n", loc="left", fontsize=10, weight="bold")
    axes.annotate(subtitle, (0, 1), (0, 6), xycoords="axes fraction", textcoords="offset points", fontsize=8.5)


def _label_ends(axes: Any, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """Write each (label, x, y, colour) beside its line's end, moved apart if they would touch."""
    low, high = axes.get_ylim()
    height = axes.get_window_extent().height / axes.figure.dpi * 72  # points
    ends = sorted(ends, key=lambda end: end[2])
    heights = _apart([end[2] for end in ends], 12 * (high - low) / height, low, high)
    for (text, x, y, colour), y_label in zip(ends, heights, strict=True):
        at: dict[str, Any] = {"xytext": (1.05, y_label), "textcoords": ("axes fraction", "data"), "color": colour}
        if abs(y_label - y) > 0.01 * (high - low):
            at["arrowprops"] = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkB": 3, "relpos": (0, 0.5)}
        axes.annotate(text, (x, y), va="center", annotation_clip=False, **at)


def _apart(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return the positions nearest to ascending values (least squares) at least `gap` apart, between low and high."""
    blocks: list[list[float]] = []  # pool adjacent violators on value - index * gap
    for i, value in enumerate(values):
        blocks.append([value - i * gap])
        while len(blocks) > 1 and statistics.fmean(blocks[-2]) > statistics.fmean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    level = [statistics.fmean(block) for block in blocks for _ in block]
    room = high - (len(values) - 1) * gap
    return [min(max(value, low), room) + i * gap for i, value in enumerate(level)]
