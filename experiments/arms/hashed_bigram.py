"""hashed-bigram: one hashed bigram row, as wide as the hidden state, added before every block. No gate, no convolution,
no projection: the cheapest n-gram memory, known from public speed runs of small GPTs.

Matched: all layers' tables together have as many values as Engram's. Each layer has its own table and hash multipliers.
Differs from the usual version: rows start at zero and have no learned scale. Raw token ids, as usual.
"""

from __future__ import annotations

from engram import EngramMemory
from engram.lm.run import Data, Setting
from engram.lm.transformer import Transformer
from experiments.arms.host import engram_size, raw_ids, with_memory
from experiments.arms.rows import added, row_config


def build(setting: Setting, data: Data) -> Transformer:
    d, layers = setting.model.hidden_size, setting.model.layers
    rows = max(1, engram_size(setting, data).table // (layers * d))
    config = row_config(setting, layers=range(layers), orders=(2,), heads=1, head_dim=d, rows_per_head=rows)
    return with_memory(setting, data, lambda: EngramMemory(config, raw_ids(data), d, fusions=added(config)))


ARMS = {"hashed-bigram": build}
