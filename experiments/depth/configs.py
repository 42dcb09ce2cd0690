"""Does the memory make layers deeper? LogitLens by layer, and likeness of its layers to those of the plain model."""

from __future__ import annotations

from dataclasses import replace

from experiments.config import SETTINGS, Run, change, tuned
from experiments.depth.measure import measure
from experiments.depth.summary import summary

__all__ = ["BASELINE", "SETTING", "configs", "measure", "summary"]

BASELINE, SETTING = "plain", "T"
LAYERS = 6  # enough that one can be like a deeper one; the memory is at layer 1, before block 1
ARMS = ("plain", "engram", "one-row")


def configs(setting_name: str) -> list[Run]:
    setting = SETTINGS[setting_name]
    setting = change(setting, model=replace(setting.model, layers=LAYERS))
    group = f"{setting_name}: {setting.corpus}, {LAYERS} layers"
    # One dense rate for all, plain's, which on the grid is as good for engram: a larger rate alone brings the layers
    # of plain nearer to its last one, by more than what is to be measured.
    lr = tuned("plain", setting).get("lr", setting.train.lr)
    return [Run("depth", arm, change(setting, train={**tuned(arm, setting), "lr": lr}), group=group) for arm in ARMS]
