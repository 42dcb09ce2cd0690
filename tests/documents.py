"""Code blocks of Markdown files by their marker, the comment on the line before: <!-- example: NAME -->."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "guides").glob("*.md")])
_FENCE = re.compile(r"(?:<!-- (example|console): (\S+) -->\n)?```(\w+)\n(.*?)```", re.S)


def blocks(page: Path) -> list[tuple[str, str, str, str]]:
    """(marker, name, language, text) of each block; marker and name are "" where there is none."""
    found = _FENCE.findall(page.read_text())
    return [(marker, name, language, text) for marker, name, language, text in found]


def examples(page: Path, language: str = "python") -> dict[str, list[str]]:
    """The marked blocks of one language by name. Blocks of one name follow each other in one program."""
    result: dict[str, list[str]] = {}
    for marker, name, kind, text in blocks(page):
        if marker and kind == language:
            result.setdefault(name, []).append(text)
    return result
