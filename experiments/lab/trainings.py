"""Trained models that several runs of a sweep share.

Plain and what is laid over it, engram and engram that is switched off afterwards are trained once. Building and
training leave nothing to chance: what is built by the same arm with the same options, setting and text ends with the
same weights and rows, bit for bit. The sweep counts such runs and names a file to those that share a training; the
first of them writes it, the others read it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import xxhash
from torch import nn

from engram.lm.train import TrainLog
from experiments import arms
from experiments.lab.cell import Run, hook

FILE = "ENGRAM_LAB_TRAINED"  # environment variable of a run that shares its training


def training_of(run: Run) -> str | None:
    """Return a digest (16 hex digits) of all that decides what training makes of a run's model. It is None if nothing
    is trained, if the question trains in its own way, or if the arm cannot be built: the run itself then raises."""
    options = dict(run.options)
    epochs = options.pop("epochs", None)
    try:
        like = arms.trained_as(run.arm, options)
    except (ValueError, TypeError):
        return None
    if like is None or hook(run.experiment, "train") is not None:
        return None
    setting = asdict(run.setting)
    if like[0] == "plain":
        del setting["memory"]
    what = [*like, epochs, setting, run.device, run.held_out]  # what is held out for tuning is not trained on
    return xxhash.xxh3_64_hexdigest(json.dumps(what, sort_keys=True).encode())


def train_once(model: nn.Module, train: Callable[[], TrainLog], file: Path | None) -> tuple[TrainLog, float, bool]:
    """Train the model in place, or load the weights and rows in `file` into it. Write the file if it is missing.

    Returns:
        (the log of the training, its processor seconds, True if another run did it).
    """
    if file is not None and file.exists():
        saved = torch.load(file, weights_only=True, map_location="cpu")
        model.load_state_dict(saved["model"])
        return TrainLog(**saved["log"]), saved["seconds"], True
    began = time.process_time()
    log = train()
    seconds = time.process_time() - began
    if file is not None:
        partial = file.with_suffix(f".{os.getpid()}")
        torch.save({"model": model.state_dict(), "log": asdict(log), "seconds": seconds}, partial)
        os.replace(partial, file)
    return log, seconds, False
