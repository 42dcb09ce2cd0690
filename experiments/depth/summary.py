"""Tables of the lens and of likeness, from the records and the hidden states in documents.npz."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from engram.ablation.statistics import Interval, over_seeds
from experiments.depth.measure import alignment, likeness
from experiments.lab.measures import mean_of, measured, paired, shown, table
from experiments.lab.results import Record, read_documents

REACHED = 2  # the first layer behind the memory, which is added to the input of block 1


def lens(layer: int) -> Callable[[Any], float]:
    return lambda measures: measures["lens_kl"][layer]


def early_lens(measures: Any) -> float:
    """Return the mean over the layers from the memory to the last, without the last."""
    return float(np.mean(measures["lens_kl"][REACHED:-1]))


def states_of(home: Path, run: Record) -> np.ndarray:
    """Return hidden states, float16 [layers + 1, positions, d]. Raises FileNotFoundError if the run has none."""
    return read_documents(home, run["key"], ("measured_states",))["measured_states"]


def compare(home: Path, runs: dict[int, Record], plain: dict[int, Record]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Return {seed: (likeness of the seed's run to plain of every other seed, likeness of plain to the same)}, means
    over the other seeds, without the embeddings. Only other seeds count, on both sides, because runs of one seed start
    from the same weights."""
    states = {seed: states_of(home, run) for seed, run in plain.items()}
    pairs = {}
    for seed in sorted(set(runs) & set(plain)):
        others = [states[other] for other in states if other != seed]
        if others:
            ours = states_of(home, runs[seed])
            pair = ([likeness(x[1:], other[1:]) for other in others] for x in (ours, states[seed]))
            pairs[seed] = tuple(np.mean(part, axis=0) for part in pair)
    return pairs  # type: ignore[return-value]


def shift(home: Path, runs: dict[int, Record], plain: dict[int, Record]) -> Interval | None:
    """Return how many layers deeper the layers behind the memory are, on average, in terms of plain, than plain's own,
    over seeds; None with fewer than two seeds of plain."""
    return _deeper(compare(home, runs, plain))


def _deeper(pairs: dict[int, tuple[np.ndarray, np.ndarray]]) -> Interval | None:
    by_seed = [float(np.mean((alignment(ours) - alignment(own))[REACHED - 1 :])) for ours, own in pairs.values()]
    return over_seeds(by_seed) if by_seed else None


def effective_rank(states: np.ndarray) -> float:
    """Return the participation ratio of the variances of hidden states [positions, d] along their directions: d if all
    are equal, 1 if only one is not 0."""
    variances = np.linalg.eigvalsh(np.cov(states.astype(np.float64), rowvar=False))
    return float(variances.sum() ** 2 / (variances**2).sum())


def _ranks(home: Path, labels: dict[str, dict[int, Record]]) -> str:
    by_label = {
        label: [effective_rank(layer) for run in runs.values() for layer in states_of(home, run)[REACHED:-1]]
        for label, runs in labels.items()
    }
    ranges = ", ".join(f"{label} {min(ranks):.1f} to {max(ranks):.1f}" for label, ranks in by_label.items() if ranks)
    return (
        f"Effective rank of the hidden states (participation ratio; layers {REACHED} and up without the last, all "
        f"seeds): {ranges}. CKA sees little more than so many directions."
    )


def summary(home: Path) -> str:
    parts = []
    for group, labels in measured(home).items():
        if not any(labels.values()):
            continue
        plain = labels.get("plain", {})
        depth = max(len(run["measures"]["lens_kl"]) for runs in labels.values() for run in runs.values())
        read = [(f"{i}", lens(i)) for i in range(depth - 1)] + [(f"mean of {REACHED} and up", early_lens)]
        lines = []
        for label, runs in labels.items():
            for words, get in read:
                difference = None if label == "plain" else paired(runs, plain, get)
                lines.append((label, words, shown(mean_of(runs, get)), shown(difference, "+.3f")))
        head = ("arm", "layer", "KL to the last layer's distribution, nats", "minus plain's")
        parts.append(
            f"### LogitLens, {group}\n\nLayer 0 is the embedding. Means over seeds, with 95 % intervals over seeds "
            f"alone (Student's t).\n\n{table(head, lines, words=2)}"
        )
        parts.append(_ranks(home, labels))
        for label, runs in labels.items():
            pairs = {} if label == "plain" else compare(home, runs, plain)
            if pairs:
                parts.append(_likeness_table(label, group, pairs))
    return "\n\n".join(parts)


def _likeness_table(label: str, group: str, pairs: dict[int, tuple[np.ndarray, np.ndarray]]) -> str:
    ours, own = (np.mean([pair[side] for pair in pairs.values()], axis=0) for side in (0, 1))
    lines = []
    for i, row in enumerate(ours):
        cells = [f"**{value:.3f}**" if value == row.max() else f"{value:.3f}" for value in row]
        depths = [f"{alignment(matrix)[i] + 1:.2f}" for matrix in (ours, own)]
        lines.append((f"{i + 1}", *cells, *depths))
    head = ("layer", *(f"plain's {j + 1}" for j in range(ours.shape[1])), "like layer", "plain's own is like")
    return (
        f"### CKA of {label} and plain, {group}\n\nBetween different seeds, also for plain's own; means over pairs.\n\n"
        f"{table(head, lines)}\n\nFrom layer {REACHED} on, behind the memory, layers of {label} are like layers that "
        f"lie {shown(_deeper(pairs), '+.2f')} deeper on average; the last one cannot be. That is the mean of each "
        "seed's own shift, where the last two columns are read off the mean likenesses, so the two differ."
    )
