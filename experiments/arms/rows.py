"""RowMemory: an EngramMemory with other addresses or without the fusion module, for arms that keep rows in a table.

Such arms get what Engram's rows get: a HostTable, row-sparse updates with their own learning rate, prefetching.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from engram import EngramConfig, EngramMemory, HostTable, TokenMap
from engram.lm.run import Setting


def row_config(setting: Setting, **changes: Any) -> EngramConfig:
    """The setting's memory as bare rows: no gate, no convolution, rows that start at zero and learn."""
    bare = dict(hash="multiply_xor", gate="none", conv_kernel=0, inject="residual", table_init="zero")
    return setting.memory.replace(**{**bare, "train_tables": True, "compressed_vocab": None, **changes})


class Added(nn.Module):
    """A fusion that is none: the rows are what is added."""

    def forward(
        self, rows_BTE: Tensor, hidden: Tensor, documents: Any = None, history: Any = None, dead: Any = None
    ) -> tuple[Tensor, None]:
        return rows_BTE.to(hidden.dtype), None


class TokenAddress:
    """Row = token id, in every layer: a token embedding. Called like an NgramHasher."""

    def __init__(self, layers: tuple[int, ...], token_map: TokenMap):
        self.layers, self.token_map = layers, token_map

    def __call__(self, ids: Tensor, lookback: Tensor | None = None, documents: Any = None) -> dict[int, Tensor]:
        return dict.fromkeys(self.layers, self.token_map(ids.long()).unsqueeze(-1))


class RowMemory(EngramMemory):
    """A memory whose parts are given.

    Args:
        config: layers, head_dim, inject; with the default addresses also orders, heads and rows_per_head.
        fusion: makes one layer's module, called as EngramFusion is.
        address: ids -> {layer: row ids int64 [B, T, C]} instead of the n-gram hash; rows: of each layer's table then.
    """

    def __init__(
        self,
        config: EngramConfig,
        token_map: TokenMap,
        hidden_size: int,
        fusion: Callable[[], nn.Module] = Added,
        address: Any = None,
        rows: int = 0,
    ):
        super().__init__(config if rows == 0 else config.replace(rows_per_head=1), token_map, hidden_size)
        self.fusions = nn.ModuleDict({str(layer): fusion() for layer in config.layers})
        if rows:
            self.close()
            dtype = getattr(torch, config.table_dtype)
            self.tables = {layer: HostTable(rows, config.head_dim, dtype) for layer in config.layers}
        if address is not None:
            self.hasher = address
