"""The way from a setting to text, tokenizer, arm and weights, as ablate, train and the experiments share them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import tokenizers
import torch

from engram.addressing import TokenMap
from engram.config import EngramConfig
from engram.device import device_of
from engram.lm.checkpoint import latest_checkpoint, load_checkpoint
from engram.lm.corpus import DEFAULT_CORPUS, Overlap, corpus_digest, load_corpus, overlap_13gram, split
from engram.lm.tokenizer import Encoded, encode, train_tokenizer
from engram.lm.train import TrainConfig
from engram.lm.transformer import Transformer, TransformerConfig
from engram.memory import EngramMemory
from engram.storage.files import file_digest, file_entry, write_whole
from engram.storage.manifest import check_digest, manifest_digest
from engram.storage.untrusted import parse_json, read_json, read_tokenizer

_FORMAT = 2  # of run.json; the first version has none

# The arms of the main job: what each makes of the memory's configuration. None: no memory.
ARMS: dict[str, Callable[[EngramConfig], EngramConfig | None]] = {
    "plain": lambda memory: None,
    "one-row": lambda memory: memory.replace(hash="one_row"),
    "random": lambda memory: memory.replace(table_init="normal", table_std=0.02, train_tables=False),
    "engram": lambda memory: memory,
}


@dataclass(frozen=True)
class Setting:
    """A training set-up. An arm and a seed turn it into a run.

    Attributes:
        corpus: see engram.lm.corpus.load_corpus. vocab_size: of the byte-level BPE trained on the training text.
        model: the decoder. memory: what the arm "engram" has. train: how it is trained.
    """

    corpus: str = DEFAULT_CORPUS
    vocab_size: int = 4096
    model: TransformerConfig = field(default_factory=lambda: TransformerConfig(vocab_size=4096))
    memory: EngramConfig = field(
        default_factory=lambda: EngramConfig(layers=(1,), orders=(2, 3), heads=4, head_dim=32, rows_per_head=65536)
    )
    train: TrainConfig = field(default_factory=TrainConfig)

    def seeded(self, seed: int) -> Setting:
        """Return the same set-up with another seed of weights, addresses and data order."""
        return replace(self, train=replace(self.train, seed=seed), memory=self.memory.replace(seed=seed))

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Setting:
        values = parse_json(text)
        return cls(
            values["corpus"],
            values["vocab_size"],
            TransformerConfig(**values["model"]),
            EngramConfig.from_json(json.dumps(values["memory"])),
            TrainConfig(**values["train"]),
        )


@dataclass(frozen=True)
class Data:
    """A prepared corpus: tokenizer and token map from the training text, and the encoded parts."""

    tokenizer: tokenizers.Tokenizer
    token_map: TokenMap
    train: Encoded
    validation: Encoded
    overlap: Overlap
    digest: str


def prepare(setting: Setting, held_out: str = "validation") -> Data:
    """Load, split, tokenize and encode the corpus of a setting.

    Args:
        held_out: "validation", or "tune": a slice of the training text to choose learning rates on, so that nothing
            is ever tuned on the text that is reported. Both are left out of training either way.

    Raises:
        FileNotFoundError, ValueError: no such corpus, an empty one, or one without a held-out document.
    """
    documents = load_corpus(setting.corpus)
    parts = split(documents, validation_share=0.05, tune_share=0.03)
    held_out_documents = {"validation": parts.validation, "tune": parts.tune}[held_out]
    if not parts.train or not held_out_documents:
        raise ValueError(f"corpus {setting.corpus!r} has {len(documents)} documents, too few to hold any out")
    tokenizer = train_tokenizer([d.text for d in parts.train], setting.vocab_size)
    return Data(
        tokenizer,
        TokenMap.from_tokenizer(tokenizer),
        encode(tokenizer, parts.train),
        encode(tokenizer, held_out_documents),
        overlap_13gram(parts.train, held_out_documents),
        corpus_digest(documents),
    )


def build_model(setting: Setting, arm: str, token_map: TokenMap) -> Transformer:
    """Build the model of one arm. The backbone's weights depend on the seed alone, not on the arm.

    Raises:
        ValueError: an unknown arm; the message lists the known ones.
    """
    if arm not in ARMS:
        raise ValueError(f"unknown arm {arm!r}: give one of {', '.join(ARMS)}")
    config = ARMS[arm](setting.memory)
    seed = setting.train.seed
    memory = None
    if config is not None:
        torch.manual_seed(seed + 1_000_003)
        memory = EngramMemory(config, token_map, setting.model.hidden_size)
    torch.manual_seed(seed)
    return Transformer(replace(setting.model, vocab_size=len(token_map.table)), memory)


def save_run(folder: str | os.PathLike[str], setting: Setting, arm: str, data: Data) -> None:
    """Write the files that build the model again: tokenizer.json, token_map.safetensors and run.json, which has their
    digests and its own.

    Raises:
        ValueError: a folder with checkpoints of another run, which is left as it is.
    """
    home = Path(folder)
    if (home / "run.json").is_file() and latest_checkpoint(home) is not None:
        run = _read_run(home)
        other = ["another arm"] * (run["arm"] != arm) + ["another setting"] * (run["setting"] != setting)
        other += ["another text"] * (run.get("text") not in (None, data.digest))
        other += ["another tokenizer"] * (not other and _read_tokenizer(home).to_str() != data.tokenizer.to_str())
        if other:
            raise ValueError(
                f"{home} holds checkpoints of a run with {' and '.join(other)} (see its run.json): give another "
                f"folder, or delete it"
            )
        if run["files"] and not _changed_files(home, run):
            return
    home.mkdir(parents=True, exist_ok=True)
    write_whole(home / "tokenizer.json", data.tokenizer.to_str().encode())
    data.token_map.save(home / "token_map.safetensors")
    files = {name: file_entry(home / name) for name in ("tokenizer.json", "token_map.safetensors")}
    run = {"format": _FORMAT, "arm": arm, "setting": asdict(setting), "text": data.digest, "files": files}
    run = json.loads(json.dumps(run))  # as it will be read: the digest is of that
    write_whole(home / "run.json", json.dumps(run | {"digest": manifest_digest(run)}).encode())


def _read_run(home: Path) -> dict[str, Any]:
    """Return a run.json, with "setting" as a Setting and "files" as {name: digest}, which is empty for older versions.

    Raises:
        ValueError: a damaged or altered one.
    """
    path = home / "run.json"
    run = read_json(path, "the record of a run")
    try:
        arm, setting = str(run["arm"]), Setting.from_json(json.dumps(run["setting"]))
        version, files = run.get("format"), {name: entry["xxh3_128"] for name, entry in run.get("files", {}).items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
    if version not in (None, _FORMAT):
        raise ValueError(f"{path} has format {version!r}, this version reads {_FORMAT}")
    check_digest(path, run)
    return run | {"arm": arm, "setting": setting, "files": files}


def _changed_files(home: Path, run: dict[str, Any]) -> list[str]:
    """Return the names of a run's files that are missing or do not have the digest in its run.json."""
    return [name for name, digest in run["files"].items() if not _has_digest(home / name, digest)]


def _has_digest(file: Path, digest: str) -> bool:
    return file.is_file() and file_digest(file) == digest


def _read_tokenizer(home: Path) -> tokenizers.Tokenizer:
    tokenizer = read_tokenizer(home / "tokenizer.json")
    tokenizer.encode_special_tokens = True  # <|endoftext|> in a text stays text; the file does not store this
    return tokenizer


def load_run(
    folder: str | os.PathLike[str], device: str = "cpu"
) -> tuple[Transformer, tokenizers.Tokenizer, Setting, dict[str, Any]]:
    """Load a run of `engram train` from its newest checkpoint.

    Args:
        folder: the folder of the run.
        device: of the dense weights, such as "cpu" or "cuda:1"; the tables stay in host memory.

    Returns:
        (model, tokenizer, setting, manifest): the trained Transformer, its tokenizer, the Setting it was trained with,
        and the manifest of the checkpoint, whose "step" is the number of steps done.

    Raises:
        FileNotFoundError: the folder holds no run, or the run has no checkpoint yet.
        ValueError: damaged files, a device that this machine does not have, or a tokenizer other than the one the
            memory was trained with.

    Example:
        >>> import engram, pathlib, torch
        >>> from engram.lm.run import Setting, build_model, prepare, save_run
        >>> from engram.lm.train import TrainConfig
        >>> pathlib.Path("text").mkdir()
        >>> for i in range(60):
        ...     _ = pathlib.Path(f"text/{i}.txt").write_text(f"document {i}: " + f"one and {i} and " * 20)
        >>> shape = engram.TransformerConfig(300, hidden_size=16, layers=2, heads=2, max_length=32)
        >>> memory = engram.EngramConfig(layers=(1,), orders=(2,), heads=1, head_dim=8, rows_per_head=64)
        >>> setting = Setting("text", 300, shape, memory, TrainConfig(tokens=512, batch_size=4, context=32))
        >>> data = prepare(setting)
        >>> model = build_model(setting, "engram", data.token_map)
        >>> save_run("run", setting, "engram", data)  # these lines are what `engram train --out run` does
        >>> _ = engram.train(model, data.train, setting.train, folder="run")
        >>> model, tokenizer, setting, manifest = engram.load_run("run")
        >>> ids = engram.generate(model, tokenizer.encode("one and").ids, tokens=4)
        >>> manifest["step"], isinstance(tokenizer.decode(ids[0].tolist()), str)
        (4, True)
    """
    home, torch_device = Path(folder), device_of(device)
    if not (home / "run.json").is_file():
        raise FileNotFoundError(f"{home} holds no run.json: train one with `engram train --out {home}`")
    newest = latest_checkpoint(home)
    if newest is None:
        raise FileNotFoundError(f"{home} holds no checkpoint yet")
    run = _read_run(home)
    if changed := _changed_files(home, run):
        raise ValueError(f"{home / changed[0]} is missing or was changed: it does not have the digest in run.json")
    arm, setting, tokenizer = run["arm"], run["setting"], _read_tokenizer(home)
    token_map = TokenMap.load(home / "token_map.safetensors")
    derived = TokenMap.from_tokenizer(tokenizer)
    if derived.digest != token_map.digest:
        raise ValueError(
            f"{home}/tokenizer.json gives another token map ({derived.digest[:12]}) than the one the memory was "
            f"trained with ({token_map.digest[:12]}): every row would be the wrong one"
        )
    model = build_model(setting, arm, token_map)
    manifest = load_checkpoint(newest, model)
    return model.to(torch_device), tokenizer, setting, manifest
