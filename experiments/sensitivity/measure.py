"""Facts and reading, with the memory on and off: what each loses when the memory falls silent."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F

from engram.lm.run import Data
from engram.lm.tokenizer import END_OF_TEXT_ID, Encoded
from experiments.config import Run
from experiments.sensitivity.facts import Fact, facts_of

ASKED, CANDIDATES = 200, 16  # facts asked for, and answers to choose among, the true one included
READING_TOKENS = 32_768  # of held-out text, at most


def measure(run: Run, model: Any, data: Data) -> dict[str, Any]:
    """{"on": numbers, "off": numbers}; "off" alone is missing where there is no memory. See `numbers`."""
    taught, untaught = (facts[:ASKED] for facts in facts_of(run.setting))
    found = {"on": numbers(model, data, taught, untaught)}
    memory = model.memory
    if memory is not None:
        model.memory = None
        try:
            found["off"] = numbers(model, data, taught, untaught)
        finally:
            model.memory = memory
    return found


def numbers(model: Any, data: Data, taught: list[Fact], untaught: list[Fact]) -> dict[str, float]:
    """What one model makes of facts (taught_..., untaught_...) and of held-out text (reading_..., copied_...).

    nats: per token. top1: share of tokens that are the likeliest. exact: share of facts whose whole description is the
    likeliest token by token, so that greedy decoding would say it. rank: share whose description has fewer nats per
    token than the other CANDIDATES - 1, drawn from the same facts (chance: 1 / CANDIDATES). copied: the held-out
    tokens whose pair with the token before occurred earlier in the window, so that the answer stands in the text.
    """
    was_training = model.training
    model.eval()
    found = {}
    for name, facts in (("taught", taught), ("untaught", untaught)):
        found |= {f"{name}_{key}": value for key, value in ask(model, data.tokenizer, facts).items()}
    found |= read(model, data.validation)
    model.train(was_training)
    return found


def ask(model: Any, tokenizer: tokenizers.Tokenizer, facts: list[Fact]) -> dict[str, float]:
    """{"nats", "top1", "exact", "rank"} of facts, each after <|endoftext|> and nothing else."""
    rng = np.random.default_rng(0)
    lines: list[tuple[list[int], int]] = []  # ids, and where the answer begins
    for fact in facts:
        wrong = sorted({other.answer for other in facts} - {fact.answer})  # some facts share their description
        choice = rng.permutation(len(wrong))[: CANDIDATES - 1]
        for answer in (fact.answer, *(wrong[i] for i in choice)):
            prompt, whole = (tokenizer.encode(text).ids for text in (fact.prompt, fact.prompt + answer))
            lines.append(([END_OF_TEXT_ID, *whole], len(prompt) + 1))
    nats, hits = score(model, lines)
    per_fact = len(lines) // len(facts)  # fewer than CANDIDATES only where the facts have so few descriptions
    true = range(0, len(lines), per_fact)
    means = np.array([part.mean() for part in nats]).reshape(len(facts), per_fact)
    return {
        "nats": float(np.concatenate([nats[i] for i in true]).mean()),
        "top1": float(np.concatenate([hits[i] for i in true]).mean()),
        "exact": float(np.mean([hits[i].all() for i in true])),
        "rank": float(np.mean((means[:, :1] < means[:, 1:]).all(axis=1))),
    }


@torch.no_grad()
def score(
    model: Any, lines: list[tuple[list[int], int]], batch: int = 256
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """For each (ids, first): nats of ids[first:], and whether each is the likeliest token, given all ids before it.

    Lines beyond the model's max_length are cut.
    """
    most, device = model.config.max_length + 1, model.embedding.weight.device
    nats: list[np.ndarray] = [np.zeros(0)] * len(lines)
    hits: list[np.ndarray] = [np.zeros(0, bool)] * len(lines)
    by_length = sorted(range(len(lines)), key=lambda i: len(lines[i][0]))  # little padding
    for start in range(0, len(lines), batch):
        part = {i: lines[i][0][:most] for i in by_length[start : start + batch]}
        padded = torch.zeros(len(part), max(map(len, part.values())), dtype=torch.int64)
        for row, ids in enumerate(part.values()):
            padded[row, : len(ids)] = torch.tensor(ids)
        padded = padded.to(device)
        logits = model(padded[:, :-1]).float()
        loss = F.cross_entropy(logits.flatten(0, 1), padded[:, 1:].flatten(), reduction="none").view(len(part), -1)
        right = logits.argmax(-1) == padded[:, 1:]
        for row, (i, ids) in enumerate(part.items()):
            here = slice(lines[i][1] - 1, len(ids) - 1)
            nats[i], hits[i] = loss[row, here].cpu().numpy(), right[row, here].cpu().numpy()
    return nats, hits


def read(model: Any, text: Encoded) -> dict[str, float]:
    """{"reading_nats", "reading_top1", "copied_top1", "copied_share"} of held-out documents, window by window."""
    context, lines, tokens = model.config.max_length, [], 0
    for begin, stop in zip(text.starts[:-1].tolist(), text.starts[1:].tolist(), strict=True):
        for start in range(begin, stop - 1, context):
            if tokens < READING_TOKENS:
                lines.append((text.ids[start : min(start + context + 1, stop)].tolist(), 1))
                tokens += len(lines[-1][0]) - 1
    nats, hits = score(model, lines, batch=8)
    copied = np.concatenate([occurred_before(ids) for ids, _ in lines])
    all_hits = np.concatenate(hits)
    return {
        "reading_nats": float(np.concatenate(nats).mean()),
        "reading_top1": float(all_hits.mean()),
        "copied_top1": float(all_hits[copied].mean()) if copied.any() else float("nan"),
        "copied_share": float(copied.mean()),
    }


def occurred_before(ids: list[int]) -> np.ndarray:
    """bool [len(ids) - 1]: whether the pair that each token from the second on ends has stood earlier in ids."""
    seen: set[tuple[int, int]] = set()
    found = []
    for pair in pairwise(ids):
        found.append(pair in seen)
        seen.add(pair)
    return np.array(found, bool)
