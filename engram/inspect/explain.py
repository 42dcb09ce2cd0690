"""explain: the rows that the memory read at each token of a text, its gate, what it added and what that changed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram.lm.evaluate import eval_mode
from engram.lm.tokenizer import END_OF_TEXT_ID, token_ids
from engram.memory import EngramMemory
from engram.memory.recall import Recall

_TOKENS_AT_ONCE = 4096  # tokens of one pass with the memory off at one position of each copy


@dataclass(frozen=True)
class LayerExplanation:
    """What one layer's memory did (T tokens, N orders, K heads, M residual streams; M is 1 in a model without streams).

    Attributes:
        rows: int64 [T, N, K], row ids in the layer's table.
        rows_in_head: the same, counted from each head's first row.
        gate: float32 [T, M] in (0, 1); 0 at dead positions and where the memory is off, 1 with gate="none".
        added: float32 [T, M], norm of what the memory added.
        hidden: float32 [T, M], norm of the hidden state that it was added to. With inject="values" it is added to the
            attention values, and `hidden` is still the norm of the hidden state.
    """

    rows: np.ndarray
    rows_in_head: np.ndarray
    gate: np.ndarray
    added: np.ndarray
    hidden: np.ndarray


@dataclass(frozen=True)
class Explanation:
    """Result of `explain`, for T tokens and N orders.

    Attributes:
        ids: token ids.
        tokens: their text, or the ids as text if there was no tokenizer.
        compressed: compressed id of each token (token map): two n-grams of equal compressed ids read the same rows. -1
            at an id that the token map does not name.
        orders: n-gram lengths.
        dead: bool [T], True at positions that are not text.
        lengths: int64 [T, N], how many tokens of each n-gram are text: fewer than the order if it was cut at the start
            of the text, at another document, at an end-of-sequence or dead token; 0 at dead positions.
        ngrams: [T][N] the n-gram's text.
        loss: float32 [T], nats of the token after each position; NaN at the last.
        loss_off: the same with nothing added at that one position, in no layer; None with losses=False. The model was
            trained with its memory and depends on it, so the difference overstates what a memory is worth.
        layers: {layer: LayerExplanation}.
    """

    ids: list[int]
    tokens: list[str]
    compressed: list[int]
    orders: tuple[int, ...]
    dead: np.ndarray
    lengths: np.ndarray
    ngrams: list[list[str]]
    loss: np.ndarray
    loss_off: np.ndarray | None
    layers: dict[int, LayerExplanation]

    def to_json(self) -> str:
        """Return {"orders", "tokens": one object per token, with its layers in it} as JSON. An unknown loss is null."""
        return json.dumps({"orders": self.orders, "tokens": [self._token(t) for t in range(len(self.ids))]})

    def _token(self, t: int) -> dict[str, Any]:
        layers = {}
        for layer, explained in self.layers.items():
            parts = {name: getattr(explained, name)[t].tolist() for name in ("rows", "rows_in_head")}
            parts |= {name: [float(x) for x in getattr(explained, name)[t]] for name in ("gate", "added", "hidden")}
            layers[str(layer)] = parts
        return {
            "id": self.ids[t],
            "token": self.tokens[t],
            "compressed": self.compressed[t],
            "dead": bool(self.dead[t]),
            "ngrams": self.ngrams[t],
            "lengths": self.lengths[t].tolist(),
            "loss": _known(self.loss[t]),
            "loss_off": None if self.loss_off is None else _known(self.loss_off[t]),
            "layers": layers,
        }


@dataclass
class _Recorded:
    """Values that the hooks of one forward pass recorded."""

    recall: Recall | None = None
    layers: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)  # gate, added, hidden


@torch.no_grad()
def explain(model: nn.Module, text_or_ids: Any, tokenizer: Any = None, losses: bool = True) -> Explanation:
    """Explain what the memory of a model read and added at each token of one text.

    Args:
        model: a Transformer, or a model of transformers with an attached memory. It is not changed.
        text_or_ids: a text, which needs the tokenizer, or ids [T] or [1, T] as lists, array or tensor, or what a
            tokenizer or its chat template returns. A text gets the special tokens that the model's texts begin with:
            <|endoftext|> for a Transformer, the tokenizer's own for others.
        tokenizer: tokenizers.Tokenizer or one of transformers; also gives the text of the n-grams.
        losses: also compute the loss with the memory off at each position, which takes one forward pass per position.

    Returns:
        Explanation: per token its n-grams and loss (nats), per layer rows, gate and norms.

    Raises:
        ValueError: a model without memory or without logits, a text without tokenizer, no token, several sequences,
            more tokens than a Transformer was built for.
        IndexError: an id outside the vocabulary.

    Example:
        >>> import engram
        >>> config = engram.EngramConfig(layers=(0,), orders=(2,), heads=2, head_dim=4, rows_per_head=50)
        >>> memory = engram.EngramMemory(config, engram.TokenMap.identity(20), hidden_size=8)
        >>> shape = engram.TransformerConfig(20, hidden_size=8, layers=1, heads=2, max_length=16)
        >>> explanation = engram.explain(engram.Transformer(shape, memory), [3, 4, 5])
        >>> explanation.ngrams  # per token and order; the first bigram is cut at the start of the text
        [['3'], ['3 4'], ['4 5']]
        >>> explanation.layers[0].rows.shape, explanation.layers[0].gate.shape
        ((3, 1, 2), (3, 1))
    """
    memory = next((m for m in model.modules() if isinstance(m, EngramMemory)), None)
    if memory is None:
        raise ValueError(
            f"this {type(model).__name__} has no memory to explain: attach one (engram.attach, or --memory)"
        )
    ids = _ids(text_or_ids, tokenizer, memory).to(next(model.parameters()).device)
    with eval_mode(model), _not_compiled():
        with _recording(memory, _Recorded()) as recorded:
            loss = _losses(_logits(model, memory, ids, recorded), ids)[0]
        off = _off(model, memory, ids) if losses else None
    assert recorded.recall is not None
    lengths = window_lengths(memory, ids.cpu(), recorded.recall)[0]
    listed = ids[0].tolist()
    layers = {}
    for layer, (gate, added, hidden) in recorded.layers.items():
        rows = recorded.recall.row_ids[layer][0].numpy()
        shape = (len(listed), len(memory.config.orders), memory.config.heads)
        layers[layer] = LayerExplanation(
            rows.reshape(shape),
            (rows - np.array(memory.layout.offsets[layer])).reshape(shape),
            *(x[0].float().cpu().numpy() for x in (gate, added, hidden)),
        )
    return Explanation(
        ids=listed,
        tokens=[_text([i], tokenizer) for i in listed],
        compressed=_compressed(memory, ids[0]).tolist(),
        orders=memory.config.orders,
        dead=np.zeros(len(listed), bool) if recorded.recall.dead is None else recorded.recall.dead[0].cpu().numpy(),
        lengths=lengths.numpy(),
        ngrams=[[_text(listed[t + 1 - n : t + 1], tokenizer) for n in row] for t, row in enumerate(lengths.tolist())],
        loss=loss.cpu().numpy(),
        loss_off=None if off is None else off.cpu().numpy(),
        layers=layers,
    )


@contextmanager
def _not_compiled() -> Iterator[None]:
    """Run compiled models eagerly: code that was compiled before would run without the hooks."""
    if "torch._dynamo" in sys.modules:
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


def window_lengths(memory: EngramMemory, ids: Tensor, recall: Recall) -> Tensor:
    """Return int64 [B, T, N]: how many tokens of each order's n-gram are text, for ids [B, T] on the CPU."""
    dead = torch.zeros_like(ids, dtype=torch.bool) if recall.dead is None else recall.dead.cpu()
    documents = torch.zeros_like(ids) if recall.documents is None else recall.documents.cpu()
    ends = torch.zeros_like(dead)
    if memory.config.boundary == "eos":
        ends = _compressed(memory, ids) == memory.layout.pad_id
    longest = memory.config.orders[-1]
    alive = ~dead
    counts = [alive.long()]
    for step in range(1, longest):
        back = min(step, ids.shape[1])  # a text may be shorter than an n-gram
        inside = (~dead & ~ends)[:, :-back] & (documents[:, :-back] == documents[:, back:])
        alive = alive & F.pad(inside, (back, 0))
        counts.append(counts[-1] + alive)
    return torch.stack([counts[order - 1] for order in memory.config.orders], dim=-1)


def _ids(text_or_ids: Any, tokenizer: Any, memory: EngramMemory) -> Tensor:
    """Return int64 [1, T] without padding (positions of attention_mask 0)."""
    if isinstance(text_or_ids, str):
        if tokenizer is None:
            raise ValueError("a text needs the model's tokenizer: explain(model, text, tokenizer), or give ids")
        own = memory.attachment is None
        encoded = tokenizer.encode(text_or_ids, add_special_tokens=not own)
        ids_of = getattr(encoded, "ids", encoded)  # tokenizers returns an Encoding, transformers a list
        text_or_ids = [END_OF_TEXT_ID, *ids_of] if own else ids_of
    ids = token_ids(text_or_ids)
    if len(ids) == 1 and isinstance(text_or_ids, Mapping) and text_or_ids.get("attention_mask") is not None:
        mask = torch.as_tensor(text_or_ids["attention_mask"], device=ids.device)
        if mask.numel() != ids.numel():
            raise ValueError(f"attention_mask has shape {list(mask.shape)}, input_ids {list(ids.shape)}: must be equal")
        ids = ids[mask.reshape(ids.shape) != 0][None]
    if len(ids) != 1 or ids.shape[1] == 0:
        raise ValueError(f"explain takes one text of at least one token, not ids of shape {list(ids.shape)}")
    return ids


def _compressed(memory: EngramMemory, ids: Tensor) -> Tensor:
    """Return the compressed ids, -1 at ids that the token map does not name."""
    unnamed = memory.unnamed(ids)
    return memory.hasher.token_map(ids if unnamed is None else ids.masked_fill(unnamed, -1))


def _logits(model: nn.Module, memory: EngramMemory, ids: Tensor, recorded: _Recorded) -> Tensor:
    if memory.attachment is None:
        recorded.recall = memory.recall(ids)
        return model(ids, recall=recorded.recall)
    out = model(input_ids=ids, use_cache=False)
    if not hasattr(out, "logits"):
        raise ValueError(f"{type(model).__name__} returns no logits: explain the model with its language head")
    return out.logits


def _losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Return float32 [B, T]: nats of the token after each position, NaN at the last."""
    nats = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten().to(logits.device), reduction="none"
    )
    return F.pad(nats.view(len(ids), -1), (0, 1), value=torch.nan)


@contextmanager
def _recording(memory: EngramMemory, recorded: _Recorded) -> Iterator[_Recorded]:
    """Record the inputs and outputs of every layer's fusion. The gate is computed once more, from the same input."""

    def record(layer: int, fusion: Any, args: Any, output: Any) -> None:
        rows, hidden, _, _, dead = args
        update = output[0]
        if hidden.dim() == 3:
            hidden, update = hidden.unsqueeze(2), update.unsqueeze(2)
        gate = torch.ones(hidden.shape[:3], device=hidden.device)
        if memory.config.gate != "none":
            gate = fusion.gate(rows.to(fusion.value.weight.dtype), hidden)
        if dead is not None:
            gate = gate.masked_fill(dead[..., None], 0)
        if memory.attachment is not None:
            recorded.recall = memory.attachment.recall
        assert recorded.recall is not None
        _, off = recorded.recall.switched_rows(layer)
        if off is not None:  # by EngramMemory.off
            off = torch.as_tensor(off, device=gate.device).expand(gate.shape[:2])[..., None]
            gate, update = gate.masked_fill(off, 0), update.masked_fill(off[..., None], 0)
        recorded.layers[layer] = (gate, update.float().norm(dim=-1), hidden.float().norm(dim=-1))

    with _hooked(memory, record):
        yield recorded


def _off(model: nn.Module, memory: EngramMemory, ids: Tensor) -> Tensor:
    """Return the losses [T], each with the memory off at its position: each copy of the text lacks one update."""
    time = ids.shape[1]
    off = torch.full((time,), torch.nan, device=ids.device)
    size = max(1, _TOKENS_AT_ONCE // time)
    for first in range(0, time - 1, size):
        positions = torch.arange(first, min(first + size, time - 1), device=ids.device)
        copies = torch.arange(len(positions), device=ids.device)

        def remove(layer: int, fusion: Any, args: Any, output: Any) -> tuple[Tensor, Tensor | None]:
            update = output[0].clone()
            update[copies.to(update.device), positions.to(update.device)] = 0  # noqa: B023  used within this pass
            return update, output[1]

        text = ids[:, : int(positions[-1]) + 2].expand(len(positions), -1)  # later tokens cannot affect these losses
        with _hooked(memory, remove):
            off[positions] = _losses(_logits(model, memory, text, _Recorded()), text)[copies, positions].to(off)
    return off


@contextmanager
def _hooked(memory: EngramMemory, act: Any) -> Iterator[None]:
    """Call act(layer, fusion, arguments, output) after each layer's fusion. What it returns replaces the output."""
    with ExitStack() as stack:
        for layer in memory.config.layers:

            def hook(fusion: Any, args: Any, output: Any, layer: int = layer) -> Any:
                return act(layer, fusion, args, output)

            stack.callback(memory.fusions[str(layer)].register_forward_hook(hook).remove)
        yield


def _text(ids: list[int], tokenizer: Any) -> str:
    numbers = " ".join(map(str, ids))
    try:
        return numbers if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=False)
    except (LookupError, TypeError, ValueError):  # slow tokenizers, at an id without a token
        return numbers


def _known(x: float) -> float | None:
    return None if np.isnan(x) else float(x)
