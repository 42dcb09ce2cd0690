"""Code blocks of Markdown files by their marker, which is the comment on the line before (<!-- example: NAME -->), and
messages that a page quotes.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "guides").glob("*.md")])
_FENCE = re.compile(r"(?:<!-- (example|console): (\S+) -->\n)?```(\w+)\n(.*?)```", re.S)


def blocks(page: Path) -> list[tuple[str, str, str, str]]:
    """Return (marker, name, language, text) of each block; marker and name are "" if a block has no marker."""
    matches = _FENCE.findall(page.read_text())
    return [(marker, name, language, text) for marker, name, language, text in matches]


def examples(page: Path, language: str = "python") -> dict[str, list[str]]:
    """Return the marked blocks of one language by name. Blocks of one name are parts of one program."""
    result: dict[str, list[str]] = {}
    for marker, name, kind, text in blocks(page):
        if marker and kind == language:
            result.setdefault(name, []).append(text)
    return result


def literals(source: str) -> list[str]:
    """String literals of Python code, without docstrings. Each value in an f-string becomes \\0."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    texts = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            texts.append("".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and not {id(node)} & (docstrings | parts):
            texts.append(node.value)
    return texts


def quotes_of_no_literal(page: str, texts: list[str]) -> list[str]:
    """["line N: message"] for each message in a page's quotation marks that no literal can print.

    "..." in a quote stands for at least one value, with or without words around it.
    """
    lost = []
    for number, line in enumerate(page.splitlines(), 1):
        for quote in re.findall("“([^”]+)”", line if line.startswith("| ") else ""):
            words = re.compile(r"[^\0]*\0.*".join(map(re.escape, quote.split("..."))), re.S)
            if not any(words.search(text) for text in texts):
                lost.append(f"line {number}: {quote}")
    return lost
