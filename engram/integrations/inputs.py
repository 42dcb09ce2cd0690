"""What a forward pass of transformers says about its positions: which are no text, and where documents begin."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_PLACEHOLDERS = [f"{kind}_token_{end}" for kind in ("image", "video", "audio") for end in ("id", "index")]


def placeholder_ids(config: Any) -> tuple[int, ...]:
    """Token ids of a multimodal model whose embeddings are replaced by those of an image, a video or a sound."""
    if config.get_text_config() is config:
        return ()
    found = (getattr(config, name, None) for name in _PLACEHOLDERS)
    return tuple(sorted({i for i in found if isinstance(i, int)}))


def padding(mask: Any, batch: int, time: int, past: int) -> Tensor | None:
    """True [B, T] at the positions of this pass that an attention mask calls padding; None where there are none.

    Args:
        mask: [B, past + T] with 0 at padding; or the finished mask(s) [B, 1, T, keys] that `generate` makes for static
            caches, where padding may not attend to itself, alone or as a dict by kind of layer; or None.
        past: positions before these, in a cache.

    Raises:
        TypeError: another kind of mask. ValueError: another shape.
    """
    if isinstance(mask, dict):
        mask = mask["full_attention"] if "full_attention" in mask else next(iter(mask.values()))
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"attention_mask is {type(mask).__name__}: the memory reads tensors [batch, time] with 0 at padding"
        )
    if mask.dim() == 2 and mask.shape[0] == batch and mask.shape[1] >= time:
        dead = mask[:, mask.shape[1] - time :] == 0
    elif mask.dim() == 4 and mask.shape[2] == time and mask.shape[3] >= time:
        first = past if past + time <= mask.shape[3] else mask.shape[3] - time  # a sliding window holds the last keys
        own = mask[:, 0, :, first : first + time].diagonal(dim1=1, dim2=2)
        dead = (~own if own.dtype == torch.bool else own < 0).expand(batch, -1)
    else:
        raise ValueError(f"attention_mask is {tuple(mask.shape)}, which says nothing about ids {(batch, time)}")
    return dead if bool(dead.any()) else None


def documents(position_ids: Tensor | None, batch: int, time: int) -> Tensor | None:
    """Document numbers [B, T] of a packed batch: a position id that does not rise begins a document. None for one.

    Args:
        position_ids: [B or 1, T]; or [axes, B, T] of a multimodal model, whose first axis counts time.
    """
    if position_ids is None or time == 1:
        return None
    if position_ids.dim() == 3:
        position_ids = position_ids[0]
    if position_ids.dim() == 1:
        position_ids = position_ids[None]
    if position_ids.shape[-1] != time or position_ids.shape[0] not in (1, batch):
        raise ValueError(f"position_ids are {tuple(position_ids.shape)}, the ids {(batch, time)}")
    restarts = position_ids[:, 1:] <= position_ids[:, :-1]
    if not bool(restarts.any()):
        return None
    return torch.nn.functional.pad(restarts.cumsum(1), (1, 0)).expand(batch, -1)
