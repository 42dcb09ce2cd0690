"""A run as one value, the cell of which table its result is, and the captions of both.

A result is identified by fields, never by a caption: `cell_of` reads the Cell of a line of results.jsonl from the
line's own fields, `Table` says which cells are compared with each other, and the captions of both are made here alone.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import xxhash

from engram.config import EngramConfig
from engram.lm.run import Setting
from engram.lm.tokenizer import SMALLEST_VOCAB
from engram.lm.train import TrainConfig
from engram.lm.transformer import TransformerConfig

HOME = Path(__file__).parents[1]

# small is the main job. tiny is for sweeps: its budget is what the plain model trains in about a minute on one thread.
SETTINGS: dict[str, Setting] = {
    "small": Setting(train=TrainConfig(tokens=3_300_000)),
    "tiny": Setting(
        model=TransformerConfig(vocab_size=4096, hidden_size=128, layers=2),
        memory=EngramConfig(layers=(1,), orders=(2, 3), heads=4, head_dim=32, rows_per_head=65536),
        train=TrainConfig(tokens=560_000, batch_size=8, context=256),
    ),
}
LETTERS = {"S": "small", "T": "tiny"}  # letters that older commands use


@dataclass(frozen=True)
class Cell:
    """What identifies a result, except its seed.

    Attributes:
        question: the folder. arm: one of experiments.arms.NAMES. variant: its row in the tables of the question.
        size: "small" or "tiny"; "" for a setting of its own. text: the corpus. vocabulary: entries of the tokenizer.
        tokens: of training, as configured. layers: of the model. options: of the arm. held_out: "validation" or "tune".
        device: of the dense weights.
    """

    question: str
    arm: str
    variant: str
    size: str
    text: str
    vocabulary: int
    tokens: int
    layers: int
    options: tuple[tuple[str, Any], ...] = ()
    held_out: str = "validation"
    device: str = "cpu"

    @property
    def table(self) -> Table:
        """The table that this cell is a row of: the fields in TABLES of the question tell its tables apart."""
        names = [name for name in tables_by(self.question) if name != "text"]
        return Table(self.question, self.size, self.text, self.device, **{name: getattr(self, name) for name in names})


@dataclass(frozen=True)
class Table:
    """A set of cells that are compared with each other. A field is None if cells of one table may differ in it."""

    question: str
    size: str
    text: str
    device: str = "cpu"
    vocabulary: int | None = None
    tokens: int | None = None
    layers: int | None = None

    def __str__(self) -> str:
        """Return the caption, "tiny: kjv, 0.56M tokens". The text is left out if the question has one text, the size's
        own."""
        usual = self.size in SETTINGS and self.text == SETTINGS[self.size].corpus
        parts = [] if usual and "text" not in tables_by(self.question) else [_text(self.question, self.text)]
        if self.vocabulary is not None:
            parts.append(f"vocabulary {self.vocabulary:,}{' (bytes)' if self.vocabulary == SMALLEST_VOCAB else ''}")
        if self.tokens is not None:
            parts.append(f"{self.tokens / 1e6:.2f}M tokens")
        if self.layers is not None:
            parts.append(f"{self.layers} layers")
        caption = ": ".join(filter(None, (self.size, ", ".join(parts))))
        return caption if self.device == "cpu" else f"{caption}, on {self.device}"


def cell_of(record: dict[str, Any]) -> Cell:
    """Return the cell of a line of results.jsonl or tune.jsonl, from its own fields."""
    setting = record["setting"]
    return Cell(
        record["experiment"],
        record["arm"],
        record["variant"],
        record["size"],
        setting["corpus"],
        setting["vocab_size"],
        setting["train"]["tokens"],
        setting["model"]["layers"],
        tuple(sorted(record["options"].items())),
        record["held_out"],
        record.get("device", "cpu"),
    )


@dataclass(frozen=True)
class Run:
    """One run: what is trained, on what and how, with which seed.

    Attributes:
        experiment: the folder of the question. arm: one of experiments.arms.NAMES.
        setting: text, model, memory, training, seed.
        options: of the arm, as (name, value) pairs. One belongs to the runner and works for every arm: ("epochs", x)
            replaces the budget in tokens by x passes over the training text, so that models with different tokenizers
            read the same text.
        variant: its row in tables and figures; runs that differ only in the seed share it. Default: the arm's name.
        size: "small" or "tiny", whose setting this one was made from; "" for a setting of its own.
        held_out: "validation", or "tune" for choosing learning rates.
        device: of the dense weights, "cpu" or "cuda"; tables stay in host memory.
    """

    experiment: str
    arm: str
    setting: Setting
    options: tuple[tuple[str, Any], ...] = ()
    variant: str = ""
    size: str = ""
    held_out: str = "validation"
    device: str = "cpu"

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", tuple(sorted((str(name), value) for name, value in self.options)))
        object.__setattr__(self, "variant", self.variant or self.arm)

    @property
    def key(self) -> str:
        """Digest (16 hex digits) of everything that decides the outcome, the seed included. Question, variant and size
        are not in it, so that a run of two questions is made once."""
        what = [self.arm, self.options, asdict(self.setting), self.held_out]
        what += [] if self.device == "cpu" else [self.device]
        return xxhash.xxh3_64_hexdigest(json.dumps(what, sort_keys=True).encode())

    @property
    def kind(self) -> str:
        """The key without the seed ("cell" in a line): runs that are repetitions of each other share it."""
        return self.seeded(0).key

    @property
    def cell(self) -> Cell:
        """The cell that the result of this run belongs to."""
        setting = self.setting
        shape = setting.corpus, setting.vocab_size, setting.train.tokens, setting.model.layers
        return Cell(
            self.experiment, self.arm, self.variant, self.size, *shape, self.options, self.held_out, self.device
        )

    @property
    def table(self) -> Table:
        return self.cell.table

    @property
    def seed(self) -> int:
        return self.setting.train.seed

    def seeded(self, seed: int) -> Run:
        """Return the same run with another seed of weights, addresses and data order."""
        return replace(self, setting=self.setting.seeded(seed))

    def on(self, device: str) -> Run:
        """Return the same run on another device, in a table of its own: losses differ in late digits, seconds
        completely.

        Raises:
            ValueError: this machine does not have the device.
        """
        if device == self.device:
            return self
        if device != "cuda" or not torch.cuda.is_available():
            raise ValueError(f"this machine has no device {device!r}: choose cpu, or cuda on a machine with a GPU")
        return replace(self, device=device)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Run:
        values = json.loads(text)
        values["setting"] = Setting.from_json(json.dumps(values["setting"]))
        values["options"] = tuple((name, value) for name, value in values["options"])
        return cls(**values)


def change(
    setting: Setting, memory: dict[str, Any] | None = None, train: dict[str, Any] | None = None, **other: Any
) -> Setting:
    """Return a copy of a setting with some fields of its memory, of its training or of itself changed."""
    changed = replace(setting, memory=setting.memory.replace(**(memory or {})), **other)
    return replace(changed, train=replace(changed.train, **(train or {})))


def size_named(text: str) -> str:
    """Return "small" or "tiny" for either name or its letter. Raises ValueError for any other text."""
    size = LETTERS.get(text, text)
    if size not in SETTINGS:
        raise ValueError(f"unknown size {text!r}; the sizes are {', '.join(SETTINGS)}")
    return size


def names() -> tuple[str, ...]:
    """Return the questions: every folder beside lab/ that has a configs.py, in the order of their names."""
    return tuple(sorted(file.parent.name for file in HOME.glob("*/configs.py")))


def questions(name: str) -> ModuleType:
    """Return the configs module of a question. Raises ValueError for an unknown name; the message lists the known ones.

    Such a module has a docstring whose first line is the question, BASELINE (the variant that the others are compared
    with), SIZE (the size that it is run at) and configs(size) -> list of runs. It may have
        TABLES: fields of Cell that tell its tables apart, beside the size and the device; default ("text",).
        TEXTS: {text: its name in captions}.
        MAKES: {kind: prepare(setting, held_out) -> Data}: a corpus named "<kind>:<details>" is made by that function.
        tune() -> the runs of a grid of learning rates, and what `hook` lists.
    """
    if name not in names():
        raise ValueError(f"unknown question {name!r}; the questions are {', '.join(names())}")
    return importlib.import_module(f"experiments.{name}.configs")


def hook(experiment: str, name: str) -> Callable[..., Any] | None:
    """Return a function that a question's configs module defines beside its runs; None if the lab's own is used.

    train(run, model, data, on_step) -> TrainLog: in place of engram.lm.train.train.
    evaluate(run, model, data) -> Evaluation: in place of engram.lm.evaluate.evaluate, to score something else.
    measure(run, model, data) -> dict: called with the evaluated model; its NumPy arrays go into documents.npz as
        measured_<name>, all else is small and goes into the record as "measures".
    summary(home) -> Markdown: tables of its own, before those that `report` makes for every question.
    """
    return getattr(questions(experiment), name, None) if experiment in names() else None


@lru_cache
def tables_by(question: str) -> tuple[str, ...]:
    """Return the fields of Cell that tell the tables of a question apart."""
    return getattr(questions(question), "TABLES", ("text",)) if question in names() else ("text",)


def _text(question: str, text: str) -> str:
    texts = getattr(questions(question), "TEXTS", {}) if question in names() else {}
    return texts.get(text, text)
