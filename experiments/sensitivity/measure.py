"""Facts and reading, with the memory on and off: the loss of each when the memory is switched off."""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise
from typing import Any

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F

from engram.lm.evaluate import eval_mode
from engram.lm.run import Data
from engram.lm.tokenizer import END_OF_TEXT_ID, Encoded
from experiments.lab.cell import Run
from experiments.lab.measures import on_and_off
from experiments.sensitivity.facts import Fact, Lines, lines_of

ASKED = 200  # lines of each kind
READING_TOKENS = 32_768  # of held-out text, at most


def measure(run: Run, model: Any, data: Data) -> dict[str, Any]:
    """Return {"on": numbers, "off": numbers}; without "off" if the model has no memory. See `numbers`."""
    lines = lines_of(run.setting)
    return on_and_off(model, lambda: numbers(model, data, lines))


def numbers(model: Any, data: Data, lines: Lines) -> dict[str, float]:
    """Return the measures of one model on ASKED lines of each kind (taught_..., untaught_..., prose_..., new_prose_...)
    and on held-out text (reading_..., copied_...).

    nats: per token. top1: share of tokens that are the likeliest. exact: share of lines whose whole answer is the
    likeliest token by token, so that greedy decoding gives it. copied: the held-out tokens whose pair with the token
    before occurred earlier in the window, so that the answer is in the text.
    """
    with eval_mode(model):
        found = {}
        for kind in fields(lines):
            asked = ask(model, data.tokenizer, getattr(lines, kind.name)[:ASKED])
            found |= {f"{kind.name}_{key}": value for key, value in asked.items()}
        found |= read(model, data.validation)
    return found


def ask(model: Any, tokenizer: tokenizers.Tokenizer, lines: list[Fact]) -> dict[str, float]:
    """Return {"nats", "top1", "exact"} of lines, each after <|endoftext|> and nothing else."""
    asked = []  # ids, and where the answer begins
    for line in lines:
        prompt, whole = (tokenizer.encode(text).ids for text in (line.prompt, line.text))
        asked.append(([END_OF_TEXT_ID, *whole], len(prompt) + 1))
    nats, hits = score(model, asked)
    return {
        "nats": float(np.concatenate(nats).mean()),
        "top1": float(np.concatenate(hits).mean()),
        "exact": float(np.mean([right.all() for right in hits])),
    }


@torch.no_grad()
def score(
    model: Any, lines: list[tuple[list[int], int]], batch: int = 256
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return for each (ids, first): nats of ids[first:], and True for each that is the likeliest token, with all ids
    before it.

    Lines beyond the model's max_length are cut.
    """
    most, device = model.config.max_length + 1, model.embedding.weight.device
    nats: list[np.ndarray] = [np.zeros(0)] * len(lines)
    hits: list[np.ndarray] = [np.zeros(0, bool)] * len(lines)
    by_length = sorted(
        range(len(lines)), key=lambda i: len(lines[i][0])
    )  # windows of similar length need little padding
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
    """Return {"reading_nats", "reading_top1", "copied_top1", "copied_share"} of held-out documents, window by
    window."""
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
    """Return bool [len(ids) - 1]: True if the pair that a token, from the second on, ends has occurred
    earlier in ids."""
    seen: set[tuple[int, int]] = set()
    found = []
    for pair in pairwise(ids):
        found.append(pair in seen)
        seen.add(pair)
    return np.array(found, bool)
