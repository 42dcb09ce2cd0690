"""A text as the count memory takes it: rows of integers, and where its n-grams continue."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xxhash


def rows(name: str, values: Any) -> np.ndarray:
    """Return integers as int64 [B, T]."""
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"{name} must be integers, not {array.dtype}")
    if array.ndim not in (1, 2):
        raise ValueError(f"{name} must be [T] or [B, T], not {list(array.shape)}")
    return np.atleast_2d(array).astype(np.int64)


def digest(tokens: np.ndarray, linked: np.ndarray, alive: np.ndarray) -> str:
    digest = xxhash.xxh3_128(tokens.data)
    digest.update((linked + 2 * alive.astype(np.uint8)).data)
    return digest.hexdigest()


def chained(linked: np.ndarray, alive: np.ndarray, length: int) -> np.ndarray:
    """Return True where an n-gram of `length` tokens ends."""
    result = alive.copy()
    for back in range(length - 1):
        result[: back + 1] = False
        result[back + 1 :] &= linked[1 : len(linked) - back]
    return result
