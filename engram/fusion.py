"""Rows + hidden state -> what is added to the hidden state: gate, value, short convolution. Plain PyTorch.

Shape suffixes: B batch, T time, M streams, d hidden, E = d_mem.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram.config import EngramConfig


class EngramFusion(nn.Module):
    """One layer's module around the rows (paper section 2.3 and the released demo).

        key^m = W_K^m e,  value = W_V e
        s     = <norm(h^m), norm(key^m)> / sqrt(d),  gate^m = sigmoid(sign(s) sqrt(max(|s|, 1e-6)))
        u^m   = gate^m value,  y^m = u^m + SiLU(conv(norm(u^m)))

    The signed square root is in every released code and not in the paper's equation (gate="plain" leaves it out).
    Norms, score and gate are computed in float32 at least, also under autocast, which applies to the projections. The
    gains of the norms stay float32 if the module is converted to bfloat16 or float16: in bfloat16 the numbers next to 1
    are 0.4 and 0.8 % away, so that a gain of 1 would never move.

    Args:
        config: which parts exist. hidden_size: d. streams: M residual streams (4 with hyper-connections, else 1).
    """

    def __init__(self, config: EngramConfig, hidden_size: int, streams: int = 1):
        super().__init__()
        self.config, self.hidden_size, self.streams = config, hidden_size, streams
        shape = (streams, hidden_size)
        self.value = nn.Linear(config.d_mem, hidden_size, bias=config.bias)
        if config.gate != "none":
            self.key = nn.Linear(config.d_mem, streams * hidden_size, bias=config.bias)  # stream-major rows
            self.key_norm = nn.Parameter(torch.ones(shape))
            self.query_norm = nn.Parameter(torch.ones(shape))
        if config.conv_kernel:
            self.conv_norm = nn.Parameter(torch.ones(shape))
            # [M*d, 1, taps] as nn.Conv1d stores it; the last tap is lag 0
            self.conv_weight = nn.Parameter(torch.zeros(streams * hidden_size, 1, config.conv_kernel))
            self._reset_conv()

    def _reset_conv(self) -> None:
        if self.config.conv_init == "uniform":
            nn.init.kaiming_uniform_(self.conv_weight, a=math.sqrt(5))
        else:
            nn.init.zeros_(self.conv_weight)

    def reset_parameters(self) -> None:
        """Set every weight to its initial value, for a module made on the meta device that no file fills."""
        self.value.reset_parameters()
        if self.config.gate != "none":
            self.key.reset_parameters()
        for name, gain in self.named_parameters(recurse=False):
            if name.endswith("_norm"):
                nn.init.ones_(gain)
        if self.config.conv_kernel:
            self._reset_conv()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EngramFusion:
        gains = {name: gain.data for name, gain in self.named_parameters() if name.endswith("_norm")}
        super()._apply(fn, recurse)
        for name, gain in gains.items():
            moved = getattr(self, name)
            if moved.dtype.itemsize < gain.dtype.itemsize:
                moved.data = gain.to(moved.device)
                moved.grad = None if moved.grad is None else moved.grad.to(gain.dtype)
        return self

    def forward(
        self,
        rows_BTE: Tensor,
        hidden: Tensor,
        documents_BT: Tensor | None = None,
        history: Tensor | None = None,
        dead_BT: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what the memory adds.

        Args:
            rows_BTE: the concatenated rows of each position.
            hidden: [B, T, d], or [B, T, M, d] with M residual streams.
            documents_BT: document number of each position; the convolution never crosses a document. With a history
                [B, H + T], the numbers of its positions first.
            history: [B, H, M*d] the inputs of the convolution at the positions before, when decoding step by step: all
            that it reaches back to (EngramMemory.lag), fewer only at the start of a text.
            dead_BT: True at positions that are not text, where the gate is 0 (DeepSeek-V4.1).

        Returns:
            The update, shaped like `hidden`, and the inputs of the convolution [B, T, M*d] (None without one), which a
            decoder appends to its history.
        """
        flat = hidden.dim() == 3
        hidden_BTMd = hidden.unsqueeze(2) if flat else hidden
        if hidden_BTMd.shape[2:] != (self.streams, self.hidden_size):
            raise ValueError(
                f"hidden state {tuple(hidden.shape)} does not fit a fusion of {self.streams} streams x "
                f"{self.hidden_size}"
            )
        if rows_BTE.shape[:2] != hidden.shape[:2]:
            raise ValueError(
                f"the rows have {list(rows_BTE.shape[:2])} positions, the hidden state {list(hidden.shape[:2])}: "
                f"this recall was made from other ids"
            )
        rows_BTE = rows_BTE.to(self._dtype(hidden))  # rows arrive as float32, whatever the model computes in
        value_BT1d = self.value(rows_BTE).unsqueeze(2)
        if self.config.gate == "none":
            u = value_BT1d.expand(-1, -1, self.streams, -1)
        else:
            u = self.gate(rows_BTE, hidden_BTMd).to(value_BT1d.dtype).unsqueeze(-1) * value_BT1d
        if dead_BT is not None:
            u = u.masked_fill(dead_BT[..., None, None], 0)
        inputs = None
        y = u
        if self.config.conv_kernel:
            normed = F.rms_norm(u, (self.hidden_size,), eps=self.config.conv_eps)
            inputs = (normed * self.conv_norm).to(u.dtype).flatten(2)
            y = u + F.silu(self._conv(inputs, documents_BT, history)).view_as(u)
        return (y.squeeze(2) if flat else y), inputs

    def _dtype(self, hidden: Tensor) -> torch.dtype:
        """Return the dtype that the projections take: that of their weights, or of the hidden state if quantisation
        keeps the weights otherwise (a method, integers, fp8)."""
        weight = getattr(self.value, "weight", None)
        plain = isinstance(weight, Tensor) and weight.dtype.is_floating_point and weight.dtype.itemsize > 1
        return weight.dtype if plain else hidden.dtype  # type: ignore[union-attr]

    def gate(self, rows_BTE: Tensor, hidden_BTMd: Tensor) -> Tensor:
        """Return the gate [B, T, M] in (0, 1), float32 (float64 for float64 input)."""
        key = self.key(rows_BTE).unflatten(-1, (self.streams, self.hidden_size))
        with torch.autocast(key.device.type, enabled=False):
            wide = torch.promote_types(key.dtype, torch.float32)
            eps, shape = self.config.gate_eps, (self.hidden_size,)
            query = F.rms_norm(hidden_BTMd.to(wide), shape, eps=eps) * self.query_norm.to(wide)
            key = F.rms_norm(key.to(wide), shape, eps=eps) * self.key_norm.to(wide)
            score = (query * key).sum(-1) / math.sqrt(self.hidden_size)
            if self.config.gate == "signed_sqrt":
                score = score.sign() * score.abs().clamp_min(1e-6).sqrt()
            return score.sigmoid()

    def _conv(self, x: Tensor, documents_BT: Tensor | None, history: Tensor | None) -> Tensor:
        """Causal depthwise convolution of x [B, T, M*d], taps at lags 0, dilation, 2 dilation, ...

        A few shifted multiply-adds: faster on a CPU than nn.Conv1d for so few taps (paper_notes/decisions.md), and the
        place where a lag that would cross a document is left out.
        """
        T = x.shape[1]
        taps = self.conv_weight[:, 0].to(x.dtype).unbind(-1)
        past = x if history is None else torch.cat([history.to(x.dtype), x], dim=1)
        start = past.shape[1] - T
        y = x * taps[-1]
        for i in range(1, len(taps)):
            lag = i * self.config.dilation
            skip = max(0, lag - start)  # positions whose lagged input lies before the start
            if skip >= T:
                break
            term = past[:, start + skip - lag : start + T - lag] * taps[-1 - i]
            if documents_BT is not None:
                same = documents_BT[:, start + skip :] == documents_BT[:, start + skip - lag : start + T - lag]
                term = term * same.unsqueeze(-1)
            y = y + F.pad(term, (0, 0, skip, 0))
        return y
