"""What the runs say to a claim: one number with its interval for each table of runs that has it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from engram.lm.statistics import Interval, over_seeds, paired_interval

from experiments.codecs.summary import budgets, cost
from experiments.config import budget_of, read_lines, read_results
from experiments.depth.summary import early_lens, shift
from experiments.kneser_ney.configs import WITH_PLAIN, against_engram
from experiments.measures import measured, paired
from experiments.recall.summary import accuracy, learned_after
from experiments.report import Record, documents_of, groups_of, rows_of
from experiments.sensitivity.summary import never_taught, retention_gap
from experiments.slots.plot import LogFit, cells_of, log_fit
from experiments.tokens.summary import text_of

INF = math.inf
LEARNED = 0.05  # of the answers, above the level without keys


class Finding(NamedTuple):
    """What one table of runs says. value: with an infinite interval where nothing is known of the spread."""

    group: str
    value: Interval
    seeds: int


def difference(name: str, ours: str, theirs: str, unit: str = "nats") -> Callable[[Path], list[Finding]]:
    """Nats per token (bits per byte with unit="bits", which holds for any two tokenizers) of one label minus another's
    of an experiment, in every table that has both; of a part of the memory it is said if that has no grid of rates
    there."""

    def figure(home: Path) -> list[Finding]:
        found, grids = [], {record["label"] for record in read_results(home / name / "tune.jsonl")}
        for group, runs in groups_of(read_results(home / name / "results.jsonl")).items():
            if ours in runs and theirs in runs:
                untuned = name == "components" and (ours not in grids or not group.startswith("T"))  # grids are T's
                found += _compared(home / name, group + ", engram's rates" * untuned, runs, ours, theirs, unit)
        return found

    return figure


def _compared(
    folder: Path, group: str, runs: dict[str, list[Record]], ours: str, theirs: str, unit: str = "nats"
) -> list[Finding]:
    """One label minus another, in one table; none without seeds in common, or in nats with two tokenizers."""
    row = rows_of(folder, {theirs: runs[theirs], ours: runs[ours]}, theirs)[1]
    value = row.bits if unit == "bits" else row.nats
    return [] if value is None else [Finding(group, value, len(row.paired))]


def change_of_gain(name: str, along: str, passes: str = "", least_tokens: int = 0) -> Callable[[Path], list[Finding]]:
    """Engram's difference to plain where record[along] is largest, minus the one where it is smallest, in bits per byte
    of the same documents: above 0, the gain shrinks. One finding for each setting and text with two such tables.

    passes: "one" for the runs alone that read no text twice, "several" for those from the last of them on, where the
        last reads it twice at least.
    least_tokens: of training, in the configuration, for a table to count.
    """

    def figure(home: Path) -> list[Finding]:
        series: dict[tuple[str, str], dict[float, tuple[str, dict[str, dict[int, Record]]]]] = {}
        for group, labels in groups_of(read_results(home / name / "results.jsonl")).items():
            pair = {arm: {run["seed"]: run for run in labels.get(arm, [])} for arm in ("plain", "engram")}
            if set(pair["plain"]) & set(pair["engram"]):
                run = labels["plain"][0]
                if run["setting"]["train"]["tokens"] < least_tokens:
                    continue
                where = group.partition(":")[0], run["setting"]["corpus"]
                series.setdefault(where, {})[run[along]] = group, pair
        found = []
        for tables in series.values():
            places = sorted(tables)
            once = [at for at in places if _passes(tables[at][1]) <= 1]
            chosen = {"": places, "one": once, "several": places[len(once) - 1 :] if once else []}[passes]
            if len(chosen) < 2 or (passes == "several" and _passes(tables[chosen[-1]][1]) < 2):
                continue
            (first, before), (last, after) = tables[chosen[0]], tables[chosen[-1]]
            seeds = sorted(set.intersection(*(set(runs) for pair in (before, after) for runs in pair.values())))
            if seeds:
                gains = [_gain(home / name, pair, seeds) for pair in (after, before)]
                sizes = documents_of(home / name, before["plain"][seeds[0]])["bytes"]
                found.append(Finding(f"{first} to {last}", paired_interval(*gains, sizes), len(seeds)))
        return found

    return figure


def _passes(pair: dict[str, dict[int, Record]]) -> float:
    """Over the training text, of the runs of a table."""
    run = next(iter(pair["plain"].values()))
    return float(run["tokens"] / run["text_tokens"])


def _gain(home: Path, pair: dict[str, dict[int, Record]], seeds: list[int]) -> np.ndarray:
    """[seeds, documents], bits of engram minus bits of plain."""
    ours, plain = (
        np.stack([documents_of(home, pair[arm][seed])["nats"] for seed in seeds]) for arm in ("engram", "plain")
    )
    return (ours - plain) / math.log(2)


def twice_the_tokens(home: Path) -> list[Finding]:
    """Plain minus engram that was trained on half as many tokens, on each text and at each budget."""
    found, folder = [], home / "tokens"
    groups = groups_of(read_results(folder / "results.jsonl")).items()
    plain = {(text_of(group), budget_of(runs["plain"][0])): runs["plain"] for group, runs in groups if "plain" in runs}
    for group, runs in groups:
        longer = plain.get((text_of(group), 2 * budget_of(runs["engram"][0]))) if "engram" in runs else None
        if longer:
            found += _compared(folder, group, {"engram": runs["engram"], "plain": longer}, "plain", "engram")
    return found


def slots_fit(part: str) -> Callable[[Path], list[Finding]]:
    """A part of the line through engram's loss over log2(rows): "slope" or "off"."""
    return lambda home: [Finding(group, getattr(fit, part), seeds) for group, fit, seeds in _slots_fits(home)]


def _slots_fits(home: Path) -> list[tuple[str, LogFit, int]]:
    """(group, line, seeds) of every table with three sizes or more."""
    found, folder = [], home / "slots"
    for group, runs in groups_of(read_results(folder / "results.jsonl")).items():
        if "plain" not in runs:
            continue
        rows = rows_of(folder, runs, "plain")
        cells = cells_of(rows, "engram")
        if len(cells) >= 3:
            seeds = set.intersection(*({run["seed"] for run in row.runs} for row in (rows[0], *cells.values())))
            if seeds:
                found.append((group, log_fit(folder, cells, rows[0]), len(seeds)))
    return found


def slots_ahead(home: Path) -> list[Finding]:
    """Engram minus OverEncoding with as many rows, at the most rows that both ran with."""
    found, folder = [], home / "slots"
    for group, runs in groups_of(read_results(folder / "results.jsonl")).items():
        sizes = [{_rows(label) for label in runs if label.startswith(arm)} for arm in ("engram, ", "over-encoding, ")]
        if sizes[0] & sizes[1]:
            most = max(sizes[0] & sizes[1])
            ours, theirs = (f"{arm}, {most:,} rows" for arm in ("engram", "over-encoding"))
            found += _compared(folder, f"{group}, {most:,} rows", runs, ours, theirs)
    return found


def _rows(label: str) -> int:
    return int(label.split(", ", 1)[1].removesuffix(" rows").replace(",", ""))


def kneser_ney(home: Path) -> list[Finding]:
    """Plain with counts minus engram of as many bytes."""
    return [
        Finding(f"{group}, {rows:,} rows", row.nats, len(row.paired))
        for group, rows, name, row, _ in against_engram(home / "kneser_ney")
        if name == WITH_PLAIN and row.nats is not None
    ]


def of_measures(
    name: str,
    compare: Callable[[Path, dict[str, Any]], Interval | None],
    remark: Callable[[dict[str, Any]], str] = lambda labels: "",
) -> Callable[[Path], list[Finding]]:
    """A number from the measures of an experiment, in every table: compare(folder, {label: {seed: run}}). remark: of
    the same, what is said behind the name of the table."""

    def figure(home: Path) -> list[Finding]:
        found = []
        for group, labels in measured(home / name).items():
            value = compare(home / name, labels)
            if value is not None:
                ours = set(labels["engram"])
                found.append(Finding(group + remark(labels), value, len(ours & set(labels.get("plain", ours)))))
        return found

    return figure


def lens_gap(home: Path, labels: dict[str, Any]) -> Interval | None:
    return paired(labels.get("engram", {}), labels.get("plain", {}), early_lens)


def cka_shift(home: Path, labels: dict[str, Any]) -> Interval | None:
    ours, plain = labels.get("engram", {}), labels.get("plain", {})
    return shift(home, ours, plain) if ours and plain else None


def left_of_facts(home: Path, labels: dict[str, Any]) -> Interval | None:
    return retention_gap(labels.get("engram", {}))


def like_what_was_said(home: Path, labels: dict[str, Any]) -> Interval | None:
    return never_taught(labels.get("engram", {}), labels.get("plain", {}))


def facts(
    compare: Callable[[Path, dict[str, Any]], Interval | None], once: bool = False
) -> Callable[[Path], list[Finding]]:
    """of_measures in the tables of `sensitivity` whose text says each line eight times, or once."""
    return lambda home: [
        found for found in of_measures("sensitivity", compare)(home) if ("facts:1:" in found.group) == once
    ]


def recall(task: str) -> Callable[[Path], list[Finding]]:
    """Accuracy minus plain's, in the tables of one task."""

    def gap(home: Path, labels: dict[str, Any]) -> Interval | None:
        return paired(labels.get("engram", {}), labels.get("plain", {}), accuracy("on"))

    return lambda home: [found for found in of_measures("recall", gap, not_by_plain)(home) if task in found.group]


def not_by_plain(labels: dict[str, Any]) -> str:
    """What is said behind the name of a table where plain is right hardly oftener than without keys."""
    plain = labels.get("plain", {})
    above = paired(plain, plain, accuracy("on"), accuracy("on", "keyless"))
    return "" if above is None or above.mean >= LEARNED else ", not learned by plain"


def learned_sooner(label: str) -> Callable[[Path, dict[str, Any]], Interval | None]:
    """log2 of the training tokens until recall is learned, a label's over plain's. Where only one of the two learns,
    the other counts with all its tokens; a seed in which neither learns says nothing."""

    def compare(home: Path, labels: dict[str, Any]) -> Interval | None:
        ratios = []
        for seed in sorted(set(labels.get(label, {})) & set(labels.get("plain", {}))):
            pair = [labels[arm][seed] for arm in (label, "plain")]
            after = [learned_after(run) for run in pair]
            if any(after):
                ours, plain = (known or run["tokens"] / 1e6 for known, run in zip(after, pair, strict=True))
                ratios.append(math.log2(ours / plain))
        return over_seeds(ratios) if ratios else None

    return compare


def throughput(home: Path) -> list[Finding]:
    """Tokens per second with a host table over without, minus 1; the script gives medians without an interval."""
    return [
        Finding(f"{row['device']}, batch {row['batch']}, {phase}", Interval(row[f"{phase}_ratio"] - 1, -INF, INF), 1)
        for row in read_lines(home / "gpu_offload" / "results.jsonl")
        for phase in ("prefill", "decode")
    ]


def fp8(home: Path) -> list[Finding]:
    """Nats per token of trained models after their rows were stored as fp8, minus before."""
    return [
        Finding(f"{tokens / 1e6:.2f}M tokens", cost(home / "codecs", codecs["fp8"]), len(codecs["fp8"]))
        for tokens, codecs in budgets(home / "codecs").items()
    ]
