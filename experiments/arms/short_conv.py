"""short-conv: what reading the last few positions is worth without any table.

At the layers where Engram is (everywhere=True: at all, as in its sources), h_t += sum over lags 0..3 of w_lag *
norm(h)_{t - lag}, one weight per channel and lag, zero at the start: the depthwise causal convolution of H3 (arXiv
2212.14052) and of the Canon layers, added to the residual stream as Engram's update is. Matched: layers and reach
(Engram's longest n-gram and its convolution see further back through a dilation); no table, 4 d weights per layer. Like
attention, and unlike Engram, it sees across documents.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram.lm.run import Data, Setting
from engram.lm.transformer import Block, Cache, Transformer
from experiments.arms.host import plain

TAPS = 4


class ConvThenBlock(nn.Module):
    """A block with a short convolution before it; called as the block is."""

    def __init__(self, block: Block, hidden_size: int):
        super().__init__()
        self.block = block
        self.conv_norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.conv_weight = nn.Parameter(torch.zeros(hidden_size, TAPS))  # [.., i]: lag i

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], extra: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        T = x.shape[1]
        past = self.conv_norm(x)
        if cache is not None:  # kept beside the block's keys, under a layer number that no block has
            seen = past.unsqueeze(1)
            past = cache.append(-1 - self.block.layer, seen, seen[..., :0])[0].squeeze(1)
        past = F.pad(past, (0, 0, TAPS - 1, 0))
        stop = past.shape[1]
        y = sum(past[:, stop - T - lag : stop - lag] * self.conv_weight[:, lag] for lag in range(TAPS))
        return self.block(x + y, rope, extra, cache)


def build(setting: Setting, data: Data, *, everywhere: bool = False) -> Transformer:
    model = plain(setting, data)
    for layer in range(setting.model.layers) if everywhere else setting.memory.layers:
        model.blocks[layer] = ConvThenBlock(model.blocks[layer], setting.model.hidden_size)
    return model


ARMS = {"short-conv": build}
