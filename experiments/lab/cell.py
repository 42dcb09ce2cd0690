"""What a run is, as one value, and the two settings that all experiments are run at."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import xxhash

from engram.config import EngramConfig
from engram.lm.run import Setting
from engram.lm.train import TrainConfig
from engram.lm.transformer import TransformerConfig

HOME = Path(__file__).parent
NAMES = (
    *("sceptic", "lookup_or_module", "components", "slots", "allocation", "vocabulary", "tokens"),
    *("kneser_ney", "sensitivity", "depth", "recall"),
)

# S is the main job. T is for sweeps: its budget is what the plain model trains in about a minute on one thread.
SETTINGS: dict[str, Setting] = {
    "S": Setting(train=TrainConfig(tokens=3_300_000)),
    "T": Setting(
        model=TransformerConfig(vocab_size=4096, hidden_size=128, layers=2),
        memory=EngramConfig(layers=(1,), orders=(2, 3), heads=4, head_dim=32, rows_per_head=65536),
        train=TrainConfig(tokens=560_000, batch_size=8, context=256),
    ),
}

LRS, TABLE_LRS = (1.5e-3, 3e-3, 6e-3), (0.01, 0.03, 0.1)
# Where a grid goes on when its best rate is its smallest or largest, up to WIDEST rates.
LADDERS = {
    "lr": (3.75e-4, 7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2),
    "table_lr": (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
}
WIDEST = 6


@dataclass(frozen=True)
class Run:
    """One run: what is trained, on what and how, with which seed.

    Attributes:
        experiment: the folder that asks for it. arm: one of experiments.arms.NAMES.
        setting: text, model, memory, training, seed.
        options: of the arm, as (name, value) pairs. One is the runner's own and goes for every arm: ("epochs", x)
            replaces the budget in tokens by x passes over the training text, so that models with different tokenizers
            read the same text.
        label: its row in tables and figures; runs that differ only in the seed share it. Default: the arm's name.
        group: its table. Arms are compared with the baseline of their own group. Default: the text's name.
        held_out: "validation", or "tune" for choosing learning rates.
        device: of the dense weights, "cpu" or "cuda"; tables stay in host memory.
    """

    experiment: str
    arm: str
    setting: Setting
    options: tuple[tuple[str, Any], ...] = ()
    label: str = ""
    group: str = ""
    held_out: str = "validation"
    device: str = "cpu"

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", tuple(sorted((str(name), value) for name, value in self.options)))
        object.__setattr__(self, "label", self.label or self.arm)
        object.__setattr__(self, "group", self.group or self.setting.corpus)

    @property
    def key(self) -> str:
        """Digest (16 hex digits) of everything that decides the outcome, the seed included. Experiment, label and
        group do not: a run that two experiments ask for is made once."""
        what = [self.arm, self.options, asdict(self.setting), self.held_out]
        what += [] if self.device == "cpu" else [self.device]
        return xxhash.xxh3_64_hexdigest(json.dumps(what, sort_keys=True).encode())

    @property
    def cell(self) -> str:
        """The key without the seed: runs that are repetitions of each other share it."""
        return self.seeded(0).key

    @property
    def seed(self) -> int:
        return self.setting.train.seed

    def seeded(self, seed: int) -> Run:
        """The same run with another seed of weights, addresses and data order."""
        return replace(self, setting=self.setting.seeded(seed))

    def on(self, device: str) -> Run:
        """The same run on another device, in a table of its own: losses differ in late digits, seconds wholly.

        Raises:
            ValueError: a device that is not there.
        """
        if device == self.device:
            return self
        if device != "cuda" or not torch.cuda.is_available():
            raise ValueError(f"no device {device!r} here: cpu, or cuda on a machine with a GPU")
        return replace(self, device=device, group=f"{self.group}, on {device}")

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
    """A copy of a setting with some fields of its memory, of its training or of itself changed."""
    changed = replace(setting, memory=setting.memory.replace(**(memory or {})), **other)
    return replace(changed, train=replace(changed.train, **(train or {})))


def questions(name: str) -> ModuleType:
    """The configs module of an experiment. Raises ValueError for an unknown name; the message lists the known ones."""
    if name not in NAMES:
        raise ValueError(f"unknown experiment {name!r}; there are {', '.join(NAMES)}")
    return importlib.import_module(f"experiments.{name}.configs")


def hook(experiment: str, name: str) -> Callable[..., Any] | None:
    """What an experiment's configs module does itself beside listing runs; None where it leaves that to the lab.

    train(run, model, data, on_step) -> TrainLog: in place of engram.lm.train.train.
    evaluate(run, model, data) -> Evaluation: in place of engram.lm.evaluate.evaluate, for what else is to be scored.
    measure(run, model, data) -> dict: called with the evaluated model; its NumPy arrays go into the side file of the
        run as measured_<name>, all else is small and goes into the record as "measures".
    summary(home) -> Markdown: tables of its own, before those that `report` makes for every experiment.
    """
    return getattr(questions(experiment), name, None) if experiment in NAMES else None


def read_results(file: Path) -> list[dict[str, Any]]:
    """The runs of a results.jsonl or tune.jsonl, oldest first; [] where there is none yet.

    Raises:
        ValueError: a line that is no run, with its number; a last line that a crash cut off.
    """
    if not file.exists():
        return []
    text = file.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
        raise ValueError(f"the last line of {file} is torn: the next `python -m experiments run` takes it away")
    results = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            results.append(json.loads(line))
            results[-1]["key"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{file}, line {number} is no result: delete it, and its run is made again") from error
    return results


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The results of an experiment with a run.py of its own, oldest first; [] where there is none yet."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def tuned(arm: str, setting: Setting, file: Path | None = None, tokens: float = 0) -> dict[str, float]:
    """The learning rates {"lr", "table_lr"} with the lowest loss of an arm's tuning runs; {} where none ran yet. The
    best rate falls as training gets longer: where an arm was tuned at several budgets, the one nearest (by ratio) to
    the training's counts.

    Args:
        arm: the label of the tuning runs. file: their tune.jsonl; default: the one of sceptic, which tunes all arms.
        tokens: about how many the training takes, where passes over a text decide; default: the setting's.
    """
    tokens = tokens or setting.train.tokens
    results = [r for r in read_results(file or HOME / "sceptic" / "tune.jsonl") if r["label"] == arm]
    if not results:
        return {}
    budget = min((budget_of(r) for r in results), key=lambda count: abs(math.log(count / tokens)))
    best = min((r for r in results if budget_of(r) == budget), key=lambda r: (r["loss"], r["key"]))["setting"]["train"]
    return {"lr": best["lr"], "table_lr": best["table_lr"]}


def budget_of(result: dict[str, Any]) -> int:
    """The tokens that a run was asked to train on."""
    return int(result["setting"]["train"]["tokens"])


def rate_grid(
    cells: Iterable[Run], file: Path, lrs: Sequence[float] = LRS, table_lrs: Sequence[float] = TABLE_LRS
) -> list[Run]:
    """The tuning runs of some cells: first every lr at the cell's own table_lr, then, once those are in `file`, every
    table_lr at the best lr. A grid whose best rate lies at its edge goes on by one rate of LADDERS, as far as WIDEST.
    Give table_lrs=() for arms that have no table, lrs=() where lr stays as it is."""
    done = {result["key"]: result["loss"] for result in read_results(file)}
    runs = []
    for cell in cells:
        cell = replace(cell, held_out="tune")
        first = _grid(cell, "lr", lrs, done)
        runs += first
        if all(run.key in done for run in first):
            runs += _grid(min(first, key=lambda run: done[run.key]), "table_lr", table_lrs, done)
    return list({run.key: run for run in runs}.values())


def _grid(cell: Run, rate: str, values: Sequence[float], done: dict[str, float]) -> list[Run]:
    """The cell at each value of a rate, and at the next of the ladder while the best is at the edge; [cell] of none."""
    while values:
        runs = [_rates(cell, **{rate: value}) for value in values]
        if len(values) >= WIDEST or not all(run.key in done for run in runs):
            return runs
        best = min(range(len(runs)), key=lambda place: done[runs[place].key])
        step = {0: -1, len(runs) - 1: 1}.get(best, 0)
        place = LADDERS[rate].index(values[best]) + step
        if step == 0 or not 0 <= place < len(LADDERS[rate]):
            return runs
        values = sorted({*values, LADDERS[rate][place]})
    return [cell]


def _rates(run: Run, **rates: float) -> Run:
    return replace(run, setting=change(run.setting, train=rates))
