"""Pages that are made from other files of the repository when the site is built: results, notes and the API reference.

Nothing on them is typed: questions, readings, figures, tables and verdicts are those of experiments/<question>/.
"""

from __future__ import annotations

import inspect
import os
import re
import shutil
from pathlib import Path

from docstrings import escaped

DOCS = Path(__file__).parent
ROOT = DOCS.parent
LAB = ROOT / "experiments"
MADE = ("results", "notes", "project", "api")  # folders of generated pages, which git ignores
CLAIMS = "claims"  # the heading of a question's table of claims has this word
NOTES = ("claims_in_short", "claims", "equations", "dialects", "sinkhorn", "decisions", "log", "log_full")
# Every public name has one place in the reference; test_docs.py fails if one is missing.
API = {  # page -> what one does with its names, and the names in the order in which they are used
    "memory": ("Build a memory and train it", ["EngramConfig", "EngramMemory", "build_optimizer", "HostTable"]),
    "transformers": (
        "Attach it to a model of transformers",
        ["attach", "detach", "from_pretrained", "load_pretrained", "MemoryCallback", "offload"],
    ),
    "language_models": (
        "Train and run the small transformer",
        ["TransformerConfig", "Transformer", "train", "load_run", "evaluate", "generate", "ablate"],
    ),
    "tools": (
        "Look inside, check, convert, measure",
        ["explain", "plan", "verify", "inspect_file", "open_tables", "convert", "bench"],
    ),
    "counts": ("Count a text instead of training on it", ["CountMemory"]),
    "addresses": ("Addresses alone", ["TokenMap", "HashLayout", "NgramHasher"]),
}


def questions() -> list[Path]:
    """Folders of the lab that hold a question with runs: a README, results and a list of runs."""
    return sorted(file.parent for file in LAB.glob("*/configs.py") if (file.parent / "README.md").is_file())


def scripts() -> list[Path]:
    """Folders of the lab with a runner of their own and results."""
    return sorted(file.parent for file in LAB.glob("scripts/*/tables.md"))


def sections(text: str) -> list[tuple[str, str]]:
    """[(heading, body)] of a Markdown text at its headings of any level; the first has the heading ""."""
    parts = re.split(r"(?m)^(#{1,6} .+)$", text)
    return [("", parts[0]), *((h.lstrip("# "), body) for h, body in zip(parts[1::2], parts[2::2], strict=True))]


def linked(text: str, source: Path, page: Path) -> str:
    """Markdown whose relative links, written for `source`, suit `page`; a target outside the site becomes its path."""

    def link(match: re.Match[str]) -> str:
        picture, words, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        bare = target.partition("#")[0]
        file = (source.parent / bare).resolve()
        if picture:
            return f"![{words}]({os.path.relpath(file, page.parent)})"
        question = file.parent if file.name in ("README.md", "tables.md") else file
        if file == ROOT / "experiments" / "README.md":
            return f"[{words}]({os.path.relpath(DOCS / 'results' / 'index.md', page.parent)})"
        if question in [*questions(), *scripts()]:
            return f"[{words}]({os.path.relpath(DOCS / 'results' / f'{question.name}.md', page.parent)})"
        if file.parent == ROOT / "paper_notes" and file.stem in NOTES and file.is_file():
            return f"[{words}]({os.path.relpath(DOCS / 'notes' / file.name, page.parent)})"
        if file.is_relative_to(DOCS) and file.suffix == ".md" and file.is_file():
            return f"[{words}]({os.path.relpath(file, page.parent)})"
        path = os.path.relpath(file, ROOT)
        return f"`{path}`" if words.strip("`./") in path else f"{words} (`{path}`)"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", link, text)


def site_links(text: str, page: Path) -> str:
    """Point a page's links to files of the repository, which work in a clone, at the pages made of these files."""
    outside = r"\[[^\]]*\]\((?:\.\./)+(?:experiments|paper_notes)/[^)\s]+\.md\)"
    return re.sub(outside, lambda match: linked(match[0], page, page), text)


def answer(name: str, reading: str) -> str:
    """Return the bold sentence of a question's reading, which answers the question.

    Raises:
        ValueError: the reading has no bold sentence, or several.
    """
    bold = re.findall(r"\*\*(.+?)\*\*", " ".join(reading.split()))
    if len(bold) != 1 or not bold[0].endswith("."):
        raise ValueError(
            f"experiments/{name}/README.md: its reading (the text before the next heading) has {len(bold)} bold "
            f"sentences: set the one that answers the question in **bold**"
        )
    return bold[0]


def _without_marks(text: str) -> str:
    return re.sub(r"<!-- (table|end) -->\n?", "", text)


def _flat(text: str) -> str:
    """Headings as bold lines: long tables stay out of the page's list of contents."""
    return re.sub(r"(?m)^#{1,6} (.+)$", r"**\1**", text)


def question_page(home: Path, page: Path) -> str:
    """Markdown of one question: question, answer, reading, figure, claims, what it does not show, all tables."""
    text = (home / "README.md").read_text()
    marked = re.search(r"<!-- table -->\n(.*?)<!-- end -->", text, re.S)
    tables = home / "tables.md"
    generated = tables.read_text() if tables.is_file() else marked[1] if marked else ""
    if marked:
        text = text.replace(marked[0], "")
    parts = sections(text)
    title, reading = parts[1]
    reading = re.sub(r"(?m)^Tables: \[tables.md\].*\n", "", reading)
    commands = "\n".join(re.findall(r"(?m)^    python .+$", reading))
    reading = re.sub(r"`report` writes what is between the\s+marks, `plot` draws `figure\.png`\.\s*", "", reading)
    reading = re.sub(r"(?m)^    python .+\n?", "", reading)
    claims = next((body for heading, body in sections(generated) if CLAIMS in heading), "")
    rest = "\n".join(f"## {heading}\n{body}" for heading, body in parts[2:])
    made = [f"# {title}", "", f"**Answer.** {answer(home.name, reading)}", "", reading.strip(), ""]
    if claims:
        made += ["## What the runs say about the claims", "", claims.strip(), ""]
    made += [rest.strip(), ""]
    others = re.sub(r"\A# .*\n", "", generated).replace(claims, "")
    others = re.sub(rf"(?m)^#+ .*{CLAIMS}.*$|^Written by `python.*$", "", others)
    if others.strip():
        made += ["## All tables", "", "<details><summary>Show the tables</summary>", "", _flat(others).strip(), ""]
        made += ["</details>", ""]
    if commands:
        made += ["## Run it again", "", "```console", *(line.strip() for line in commands.splitlines()), "```", ""]
    return linked(_without_marks("\n".join(made)), home / "README.md", page)


def results_index() -> str:
    """Markdown: every question with its answer."""
    lines = [
        "# Results",
        "",
        "Each page is made from the runs of one question when this site is built: no figure on it is typed. An answer",
        "is about small models and a few megabytes of text, and about no other size. Each page says what it does not",
        "show. [All claims](../notes/claims.md) are listed with their sources and commands, and those that matter",
        "most in [one table](../notes/claims_in_short.md).",
        "",
        "| question | answer |",
        "|---|---|",
    ]
    for home in [*questions(), *scripts()]:
        page = (DOCS / "results" / f"{home.name}.md").read_text()
        title = page.partition("\n")[0].lstrip("# ")
        (first,) = re.findall(r"(?m)^\*\*Answer\.\*\* (.+)$", page)
        lines.append(f"| [{title}]({home.name}.md) | {first} |")
    contents = "\n".join(home.name for home in [*questions(), *scripts()])
    return "\n".join([*lines, "", "```{toctree}", ":hidden:", "", contents, "```", ""])


_INHERITED = "   :inherited-members: Module, ABC, TrainerCallback"  # ours, but not those of other libraries


def api_page(title: str, names: list[str]) -> str:
    """reStructuredText of some public names, from their docstrings."""
    import engram

    lines = [title, "=" * len(title), ""]
    for name in filter(engram.__all__.__contains__, names):
        if isinstance(getattr(engram, name), type):
            lines += [name, "-" * len(name), "", f".. autoclass:: engram.{name}", "   :members:", _INHERITED, ""]
        else:
            lines += [name, "-" * len(name), "", f".. autofunction:: engram.{name}", ""]
    return "\n".join(lines)


def api_index() -> str:
    """reStructuredText: every public name by task, with the first sentence of its docstring."""
    import engram

    lines = [
        "API reference",
        "=============",
        "",
        ".. toctree::",
        "   :hidden:",
        "",
        *(f"   {page}" for page in API),
        "",
    ]
    for page, (title, names) in API.items():
        lines += [f":doc:`{title} <{page}>`", "", ".. list-table::", "   :widths: 25 75", "   :width: 100%", ""]
        for name in filter(engram.__all__.__contains__, names):
            known = getattr(engram, name)
            words = " ".join((inspect.getdoc(known) or "").partition("\n\n")[0].split())
            first = re.split(r"(?<=[.:]) (?=[A-Z])", words)[0]
            kind = "class" if isinstance(known, type) else "func"
            lines += [f"   * - :py:{kind}:`~engram.{name}`", f"     - {escaped(first)}"]
        lines.append("")
    return "\n".join(lines)


def write_all() -> None:
    """Write all generated pages. A page that did not change keeps its date, so that it is not built again."""
    pages: dict[Path, str] = {}
    for home in [*questions(), *scripts()]:
        page = DOCS / "results" / f"{home.name}.md"
        pages[page] = question_page(home, page)
    for name in NOTES:
        source, page = ROOT / "paper_notes" / f"{name}.md", DOCS / "notes" / f"{name}.md"
        if source.is_file():
            pages[page] = linked(_without_marks(source.read_text()), source, page)
    listed = "\n".join(page.stem for page in pages if page.parent.name == "notes")
    for name in ("CHANGELOG", "CONTRIBUTING"):
        source, page = ROOT / f"{name}.md", DOCS / "project" / f"{name.lower()}.md"
        pages[page] = linked(source.read_text(), source, page)
    pages[DOCS / "notes" / "index.md"] = (
        f"# Notes\n\nEquations and their tests, the released dialects side by side, decisions with what was measured, "
        f"and the log of what was tried.\n\n```{{toctree}}\n{listed}\n```\n"
    )
    for name, (title, names) in API.items():
        pages[DOCS / "api" / f"{name}.rst"] = api_page(title, names)
    pages[DOCS / "api" / "index.rst"] = api_index()
    for folder in MADE:
        for old in (DOCS / folder).glob("*"):
            if old not in pages and old.name != "index.md":
                old.unlink() if old.is_file() else shutil.rmtree(old)
    for page, text in pages.items():
        _write(page, text)
    _write(DOCS / "results" / "index.md", results_index())


def _write(page: Path, text: str) -> None:
    page.parent.mkdir(exist_ok=True)
    if not page.is_file() or page.read_text() != text:
        page.write_text(text)
