"""Claims about the memory, what the runs show, and the rules that a verdict follows from.

Each question lists its claims in a claims.py of its own (CLAIMS); `all_claims` collects them. The document and the
table of claims in short are made in experiments.lab.claims_page.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engram.ablation.statistics import Interval, paired_interval
from experiments.lab.cell import HOME, Table
from experiments.lab.measures import measured
from experiments.lab.report import documents_of, rows_of, tables_of
from experiments.lab.results import Record, read_results

MARGIN = 0.005  # nats per token, or bits per byte, that count as no difference
# How far another CPU moved the loss of one run, by unit: nats per token as measured, and the same in bits per byte.
# With these texts and tokenizers 2.3 nats per token are one bit per byte.
OTHER_CPU = {"nats": 0.013, "bits": 0.006}
PAPER, V41, QWEN = "paper", "DeepSeek-V4.1-Flash", "Qwen3.8-Flash-Next"
OTHERS, SCEPTICS = "public reproductions", "sceptics"
SOURCES = (PAPER, V41, QWEN, OTHERS, SCEPTICS)


class Finding(NamedTuple):
    """The result of one table of runs, or of two tables of one question. value: with an infinite interval if the spread
    is unknown. last: the second table. note: what else tells it apart."""

    value: Interval
    seeds: int
    table: Table | None = None
    last: Table | None = None
    note: str = ""

    @property
    def caption(self) -> str:
        return " to ".join(str(table) for table in (self.table, self.last) if table is not None) + self.note


Figure = Callable[[Path], list[Finding]]


class Rule(NamedTuple):
    """The intervals that support a claim: those "below" or "above" a bound, or "near" 0, closer than the bound."""

    words: str
    side: str
    bound: float

    def distance(self, value: Interval) -> tuple[float, float]:
        """Return (how far inside the supporting side the interval lies, how far inside the other); below 0:
        not inside."""
        if self.side == "below":
            return self.bound - value.high, value.low - self.bound
        if self.side == "above":
            return value.low - self.bound, self.bound - value.high
        return min(value.low, -value.high) + self.bound, max(value.low, -value.high) - self.bound


RULES = {
    "below": Rule("below 0", "below", 0.0),
    "above": Rule("above 0", "above", 0.0),
    "near": Rule(f"within ±{MARGIN} of 0", "near", MARGIN),
    "above -0.03": Rule("above -0.03", "above", -0.03),
    "no worse": Rule(f"below +{MARGIN}", "below", MARGIN),
    "worse": Rule(f"above +{MARGIN}", "above", MARGIN),
}


def verdict(finding: Finding, rule: str) -> str:
    """Return "supported", "not supported" or "open": by the interval, and never from fewer than two seeds."""
    if finding.seeds < 2 or not all(map(math.isfinite, finding.value)):
        return "open"
    inside, outside = RULES[rule].distance(finding.value)
    return "supported" if inside > 0 else "not supported" if outside > 0 else "open"


@dataclass(frozen=True)
class Claim:
    """One claim, worded so that "supported" reads as it sounds.

    Attributes:
        source: one of SOURCES. words: the claim. measure: what is measured. rule: one of RULES.
        figure: folder of the question -> findings, [] before the runs. unit: "nats" or "bits" if it is a loss.
        pair: the two variants of a difference. short: its position in claims_in_short.md, 0 if it is not there.
        counter: it is one of the strongest counter-results, which come first.
        question: the folder, "scripts/codecs" of a script's; filled in by `all_claims`.
    """

    source: str
    words: str
    measure: str
    figure: Figure
    rule: str
    unit: str = ""
    pair: tuple[str, str] | None = None
    short: int = 0
    counter: bool = False
    question: str = ""

    @property
    def command(self) -> str:
        """The command that makes its runs."""
        if self.question.startswith("scripts/"):
            return f"python experiments/{self.question}/run.py"
        return f"python -m experiments run {self.question}"

    def within_another_cpu(self, finding: Finding) -> bool:
        """Return True if the verdict is decided by less than what another CPU moved the loss of one run by."""
        if self.unit not in OTHER_CPU or verdict(finding, self.rule) == "open":
            return False
        return max(RULES[self.rule].distance(finding.value)) < OTHER_CPU[self.unit]


def all_claims(home: Path = HOME) -> list[Claim]:
    """Return the claims of every folder with a claims.py: the strongest counter-results first, then by source."""
    files = [*home.glob("*/claims.py"), *home.glob("scripts/*/claims.py")]
    folders = sorted(file.parent.relative_to(home).as_posix() for file in files if file.parent.name != "lab")
    claims = [
        replace(claim, question=folder)
        for folder in folders
        for claim in importlib.import_module(f"experiments.{folder.replace('/', '.')}.claims").CLAIMS
    ]
    return sorted(claims, key=lambda c: (c.short, 0) if c.counter else (math.inf, SOURCES.index(c.source)))


def difference(
    ours: str, theirs: str, unit: str = "nats", remark: Callable[[Path, Table], str] | None = None
) -> Figure:
    """Return a figure: nats per token (bits per byte with unit="bits", which holds for any two tokenizers) of one
    variant minus another, in every table that has both. remark: a function of the folder and a table, whose text is
    added to the caption."""

    def figure(home: Path) -> list[Finding]:
        findings = []
        for table, runs in tables_of(read_results(home / "results.jsonl")).items():
            if ours in runs and theirs in runs:
                note = "" if remark is None else remark(home, table)
                findings += compared(home, table, runs, ours, theirs, unit, note)
        return findings

    return figure


def compared(
    home: Path,
    table: Table,
    runs: dict[str, list[Record]],
    ours: str,
    theirs: str,
    unit: str = "nats",
    note: str = "",
) -> list[Finding]:
    """Return one variant minus another in one table; [] without common seeds, or in nats with two tokenizers."""
    row = rows_of(home, {theirs: runs[theirs], ours: runs[ours]}, theirs)[1]
    value = row.bits if unit == "bits" else row.nats
    return [] if value is None else [Finding(value, len(row.paired), table, note=note)]


def loss(
    source: str, words: str, ours: str, theirs: str, rule: str, unit: str = "nats", remark: Any = None, **how: Any
) -> Claim:
    """Return a claim about the difference of two variants of a question. how: short, counter."""
    measure = f"{ours} minus {theirs}, {'bits per byte' if unit == 'bits' else 'nats per token'}"
    return Claim(source, words, measure, difference(ours, theirs, unit, remark), rule, unit, (ours, theirs), **how)


def lasts(source: str, words: str, along: str, passes: str = "", least_tokens: int = 0, **how: Any) -> Claim:
    """Return a claim that engram's lead over plain does not get smaller along the tables of a question."""
    what = "what engram is ahead of plain, lost on the way, bits per byte"
    return Claim(source, words, what, change_of_gain(along, passes, least_tokens), "below", "bits", **how)


def change_of_gain(along: str, passes: str = "", least_tokens: int = 0) -> Figure:
    """Return a figure: engram's difference to plain where record[along] is largest, minus the one where it is smallest,
    in bits per byte of the same documents: above 0, the gain shrinks. One finding for each size and text with two such
    tables.

    Args:
        passes: "one" for only the runs that read no text twice, "several" for those from the last of them on, if the
            last reads it twice at least.
        least_tokens: of training, in the configuration, for a table to count.
    """

    def figure(home: Path) -> list[Finding]:
        series: dict[tuple[str, str], dict[float, tuple[Table, dict[str, dict[int, Record]]]]] = {}
        for table, variants in tables_of(read_results(home / "results.jsonl")).items():
            pair = {arm: {run["seed"]: run for run in variants.get(arm, [])} for arm in ("plain", "engram")}
            if set(pair["plain"]) & set(pair["engram"]):
                run = variants["plain"][0]
                if run["setting"]["train"]["tokens"] >= least_tokens:
                    series.setdefault((table.size, table.text), {})[run[along]] = table, pair
        return [finding for tables in series.values() for finding in _ends(home, tables, passes)]

    return figure


def _ends(home: Path, tables: dict[float, tuple[Table, dict[str, dict[int, Record]]]], passes: str) -> list[Finding]:
    """Return the gain in the last table of a series against the first."""
    points = sorted(tables)
    once = [at for at in points if _passes(tables[at][1]) <= 1]
    chosen = {"": points, "one": once, "several": points[len(once) - 1 :] if once else []}[passes]
    if len(chosen) < 2 or (passes == "several" and _passes(tables[chosen[-1]][1]) < 2):
        return []
    (first, before), (last, after) = tables[chosen[0]], tables[chosen[-1]]
    seeds = sorted(set.intersection(*(set(runs) for pair in (before, after) for runs in pair.values())))
    if not seeds:
        return []
    gains = [_gain(home, pair, seeds) for pair in (after, before)]
    sizes = documents_of(home, before["plain"][seeds[0]])["bytes"]
    return [Finding(paired_interval(*gains, sizes), len(seeds), first, last)]


def _passes(pair: dict[str, dict[int, Record]]) -> float:
    """Return the passes over the training text, of the runs of a table."""
    run = next(iter(pair["plain"].values()))
    return float(run["tokens"] / run["text_tokens"])


def _gain(home: Path, pair: dict[str, dict[int, Record]], seeds: list[int]) -> np.ndarray:
    """Return bits of engram minus bits of plain, [seeds, documents]."""
    ours, plain = (
        np.stack([documents_of(home, pair[arm][seed])["nats"] for seed in seeds]) for arm in ("engram", "plain")
    )
    return (ours - plain) / math.log(2)


def of_measures(
    compare: Callable[[Path, dict[str, Any]], Interval | None],
    remark: Callable[[dict[str, Any]], str] = lambda variants: "",
    chosen: Callable[[Table], bool] = lambda table: True,
) -> Figure:
    """Return a figure: a number from the measures of a question, in every table: compare(folder, {variant: {seed:
    run}}).

    Args:
        remark: a function of the same variants, whose text is added to the table's caption.
        chosen: a function of a table, True if it counts.
    """

    def figure(home: Path) -> list[Finding]:
        findings = []
        for table, variants in measured(home).items():
            value = compare(home, variants) if chosen(table) else None
            if value is not None:
                ours = set(variants["engram"])
                seeds = len(ours & set(variants.get("plain", ours)))
                findings.append(Finding(value, seeds, table, note=remark(variants)))
        return findings

    return figure
