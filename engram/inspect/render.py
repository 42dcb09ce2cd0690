"""What the inspect room found, as tables for a terminal."""

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


def print_explanation(found: Explanation, console: Console | None = None) -> None:
    """One table for each layer: a line for each token and order, and for each stream where there are several."""
    console = console or Console()
    for number, (layer, facts) in enumerate(found.layers.items()):
        if number:
            console.print()
        console.print(_layer_table(found, layer, facts, with_loss=number == 0, width=console.width))
    console.print()
    notes = ["added: norm of what the memory added, in percent of the hidden state's"]
    notes += [f"rows: one for each head, counted within it; {_BEGIN}: the n-gram is cut here; --json has all of it"]
    if found.loss_off is not None:
        notes += [
            "next: nats of the next token; off: how much more (+) it costs with the memory off at this one position",
            "The model was trained with its memory, so this overstates what a memory is worth.",
        ]
    console.print(Text("\n".join(notes), style="dim"))


def _layer_table(found: Explanation, layer: int, facts: LayerExplanation, with_loss: bool, width: int) -> Table:
    share = 100 * facts.added / np.maximum(facts.hidden, 1e-30)
    columns: dict[str, list[str]] = {"token": [visible(token) for token in found.tokens]}
    if with_loss:
        columns["next"] = [_number(x, ".2f") for x in found.loss]
        if found.loss_off is not None:
            columns["off"] = [_number(x, "+.2f") for x in found.loss_off - found.loss]
    columns["gate"] = ["\n".join(f"{gate:.2f}" for gate in gates) for gates in facts.gate]
    columns["added"] = [
        "\n".join(f"{percent:.0f}%" if percent >= 100 else f"{percent:.1f}%" for percent in percents)
        for percents in share
    ]
    columns["n-gram"], columns["rows"] = [], []
    for t, dead in enumerate(found.dead):
        marks = [_BEGIN if n < order else "" for n, order in zip(found.lengths[t], found.orders, strict=True)]
        ngrams = [mark + visible(text) for mark, text in zip(marks, found.ngrams[t], strict=True)]
        columns["n-gram"].append("no text" if dead else "\n".join(ngrams))
        columns["rows"].append("" if dead else "\n".join(" ".join(map(str, rows)) for rows in facts.rows_in_head[t]))
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


def print_plan(name: str, found: Plan, console: Console | None = None) -> None:
    """Rows, bytes of every way to store and to train them, and how many n-grams will share a row."""
    console = console or Console()
    rows = sum(found.rows.values())
    each = [f"layer {layer}: {count:,}" for layer, count in found.rows.items()]
    for i, (layer, count) in enumerate(found.addressed.items()):
        each[i] += "" if count == found.rows[layer] else f" ({count:,} of them addressed, the rest fills up)"
    console.print(
        Text(f"{printable(name)}: {rows:,} rows x {found.row_values} = {rows * found.row_values:,} table parameters")
    )
    console.print(Text(f"{', '.join(each)}; {found.rows_per_token} rows read per token"))
    if found.dense is None:
        console.print(Text("dense parameters: not known without --hidden-size (and --streams)"))
    else:
        total = sum(found.dense.values())
        console.print(Text(f"dense parameters: {total:,}, {size(16 * total)} with gradients and AdamW's moments"))

    console.print()
    table = Table(title="to serve and to train", title_justify="left", **_PLAIN)
    table.add_column("rows stored as", no_wrap=True)
    for heading in ("a row", "tables", "per token", "per step", "fits in"):
        table.add_column(heading, justify="right", no_wrap=True)
    for form, stored in found.storage.items():
        reads = size(stored.token), size(stored.step)
        table.add_row(form, f"{stored.row_bytes:,} B", size(stored.total), *reads, found.fits(stored.total))
        if form in ("float32", "bfloat16"):
            for optimiser, state in found.state.items():
                whole = stored.total + state
                table.add_row(f"  with {optimiser} state", "", size(whole), "", "", found.fits(whole))
    console.print(table)

    console.print()
    title = "distinct n-grams that share rows, if the hash is as good as chance"
    table = Table(title=title, title_justify="left", **_PLAIN)
    for heading in ("order", "n-grams", "rows of a head", "used", "share in one", "in every head"):
        table.add_column(heading, justify="right")
    for row in found.collisions:
        shares = (
            f"{100 * x:.1f}%" if x >= 1e-3 else f"{100 * x:.1g}%" for x in (row.used, row.shared, row.shared_in_all)
        )
        table.add_row(str(row.order), f"{row.ngrams:,}", f"{row.rows:,.0f}", *shares)
    console.print(table)
    console.print()
    machine = [size(found.machine[key]) for key in ("ram_free", "ram", "disk_free")]
    console.print(Text("here: {} of {} RAM to be had, {} of disk".format(*machine), style="dim"))
    console.print(
        Text(f"a step is {found.batch} x {found.context:,} tokens, rows read twice counted twice", style="dim")
    )


def print_inspection(found: dict[str, Any], file: TextIO | None = None) -> None:
    """Print what engram.integrations.formats.inspect found, a line per tensor, in plain text: rich would take a minute
    for 100,000 tensors. On a terminal, names are cut in the middle to fit its width; elsewhere nothing is cut.
    """
    file = file or sys.stdout
    headings = ("tensor", "dtype", "shape", "bytes", "file")
    cells = [
        [t["name"], t["dtype"], " x ".join(f"{n:,}" for n in t["shape"]), f"{t['bytes']:,}", t["file"]]
        for t in found["tensors"]
    ]
    cells = [[printable(cell).replace("\n", "⏎").replace("\t", "⇥") for cell in row] for row in cells]
    widths = [max(cell_len(cell) for cell in column) for column in zip(headings, *cells, strict=True)]
    if file.isatty():
        room = shutil.get_terminal_size().columns - sum(widths[1:4]) - 2 * (len(widths) - 1)
        widths[4] = min(widths[4], max(room // 3, 12))
        widths[0] = min(widths[0], max(room - widths[4], 16))
    print(printable(f"{found['path']}: {found['kind']}"), file=file)
    for row in [list(headings), *cells] if cells else []:
        line = [_fit(cell, width, right=i == 3) for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
        print("  ".join(line).rstrip(), file=file)
    if found["steps"]:
        print(f"checkpoints: {', '.join(map(str, found['steps']))}; the tensors are those of the last", file=file)
    for layer, facts in found["tables"].items():
        total = f"{facts['bytes']:,} bytes ({facts['bytes'] / 2**30:.2f} GiB)"
        print(printable(f"layer {layer}: {facts['rows']:,} rows x {facts['dim']}, {facts['form']}, {total}"), file=file)
    if found["problem"]:
        print(printable(f"not a memory that can be converted: {found['problem']}"), file=file)


def _fit(text: str, width: int, right: bool = False) -> str:
    """A cell of a table, filled with spaces, or cut in the middle."""
    if (length := cell_len(text)) > width:
        half = (width - 1) // 2
        text = set_cell_size(text, width - 1 - half) + "…" + text[-half:]
        return set_cell_size(text, width)
    return " " * (width - length) + text if right else text + " " * (width - length)


def size(count: int) -> str:
    """Bytes in the largest binary unit that leaves 1 or more before the point."""
    number, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if number < 1024:
            break
        number, unit = number / 1024, larger
    return f"{count:,} B" if unit == "B" else f"{number:,.2f} {unit}"


def visible(text: str) -> str:
    """A token's text in one line: spaces, ends of lines and tabs as visible signs, the rest as printable shows it."""
    for hidden, shown in ((" ", "␣"), ("\n", "⏎"), ("\r", "␍"), ("\t", "⇥")):
        text = text.replace(hidden, shown)
    return printable(text)


def _number(x: float, how: str) -> str:
    return "" if np.isnan(x) else format(float(x), how)
