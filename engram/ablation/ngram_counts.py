"""Held-out loss by how often training saw what stands before a token."""

from __future__ import annotations

import numpy as np

from engram.ablation.statistics import loss_by_count, ngram_counts
from engram.lm.evaluate import Evaluation
from engram.lm.run import Data
from engram.lm.train import Batches, TrainConfig

ORDERS = {"bigram": 2, "trigram": 3}


def seen_counts(data: Data, config: TrainConfig) -> dict[str, np.ndarray]:
    """{"bigram": int64 [held-out tokens], "trigram": ...}: how often the n-gram that ends at each held-out position
    stood in the windows that a run trains on (a window of two epochs counts twice); -1 at the start of a document.

    Raises:
        ValueError: what Batches raises, and ids too large for ngram_counts.
    """
    batches = Batches(data.train, config.context, config.batch_size, config.seed)
    take = batches.orders(config.steps)[:, None] * config.context + np.arange(config.context)
    ids, documents, held = data.train.ids[take], data.train.documents[take], data.validation
    return {
        name: ngram_counts(ids, documents, order).lookup(held.ids, held.documents) for name, order in ORDERS.items()
    }


def seen_losses(result: Evaluation, counts: dict[str, np.ndarray]) -> dict[str, dict[str, tuple[int, float | None]]]:
    """{"bigram": {"0": (tokens, nats per token), "1": ..., "2-9": ..., "10+": ...}, "trigram": ...} of the tokens that
    follow n-grams counted by seen_counts(). The loss of no tokens is None, which JSON knows."""
    nats, split = result.position_nats, {}
    for name, count in counts.items():
        known = np.where(np.isnan(nats), -1, count)  # a document's last position predicts nothing
        split[name] = {
            bucket: (tokens, loss if tokens else None) for bucket, (tokens, loss) in loss_by_count(nats, known).items()
        }
    return split
