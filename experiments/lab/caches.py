"""Texts that the runs of a sweep share.

Runs are processes of their own, and each would tokenize the corpus again. A sweep gives its children a temporary folder
(in $ENGRAM_LAB_PREPARED). The first run that needs a text starts one more process that makes it there, so that its
memory is not counted as the run's; the others wait and read. The folder is removed with the sweep, so no text is ever
older than the sweep that uses it.
"""

from __future__ import annotations

import fcntl  # Unix only, like the runner
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tokenizers
import xxhash

from engram.addressing import TokenMap
from engram.lm import run as text
from engram.lm.corpus import Overlap
from engram.lm.run import Data, Setting
from engram.lm.tokenizer import Encoded
from experiments.lab.cell import names, questions

FOLDER = "ENGRAM_LAB_PREPARED"  # environment variable of a sweep's runs


def prepare(setting: Setting, held_out: str = "validation") -> Data:
    """Return what engram.lm.run.prepare returns, read from the sweep's folder if there is one. Raises what it
    raises."""
    home = os.environ.get(FOLDER)
    if not home:
        return make(setting, held_out)
    folder = Path(home) / key_of(setting, held_out)
    with (Path(home) / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when its process ends
        if not folder.exists():
            request = json.dumps({"setting": setting.to_json(), "held_out": held_out})
            subprocess.run(
                [sys.executable, "-m", "experiments.lab.caches", str(folder)],
                input=request.encode(),
                capture_output=True,
            )
    # If that failed, this process makes the text itself and raises the error, if there is one.
    return load(folder) if folder.exists() else make(setting, held_out)


def make(setting: Setting, held_out: str) -> Data:
    """Return the text of a setting, made from its corpus. Raises what engram.lm.run.prepare raises."""
    return (maker_of(setting.corpus) or text.prepare)(setting, held_out)


def maker_of(corpus: str) -> Callable[[Setting, str], Data] | None:
    """Return the function of a question that makes a corpus named "<kind>:<details>"; None if no question makes it.

    Raises:
        ValueError: two questions make texts of that kind.
    """
    kind, colon, _ = corpus.partition(":")
    makers = {name: getattr(questions(name), "MAKES", {}).get(kind) for name in names()} if colon else {}
    makers = {name: maker for name, maker in makers.items() if maker is not None}
    if len(set(makers.values())) > 1:
        raise ValueError(f"texts {kind + ':'!r} are made by {' and by '.join(makers)}: rename one kind in its MAKES")
    return next(iter(makers.values()), None)


def key_of(setting: Setting, held_out: str) -> str:
    """Return a digest (16 hex digits) of all that decides the text: not the model, not the seed."""
    return xxhash.xxh3_64_hexdigest(json.dumps([setting.corpus, setting.vocab_size, held_out]).encode())


def save(folder: Path, data: Data) -> None:
    """Write a new folder, complete or not at all: data.npz, facts.json, tokenizer.json (if any), token_map.safetensors.

    Raises:
        OSError: the disk is full, or the folder exists.
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
    """Return what `save` wrote. Raises FileNotFoundError, ValueError if the folder is not complete."""
    with np.load(folder / "data.npz") as arrays:
        train, validation = (
            Encoded(**{field: arrays[f"{name}_{field}"] for field in Encoded._fields})
            for name in ("train", "validation")
        )
    facts = json.loads((folder / "facts.json").read_text())
    overlap = Overlap(facts["overlap"]["share"])
    overlap.grams = facts["overlap"]["grams"]
    overlap.worst = tuple((name, share) for name, share in facts["overlap"]["worst"])
    tokenizer = None  # made-up tokens have none
    if (folder / "tokenizer.json").exists():
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.encode_special_tokens = True  # the file does not keep this, see engram.lm.tokenizer
    token_map = TokenMap.load(folder / "token_map.safetensors")
    return Data(tokenizer, token_map, train, validation, overlap, facts["digest"])  # type: ignore[arg-type]


if __name__ == "__main__":
    asked = json.loads(sys.stdin.read())
    save(Path(sys.argv[1]), make(Setting.from_json(asked["setting"]), asked["held_out"]))
