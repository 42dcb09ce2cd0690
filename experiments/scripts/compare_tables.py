"""Compare every number of every generated table at two commits.

    python experiments/scripts/compare_tables.py BEFORE [AFTER]     # commits; AFTER: default the working tree

Cells are matched by question, table, row and column. Words may be changed between the commits (RENAMED, VERDICTS);
numbers may not. The exit status is 1 if a number changed, or if a table, row or column of BEFORE is missing that
DROPPED does not name.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
# (pattern, later wording), applied in this order.
RENAMED = (
    (r"\bS\b(?=$|[:,])", "small"),
    (r"\bT\b(?=$|[:,])", "tiny"),
    (r"\b(nats|bits|MFLOPs|bytes|rows|tokens|ms)( of loss)? an? (?=\w)", r"\1\2 per "),
    (r"\band doubling\b", "and per doubling"),
)
# (document, column) that was left out on purpose. The README's tokens/s depend on the load of one machine, and no
# other document quotes them; docs/report.json, which the table is made from, still has them.
DROPPED = (("README", "tokens/s"),)
# The table of claims was in the README and is now among the notes.
OTHERS = {
    "README.md": "README",
    "paper_notes/claims_in_short.md": "README",
    "paper_notes/claims.md": "claims",
}
NUMBER = re.compile(r"[-+−]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")
SKIPPED = ("claim", "what it says", "command", "source", "needs", "verdict", "its other tables")  # words, not numbers


def words(text: str) -> str:
    """Return the text with earlier words replaced by later ones."""
    for old, new in RENAMED:
        text = re.sub(old, new, text)
    return text.replace("*", "").strip()


def tables_in(text: str) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return (heading above it, column titles, rows) of each table of a Markdown text."""
    found, heading, lines = [], "", text.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("#"):
            heading = words(line.lstrip("# ")) if line.startswith("##") else ""  # titles may change
        if re.match(r"\|[-:| ]+\|$", line):
            body = []
            for row in lines[number + 1 :]:
                if not row.startswith("|"):
                    break
                body.append(_cells(row))
            found.append((heading, [words(cell) for cell in _cells(lines[number - 1])], body))
    return found


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def numbers(files: dict[str, str]) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Return {(document, table, row, column): its numbers}. Rows of claims are named by what was measured and on which
    runs, because the words of a claim may be reversed."""
    found: dict[tuple[str, ...], tuple[str, ...]] = {}
    for name, text in files.items():
        for heading, head, body in tables_in(text):
            is_claims = "what we measure" in head or "what was measured" in head
            if is_claims:
                heading = "claims"
            times: Counter[str] = Counter()
            for row in body:
                if is_claims:
                    named = ("what we measure", "what was measured", "our setting", "runs", "table")
                    label = " | ".join(words(cell) for title, cell in zip(head, row, strict=True) if title in named)
                else:
                    named = tuple(title for title in head if title in ("task", "arm", "table", "text", "rows per head"))
                    label = " | ".join(words(cell) for title, cell in zip(head, row, strict=True) if title in named)
                    label = label or words(row[0])
                times[label] += 1
                for column, cell in zip(head, row, strict=True):
                    if column in SKIPPED or (is_claims and column in named):
                        continue
                    key = (name, heading, " | ".join(head[:1]) if not is_claims else "", f"{label} #{times[label]}")
                    found[*key, column] = tuple(NUMBER.findall(cell))
    return found


def documents(commit: str) -> dict[str, str]:
    """Return {question, "claims" or "README": its Markdown} at a commit, or of the working tree for ""."""
    if commit:
        listed = _git("ls-tree", "-r", "--name-only", commit).splitlines()
    else:
        listed = [str(path.relative_to(ROOT)) for path in ROOT.glob("experiments/**/*.md")]
        listed += [*OTHERS]
    found: dict[str, str] = {}
    for path in listed:
        part = re.fullmatch(r"experiments/(?:scripts/)?(\w+)/(?:README|tables)\.md", path)
        name = part.group(1) if part else OTHERS.get(path)
        if name not in (None, "arms"):
            found[name] = (
                found.get(name, "") + "\n" + (_git("show", f"{commit}:{path}") if commit else (ROOT / path).read_text())
            )
    return found


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def main() -> int:
    before, after = (numbers(documents(commit)) for commit in (sys.argv[1], (sys.argv[2:] or [""])[0]))
    gone = [key for key in before if key not in after]
    missing = [key for key in gone if (key[0], key[-1]) not in DROPPED]
    changed = [key for key in before if key in after and before[key] != after[key]]
    for key in missing:
        print("missing:", *key, sep=" / ")
    for key in changed:
        print("changed:", *key, before[key], after[key], sep=" / ")
    count = sum(map(len, before.values()))
    print(
        f"{count:,} numbers in {len(before):,} cells of {len({key[:3] for key in before})} tables: "
        f"{len(changed)} cells changed, {len(missing)} are missing, {len(gone) - len(missing)} dropped on purpose, "
        f"{len(after.keys() - before.keys())} are new"
    )
    return bool(missing or changed)


if __name__ == "__main__":
    sys.exit(main())
