"""A model that several runs of a sweep train alike is trained once: plain, and what is laid over plain afterwards.

Equal weights before the training, the same text and the same training give equal weights after it, bit for bit. So the
sweep's folder keeps trained weights under a digest of these, and the next run takes them. Models with a memory train
anew: their rows are large, and no two arms share them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from engram.lm.tokenizer import Encoded
from engram.lm.train import TrainConfig, TrainLog
from engram.lm.transformer import Transformer
from experiments.prepared import FOLDER


def train_once(
    model: Any, text: Encoded, config: TrainConfig, train: Callable[[], TrainLog]
) -> tuple[TrainLog, float, bool]:
    """Trains the model, or gives it the weights that another run of the sweep has trained so.

    Args:
        model: untrained. text, config: what `train` trains it on, and how. train: engram.lm.train.train, in place.

    Returns:
        (the log of the training, its processor seconds, whether another run did it).
    """
    home = os.environ.get(FOLDER)
    shareable = bool(home) and type(model) is Transformer and model.memory is None
    file = Path(home or "") / f"trained-{digest(model, text, config)}.pt" if shareable else None
    if file is not None and file.exists():
        found = torch.load(file, weights_only=True)
        model.load_state_dict(found["weights"])
        return TrainLog(**found["log"]), found["seconds"], True
    began = time.process_time()
    log = train()
    seconds = time.process_time() - began
    if file is not None:
        partial = file.with_suffix(f".{os.getpid()}")
        torch.save({"weights": model.state_dict(), "log": asdict(log), "seconds": seconds}, partial)
        os.replace(partial, file)
    return log, seconds, False


def digest(model: Transformer, text: Encoded, config: TrainConfig) -> str:
    """Of all that decides what the training makes of the model: its shape, its weights, the text, the training."""
    found = xxhash.xxh3_64(repr((model.config, config)).encode())
    for values in text:
        found.update(np.ascontiguousarray(values))
    for name, weights in model.state_dict().items():
        found.update(name.encode())
        found.update(weights.detach().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()
