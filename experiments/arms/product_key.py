"""product-key: a product-key memory (arXiv 1907.05242) at Engram's layers. The address comes from the hidden state, not
from the token ids: the comparison shows what addresses that need no model are worth.

A query of each head is cut in two; each half is compared with n sub-keys, the top k of both halves give k * k
candidates among the n * n products, the best k of these are read, weighted by softmax, and projected to the hidden
size.

Matched: n * n rows per layer, the nearest square to Engram's rows, of Engram's row width: as many rows and values.
Reads more rows per token (heads * top_k) and costs more FLOPs (queries, sub-keys). Differs from the source: added
before the block instead of replacing a feed-forward layer; values are as narrow as Engram's rows and each head's sum is
projected, instead of values as wide as the hidden state summed over heads; values start at zero. norm="batch"
normalises queries as the source does, over the positions of a training batch (at evaluation by the statistics of
training, so that no token sees what follows it); norm="rms" normalises each position by itself.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram import EngramMemory, TokenMap
from engram.lm.run import Data, Setting
from engram.lm.transformer import Transformer
from experiments.arms.host import engram_size, raw_ids, with_memory
from experiments.arms.rows import make_fusions, row_config, row_tables

_NOTHING_AHEAD: Any = object()  # rows depend on the hidden state: nothing can be fetched before the layer runs


class ProductKeys(nn.Module):
    """The choice of rows by a hidden state, and the update made of them.

    n: sub-keys per half, so n * n rows. value: width of a row. Query and keys are half as wide as the hidden state.
    norm: "rms" or "batch".
    """

    def __init__(self, hidden_size: int, n: int, value: int, heads: int, top_k: int, norm: str = "rms"):
        super().__init__()
        self.n, self.heads, self.top_k, half = n, heads, min(top_k, n), max(1, hidden_size // 4)
        if norm not in ("rms", "batch"):
            raise ValueError(f'norm is "rms" or "batch", not {norm!r}')
        self.batch_norm = nn.BatchNorm1d(heads * 2 * half) if norm == "batch" else None
        self.query = nn.Linear(hidden_size, heads * 2 * half, bias=False)
        self.keys = nn.Parameter(torch.empty(heads, 2, n, half))
        self.out = nn.Linear(heads * value, hidden_size, bias=False)
        nn.init.normal_(self.query.weight, std=hidden_size**-0.5)
        nn.init.normal_(self.keys, std=half**-0.5)
        nn.init.normal_(self.out.weight, std=0.02)

    def queries(self, hidden_BTd: Tensor) -> Tensor:
        """Return [B, T, heads, 2, half], each half of unit RMS, or each of its values normalised over the batch."""
        query = self.query(F.rms_norm(hidden_BTd, hidden_BTd.shape[-1:]))
        if self.batch_norm is not None:
            return self.batch_norm(query.flatten(0, 1)).view(*query.shape[:2], self.heads, 2, -1)
        query = query.unflatten(-1, (self.heads, 2, -1))
        return F.rms_norm(query, query.shape[-1:])

    def search(self, hidden_BTd: Tensor) -> tuple[Tensor, Tensor]:
        """Return (row ids int64 [B, T, heads, k], scores of the same shape, best first): exactly the top k of all n *
        n."""
        scores = torch.einsum("bthsc,hsnc->bthsn", self.queries(hidden_BTd), self.keys)
        best, key = scores.topk(self.top_k, dim=-1)
        both = best[..., 0, :, None] + best[..., 1, None, :]
        rows = key[..., 0, :, None] * self.n + key[..., 1, None, :]
        score, chosen = both.flatten(-2).topk(self.top_k, dim=-1)
        return rows.flatten(-2).gather(-1, chosen), score

    def forward(self, rows_BTHkv: Tensor, scores_BTHk: Tensor) -> Tensor:
        weights = scores_BTHk.softmax(-1)
        return self.out((weights.unsqueeze(-1) * rows_BTHkv).sum(-2).flatten(-2))


class StateAddress:
    """Stand for the hasher of a memory whose rows the hidden state chooses: token ids alone address nothing."""

    def __init__(self, token_map: TokenMap):
        self.token_map = token_map

    def __call__(self, ids: Tensor, lookback: Tensor | None = None, documents: Any = None) -> dict[int, Tensor]:
        raise RuntimeError("product keys are searched with the hidden state: token ids alone have no rows")


class ProductKeyMemory(EngramMemory):
    """An EngramMemory in storage and training, with addresses computed from the hidden state."""

    def recall(self, *args: Any, **kwargs: Any) -> Any:
        return _NOTHING_AHEAD

    def _fuse(self, layer: int, hidden: Tensor, recall: Any) -> Tensor:
        module = self.fusions[str(layer)]
        row_ids, scores = module.search(hidden)
        row_ids = row_ids.cpu()
        rows = self.tables[layer].gather(row_ids).to(hidden.device, torch.float32)
        if self.training and torch.is_grad_enabled():
            keep = partial(_keep, self.gradients[layer], row_ids)
            rows.requires_grad_().register_post_accumulate_grad_hook(keep)
        return module(rows, scores)


def _keep(gradients: list[tuple[Tensor, Tensor]], row_ids: Tensor, rows: Tensor) -> None:
    gradients.append((row_ids, rows.grad))
    rows.grad = None


def build(setting: Setting, data: Data, *, heads: int = 4, top_k: int = 16, norm: str = "rms") -> Transformer:
    d, layers, width = setting.model.hidden_size, setting.memory.layers, setting.memory.head_dim
    n = max(1, round((engram_size(setting, data).rows / len(layers)) ** 0.5))
    # orders x heads is what the trainer counts as rows read per position
    config = row_config(setting, orders=(2,), heads=heads * min(top_k, n), rows_per_head=1)

    def memory() -> ProductKeyMemory:
        ids = raw_ids(data)
        fusions = make_fusions(config, d, partial(ProductKeys, d, n, width, heads, top_k, norm))
        tables = row_tables(config, n * n)
        return ProductKeyMemory(config, ids, d, tables=tables, hasher=StateAddress(ids), fusions=fusions)

    model = with_memory(setting, data, memory)
    model.extra_facts = {"sub_keys": n, "heads": heads, "top_k": min(top_k, n), "norm": norm}
    return model


ARMS = {"product-key": build}
