"""Sample text, one token at a time, with cached keys, values and memory state."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from engram.lm.evaluate import eval_mode
from engram.lm.tokenizer import token_ids
from engram.lm.transformer import Cache, Transformer


@torch.no_grad()
def generate(
    model: Transformer,
    ids: Any,
    tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    stop_id: int | None = None,
    prefill: int = 512,
    prefetch: bool = True,
    on_token: Callable[[int], Any] | None = None,
) -> Tensor:
    """Continue a prompt.

    Args:
        ids: prompt [B, T] or [T], T >= 1, as integer tensor, array or lists, or what a tokenizer returns.
        tokens: how many to add at most.
        temperature: 0 takes the likeliest token.
        top_k: sample among the k likeliest.
        seed: seed of the sampling.
        stop_id: end when every sequence has produced this token (later tokens of a finished one repeat it).
        prefill: number of prompt tokens per forward pass.
        prefetch: fetch the rows of the next piece while the model works on the current one; the same bits either way.
        on_token: called with the number of tokens added so far, after each.

    Returns:
        int64 [B, T + added], on the model's device.

    Raises:
        TypeError: ids are not integers. ValueError: the prompt is empty or padded, prompt and new tokens exceed the
        model's max_length, or a number is out of its range.

    Example:
        >>> import engram
        >>> model = engram.Transformer(engram.TransformerConfig(64, hidden_size=32, layers=2, heads=2))
        >>> engram.generate(model, [1, 2, 3], tokens=5, temperature=0).shape  # the prompt and five more
        torch.Size([1, 8])
    """
    if tokens < 0 or not 0 <= temperature < math.inf or min(prefill, 1 if top_k is None else top_k) < 1:
        raise ValueError(f"{tokens=} and {temperature=} must be 0 or more, {prefill=} and {top_k=} must be 1 or more")
    if isinstance(ids, Mapping) and not bool((torch.as_tensor(ids.get("attention_mask", 1)) != 0).all()):
        raise ValueError("the prompts are padded (attention_mask 0): generate() takes prompts of one length")
    ids = token_ids(ids).to(model.embedding.weight.device)
    if ids.shape[1] == 0:
        raise ValueError(f"the prompt must be [batch, time] with time >= 1, not {tuple(ids.shape)}")
    if ids.shape[1] + tokens > model.config.max_length:
        raise ValueError(
            f"{ids.shape[1]} prompt tokens + {tokens} new ones exceed the model's max_length {model.config.max_length}"
        )
    with eval_mode(model):
        generator = torch.Generator(ids.device).manual_seed(seed)
        cache = Cache()
        logits = _prefill(model, ids, cache, prefill, prefetch)
        finished = torch.zeros(ids.shape[0], 1, dtype=torch.bool, device=ids.device)
        for step in range(tokens):
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
            if on_token is not None:
                on_token(step + 1)
            if (stop_id is not None and finished.all()) or step == tokens - 1:
                break
            logits = model(piece, cache=cache)[:, -1].float()  # this starts by fetching the new token's rows
    return ids


def _prefill(model: Transformer, ids: Tensor, cache: Cache, size: int, prefetch: bool) -> Tensor:
    """Run the prompt through the model, and return the logits [B, vocab] of its last position."""
    pieces, memory = ids.split(size, dim=1), model.memory
    recall = None
    for piece, following in zip(pieces, [*pieces[1:], None], strict=True):
        if memory is not None and prefetch:
            current = recall or memory.recall(piece, cache=cache.memory)
            recall = None if following is None else memory.recall(following, cache=cache.memory)
            logits = model(piece, cache=cache, recall=current)
        else:
            logits = model(piece, cache=cache)
    return logits[:, -1].float()
