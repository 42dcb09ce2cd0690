"""Write and read checkpoints, which appear whole or not at all and list the digests of what they hold.

    FOLDER/step-00000400/manifest.json          sizes and xxh3-128 digests of the files below, facts of the run, and the
                                                digest of all that
                        /model.safetensors      dense weights
                        /optimizer.safetensors  dense optimizer state
                        /tables.<layer>.rows    raw rows; rows.<memory>.<layer>.<name>.rows: row optimizer state

A checkpoint is written beside its final name and renamed in one step. Nothing in it is ever unpickled.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from engram.memory import EngramMemory
from engram.optimizer import EngramOptimizer
from engram.storage.files import NotSynced, file_digest, file_entry, read_rows, write_rows
from engram.storage.folders import read_folder, whole_folder
from engram.storage.manifest import check_digest, load_manifest, manifest_digest, step_folders
from engram.storage.partial import discard, remove_partial
from engram.storage.untrusted import read_tensors

_FORMAT, _WITHOUT_DIGEST = 2, 1  # manifests of format 1 have no digest of their own


def _split_model(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the state dict as (dense weights, tables)."""
    state = model.state_dict()
    prefixes = [name for name, module in model.named_modules() if isinstance(module, EngramMemory)]
    table_keys = {k for k in state for p in prefixes if k.startswith(f"{p}.tables." if p else "tables.")}
    return {k: v for k, v in state.items() if k not in table_keys}, {k: state[k] for k in sorted(table_keys)}


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to the CPU, no two into the same memory (tied embeddings), which safetensors refuses."""
    apart, addresses = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if address in addresses and tensor.numel() else tensor
        addresses.add(address)
    return apart


def _row_state(optimizer: EngramOptimizer) -> dict[str, Tensor]:
    return {
        f"rows.{m}.{layer}.{name}": state.tensor
        for m, layers in enumerate(optimizer.rows)
        for layer, row_optimizer in layers.items()
        for name, state in row_optimizer.state.items()
    }


def save_checkpoint(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: EngramOptimizer,
    step: int,
    facts: dict[str, Any],
    keep: int = 0,
) -> Path:
    """Write FOLDER/step-<step>, whole or not at all, and return its path.

    Args:
        folder: folder of a run's checkpoints.
        model, optimizer: what to save.
        step: step of the training run.
        facts: JSON values for the manifest (configuration, curve, position in the data).
        keep: checkpoints that stay in the folder, this one among them; once it is written, those of the lowest steps
            are deleted. 0: all stay.

    Raises:
        OSError: the disk is full or the folder cannot be written; no half-written checkpoint stays behind.
    """
    home = Path(folder)
    target = home / f"step-{step:08d}"
    dense, tables = _split_model(model)
    state = optimizer.state_dict()
    manifest: dict[str, Any] = {"format": _FORMAT, "step": step, "facts": facts, "files": {}}
    manifest["groups"] = [{k: v for k, v in group.items()} for group in state["param_groups"]]
    manifest["row_steps"] = [{str(k): o.steps for k, o in layers.items()} for layers in optimizer.rows]
    try:
        manifest = json.loads(json.dumps(manifest, allow_nan=False))  # as it is read again: the digest is of that
    except ValueError as error:
        raise ValueError(f"facts and settings of a checkpoint must be finite JSON values: {error}") from None
    dense_state = {i: values for i, values in state["state"].items() if isinstance(i, int)}
    adam = {
        f"{i}.{k}": torch.as_tensor(v) for i, values in dense_state.items() for k, v in values.items() if k != "rows"
    }
    try:
        remove_partial(home, r"step-\d+")  # left by a killed run: each holds complete tables
        with whole_folder(target, overwrite=True) as partial:  # it exists if a resumed run repeats a step
            for name, tensors in (("model", dense), ("optimizer", adam)):
                path = partial / f"{name}.safetensors"
                safetensors.torch.save_file(_apart(tensors), path)
                manifest["files"][path.name] = file_entry(path)
            for name, rows in {**tables, **_row_state(optimizer)}.items():
                manifest["files"][f"{name}.rows"] = write_rows(partial / f"{name}.rows", rows)
            manifest["digest"] = manifest_digest(manifest)
            (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
    except NotSynced:
        raise
    except (OSError, safetensors.SafetensorError) as error:
        raise OSError(f"could not write the checkpoint {target}: {error}. Nothing half-written was left") from error
    others = [path for path in checkpoints(home) if path != target]
    for path in others[: max(0, len(others) + 1 - keep)] if keep else []:
        discard(path)
    return target


def checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the checkpoints in a folder, the one of the highest step last."""
    return [path for path in step_folders(folder) if (path / "manifest.json").is_file()]


def latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """Return the checkpoint of the highest step in a folder, or None."""
    return next(reversed(checkpoints(folder)), None)


def read_manifest(checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    """Return a checkpoint's manifest, after checking that every file exists with its size and digest.

    Raises:
        FileNotFoundError: the folder is not a checkpoint. ValueError: the manifest was altered, or a file (which the
        message names) is missing, truncated, changed or not of this checkpoint.
    """
    return read_folder(checkpoint, lambda path: _read_manifest(path, Path(checkpoint).name))


def _read_manifest(path: Path, name: str) -> dict[str, Any]:
    home = path / "manifest.json"
    if not home.is_file():
        raise FileNotFoundError(f"{path} is not a checkpoint: it has no manifest.json")
    manifest = load_manifest(path)
    if manifest.get("format") not in (_FORMAT, _WITHOUT_DIGEST):
        raise ValueError(f"{path} has checkpoint format {manifest.get('format')!r}, but this version reads {_FORMAT}")
    check_digest(home, manifest)
    try:
        _check_shape(manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{home} is damaged: {error!r}") from error
    number = re.fullmatch(r"step-([0-9]+)", name)
    if number and int(number[1]) != manifest["step"]:
        raise ValueError(
            f"{path} holds step {manifest['step']}, not {int(number[1])}: rename it to step-{manifest['step']:08d}"
        )
    for file, entry in manifest["files"].items():
        if file.endswith(".safetensors") and file_digest(path / file) != entry["xxh3_128"]:
            raise ValueError(f"{path / file} does not have the digest its manifest names: it was changed or torn")
    return manifest  # digests of .rows files are checked as they are read


def _check_shape(manifest: dict[str, Any]) -> None:
    """Raise KeyError, TypeError or ValueError if the values of a manifest are not of the kinds that are written."""
    if type(manifest["step"]) is not int or manifest["step"] < 0 or not isinstance(manifest["facts"], dict):
        raise ValueError("step must be an integer of at least 0, and facts must be an object")
    if missing := {"model.safetensors", "optimizer.safetensors"} - set(manifest["files"]):
        raise ValueError(f"files must include {min(missing)}")
    if not all(type(steps) is int for layers in manifest["row_steps"] for steps in layers.values()):
        raise ValueError("row_steps must be integers")
    for group in manifest["groups"]:
        numbers = [group["lr"], group["eps"], group["weight_decay"], *group["betas"], *group["params"]]
        if len(group["betas"]) != 2 or not all(type(number) in (int, float) for number in numbers):
            raise ValueError("lr, eps, weight_decay, betas (two) and params of a group must be numbers")


def load_checkpoint(
    checkpoint: str | os.PathLike[str], model: nn.Module, optimizer: EngramOptimizer | None = None
) -> dict[str, Any]:
    """Load a checkpoint's weights, rows and optimizer state into `model` and `optimizer`, and return its manifest.

    Raises:
        FileNotFoundError, ValueError: see read_manifest; also if tensors do not fit the model: the message names each.
    """
    return read_folder(checkpoint, lambda path: _load(path, Path(checkpoint), model, optimizer))


def _load(path: Path, shown: Path, model: nn.Module, optimizer: EngramOptimizer | None) -> dict[str, Any]:
    manifest = _read_manifest(path, shown.name)
    dense = read_tensors(path / "model.safetensors", "the weights of a checkpoint")
    current, tables = _split_model(model)
    odd = set(dense) ^ set(current) | {k for k in set(dense) & set(current) if dense[k].shape != current[k].shape}
    raw = {name: rows for name, rows in tables.items()}
    if optimizer is not None:
        raw.update(_row_state(optimizer))
    odd |= {name for name in raw if f"{name}.rows" not in manifest["files"]}
    if odd:
        raise ValueError(f"{path} was saved from another model; these do not fit: {', '.join(sorted(odd))}")
    try:
        model.load_state_dict({**dense, **tables})
    except RuntimeError as error:  # torch's own wording for shapes
        raise ValueError(f"{path} does not fit this model: {error}") from error
    memories = [module for module in model.modules() if isinstance(module, EngramMemory)]
    for memory in memories:
        memory.mark_unfinished(shown.parent)
    for key, rows in raw.items():
        read_rows(path / f"{key}.rows", rows, manifest["files"][f"{key}.rows"]["xxh3_128"])
    if optimizer is not None:
        try:
            _load_optimizer(path, manifest, optimizer)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ValueError(f"{path} does not fit this optimizer: {error}") from error
    for memory in memories:
        memory.mark_finished()
    return manifest


def _load_optimizer(path: Path, manifest: dict[str, Any], optimizer: EngramOptimizer) -> None:
    """Load the optimizer's state; that of the rows has just been read in place."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in read_tensors(path / "optimizer.safetensors", "an optimizer state").items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    row_state = [
        {
            k: {"steps": steps[str(k)], **{name: kept.tensor for name, kept in o.state.items()}}
            for k, o in layers.items()
        }
        for layers, steps in zip(optimizer.rows, manifest["row_steps"], strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": manifest["groups"], "rows": row_state})
