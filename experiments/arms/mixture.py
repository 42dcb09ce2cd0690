"""Mixtures of a trained model with another one at the output: p = (1 - w) p_lm + w p_other. Both are distributions over
the vocabulary, so p is one. The weight is fitted on the start of the tune slice, which is neither trained on nor
reported."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engram.lm.evaluate import eval_mode
from engram.lm.run import Data, Setting
from engram.lm.tokenizer import Encoded
from engram.lm.train import Batches
from experiments.lab.caches import prepare

TUNE_TOKENS = 65_536  # tokens of the tune slice, on which one or two numbers are fitted


class Mixture(nn.Module):
    """A model whose logits are the log-probabilities of the mixture.

    Args:
        model: the trained decoder. other: (ids, documents) -> probabilities [B, T, V], called after the decoder.
        weight: of the other. stored: {"parameters", "bytes"} of the other. facts: for the record.
    """

    def __init__(
        self, model: Any, other: Callable[..., Tensor], weight: float, stored: dict[str, int], facts: dict[str, Any]
    ):
        super().__init__()
        self.model, self.other, self.weight, self.stored = model, other, weight, stored
        self.config, self.memory, self.extra_facts = model.config, model.memory, {"weight": weight, **facts}

    @property
    def embedding(self) -> nn.Embedding:
        return self.model.embedding

    def dense_parameters(self) -> int:
        return self.model.dense_parameters()

    def forward(self, ids: Tensor, documents: Tensor | None = None, cache: Any = None, recall: Any = None) -> Tensor:
        """Return log p, float32 [B, T, V]."""
        if cache is not None:
            raise ValueError("a mixture at the output scores whole windows: it has no decoding cache")
        log_p = self.model(ids, documents, recall=recall).float().log_softmax(-1)
        other = self.other(ids, documents).to(log_p.device)
        if self.weight <= 0:
            return log_p
        if self.weight >= 1:
            return other.log()
        return torch.logaddexp(log_p + math.log1p(-self.weight), other.log() + math.log(self.weight))


def fit_weight(p_lm: np.ndarray, p_other: np.ndarray) -> float:
    """Return the w in [0, 1] that makes the mean of log((1 - w) p_lm + w p_other) largest. Both are [tokens], of the
    true next token. The mean is concave in w, so its slope is bisected."""
    difference, low, high = p_other - p_lm, 0.0, 1.0
    for _ in range(40):
        w = (low + high) / 2
        with np.errstate(divide="ignore"):
            slope = float(np.sum(difference / (p_lm + w * difference)))
        low, high = (w, high) if slope > 0 else (low, w)
    return (low + high) / 2


def seen_windows(setting: Setting, data: Data) -> tuple[np.ndarray, np.ndarray]:
    """Return (ids, documents), each [windows, context + 1]: the windows that this run has trained on, each once, with
    their targets.

    A window repeated in later epochs counts once: repeats carry no information about unseen text.
    """
    train = setting.train
    batches = Batches(data.train, train.context, train.batch_size, train.seed)
    return _cut(data.train, np.unique(batches.orders(train.steps)), train.context)


def tune_windows(setting: Setting, data: Data) -> tuple[np.ndarray, np.ndarray]:
    """Return the same of the tune slice, at most TUNE_TOKENS of it.

    Raises:
        ValueError: the corpus or its tokenizer is not the one of `data`.
    """
    tune = prepare(setting, held_out="tune")
    if tune.digest != data.digest or tune.token_map.digest != data.token_map.digest:
        raise ValueError(f"{setting.corpus!r} is another text now than the one that was trained on")
    context = min(setting.train.context, len(tune.validation.ids) - 1)
    windows = min(TUNE_TOKENS // context + 1, (len(tune.validation.ids) - 1) // context)
    return _cut(tune.validation, np.arange(windows), context)


def _cut(text: Encoded, windows: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    take = windows[:, None] * context + np.arange(context + 1)
    return text.ids[take].astype(np.int64), text.documents[take]


@torch.no_grad()
def scored(model: Any, windows: tuple[np.ndarray, np.ndarray], batch: int = 8) -> Iterator[tuple[Tensor, ...]]:
    """Run the model over windows. Yield (ids [B, T], documents [B, T], targets [n], p_lm of them [n], inside [B, T])
    per batch; `inside` are the n positions whose next token is of the same document, the only ones that count."""
    with eval_mode(model):
        device = model.embedding.weight.device
        for start in range(0, len(windows[0]), batch):
            ids, documents = (torch.from_numpy(part[start : start + batch]).long().to(device) for part in windows)
            inside = documents[:, 1:] == documents[:, :-1]
            targets = ids[:, 1:][inside]
            log_p = model(ids[:, :-1], documents[:, :-1]).float().log_softmax(-1)
            p = log_p[inside].gather(1, targets[:, None]).squeeze(1).exp()
            yield ids[:, :-1], documents[:, :-1], targets, p, inside
