"""Tables of a report of `engram ablate`, printed in the terminal; figure.py and html_report.py use the same numbers.

The input is the dict that is also written as report.json. Losses are nats per token; a difference is an arm minus
the arm "plain" on the same validation tokens, so negative is better; intervals are 95 %.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from engram.lm.units import format_bytes, format_count

if TYPE_CHECKING:
    from rich.console import Console

Report = Mapping[str, Any]

BUCKETS = {"0": "never", "1": "once", "2-9": "2–9×", "10+": "10+×"}
NO_VALUE = "–"


class Cell(NamedTuple):
    text: str
    note: str = ""  # second line, smaller
    tone: str = ""  # "better" or "worse" if an interval excludes zero


class Table(NamedTuple):
    title: str
    caption: str
    head: list[Cell]
    rows: list[list[Cell]]


def arms_of(report: Report) -> list[str]:
    return [entry["arm"] for entry in report["summary"]]


def runs_of(report: Report, arm: str) -> list[Report]:
    return [run for run in report["runs"] if run["arm"] == arm]


def seeds_of(report: Report) -> int:
    return max(entry["seeds"] for entry in report["summary"])


def title_of(report: Report) -> str:
    arms, seeds = len(report["summary"]), seeds_of(report)
    tokens = format_count(max(run["tokens"] for run in report["runs"]))
    what = f"{arms} arm{'s' * (arms > 1)} × {seeds} seed{'s' * (seeds > 1)}"
    each = " each" * (len(report["runs"]) > 1)
    return f"Validation loss on {report['corpus']['name']}: {what}, {tokens} training tokens{each}"


def signed(number: float) -> str:
    return f"{number:+.3f}".replace("-", "−")


def percent(share: float) -> str:
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
    return Cell(signed(interval["mean"]), f"{signed(interval['low'])} to {signed(interval['high'])}", tone)


def seen_of(runs: Sequence[Report], order: str) -> dict[str, tuple[float, float | None]]:
    """Return per bucket the share of validation tokens (0 to 1) and their mean loss, None if the bucket is empty."""
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
    # Results come before costs: a phone shows the first columns.
    head = [Cell("arm"), Cell("loss"), Cell("Δ loss", "95 % interval"), Cell("bpb"), Cell("Δ bpb", "95 % interval")]
    head += [Cell(name) for name in ("dense", "table", "tokens", "sec", "tok/s")]
    rows = []
    for entry in report["summary"]:
        runs = runs_of(report, entry["arm"])
        loss = [_over_seeds(runs, "loss"), _difference(entry["difference"])]
        bpb = [_over_seeds(runs, "bpb"), _difference(entry["difference_bpb"])]
        parameters = runs[0]["parameters"]
        counts = [Cell(format_count(count)) for count in (parameters["dense"], parameters["table"], runs[0]["tokens"])]
        timing = [Cell(_mean(runs, "seconds")), Cell(_mean(runs, "tokens_per_second"))]
        rows.append([Cell(entry["arm"]), *loss, *bpb, *counts, *timing])
    caption = "Loss: nats per token. bpb: bits per byte. Δ: the arm minus plain. Dense, table: parameters."
    if seeds_of(report) > 1:
        caption += f" Means over {seeds_of(report)} seeds, ± their standard deviation."
    return Table("What each arm reached", caption, head, rows)


def _seen_table(report: Report, order: str) -> Table:
    shares = seen_of(report["runs"], order)
    head = [Cell("arm")] + [Cell(name, percent(shares[key][0])) for key, name in BUCKETS.items()]
    plain = seen_of(runs_of(report, "plain"), order)
    rows = []
    for arm in arms_of(report):
        row = [Cell(arm)]
        for bucket, (_, loss) in seen_of(runs_of(report, arm), order).items():
            base = plain[bucket][1]
            gain = signed(loss - base) if loss is not None and base is not None else NO_VALUE
            row.append(Cell(NO_VALUE if loss is None else f"{loss:.3f}", "" if arm == "plain" else gain))
        rows.append(row)
    caption = "Nats per token; below it the difference to plain. % is the share of validation tokens."
    return Table(f"Loss by how often training saw the last {order}", caption, head, rows)


def _bytes_table(report: Report) -> Table:
    head = [Cell(name) for name in ("arm", "dense", "table", "optimizer", "total")]
    rows = []
    for arm in arms_of(report):
        nbytes = runs_of(report, arm)[0]["bytes"]
        sizes = [nbytes["dense"], nbytes["table"], nbytes["optimizer"]]
        rows.append([Cell(arm)] + [Cell(format_bytes(size)) for size in [*sizes, sum(sizes)]])
    return Table(
        "Memory while training",
        "Weights, rows and the optimizer's state for both; without activations and gradients.",
        head,
        rows,
    )


def tables_of(report: Report) -> list[Table]:
    return [_main_table(report), _seen_table(report, "bigram"), _seen_table(report, "trigram"), _bytes_table(report)]


def print_report(report: Report, console: Console | None = None) -> None:
    """Print the report's tables: arms with differences to plain, loss by seen count, memory."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = console or Console()
    roomy = console.width >= 110
    styles = {"better": "green", "worse": "red", "": ""}
    console.print(Text(title_of(report), style="bold"), Text(report["command"], style="dim"), sep="\n")
    for table in tables_of(report):
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
