"""Does the memory make layers deeper? LogitLens by layer, and likeness of its layers to those of the plain model."""

from __future__ import annotations

from dataclasses import replace

from experiments.depth.measure import measure
from experiments.depth.summary import summary
from experiments.lab.cell import SETTINGS, Run, change
from experiments.lab.tuning import tuned

__all__ = ["BASELINE", "SIZE", "configs", "measure", "summary"]

BASELINE, SIZE = "plain", "tiny"
TABLES = ("text", "layers")
LAYERS = 6  # enough that one layer can be like a deeper one; the memory is at layer 1, before block 1
ARMS = ("plain", "engram", "one-row")


def configs(size: str) -> list[Run]:
    setting = SETTINGS[size]
    setting = change(setting, model=replace(setting.model, layers=LAYERS))
    # One dense rate for all, plain's, which on the grid is as good for engram: a larger rate alone brings the layers
    # of plain nearer to its last one, by more than what is to be measured.
    lr = tuned("plain", setting).get("lr", setting.train.lr)
    return [Run("depth", arm, change(setting, train={**tuned(arm, setting), "lr": lr}), size=size) for arm in ARMS]
