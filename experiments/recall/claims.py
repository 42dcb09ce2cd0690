"""Claims about recall within the text."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engram.ablation.statistics import Interval, over_seeds
from experiments.lab.cell import Table
from experiments.lab.claims import PAPER, SCEPTICS, Claim, of_measures
from experiments.lab.measures import paired
from experiments.recall.configs import SLOW
from experiments.recall.summary import accuracy, learned_after
from experiments.recall.task import Task

LEARNED = 0.05  # of the answers, above the level without keys


def _gap(home: Path, variants: dict[str, Any]) -> Interval | None:
    return paired(variants.get("engram", {}), variants.get("plain", {}), accuracy("on"))


def needles(table: Table) -> bool:
    """Return True if the pairs of a table's task are surrounded by filler."""
    return Task.of(table.text).filler > 0


def not_by_plain(variants: dict[str, Any]) -> str:
    """Return a remark for the caption if plain is right hardly more often than without keys."""
    plain = variants.get("plain", {})
    above = paired(plain, plain, accuracy("on"), accuracy("on", "keyless"))
    return "" if above is None or above.mean >= LEARNED else ", not learned by plain"


def learned_sooner(variant: str) -> Callable[[Path, dict[str, Any]], Interval | None]:
    """Return log2 of the training tokens until recall is learned, a variant's over plain's. If only one of the two
    learns, the other counts with all its tokens; a seed in which neither learns is left out."""

    def compare(home: Path, variants: dict[str, Any]) -> Interval | None:
        ratios = []
        for seed in sorted(set(variants.get(variant, {})) & set(variants.get("plain", {}))):
            pair = [variants[arm][seed] for arm in (variant, "plain")]
            after = [learned_after(run) for run in pair]
            if any(after):
                ours, plain = (known or run["tokens"] / 1e6 for known, run in zip(after, pair, strict=True))
                ratios.append(math.log2(ours / plain))
        return over_seeds(ratios) if ratios else None

    return compare


CLAIMS = [
    Claim(
        PAPER,
        "Several needles are found more often",
        "accuracy minus plain's, needles in filler",
        of_measures(_gap, not_by_plain, needles),
        "above",
    ),
    Claim(
        PAPER,
        "Attention is freed for what lies further back",
        "log2 of the tokens until recall is learned, minus plain's",
        of_measures(learned_sooner("engram"), not_by_plain),
        "below",
    ),
    Claim(
        SCEPTICS,
        "Recall is learned sooner with slow rows too, so not by their rate alone",
        f"log2 of the tokens until recall is learned, {SLOW} minus plain's",
        of_measures(learned_sooner(SLOW), not_by_plain),
        "below",
        short=24,
    ),
]
