"""Arms without any lookup: plain, longer, larger-vocabulary, wider, deeper.

plain               the decoder alone.
longer              plain; sceptic/configs.py gives it as many tokens as fill Engram's wall-clock time.
larger-vocabulary   plain; sceptic/configs.py takes a text with vocabulary_for(setting) entries: the extra rows of
                    embedding and head take the bytes of Engram's table, as far as the text allows. Compare in bits
                    per byte.
wider               the feed-forward layers are widened until total parameters equal Engram's, table included. FLOPs
                    grow as much: this is what the parameters would do if they were not looked up.
deeper              as many more blocks as it takes to reach Engram's FLOPs per token or just above.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import nn

from engram.lm.run import Data, Setting
from engram.lm.transformer import Block, FeedForward, Transformer
from experiments.arms.host import block_flops, engram_size, ffn_shape, plain, residual_std, seed_extras

LARGEST_VOCABULARY = 32_768  # the most that 14 MB of text support: every merge was seen more than a few times


def wider(setting: Setting, data: Data) -> Transformer:
    """Return plain with wider feed-forward layers: total parameters equal engram's to within one unit of
    inner width."""
    model, size = plain(setting, data), engram_size(setting, data)
    inner, unit = ffn_shape(setting)
    width = inner + round((size.table + size.module) / (setting.model.layers * unit))
    model.config = replace(model.config, ffn_size=width)
    seed_extras(setting)
    for block in model.blocks:
        ffn = FeedForward(model.config)
        nn.init.normal_(ffn.up.weight, std=0.02)
        # the sum over more units starts as large as plain's
        nn.init.normal_(ffn.down.weight, std=residual_std(setting.model.layers) * math.sqrt(inner / width))
        block.ffn = ffn
    model.extra_facts = {"ffn_size": width}
    return model


def deeper(setting: Setting, data: Data) -> Transformer:
    """Return plain with more blocks behind its own, which keep their weights."""
    model, size = plain(setting, data), engram_size(setting, data)
    extra = math.ceil(size.flops / block_flops(setting))
    first = setting.model.layers
    model.config = replace(model.config, layers=first + extra)
    seed_extras(setting)
    for layer in range(first, first + extra):
        block = Block(model.config, layer)
        block.apply(Transformer._init)
        for weight in (block.attention.out.weight, block.ffn.down.weight):
            nn.init.normal_(weight, std=residual_std(first + extra))
        model.blocks.append(block)
    above = extra * block_flops(setting) - size.flops
    model.extra_facts = {"layers": first + extra, "forward_flops_above_engram": above}
    return model


def vocabulary_for(setting: Setting) -> int:
    """Return the entries of a vocabulary whose rows, beyond setting.vocab_size, take the bytes of Engram's table; at
    most LARGEST_VOCABULARY, above which the corpora of this project leave most entries untrained."""
    memory, model = setting.memory, setting.model
    stored = len(memory.layers) * sum(memory.row_counts) * memory.heads * memory.head_dim
    stored *= getattr(torch, memory.table_dtype).itemsize
    row = model.hidden_size * 4 * (1 if model.tie_embeddings else 2)
    return min(setting.vocab_size + stored // row, LARGEST_VOCABULARY)


ARMS = {"plain": plain, "longer": plain, "larger-vocabulary": plain, "wider": wider, "deeper": deeper}
