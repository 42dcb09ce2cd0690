"""Print explanations, plans and inspected files as tables in a terminal."""

from __future__ import annotations

import shutil
import sys
from typing import Any, TextIO

import numpy as np
from rich import box
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text

from engram.inspect.explain import Explanation, LayerExplanation
from engram.inspect.plan import Plan
from engram.storage.untrusted import printable

_BEGIN = "⊢"
_PLAIN: Any = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "show_edge": False}  # two characters between columns


def print_explanation(explanation: Explanation, console: Console | None = None) -> None:
    """Print one table per layer: a line per token and order, and per residual stream if there are several."""
    console = console or Console()
    for number, (layer, explained) in enumerate(explanation.layers.items()):
        if number:
            console.print()
        console.print(_layer_table(explanation, layer, explained, with_loss=number == 0, width=console.width))
    console.print()
    notes = ["added: norm of what the memory added, in percent of the hidden state's"]
    notes += [f"rows: one per head, counted from its first row; {_BEGIN}: the n-gram is cut here; --json: everything"]
    if explanation.loss_off is not None:
        notes += [
            "next: nats of the next token; off: how many more (+) with the memory off at this one position",
            "The model was trained with its memory, so this overstates what a memory is worth.",
        ]
    console.print(Text("\n".join(notes), style="dim"))


def _layer_table(
    explanation: Explanation, layer: int, explained: LayerExplanation, with_loss: bool, width: int
) -> Table:
    share = 100 * explained.added / np.maximum(explained.hidden, 1e-30)
    columns: dict[str, list[str]] = {"token": [visible(token) for token in explanation.tokens]}
    if with_loss:
        columns["next"] = [_number(x, ".2f") for x in explanation.loss]
        if explanation.loss_off is not None:
            columns["off"] = [_number(x, "+.2f") for x in explanation.loss_off - explanation.loss]
    columns["gate"] = ["\n".join(f"{gate:.2f}" for gate in gates) for gates in explained.gate]
    columns["added"] = [
        "\n".join(f"{percent:.0f}%" if percent >= 100 else f"{percent:.1f}%" for percent in percents)
        for percents in share
    ]
    columns["n-gram"], columns["rows"] = [], []
    for t, dead in enumerate(explanation.dead):
        marks = [
            _BEGIN if n < order else "" for n, order in zip(explanation.lengths[t], explanation.orders, strict=True)
        ]
        ngrams = [mark + visible(text) for mark, text in zip(marks, explanation.ngrams[t], strict=True)]
        columns["n-gram"].append("no text" if dead else "\n".join(ngrams))
        columns["rows"].append(
            "" if dead else "\n".join(" ".join(map(str, rows)) for rows in explained.rows_in_head[t])
        )
    widths = {
        name: max(cell_len(line) for cell in [name, *cells] for line in cell.splitlines())
        for name, cells in columns.items()
    }
    widths["token"] = min(widths["token"], 14)
    room = width - 2 * len(widths) - sum(w for name, w in widths.items() if name not in ("n-gram", "rows"))
    widths["n-gram"] = min(widths["n-gram"], max(room // 2, room - widths["rows"], 8))
    widths["rows"] = min(widths["rows"], max(room - widths["n-gram"], 8))
    table = Table(title=f"layer {layer}", title_justify="left", **_PLAIN)
    for name in columns:
        justify = "left" if name in ("token", "n-gram", "rows") else "right"
        table.add_column(name, justify=justify, width=widths[name], no_wrap=True, overflow="ellipsis")  # type: ignore[arg-type]
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*(Text(cell) for cell in cells))  # Text: a token like [b] is not markup
    return table


def print_plan(name: str, planned: Plan, console: Console | None = None) -> None:
    """Print the rows of a plan, their bytes in every format, stored and trained, and how many n-grams share a row."""
    console = console or Console()
    rows = sum(planned.rows.values())
    each = [f"layer {layer}: {count:,}" for layer, count in planned.rows.items()]
    for i, (layer, count) in enumerate(planned.addressed.items()):
        each[i] += "" if count == planned.rows[layer] else f" ({count:,} of them addressed, the rest is padding)"
    console.print(
        Text(
            f"{printable(name)}: {rows:,} rows x {planned.row_values} = {rows * planned.row_values:,} table parameters"
        )
    )
    console.print(Text(f"{', '.join(each)}; {planned.rows_per_token} rows read per token"))
    if planned.dense is None:
        console.print(Text("dense parameters: not known without --hidden-size (and --streams)"))
    else:
        total = sum(planned.dense.values())
        console.print(Text(f"dense parameters: {total:,}, {size(16 * total)} with gradients and AdamW's moments"))

    console.print()
    table = Table(title="to serve and to train", title_justify="left", **_PLAIN)
    table.add_column("rows stored as", no_wrap=True)
    for heading in ("per row", "tables", "per token", "per step", "fits in"):
        table.add_column(heading, justify="right", no_wrap=True)
    for stored_as, stored in planned.storage.items():
        reads = size(stored.token), size(stored.step)
        table.add_row(stored_as, f"{stored.row_bytes:,} B", size(stored.total), *reads, planned.fits(stored.total))
        if stored_as in ("float32", "bfloat16"):
            for optimizer, state in planned.state.items():
                total_bytes = stored.total + state
                table.add_row(f"  with {optimizer} state", "", size(total_bytes), "", "", planned.fits(total_bytes))
    console.print(table)

    console.print()
    title = "distinct n-grams that share rows, if the hash is as good as chance"
    table = Table(title=title, title_justify="left", **_PLAIN)
    for heading in ("order", "n-grams", "rows of a head", "used", "share in one", "in every head"):
        table.add_column(heading, justify="right")
    for row in planned.collisions:
        shares = (
            f"{100 * x:.1f}%" if x >= 1e-3 else f"{100 * x:.1g}%" for x in (row.used, row.shared, row.shared_in_all)
        )
        table.add_row(str(row.order), f"{row.ngrams:,}", f"{row.rows:,.0f}", *shares)
    console.print(table)
    console.print()
    machine = [size(planned.machine[key]) for key in ("ram_free", "ram", "disk_free")]
    console.print(Text("this machine: {} of {} RAM free, {} of disk".format(*machine), style="dim"))
    console.print(
        Text(f"a step is {planned.batch} x {planned.context:,} tokens, rows read twice counted twice", style="dim")
    )


def print_inspection(inspected: dict[str, Any], file: TextIO | None = None) -> None:
    """Print what engram.inspect_file returned, one line per tensor. In a terminal, names are cut in the middle to fit.

    The text is plain: rich would take a minute for 100,000 tensors.
    """
    file = file or sys.stdout
    headings = ("tensor", "dtype", "shape", "bytes", "file")
    cells = [
        [t["name"], t["dtype"], " x ".join(f"{n:,}" for n in t["shape"]), f"{t['bytes']:,}", t["file"]]
        for t in inspected["tensors"]
    ]
    cells = [[printable(cell).replace("\n", "⏎").replace("\t", "⇥") for cell in row] for row in cells]
    widths = [max(cell_len(cell) for cell in column) for column in zip(headings, *cells, strict=True)]
    if file.isatty():
        room = shutil.get_terminal_size().columns - sum(widths[1:4]) - 2 * (len(widths) - 1)
        widths[4] = min(widths[4], max(room // 3, 12))
        widths[0] = min(widths[0], max(room - widths[4], 16))
    print(printable(f"{inspected['path']}: {inspected['kind']}"), file=file)
    for row in [list(headings), *cells] if cells else []:
        line = [_fit(cell, width, right=i == 3) for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
        print("  ".join(line).rstrip(), file=file)
    if inspected["steps"]:
        print(f"checkpoints: {', '.join(map(str, inspected['steps']))}; the tensors are those of the last", file=file)
    for layer, table in inspected["tables"].items():
        total = f"{table['bytes']:,} bytes ({table['bytes'] / 2**30:.2f} GiB)"
        print(printable(f"layer {layer}: {table['rows']:,} rows x {table['dim']}, {table['form']}, {total}"), file=file)
    if inspected["problem"]:
        print(printable(f"not a memory that can be converted: {inspected['problem']}"), file=file)


def _fit(text: str, width: int, right: bool = False) -> str:
    """Return a cell of a table, padded with spaces or cut in the middle to this width."""
    if (length := cell_len(text)) > width:
        half = (width - 1) // 2
        text = set_cell_size(text, width - 1 - half) + "…" + text[-half:]
        return set_cell_size(text, width)
    return " " * (width - length) + text if right else text + " " * (width - length)


def size(count: int) -> str:
    """Format bytes in the largest binary unit that gives a number of at least 1."""
    number, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if number < 1024:
            break
        number, unit = number / 1024, larger
    return f"{count:,} B" if unit == "B" else f"{number:,.2f} {unit}"


def visible(text: str) -> str:
    """Return a token's text in one line: spaces, line ends and tabs as visible signs, the rest as `printable` does."""
    for hidden, sign in ((" ", "␣"), ("\n", "⏎"), ("\r", "␍"), ("\t", "⇥")):
        text = text.replace(hidden, sign)
    return printable(text)


def _number(x: float, how: str) -> str:
    return "" if np.isnan(x) else format(float(x), how)
