"""What the runs of a sweep share: prepared texts, and models that several of them train alike.

Runs are processes of their own, and each would tokenize the corpus again. A sweep gives its children a temporary folder
(in $ENGRAM_LAB_PREPARED). The first run that needs a text has it made there, by one more process so that its memory is
not counted as the run's; the others wait and read. The folder is removed with the sweep, so no text is ever older than
the sweep that uses it.

Plain and what is laid over it, engram and engram that is switched off afterwards are trained once. Building and
training leave nothing to chance: what is built by the same arm with the same options, setting and text ends with the
same weights and rows, bit for bit. The sweep counts such runs and names a file to those that are not alone; the first
that is trained writes it, the others read it.
"""

from __future__ import annotations

import fcntl  # Unix only, like the runner
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import tokenizers
import torch
import xxhash
from torch import nn

from engram.addressing import TokenMap
from engram.lm import run as text
from engram.lm.corpus import Overlap
from engram.lm.run import Data, Setting
from engram.lm.tokenizer import Encoded
from engram.lm.train import TrainLog
from experiments import arms
from experiments.lab.cell import Run, hook

FOLDER, FILE = "ENGRAM_LAB_PREPARED", "ENGRAM_LAB_TRAINED"  # environment variables of a sweep's runs
# Texts that an experiment makes itself: what stands before the colon in the corpus' name, and the module whose
# prepare(setting, held_out) makes it.
MADE = {"facts": "experiments.sensitivity.facts", "recall": "experiments.recall.task"}


def prepare(setting: Setting, held_out: str = "validation") -> Data:
    """What engram.lm.run.prepare returns, read from the sweep's folder where there is one. Raises what it raises."""
    home = os.environ.get(FOLDER)
    if not home:
        return make(setting, held_out)
    folder = Path(home) / key_of(setting, held_out)
    with (Path(home) / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when its process ends
        if not folder.exists():
            what = json.dumps({"setting": setting.to_json(), "held_out": held_out})
            subprocess.run(
                [sys.executable, "-m", "experiments.lab.caches", str(folder)], input=what.encode(), capture_output=True
            )
    # Where that failed, this process makes the text itself and meets the error, if there is one.
    return load(folder) if folder.exists() else make(setting, held_out)


def make(setting: Setting, held_out: str) -> Data:
    """The text of a setting, made from its corpus. Raises what engram.lm.run.prepare raises."""
    module = MADE.get(setting.corpus.partition(":")[0])
    return (importlib.import_module(module) if module else text).prepare(setting, held_out)


def key_of(setting: Setting, held_out: str) -> str:
    """Digest (16 hex digits) of all that decides the text: not the model, not the seed."""
    return xxhash.xxh3_64_hexdigest(json.dumps([setting.corpus, setting.vocab_size, held_out]).encode())


def save(folder: Path, data: Data) -> None:
    """Writes a new folder, whole or not at all: data.npz, facts.json, tokenizer.json (if any), token_map.safetensors.

    Raises:
        OSError: the disk is full, or the folder is there already.
    """
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        parts = {"train": data.train, "validation": data.validation}
        arrays = {f"{name}_{field}": array for name, part in parts.items() for field, array in part._asdict().items()}
        np.savez(partial / "data.npz", **arrays)
        overlap = {"share": float(data.overlap), "grams": data.overlap.grams, "worst": data.overlap.worst}
        (partial / "facts.json").write_text(json.dumps({"overlap": overlap, "digest": data.digest}))
        if data.tokenizer is not None:
            (partial / "tokenizer.json").write_text(data.tokenizer.to_str(), encoding="utf-8")
        data.token_map.save(partial / "token_map.safetensors")
        os.rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def load(folder: Path) -> Data:
    """What `save` wrote. Raises FileNotFoundError, ValueError: a folder that is not whole."""
    with np.load(folder / "data.npz") as arrays:
        train, validation = (
            Encoded(**{field: arrays[f"{name}_{field}"] for field in Encoded._fields})
            for name in ("train", "validation")
        )
    facts = json.loads((folder / "facts.json").read_text())
    overlap = Overlap(facts["overlap"]["share"])
    overlap.grams = facts["overlap"]["grams"]
    overlap.worst = tuple((name, share) for name, share in facts["overlap"]["worst"])
    tokenizer = None  # a text of numbers has none
    if (folder / "tokenizer.json").exists():
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.encode_special_tokens = True  # the file forgets this, see engram.lm.tokenizer
    token_map = TokenMap.load(folder / "token_map.safetensors")
    return Data(tokenizer, token_map, train, validation, overlap, facts["digest"])  # type: ignore[arg-type]


def training_of(run: Run) -> str | None:
    """Digest (16 hex digits) of all that decides what training makes of a run's model; None where nothing is trained,
    not by engram.lm.train, or where the arm cannot be built: the run itself will say why."""
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
    """Trains the model in place, or gives it the weights and rows in `file`; writes that if it is not there yet.

    Returns:
        (the log of the training, its processor seconds, whether another run did it).
    """
    if file is not None and file.exists():
        found = torch.load(file, weights_only=True, map_location="cpu")
        model.load_state_dict(found["model"])
        return TrainLog(**found["log"]), found["seconds"], True
    began = time.process_time()
    log = train()
    seconds = time.process_time() - began
    if file is not None:
        partial = file.with_suffix(f".{os.getpid()}")
        torch.save({"model": model.state_dict(), "log": asdict(log), "seconds": seconds}, partial)
        os.replace(partial, file)
    return log, seconds, False


if __name__ == "__main__":
    asked = json.loads(sys.stdin.read())
    save(Path(sys.argv[1]), make(Setting.from_json(asked["setting"]), asked["held_out"]))
