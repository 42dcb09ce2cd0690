"""Counts without a position's own occurrence, or without those of its whole document."""

from __future__ import annotations

import numpy as np

_TOTAL, _DISTINCT, _ONCE, _COUNT = range(4)


def leave_out_position(reading: np.ndarray, live: np.ndarray) -> None:
    """Subtract one occurrence of the target at the positions `live`, where it was counted; int64 [positions, 4]."""
    count = reading[:, _COUNT].copy()
    own = live & (count > 0)
    reading[:, _TOTAL] -= own
    reading[:, _COUNT] -= own
    reading[:, _DISTINCT] -= own & (count == 1)
    reading[:, _ONCE] += (own & (count == 2)).astype(np.int64) - (own & (count == 1))


def leave_out_document(
    reading: np.ndarray, live: np.ndarray, documents: np.ndarray, contexts: np.ndarray, targets: np.ndarray
) -> None:
    """Subtract all occurrences in a position's document, where they were counted; int64 [positions, 4].

    Args:
        live: True where the position's own target was counted. documents, contexts, targets: int [positions].
    """
    count = reading[:, _COUNT].copy()
    pairs = np.stack([documents, contexts.astype(np.int64), targets], axis=1)
    _, first, often = np.unique(pairs[live], axis=0, return_index=True, return_counts=True)
    if not len(first):
        return
    was = count[live][first]
    gone = np.minimum(often, was)
    left = was - gone
    change = np.stack([-gone, -((was > 0) & (left == 0)).astype(np.int64), (left == 1) * 1 - (was == 1) * 1], axis=1)
    groups, group = np.unique(pairs[live][first][:, :2], axis=0, return_inverse=True)
    summed = np.zeros((len(groups), 3), dtype=np.int64)
    np.add.at(summed, group.reshape(-1), change)
    own = dict(zip(map(tuple, pairs[live][first].tolist()), gone.tolist(), strict=True))
    reading[:, _COUNT] -= np.array([own.get(tuple(key), 0) for key in pairs.tolist()])
    lookup = {tuple(key): row for key, row in zip(groups.tolist(), summed, strict=True)}
    for i, key in enumerate(zip(documents.tolist(), contexts.tolist(), strict=True)):
        if (row := lookup.get(key)) is not None:
            reading[i, :_COUNT] += row
