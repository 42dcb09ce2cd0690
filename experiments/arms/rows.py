"""Parts for arms that keep rows in a table: other addresses, or no fusion, as arguments of EngramMemory.

Such arms get what Engram's rows get: a HostTable, row-sparse updates with their own learning rate, prefetching.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from engram import EngramConfig, HostTable, TokenMap
from engram.fusion import EngramFusion
from engram.lm.run import Setting


def row_config(setting: Setting, **changes: Any) -> EngramConfig:
    """Return the setting's memory as bare rows: no gate, no convolution, rows that start at zero and learn."""
    bare = dict(hash="multiply_xor", gate="none", conv_kernel=0, inject="residual", table_init="zero")
    return setting.memory.replace(**{**bare, "train_tables": True, "compressed_vocab": None, **changes})


class Added(nn.Module):
    """A fusion without weights: the rows themselves are the update."""

    def forward(
        self, rows_BTE: Tensor, hidden: Tensor, documents: Any = None, history: Any = None, dead: Any = None
    ) -> tuple[Tensor, None]:
        return rows_BTE.to(hidden.dtype), None


class TokenAddress:
    """Address the row of each token id, in every layer: a token embedding. Called like an NgramHasher."""

    def __init__(self, layers: tuple[int, ...], token_map: TokenMap):
        self.layers, self.token_map = layers, token_map

    def __call__(self, ids: Tensor, lookback: Tensor | None = None, documents: Any = None) -> dict[int, Tensor]:
        return dict.fromkeys(self.layers, self.token_map(ids.long()).unsqueeze(-1))


def added(config: EngramConfig) -> dict[int, nn.Module]:
    """Return {layer: Added()} for EngramMemory(fusions=)."""
    return {layer: Added() for layer in config.layers}


def make_fusions(config: EngramConfig, hidden_size: int, make: Callable[[], nn.Module]) -> dict[int, nn.Module]:
    """Return {layer: make()} for EngramMemory(fusions=).

    The random numbers for the weights of Engram's own fusions are drawn first and dropped: the committed results of
    these arms start from the numbers that follow.
    """
    for _ in config.layers:
        EngramFusion(config, hidden_size)
    return {layer: make() for layer in config.layers}


def row_tables(config: EngramConfig, rows: int) -> dict[int, HostTable]:
    """Return a table of `rows` rows per layer for EngramMemory(tables=), whose hasher decides what each row is for."""
    dtype = getattr(torch, config.table_dtype)
    return {layer: HostTable(rows, config.head_dim, dtype) for layer in config.layers}
