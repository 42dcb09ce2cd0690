"""layer-embeddings: a row of the current token for every layer, gated by the hidden state, as the per-layer embeddings
of Gemma 3n.

    y = W_up (GELU(W_gate norm(h)) * row),   h += y before the block

Matched: the row width is chosen so that all rows together have as many values as Engram's table. The dense weights of
gate and projection come on top and are counted as such. Differs from the source: the update is before the block instead
of behind it, where Engram's is; no norm behind the projection and no term from the token embedding, so that rows of
zero leave the plain model unchanged.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from engram import EngramMemory
from engram.lm.run import Data, Setting
from engram.lm.transformer import Transformer
from experiments.arms.host import engram_size, raw_ids, residual_std, vocabulary, with_memory
from experiments.arms.rows import TokenAddress, make_fusions, row_config, row_tables


class GatedRow(nn.Module):
    """Gate and projection of one layer around a row of `width` values."""

    def __init__(self, hidden_size: int, width: int, std: float):
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.gate = nn.Linear(hidden_size, width, bias=False)
        self.up = nn.Linear(width, hidden_size, bias=False)
        nn.init.normal_(self.gate.weight, std=0.02)
        nn.init.normal_(self.up.weight, std=std)

    def forward(
        self, rows_BTE: Tensor, hidden: Tensor, documents: Any = None, history: Any = None, dead: Any = None
    ) -> tuple[Tensor, None]:
        gate = F.gelu(self.gate(self.norm(hidden)), approximate="tanh")
        return self.up(gate * rows_BTE.to(gate.dtype)), None


def build(setting: Setting, data: Data) -> Transformer:
    d, V = setting.model.hidden_size, vocabulary(data)
    layers = tuple(range(setting.model.layers))
    width = max(1, min(16_384, round(engram_size(setting, data).table / (V * len(layers)))))
    config = row_config(setting, layers=layers, orders=(2,), heads=1, head_dim=width, rows_per_head=1)

    def memory() -> EngramMemory:
        ids = raw_ids(data)
        fusions = make_fusions(config, d, lambda: GatedRow(d, width, residual_std(len(layers))))
        tables = row_tables(config, V)
        return EngramMemory(config, ids, d, tables=tables, hasher=TokenAddress(layers, ids), fusions=fusions)

    return with_memory(setting, data, memory)


ARMS = {"layer-embeddings": build}
