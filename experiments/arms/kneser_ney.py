"""kneser-ney: plain, mixed at the output with an interpolated modified Kneser-Ney model of the same training windows
(Chen and Goodman 1998), pruned to the bytes of Engram's table. It is a count-based memory of that size.

    p(w | h) = max(c(hw) - D(c), 0) / c(h) + gamma(h) p(w | h'),   h' = h without its oldest token

c is the count at the highest order and below it the number of different tokens seen before the n-gram (n-grams that
begin a document have none before them and keep their count). D has three values per order, for counts 1, 2 and more.
The last term is uniform over the vocabulary. gamma(h) is what the kept n-grams leave of 1, so every distribution sums
to 1, pruned or not. Pruning drops n-grams of the highest order, rarest first, then of the next.

base    "plain"; "engram", whose own table then comes on top; "none": the counts alone, without a model.

Matched: bytes of the arrays here at most those of Engram's table. The weight is fitted on the start of the tune slice.
Differs from the usual version: <|endoftext|> occurs only before a document and is never predicted by counts (evaluate()
skips it), and n-grams do not reach from one training window into the next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engram.lm.run import Data, Setting
from engram.lm.tokenizer import END_OF_TEXT_ID
from experiments.arms.controls import engram
from experiments.arms.host import engram_size, plain, vocabulary
from experiments.arms.mixture import Mixture, fit_weight, scored, seen_windows, tune_windows


@dataclass
class Order:
    """The n-grams of one order: contexts int64 [C], sorted; n-grams of context i are starts[i]:starts[i + 1]."""

    contexts: np.ndarray
    starts: np.ndarray  # int32 [C + 1]
    gamma: np.ndarray  # float32 [C], the weight left to the next lower order
    tokens: np.ndarray  # int32 [E]
    alpha: np.ndarray  # float32 [E], the discounted share of each n-gram

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (self.contexts, self.starts, self.gamma, self.tokens, self.alpha))

    @property
    def values(self) -> int:
        return len(self.gamma) + len(self.alpha)


class KneserNey:
    """A model p(next token | the tokens before it) from counts of windows, dense over the vocabulary.

    Args:
        ids, documents: [windows, time]. vocab: V. order: longest n-gram. budget: bytes to prune to, or None.

    Raises:
        ValueError: ids too wide for n-grams of this order to pack into 63 bits.
    """

    def __init__(self, ids: np.ndarray, documents: np.ndarray, vocab: int, order: int = 4, budget: int | None = None):
        self.vocab, self.order, self.bits = vocab, order, max(1, (vocab - 1).bit_length())
        if order < 2 or self.bits * order > 63:
            raise ValueError(f"n-grams of order {order} over {vocab:,} tokens: need order >= 2 and 63 bits at most")
        counts = {n: np.unique(self._pack(ids, documents, n), return_counts=True) for n in range(1, order + 1)}
        shares: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        for n in range(1, order + 1):
            keys, c = counts[n] if n == order else self._continuations(n, counts)
            context = keys >> self.bits
            first = np.flatnonzero(np.diff(context, prepend=-1))
            total = np.add.reduceat(c, first) if len(c) else c
            alpha = (c - discounts(c)) / np.repeat(total, np.diff(np.append(first, len(c))))
            shares[n] = keys, c, alpha
        keys, _, alpha = shares[1]
        self.unigram = np.full(vocab, (1 - alpha.sum()) / vocab)
        self.unigram[keys] += alpha
        self.unigram = self.unigram.astype(np.float32)
        kept = {n: self._keep(*shares[n], len(shares[n][0])) for n in range(2, order + 1)}
        for n in range(order, 1, -1):  # prune from the top
            rest = self.unigram.nbytes + sum(kept[m].nbytes for m in kept if m != n)
            if budget is None or rest + kept[n].nbytes <= budget:
                break
            low, high = 0, len(shares[n][0])
            while low < high:
                middle = (low + high + 1) // 2
                fits = rest + self._keep(*shares[n], middle).nbytes <= budget
                low, high = (middle, high) if fits else (low, middle - 1)
            kept[n] = self._keep(*shares[n], low)
        self.orders = kept

    @property
    def nbytes(self) -> int:
        return self.unigram.nbytes + sum(order.nbytes for order in self.orders.values())

    @property
    def values(self) -> int:
        return self.unigram.size + sum(order.values for order in self.orders.values())

    def _pack(self, ids: np.ndarray, documents: np.ndarray, n: int) -> np.ndarray:
        """Pack every n-gram that lies in one document, oldest token in the highest bits."""
        stop = ids.shape[1] - n + 1
        if stop <= 0:
            return np.zeros(0, np.int64)
        keys = np.zeros((len(ids), stop), np.int64)
        for i in range(n):
            keys = keys << self.bits | ids[:, i : i + stop]
        return keys[documents[:, :stop] == documents[:, n - 1 :]]

    def _continuations(self, n: int, counts: dict[int, tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        keys, c = np.unique(counts[n + 1][0] & ((1 << self.bits * n) - 1), return_counts=True)
        if n > 1:
            raw, times = counts[n]
            opening = raw >> self.bits * (n - 1) == END_OF_TEXT_ID
            opening &= ~np.isin(raw, keys)
            order = np.argsort(np.concatenate([keys, raw[opening]]))
            keys, c = (np.concatenate(pair)[order] for pair in ((keys, raw[opening]), (c, times[opening])))
        return keys, c

    def _keep(self, keys: np.ndarray, c: np.ndarray, alpha: np.ndarray, most: int) -> Order:
        """The `most` commonest n-grams; among equally common ones, the first by token id."""
        if most < len(keys):
            chosen = np.sort(np.argsort(-c, kind="stable")[:most])
            keys, alpha = keys[chosen], alpha[chosen]
        contexts, starts = np.unique(keys >> self.bits, return_index=True)
        alpha = alpha.astype(np.float32)
        left = 1 - np.add.reduceat(alpha.astype(np.float64), starts) if len(keys) else np.zeros(0)
        return Order(
            contexts,
            np.append(starts, len(keys)).astype(np.int32),
            np.maximum(left, 0).astype(np.float32),
            (keys & ((1 << self.bits) - 1)).astype(np.int32),
            alpha,
        )

    def __call__(self, ids: Tensor, documents: Tensor | None = None) -> Tensor:
        """Return probabilities float32 [B, T, V] of the token after each position."""
        given = ids.cpu().numpy().astype(np.int64)
        runs = np.zeros_like(given) if documents is None else documents.cpu().numpy()
        left = np.ones(given.size, np.float32)  # what the higher orders leave to the lower ones
        pieces = []
        for n in range(self.order, 1, -1):
            order, context = self.orders[n], np.full(given.shape, -1, np.int64)
            if given.shape[1] >= n - 1 and len(order.contexts):
                keys = np.zeros((len(given), given.shape[1] - n + 2), np.int64)
                for i in range(n - 1):
                    keys = keys << self.bits | given[:, i : i + keys.shape[1]]
                same = runs[:, : keys.shape[1]] == runs[:, n - 2 :]
                context[:, n - 2 :] = np.where(same, keys, -1)
            place = np.searchsorted(order.contexts, context.ravel()).clip(max=max(0, len(order.contexts) - 1))
            known = np.flatnonzero(order.contexts[place] == context.ravel()) if len(order.contexts) else place[:0]
            place = place[known]
            lengths = order.starts[place + 1] - order.starts[place]
            within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            entry = np.repeat(order.starts[place], lengths) + within
            pieces.append(
                (np.repeat(known, lengths), order.tokens[entry], order.alpha[entry] * np.repeat(left[known], lengths))
            )
            left[known] *= order.gamma[place]
        p = left[:, None] * self.unigram
        for row, token, share in pieces:
            p[row, token] += share  # an n-gram occurs once in its order, so no entry is written twice
        return torch.from_numpy(p).view(*ids.shape, self.vocab)


def discounts(c: np.ndarray) -> np.ndarray:
    """Return the discount of each count (Chen and Goodman, equation 26); 0.5, 1, 1.5 if a count of counts is
    missing."""
    n1, n2, n3, n4 = (int((c == k).sum()) for k in (1, 2, 3, 4))
    d = np.array([0.0, 0.5, 1.0, 1.5])
    if n1 and n2 and n3 and n4:
        y = n1 / (n1 + 2 * n2)
        d = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        d = np.clip(d, 0, np.arange(4))
    return d[np.minimum(c, 3)]


class NoModel(nn.Module):
    """A model in which every token is as likely as every other: the base of counts alone. Training changes nothing."""

    memory = None

    def __init__(self, setting: Setting, data: Data):
        super().__init__()
        self.config = replace(setting.model, vocab_size=vocabulary(data))
        self.embedding = nn.Embedding(1, 1)  # marks the device of the model
        self.level = nn.Parameter(torch.zeros(1))  # equal for all tokens, so its gradient is zero

    def dense_parameters(self) -> int:
        return 0

    def forward(self, ids: Tensor, documents: Tensor | None = None, cache: Any = None, recall: Any = None) -> Tensor:
        return self.level + torch.zeros(*ids.shape, self.config.vocab_size, device=ids.device)


BASES: dict[str, Callable[[Setting, Data], Any]] = {"plain": plain, "engram": engram, "none": NoModel}


def build(setting: Setting, data: Data, *, base: str = "plain") -> Any:
    if base not in BASES:
        raise ValueError(f"base is {', '.join(map(repr, BASES))}, not {base!r}")
    return BASES[base](setting, data)


def finish(model: Any, setting: Setting, data: Data, *, order: int = 4, base: str = "plain") -> Mixture:
    budget = engram_size(setting, data).bytes
    counts = KneserNey(*seen_windows(setting, data), vocabulary(data), order, budget)
    pairs: list[Any] = []
    for ids, documents, targets, p, inside in scored(model, tune_windows(setting, data)):
        other = counts(ids, documents)[inside.cpu()].gather(1, targets.cpu()[:, None]).squeeze(1)
        pairs.append((p.cpu().numpy(), other.numpy()))
    p_lm, p_counts = (np.concatenate(part).astype(np.float64) for part in zip(*pairs, strict=True))
    facts = {
        "order": order,
        "ngrams": {str(n): len(kept.tokens) for n, kept in counts.orders.items()},
        "tune_loss_lm": float(-np.log(p_lm).mean()),
        "tune_loss_counts": float(-np.log(p_counts).mean()),
    }
    held = [] if model.memory is None else model.memory.tables.values()
    stored = {
        "parameters": counts.values + sum(table.rows * table.dim for table in held),
        "bytes": counts.nbytes + sum(table.nbytes for table in held),
    }
    return Mixture(model, counts, 1.0 if base == "none" else fit_weight(p_lm, p_counts), stored, facts)


ARMS = {"kneser-ney": build}
FINISH = {"kneser-ney": finish}
