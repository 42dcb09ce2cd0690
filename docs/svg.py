"""Shapes of the drawings. Colours are those of the page: text is currentColor, and the accents suit light and dark.

A drawing is 440 wide, so that its words can be read on a phone.
"""

from __future__ import annotations

WIDTH = 440
STYLE = (
    ".drawing text{font:14px sans-serif;fill:currentColor;text-anchor:middle}"
    ".drawing .head{font-weight:600;text-anchor:start}"
    ".drawing .left{font-size:12.5px;text-anchor:start}"
    ".drawing .note{font-size:12.5px;text-anchor:start;opacity:.8}"
    ".drawing .small{font-size:12px;opacity:.8}"
    ".drawing .number{font:11px monospace;text-anchor:end}"
    ".drawing .turned{font-size:12.5px;transform:rotate(90deg);transform-box:fill-box;transform-origin:center}"
    ".drawing rect{fill:none;stroke:currentColor;stroke-opacity:.6}"
    ".drawing .cell{stroke-opacity:.25}"
    ".drawing .lane{stroke-dasharray:3 4;stroke-opacity:.35}"
    ".drawing .two{fill:#3b82f6;fill-opacity:.35}.drawing .three{fill:#f59e0b;fill-opacity:.4}"
    ".drawing .gate{fill:#10b981;fill-opacity:.3}"
    ".drawing .line{fill:none;stroke:currentColor;stroke-opacity:.6}"
    ".drawing .arrow{fill:none;stroke:currentColor;stroke-width:1.5;marker-end:url(#tip)}"
    ".drawing .back{fill:none;stroke:#ef4444;stroke-width:1.5;stroke-dasharray:6 4;marker-end:url(#tip-back)}"
)


class Drawing:
    """Shapes that are written as one SVG, which a page includes as it is.

    Args:
        name: of its markers, which share a page with those of other drawings.
        height: of the drawing.
        description: what is on it, for readers who do not see it.
    """

    def __init__(self, name: str, height: int, description: str) -> None:
        self.name, self.height, self.description = name, height, description
        self.parts: list[str] = []

    def box(self, x: float, y: float, width: float, text: str = "", kind: str = "box", height: float = 32) -> None:
        self.parts.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5"/>')
        if text:
            self.text(x + width / 2, y + height / 2 + 5, text)

    def cell(self, x: float, y: float, width: float, height: float, kind: str = "cell") -> None:
        self.parts.append(f'<rect class="{kind}" x="{x:.1f}" y="{y:g}" width="{width:.1f}" height="{height:g}"/>')

    def text(self, x: float, y: float, text: str, kind: str = "") -> None:
        self.parts.append(f'<text{f" class={chr(34)}{kind}{chr(34)}" * bool(kind)} x="{x:g}" y="{y:g}">{text}</text>')

    def path(self, points: str, kind: str = "arrow") -> None:
        self.parts.append(f'<path class="{kind}" d="{points}"/>')

    def down(self, x: float, y: float, to_x: float, to_y: float) -> None:
        """A curved arrow that leaves and arrives upright."""
        middle = (y + to_y) / 2
        straight = f"M{x:g} {y:g} V{to_y:g}"
        self.path(straight if x == to_x else f"M{x:g} {y:g} C{x:g} {middle:g} {to_x:g} {middle:g} {to_x:g} {to_y:g}")

    def stage(self, y: float, head: str, *lines: str) -> None:
        """The name of a step at the left edge, and words below it."""
        self.text(4, y, head, "head")
        for number, line in enumerate(lines):
            self.text(4, y + 16 * (number + 1), line, "note")

    def svg(self) -> str:
        tips = "".join(
            f'<marker id="{self.name}-{tip}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0L8 4L0 8z" style="fill:{colour}"/></marker>'
            for tip, colour in (("tip", "currentColor"), ("tip-back", "#ef4444"))
        )
        style = STYLE.replace(".drawing", f".{self.name}").replace("#tip", f"#{self.name}-tip")
        return (
            f'<svg class="drawing {self.name}" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" '
            f'role="img" aria-label="{self.description}">\n<style>{style}</style>\n<defs>{tips}</defs>\n'
            + "\n".join(self.parts)
            + "\n</svg>\n"
        )
