"""Find which positions of a forward pass of transformers are not text, and where documents begin, by its arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_PLACEHOLDERS = [f"{kind}_token_{end}" for kind in ("image", "video", "audio") for end in ("id", "index")]
_HIDDEN = -1000.0  # an additive mask hides a key if its value is below this; above it, the value is a bias


def placeholder_ids(config: Any) -> tuple[int, ...]:
    """Return the token ids that a multimodal model replaces by the embeddings of an image, a video or a sound.

    Most configurations name them at the top, some in a part of theirs (Phi-4: vision_config.image_token_id).
    """
    parts = [config, *(part for name in config.sub_configs if (part := getattr(config, name, None)) is not None)]
    ids = (getattr(part, name, None) for part in parts for name in _PLACEHOLDERS)
    return tuple(sorted({i for i in ids if isinstance(i, int)}))


def vocabulary(decoder: Any) -> int:
    """Return the number of ids that a decoder has embeddings for; tokenizers often name fewer."""
    size = getattr(decoder.config.get_text_config(), "vocab_size", None) or 0
    return max(size, getattr(decoder.get_input_embeddings(), "num_embeddings", 0))


def padding(mask: Any, batch: int, time: int, past: int) -> Tensor | None:
    """Return True [B, T] at the positions of this pass that are padding in an attention mask; None if none are.

    Args:
        mask: [B, past + T] with 0 at padding, or longer, with room for later positions, or [B, T] for this pass alone;
            or a mask of pairs [B, 1, T, keys], as `generate` makes it for static caches, in which padding does not
            attend to itself; or a dict of such masks by kind of layer; or None.
        past: number of cached positions before this pass.

    Raises:
        TypeError: a mask that is not a tensor. ValueError: a shape that does not fit the ids, or an empty dict.
    """
    mask = _least_hiding(mask)
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask is {type(mask).__name__}: expected a tensor [batch, time] with 0 at padding")
    if mask.dim() == 2 and mask.shape[0] == batch and mask.shape[1] >= time:
        first = past if past + time <= mask.shape[1] else mask.shape[1] - time
        dead = mask[:, first : first + time] == 0
    elif mask.dim() == 4 and mask.shape[2] == time and mask.shape[3] >= time:
        own = _keys(mask, past).diagonal(dim1=1, dim2=2)
        dead = (~own if own.dtype == torch.bool else own < 0).expand(batch, -1)
    else:
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}, which does not fit ids of {(batch, time)}")
    return dead if bool(dead.any()) else None


def _least_hiding(mask: Any) -> Any:
    """Return the mask; of a dict by kind of layer, the mask that hides the fewest keys."""
    if isinstance(mask, dict):
        if not mask:
            raise ValueError("attention_mask is an empty dict: it needs the mask of each kind of layer")
        return mask["full_attention"] if "full_attention" in mask else next(iter(mask.values()))
    return mask


def _keys(mask: Tensor, past: int) -> Tensor:
    """Return [B, T, T]: the part of a mask of pairs in which this pass attends to its own positions."""
    time, keys = mask.shape[2:]
    first = past if past + time <= keys else keys - time  # a sliding window holds the last keys
    return mask[:, 0, :, first : first + time]


def documents(
    position_ids: Tensor | None, ends: Tensor | None, mask: Any, dead: Tensor | None, batch: int, time: int, past: int
) -> Tensor | None:
    """Return the document numbers [B, T] of a packed batch; None if each sequence is one document.

    Args:
        position_ids: [B or 1, T]; an id that is not above the one before it begins a document. A multimodal model has
            [axes, B, T], of which the first axis counts time.
        ends: cu_seq_lens_q of a batch that was packed into one sequence: 0, then the end of each document.
        mask: as in `padding`. In a mask of pairs, a position that attends to none before it begins a document.
        dead: True [B, T] at positions that are not text. past: number of cached positions before this pass.

    Raises:
        ValueError: shapes that do not fit the ids; a mask in which a position attends to older positions but not to the
        one directly before it, as in a tree of drafts, which has no n-grams.
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
            raise ValueError(f"position_ids have shape {tuple(position_ids.shape)}, the ids {(batch, time)}")
        begins[:, 1:] |= (position_ids[:, 1:] <= position_ids[:, :-1]).cpu()
    if ends is not None:
        if batch != 1 or int(ends[-1]) != time:
            raise ValueError(
                f"cu_seq_lens_q ends at {int(ends[-1])}, which does not fit ids of {(batch, time)}: it describes "
                f"documents packed into one sequence"
            )
        begins[0, ends[:-1].long().cpu()] = True
    mask = _least_hiding(mask)
    if mask is not None and mask.dim() == 4:
        seen = _keys(mask, past)
        seen = (seen if seen.dtype == torch.bool else seen > _HIDDEN).cpu()
        apart = ~seen[:, 1:, :-1].diagonal(dim1=1, dim2=2).expand(batch, -1)
        if dead is not None:
            apart = apart & ~(dead[:, 1:] | dead[:, :-1]).cpu()
        if bool((apart & seen.tril(-1).any(2)[:, 1:]).any()):
            raise ValueError(
                "in attention_mask, a position attends to older positions but not to the one directly before it (a "
                "tree of drafts?): the memory reads n-grams of consecutive positions, so pass one draft per sequence"
            )
        begins[:, 1:] |= apart
    return begins.cumsum(1) if bool(begins[:, 1:].any()) else None
