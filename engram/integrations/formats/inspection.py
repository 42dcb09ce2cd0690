"""inspect_file: what a memory or checkpoint holds, from headers alone."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from engram.config import EngramConfig, as_integer
from engram.integrations.formats.dialects import refuse_unknown
from engram.integrations.formats.gguf import is_gguf, read_gguf
from engram.integrations.formats.gguf_memory import own_config
from engram.integrations.formats.readers import dialect_of_tensors, open_source
from engram.integrations.formats.safetensors_io import Stored, open_checkpoint, read_header
from engram.storage.manifest import load_manifest, step_folders
from engram.storage.untrusted import read_json


def inspect_file(path: str | os.PathLike[str], config: EngramConfig | None = None) -> dict[str, Any]:
    """Return what a memory or checkpoint holds, as `engram inspect` shows it. Only headers are read; a file's first
    bytes decide its format, not its name.

    Args:
        path: a saved memory, a run of `engram train`, a checkpoint of one, offloaded rows, safetensors (file or folder)
            or a GGUF file.
        config: that of the memory, if the checkpoint has none of its own.

    Returns:
        {"path", "kind", "tensors": [{"name", "dtype", "shape", "bytes", "file"}], "tables": {layer: {"rows", "dim",
        "form", "bytes"}}, "config": EngramConfig's fields or None, "problem": why it cannot be converted, or None}, and
        for a run "steps": of its checkpoints; the tensors are those of the last one. kind: "engram", a dialect, "gguf",
        "run", "checkpoint", "offloaded", or "other" if there is no n-gram table. form: the codec of the rows.

    Raises:
        OSError: the path does not exist, or is not a regular file. ValueError: an incomplete file.

    Example:
        >>> import engram, tempfile
        >>> config = engram.EngramConfig(layers=(0,), orders=(2,), heads=2, head_dim=4, rows_per_head=50)
        >>> memory = engram.EngramMemory(config, engram.TokenMap.identity(20), hidden_size=8)
        >>> folder = memory.save(tempfile.mkdtemp(), overwrite=True)
        >>> contents = engram.inspect_file(folder)
        >>> contents["kind"], contents["tables"][0]["rows"], contents["tables"][0]["dim"]
        ('engram', 112, 4)
    """
    path = Path(path)
    contents: dict[str, Any] = {"path": str(path), "kind": "other", "tensors": [], "tables": {}, "config": None}
    contents |= {"problem": None, "steps": []}
    steps = step_folders(path)
    if steps or (path / "run.json").is_file():
        contents |= {"kind": "run", "steps": [int(step.name.removeprefix("step-")) for step in steps]}
        return _inspect_checkpoint(path, steps[-1] if steps else None, contents)
    manifest = {}
    if (path / "manifest.json").is_file():
        manifest = read_json(path / "manifest.json", "a manifest")
        if not str(manifest.get("format")).startswith("engram-"):
            return _inspect_checkpoint(path.parent, path, contents | {"kind": "checkpoint"})
    if manifest.get("format") == "engram-offload-1":
        return _inspect_offloaded(path, manifest, contents | {"kind": "offloaded"})
    if is_gguf(path):
        tensors, metadata = read_gguf(path)
        contents |= {"kind": "gguf", "config": own_config(path, metadata), "tensors": _listed(tensors.values())}
    elif manifest:
        contents["kind"] = "engram"
    else:
        _inspect_safetensors(path, contents)
    if contents["kind"] == "other":
        return contents
    try:
        source = open_source(path, config)
    except ValueError as error:
        contents["problem"] = str(error)
        return contents
    contents["config"] = json.loads(source.config.to_json())
    for layer, rows in source.rows.items():
        size = rows.nbytes if rows.parts else rows.bytes_as(rows.codec)
        contents["tables"][layer] = {"rows": rows.rows, "dim": rows.dim, "form": rows.description, "bytes": size}
    return contents


def _inspect_safetensors(path: Path, contents: dict[str, Any]) -> None:
    """Add the tensors and the dialect of a safetensors file or folder; the problem if it has no dialect."""
    checkpoint = open_checkpoint(path)
    contents["tensors"] = _listed(part for parts in checkpoint.tensors.values() for part in parts)
    try:
        contents["kind"] = dialect_of_tensors(checkpoint)
    except ValueError as error:
        contents["problem"] = str(error)
        try:
            refuse_unknown(checkpoint.config or {})
        except ValueError as refusal:
            contents["problem"] = str(refusal)


def _listed(stored: Iterable[Stored]) -> list[dict[str, Any]]:
    return [
        {"name": s.name, "dtype": s.dtype, "shape": list(s.shape), "bytes": s.nbytes, "file": s.path.name}
        for s in stored
    ]


def _inspect_checkpoint(home: Path, step: Path | None, contents: dict[str, Any]) -> dict[str, Any]:
    """Add a checkpoint's tensors, and the configuration of its run from the run.json in `home`."""
    if (home / "run.json").is_file():
        path = home / "run.json"
        setting = read_json(path, "the record of a run").get("setting")
        if not isinstance(setting, dict) or not isinstance(setting.get("memory"), dict):
            raise ValueError(f"{path} is damaged: it has no setting of a memory")
        contents["config"] = setting["memory"]
    if step is None:
        return contents | {"problem": f"{home} holds no checkpoint yet"}
    for name, entry in load_manifest(step)["files"].items():
        if name.endswith(".safetensors"):
            contents["tensors"] += _listed(read_header(step / name)[0].values())
            continue
        size, label = int(entry["bytes"]), name.removesuffix(".rows")
        contents["tensors"].append({"name": label, "dtype": "rows", "shape": [], "bytes": size, "file": name})
        table = re.fullmatch(r"(?:.*\.)?tables\.(\d+)", label)
        if table and contents["config"] is not None:
            config = EngramConfig.from_json(json.dumps(contents["config"]))
            rows = size // (config.head_dim * getattr(torch, config.table_dtype).itemsize)
            contents["tables"][int(table[1])] = {
                "rows": rows,
                "dim": config.head_dim,
                "form": config.table_dtype,
                "bytes": size,
            }
    return contents | {"problem": "training state: load it with engram train, or save its memory to convert it"}


def _inspect_offloaded(home: Path, manifest: dict[str, Any], contents: dict[str, Any]) -> dict[str, Any]:
    """Add the tables of a folder that engram.offload wrote."""
    files = load_manifest(home)["files"]
    try:
        for layer, table in manifest["tables"].items():
            size = int(files[table["file"]]["bytes"])
            shape = [as_integer("rows", table["rows"]), as_integer("dim", table["dim"])]
            codec, file = str(table["form"]), str(table["file"])
            contents["tables"][int(layer)] = {"rows": shape[0], "dim": shape[1], "form": codec, "bytes": size}
            contents["tensors"].append({"name": file, "dtype": codec, "shape": shape, "bytes": size, "file": file})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{home / 'manifest.json'} is damaged: {error!r}") from error
    return contents | {"problem": "only rows, of a checkpoint that engram.offload read: convert the checkpoint"}
