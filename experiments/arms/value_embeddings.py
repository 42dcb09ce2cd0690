"""value-embeddings: each layer adds a row of the current token to its attention values, as in public speed runs of
small GPTs (modded-nanogpt) after value residual learning (arXiv 2410.17897).

The table is exact: V rows of the hidden size in each layer, V * d * layers values in all. Wider rows behind a
projection would hold no more. It is usually less than Engram's table; `tables` reports it.

Differs from the source: rows start at zero, so there is no learned mixing scalar, and every layer has its own table.
"""

from __future__ import annotations

from engram import EngramMemory
from engram.lm.run import Data, Setting
from engram.lm.transformer import Transformer
from experiments.arms.host import raw_ids, vocabulary, with_memory
from experiments.arms.rows import TokenAddress, added, row_config, row_tables


def build(setting: Setting, data: Data) -> Transformer:
    d, V = setting.model.hidden_size, vocabulary(data)
    layers = tuple(range(setting.model.layers))
    config = row_config(setting, layers=layers, orders=(2,), heads=1, head_dim=d, rows_per_head=1, inject="values")

    def memory() -> EngramMemory:
        ids = raw_ids(data)
        parts = {"tables": row_tables(config, V), "hasher": TokenAddress(layers, ids), "fusions": added(config)}
        return EngramMemory(config, ids, d, **parts)

    return with_memory(setting, data, memory)


ARMS = {"value-embeddings": build}
