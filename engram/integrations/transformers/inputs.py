"""What a forward pass of transformers says about its positions: which are not text, and where documents begin."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_PLACEHOLDERS = [f"{kind}_token_{end}" for kind in ("image", "video", "audio") for end in ("id", "index")]
_HIDDEN = -1000.0  # a finished mask adds less than this to the scores of the keys it hides, and more as a bias


def placeholder_ids(config: Any) -> tuple[int, ...]:
    """Token ids of a multimodal model whose embeddings are replaced by those of an image, a video or a sound.

    Most configurations name them beside their parts, some within one (Phi-4: vision_config.image_token_id).
    """
    parts = [config, *(part for name in config.sub_configs if (part := getattr(config, name, None)) is not None)]
    found = (getattr(part, name, None) for part in parts for name in _PLACEHOLDERS)
    return tuple(sorted({i for i in found if isinstance(i, int)}))


def vocabulary(decoder: Any) -> int:
    """Return the number of ids that a decoder has embeddings for; tokenizers often name fewer."""
    size = getattr(decoder.config.get_text_config(), "vocab_size", None) or 0
    return max(size, getattr(decoder.get_input_embeddings(), "num_embeddings", 0))


def padding(mask: Any, batch: int, time: int, past: int) -> Tensor | None:
    """True [B, T] at the positions of this pass that an attention mask calls padding; None where there are none.

    Args:
        mask: [B, past + T] with 0 at padding, longer where it has room for what comes later, or [B, T] of these alone;
            or the finished mask(s) [B, 1, T, keys] that `generate` makes for static caches, where padding may not
            attend to itself, alone or as a dict by kind of layer; or None.
        past: positions before these, in a cache.

    Raises:
        TypeError: another kind of mask. ValueError: another shape, or a dict of none.
    """
    mask = _one(mask)
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"attention_mask is {type(mask).__name__}: the memory reads tensors [batch, time] with 0 at padding"
        )
    if mask.dim() == 2 and mask.shape[0] == batch and mask.shape[1] >= time:
        first = past if past + time <= mask.shape[1] else mask.shape[1] - time
        dead = mask[:, first : first + time] == 0
    elif mask.dim() == 4 and mask.shape[2] == time and mask.shape[3] >= time:
        own = _keys(mask, past).diagonal(dim1=1, dim2=2)
        dead = (~own if own.dtype == torch.bool else own < 0).expand(batch, -1)
    else:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, which does not fit ids of {(batch, time)}")
    return dead if bool(dead.any()) else None


def _one(mask: Any) -> Any:
    """Return the mask, of those by kind of layer, that hides least."""
    if isinstance(mask, dict):
        if not mask:
            raise ValueError("attention_mask is an empty dict: it needs the mask of each kind of layer")
        return mask["full_attention"] if "full_attention" in mask else next(iter(mask.values()))
    return mask


def _keys(mask: Tensor, past: int) -> Tensor:
    """[B, T, T]: what a finished mask says of the positions of this pass among themselves."""
    time, keys = mask.shape[2:]
    first = past if past + time <= keys else keys - time  # a sliding window holds the last keys
    return mask[:, 0, :, first : first + time]


def documents(
    position_ids: Tensor | None, ends: Tensor | None, mask: Any, dead: Tensor | None, batch: int, time: int, past: int
) -> Tensor | None:
    """Document numbers [B, T] of a packed batch; None for one document.

    Args:
        position_ids: [B or 1, T], where an id that does not rise begins a document; or [axes, B, T] of a multimodal
            model, whose first axis counts time.
        ends: cu_seq_lens_q of a batch that was packed into one row: 0, then the end of each document.
        mask: as in `padding`. In a finished mask, a position that sees nothing before itself begins a document.
        dead: [B, T], positions that are not text. past: positions before these, in a cache.

    Raises:
        ValueError: shapes that do not fit the ids; a mask that lets a position see older ones, but not the one before
        it, as in a tree of drafts: it has no n-grams.
    """
    if time == 1:
        return None
    begins = torch.zeros(batch, time, dtype=torch.bool, device="cpu")
    if position_ids is not None:
        if position_ids.dim() == 3:
            position_ids = position_ids[0]
        if position_ids.dim() == 1:
            position_ids = position_ids[None]
        if position_ids.shape[-1] != time or position_ids.shape[0] not in (1, batch):
            raise ValueError(f"position_ids are {tuple(position_ids.shape)}, the ids {(batch, time)}")
        begins[:, 1:] |= (position_ids[:, 1:] <= position_ids[:, :-1]).cpu()
    if ends is not None:
        if batch != 1 or int(ends[-1]) != time:
            raise ValueError(f"cu_seq_lens_q ends at {int(ends[-1])}: it packs one row, the ids are {(batch, time)}")
        begins[0, ends[:-1].long().cpu()] = True
    mask = _one(mask)
    if mask is not None and mask.dim() == 4:
        seen = _keys(mask, past)
        seen = (seen if seen.dtype == torch.bool else seen > _HIDDEN).cpu()
        apart = ~seen[:, 1:, :-1].diagonal(dim1=1, dim2=2).expand(batch, -1)
        if dead is not None:
            apart = apart & ~(dead[:, 1:] | dead[:, :-1]).cpu()
        if bool((apart & seen.tril(-1).any(2)[:, 1:]).any()):
            raise ValueError(
                "attention_mask hides the position before from one that sees older ones (a tree of drafts?): the "
                "memory reads n-grams of consecutive positions"
            )
        begins[:, 1:] |= apart
    return begins.cumsum(1) if bool(begins[:, 1:].any()) else None
