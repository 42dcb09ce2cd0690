"""Shows what `engram ablate` measured: tables in the terminal, curves.png and a self-contained report.html.

The input is the dict that is also written as report.json. Losses are nats per token; a difference is an arm minus
the arm "plain" on the same validation tokens, so negative is better; intervals are 95 %.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import os
import re
import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rich.console import Console

Report = Mapping[str, Any]

BUCKETS = {"0": "never", "1": "once", "2-9": "2–9×", "10+": "10+×"}
NO_VALUE = "–"


class Cell(NamedTuple):
    text: str
    note: str = ""  # second line, smaller
    tone: str = ""  # "better" or "worse" where an interval excludes zero


class Table(NamedTuple):
    title: str
    caption: str
    head: list[Cell]
    rows: list[list[Cell]]


def format_count(number: float) -> str:
    """1_234_567 -> "1.23M": three significant digits and k, M, G or T (powers of 1000)."""
    return _scaled(number, 1000, ("", "k", "M", "G", "T"))


def format_bytes(number: float) -> str:
    """67_108_864 -> "64.0 MiB": three significant digits and a binary unit (powers of 1024)."""
    return _scaled(number, 1024, (" B", " KiB", " MiB", " GiB", " TiB"))


def _scaled(number: float, base: int, units: Sequence[str]) -> str:
    power = 0
    while abs(number) >= 999.5 and power < len(units) - 1:
        number, power = number / base, power + 1
    digits = 0 if power == 0 or abs(number) >= 99.95 else 1 if abs(number) >= 9.995 else 2
    return f"{number:.{digits}f}{units[power]}"


# ---- what the tables hold: the terminal and the page show the same ------------------------------------------------


def _arms(report: Report) -> list[str]:
    return [entry["arm"] for entry in report["summary"]]


def _runs(report: Report, arm: str) -> list[Report]:
    return [run for run in report["runs"] if run["arm"] == arm]


def _seeds(report: Report) -> int:
    return max(entry["seeds"] for entry in report["summary"])


def _title(report: Report) -> str:
    arms, seeds = len(report["summary"]), _seeds(report)
    tokens = format_count(max(run["tokens"] for run in report["runs"]))
    what = f"{arms} arm{'s' * (arms > 1)} × {seeds} seed{'s' * (seeds > 1)}"
    each = " each" * (len(report["runs"]) > 1)
    return f"Validation loss on {report['corpus']['name']}: {what}, {tokens} training tokens{each}"


def _signed(number: float) -> str:
    return f"{number:+.3f}".replace("-", "−")


def _percent(share: float) -> str:
    return "<1 %" if 0 < share < 0.005 else f"{100 * share:.0f} %"


def _mean(runs: Iterable[Report], key: str) -> str:
    return f"{statistics.fmean(run[key] for run in runs):,.0f}"


def _over_seeds(runs: Sequence[Report], key: str) -> Cell:
    values = [run[key] for run in runs]
    note = f"±{statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return Cell(f"{statistics.fmean(values):.3f}", note)


def _difference(interval: Mapping[str, float] | None) -> Cell:
    if interval is None:
        return Cell(NO_VALUE)
    tone = "better" if interval["high"] < 0 else "worse" if interval["low"] > 0 else ""
    return Cell(_signed(interval["mean"]), f"{_signed(interval['low'])} to {_signed(interval['high'])}", tone)


def _seen(runs: Sequence[Report], order: str) -> dict[str, tuple[float, float | None]]:
    """Per bucket the share of validation tokens (0 to 1) and their mean loss, None where the bucket is empty."""
    seeds = [run["seen"][order] for run in runs]
    total = sum(seen[bucket][0] for seen in seeds for bucket in BUCKETS)
    result: dict[str, tuple[float, float | None]] = {}
    for bucket in BUCKETS:
        filled = [seen[bucket] for seen in seeds if seen[bucket][0]]
        tokens = sum(count for count, _ in filled)
        loss = sum(count * value for count, value in filled) / tokens if tokens else None
        result[bucket] = (tokens / total if total else 0.0, loss)
    return result


def _main_table(report: Report) -> Table:
    # What was found before what it cost: a phone shows the first columns.
    head = [Cell("arm"), Cell("loss"), Cell("Δ loss", "95 % interval"), Cell("bpb"), Cell("Δ bpb", "95 % interval")]
    head += [Cell(name) for name in ("dense", "table", "tokens", "sec", "tok/s")]
    rows = []
    for entry in report["summary"]:
        runs = _runs(report, entry["arm"])
        loss = [_over_seeds(runs, "loss"), _difference(entry["difference"])]
        bpb = [_over_seeds(runs, "bpb"), _difference(entry["difference_bpb"])]
        parameters = runs[0]["parameters"]
        counts = [Cell(format_count(count)) for count in (parameters["dense"], parameters["table"], runs[0]["tokens"])]
        timing = [Cell(_mean(runs, "seconds")), Cell(_mean(runs, "tokens_per_second"))]
        rows.append([Cell(entry["arm"]), *loss, *bpb, *counts, *timing])
    caption = "Loss: nats per token. bpb: bits per byte. Δ: the arm minus plain. Dense, table: parameters."
    if _seeds(report) > 1:
        caption += f" Means over {_seeds(report)} seeds, ± their standard deviation."
    return Table("What each arm reached", caption, head, rows)


def _seen_table(report: Report, order: str) -> Table:
    shares = _seen(report["runs"], order)
    head = [Cell("arm")] + [Cell(name, _percent(shares[key][0])) for key, name in BUCKETS.items()]
    plain = _seen(_runs(report, "plain"), order)
    rows = []
    for arm in _arms(report):
        row = [Cell(arm)]
        for bucket, (_, loss) in _seen(_runs(report, arm), order).items():
            base = plain[bucket][1]
            gain = _signed(loss - base) if loss is not None and base is not None else NO_VALUE
            row.append(Cell(NO_VALUE if loss is None else f"{loss:.3f}", "" if arm == "plain" else gain))
        rows.append(row)
    caption = "Nats per token; below it the difference to plain. % is the share of validation tokens."
    return Table(f"Loss by how often training saw the last {order}", caption, head, rows)


def _bytes_table(report: Report) -> Table:
    head = [Cell(name) for name in ("arm", "dense", "table", "optimiser", "together")]
    rows = []
    for arm in _arms(report):
        held = _runs(report, arm)[0]["bytes"]
        sizes = [held["dense"], held["table"], held["optimizer"]]
        rows.append([Cell(arm)] + [Cell(format_bytes(size)) for size in [*sizes, sum(sizes)]])
    return Table(
        "Memory while training",
        "Weights, rows and the optimiser's state for both; without activations and gradients.",
        head,
        rows,
    )


def _tables(report: Report) -> list[Table]:
    return [_main_table(report), _seen_table(report, "bigram"), _seen_table(report, "trigram"), _bytes_table(report)]


# ---- terminal -----------------------------------------------------------------------------------------------------


def print_report(report: Report, console: Console | None = None) -> None:
    """Prints the report's tables: arms with differences to plain, loss by seen count, memory."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = console or Console()
    roomy = console.width >= 110
    styles = {"better": "green", "worse": "red", "": ""}
    console.print(Text(_title(report), style="bold"), Text(report["command"], style="dim"), sep="\n")
    for table in _tables(report):
        columns = [i for i, cell in enumerate(table.head) if roomy or cell.text != "Δ bpb"]  # too wide for 80
        drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, int(roomy)))
        for i in columns:
            cell = table.head[i]
            header = Text(cell.text).append(f"\n{cell.note}" if cell.note else "", "dim")
            drawn.add_column(header, justify="right" if i else "left", no_wrap=i > 0, overflow="fold")
        for row in table.rows:
            cells = [Text(c.text, styles[c.tone]).append(f"\n{c.note}" if c.note else "", "dim") for c in row]
            drawn.add_row(*(cells[i] for i in columns))
        console.print(Text(f"\n{table.title}", style="bold"), Text(table.caption, style="dim"), drawn, sep="\n")


# ---- figure -------------------------------------------------------------------------------------------------------

# Okabe and Ito's palette, told apart by colour-blind readers too; lighter on dark.
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
    """A colour for each arm; where there are more arms than colours, the later ones are dashed, then dotted."""
    others = itertools.cycle(_Look(colour, line) for line in ("-", "--", ":") for colour in palette["others"])
    return {arm: _Look(palette[arm], "-") if arm in ("plain", "engram") else next(others) for arm in arms}


def draw_curves(report: Report, path: str | os.PathLike[str]) -> None:
    """Draws curves.png: validation loss while training, and the gain over plain by seen count. Appears whole or not."""
    _write(path, _figure(report))


def _figure(report: Report, dark: bool = False, narrow: bool = False) -> bytes:
    """The figure as PNG bytes, 1800 pixels wide; narrow: 840, one panel below the other."""
    import matplotlib
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    palette = _DARK if dark else _LIGHT
    style: dict[Any, Any] = {
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
    looks = _looks(_arms(report), palette)
    # In inches: room for tick labels on the left of a panel and for the arms' names on its right.
    ticks, letters, more = 0.5, max(len(arm) for arm in looks), 0.17 * max(0, len(looks) - 14)
    names = (0.35 + 0.075 * (letters + 7), 0.3 + (0.08 * letters if len(looks) <= 5 else 0))
    tall = 2.5 + more
    if narrow:
        width, height = 4.2, 2 * tall + 3.2
        places = [(ticks, tall + 2.1, width - ticks - names[0]), (ticks, 0.9, width - ticks - names[1])]
    else:
        width, height = 9.0, tall + 1.85
        panel = (width - 2 * ticks - sum(names)) / 2
        places = [(ticks, 0.9, panel), (2 * ticks + panel + names[0], 0.9, panel)]
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), dpi=200)
        canvas = FigureCanvasAgg(figure)
        left, right = (figure.add_axes((x / width, y / height, w / width, tall / height)) for x, y, w in places)
        _draw_losses(left, report, looks)
        _draw_gains(right, report, looks)
        title, made = _title(report), f"{report['command']}  ·  engram {report['version']}  ·  {report['date']}"
        if narrow:  # a line for the corpus and one for the arms; one for the command and one for the version
            title, made = title.replace(": ", ":\n"), made.replace("  ·  ", "\n", 1)
        title, made = _wrap(title, 48 if narrow else 110), _wrap(made, 68 if narrow else 145)
        figure.text(0.12 / width, 1 - 0.12 / height, title, fontsize=10 if narrow else 11.5, weight="bold", va="top")
        figure.text(0.12 / width, 0.1 / height, made, fontsize=7, color=palette["soft"], va="bottom")
        canvas.draw()
    # 256 colours are enough for lines and text and make a third of the bytes.
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    image.save(buffer, format="png", optimize=True, dpi=(200, 200))
    return buffer.getvalue()


def _wrap(text: str, letters: int) -> str:
    return "\n".join(textwrap.fill(line, letters) for line in text.splitlines())


def _draw_losses(axes: Any, report: Report, looks: Mapping[str, _Look]) -> None:
    ends: list[tuple[str, float, float, str]] = []
    visible: list[float] = []
    for arm, (colour, line) in looks.items():
        runs = _runs(report, arm)
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
    plain = _runs(report, "plain") if len(looks) > 1 else []
    compared = [arm for arm in looks if not (plain and arm == "plain")]
    ends, places, labels = [], [], []
    for order, first in (("bigram", 0.0), ("trigram", len(BUCKETS) + 0.4)):
        for arm in compared:
            runs, (colour, line) = _runs(report, arm), looks[arm]
            for run in runs if len(runs) > 1 else []:
                paired = [other for other in plain if other["seed"] == run["seed"]]
                x, y = _by_bucket([run], order, paired or plain)
                axes.plot(x + first, y, "_", color=colour, markersize=8, markeredgewidth=0.8, zorder=2)
            x, y = _by_bucket(runs, order, plain)
            axes.plot(x + first, y, "o", color=colour, linestyle=line, linewidth=1.7, markersize=4.5, zorder=3)
            if order == "trigram" and len(x):
                ends.append((arm, x[-1] + first, y[-1], colour))
        shares = _seen(report["runs"], order)
        places += [first + i for i in range(len(BUCKETS))]
        labels += [f"{name}\n{_percent(shares[bucket][0])}" for bucket, name in BUCKETS.items()]
        middle = first + (len(BUCKETS) - 1) / 2
        below = {"xytext": (0, -28), "textcoords": "offset points", "ha": "center", "va": "top"}
        axes.annotate(f"last {order}", (middle, 0), xycoords=axes.get_xaxis_transform(), **below)
    axes.set_xticks(places, labels)
    axes.tick_params(axis="x", length=0, labelsize=8)
    axes.set_xlim(-0.5, places[-1] + 0.4)
    axes.margins(y=0.1)
    if plain:
        axes.axhline(0, color=looks["plain"].colour, linewidth=1.2, zorder=1)
        ends.append(("plain", places[-1], 0.0, looks["plain"].colour))
    what, base = ("Gain", " below plain") if plain else ("Loss", "")
    _panel_title(axes, f"{what} by n-gram count in training", f"nats per token{base}; % of validation tokens")
    if len(looks) <= 5:  # with more, the left panel's labels name the colours
        _label_ends(axes, ends)


def _by_bucket(runs: Sequence[Report], order: str, plain: Sequence[Report]) -> tuple[Any, Any]:
    """Numbers of the buckets that hold tokens, and there plain's loss minus the runs'; with no plain, the runs'."""
    import numpy as np

    losses, base = _seen(runs, order), _seen(plain, order)
    points = []
    for i, bucket in enumerate(BUCKETS):
        loss, reference = losses[bucket][1], base[bucket][1] if plain else 0.0
        if loss is not None and reference is not None:
            points.append((i, reference - loss if plain else loss))
    return np.array([i for i, _ in points], dtype=int), np.array([value for _, value in points])


def _points(curve: Sequence[Sequence[float]]) -> Any:
    """[[tokens, loss], ...] as float64 [2, points]."""
    import numpy as np

    return np.asarray(curve, dtype=np.float64).reshape(-1, 2).T


def _mean_curve(curves: Iterable[Any]) -> Any:
    """Mean over seeds, float64 [2, points], at the token counts of the first seed."""
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
    """Writes each (label, x, y, colour) beside its line's end; where they would touch they move apart."""
    low, high = axes.get_ylim()
    height = axes.get_window_extent().height / axes.figure.dpi * 72  # points
    ends = sorted(ends, key=lambda end: end[2])
    places = _apart([end[2] for end in ends], 12 * (high - low) / height, low, high)
    for (text, x, y, colour), place in zip(ends, places, strict=True):
        at: dict[str, Any] = {"xytext": (1.05, place), "textcoords": ("axes fraction", "data"), "color": colour}
        if abs(place - y) > 0.01 * (high - low):
            at["arrowprops"] = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkB": 3, "relpos": (0, 0.5)}
        axes.annotate(text, (x, y), va="center", annotation_clip=False, **at)


def _apart(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The places nearest to ascending values (least squares) that are at least gap apart, inside low to high."""
    blocks: list[list[float]] = []  # pool adjacent violators on value - index * gap
    for i, value in enumerate(values):
        blocks.append([value - i * gap])
        while len(blocks) > 1 and statistics.fmean(blocks[-2]) > statistics.fmean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    level = [statistics.fmean(block) for block in blocks for _ in block]
    room = high - (len(values) - 1) * gap
    return [min(max(value, low), room) + i * gap for i, value in enumerate(level)]


# ---- page ---------------------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1f2328; --soft: #59636e; --rule: #d5d9de; --block: #f4f6f8;
  --better: #00734f; --worse: #b3400a; }
@media (prefers-color-scheme: dark) { :root { --page: #14181d; --ink: #e6e9ed; --soft: #9aa4af; --rule: #343b44;
  --block: #1d232a; --better: #2fc79a; --worse: #f28a4a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 3rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .5rem; }
p, ul { max-width: 44rem; margin: .25rem 0 .75rem; }
ul { padding-left: 1.2rem; }
li { margin: .4rem 0; }
.soft, small { color: var(--soft); font-size: .85rem; }
figure { margin: 2rem 0; }
img { display: block; width: 100%; height: auto; }
pre { background: var(--block); border-radius: 6px; padding: .75rem 1rem; overflow-x: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .35rem .7rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--rule);
  white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; position: sticky; left: 0; background: var(--page); }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
th small, td small { display: block; font-weight: 400; font-size: .8rem; }
.better { color: var(--better); font-weight: 600; }
.worse { color: var(--worse); font-weight: 600; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .2rem 1.2rem; font-size: .92rem;
  margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; min-width: 0; font-variant-numeric: tabular-nums; }
@media (max-width: 40rem) { h1 { font-size: 1.25rem; } table { font-size: .85rem; } th, td { padding: .3rem .45rem; } }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 0 2.5rem; }
"""

_READING = (
    "<b>Loss</b> is the mean negative log-likelihood of the held-out tokens in nats. <b>bpb</b> is the same sum in "
    "bits, divided by the bytes of the text, so it compares across vocabularies. Lower is better in both.",
    "<b>Δ</b> is an arm minus <i>plain</i>, the same model without memory; negative is better. Its 95&nbsp;% interval "
    "comes from a paired bootstrap: whole validation documents{drawn} are drawn again, and both arms are judged on the "
    "same draw. It is coloured where it excludes zero.",
    "<b>By seen count</b>: every predicted token is filed under how often the two (bigram) or three (trigram) tokens "
    "just before it stood together in the text that the run had trained on. A memory of n-grams should help most where "
    "the n-gram was seen; help under <i>never</i> came some other way.",
    "<b>In the figure</b> a line is the mean over seeds and a thin line one seed. Lines are judged on the validation "
    "text or its first part, dots and tables on all of it.",
    "<b>Dense</b> parameters are all read at every token, <b>table</b> parameters only in the few rows that the last "
    "tokens address.",
)

_LIMITS = (
    "<b>Nothing about scale.</b> This is a small model, little text and a short run. Effects of this kind have shrunk "
    "or vanished in larger ones.",
    "<b>Not equal size.</b> Arms with a table hold more parameters and bytes than plain, and seconds differ between "
    "arms. What the same bytes or seconds would bring elsewhere is answered only where the table has such an arm.",
    "<b>Not all uncertainty.</b> {uncertain} Learning rates and other settings are those given below; whether an arm "
    "would do better with others is not shown.",
    "<b>Nothing outside this text.</b> Validation documents come from the same sources as the training text. Other "
    "text and downstream tasks were not measured.",
    "<b>No cause.</b> Rare and frequent n-grams differ in more than their counts: a gain by seen count hints at how "
    "the memory works and proves nothing.",
)


def write_html(report: Report, path: str | os.PathLike[str]) -> None:
    """Writes report.html: one file with style, figures and tables, no request to anywhere. Appears whole or not."""
    words = {"drawn": "", "uncertain": "With one seed, the interval knows nothing of the spread between seeds."}
    if _seeds(report) > 1:
        few = f"{_seeds(report)} seeds say little about the spread between seeds, so the interval is rather too narrow."
        words = {"drawn": " and seeds", "uncertain": few}
    title, main, *others = _escape(_title(report)), *(_html_table(table) for table in _tables(report))
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<p class="soft">engram {_escape(report["version"])} · {_escape(report["date"])}</p>
{main}
{_html_figure(report)}
{"".join(others)}
<h2>How to read this</h2>
{_html_list(text.format(**words) for text in _READING)}
<h2>What this does not show</h2>
{_html_list(text.format(**words) for text in _LIMITS)}
<h2>Make it again</h2>
<pre>{_escape(report["command"])}</pre>
<div class="facts">
<section><h2>Corpus</h2>{_html_facts(_corpus_facts(report["corpus"]))}</section>
<section><h2>Machine</h2>{_html_facts(report["machine"])}</section>
<section><h2>Settings</h2>{_html_facts(report["settings"])}</section>
</div>
</body>
</html>
"""
    _write(path, page.encode())


def _escape(value: object) -> str:
    return html.escape(str(value))


def _html_cell(cell: Cell, tag: str) -> str:
    note = f"<small>{_escape(cell.note)}</small>" if cell.note else ""
    text = f'<span class="{cell.tone}">{_escape(cell.text)}</span>' if cell.tone else _escape(cell.text)
    return f"<{tag}>{text}{note}</{tag.split()[0]}>"


def _html_table(table: Table) -> str:
    head = "".join(_html_cell(cell, 'th scope="col"') for cell in table.head)
    rows = [
        _html_cell(first, 'th scope="row"') + "".join(_html_cell(cell, "td") for cell in rest)
        for first, *rest in table.rows
    ]
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f"""<h2>{_escape(table.title)}</h2>
<p class="soft">{_escape(table.caption)}</p>
<div class="scroll"><table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table></div>
"""


def _html_figure(report: Report) -> str:
    """One picture for each of light, dark, wide and narrow: the browser takes the one that fits."""
    image = {
        (dark, narrow): f"data:image/png;base64,{base64.b64encode(_figure(report, dark, narrow)).decode()}"
        for dark in (False, True)
        for narrow in (False, True)
    }
    dark, narrow = "(prefers-color-scheme: dark)", "(max-width: 40rem)"
    return f"""<figure><picture>
<source media="{dark} and {narrow}" srcset="{image[True, True]}">
<source media="{dark}" srcset="{image[True, False]}">
<source media="{narrow}" srcset="{image[False, True]}">
<img src="{image[False, False]}" alt="Validation loss against training tokens for each arm, and the gain over plain
by how often training saw the last n-gram. The tables hold the same numbers.">
</picture></figure>
"""


def _html_list(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"


def _html_facts(facts: Mapping[str, object]) -> str:
    pairs = (f"<dt>{_escape(name.replace('_', ' '))}</dt><dd>{_escape(value)}</dd>" for name, value in facts.items())
    return f"<dl>{''.join(pairs)}</dl>"


def _corpus_facts(corpus: Report) -> dict[str, object]:
    shown = {name: f"{value:,}" if isinstance(value, int) else value for name, value in corpus.items()}
    overlap = f"{100 * shown.pop('overlap_13gram'):.2f} % of the validation text's are in the training text"
    return {**shown, "13-grams": overlap}


def _write(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes the whole file or leaves what was there: a full disk or a kill never shows half a report."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
