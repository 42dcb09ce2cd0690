"""Measure how ready for prediction each layer is (LogitLens), and how like another model's layers (CKA).

Source: the paper's section on mechanisms; debiased HSIC after Song et al. 2012, CKA after Kornblith et al. 2019.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram.lm.evaluate import eval_mode
from engram.lm.run import Data
from experiments.lab.cell import Run

WINDOWS = 32  # of held-out text, for the lens
POSITIONS = 320  # of these, kept for CKA: the same in every run, so that any two runs can be compared


@torch.no_grad()
def measure(run: Run, model: Any, data: Data) -> dict[str, Any]:
    """Return {"lens_kl": nats per layer, "tokens": number of positions, "states": float16 [layers + 1, positions, d]}.

    Layer 0 is the embedding, layer i the output of block i - 1. lens_kl is the mean over positions of KL(final
    distribution || distribution that the final norm and the head read from the layer); 0 at the last.
    """
    context, text = run.setting.train.context, data.validation
    count = min(WINDOWS, len(text.ids) // context)
    if not count:
        raise ValueError(f"{len(text.ids)} held-out tokens do not fill one window of {context}")
    take = np.arange(count)[:, None] * context + np.arange(context)
    device = model.embedding.weight.device
    ids, documents = (torch.from_numpy(part[take]).long().to(device) for part in (text.ids, text.documents))
    with eval_mode(model):
        total, kept = np.zeros(len(model.blocks) + 1), []
        for start in range(0, count, 4):
            states = layer_states(model, ids[start : start + 4], documents[start : start + 4])
            final = model.head(model.norm(states[-1])).float().log_softmax(-1)
            for layer, state in enumerate(states):
                lens = model.head(model.norm(state)).float().log_softmax(-1)
                total[layer] += float((final.exp() * (final - lens)).sum(-1).double().sum())
            kept.append(torch.stack(states).flatten(1, 2))
    positions = torch.cat(kept, dim=1)
    chosen = np.linspace(0, positions.shape[1] - 1, min(POSITIONS, positions.shape[1])).astype(int)
    return {
        "lens_kl": (total / ids.numel()).tolist(),
        "tokens": ids.numel(),
        "states": positions[:, chosen].cpu().numpy().astype(np.float16),
    }


def layer_states(model: Any, ids: Tensor, documents: Tensor | None = None) -> list[Tensor]:
    """Return the embedding and the output of each block, [B, T, d] each, of one forward pass."""
    states: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _, inputs, out: states.append(out))
        for module in (model.embedding, *model.blocks)
    ]
    try:
        model(ids, documents)
    finally:
        for hook in hooks:
            hook.remove()
    return states


def cka(a: np.ndarray, b: np.ndarray) -> float:
    """Return debiased linear CKA of [n, d] and [n, e], rows of the same n positions: 1 if they are equal up to rotation
    and scale, 0 in expectation for independent ones, however wide.

    Raises:
        ValueError: another number of rows, or fewer than four.
    """
    return float(likeness([a], [b])[0, 0])


def likeness(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> np.ndarray:
    """Return CKA [layers of a, layers of b] of states at the same positions. Raises what cka raises."""
    lengths = {len(states) for states in (*a, *b)}
    if len(lengths) != 1 or min(lengths) < 4:
        raise ValueError(
            f"CKA compares the same positions, four at least, not {' and '.join(map(str, sorted(lengths)))}"
        )
    mine, other = ([_gram(states.astype(np.float64)) for states in side] for side in (a, b))
    own_a, own_b = ([_hsic(gram, gram) for gram in side] for side in (mine, other))
    both = np.array([[_hsic(x, y) for y in other] for x in mine])
    return both / np.sqrt(np.outer(own_a, own_b))


def _gram(x: np.ndarray) -> np.ndarray:
    x = x - x.mean(axis=0)  # changes nothing but rounding: the estimator centres by itself
    gram = x @ x.T
    np.fill_diagonal(gram, 0)
    return gram


def _hsic(a: np.ndarray, b: np.ndarray) -> float:
    n = len(a)
    total = (a * b).sum() + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (a.sum(axis=0) @ b.sum(axis=0))
    return float(total / (n * (n - 3)))


def alignment(similarity: np.ndarray, most: int = 2) -> np.ndarray:
    """Return which depth of the other model each layer is like: [layers] from similarity [layers, other layers]. It is
    the mean of the `most` likest layers' numbers, weighted by their likeness (the paper's soft alignment index)."""
    best = np.argsort(-similarity, axis=1)[:, :most]
    weight = np.take_along_axis(similarity, best, axis=1).clip(min=1e-9)
    return (weight * best).sum(axis=1) / weight.sum(axis=1)
