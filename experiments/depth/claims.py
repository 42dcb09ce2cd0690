"""Claims about the depth of layers behind the memory."""

from pathlib import Path
from typing import Any

from engram.ablation.statistics import Interval
from experiments.depth.summary import early_lens, shift
from experiments.lab.claims import PAPER, Claim, of_measures
from experiments.lab.measures import paired


def _lens_gap(home: Path, variants: dict[str, Any]) -> Interval | None:
    return paired(variants.get("engram", {}), variants.get("plain", {}), early_lens)


def _cka_shift(home: Path, variants: dict[str, Any]) -> Interval | None:
    ours, plain = variants.get("engram", {}), variants.get("plain", {})
    return shift(home, ours, plain) if ours and plain else None


CLAIMS = [
    Claim(
        PAPER,
        "Early layers are nearer to prediction",
        "LogitLens KL of layers behind the memory, minus plain's, nats",
        of_measures(_lens_gap),
        "below",
    ),
    Claim(
        PAPER,
        "Layers are like deeper ones of the plain model",
        "depth in plain's layers (CKA), minus plain's own",
        of_measures(_cka_shift),
        "above",
    ),
]
