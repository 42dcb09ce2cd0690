"""A small decoder: RMSNorm, rotary positions, causal attention, SwiGLU or squared ReLU. It is the plain baseline and
the host of the memory: without a memory the same code runs.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram.memory import EngramMemory
from engram.memory.cache import REWIND, MemoryCache
from engram.memory.recall import Recall


@dataclass(frozen=True)
class TransformerConfig:
    """Shape of the decoder.

    Attributes:
        vocab_size, hidden_size (d), layers, heads, max_length: as usual; hidden_size / heads must be even.
        ffn: "swiglu" or "relu2" (squared ReLU).
        ffn_size: inner width; None gives 8 d^2 weights to either kind.
        tie_embeddings: output head = input embedding.
        norm_eps: of every RMSNorm. rope_base: of the rotary positions.

    Raises:
        ValueError: a size below 1, a hidden_size that is not a multiple of 2 x heads, another ffn.

    Example:
        >>> import engram
        >>> config = engram.TransformerConfig(vocab_size=1000, hidden_size=64, layers=2, heads=2)
        >>> sum(weight.numel() for weight in engram.Transformer(config).parameters())
        226624
        >>> engram.TransformerConfig(vocab_size=1000, hidden_size=60, heads=4)
        Traceback (most recent call last):
        ValueError: hidden_size 60 must be a multiple of 2 x heads = 8
    """

    vocab_size: int
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    max_length: int = 256
    ffn: str = "relu2"
    ffn_size: int | None = None
    tie_embeddings: bool = False
    norm_eps: float = 1e-6
    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "layers", "heads", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, not {getattr(self, name)}")
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of 2 x heads = {2 * self.heads}")
        if self.ffn not in ("swiglu", "relu2"):
            raise ValueError(f"ffn is swiglu or relu2, not {self.ffn!r}")


class Cache:
    """Keys, values and memory state of the tokens seen so far, for decoding.

    rewind: how many positions the memory can take back (MemoryCache).
    """

    def __init__(self, rewind: int = REWIND) -> None:
        self.keys: dict[int, Tensor] = {}  # layer -> [B, heads, positions, d/heads]
        self.values: dict[int, Tensor] = {}
        self.memory = MemoryCache(rewind)
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self.keys:
            k, v = torch.cat([self.keys[layer], k], dim=2), torch.cat([self.values[layer], v], dim=2)
        self.keys[layer], self.values[layer] = k, v
        return k, v

    def check(self, seen: int) -> None:
        """Raise RuntimeError if a forward pass was interrupted, or the memory has not `seen` as many positions."""
        parts = {"memory": seen} | {
            f"attention of layer {i}": k.shape[2] for i, k in (*self.keys.items(), *self.values.items())
        }
        for name, positions in parts.items():
            if positions != self.length:
                raise RuntimeError(
                    f"this cache is at position {self.length}, its {name} at {positions}: a forward pass was "
                    f"interrupted, or a recall was made for other positions. cache.rewind(0) removes what it left"
                )

    def rewind(self, positions: int) -> None:
        """Drop the last `positions` tokens, such as rejected drafts, and what an interrupted forward pass left.

        Raises:
            ValueError: more positions than the cache has, or than the memory can drop.
        """
        if not 0 <= positions <= self.length:
            raise ValueError(f"cannot rewind {positions} positions of {self.length}")
        keep = self.length - positions
        if self.memory.length > keep:
            self.memory.rewind(self.memory.length - keep)
        self.length = keep
        self.keys = {layer: k[:, :, :keep] for layer, k in self.keys.items()}
        self.values = {layer: v[:, :, :keep] for layer, v in self.values.items()}

    def __copy__(self) -> Cache:
        """Return a copy that decodes on independently of this one."""
        other = Cache()
        other.keys, other.values, other.length = {**self.keys}, {**self.values}, self.length
        other.memory = copy.copy(self.memory)
        return other


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], extra: Tensor | None, cache: Cache | None, layer: int
    ) -> Tensor:
        B, T, d = x.shape
        qkv = self.qkv(x)
        if extra is not None:  # inject="values": the update is added to the attention values
            qkv = torch.cat([qkv[..., : 2 * d], qkv[..., 2 * d :] + extra], dim=-1)
        q, k, v = qkv.view(B, T, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, rope), rotate(k, rope)
        if cache is None or cache.length == 0:
            if cache is not None:
                cache.append(layer, k, v)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            k, v = cache.append(layer, k, v)
            mask = torch.ones(T, k.shape[2], dtype=torch.bool, device=x.device).tril(k.shape[2] - T)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).reshape(B, T, d))


class FeedForward(nn.Module):
    """Position-wise network, SwiGLU or squared ReLU."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        d, gated = config.hidden_size, config.ffn == "swiglu"
        inner = config.ffn_size or (8 * d // 3 if gated else 4 * d)
        self.gated = gated
        self.up = nn.Linear(d, 2 * inner if gated else inner, bias=False)
        self.down = nn.Linear(inner, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.gated:
            gate, x = x.chunk(2, dim=-1)
            return self.down(F.silu(gate) * x)
        return self.down(F.relu(x).square())


class Block(nn.Module):
    """Pre-norm residual block: attention, then feed-forward."""

    def __init__(self, config: TransformerConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], extra: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, extra, cache, self.layer)
        return x + self.ffn(self.ffn_norm(x))


class Transformer(nn.Module):
    """A small decoder, with or without a memory. model(ids) -> logits float [B, T, vocab].

    Its own weights are drawn from torch's global generator after the memory's, which the caller built before: with
    torch.manual_seed(s) just before this call, the backbone starts the same with and without a memory.

    Args:
        config: shape. memory: an EngramMemory of the same hidden size, or None for the plain model.

    Raises:
        ValueError: a memory of another hidden size, or for layers that the model does not have.

    Example:
        >>> import engram, torch
        >>> config = engram.EngramConfig(layers=(1,), orders=(2, 3), heads=2, head_dim=8, rows_per_head=1000)
        >>> memory = engram.EngramMemory(config, engram.TokenMap.identity(64), hidden_size=32)
        >>> model = engram.Transformer(engram.TransformerConfig(64, hidden_size=32, layers=2, heads=2), memory)
        >>> model(torch.randint(0, 64, (2, 16))).shape
        torch.Size([2, 16, 64])
    """

    def __init__(self, config: TransformerConfig, memory: EngramMemory | None = None):
        super().__init__()
        if memory is not None:
            if (memory.hidden_size, memory.streams) != (config.hidden_size, 1):
                raise ValueError(
                    f"memory is for {memory.streams} streams x {memory.hidden_size}, "
                    f"the model has 1 stream x {config.hidden_size}"
                )
            if memory.config.layers[-1] >= config.layers:
                last = config.layers - 1
                raise ValueError(
                    f"memory layers {memory.config.layers} are out of range: the model has layers 0..{last}"
                )
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(self._init)
        for block in self.blocks:
            for weight in (block.attention.out.weight, block.ffn.down.weight):  # type: ignore[union-attr]
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.layers))  # type: ignore[arg-type]
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.memory = memory
        if memory is not None:
            memory.vocab_size = max(memory.vocab_size, config.vocab_size)
        cos, sin = rotary(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    def forward(
        self,
        ids: Tensor,
        documents: Tensor | None = None,
        cache: Cache | None = None,
        recall: Recall | None = None,
    ) -> Tensor:
        """Return the logits of the next token at every position.

        Args:
            ids: int64 [B, T]. documents: [B, T] document numbers of a packed batch, for the memory's look-back
            (attention does see the earlier documents of its window, in every arm alike).
            cache: decoding state; ids are then the continuation of what it holds, and the first of them belongs to the
            document that it ends with: a document that begins needs a new cache.
            recall: of memory.recall(ids, documents, cache=cache.memory), if it was called ahead of time.

        Raises:
            ValueError: more positions than max_length. IndexError: an id outside the vocabulary. RuntimeError: a cache
            in which an earlier forward pass was interrupted.
        """
        start = 0 if cache is None else cache.length
        stop = start + ids.shape[1]
        if stop > self.config.max_length:
            raise ValueError(f"{stop} positions exceed the model's max_length {self.config.max_length}: pass fewer ids")
        rope = (self.cos[start:stop], self.sin[start:stop])  # type: ignore[index]
        memory = self.memory
        if cache is not None:  # a memory of another kind may store nothing in the cache
            cache.check(cache.memory.length or start if recall is None else start)
        if memory is not None and recall is None:
            recall = memory.recall(ids, documents, cache=None if cache is None else cache.memory)
        if cache is not None and getattr(recall, "cache", None) is cache.memory:
            cache.check(recall.start)  # type: ignore[union-attr]
        x = self.embedding(ids)
        for i, block in enumerate(self.blocks):
            extra = None
            if memory is not None and recall is not None and i in memory:
                if memory.config.inject == "residual":
                    x = x + memory[i](x, recall)
                else:
                    extra = memory[i](x, recall)
            x = block(x, rope, extra, cache)
        if cache is not None:
            cache.length = stop
        return self.head(self.norm(x))

    def dense_parameters(self) -> int:
        """Return the number of dense weights, the memory's fusion modules included, its tables not."""
        return sum(p.numel() for p in self.parameters())


def rotary(config: TransformerConfig) -> tuple[Tensor, Tensor]:
    """Return cos and sin [max_length, d / heads / 2] of the rotary positions."""
    half = config.hidden_size // config.heads // 2
    frequency = config.rope_base ** (-torch.arange(half, dtype=torch.float32) / half)
    angle = torch.arange(config.max_length, dtype=torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate pairs (i, i + half) of the last dimension of x [B, heads, T, d / heads]."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = (r.to(x.dtype) for r in rope)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
