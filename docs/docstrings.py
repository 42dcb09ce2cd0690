"""Docstrings as reStructuredText. They are plain text with sections (Args:, Raises:, Example:), written to be read in
the source. Nothing in them may be taken for markup, so all of it is escaped here except `code`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from textwrap import dedent, indent

SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises|Warns|Source|Note|Example|Examples):(:?)\s*(.*)")
ITEM = re.compile(r"((?:\*{0,2}\w[\w.\[\]]*)(?:, \*{0,2}\w[\w.\[\]]*)*):\s+(.*)", re.S)


def escaped(text: str) -> str:
    """Text in which `code` is the only markup."""
    parts = re.split(r"`+([^`]+)`+", text)
    for number, part in enumerate(parts):
        # An escaped space ends the markup of code where a letter follows.
        parts[number] = f"``{part}``\\ " if number % 2 else re.sub(r"([\\*`|_<>])", r"\\\1", part)
    return "".join(parts).strip()


def _joined(lines: list[str]) -> str:
    return escaped(" ".join(line.strip() for line in lines))


def _items(lines: list[str]) -> list[str]:
    """Entries of a section: a line at its own indentation begins one, deeper lines continue it."""
    entries: list[list[str]] = []
    for line in dedent("\n".join(lines)).splitlines():
        if not line.strip():
            continue
        if line.startswith(" ") and entries:
            entries[-1].append(line)
        elif entries and not ITEM.match(line):
            entries[-1].append(line)
        else:
            entries.append([line])
    result = []
    for entry in entries:
        text = " ".join(part.strip() for part in entry)
        match = ITEM.match(text)
        result.append(f"* **{escaped(match[1])}**: {escaped(match[2])}" if match else f"* {escaped(text)}")
    return result


def _literal(lines: list[str], language: str = "text") -> list[str]:
    code = indent(dedent("\n".join(lines)).strip("\n"), "   ")
    return [f".. code-block:: {language}", "", *code.splitlines(), ""]


def _blocks(lines: list[str]) -> list[list[str]]:
    blocks: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    return [block for block in blocks if block]


def to_rst(lines: Iterable[str]) -> list[str]:
    """reStructuredText lines of a docstring whose common indentation was taken away."""
    lines, result, at = list(lines), [], 0
    while at < len(lines):
        section = SECTION.fullmatch(lines[at].rstrip())
        start = at
        if section:
            at += 1
            while at < len(lines) and (not lines[at].strip() or lines[at].startswith(" ")):
                at += 1
            body = lines[start + 1 : at]
            name, _, rest = section.groups()
            if name.startswith("Example"):
                result += [f"**{name}**", "", *_literal(body or [rest], "python")]
            elif body and not rest:
                result += [f"**{'Arguments' if name == 'Args' else name}**", "", *_items(body), ""]
            else:
                result += [f"**{name}**: {_joined([rest, *body])}", ""]
            continue
        while at < len(lines) and not (SECTION.fullmatch(lines[at].rstrip()) and at > start):
            at += 1
        for block in _blocks(lines[start:at]):
            laid_out = any(line.startswith(" ") for line in block) or any(
                re.match(r"\S+\s{3,}\S|[\w\[\]]+:\s{2,}", line) for line in block
            )
            result += _literal(block) if laid_out else [_joined(block), ""]
    return result
