"""Draw docs/*.svg, the pictures of the page of concepts. All numbers in them come from calls of the library.

python docs/drawings.py
"""

from __future__ import annotations

from pathlib import Path

from drawn_numbers import CLASSES, CONFIG, TEXT, addresses, gate_numbers, mixes, recall_numbers, row_sizes, state_sizes
from svg import Drawing

from engram import HashLayout, HostTable

DOCS = Path(__file__).parent
SEES = {2: "two", 3: "three"}  # order -> colour
STRIP, LEFT = 292, 110  # width of the picture of a table, and where it begins


def strip(drawing: Drawing, y: float, height: float, layout: HashLayout, rows: list[int]) -> list[float]:
    """The table as a strip of its rows; returns the middles of `rows`."""
    width = STRIP / layout.rows[1]
    for row in range(layout.rows[1]):
        kind = f"cell {'two' if rows.index(row) < 2 else 'three'}" if row in rows else "cell"
        drawing.cell(LEFT + row * width, y, width, height, kind)
    return [LEFT + (row + 0.5) * width for row in rows]


def draw_lookup() -> str:
    """A token id on its way to its rows, into the residual stream, and back."""
    ids, compressed, rows, layout = addresses()
    text = " ".join(TEXT)
    drawing = Drawing(
        "lookup",
        728,
        f"The text {text}: the last token's bigram and trigram are hashed to rows {rows}. The rows are read, pass the "
        "gate and are added to the residual stream; gradients go back to these rows alone.",
    )
    for head, y, *lines in (
        ("token ids", 24),
        ("token map", 90, "case folds"),
        ("n-grams", 156, "of the last"),
        ("hash", 222, "mod prime", "+ offset"),
        ("table", 314, f"{layout.rows[1]} rows"),
        ("recall", 396, "side by side: e"),
        ("fusion", 462, "value and key"),
        ("gate", 528),
        ("stream", 616, "of the layer"),
    ):
        drawing.stage(y, str(head), *map(str, lines))
    for x, token, number, small in zip((110, 211, 312), TEXT, ids, compressed, strict=True):
        drawing.box(x, 4, 96, f"{token} {number}")
        drawing.down(x + 48, 36, x + 48, 68)
        drawing.box(x, 70, 96, str(small))
    columns = (110, 184, 262, 336)
    for x, n in ((110, 2), (262, 3)):
        drawing.box(x, 136, 140, " ".join(map(str, compressed[-n:])), f"box {SEES[n]}")
        drawing.down(354, 102, x + 70, 134)
    at = strip(drawing, 294, 40, layout, rows)
    primes = [p for order in layout.moduli[1] for p in order]
    for column, (x, row) in enumerate(zip(columns, rows, strict=True)):
        n = 2 if column < 2 else 3
        drawing.box(x, 202, 66, f"row {row}", f"box {SEES[n]}")
        drawing.down(180 if n == 2 else 332, 168, x + 33, 200)
        drawing.text(x + 33, 250, f"mod {primes[column]}", "small")
        drawing.down(x + 33, 256, at[column], 292)
        drawing.down(at[column], 336, x + 33, 374)
    _below_recall(drawing)
    return drawing.svg()


def _below_recall(drawing: Drawing) -> None:
    """Fusion, gate, stream, and the way back."""
    drawing.box(110, 376, 140, "bigram rows", "box two")
    drawing.box(262, 376, 140, "trigram rows", "box three")
    drawing.box(110, 442, 140, "value = W_V e")
    drawing.box(262, 442, 140, "key = W_K e")
    for x in (180, 332):
        drawing.down(x, 408, x, 440)
    drawing.box(280, 508, 104, "× gate", "box gate")
    drawing.down(332, 474, 332, 506)
    drawing.path("M180 474 C180 524 220 524 278 524")
    drawing.box(110, 596, 120, "hidden state")
    drawing.path("M170 594 C170 550 230 532 278 530")
    drawing.path("M232 612 H304")
    drawing.box(306, 596, 52, "+")
    drawing.down(332, 540, 332, 594)
    drawing.down(332, 628, 332, 664)
    drawing.box(230, 666, 172, "attention, feed-forward")
    drawing.path("M360 612 H420 V314 H406", "back")
    drawing.text(433, 470, "gradients of these rows alone", "turned")


def draw_addresses() -> str:
    """N-grams of each position, and the arithmetic from one n-gram to its row ids."""
    ids, compressed, rows, layout = addresses()
    drawing = Drawing(
        "addresses",
        478,
        f"Token ids {ids} become compressed ids {compressed}, then bigrams and trigrams. Products with multipliers are "
        f"combined by exclusive or; the remainder by each head's prime plus an offset gives rows {rows}.",
    )
    for head, y, *lines in (
        ("token id", 24),
        ("compressed", 72),
        ("bigram", 120, "order 2"),
        ("trigram", 170, "order 3"),
    ):
        drawing.stage(y, str(head), *map(str, lines))
    padded = [CLASSES[0], CLASSES[0], *compressed]  # pad_id 0 stands before the start
    for at, (x, token, number) in enumerate(zip((110, 212, 314), TEXT, ids, strict=True)):
        drawing.box(x, 4, 92, f"{token} {number}")
        drawing.down(x + 46, 36, x + 46, 50)
        drawing.box(x, 52, 92, str(compressed[at]))
        for y, n in ((102, 2), (152, 3)):
            drawing.box(
                x, y, 92, " ".join(map(str, padded[at + 3 - n : at + 3])), f"box {SEES[n]}" if at == 2 else "box"
            )
    drawing.text(4, 222, "The last position in numbers: compressed id × multiplier, newest first", "note")
    heads = len(layout.moduli[1][0])
    for x, n in ((4, 2), (226, 3)):
        mix = mixes(compressed, layout)[n]
        drawing.box(x, 234, 210, "", f"box {SEES[n]}", 100)
        for line, multiplier in enumerate(layout.multipliers[1][:n]):
            y = 254 + 20 * line
            drawing.text(x + 28, y, f"{compressed[-1 - line]} ×", "number")
            drawing.text(x + 202, y, f"{multiplier}", "number")
        drawing.path(f"M{x + 8} {302} H{x + 202}", "line")
        drawing.text(x + 28, 320, "xor", "number")
        drawing.text(x + 202, 320, str(mix), "number")
        for head in range(heads):
            column = (n - 2) * heads + head
            prime, offset = layout.moduli[1][n - 2][head], layout.offsets[1][column]
            if mix % prime + offset != rows[column]:
                raise AssertionError(f"column {column}: {mix} mod {prime} + {offset} is not row {rows[column]}")
            left = x + 108 * head
            drawing.down(x + 105, 336, left + 51, 368)
            drawing.text(left + 51, 384, f"mod {prime} = {mix % prime}", "small")
            drawing.text(left + 51, 402, f"+ offset {offset}", "small")
            drawing.box(left, 412, 102, f"row {rows[column]}", f"box {SEES[n]}")
            drawing.text(left + 51, 462, f"head {head + 1} of order {n}", "small")
    return drawing.svg()


def draw_tables() -> str:
    """A table, one of its rows in each codec, and the state of its row optimizer."""
    _, _, rows, layout = addresses()
    sizes, states = row_sizes(), state_sizes()
    table = HostTable(layout.rows[1], CONFIG.head_dim)
    drawing = Drawing(
        "tables",
        498,
        f"A table of {table.rows} rows in host memory or in a file. One row takes "
        f"{', '.join(f'{size} bytes as {name}' for name, size in sizes)}. Optimizer state lies beside the table.",
    )
    drawing.box(LEFT - 6, 26, STRIP + 12, "", "lane", 76)
    drawing.text(LEFT + STRIP / 2, 16, "host memory, or the mapped file layer-1.rows", "small")
    drawing.stage(62, "table", f"{table.rows} × {table.dim} values", f"{table.nbytes:,} bytes")
    at = strip(drawing, 42, 34, layout, rows)
    width = STRIP / table.rows
    for n, primes in zip((2, 3), layout.moduli[1], strict=True):
        for head, prime in enumerate(primes):
            left = LEFT + layout.offsets[1][(n - 2) * len(primes) + head] * width
            drawing.path(f"M{left + 1:.1f} 82 H{left + prime * width - 1:.1f}", "line")
            drawing.text(left + prime * width / 2, 96, f"{n}-gram {head + 1}", "small")
    drawing.stage(156, "one row", f"{table.dim} values", "as bytes")
    drawing.down(at[0], 103, LEFT + 70, 138)
    scale = 200 / max(size for _, size in [*sizes, *states])
    for line, (name, size) in enumerate(sizes):
        y = 142 + 26 * line
        drawing.text(LEFT, y + 13, name, "left")
        drawing.cell(LEFT + 62, y, size * scale, 18, "cell two")
        drawing.text(LEFT + 68 + size * scale, y + 13, str(size), "left")
    below = 142 + 26 * len(sizes)
    drawing.stage(below + 40, "beside it", "optimizer state", "per row, bytes")
    for line, (name, size) in enumerate(states):
        y = below + 26 + 26 * line
        drawing.text(LEFT, y + 13, name, "left")
        drawing.cell(LEFT + 62, y, size * scale, 18, "cell three")
        drawing.text(LEFT + 68 + size * scale, y + 13, str(size), "left")
    drawing.stage(below + 132, "accelerator")
    drawing.box(LEFT, below + 112, STRIP, "only the rows of the batch, as float32")
    return drawing.svg()


def signed(number: float) -> str:
    return f"{number:.2f}".replace("-", "−")


def draw_fusion() -> str:
    """Query from the stream, key and value from the rows, gate, short convolution."""
    known = gate_numbers()
    taps = CONFIG.conv_kernel
    drawing = Drawing(
        "fusion",
        560,
        "The rows give a value and a key, the stream gives a query. The product of query and key is "
        f"{signed(known['score'])}; its signed root through a sigmoid is the gate, {known['gate']:.2f}. Gate times "
        "value passes a short convolution and is added to the stream.",
    )
    drawing.box(4, 4, 130, "stream h (16)")
    drawing.box(208, 4, 228, f"e: rows of the position ({known['e']})", "box two")
    drawing.box(34, 74, 122, "query = norm(h)")
    drawing.box(168, 74, 144, "key = norm(W_K e)")
    drawing.box(324, 74, 112, "value = W_V e")
    drawing.down(69, 36, 95, 72)
    drawing.down(260, 36, 240, 72)
    drawing.down(383, 36, 383, 72)
    drawing.box(60, 144, 210, f"query · key / √16 = {signed(known['score'])}")
    drawing.down(95, 106, 130, 142)
    drawing.down(240, 106, 200, 142)
    drawing.down(165, 176, 165, 212)
    drawing.box(60, 214, 210, f"signed root = {signed(known['root'])}")
    drawing.down(165, 246, 165, 282)
    drawing.box(60, 284, 210, f"gate = sigmoid = {known['gate']:.2f}", "box gate")
    drawing.box(330, 284, 106, "gate × value", "box gate")
    drawing.path("M272 300 H328")
    drawing.down(383, 106, 383, 282)
    drawing.box(270, 354, 166, "SiLU(short convolution)")
    drawing.text(353, 404, f"{taps} taps, {known['lag']} positions apart", "small")
    drawing.down(383, 316, 383, 352)
    drawing.path("M340 316 C320 330 250 330 250 352 V440", "line")
    drawing.path("M250 440 V452")
    drawing.path("M353 412 V432 C353 444 300 440 268 454")
    drawing.box(224, 454, 52, "+")
    drawing.box(84, 454, 52, "+")
    drawing.path("M222 470 H138")
    drawing.path("M18 38 V440 C18 466 40 470 82 470")
    drawing.down(110, 486, 110, 518)
    drawing.box(24, 520, 172, "attention, feed-forward")
    return drawing.svg()


def draw_recall() -> str:
    """The two sides of a step: what the model does, and what other threads do meanwhile."""
    known = recall_numbers()
    drawing = Drawing(
        "recall",
        606,
        f"Time runs downwards. The model calls recall for {known['ids']} ids and goes on; other threads hash the ids "
        f"and fetch {known['reads']} rows for each layer. A memory layer waits only if its rows have not arrived. "
        f"After the backward pass the optimizer changes {known['touched']} rows.",
    )
    left, right, width = 4, 246, 190
    drawing.text(left + width / 2, 16, "the model", "small")
    drawing.text(right + width / 2, 16, "other threads, host memory", "small")
    drawing.box(right - 8, 26, width + 12, "", "lane", 232)
    steps = ("recall(ids)", "block 0", "memory[1]: fuse", "blocks 1 and 2", "memory[3]: fuse", "block 3, loss")
    for line, text in enumerate(steps):
        y = 34 + 64 * line
        drawing.box(left, y, width, text, "box gate" if "fuse" in text else "box")
        if line:
            drawing.down(left + 95, y - 32, left + 95, y - 2)
    drawing.box(right, 34, width, f"hash {known['ids']} ids")
    drawing.box(right, 110, width, f"layer 1: gather {known['reads']} rows", "box two")
    drawing.box(right, 210, width, f"layer 3: gather {known['reads']} rows", "box three")
    drawing.path(f"M{left + width + 2} 50 H{right - 2}")
    drawing.down(right + 95, 66, right + 95, 108)
    drawing.down(right + 95, 142, right + 95, 208)
    drawing.path(f"M{right - 2} 132 C{right - 24} 136 {right - 24} 174 {left + width + 2} 176")
    drawing.path(f"M{right - 2} 232 C{right - 24} 236 {right - 24} 300 {left + width + 2} 304")
    drawing.box(left, 426, width, "loss.backward()")
    drawing.down(left + 95, 386, left + 95, 424)
    drawing.box(right, 426, width, f"{2 * known['reads']} row gradients")
    drawing.path(f"M{left + width + 2} 442 H{right - 2}", "back")
    drawing.box(left, 498, width, "optimizer.step()")
    drawing.down(left + 95, 458, left + 95, 496)
    drawing.box(right, 498, width, "those of equal rows summed")
    drawing.path(f"M{right + 95} 458 V496", "back")
    drawing.path(f"M{left + width + 2} 514 H{right - 2}")
    drawing.box(right, 570, width, f"{known['touched']} different rows updated")
    drawing.path(f"M{right + 95} 530 V568", "back")
    return drawing.svg()


PICTURES = {
    "lookup": draw_lookup,
    "addresses": draw_addresses,
    "tables": draw_tables,
    "fusion": draw_fusion,
    "recall": draw_recall,
}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (DOCS / f"{name}.svg").write_text(draw())
