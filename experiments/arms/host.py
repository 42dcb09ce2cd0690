"""Parts that the arms share: the backbone with the same weights under every arm, and the sizes that arms are matched
to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from engram.addressing import TokenMap
from engram.fusion import EngramFusion
from engram.lm.run import Data, Setting, build_model
from engram.lm.transformer import Transformer
from engram.memory import EngramMemory, hash_layout


class Size(NamedTuple):
    """Sizes that the arm "engram" adds to the plain model.

    Attributes:
        rows: table rows, all layers. table: values in them (P). bytes: of them as stored.
        module: dense weights of the fusion modules. flops: of these, per token, forward.
    """

    rows: int
    table: int
    bytes: int
    module: int
    flops: int


def plain(setting: Setting, data: Data) -> Transformer:
    """Return the decoder alone. Arms that change a part of it replace that part here, so all other weights start the
    same."""
    return build_model(setting, "plain", data.token_map)


def with_memory(setting: Setting, data: Data, make: Callable[[], EngramMemory]) -> Transformer:
    """Return the decoder with the memory that `make` builds, seeded like engram.lm.run.build_model."""
    seed_extras(setting)
    memory = make()
    torch.manual_seed(setting.train.seed)
    return Transformer(replace(setting.model, vocab_size=vocabulary(data)), memory)


def seed_extras(setting: Setting) -> None:
    """Seed the generator for weights that plain does not have; plain's own come from the seed itself."""
    torch.manual_seed(setting.train.seed + 1_000_003)


def vocabulary(data: Data) -> int:
    return len(data.token_map.table)


def raw_ids(data: Data) -> TokenMap:
    """Return the token map that changes nothing: for arms whose source hashes raw token ids."""
    return TokenMap.identity(vocabulary(data))


def engram_size(setting: Setting, data: Data) -> Size:
    """Return the sizes of the memory of `setting`, without building its tables."""
    memory = setting.memory
    layout = hash_layout(memory, data.token_map)
    with torch.device("meta"):
        module = count(EngramFusion(memory, setting.model.hidden_size)) * len(memory.layers)
    rows = sum(layout.rows.values())
    values = rows * memory.head_dim
    return Size(rows, values, values * getattr(torch, memory.table_dtype).itemsize, module, 2 * module)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def ffn_shape(setting: Setting) -> tuple[int, int]:
    """Return (inner width of the plain feed-forward layer, weights per unit of that width)."""
    d, gated = setting.model.hidden_size, setting.model.ffn == "swiglu"
    return setting.model.ffn_size or (8 * d // 3 if gated else 4 * d), (3 if gated else 2) * d


def block_flops(setting: Setting) -> int:
    """Return the FLOPs of one plain block per token, forward: two per weight, and attention over half the context on
    average."""
    d = setting.model.hidden_size
    inner, unit = ffn_shape(setting)
    return 2 * (4 * d * d + inner * unit) + 2 * d * setting.train.context


def residual_std(layers: int) -> float:
    """Return the standard deviation of weights that write into the residual stream, as in Transformer."""
    return 0.02 / math.sqrt(2 * layers)
