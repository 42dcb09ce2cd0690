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
    "a thing that asks, wants or forgets": re.compile(
        r"\b(?:asks|wants|forgets|forgot|speaks|hangs on|falls? silent|ha(?:s|ve) no say|"
        r"(?:says?|knows?) (?:nothing|so|otherwise))\b"
    ),
    "a word that the glossary drops": re.compile(
        r"\brun numbers?\b|\b[Ss](?:etting|ize)s? [ST]\b|\bhash famil(?:y|ies)\b"
    ),
}
OPENING = re.compile(r"(?:Of|Whether|Which|Where|True if|False if) ")
VERBS = frozenset(
    """Adds Asks Attaches Builds Chooses Clears Closes Collects Compares Computes Continues Converts Copies
    Creates Decodes Deletes Describes Divides Drops Encodes Ends Evaluates Expects Fetches Fills Finds Flushes Follows
    Forgets Freezes Frees Gathers Gets Gives Goes Grows Hands Has Holds Ignores Imports Initialises Inserts Installs Is
    Joins Keeps Leaves Lets Lists Looks Makes Maps Matches Measures Merges Moves Multiplies
    Opens Parses Passes Picks Prepares Prints Puts Raises Reads Recomputes Refuses Registers Releases Removes
    Renames Replaces Rereads Restores Returns Rotates Saves Says Selects Sends Serves Sets Shows
    Skips Splits Stands Starts Stays Stops Stores Subtracts Syncs Takes Tells Ties Times Trains Truncates Tries
    Turns Undoes Unmaps Uses Waits Walks Warns Works Wraps Writes Yields""".split()
)
NOUNS = frozenset(
    "Calls Checks Counts Draws Edits Hashes Loads Locks Marks Names Notes Numbers Points Recalls Results Runs Samples "
    "Scores Shares Tests Updates".split()
)
VERB = re.compile(r"\w+ (?:an?|the|all|each|every|its|one|this|what|which|only)\b")  # else these words are nouns
RECORD = ROOT / "paper_notes" / "log_full.md"  # written as things happened, and not rewritten


def hits(path: Path) -> list[str]:
    """Return "line: what" for each forbidden phrase: in the docstrings, comments and strings of a Python file, in the
    openings of its docstrings and the names of its tests, or in the text of any other file."""
    text = path.read_text()
    parts = python_text(text) if path.suffix == ".py" else list(enumerate(text.splitlines(), 1))
    found = [f"{line}: {name}" for line, part in parts for name, phrase in PHRASES.items() if phrase.search(part)]
    return found + (openings(text) if path.suffix == ".py" else [])


def python_text(source: str) -> list[tuple[int, str]]:
    """Return (line, text) of the comments and strings, and of the names of tests with blanks for underscores."""
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    parts = [(token.start[0], " ".join(token.string.split())) for token in tokens if token.type in kinds]
    names = [token for token in tokens if token.type == tokenize.NAME and token.string.startswith("test_")]
    return parts + [(token.start[0], token.string.replace("_", " ")) for token in names]


def openings(source: str) -> list[str]:
    """Return "line: what" for each docstring that does not begin with an imperative or a noun phrase."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    result = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, kinds) or not (docstring := ast.get_docstring(node)):
            continue
        first = docstring.split()[0].strip(".,:;")
        third_person = VERB.match(docstring) if first in NOUNS else first in VERBS
        if third_person or OPENING.match(docstring):
            result.append(f"{getattr(node, 'lineno', 1)}: a docstring that begins with {first}")
    return result


@cache
def files() -> tuple[Path, ...]:
    rooms = ("engram", "tests", "examples", "docs", "experiments")
    code = [path for room in rooms for ending in ("*.py", "*.c") for path in (ROOT / room).rglob(ending)]
    documents = [path for folder in (".", "docs", "paper_notes") for path in (ROOT / folder).glob("*.md")]
    documents += (ROOT / "experiments").rglob("*.md")
    documents += (ROOT / "docs" / "guides").glob("*.md")  # its other folders are made by `make docs` from other files
    return tuple(sorted({path for path in [*code, *documents] if path not in (Path(__file__), RECORD)}))


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
        ("# whoever wants rows\n# who wants them, nobody knows", 4),
        ('def f():\n    """Reads the rows."""', 1),
        ('class Kept:\n    """Keeps rows."""', 1),
        ('def f():\n    """Counts the rows of a table."""', 1),
        ('def f():\n    """Counts of rows, per table."""', 0),
        ('def f():\n    """Rows of a table, read once."""', 0),
        ('def f():\n    """Read the rows. Returns them as they are."""', 0),
        ('"""True if it fits."""\n# the file says nothing of them\n# a memory that speaks through the values', 3),
        ("# the layer hangs on the hash family of setting S", 2),
        ("def test_a_text_that_is_no_memory_is_refused(): ...", 1),
        ("def test_nobody_asks_for_rows(): ...", 2),
        ("def text_that_is_no_memory(): ...", 0),
        ("# there is no file of that name\n# there are no rows", 0),
        ("rows = no_memory  # the bytes of a row", 0),
    ],
)
def test_the_phrases_are_found_in_text_and_not_in_code(text, count, tmp_path):
    (tmp_path / "x.py").write_text(text)
    assert len(hits(tmp_path / "x.py")) == count
