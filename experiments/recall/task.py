"""In-context recall with made-up tokens: pairs of key and value, filler between them, then keys to be answered.

Source: MQAR of Zoology (arXiv 2312.04927) without filler; with filler, the needle retrieval that the paper reports
after its long-context training. A corpus "recall:8/4+16" has 8 pairs, 4 of which are asked for, and 16 tokens of
filler. One document:

    <|endoftext|>  filler .. key value filler .. key value ..  |  key blank  key blank ..  (another order)

Behind the bar each value is replaced by a blank. The model predicts the value at the key. If answers could be read,
they would tell which values are left, and a model that excludes those is right far more often than 1 in `pairs` without
reading any key. Keys, values and filler are drawn again for every document from separate vocabularies, keys and values
without repeats, so that only the text before the bar tells which value belongs to which key.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from engram.addressing import TokenMap
from engram.lm import train as lm
from engram.lm.corpus import Overlap
from engram.lm.evaluate import Evaluation, eval_mode
from engram.lm.run import Data, Setting
from engram.lm.tokenizer import END_OF_TEXT_ID, Encoded
from engram.lm.train import Batches, TrainLog
from experiments.lab.cell import Run
from experiments.lab.measures import on_and_off

KEYS, VALUES, FILLER = 16, 16, 30
VOCABULARY = 1 + KEYS + VALUES + FILLER + 1
BLANK = VOCABULARY - 1
TRAIN_DOCUMENTS, HELD_OUT_DOCUMENTS = 2**18, 512  # more than small trains on, so that none is read twice


@dataclass(frozen=True)
class Task:
    """The sizes of one recall task.

    Attributes:
        pairs: of key and value in a document, at most KEYS. questions: how many of them are asked for, at most all.
        filler: tokens between the pairs.
    """

    pairs: int
    questions: int
    filler: int

    @property
    def length(self) -> int:
        return 1 + 2 * self.pairs + self.filler + 2 * self.questions

    @property
    def asked(self) -> np.ndarray:
        """Positions of the keys behind the bar, [questions]: the token that follows each is an answer."""
        return 1 + 2 * self.pairs + self.filler + 2 * np.arange(self.questions)

    @classmethod
    def of(cls, corpus: str) -> Task:
        """Return the task that a corpus name describes. Raises ValueError if the name does not describe one."""
        parts = re.fullmatch(r"recall:(\d+)/(\d+)\+(\d+)", corpus)
        pairs, questions, filler = (int(number) for number in parts.groups()) if parts else (0, 0, 0)
        if not 1 <= questions <= pairs <= KEYS:
            raise ValueError(
                f"a recall task is 'recall:pairs/questions+filler' with 1 to {KEYS} pairs and no more questions, "
                f"not {corpus!r}"
            )
        return cls(pairs, questions, filler)


def documents_of(task: Task, count: int, seed: int) -> np.ndarray:
    """Return int32 [count, task.length], with the answers."""
    rng = np.random.default_rng([seed, task.pairs, task.questions, task.filler])

    def some(first: int, of: int) -> np.ndarray:
        return first + rng.permuted(np.tile(np.arange(of), (count, 1)), axis=1)[:, : task.pairs]

    keys, values = some(1, KEYS), some(1 + KEYS, VALUES)
    text = 1 + KEYS + VALUES + rng.integers(FILLER, size=(count, task.length))
    text[:, 0] = END_OF_TEXT_ID
    # The text before the bar is pairs + filler pieces in random order; a piece that is a pair is two tokens long.
    pieces = rng.permuted(np.tile(np.arange(task.pairs + task.filler) < task.pairs, (count, 1)), axis=1)
    positions = (1 + np.cumsum(1 + pieces, axis=1) - (1 + pieces))[pieces].reshape(count, task.pairs)
    order = some(0, task.pairs)[:, : task.questions]
    rows = np.arange(count)[:, None]
    for at, which in ((positions, np.arange(task.pairs)[None]), (task.asked[None], order)):
        text[rows, at], text[rows, at + 1] = keys[rows, which], values[rows, which]
    return text.astype(np.int32)


def prepare(setting: Setting, held_out: str = "validation") -> Data:
    """Return made-up documents as a text. Each answer counts as one byte, because these tokens have none. Raises what
    Task.of raises."""
    task = Task.of(setting.corpus)
    train = documents_of(task, TRAIN_DOCUMENTS, seed=0)
    other = documents_of(task, HELD_OUT_DOCUMENTS, seed={"validation": 1, "tune": 2}[held_out])
    digest = xxhash.xxh3_128_hexdigest(train.tobytes())
    texts = (_encoded(documents, task.questions) for documents in (train, other))
    return Data(None, TokenMap.identity(VOCABULARY), *texts, Overlap(0.0), digest)  # type: ignore[arg-type]


def _encoded(documents: np.ndarray, answers_each: int) -> Encoded:
    count, length = documents.shape
    numbers = np.repeat(np.arange(count, dtype=np.int32), length)
    return Encoded(documents.ravel(), numbers, length * np.arange(count + 1), np.full(count, answers_each))


def train(run: Run, model: Any, data: Data, on_step: Any = None) -> TrainLog:
    """Train with engram.lm.train.train on the loss at the answers alone. One window is one document, and none comes
    twice: a memory would memorise repeated answers, while this task measures recall within the text.

    Raises:
        ValueError: windows of another length than the documents; more steps than documents.
        FloatingPointError: a loss that is not finite.
    """
    task, config = Task.of(run.setting.corpus), run.setting.train
    if config.context != task.length:
        raise ValueError(f"documents of {run.setting.corpus!r} have {task.length} tokens, context is {config.context}")
    # The stream lacks the token after its last window, so Batches counts one document fewer.
    windows = Batches(data.train, config.context, config.batch_size, config.seed)
    if config.steps > windows.per_epoch:
        raise ValueError(
            f"{config.steps:,} steps of {config.batch_size} documents need more than the {windows.windows:,} "
            f"documents of this text, and none may come twice: take fewer tokens, or raise TRAIN_DOCUMENTS"
        )

    def batches(step: int) -> tuple[Tensor, Tensor, Tensor]:
        ids, targets, documents = windows(step)
        return without_answers(ids, task), only_answers(targets, task), documents

    return lm.train(model, data.train, config, on_step=on_step, batches=batches)


def without_answers(ids: Tensor, task: Task) -> Tensor:
    """Return a copy of documents [n, length] with a blank in place of each answer."""
    hidden = ids.clone()
    hidden[:, task.asked + 1] = BLANK
    return hidden


def only_answers(targets: Tensor, task: Task) -> Tensor:
    """Return targets [n, length] with -100, which cross_entropy skips, except at the answers."""
    masked = torch.full_like(targets, -100)
    masked[:, task.asked] = targets[:, task.asked]
    return masked


def of_other_texts(ids: Tensor, task: Task) -> Tensor:
    """Return a copy of documents [n, length] whose questions are keys that are not in them: the old answers that a
    model still gets right, it gets right without reading keys.

    Raises:
        ValueError: pairs of all keys, so that none is left.
    """
    if task.pairs + task.questions > KEYS:
        raise ValueError(f"{task.pairs} pairs leave fewer than {task.questions} of {KEYS} keys to ask for in vain")
    bar, changed = int(task.asked[0]), ids.clone()
    for text in changed:
        free = sorted({*range(1, 1 + KEYS)} - {*text[:bar].tolist()})
        text[task.asked] = torch.tensor(free[: task.questions], device=text.device)
    return changed


def evaluate(run: Run, model: Any, data: Data) -> Evaluation:
    """Return the loss at the answers alone: its tokens and bytes are answers."""
    task = Task.of(run.setting.corpus)
    nats, _ = answer(model, _texts(model, data, task), task)
    everywhere = np.full((len(nats), task.length), np.nan, dtype=np.float32)
    everywhere[:, task.asked] = nats
    loss, answers = float(nats.mean()), np.full(len(nats), task.questions)
    return Evaluation(loss, loss / math.log(2), nats.sum(1), answers, everywhere.ravel())


def measure(run: Run, model: Any, data: Data) -> dict[str, dict[str, float]]:
    """Return {"on": {"accuracy", "nats", "keyless"}, "off": ...} of the answers of held-out documents; no "off" without
    a memory. keyless: the accuracy if keys that are in no text are asked instead."""
    task = Task.of(run.setting.corpus)
    text = _texts(model, data, task)
    return on_and_off(model, lambda: _numbers(model, text, task))


def _texts(model: Any, data: Data, task: Task) -> Tensor:
    return torch.from_numpy(data.validation.ids).long().view(-1, task.length).to(model.embedding.weight.device)


def _numbers(model: Any, text: Tensor, task: Task) -> dict[str, float]:
    nats, right = answer(model, text, task)
    _, guessed = answer(model, of_other_texts(text, task), task)
    return {"accuracy": float(right.mean()), "nats": float(nats.mean()), "keyless": float(guessed.mean())}


@torch.no_grad()
def answer(model: Any, text: Tensor, task: Task, batch: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Return (nats of each answer, float64; True where it is the likeliest token), both [n, questions], of documents
    [n, length] with the answers, which the model does not see."""
    nats, right = [], []
    with eval_mode(model):
        for part in text.split(batch):
            log_p = model(without_answers(part, task))[:, task.asked].double().log_softmax(-1)
            true = part[:, task.asked + 1]
            nats.append(-log_p.gather(-1, true[..., None])[..., 0])
            right.append(log_p.argmax(-1) == true)
    return torch.cat(nats).cpu().numpy(), torch.cat(right).cpu().numpy()
