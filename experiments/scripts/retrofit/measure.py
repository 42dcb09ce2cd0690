"""Evaluation of a model on held-out documents and on facts, as arrays with one entry per document or fact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram.lm.corpus import Document
from engram.lm.evaluate import eval_mode
from experiments.scripts.retrofit.data import START, Text, encode
from experiments.sensitivity.facts import Fact
from experiments.sensitivity.measure import score

SIDES = ("inside", "outside", "taught", "untaught", "rephrased")
CANDIDATES = 8  # descriptions to choose among, the true one included
Lines = list[tuple[list[int], int]]  # ids, and the first of them that is asked for


class Scorer:
    """Call a model of transformers as sensitivity's `score` calls a model: ids int64 [B, T] -> logits [B, T, V], in
    bfloat16 as it was trained."""

    def __init__(self, model: Any):
        self.model, self.config, self.embedding = model, self, model.get_input_embeddings()
        self.max_length = model.config.max_position_embeddings

    def __call__(self, ids: Tensor) -> Tensor:
        with torch.autocast(ids.device.type, torch.bfloat16):
            return self.model(input_ids=ids, use_cache=False).logits


def measure(model: Any, tokenizer: Any, text: Text, sides: Sequence[str] = SIDES) -> dict[str, np.ndarray]:
    """Return the arrays. inside_, outside_: nats and bytes of each document. taught_, untaught_: see `ask`. rephrased_:
    the taught facts asked for in words that were not taught, without a rank."""
    with eval_mode(model):
        found: dict[str, np.ndarray] = {}
        for side in sides:
            if side in ("inside", "outside"):
                values = read(model, tokenizer, getattr(text, side))
            elif side == "rephrased":
                values = ask(model, tokenizer, [rephrased(fact) for fact in text.taught], candidates=1)
            else:
                values = ask(model, tokenizer, getattr(text, side))
            found |= {f"{side}_{name}": value for name, value in values.items()}
    return found


def read(model: Any, tokenizer: Any, documents: Sequence[Document]) -> dict[str, np.ndarray]:
    """Return {"nats", "bytes"} of each document on its own after START; its end is not predicted."""
    start = tokenizer.convert_tokens_to_ids(START)
    lines = [([start, *encode(tokenizer, document.text)], 1) for document in documents]
    nats, _ = score(Scorer(model), lines, batch=8)
    return {
        "nats": np.array([part.sum(dtype=np.float64) for part in nats]),
        "bytes": np.array([len(document.text.encode()) for document in documents]),
    }


def rephrased(fact: Fact) -> Fact:
    """Ask for a fact in other words. No id of the title is then among those before the answer's first token that an
    n-gram memory reads."""
    return Fact(fact.title, f"Question: What is {fact.title}?\nAnswer:", fact.answer)


def ask(model: Any, tokenizer: Any, facts: Sequence[Fact], candidates: int = CANDIDATES) -> dict[str, np.ndarray]:
    """Ask each fact with closed book: after START and the prompt ("TITLE is") and nothing else.

    nats, tokens: of its description. exact: 1 if every token of it is the likeliest, so that greedy decoding gives it.
    rank: 1 if it has fewer nats per token than candidates - 1 descriptions of other facts of the same list (chance: 1 /
    candidates); no rank with candidates=1.
    """
    rng = np.random.default_rng(0)
    start = tokenizer.convert_tokens_to_ids(START)
    lines: Lines = []
    for fact in facts:
        wrong = sorted({other.answer for other in facts} - {fact.answer})
        for answer in (fact.answer, *(wrong[i] for i in rng.permutation(len(wrong))[: candidates - 1])):
            prompt, whole = encode(tokenizer, fact.prompt), encode(tokenizer, fact.prompt + answer)
            lines.append(([start, *whole], len(prompt) + 1))
    nats, hits = score(Scorer(model), lines, batch=128)
    each = len(lines) // len(facts)  # fewer than candidates if the list has fewer facts
    means = np.array([part.mean() for part in nats]).reshape(len(facts), each)
    found = {
        "nats": np.array([part.sum(dtype=np.float64) for part in nats[::each]]),
        "tokens": np.array([len(part) for part in nats[::each]]),
        "exact": np.array([float(part.all()) for part in hits[::each]]),
    }
    if each > 1:
        found["rank"] = np.array([float((row[0] < row[1:]).all()) for row in means])
    return found
