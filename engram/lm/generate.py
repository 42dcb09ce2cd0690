"""Sampling text, one token at a time, with cached keys, values and memory state."""

from __future__ import annotations

import torch
from torch import Tensor

from engram.lm.transformer import Cache, Transformer


@torch.no_grad()
def generate(
    model: Transformer,
    ids: Tensor,
    tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    stop_id: int | None = None,
) -> Tensor:
    """Continues a prompt.

    Args:
        ids: int64 [B, T] prompt, T >= 1. tokens: how many to add at most.
        temperature: 0 takes the likeliest token. top_k: sample among the k likeliest. seed: of the sampling.
        stop_id: end when every sequence has produced this token (later tokens of a finished one repeat it).

    Returns:
        int64 [B, T + added].

    Raises:
        ValueError: an empty prompt, or more tokens than the model's max_length holds.
    """
    if ids.dim() != 2 or ids.shape[1] == 0:
        raise ValueError(f"the prompt must be [batch, time] with time >= 1, not {tuple(ids.shape)}")
    if ids.shape[1] + tokens > model.config.max_length:
        raise ValueError(
            f"{ids.shape[1]} prompt tokens + {tokens} new ones exceed the model's max_length {model.config.max_length}"
        )
    model.eval()
    generator = torch.Generator(ids.device).manual_seed(seed)
    cache, piece = Cache(), ids
    finished = torch.zeros(ids.shape[0], 1, dtype=torch.bool, device=ids.device)
    for _ in range(tokens):
        logits = model(piece, cache=cache)[:, -1].float()
        if temperature == 0:
            piece = logits.argmax(-1, keepdim=True)
        else:
            logits = logits / temperature
            if top_k is not None:
                floor = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < floor, -torch.inf)
            piece = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        if stop_id is not None:
            piece = piece.masked_fill(finished, stop_id)
            finished |= piece == stop_id
        ids = torch.cat([ids, piece], dim=1)
        if stop_id is not None and finished.all():
            break
    return ids
