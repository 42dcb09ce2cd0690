"""Digests of a memory's fusion weights: the state of an optimizer records the weights that it was saved beside."""

from __future__ import annotations

import torch
import xxhash
from torch import nn

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weight_digests(fusions: nn.Module) -> dict[str, str]:
    """Return digests of the fusion weights in each dtype that they may be cast to before the state is loaded again."""
    return {str(dtype).removeprefix("torch."): _digest(fusions, dtype) for dtype in _DTYPES}


def match_weights(fusions: nn.Module, saved: str | dict[str, str]) -> bool:
    """Return True if a state saved beside weights of these digests belongs to the current weights."""
    if isinstance(saved, str):  # earlier versions wrote one digest, without a cast
        return saved in ("", _digest(fusions))
    dtypes = {weight.dtype for weight in fusions.parameters()}
    dtype = next((dtype for dtype in _DTYPES[1:] if dtype in dtypes), torch.float32)
    return saved.get(str(dtype).removeprefix("torch.")) == _digest(fusions, dtype)


def _digest(fusions: nn.Module, dtype: torch.dtype | None = None) -> str:
    """Return the digest of the bits of the weights in a dtype (default: their own), 16 hex digits."""
    digest = xxhash.xxh3_64()
    for weight in fusions.parameters():
        values = weight.detach().cpu().to(dtype or weight.dtype).flatten()
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
