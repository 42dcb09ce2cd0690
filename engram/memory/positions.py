"""What recall() finds out about positions before it hashes: document numbers, dead positions and the look-back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engram.addressing import NgramHasher, TokenMap
from engram.config import EngramConfig


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
    """True at the ids (of the model's vocabulary) that the token map gives no class; None if there are none."""
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
    """Combine what the caller gives (see EngramMemory.recall) with the ids that have no class (`unnamed_of`).

    Raises:
        ValueError: shapes that do not match.
    """
    for name, given in (("documents", documents), ("dead", dead)):
        if given is not None and (not isinstance(given, Tensor) or given.shape != ids.shape):
            found = f"{type(given).__name__} {list(getattr(given, 'shape', []))}"
            raise ValueError(f"{name} must be a tensor of the ids' shape {list(ids.shape)}, not {found}")
    NgramHasher.check("ids", ids, ids)
    host, runs = copy_to_host(ids), None  # the caller may reuse its buffers while the ids are still hashed
    dead = None if dead is None else dead.to(ids.device, copy=True)
    if documents is not None:
        documents = documents.to(ids.device)
        changes = documents[:, 1:] != documents[:, :-1]
        runs = torch.nn.functional.pad(changes.cumsum(1), (1, 0))[:, : ids.shape[1]]
    if config.boundary == "dead" and bool((host == -1).any()):
        placeholders = (host == -1).to(ids.device)
        dead = placeholders if dead is None else dead | placeholders
    if (unnamed := unnamed_of(host)) is not None:
        dead = unnamed.to(ids.device) if dead is None else dead | unnamed.to(ids.device)
    if lookback is not None and (unnamed := unnamed_of(lookback)) is not None:
        lookback = lookback.masked_fill(unnamed, -1)
    if dead is not None:
        begins = dead.cumsum(1)  # each begins a run, of which it is padding
        runs = begins if runs is None else runs + begins
        host = host.masked_fill(dead.cpu(), config.pad_id)
        if lookback is not None:  # a dead first position ends the n-grams around it
            lookback = lookback.masked_fill(dead[:, :1].to(lookback.device), -1)
    return Positions(host, lookback, runs, dead)
