"""paper_notes/claims.md: what the paper and the two later models say, and what the runs here say; a few lines of it for
the README of the project, and for each experiment's README those that its runs are about. All figures come from
results.jsonl; verdicts follow the rules below, from the interval alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engram.lm.statistics import Interval
from engram.tables.files import write_whole

from experiments import findings
from experiments.config import HOME, NAMES, SETTINGS, questions
from experiments.findings import Finding
from experiments.kneser_ney.configs import WITH_PLAIN
from experiments.measures import table
from experiments.recall.configs import SLOW
from experiments.report import interval, write_between_marks

FILE = HOME.parent / "paper_notes" / "claims.md"
README = HOME.parent / "README.md"
RUN = "python -m experiments run "
MARGIN = 0.005  # nats per token, or bits per byte, that count as no difference


@dataclass(frozen=True)
class Claim:
    """One line of the document.

    Attributes:
        source: who says so. words: what. ours: what we measure instead. figure: home -> findings, [] before the runs.
        rule: one of RULES. command: makes the runs.
    """

    source: str
    words: str
    ours: str
    figure: Callable[[Path], list[Finding]]
    rule: str
    command: str

    @property
    def experiment(self) -> str:
        """Whose runs it is about; "" of a script of its own."""
        return self.command.removeprefix(RUN) if self.command.startswith(RUN) else ""


RULES: dict[str, tuple[str, Callable[[Interval], bool], Callable[[Interval], bool]]] = {
    # name: (in words, when the interval agrees, when it disagrees)
    "below": ("below 0", lambda i: i.high < 0, lambda i: i.low > 0),
    "above": ("above 0", lambda i: i.low > 0, lambda i: i.high < 0),
    "near": (
        f"within ±{MARGIN} of 0",
        lambda i: i.low > -MARGIN and i.high < MARGIN,
        lambda i: i.low > MARGIN or i.high < -MARGIN,
    ),
    "above -0.03": ("above -0.03", lambda i: i.low > -0.03, lambda i: i.high < -0.03),
    "no worse": (f"below +{MARGIN}", lambda i: i.high < MARGIN, lambda i: i.low > MARGIN),
}


def verdict(finding: Finding, rule: str) -> str:
    """ "agrees", "disagrees" or "cannot tell": by the interval, and never from fewer than two seeds."""
    _, agrees, disagrees = RULES[rule]
    if finding.seeds < 2 or not all(map(math.isfinite, finding.value)):
        return "cannot tell"
    return "agrees" if agrees(finding.value) else "disagrees" if disagrees(finding.value) else "cannot tell"


def _of(source: str, words: str, ours: str, figure: Callable[[Path], list[Finding]], rule: str, name: str) -> Claim:
    """A claim that the runs of one experiment are about."""
    return Claim(source, words, ours, figure, rule, RUN + name)


def _loss(source: str, words: str, name: str, ours: str, theirs: str, rule: str) -> Claim:
    """A claim about the difference of two labels of an experiment."""
    what = f"{ours} minus {theirs}, nats a token"
    return _of(source, words, what, findings.difference(name, ours, theirs), rule, name)


def _shrinks(source: str, words: str, name: str, along: str, passes: str = "", least_tokens: int = 0) -> Claim:
    """A claim that engram's lead over plain gets smaller along the tables of an experiment."""
    what = "what engram is ahead of plain, lost on the way, bits a byte"
    figure = findings.change_of_gain(name, along, passes, least_tokens)
    return _of(source, words, what, figure, "above", name)


PAPER, V41, QWEN = "paper", "DeepSeek-V4.1-Flash", "Qwen3.8-Flash-Next"
OTHERS, SCEPTICS = "public reproductions", "sceptics"
CLAIMS = (
    _loss(PAPER, "a memory lowers the loss of a dense model", "sceptic", "engram", "plain", "below"),
    _loss(
        PAPER,
        "a memory lowers the loss more than experts of as many parameters and FLOPs",
        "sceptic",
        "engram",
        "moe-active",
        "below",
    ),
    _loss(
        PAPER, "a memory is far ahead of n-gram embeddings at the input", "sceptic", "engram", "over-encoding", "below"
    ),
    _of(
        PAPER,
        "a memory is ahead of n-gram embeddings with as many rows",
        "engram minus over-encoding with the most rows, nats a token",
        findings.slots_ahead,
        "below",
        "slots",
    ),
    _of(
        PAPER,
        "loss falls with the number of rows",
        "slope over log2(rows), nats a token and doubling",
        findings.slots_fit("slope"),
        "below",
        "slots",
    ),
    _of(
        PAPER,
        "loss falls linearly in the logarithm of the rows",
        "the size farthest from the line, minus the line, nats a token",
        findings.slots_fit("off"),
        "near",
        "slots",
    ),
    _loss(PAPER, "a quarter in the table beats experts alone", "allocation", "table 25 %", "table 0 %", "below"),
    _loss(
        PAPER, "a quarter in the table beats the table alone: a U", "allocation", "table 25 %", "table 100 %", "below"
    ),
    _loss(PAPER, "the gate earns its place", "sceptic", "gate-one", "engram", "above"),
    _loss(PAPER, "the token map earns its place", "components", "token map: raw ids", "engram", "above"),
    _loss(PAPER, "the convolution matters little", "components", "conv: none", "engram", "near"),
    _loss(PAPER, "4-grams are slightly worse at equal bytes", "components", "orders: 2, 3, 4", "engram", "above"),
    _loss(PAPER, "two layers are better than one", "components", "two layers, same bytes", "engram", "below"),
    _of(
        PAPER,
        "switched off, facts lose more than reading",
        "left of what teaching facts added, minus the same of prose said as often",
        findings.facts(findings.left_of_facts),
        "below",
        "sensitivity",
    ),
    _of(
        PAPER,
        "early layers are nearer to prediction",
        "LogitLens KL of layers behind the memory, minus plain's, nats",
        findings.of_measures("depth", findings.lens_gap),
        "below",
        "depth",
    ),
    _of(
        PAPER,
        "layers are like deeper ones of the plain model",
        "depth in plain's layers (CKA), minus plain's own",
        findings.of_measures("depth", findings.cka_shift),
        "above",
        "depth",
    ),
    _of(
        PAPER,
        "several needles are found more often",
        "accuracy minus plain's, needles in filler",
        findings.recall("needles"),
        "above",
        "recall",
    ),
    _of(
        PAPER,
        "attention is freed for what lies further back",
        "log2 of the tokens until recall is learned, minus plain's",
        findings.of_measures("recall", findings.learned_sooner("engram"), findings.not_by_plain),
        "below",
        "recall",
    ),
    Claim(
        PAPER,
        "a table in host memory costs under 3 % of the speed",
        "tokens per second over plain's, minus 1",
        findings.throughput,
        "above -0.03",
        "python experiments/gpu_offload/run.py",
    ),
    _loss(SCEPTICS, "gate and convolution can both go", "components", "conv: none, gate: none", "engram", "no worse"),
    _loss(V41, "the convolution can go", "components", "conv: none", "engram", "no worse"),
    _loss(V41, "4-grams are worth their rows", "components", "orders: 2, 3, 4", "engram", "no worse"),
    _loss(V41, "rows train with Sinkhorn-balanced momentum", "components", "optimiser: sinkhorn", "engram", "no worse"),
    Claim(
        V41,
        "rows can be stored as fp8",
        "after storing as fp8 minus before, nats a token",
        findings.fp8,
        "no worse",
        "python experiments/codecs/run.py",
    ),
    _loss(QWEN, "raw token ids will do", "components", "token map: raw ids", "engram", "no worse"),
    _loss(QWEN, "rows train with Adam", "components", "optimiser: adam", "engram", "no worse"),
    _loss(OTHERS, "switching off overstates the value", "lookup_or_module", "switched-off", "plain", "above"),
    _loss(
        OTHERS, "value embeddings (1/16 of the table) do as well", "sceptic", "value-embeddings", "engram", "no worse"
    ),
    _loss(OTHERS, "hashed bigrams at every layer do as well", "sceptic", "hashed-bigram", "engram", "no worse"),
    _loss(OTHERS, "the hash family does not matter", "components", "hash: xxh64", "engram", "near"),
    _loss(OTHERS, "rows should start at zero", "components", "init: normal, 0.02", "engram", "above"),
    _loss(OTHERS, "rows should not start at N(0, 1)", "components", "init: normal, 1", "engram", "above"),
    _shrinks(OTHERS, "a large vocabulary takes the gain away", "vocabulary", "vocabulary"),
    _shrinks(OTHERS, "several passes over a text take it away", "tokens", "tokens", "several"),
    _shrinks(SCEPTICS, "more tokens within one pass take the gain away", "tokens", "tokens", "one"),
    _shrinks(
        SCEPTICS,
        "more tokens than T's take the gain away, within one pass",
        "tokens",
        "tokens",
        "one",
        least_tokens=SETTINGS["T"].train.tokens,
    ),
    _of(
        SCEPTICS,
        "new text that is like repeated text is predicted worse",
        "engram minus plain on facts never taught, nats a token",
        findings.facts(findings.like_what_was_said),
        "above",
        "sensitivity",
    ),
    _of(
        SCEPTICS,
        "new text that is like text said once is predicted worse",
        "engram minus plain on facts never taught, nats a token",
        findings.facts(findings.like_what_was_said, once=True),
        "above",
        "sensitivity",
    ),
    _of(
        SCEPTICS,
        "recall is learned sooner by the rate of the rows alone",
        f"log2 of the tokens until recall is learned, {SLOW} minus plain's",
        findings.of_measures("recall", findings.learned_sooner(SLOW), findings.not_by_plain),
        "above",
        "recall",
    ),
    _loss(SCEPTICS, "the module alone would do", "lookup_or_module", "one-row", "engram", "no worse"),
    _loss(SCEPTICS, "random rows would do", "lookup_or_module", "random", "engram", "no worse"),
    _loss(SCEPTICS, "as many weights in wider layers would do", "sceptic", "wider", "engram", "no worse"),
    _of(
        SCEPTICS,
        "a larger vocabulary of as many bytes would do",
        "larger-vocabulary minus engram, bits a byte",
        findings.difference("sceptic", "larger-vocabulary", "engram", "bits"),
        "no worse",
        "sceptic",
    ),
    _loss(SCEPTICS, "as many seconds of training would do", "sceptic", "longer", "engram", "no worse"),
    _of(
        SCEPTICS,
        "twice the training would do",
        "plain with twice the tokens minus engram, nats a token",
        findings.twice_the_tokens,
        "no worse",
        "tokens",
    ),
    _of(
        SCEPTICS,
        "counts of at most as many bytes would do",
        f"{WITH_PLAIN} minus engram, nats a token",
        findings.kneser_ney,
        "no worse",
        "kneser_ney",
    ),
    _loss(
        SCEPTICS,
        "the nearest contexts of the training text would do",
        "sceptic",
        "knn-lm (ivf, 1,024)",
        "engram",
        "no worse",
    ),
    _loss(SCEPTICS, "counts would do, in the sweep of all arms", "sceptic", "kneser-ney", "engram", "no worse"),
)
IN_SHORT = (  # the words of the claims that the README tells, in its order
    "a memory lowers the loss of a dense model",
    "the module alone would do",
    "random rows would do",
    "counts would do, in the sweep of all arms",
    "the nearest contexts of the training text would do",
    "hashed bigrams at every layer do as well",
    "a memory is far ahead of n-gram embeddings at the input",
    "value embeddings (1/16 of the table) do as well",
    "as many weights in wider layers would do",
    "a larger vocabulary of as many bytes would do",
    "a memory lowers the loss more than experts of as many parameters and FLOPs",
    "a quarter in the table beats the table alone: a U",
    "the gate earns its place",
    "the convolution can go",
    "gate and convolution can both go",
    "loss falls with the number of rows",
    "a large vocabulary takes the gain away",
    "more tokens than T's take the gain away, within one pass",
    "several passes over a text take it away",
    "switching off overstates the value",
    "switched off, facts lose more than reading",
    "new text that is like repeated text is predicted worse",
    "new text that is like text said once is predicted worse",
    "recall is learned sooner by the rate of the rows alone",
)
Found = list[tuple[Claim, list[Finding]]]


def found_in(home: Path = HOME, name: str = "") -> Found:
    """Every claim, or those about one experiment, with what the runs say. Raises what the experiments' tables raise: a
    missing side file, say."""
    return [(claim, claim.figure(home)) for claim in CLAIMS if not name or claim.experiment == name]


def answers(results: Found, name: str) -> str:
    """Markdown: what the runs of one experiment say to the claims that are about it; "" where none is."""
    lines = [
        (
            *(claim.words, claim.ours, _runs(finding), _figure(finding.value)),
            *(RULES[claim.rule][0], verdict(finding, claim.rule)),
        )
        for claim, found in results
        if claim.experiment == name
        for finding in found
    ]
    if not lines:
        return ""
    head = ("claim", "what we measure", "table", "figure with interval", "needs", "verdict")
    source = "Whose claims these are, and how a verdict follows: [claims.md](../../paper_notes/claims.md)."
    return f"### What it says to the claims\n\n{source}\n\n{table(head, lines, words=3)}"


def document(results: Found) -> str:
    """The whole file as Markdown."""
    sides = "; ".join(f"*{name}*: {words}" for name, (words, _, _) in RULES.items())
    lines = [
        "# Claims",
        "",
        "What is said of conditional memory, and what the runs of this repository say. *paper*: arXiv 2601.07372.",
        "*DeepSeek-V4.1-Flash*, *Qwen3.8-Flash-Next*: the models that shipped the idea later. *public reproductions*:",
        "what several small studies by others report, *sceptics*: what a reader may object, both in our words. Written",
        "by `python -m experiments report`; no figure of a run was typed.",
        "",
        "A verdict follows from the 95 % interval alone. It agrees where the whole interval is on the side that the",
        "claim needs, disagrees where the whole interval is on the other, and cannot tell in between, with fewer than",
        f"two seeds, or without an interval. The sides are {sides}.",
        "All runs are of a few million parameters on a few megabytes of text: a verdict is of that size and no other.",
        "S and T are the lab's settings: 4 layers and 3.3M tokens, 2 layers and 0.56M tokens (experiments/README.md).",
        "Experts hardly gain over the plain model with so little text: to be ahead of them says little.",
        "No interval knows that learning rates were chosen on one seed: a difference below 0.02 nats can be theirs.",
        "Parts of the memory have grids of rates at T alone: of one at S the setting says whose rates it took.",
        "",
        "| source | claim | our setting | what we measure | figure with interval | needs | verdict | command |",
        "|---|---|---|---|---:|---|---|---|",
    ]
    for claim, found in results:
        for finding in found:
            cells = [
                _runs(finding),
                claim.ours,
                _figure(finding.value),
                claim.rule,
                verdict(finding, claim.rule),
            ]
            lines.append(_line(claim, cells, command(claim, finding.group)))
        if not found:
            lines.append(_line(claim, ["", claim.ours, "not run yet", claim.rule, ""], claim.command))
    return "\n".join(lines) + "\n"


def _figure(value: Interval) -> str:
    return interval(value) if math.isfinite(value.low) else f"{value.mean:+.4f}"


def command(claim: Claim, group: str) -> str:
    """The command that makes the runs of a table, with the setting and the text that are not the experiment's own."""
    name = claim.experiment
    group, device = group.removesuffix(", on cuda"), " --device cuda" * group.endswith(", on cuda")
    setting, _, text = group.replace(",", ":").partition(": ")
    if name not in NAMES or setting not in SETTINGS:
        return claim.command
    options = "" if setting == questions(name).SETTING else f" --setting {setting}"
    if name == "sceptic" and text != SETTINGS[setting].corpus:
        options += f" --corpus {text}"
    return claim.command + options + device


def _line(claim: Claim, cells: list[str], how: str) -> str:
    return "| " + " | ".join([claim.source, claim.words, *cells, f"`{how}`"]) + " |"


def in_short(results: Found) -> str:
    """Markdown: of each claim in IN_SHORT the finding with the most seeds (at S, then on the main text, if two have as
    many) and the verdicts on its other tables."""
    by_words = {claim.words: (claim, found) for claim, found in results}
    lines = [
        "| claim | what was measured | figure, 95 % interval | runs | needs | verdict | its other tables |",
        "|---|---|---:|---|---|---|---|",
    ]

    def rank(finding: Finding) -> tuple[int, str, bool]:
        return -finding.seeds, finding.group[:1], SETTINGS["T"].corpus not in finding.group

    for words in IN_SHORT:
        claim, found = by_words[words]
        if not found:
            lines.append(f"| {words} | {claim.ours} | not run yet | | {RULES[claim.rule][0]} | | |")
            continue
        first, *others = sorted(found, key=rank)
        counts = Counter(verdict(finding, claim.rule) for finding in others)
        cells = [
            words,
            claim.ours,
            _figure(first.value),
            _runs(first),
            RULES[claim.rule][0],
            f"**{verdict(first, claim.rule)}**",
            ", ".join(f"{kind} ({count})" for kind, count in counts.items()),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _runs(finding: Finding) -> str:
    return f"{finding.group}, {finding.seeds} seed{'s' if finding.seeds != 1 else ''}"


def write_claims(results: Found, file: Path = FILE, readme: Path = README) -> None:
    """Writes the document, whole or not at all, and the table of the README.

    Raises:
        ValueError: a README without the marks.
    """
    write_whole(file, document(results).encode())
    write_between_marks(readme, in_short(results))
