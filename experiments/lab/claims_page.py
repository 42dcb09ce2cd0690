"""The documents claims.md and claims_in_short.md, and the claims in each question's tables.md. All figures come from
results.jsonl."""

from __future__ import annotations

import math
from collections import Counter
from functools import lru_cache
from pathlib import Path

from engram.ablation.statistics import Interval
from engram.storage.files import write_whole
from experiments.lab.cell import HOME, SETTINGS, Table, names, questions
from experiments.lab.claims import OTHER_CPU, RULES, Claim, Finding, all_claims, verdict
from experiments.lab.measures import table
from experiments.lab.report import interval, write_between_marks

FILE = HOME.parent / "paper_notes" / "claims.md"
SHORT = HOME.parent / "paper_notes" / "claims_in_short.md"
CLOSE = "within what another CPU can move"
Findings = list[tuple[Claim, list[Finding]]]


def all_findings(home: Path = HOME, name: str = "") -> Findings:
    """Return every claim, or those of one question, with its findings. Raises what the questions' tables raise."""
    claims = [claim for claim in all_claims() if not name or claim.question == name]
    return [(claim, claim.figure(home / claim.question)) for claim in claims]


def answers(results: Findings, name: str) -> str:
    """Return Markdown: the findings of one question for its claims; "" if it has no claims."""
    lines = [
        (
            *(claim.words, claim.measure, _runs(finding), _figure(finding.value)),
            *(RULES[claim.rule].words, _verdict(claim, finding)),
        )
        for claim, findings in results
        if claim.question == name
        for finding in findings
    ]
    if not lines:
        return ""
    head = ("claim", "what we measure", "table", "figure with interval", "needs", "verdict")
    source = "Whose claims these are, and how a verdict follows: [claims.md](../../paper_notes/claims.md)."
    return f"### What it says about the claims\n\n{source}\n\n{table(head, lines, words=3)}"


def document(results: Findings) -> str:
    """Return claims.md as Markdown."""
    sides = "; ".join(f"*{name}*: {rule.words}" for name, rule in RULES.items())
    lines = [
        "# Claims",
        "",
        "Claims about conditional memory, and what the runs of this repository show. The strongest",
        "counter-results come first. *paper*: arXiv 2601.07372. *DeepSeek-V4.1-Flash*, *Qwen3.8-Flash-Next*: the",
        "models that shipped the idea later. *public reproductions*: what several small studies by others report,",
        "*sceptics*: objections of a reader, both in our words. Written by `python -m experiments report`.",
        "",
        "A verdict follows from the 95 % interval alone. A claim is supported if the whole interval is on the side",
        "that the claim needs, not supported if the whole interval is on the other, and open in between, with fewer",
        f"than two seeds, or without an interval. The sides are {sides}.",
        "All runs are of a few million parameters on a few megabytes of text: a verdict is of that size and no other.",
        "The sizes are small (4 layers, 3.3M tokens) and tiny (2 layers, 0.56M tokens): experiments/README.md.",
        "Experts hardly gain over the plain model with so little text: a lead over them means little.",
        "No interval includes the choice of learning rates on one seed: a difference below 0.02 nats can come from it.",
        f'No interval includes the machine either: "{CLOSE}" marks a verdict whose',
        "interval ends closer to the deciding bound than another CPU moved the loss of one run",
        f"({OTHER_CPU['nats']} nats per token, taken as {OTHER_CPU['bits']} bits per byte).",
        "Parts of the memory have grids of rates at tiny alone; at small the setting names the arm whose rates count.",
        "",
        "| source | claim | our setting | what we measure | figure with interval | needs | verdict | command |",
        "|---|---|---|---|---:|---|---|---|",
    ]
    for claim, findings in results:
        for finding in findings:
            cells = [_runs(finding), claim.measure, _figure(finding.value), claim.rule, _verdict(claim, finding)]
            lines.append(_line(claim, cells, command(claim, finding)))
        if not findings:
            lines.append(_line(claim, ["", claim.measure, "not run yet", claim.rule, ""], claim.command))
    return "\n".join(lines) + "\n"


def _verdict(claim: Claim, finding: Finding) -> str:
    return verdict(finding, claim.rule) + (f" ({CLOSE})" if claim.within_another_cpu(finding) else "")


def _figure(value: Interval) -> str:
    return interval(value) if math.isfinite(value.low) else f"{value.mean:+.4f}"


def command(claim: Claim, finding: Finding) -> str:
    """Return the command that makes the runs of a finding, with the size, text and device that are not the question's
    own."""
    where = finding.table
    if where is None or claim.question not in names() or where.size not in SETTINGS:
        return claim.command
    module = questions(claim.question)
    options = "" if where.size == module.SIZE else f" --size {where.size}"
    if where.text not in _texts(claim.question, where.size):
        options += f" --corpus {where.text}"
    return claim.command + options + ("" if where.device == "cpu" else f" --device {where.device}")


@lru_cache  # every finding needs it, and configs() reads the rates that were tuned
def _texts(question: str, size: str) -> frozenset[str]:
    """The texts that a question runs on."""
    return frozenset(run.setting.corpus for run in questions(question).configs(size))


def _line(claim: Claim, cells: list[str], how: str) -> str:
    return "| " + " | ".join([claim.source, claim.words, *cells, f"`{how}`"]) + " |"


def in_short(results: Findings) -> str:
    """Return Markdown: of each claim in short the finding with the most seeds (at small, then on the main text, if two
    have as many) and the verdicts on its other tables."""
    lines = [
        "| claim | what was measured | figure, 95 % interval | runs | needs | verdict | its other tables |",
        "|---|---|---:|---|---|---|---|",
    ]
    for claim, findings in sorted((pair for pair in results if pair[0].short), key=lambda pair: pair[0].short):
        needs = RULES[claim.rule].words
        if not findings:
            lines.append(f"| {claim.words} | {claim.measure} | not run yet | | {needs} | | |")
            continue
        first, *others = sorted(findings, key=_rank)
        counts = Counter(verdict(finding, claim.rule) for finding in others)
        cells = [
            *(claim.words, claim.measure, _figure(first.value), _runs(first), needs),
            f"**{verdict(first, claim.rule)}**",
            ", ".join(f"{kind} ({count})" for kind, count in counts.items()),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _rank(finding: Finding) -> tuple[int, str, bool]:
    where = finding.table or Table("", "", "")
    tables = [where, finding.last or where]
    return -finding.seeds, where.size, all(part.text != SETTINGS["tiny"].corpus for part in tables)


def _runs(finding: Finding) -> str:
    return f"{finding.caption}, {finding.seeds} seed{'s' if finding.seeds != 1 else ''}"


def write_claims(results: Findings, file: Path = FILE, short: Path = SHORT) -> None:
    """Write claims.md, complete or not at all, and the table of claims_in_short.md.

    Raises:
        ValueError: `short` is a file without the marks.
    """
    write_whole(file, document(results).encode())
    write_between_marks(short, in_short(results))
