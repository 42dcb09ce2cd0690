"""Model folders of transformers with a memory in them, written by save_pretrained of a model that has one attached.

    FOLDER/config.json                   as transformers writes it, but under a model_type that it refuses (below)
          /*.safetensors                 the model's shards, with the rows and weights of the memory among the others
          /engram/config.json            EngramConfig, hidden size, streams, codec
          /engram/token_map.safetensors  the tokenizer's compression

from_pretrained of transformers would open such a folder without its memory, and compute other logits. Its config.json
therefore names a model_type that the Auto classes do not know, and a quantisation without a method, which each class of
transformers refuses. A Trainer, which reads the shards alone, resumes from such a folder as before.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from engram.addressing import TokenMap
from engram.config import EngramConfig
from engram.integrations.formats.safetensors_io import Checkpoint, open_checkpoint
from engram.memory import EngramMemory, hash_layout
from engram.storage.files import write_whole
from engram.storage.folders import whole_folder
from engram.storage.untrusted import read_json
from engram.tables import EncodedTable, Table
from engram.tables.codecs import PQ

FOLDER = "engram"  # in a model folder: the memory's own files
_NOTE = "with an n-gram memory: open it with engram.from_pretrained"
_BLOCK = 16 << 20  # bytes of rows read at a time


class HasMemory(Protocol):
    """What SavePretrained needs of an attachment."""

    memory: EngramMemory


class SavePretrained:
    """Replacement of save_pretrained on a model with an attached memory; it calls the method of the model's class."""

    def __init__(self, attachment: HasMemory, model: PreTrainedModel):
        self.attachment, self.model = attachment, model

    def __call__(self, save_directory: Any, *args: Any, **options: Any) -> Any:
        """Save as PreTrainedModel.save_pretrained does. The memory's rows and weights are written to the shards, once.
        If the model has adapters of PEFT, only those are written, and the folder gets a saved memory beside them."""
        home, state, memory = Path(save_directory), options.get("state_dict"), self.attachment.memory
        result = type(self.model).save_pretrained(self.model, save_directory, *args, **options)
        if not options.get("is_main_process", True):
            return result
        if getattr(self.model, "_hf_peft_config_loaded", False):
            memory.save(home / FOLDER, overwrite=True)
        elif state is None or any(key.endswith(f"{FOLDER}._extra_state") for key in state):
            _write_description(home / FOLDER, memory)
            _mark(home / "config.json")
        return result


def _write_description(folder: Path, memory: EngramMemory) -> None:
    description = {"config": json.loads(memory.config.to_json()), "hidden_size": memory.hidden_size}
    description |= {"streams": memory.streams, "codec": memory.codec}
    with whole_folder(folder, overwrite=True) as partial:
        (partial / "config.json").write_text(json.dumps(description, indent=1))
        memory.hasher.token_map.save(partial / "token_map.safetensors")


def _mark(path: Path) -> None:
    """Make transformers refuse a config.json."""
    published = json.loads(path.read_text())
    kind = published["model_type"]
    published |= {
        "model_type": f"{kind} {_NOTE}",
        "engram": {"opened_as": kind},
    }  # not "model_type": read as a part
    published.setdefault("quantization_config", {"engram": f"{kind} {_NOTE}"})
    write_whole(path, (json.dumps(published, indent=2, sort_keys=True) + "\n").encode())


def read_config(home: Path) -> tuple[Any, Any]:
    """Return the model's configuration, and the name of its class if the folder was marked, else None.

    Raises:
        FileNotFoundError: no config.json. ValueError: a config.json that cannot be read, or whose model is unknown to
        transformers.
    """
    path = home / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{home} holds no config.json, so it is not a model folder of transformers")
    try:
        published = json.loads(path.read_text())
        marked = published.pop("engram", None)
        if marked is None:
            return transformers.AutoConfig.from_pretrained(home, local_files_only=True), None
        kind = published["model_type"] = marked["opened_as"]
        if FOLDER in published["quantization_config"]:
            del published["quantization_config"]
        architecture = published["architectures"][0]
        if kind not in transformers.CONFIG_MAPPING or not hasattr(transformers, architecture):
            raise ValueError(f"transformers {transformers.__version__} does not know {kind} ({architecture})")
        return transformers.CONFIG_MAPPING[kind].from_dict(published), architecture
    except (KeyError, TypeError, IndexError, AttributeError, RecursionError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def open_memory(folder: Any, token_map: TokenMap | None = None) -> EngramMemory:
    """Return the memory in a folder: a saved memory, a folder with one in its sub-folder `engram` (a checkpoint of
    PEFT), or what save_pretrained of a model with an attached memory wrote.

    Raises:
        FileNotFoundError, ValueError: see EngramMemory.load.
    """
    home = Path(folder)
    if home.name == FOLDER and not (home / "manifest.json").exists() and (home / "config.json").is_file():
        home = home.parent
    inner = home / FOLDER
    if (home / "manifest.json").exists() or not inner.is_dir():
        return EngramMemory.load(home, token_map=token_map)
    if (inner / "manifest.json").exists():
        return EngramMemory.load(inner, token_map=token_map)
    try:
        description = read_json(inner / "config.json", "the shape of a memory")
        config = EngramConfig.from_json(json.dumps(description["config"]))
        shape = int(description["hidden_size"]), int(description["streams"])
        codec = description["codec"]
    except (KeyError, TypeError, AttributeError, RecursionError, ValueError) as error:
        raise ValueError(f"{inner / 'config.json'} is damaged: {error!r}") from error
    saved_map = TokenMap.load(inner / "token_map.safetensors")
    checkpoint = open_checkpoint(home)
    states = [name for name in checkpoint.tensors if name.endswith(f"{FOLDER}._extra_state")]
    if len(states) != 1:
        raise ValueError(f"{inner} describes one memory, the shards in {home} hold {len(states)}: save the model again")
    prefix = states[0].removesuffix("_extra_state")
    tables: dict[int, Table] | None = None
    if codec is not None:
        rows, tables = hash_layout(config, saved_map).rows, {}
        for layer in config.layers:
            books = f"{prefix}codebooks.{layer}"
            made = PQ(checkpoint.one(books).read()) if books in checkpoint.tensors else codec
            tables[layer] = EncodedTable(rows[layer], config.head_dim, made)
    memory = EngramMemory(config, saved_map, *shape, tables=tables)
    try:
        memory.set_extra_state(checkpoint.one(states[0]).read())
        _read_weights(memory, checkpoint, f"{prefix}fusions.")
        for layer, table in memory.tables.items():
            _read_rows(table, checkpoint, f"{prefix}tables.{layer}")
    except BaseException:
        memory.close()
        raise
    return memory


def _read_weights(memory: EngramMemory, checkpoint: Checkpoint, prefix: str) -> None:
    weights: dict[str, Tensor] = {
        name.removeprefix(prefix): checkpoint.one(name).read() for name in checkpoint.tensors if name.startswith(prefix)
    }
    for name, fusion in memory.fusions.items():
        if f"{name}.value.weight" in weights:
            fusion.to(weights[f"{name}.value.weight"].dtype)
    try:
        memory.fusions.load_state_dict(weights)
    except RuntimeError as error:  # torch's own wording for shapes
        raise ValueError(f"the memory's weights in {checkpoint.home} do not fit it: {error}") from error


def _read_rows(table: Table, checkpoint: Checkpoint, name: str) -> None:
    stored = checkpoint.one(name, table.stored_shape)
    block = max(1, _BLOCK // stored.row_bytes)
    for first in range(0, table.rows, block):
        rows = stored.read(first, min(first + block, table.rows))
        if rows.dtype != table.dtype:
            raise ValueError(f"{stored.path}: the rows {name} are {rows.dtype}, expected {table.dtype}")
        if rows.view(torch.uint8).any():  # rows of zeros are not written, so that they take no memory
            table.tensor[first : first + len(rows)] = rows
    if isinstance(table, EncodedTable):
        table.validate()
