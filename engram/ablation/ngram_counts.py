"""Held-out loss by how often the n-gram before a token occurred in training."""

from __future__ import annotations

import numpy as np

from engram.ablation.statistics import loss_by_count, ngram_counts
from engram.lm.evaluate import Evaluation
from engram.lm.run import Data
from engram.lm.train import Batches, TrainConfig

ORDERS = {"bigram": 2, "trigram": 3}


def seen_counts(data: Data, config: TrainConfig) -> dict[str, np.ndarray]:
    """Count how often the n-gram that ends at each held-out position occurs in the windows that a run trains on.

    A window that is trained on twice counts twice.

    Returns:
        {"bigram": int64 [held-out tokens], "trigram": ...}; -1 at the start of a document.

    Raises:
        ValueError: a text too short for a batch, or ids too large for ngram_counts.
    """
    batches = Batches(data.train, config.context, config.batch_size, config.seed)
    take = batches.orders(config.steps)[:, None] * config.context + np.arange(config.context)
    ids, documents, held_out = data.train.ids[take], data.train.documents[take], data.validation
    return {
        name: ngram_counts(ids, documents, order).lookup(held_out.ids, held_out.documents)
        for name, order in ORDERS.items()
    }


def seen_losses(result: Evaluation, counts: dict[str, np.ndarray]) -> dict[str, dict[str, tuple[int, float | None]]]:
    """Return the mean loss of the tokens that follow n-grams counted by seen_counts().

    Returns:
        {"bigram": {"0": (tokens, nats per token), "1": ..., "2-9": ..., "10+": ...}, "trigram": ...}. The loss of an
        empty bucket is None, which JSON can hold and nan is not.
    """
    nats, split = result.position_nats, {}
    for name, count in counts.items():
        scored = np.where(np.isnan(nats), -1, count)  # a document's last position predicts nothing
        split[name] = {
            bucket: (tokens, loss if tokens else None) for bucket, (tokens, loss) in loss_by_count(nats, scored).items()
        }
    return split
