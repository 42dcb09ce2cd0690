"""Held-out loss by document: nats per token, bits per byte, and the loss at each position of the text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from engram.lm.tokenizer import Encoded
from engram.lm.transformer import Transformer


class Evaluation(NamedTuple):
    """Losses that evaluate() measured.

    Attributes:
        loss: nats per token over all documents. bits_per_byte: of the documents' UTF-8 text.
        document_nats: float64 [documents], summed nats. document_tokens: int64 [documents], tokens predicted.
        position_nats: float32 [tokens], nats of predicting the token after each position; NaN at a document's last.
    """

    loss: float
    bits_per_byte: float
    document_nats: np.ndarray
    document_tokens: np.ndarray
    position_nats: np.ndarray


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode during the block, and every module back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def evaluate(
    model: Transformer,
    data: Encoded,
    context: int | None = None,
    batch_tokens: int = 2048,
    on_tokens: Callable[[int, int], Any] | None = None,
) -> Evaluation:
    """Score every document separately, in windows of `context` tokens that do not overlap.

    A document's first token is predicted from <|endoftext|>; its end is not predicted, so that bits per byte count the
    text and nothing else. A window after the first starts without context, in every arm alike.

    Args:
        data: packed documents. context: tokens of a window, default the model's max_length. batch_tokens: of a forward
            pass, at most, padding included.
        on_tokens: called after each forward pass with (tokens scored so far, tokens to score).

    Returns:
        Evaluation: loss (nats per token), bits_per_byte, and nats and tokens per document.

    Raises:
        ValueError: no document, or a context beyond the model's. FloatingPointError: a loss that is not finite.

    Example:
        >>> import engram, numpy
        >>> from engram.lm.tokenizer import Encoded
        >>> at = numpy.arange(300, dtype=numpy.int32)  # two documents; engram.lm.tokenizer.encode packs texts
        >>> data = Encoded(at % 50, at // 150, numpy.array([0, 150, 300]), numpy.array([400, 400]))
        >>> model = engram.Transformer(engram.TransformerConfig(64, hidden_size=32, layers=2, heads=2))
        >>> result = engram.evaluate(model, data)
        >>> result.document_tokens.tolist(), 3 < result.loss < 5  # nats per token; log(64) is 4.2
        ([149, 149], True)
    """
    context = model.config.max_length if context is None else context
    if not 1 <= context <= model.config.max_length:
        raise ValueError(f"context is 1 to the model's max_length {model.config.max_length}, not {context}")
    if len(data.starts) < 2:
        raise ValueError("no document to evaluate on: pass at least one")
    windows = [
        (start, min(start + context, stop - 1))
        for begin, stop in zip(data.starts[:-1].tolist(), data.starts[1:].tolist(), strict=True)
        for start in range(begin, stop - 1, context)
    ]
    windows.sort(key=lambda w: w[0] - w[1])  # similar lengths together, for little padding
    nats, known = np.full(len(data.ids), np.nan, dtype=np.float32), np.zeros(len(data.ids), dtype=bool)
    device, scored_tokens, all_tokens = model.embedding.weight.device, 0, sum(stop - start for start, stop in windows)
    with eval_mode(model):
        while windows:
            longest = windows[0][1] - windows[0][0]
            batch, windows = windows[: max(1, batch_tokens // longest)], windows[max(1, batch_tokens // longest) :]
            ids = torch.zeros(len(batch), longest, dtype=torch.int64)
            targets = torch.full((len(batch), longest), -100)
            for row, (start, stop) in enumerate(batch):
                ids[row, : stop - start] = torch.from_numpy(data.ids[start:stop])
                targets[row, : stop - start] = torch.from_numpy(data.ids[start + 1 : stop + 1])
            logits = model(ids.to(device))
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten().to(device), reduction="none")
            scored = loss.view_as(targets).cpu().numpy()
            for row, (start, stop) in enumerate(batch):
                nats[start:stop], known[start:stop] = scored[row, : stop - start], True
                scored_tokens += stop - start
            if on_tokens is not None:
                on_tokens(scored_tokens, all_tokens)
    document = data.documents - data.documents[0]
    if wrong := np.unique(document[known & ~np.isfinite(nats)]).tolist():
        raise FloatingPointError(
            f"{len(wrong)} of {len(data.starts) - 1} documents have a loss that is not finite (document "
            f"{', '.join(map(str, wrong[:3]))}{' ...' * (len(wrong) > 3)}): weights or rows are damaged or diverged"
        )
    count = len(data.starts) - 1
    document_nats = np.bincount(document[known], weights=nats[known].astype(np.float64), minlength=count)
    document_tokens = np.bincount(document[known], minlength=count)
    total = float(document_nats.sum())
    return Evaluation(
        total / max(1, int(document_tokens.sum())),
        total / math.log(2) / max(1, int(data.bytes.sum())),
        document_nats,
        document_tokens,
        nats,
    )
