"""convert and inspect: memories between our folder, the released dialects and GGUF, a block of rows at a time.

    engram                      our folder (engram/memory/saved.py); e4m3 rows stay e4m3, in rows of dim + dim / 32
                                bytes, if their scales are powers of two that such rows can hold: e8m0 scales per
                                32 values or more, or one scale for all. Rows with other scales, and int8 rows, are
                                value * scale in float32, rounded to the config's table_dtype (bfloat16 unless a
                                config is given)
    demo                        float32 rows, one state dict
    deepseek-v4.1               e4m3 and e8m0 tensors; with shards > 1 one file per tensor-parallel rank
    deepseek-v4.1-interleaved   the same in one uint8 tensor, values and scales of a row side by side
    qwen                        bfloat16 or float32 rows in `shards` tensors
    gguf                        one file with the tables alone, and the keys that address them; fp8 rows as I8

The memory in use does not depend on the table's size: blocks of 64 MiB as float32. What was written is read back whole
and compared by digest, and random rows are compared with the source through the reader of the target's own format.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from engram.addressing import TokenMap
from engram.config import EngramConfig, whole
from engram.integrations.formats.dialects import check_dialect, refuse_unknown
from engram.integrations.formats.gguf import is_gguf, own_facts, read_gguf
from engram.integrations.formats.readers import Source, dialect_of_tensors, open_source
from engram.integrations.formats.recoder import Recoder
from engram.integrations.formats.safetensors_io import Stored, open_checkpoint, read_header
from engram.integrations.formats.stored_rows import Rows
from engram.integrations.formats.writers import write_engram, write_gguf, write_safetensors
from engram.storage.files import put
from engram.storage.folders import pinned_folder, whole_folder
from engram.storage.manifest import load_manifest, step_folders, verify
from engram.storage.partial import partial_folder
from engram.storage.untrusted import read_json

FORMATS = ("engram", "demo", "deepseek-v4.1", "deepseek-v4.1-interleaved", "qwen", "gguf")
_SAMPLE = 256  # rows per table compared one by one


def _target_form(to: str, rows: Rows) -> str:
    """How rows are stored in a format: as they are where it can hold them, else rounded to what it can."""
    if to == "demo":
        return "float32"
    if to.startswith("deepseek"):
        return "fp8"
    return "bfloat16" if rows.kept == "fp8" and to == "qwen" else rows.kept


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str,
    *,
    config: EngramConfig | None = None,
    token_map: TokenMap | None = None,
    shards: int = 1,
    by: str = "row",
    on_bytes: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Writes the memory at `source` as `target` in another format, which appears whole and verified or not at all.

    Args:
        source: our folder; or safetensors of a dialect, a file or a folder.
        target: a folder, or with "gguf" a file, that does not exist.
        to: one of FORMATS. A memory whose rules the format has no words for is refused.
        config: of a source without config.json. token_map: of the model's tokenizer; "engram" and "gguf" need it.
        shards: tensor-parallel ranks of "deepseek-v4.1", or parts of the table of "qwen".
        by: "row", ranks hold equally many rows; or "head", each rank holds whole columns (order-major).
        on_bytes: told (bytes done, bytes of all), for a progress bar.

    Returns:
        {"target", "to", "rows", "bytes", "max_error", "lossless", "untrained"}; max_error is of values that had to be
        rounded. untrained: True if the source is GGUF, which holds tables alone, so that the fusion weights are those
        of a new memory, and add nothing to the hidden state.

    Raises:
        ValueError: what is wrong with which tensor. FileExistsError: a target that is there. OSError: no disk space, or
        a disk that gives back something else than was written.
    """
    with pinned_folder(source) as pinned:  # so that all of it is one memory, also if a writer replaces it meanwhile
        return _convert(pinned, Path(target), to, config, token_map, shards, by, on_bytes)


def _convert(
    source: Path,
    target: Path,
    to: str,
    config: EngramConfig | None,
    token_map: TokenMap | None,
    shards: int,
    by: str,
    on_bytes: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    if to not in FORMATS:
        raise ValueError(f"unknown format {to!r}; there are {', '.join(FORMATS)}")
    if by not in ("row", "head") or shards < 1:
        raise ValueError(f'shards is >= 1 and by is "row" or "head", not {shards} and {by!r}')
    if shards > 1 and to not in ("deepseek-v4.1", "deepseek-v4.1-interleaved", "qwen"):
        raise ValueError(f"{to} has no shards")
    if target.exists():
        raise FileExistsError(f"{target} exists: convert writes a new one")
    opened = open_source(source, config, token_map)
    if opened.kind == "engram":  # opened after a look at some blocks, and what is written gets digests of its own
        for found in verify(source):
            if found["problem"]:
                raise ValueError(found["problem"])
    if to != "gguf" and not opened.weights:
        if to != "engram":
            raise ValueError(f"{source} holds the tables of a memory alone: {to} needs its other weights too")
        if not opened.hidden_size:
            raise ValueError(f"{source} does not say how wide the model is, which a memory needs to know")
    if to not in ("engram", "gguf"):
        check_dialect(opened.config, to.removesuffix("-interleaved"))
    if to == "qwen" and opened.token_map is not None:
        vocabulary = len(opened.token_map.table)
        if opened.token_map.digest != TokenMap.identity(vocabulary).digest:
            raise ValueError(
                f"{source} hashes what its token map makes of the ids, and Qwen4-Exp the ids themselves: it would read "
                f"other rows. Only a memory that was trained with TokenMap.identity can be written as qwen"
            )
    if to in ("engram", "gguf") and opened.token_map is None:
        raise ValueError(f"{source} comes without its tokenizer: give token_map (--tokenizer), which addresses need")
    recoders = {i: Recoder(rows, _target_form(to, rows)) for i, rows in opened.rows.items()}
    total, done = sum(_bytes(opened, i, r.form) for i, r in recoders.items()), [0]
    target.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(target.parent).free) < total:
        raise OSError(errno.ENOSPC, f"no room for {target}: its tables take {total:,} bytes, {free:,} are free")

    def step(count: int) -> None:
        done[0] += count
        if on_bytes:
            on_bytes(min(done[0], 2 * total), 2 * total)  # written once, read back once

    if to == "gguf":
        with partial_folder(target) as partial:
            write_gguf(opened, recoders, partial / target.name, step)
            _compare(opened, recoders, open_source(partial / target.name))
            put(partial / target.name, target)
    else:
        with whole_folder(target, overwrite=False) as home:
            if to == "engram":
                write_engram(opened, recoders, home / "memory", step)
                for file in (home / "memory").iterdir():
                    os.replace(file, home / file.name)
                (home / "memory").rmdir()
            else:
                write_safetensors(opened, recoders, home, to, shards, by, step)
            _compare(opened, recoders, open_source(home))
    error = max(r.error for r in recoders.values())
    rows = {i: r.rows for i, r in opened.rows.items()}
    facts = {"target": str(target), "to": to, "rows": rows, "bytes": total}
    untrained = to == "engram" and not opened.weights
    return {**facts, "max_error": error, "lossless": error == 0.0, "untrained": untrained}


def _bytes(source: Source, layer: int, form: str) -> int:
    rows = source.rows[layer]
    width = rows.dim + rows.dim // 32 if form == "fp8" else rows.dim * getattr(torch, form).itemsize
    return rows.rows * width


def _compare(source: Source, recoders: dict[int, Recoder], written: Source) -> None:
    """Random rows and all dense weights of what was written, read through the target format's own reader."""
    generator = torch.Generator().manual_seed(0)
    for layer, recoder in recoders.items():
        rows = source.rows[layer].rows
        picked = torch.randint(0, rows, (min(_SAMPLE, rows),), generator=generator, device="cpu").tolist()
        for row in {0, rows - 1, *picked}:
            if not torch.equal(recoder.read(row, row + 1), written.rows[layer].read(row, row + 1)):
                raise OSError(f"row {row:,} of {written.rows[layer].name} does not read back as it was written")
        for name, value in source.weights.get(layer, {}).items():
            found = written.weights.get(layer, {}).get(name)  # a GGUF file has none
            if found is not None and not torch.allclose(value, found, rtol=0, atol=2e-7 * float(value.abs().max())):
                raise OSError(f"the weights {name} of layer {layer} do not read back as they were written")


def inspect_file(path: str | os.PathLike[str], config: EngramConfig | None = None) -> dict[str, Any]:
    """Return what a memory or checkpoint holds, as `engram inspect` shows it. Only headers are read; a file's format is
    told by its first bytes, not by its name.

    Args:
        path: a saved memory, a run of `engram train`, a checkpoint of one, offloaded rows, safetensors (file or folder)
            or a GGUF file.
        config: the memory's, if the checkpoint has none of its own.

    Returns:
        {"path", "kind", "tensors": [{"name", "dtype", "shape", "bytes", "file"}], "tables": {layer: {"rows", "dim",
        "form", "bytes"}}, "config": EngramConfig's fields or None, "problem": why it cannot be converted, or None,
        "steps": of a run's checkpoints, whose last one the tensors are}. kind: "engram", a dialect, "gguf", "run",
        "checkpoint", "offloaded", or "other" if there is no n-gram table.

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
    given = Path(path)
    found: dict[str, Any] = {"path": str(given), "kind": "other", "tensors": [], "tables": {}, "config": None}
    found |= {"problem": None, "steps": []}
    steps = step_folders(given)
    if steps or (given / "run.json").is_file():
        found |= {"kind": "run", "steps": [int(step.name.removeprefix("step-")) for step in steps]}
        return _inspect_checkpoint(given, steps[-1] if steps else None, found)
    manifest = {}
    if (given / "manifest.json").is_file():
        manifest = read_json(given / "manifest.json", "a manifest")
        if not str(manifest.get("format")).startswith("engram-"):
            return _inspect_checkpoint(given.parent, given, found | {"kind": "checkpoint"})
    if manifest.get("format") == "engram-offload-1":
        return _inspect_offloaded(given, manifest, found | {"kind": "offloaded"})
    if is_gguf(given):
        tensors, facts = read_gguf(given)
        stored = list(tensors.values())
        found |= {"kind": "gguf", "config": own_facts(given, facts)}
    elif manifest:
        stored, found["kind"] = [], "engram"
    else:
        checkpoint = open_checkpoint(given)
        stored = [place for places in checkpoint.tensors.values() for place in places]
        try:
            found["kind"] = dialect_of_tensors(checkpoint)
        except ValueError as error:
            found["problem"] = str(error)
            try:
                refuse_unknown(checkpoint.config or {})
            except ValueError as refusal:
                found["problem"] = str(refusal)
    found["tensors"] = _listed(stored)
    if found["kind"] == "other":
        return found
    try:
        source = open_source(given, config)
    except ValueError as error:
        found["problem"] = str(error)
        return found
    found["config"] = json.loads(source.config.to_json())
    for layer, rows in source.rows.items():
        size = rows.nbytes if rows.parts else _bytes(source, layer, rows.form)
        found["tables"][layer] = {"rows": rows.rows, "dim": rows.dim, "form": rows.description, "bytes": size}
    return found


def _listed(stored: Iterable[Stored]) -> list[dict[str, Any]]:
    return [
        {"name": s.name, "dtype": s.dtype, "shape": list(s.shape), "bytes": s.nbytes, "file": s.path.name}
        for s in stored
    ]


def _inspect_checkpoint(home: Path, step: Path | None, found: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's tensors, and its run's configuration, from the run.json in `home`."""
    if (home / "run.json").is_file():
        path = home / "run.json"
        setting = read_json(path, "the record of a run").get("setting")
        if not isinstance(setting, dict) or not isinstance(setting.get("memory"), dict):
            raise ValueError(f"{path} is damaged: it has no setting of a memory")
        found["config"] = setting["memory"]
    if step is None:
        return found | {"problem": f"{home} holds no checkpoint yet"}
    for name, entry in load_manifest(step)["files"].items():
        if name.endswith(".safetensors"):
            found["tensors"] += _listed(read_header(step / name)[0].values())
            continue
        size, label = int(entry["bytes"]), name.removesuffix(".rows")
        found["tensors"].append({"name": label, "dtype": "rows", "shape": [], "bytes": size, "file": name})
        table = re.fullmatch(r"(?:.*\.)?tables\.(\d+)", label)
        if table and found["config"] is not None:
            config = EngramConfig.from_json(json.dumps(found["config"]))
            rows = size // (config.head_dim * getattr(torch, config.table_dtype).itemsize)
            found["tables"][int(table[1])] = {
                "rows": rows,
                "dim": config.head_dim,
                "form": config.table_dtype,
                "bytes": size,
            }
    return found | {"problem": "training state: load it with engram train, or save its memory to convert it"}


def _inspect_offloaded(home: Path, manifest: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    files = load_manifest(home)["files"]
    try:
        for layer, table in manifest["tables"].items():
            size = int(files[table["file"]]["bytes"])
            shape = [whole("rows", table["rows"]), whole("dim", table["dim"])]
            form, file = str(table["form"]), str(table["file"])
            found["tables"][int(layer)] = {"rows": shape[0], "dim": shape[1], "form": form, "bytes": size}
            found["tensors"].append({"name": file, "dtype": form, "shape": shape, "bytes": size, "file": file})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{home / 'manifest.json'} is damaged: {error!r}") from error
    return found | {"problem": "rows alone, of a checkpoint that engram.offload knows: convert the checkpoint"}
