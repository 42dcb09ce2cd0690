"""Mixture of experts in place of every feed-forward layer, balanced without an auxiliary loss (arXiv 2408.15664).

Each token goes to its top-k experts by sigmoid score plus a bias. The bias only chooses; the weights are the scores
alone, normalised to sum to k, so that k experts start as large as one layer of their joint width. After each training
batch the bias of an expert moves by a fixed step: up if it got fewer tokens than the mean, down if more. The bias of a
batch comes from earlier batches, so no token is routed by what follows it. No token is dropped.

moe-active   k experts are together as wide as plain's layer: active weights equal plain's except for the router, and as
             many experts as bring the total to Engram's, table included (option experts: another number).
moe-total    as many experts as `experts` says, as wide as brings the total to Engram's; active weights exceed plain's.
moe+engram   k experts as wide as plain's layer, beside a memory with `rows` per head: for splitting one budget.

Differs from the source: no shared expert, every layer is a mixture, and the bias moves by 0.003 instead of 0.001 per
step, for runs of hundreds instead of tens of thousands of steps.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram.lm.run import Data, Setting, build_model
from engram.lm.transformer import Transformer
from experiments.arms.host import count, engram_size, ffn_shape, plain, residual_std, seed_extras


class MoE(nn.Module):
    """A layer of experts: x [B, T, d] -> [B, T, d]. inner: width of one expert. top_k: experts per token."""

    def __init__(self, hidden_size: int, experts: int, inner: int, top_k: int, gated: bool, std: float):
        super().__init__()
        if not 2 <= top_k <= experts or inner < 1:  # one weight, normalised, is 1: its router would never learn
            raise ValueError(f"a mixture needs 2 <= top_k <= experts and width >= 1: {top_k}, {experts}, {inner}")
        self.experts, self.inner, self.top_k, self.gated = experts, inner, top_k, gated
        self.router = nn.Linear(hidden_size, experts, bias=False)
        # one matrix for all experts, so that weights decay like those of a feed-forward layer
        self.up = nn.Parameter(torch.empty(experts * inner * (2 if gated else 1), hidden_size))
        self.down = nn.Parameter(torch.empty(experts * inner, hidden_size))
        nn.init.normal_(self.router.weight, std=0.02)
        nn.init.normal_(self.up, std=0.02)
        nn.init.normal_(self.down, std=std)
        self.bias_step = 0.003
        self.register_buffer("bias", torch.zeros(experts))
        self.register_buffer("load", torch.zeros(experts, dtype=torch.int64))  # tokens of the last training batch

    def route(self, tokens_Nd: Tensor) -> tuple[Tensor, Tensor]:
        """Return (experts int64 [N, k], their weights [N, k], which sum to k)."""
        scores = self.router(tokens_Nd).sigmoid()
        chosen = (scores.detach() + self.bias).topk(self.top_k, dim=1).indices
        weights = scores.gather(1, chosen)
        return chosen, self.top_k * weights / weights.sum(1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens_Nd = x.flatten(0, 1)
        chosen, weights = self.route(tokens_Nd)
        load = chosen.flatten().bincount(minlength=self.experts)
        order = chosen.flatten().argsort(stable=True)  # (token, choice) pairs, sorted by expert
        token = order // self.top_k
        ups = self.up.unflatten(0, (self.experts, -1)).unbind()
        downs = self.down.unflatten(0, (self.experts, -1)).unbind()
        outputs = []
        for i, piece in enumerate(tokens_Nd[token].split(load.tolist())):
            if len(piece):
                outputs.append(self._activate(piece @ ups[i].T) @ downs[i])
        y = torch.cat(outputs) * weights.flatten()[order].unsqueeze(1)
        if self.training and torch.is_grad_enabled():
            self.load.copy_(load)
            self.bias += self.bias_step * (load.float().mean() - load).sign()
        return torch.zeros_like(tokens_Nd).index_add(0, token, y).view_as(x)

    def _activate(self, x: Tensor) -> Tensor:
        if self.gated:
            gate, x = x.chunk(2, dim=-1)
            return F.silu(gate) * x
        return F.relu(x).square()


def _mix(model: Transformer, setting: Setting, experts: int, inner: int, top_k: int) -> Transformer:
    d, layers = setting.model.hidden_size, setting.model.layers
    seed_extras(setting)
    for block in model.blocks:
        block.ffn = MoE(d, experts, inner, top_k, setting.model.ffn == "swiglu", residual_std(layers))
    _, unit = ffn_shape(setting)
    active = count(model) - layers * unit * inner * (experts - top_k)
    model.extra_facts = {"experts": experts, "expert_size": inner, "top_k": top_k, "active_dense_parameters": active}
    return model


def fitting_experts(setting: Setting, data: Data, top_k: int) -> int:
    """Return the number of experts of width (plain's / top_k) with which total parameters come nearest to Engram's."""
    (inner, unit), size, layers = ffn_shape(setting), engram_size(setting, data), setting.model.layers
    each = layers * (unit * (inner // top_k) + setting.model.hidden_size)  # with its line of the router
    return max(top_k, round((layers * unit * inner + size.table + size.module) / each))


def moe_active(setting: Setting, data: Data, *, experts: int | None = None, top_k: int = 2) -> Transformer:
    inner, _ = ffn_shape(setting)
    return _mix(plain(setting, data), setting, experts or fitting_experts(setting, data, top_k), inner // top_k, top_k)


def moe_total(setting: Setting, data: Data, *, experts: int = 16, top_k: int = 2) -> Transformer:
    (inner, unit), size, layers = ffn_shape(setting), engram_size(setting, data), setting.model.layers
    total = layers * unit * inner + size.table + size.module
    width = round((total / layers / experts - setting.model.hidden_size) / unit)
    return _mix(plain(setting, data), setting, experts, width, top_k)


def moe_engram(setting: Setting, data: Data, *, experts: int, rows: int, top_k: int = 2) -> Transformer:
    """Return experts beside a memory. rows: per head of the memory; 0: without memory. experts == top_k: a dense layer,
    except for the router of its weights."""
    inner, _ = ffn_shape(setting)
    memory = setting.memory.replace(rows_per_head=max(rows, 1))
    arm = "engram" if rows else "plain"
    return _mix(
        build_model(replace(setting, memory=memory), arm, data.token_map), setting, experts, inner // top_k, top_k
    )


def report_load(model: Transformer, setting: Setting, data: Data) -> Transformer:
    """Add how even the last training batch was routed: largest load over mean load, worst layer."""
    loads = [block.ffn.load.float() for block in model.blocks]
    model.extra_facts["max_load_over_mean"] = max(float(load.max() / load.mean().clamp_min(1)) for load in loads)
    return model


ARMS = {"moe-total": moe_total, "moe-active": moe_active, "moe+engram": moe_engram}
FINISH = dict.fromkeys(ARMS, report_load)
