"""shuffled: Engram whose addresses come from another text. A control for what the right address is worth.

In training, each window reads the rows of the window before it in the batch (a roll over the batch dimension; the batch
is a random draw of windows, so the neighbour is unrelated to this text). Rows are looked up as often as in Engram
and with the same duplicates, and the gate sees this text, but no row belongs to its n-grams.

A roll would not work at evaluation: evaluate() puts the windows of one long document side by side, so a neighbour could
be the text that follows, and a batch may hold one window only. There, row b of any batch reads the addresses of a fixed
piece of the training text. They depend on the position alone, never on the ids, so nothing can leak from later tokens,
and decoding step by step agrees with the full forward pass. A hasher sees ids and not positions, so recall() is
replaced.

Matched to engram in everything: table, weights, rows read. Source: none; the control is our own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engram import EngramConfig, EngramMemory, TokenMap
from engram.lm.run import Data, Setting
from engram.lm.tokenizer import Encoded
from engram.lm.transformer import Transformer
from engram.memory.recall import MemoryCache, Recall
from experiments.arms.host import with_memory

_STRIDE = 7919  # tokens of the training text between the pieces that two rows of a batch read


class ShuffledMemory(EngramMemory):
    """An EngramMemory that looks up the n-grams of another text. stream: the training text."""

    def __init__(self, config: EngramConfig, token_map: TokenMap, hidden_size: int, stream: Encoded):
        super().__init__(config, token_map, hidden_size)
        self.stream = stream

    def recall(
        self,
        ids: Tensor,
        documents: Tensor | None = None,
        lookback: Tensor | None = None,
        cache: MemoryCache | None = None,
        dead: Tensor | None = None,
    ) -> Recall:
        if dead is not None:
            raise ValueError("the shuffled control reads another text, in which these positions are not dead")
        if lookback is not None:
            raise ValueError("the shuffled control reads another text, to which these lookback ids do not belong")
        if self.training and ids.shape[0] > 1:
            return super().recall(ids.roll(1, 0), None if documents is None else documents.roll(1, 0), cache=cache)
        B, T = ids.shape
        start = 0 if cache is None else cache.length
        at = (torch.arange(B)[:, None] * _STRIDE + start + torch.arange(T)) % len(self.stream.ids)
        foreign = torch.from_numpy(self.stream.ids)[at].long().to(ids.device)
        if documents is not None:
            documents = torch.from_numpy(self.stream.documents)[at].long().to(ids.device)
        return super().recall(foreign, documents, cache=cache)


def build(setting: Setting, data: Data) -> Transformer:
    return with_memory(
        setting,
        data,
        lambda: ShuffledMemory(setting.memory, data.token_map, setting.model.hidden_size, data.train),
    )


ARMS = {"shuffled": build}
