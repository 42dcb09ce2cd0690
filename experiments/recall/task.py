"""In-context recall with made-up tokens: pairs of key and value, filler between them, then all keys ask their values.

Source: MQAR of Zoology (arXiv 2312.04927) where there is no filler; with filler, the multi-needle retrieval that the
paper reports after its long-context training. A corpus "recall:16+0" has 16 pairs and no filler, "recall:4+48" four
pairs in 48 tokens of filler. One document:

    <|endoftext|>  filler .. key value filler .. key value ..  |  key value  key value ..  (another order)

Only the values behind the bar are trained on and asked for. Keys, values and filler are drawn anew for every document
from vocabularies of their own, so nothing but the text in front of the bar tells the value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from engram.addressing import TokenMap
from engram.lm import evaluate as scoring
from engram.lm import train as lm
from engram.lm.corpus import Overlap
from engram.lm.evaluate import Evaluation
from engram.lm.run import Data, Setting
from engram.lm.tokenizer import END_OF_TEXT_ID, Encoded
from engram.lm.train import Batches, TrainLog
from experiments.config import Run

KEYS, VALUES, FILLER = 64, 64, 127
VOCABULARY = 1 + KEYS + VALUES + FILLER
TRAIN_DOCUMENTS, HELD_OUT_DOCUMENTS = 2**18, 512  # more than S trains on: none is read twice


@dataclass(frozen=True)
class Task:
    """pairs: of key and value in a document, at most KEYS. filler: tokens between them."""

    pairs: int
    filler: int

    @property
    def length(self) -> int:
        return 1 + 4 * self.pairs + self.filler

    @property
    def asked(self) -> np.ndarray:
        """Positions of the keys behind the bar, [pairs]: the token that follows each is an answer."""
        return 1 + 2 * self.pairs + self.filler + 2 * np.arange(self.pairs)

    @classmethod
    def of(cls, corpus: str) -> Task:
        """The task of a corpus' name. Raises ValueError on a name that is none."""
        kind, _, numbers = corpus.partition(":")
        try:
            pairs, filler = (int(number) for number in numbers.split("+"))
        except ValueError:
            pairs, filler = 0, 0
        if kind != "recall" or not 1 <= pairs <= KEYS or filler < 0:
            raise ValueError(f"a recall task is 'recall:pairs+filler' with 1 to {KEYS} pairs, not {corpus!r}")
        return cls(pairs, filler)


def documents_of(task: Task, count: int, seed: int) -> np.ndarray:
    """int32 [count, task.length]."""
    rng = np.random.default_rng([seed, task.pairs, task.filler])
    keys = 1 + rng.permuted(np.tile(np.arange(KEYS), (count, 1)), axis=1)[:, : task.pairs]
    values = 1 + KEYS + rng.integers(VALUES, size=(count, task.pairs))
    text = 1 + KEYS + VALUES + rng.integers(FILLER, size=(count, task.length))
    text[:, 0] = END_OF_TEXT_ID
    # Before the bar stand pairs + filler pieces in some order; a piece that is a pair is two tokens long.
    pieces = rng.permuted(np.tile(np.arange(task.pairs + task.filler) < task.pairs, (count, 1)), axis=1)
    places = (1 + np.cumsum(1 + pieces, axis=1) - (1 + pieces))[pieces].reshape(count, task.pairs)
    order = rng.permuted(np.tile(np.arange(task.pairs), (count, 1)), axis=1)
    rows = np.arange(count)[:, None]
    for at, which in ((places, np.arange(task.pairs)[None]), (task.asked[None], order)):
        text[rows, at], text[rows, at + 1] = keys[rows, which], values[rows, which]
    return text.astype(np.int32)


def prepare(setting: Setting, held_out: str = "validation") -> Data:
    """Made-up documents as a text; an answer counts as a byte, for want of any. Raises what Task.of raises."""
    task = Task.of(setting.corpus)
    train = documents_of(task, TRAIN_DOCUMENTS, seed=0)
    held = documents_of(task, HELD_OUT_DOCUMENTS, seed={"validation": 1, "tune": 2}[held_out])
    digest = xxhash.xxh3_128_hexdigest(train.tobytes())
    texts = (_encoded(documents, task.pairs) for documents in (train, held))
    return Data(None, TokenMap.identity(VOCABULARY), *texts, Overlap(0.0), digest)  # type: ignore[arg-type]


def _encoded(documents: np.ndarray, answers_each: int) -> Encoded:
    count, length = documents.shape
    numbers = np.repeat(np.arange(count, dtype=np.int32), length)
    return Encoded(documents.ravel(), numbers, length * np.arange(count + 1), np.full(count, answers_each))


def train(run: Run, model: Any, data: Data, on_step: Any = None) -> TrainLog:
    """engram.lm.train.train with the loss at the answers alone; one window is one document, and none comes twice: a
    memory would learn the answers of a document by heart, and what is asked here is recall within the text.

    Raises:
        ValueError: windows of another length than the documents; more steps than there are documents for.
        FloatingPointError: a loss that is not finite.
    """
    task, config = Task.of(run.setting.corpus), run.setting.train
    if config.context != task.length:
        raise ValueError(f"documents of {run.setting.corpus!r} have {task.length} tokens, context is {config.context}")
    # The stream lacks the token after its last window, so Batches sees one document less than there are.
    windows = Batches(data.train, config.context, config.batch_size, config.seed)
    if config.steps > windows.per_epoch:
        raise ValueError(
            f"{config.steps:,} steps of {config.batch_size} documents want more than the {windows.windows:,} that are "
            f"there, and none may come twice: take fewer tokens, or raise TRAIN_DOCUMENTS"
        )

    def batches(step: int) -> tuple[Tensor, Tensor, Tensor]:
        ids, targets, documents = windows(step)
        return ids, only_answers(targets, task), documents

    return lm.train(model, data.train, config, on_step=on_step, batches=batches)


def only_answers(targets: Tensor, task: Task) -> Tensor:
    """Targets [B, T] with -100, which cross_entropy passes over, wherever no answer is asked for."""
    masked = torch.full_like(targets, -100)
    masked[:, task.asked] = targets[:, task.asked]
    return masked


def evaluate(run: Run, model: Any, data: Data) -> Evaluation:
    """The loss at the answers alone: its tokens and bytes are answers."""
    task = Task.of(run.setting.corpus)
    whole = scoring.evaluate(model, data.validation)
    nats = whole.position_nats.reshape(-1, task.length)[:, task.asked].astype(np.float64).sum(1)
    loss = nats.mean() / task.pairs
    return whole._replace(
        loss=float(loss),
        bits_per_byte=float(loss / np.log(2)),
        document_nats=nats,
        document_tokens=np.full(len(nats), task.pairs),
    )


def measure(run: Run, model: Any, data: Data) -> dict[str, dict[str, float]]:
    """{"on": {"accuracy", "nats"}, "off": ...} of the answers of held-out documents; no "off" without a memory."""
    task = Task.of(run.setting.corpus)
    text = torch.from_numpy(data.validation.ids).long().view(-1, task.length).to(model.embedding.weight.device)
    found, memory = {"on": answers(model, text, task)}, model.memory
    if memory is not None:
        model.memory = None
        try:
            found["off"] = answers(model, text, task)
        finally:
            model.memory = memory
    return found


@torch.no_grad()
def answers(model: Any, text: Tensor, task: Task, batch: int = 64) -> dict[str, float]:
    """Share of answers that are the likeliest token, and nats of each, of documents [n, length]."""
    was_training, right, nats = model.training, 0, 0.0
    model.eval()
    for part in text.split(batch):
        log_p = model(part)[:, task.asked].float().log_softmax(-1)
        answer = part[:, task.asked + 1]
        right += int((log_p.argmax(-1) == answer).sum())
        nats -= float(log_p.gather(-1, answer[..., None]).double().sum())
    model.train(was_training)
    return {"accuracy": right / (len(text) * task.pairs), "nats": nats / (len(text) * task.pairs)}
