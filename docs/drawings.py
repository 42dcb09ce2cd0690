"""Draw docs/lookup.svg: the way of one token id to its rows and back. All numbers come from the library.

python docs/drawings.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from engram import HashLayout, NgramHasher, TokenMap

FILE = Path(__file__).parent / "lookup.svg"
TOKENS = ("The", "the", "cat", "Cat", "sat", "on", "mat")
CLASSES = (0, 0, 1, 1, 2, 3, 4)  # tokens that differ in case alone share a compressed id
TEXT = ("The", "cat", "sat")
WIDTH, MIDDLE = 600, 260


def facts() -> tuple[list[int], list[int], list[int], HashLayout]:
    """Token ids, compressed ids and row ids of the last position of TEXT, and the layout that gives them."""
    token_map = TokenMap(np.array(CLASSES))
    layout = HashLayout.build(token_map.size, layers=(1,), orders=(2, 3), heads=2, rows_per_head=10, pad_id=0)
    ids = [TOKENS.index(token) for token in TEXT]
    rows = NgramHasher(layout, token_map)(np.array([ids]))[1][0, -1]
    return ids, [CLASSES[i] for i in ids], rows.tolist(), layout


class Drawing:
    """Collects shapes. Colours are those of the page: text is currentColor, two accents suit light and dark."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def box(self, x: float, y: float, width: float, text: str, kind: str = "box", height: float = 34) -> None:
        self.parts.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="5"/>')
        if text:
            self.text(x + width / 2, y + height / 2 + 5, text)

    def text(self, x: float, y: float, text: str, kind: str = "") -> None:
        self.parts.append(f'<text{f" class={chr(34)}{kind}{chr(34)}" * bool(kind)} x="{x}" y="{y}">{text}</text>')

    def path(self, points: str, kind: str = "arrow") -> None:
        self.parts.append(f'<path class="{kind}" d="{points}"/>')

    def note(self, y: float, head: str, *lines: str) -> None:
        self.text(20, y, head, "head")
        for number, line in enumerate(lines):
            self.text(20, y + 17 * (number + 1), line, "note")


def draw() -> str:
    """The SVG as text."""
    ids, compressed, rows, layout = facts()
    drawing = Drawing()
    xs = [190, 290, 390]
    drawing.note(40, "token ids")
    for x, token, number in zip(xs, TEXT, ids, strict=True):
        drawing.box(x, 20, 80, f"{token} {number}")
        drawing.path(f"M{x + 40} 56 V84")
    drawing.note(104, "token map", "case, accents and", "spaces fold together")
    for x, number in zip(xs, compressed, strict=True):
        drawing.box(x, 86, 80, str(number))
    drawing.note(184, "n-grams", "of the last token")
    for x, n in ((190, 2), (350, 3)):
        drawing.box(x, 166, 120, " ".join(map(str, compressed[-n:])), "box two" if n == 2 else "box three")
        drawing.path(f"M430 122 C430 146 {x + 60} 136 {x + 60} 164")
    drawing.note(256, "hash", "mix mod prime", "+ offset = row id")
    columns = [190, 262, 350, 422]
    primes = [p for order in layout.moduli[1] for p in order]
    for column, (x, row) in enumerate(zip(columns, rows, strict=True)):
        kind = "box two" if column < 2 else "box three"
        drawing.box(x, 240, 60, f"row {row}", kind)
        drawing.text(x + 30, 292, f"mod {primes[column]}", "small")
        start = 250 if column < 2 else 410
        drawing.path(f"M{start} 202 C{start} 222 {x + 30} 216 {x + 30} 238")
    total = layout.rows[1]
    drawing.note(340, "table", f"{total} rows in host", "memory or a file")
    for row in range(total):
        kind = "cell"
        if row in rows:
            kind = "cell two" if rows.index(row) < 2 else "cell three"
        drawing.parts.append(
            f'<rect class="{kind}" x="{190 + row * 292 / total:.1f}" y="330" width="{292 / total:.1f}" height="40"/>'
        )
    for column, (x, row) in enumerate(zip(columns, rows, strict=True)):
        at = 190 + (row + 0.5) * 292 / total
        drawing.path(f"M{x + 30} 298 C{x + 30} 316 {at:.1f} 310 {at:.1f} 328")
        drawing.path(f"M{at:.1f} 372 C{at:.1f} 392 {x + 30} 386 {x + 30} 408", "arrow" if column < 4 else "")
    drawing.note(428, "recall", "rows side by side", "make e")
    drawing.box(190, 410, 132, "bigram rows", "box two")
    drawing.box(350, 410, 132, "trigram rows", "box three")
    drawing.path("M256 446 C256 462 260 458 260 474")
    drawing.path("M416 446 C416 462 410 458 410 474")
    drawing.note(494, "fusion", "the gate compares the", "key with the hidden state")
    drawing.box(200, 476, 120, "value = W e")
    drawing.box(350, 476, 120, "key = W e")
    drawing.path("M410 512 V540")
    drawing.path("M260 512 C260 530 360 556 376 560")
    drawing.box(378, 542, 92, "× gate", "box gate")
    drawing.box(190, 606, 110, "hidden", "box")
    drawing.path("M245 604 C245 574 330 568 376 566")
    drawing.path("M302 623 H396")
    drawing.path("M424 578 V604")
    drawing.box(398, 606, 52, "+", "box")
    drawing.note(624, "residual stream", "before the block")
    drawing.path("M424 642 V672")
    drawing.text(424, 690, "attention, feed-forward", "small")
    drawing.path("M456 623 H550 V350 H486", "back")
    drawing.text(566, 500, "gradients: only these rows change", "turned")
    style = (
        ".lookup text{font:15px sans-serif;fill:currentColor;text-anchor:middle}"
        ".lookup .head{font-weight:600;text-anchor:start}.lookup .note{font-size:13px;text-anchor:start;opacity:.8}"
        ".lookup .small{font-size:13px;opacity:.8}"
        ".lookup .turned{font-size:13px;transform:rotate(90deg);transform-box:fill-box;transform-origin:center}"
        ".lookup rect{fill:none;stroke:currentColor;stroke-opacity:.6}"
        ".lookup .cell{stroke-opacity:.3}"
        ".lookup .two{fill:#3b82f6;fill-opacity:.35}.lookup .three{fill:#f59e0b;fill-opacity:.4}"
        ".lookup .gate{fill:#10b981;fill-opacity:.3}"
        ".lookup path{fill:none;stroke:currentColor;stroke-width:1.5;marker-end:url(#lookup-tip)}"
        ".lookup .back{stroke:#ef4444;stroke-dasharray:6 4;marker-end:url(#lookup-back)}"
    )
    described = f"The text {' '.join(TEXT)}: the last token's bigram and trigram are hashed to rows {rows}."
    head = (
        f'<svg class="lookup" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} 700" role="img" '
        f'aria-label="{described}" style="width:100%;max-width:{WIDTH}px">'
    )
    tips = "".join(
        f'<marker id="lookup-{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto">'
        f'<path d="M0 0L8 4L0 8z" style="fill:{colour};stroke:none;marker-end:none"/></marker>'
        for name, colour in (("tip", "currentColor"), ("back", "#ef4444"))
    )
    return f"{head}\n<style>{style}</style>\n<defs>{tips}</defs>\n" + "\n".join(drawing.parts) + "\n</svg>\n"


if __name__ == "__main__":
    FILE.write_text(draw())
