"""English in code and documents: phrases that CONTRIBUTING.md's style rules out, counted file by file."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
UNITS = "nats?|bits?|bytes?|rows?|tokens?|values?|seconds?|ms|us|ns|words?|MB|GB|MiB|GiB|µs"
PER = "token|byte|row|value|step|second|word|position|document|layer|head|gather|key|parameter|batch|sequence|page"
COMPARED = "different|longer|more|less|fewer|other|better|worse|faster|slower|larger|smaller|higher|lower"
PHRASES = {
    "'a' in place of 'per'": re.compile(rf"\b(?:{UNITS}) an? (?:{PER})\b"),
    "is no ...": re.compile(rf"(?<!there )(?<!There )\b(?:is|are|was|were) no (?!(?:{COMPARED})\b)[a-z]"),
    "whoever, who wants": re.compile(r"\b(?:[Ww]hoever|[Nn]obody|who wants?)\b"),
}
OPENING = re.compile(r"(?:Of|Whether) ")


def hits(path: Path) -> list[str]:
    """Return "line: what" for each forbidden phrase in the docstrings, comments and strings of a Python file, or in
    the text of a document."""
    text = path.read_text()
    parts = python_text(text) if path.suffix == ".py" else list(enumerate(text.splitlines(), 1))
    found = [f"{line}: {name}" for line, part in parts for name, phrase in PHRASES.items() if phrase.search(part)]
    if path.suffix == ".py":
        found += [f"{line}: a docstring that begins with Of or Whether" for line in elliptical(text)]
    return found


def python_text(source: str) -> list[tuple[int, str]]:
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [(token.start[0], " ".join(token.string.split())) for token in tokens if token.type in kinds]


def elliptical(source: str) -> list[int]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return [getattr(node, "lineno", 1) for node in nodes if OPENING.match(ast.get_docstring(node) or "")]


@cache
def files() -> tuple[Path, ...]:
    code = [*(ROOT / "engram").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    documents = [path for folder in (".", "docs", "paper_notes") for path in (ROOT / folder).glob("*.md")]
    documents += (ROOT / "docs").glob("*/*.md")
    return tuple(sorted({path for path in [*code, *documents] if path != Path(__file__)}))


def test_no_file_has_a_forbidden_phrase():
    bad = {str(path.relative_to(ROOT)): hits(path) for path in files()}
    assert {name: where for name, where in bad.items() if where} == {}


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ('"""Loss in nats a token."""', 1),
        ("# 4 bytes a row\nx = 1  # 4 bytes per row", 1),
        ('raise ValueError(f"{x} is no memory")', 1),
        ('"""The table is no longer used."""', 0),
        ('def f():\n    """Of the rows."""', 1),
        ('def f():\n    """Whether it fits."""', 1),
        ("# whoever wants rows\n# who wants them, nobody knows", 2),
        ("# there is no file of that name\n# there are no rows", 0),
        ("rows = no_memory  # the bytes of a row", 0),
    ],
)
def test_the_phrases_are_found_in_text_and_not_in_code(text, count, tmp_path):
    (tmp_path / "x.py").write_text(text)
    assert len(hits(tmp_path / "x.py")) == count
