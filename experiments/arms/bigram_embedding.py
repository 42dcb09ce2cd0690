"""bigram-embedding: an exact bigram nn.Embedding, added to the token embedding. Without a hash, there is no collision.

An embedding of all V * V bigrams whose rows start at zero and are updated only when used holds nothing but zeros
outside the bigrams of the training text. So only these get a row, and one row that is never trained stands for all
others: the outputs are those of the full table. The first token of a document or window is paired with the pad id.

Matched: nothing. The row width is the hidden size, as nn.Embedding at the input has, and the table has as many rows as
the training text has bigrams; `tables` reports it, extra_facts the size that the full table would have.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram import EngramMemory, TokenMap
from engram.lm.run import Data, Setting
from engram.lm.tokenizer import Encoded
from engram.lm.transformer import Transformer
from experiments.arms.host import raw_ids, vocabulary, with_memory
from experiments.arms.rows import added, row_config, row_tables


class BigramAddress:
    """Address (id before, id) in a list of known bigrams; the row after the last is that of all unknown ones.

    Called like an NgramHasher. train: the text whose bigrams have rows. pad: the raw id read before the start of a
    text.
    """

    def __init__(self, train: Encoded, pad: int, token_map: TokenMap):
        self.token_map, self.pad = token_map, pad
        self.vocab = len(token_map.table)
        ids = train.ids.astype(np.int64)
        inside = train.documents[1:] == train.documents[:-1]
        bigrams = ids[:-1][inside] * self.vocab + ids[1:][inside]
        first = np.int64(pad) * self.vocab + np.arange(self.vocab)  # any token may be the first of a window
        self.keys = torch.from_numpy(np.unique(np.concatenate([bigrams, first])))
        self.rows = len(self.keys) + 1

    def __call__(
        self, ids: Tensor, lookback: Tensor | None = None, documents: Tensor | None = None
    ) -> dict[int, Tensor]:
        ids = self.token_map(ids.long())  # checks the range
        before = torch.full_like(ids, self.pad)
        before[:, 1:] = ids[:, :-1]
        if lookback is not None and lookback.shape[1]:
            before[:, 0] = lookback[:, -1]
        if documents is not None:
            before[:, 1:][documents[:, 1:] != documents[:, :-1]] = self.pad
        bigrams = before * self.vocab + ids
        row = torch.searchsorted(self.keys, bigrams).clamp_(max=len(self.keys) - 1)
        return {0: torch.where(self.keys[row] == bigrams, row, self.rows - 1).unsqueeze(-1)}


def build(setting: Setting, data: Data) -> Transformer:
    d = setting.model.hidden_size
    config = row_config(setting, layers=(0,), orders=(2,), heads=1, head_dim=d, rows_per_head=1)
    ids = raw_ids(data)
    address = BigramAddress(data.train, config.pad_id, ids)

    def memory() -> EngramMemory:
        tables = row_tables(config, address.rows)
        return EngramMemory(config, ids, d, tables=tables, hasher=address, fusions=added(config))

    model = with_memory(setting, data, memory)
    facts: dict[str, Any] = {"bigrams": address.rows - 1, "full_table_parameters": vocabulary(data) ** 2 * d}
    model.extra_facts = facts
    return model


ARMS = {"bigram-embedding": build}
