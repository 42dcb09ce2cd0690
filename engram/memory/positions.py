"""Document numbers, dead positions and the look-back of the ids that a recall hashes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engram.addressing import NgramHasher, TokenMap
from engram.config import EngramConfig
from engram.memory.cache import Extension, MemoryCache


@dataclass
class Positions:
    """ids: [B, T] on the CPU, pad_id at dead positions. lookback: [B, <= N-1] ids before them, -1 where an n-gram ends.
    documents: [B, T] numbers that change where a document or a dead position begins; dead: [B, T], True at dead
    positions. Both lie on the device of the caller's ids, and are None if there are none."""

    ids: Tensor
    lookback: Tensor | None
    documents: Tensor | None
    dead: Tensor | None


def copy_to_host(ids: Tensor) -> Tensor:
    """Return a copy on the CPU, in memory of its own."""
    return ids.to("cpu", copy=True)


def unnamed(ids: Tensor, token_map: TokenMap, vocab_size: int) -> Tensor | None:
    """Return True at the ids (of the model's vocabulary) that the token map gives no class; None if there are none."""
    known = len(token_map.table)
    if vocab_size <= known and not token_map.has_dead:
        return None
    result = (ids >= known) & (ids < vocab_size)
    if token_map.has_dead:
        result |= (token_map.mark_dead(ids) < 0) & (ids >= 0)
    return result if bool(result.any()) else None


def locate(
    ids: Tensor,
    documents: Tensor | None,
    lookback: Tensor | None,
    dead: Tensor | None,
    config: EngramConfig,
    unnamed_of: Callable[[Tensor], Tensor | None],
) -> Positions:
    """Combine the arguments of EngramMemory.recall with the ids that have no class (`unnamed_of`).

    Raises:
        ValueError: shapes that do not match.
    """
    for name, argument in (("documents", documents), ("dead", dead)):
        if argument is not None and (not isinstance(argument, Tensor) or argument.shape != ids.shape):
            actual = f"{type(argument).__name__} {list(getattr(argument, 'shape', []))}"
            raise ValueError(f"{name} must be a tensor of the ids' shape {list(ids.shape)}, not {actual}")
    NgramHasher.check("ids", ids, ids)
    host, numbers = copy_to_host(ids), None  # the caller may reuse its buffers while the ids are still hashed
    dead = None if dead is None else dead.to(ids.device, copy=True)
    if documents is not None:
        documents = documents.to(ids.device)
        changes = documents[:, 1:] != documents[:, :-1]
        numbers = torch.nn.functional.pad(changes.cumsum(1), (1, 0))[:, : ids.shape[1]]
    if config.boundary == "dead" and bool((host == -1).any()):
        placeholders = (host == -1).to(ids.device)
        dead = placeholders if dead is None else dead | placeholders
    if (unnamed := unnamed_of(host)) is not None:
        dead = unnamed.to(ids.device) if dead is None else dead | unnamed.to(ids.device)
    if lookback is not None and (unnamed := unnamed_of(lookback)) is not None:
        lookback = lookback.masked_fill(unnamed, -1)
    if dead is not None:
        begins = dead.cumsum(1)  # each dead position begins a document, in which it is padding
        numbers = begins if numbers is None else numbers + begins
        host = host.masked_fill(dead.cpu(), config.pad_id)
        if lookback is not None:  # a dead first position ends the n-grams around it
            lookback = lookback.masked_fill(dead[:, :1].to(lookback.device), -1)
    return Positions(host, None if lookback is None else copy_to_host(lookback), numbers, dead)


def after_cache(
    at: Positions, cache: MemoryCache, config: EngramConfig, hasher: Any, lag: int, device: torch.device
) -> tuple[Positions, Extension]:
    """Return the positions with the look-back of a decoding cache, and the piece of text to store in the cache.

    Raises:
        IndexError, ValueError: ids that the hasher refuses; another number of sequences than the cache holds.
    """
    ids = at.ids
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < len(hasher.token_map.table):
        hasher(ids)  # raises: ids that are refused must not enter the cache
    marked = ids if at.dead is None else ids.masked_fill(at.dead.cpu(), -1)
    documents = None if at.documents is None else at.documents.cpu()
    piece = cache.prepare(marked, documents, config.orders[-1] - 1, lag)
    documents = None if piece.documents is None else piece.documents.to(device)
    return Positions(ids, piece.lookback, documents, at.dead), piece
