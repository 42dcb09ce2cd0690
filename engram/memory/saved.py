"""Saved memories: one folder that holds a memory's configuration, token map, rows and fusion weights.

    FOLDER/manifest.json            layout, token map, tables; digests of all files (engram/storage/manifest.py)
          /config.json              EngramConfig, hidden size, streams
          /token_map.safetensors    the tokenizer's compression
          /fusion.safetensors       dense weights of the fusion modules
          /layer-<i>.rows           raw rows of a layer's table, native little-endian, row-major; for encoded tables:
          /layer-<i>.<codec>        rows as engram/tables/codecs.py describes them, and for pq4 and pq8
          /layer-<i>.<codec>.codebooks    safetensors

Everything is JSON, safetensors or raw rows. Nothing is unpickled, and everything is checked before it is used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from torch import Tensor, nn

from engram.addressing import HashLayout, NgramHasher, TokenMap
from engram.config import EngramConfig, as_integer
from engram.fusion import EngramFusion
from engram.memory.build import hash_layout, new_table, unwritten
from engram.memory.saved_manifest import SMALL_FILES, binding, codebooks_name, is_saved, new_manifest, read_manifest
from engram.memory.state import Tables
from engram.storage.files import (
    NotSynced,
    bad_blocks,
    file_digest,
    file_entry,
    read_rows,
    sync,
    write_rows,
    written_blocks,
)
from engram.storage.folders import read_folder, whole_folder
from engram.storage.manifest import manifest_digest
from engram.storage.untrusted import read_json, read_tensors
from engram.tables import EncodedTable, Table
from engram.tables.codecs import PQ, Codec
from engram.tables.encoded import read_codebooks

WriteRows = Callable[[int, Path], dict[str, Any]]  # writes a layer's rows to a path, returns the entry of the manifest


class Saveable(Protocol):
    """Attributes of a memory that save_memory reads."""

    config: EngramConfig
    layout: HashLayout
    hasher: Any  # with a token_map
    hidden_size: int
    streams: int
    fusions: nn.ModuleDict
    tables: Tables
    codec: str | None

    def check_finished(self) -> None: ...


@dataclass
class Parts:
    """Parts of a saved memory, from which EngramMemory.load builds one.

    weights: those of all fusion modules, by the keys of their state dict. new_files: the tables are in new files, which
    `discard` deletes.
    """

    config: EngramConfig
    token_map: TokenMap
    hidden_size: int
    streams: int
    tables: dict[int, Table]
    weights: dict[str, Tensor]
    new_files: bool

    def discard(self) -> None:
        """Close the tables, and delete their files if they are new, so that the load can be repeated."""
        for table in self.tables.values():
            table.close()
            if self.new_files and table.path is not None:
                table.path.unlink(missing_ok=True)
                if isinstance(table, EncodedTable):
                    table.codebook_path.unlink(missing_ok=True)


def save_memory(
    memory: Saveable, folder: str | os.PathLike[str], overwrite: bool = False, rows: WriteRows | None = None
) -> Path:
    """Write a memory as one folder, which appears complete or not at all; see EngramMemory.save.

    rows: writes the rows of a layer to a path and returns its entry as write_rows does. By default the rows of the
    memory's tables are written.
    """
    target = Path(folder)
    memory.check_finished()
    if not isinstance(memory.hasher, NgramHasher):
        raise ValueError(
            f"the rows are addressed by a {type(memory.hasher).__name__}, which a saved memory cannot name: save "
            f"state_dict() instead"
        )
    _check_target(target, overwrite)
    weights = _fusion_weights(memory)
    try:
        with whole_folder(target, overwrite) as partial:
            _write_files(memory, weights, partial, rows)
    except (FileExistsError, NotSynced):
        raise
    except OSError as error:
        raise OSError(
            error.errno,
            f"could not save the memory to {target}: {error.strerror or error}. Nothing half-written was left",
        ) from error
    return target


def _check_target(target: Path, overwrite: bool) -> None:
    """Raise FileExistsError if `target` exists and is not a saved memory to replace, nor an empty folder."""
    if target.exists():
        if not overwrite:
            raise FileExistsError(f"{target} exists: give another folder, or overwrite=True to replace a saved memory")
        if not is_saved(target) and (not target.is_dir() or any(target.iterdir())):
            raise FileExistsError(f"{target} is not a saved memory (by its manifest.json), so it is not replaced")


def _fusion_weights(memory: Saveable) -> dict[str, Tensor]:
    """Return the weights of the fusion modules on the CPU. Raise ValueError if their names are not a memory's."""
    weights = {k: v.detach().cpu().contiguous() for k, v in memory.fusions.state_dict().items()}
    expected = _expected_weights(memory.config, memory.hidden_size, memory.streams)
    if odd := set(weights) ^ set(expected):
        raise ValueError(
            f"the fusion weights are not those of a memory ({min(odd)}): another library has wrapped them, as PEFT "
            f'does with target_modules="all-linear". Undo that first (merge_and_unload), or the folder could not be '
            f"loaded"
        )
    return weights


def _expected_weights(config: EngramConfig, hidden_size: int, streams: int) -> dict[str, Tensor]:
    """Return the fusion modules' state dict for a configuration, on the meta device."""
    with torch.device("meta"):
        weights = EngramFusion(config, hidden_size, streams).state_dict()
    return {f"{layer}.{name}": value for layer in config.layers for name, value in weights.items()}


def _write_files(memory: Saveable, weights: dict[str, Tensor], home: Path, rows: WriteRows | None) -> None:
    """Write all files of a saved memory into `home`, the manifest last."""
    token_map = memory.hasher.token_map
    manifest = new_manifest(memory.layout, {"size": token_map.size, "digest": token_map.digest})
    shape = {"hidden_size": memory.hidden_size, "streams": memory.streams}
    (home / "config.json").write_text(json.dumps({"config": json.loads(memory.config.to_json()), **shape}, indent=1))
    token_map.save(home / "token_map.safetensors")
    (home / "fusion.safetensors").write_bytes(safetensors.torch.save(weights))
    for name in SMALL_FILES:
        manifest["files"][name] = file_entry(home / name)
    for layer, table in memory.tables.items():
        path = home / f"layer-{layer}.{memory.codec or 'rows'}"
        entries = {path.name: rows(layer, path) if rows else write_rows(path, table.tensor)}
        if isinstance(table, EncodedTable) and isinstance(table.codec, PQ):
            codebooks = home / f"{path.name}.codebooks"
            codebooks.write_bytes(safetensors.torch.save({"codebooks": table.codec.codebooks}))
            entries[codebooks.name] = file_entry(codebooks)
        manifest["files"] |= entries
        manifest["tables"][str(layer)] = {
            "file": path.name,
            "rows": table.rows,
            "dim": table.dim,
            "dtype": str(table.dtype).removeprefix("torch."),
            "row_bytes": table.nbytes // table.rows,
            "codec": memory.codec,
            "init": table.init,
            "std": table.std,
            "seed": str(table.seed),
            "binding": binding(memory.layout, layer, [entry["xxh3_128"] for entry in entries.values()]),
        }
    manifest["digest"] = manifest_digest(manifest)
    (home / "manifest.json").write_text(json.dumps(manifest, indent=1))


def load_parts(
    folder: str | os.PathLike[str],
    mode: str = "copy",
    token_map: TokenMap | None = None,
    rows_in: str | os.PathLike[str] | None = None,
) -> Parts:
    """Read and check the parts of a saved memory; see EngramMemory.load."""
    if mode not in ("copy", "shared") or (mode == "shared" and rows_in is not None):
        raise ValueError(f'mode must be "copy" (where rows_in may name a folder) or "shared", not {mode!r}')
    home = Path(folder)
    return read_folder(home, lambda pinned: _load(home, pinned, mode == "shared", token_map, rows_in))


def _load(
    folder: Path, home: Path, shared: bool, token_map: TokenMap | None, rows_in: str | os.PathLike[str] | None
) -> Parts:
    """Load the parts of the saved memory `folder`, whose files are read through the path `home` (see pinned_folder)."""
    manifest, layout = read_manifest(home)
    codebooks = [name for table in manifest["tables"].values() if (name := codebooks_name(table))]
    for name in (*SMALL_FILES, *codebooks):
        if file_digest(home / name) != manifest["files"][name]["xxh3_128"]:
            raise ValueError(f"{home / name} does not have the digest its manifest names: it was changed or torn")
    saved_map = TokenMap.load(home / "token_map.safetensors")
    if saved_map.digest != manifest["token_map"]["digest"]:
        raise ValueError(f"{home / 'token_map.safetensors'} is another token map than the rows were written with")
    if token_map is not None:
        try:
            saved_map.extend(token_map)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
    config, hidden_size, streams = _read_config(home / "config.json")
    if shared:
        _check_some_blocks(home, manifest)
    if hash_layout(config, saved_map).digest != layout.digest:
        raise ValueError(f"{home / 'config.json'} gives another hash layout than {home / 'manifest.json'}")
    if rows_in is not None:
        _prepare_rows_in(Path(rows_in), [table["file"] for table in manifest["tables"].values()])
    parts = Parts(config, saved_map, hidden_size, streams, {}, {}, rows_in is not None)
    tables = parts.tables
    try:
        for layer in config.layers:
            entry, path = manifest["tables"][str(layer)], home / manifest["tables"][str(layer)]["file"]
            target = path if shared else None if rows_in is None else Path(rows_in) / path.name
            tables[layer] = _open(config, layer, layout.rows[layer], entry, path, target, "r" if shared else "r+")
            if shared:
                tables[layer].path = folder / path.name
            else:
                read_rows(path, tables[layer].tensor, manifest["files"][path.name]["xxh3_128"])
        parts.weights = read_tensors(home / "fusion.safetensors", "the fusion weights of a memory")
        _check_weights(home, parts)
    except BaseException:
        parts.discard()
        raise
    return parts


def _prepare_rows_in(folder: Path, names: list[str]) -> None:
    """Make the folder for new row files. Raise FileExistsError if one of these files exists in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (folder / name).exists():
            raise FileExistsError(
                f"{folder / name} exists: rows_in is for new files. Give another folder, or delete the rows (if a load "
                f"was cut short, they are half a copy)"
            )
    # An old rows.json beside deleted rows would accept half a copy as complete after a kill.
    (folder / "rows.json").unlink(missing_ok=True)
    sync(folder)


def _check_weights(home: Path, parts: Parts) -> None:
    """Raise ValueError if a weight of the fusion modules is missing or has another shape."""
    for name, expected in _expected_weights(parts.config, parts.hidden_size, parts.streams).items():
        weight = parts.weights.get(name)
        if weight is None or weight.shape != expected.shape or not weight.is_floating_point():
            raise ValueError(f"{home / 'fusion.safetensors'} does not fit {home / 'config.json'}: {name}")


def _read_config(path: Path) -> tuple[EngramConfig, int, int]:
    """Return the config, hidden size and streams in a saved memory's config.json."""
    fields = read_json(path, "the config of a saved memory")
    try:
        config = EngramConfig.from_json(json.dumps(fields["config"]))
        hidden_size = as_integer("hidden_size", fields["hidden_size"])
        streams = as_integer("streams", fields["streams"])
    except KeyError as error:
        raise ValueError(f"{path} is damaged: it lacks {error}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not (1 <= hidden_size < 2**31 and 1 <= streams < 2**15):
        raise ValueError(f"{path}: hidden_size and streams must be sizes of a model, not {hidden_size} and {streams}")
    return config, hidden_size, streams


def _open(
    config: EngramConfig, layer: int, rows: int, entry: dict[str, Any], source: Path, target: Path | None, mode: str
) -> Table:
    """Open the table of one layer: the saved file itself (mode "r"), or an empty table for a copy of its rows ("r+").

    Args:
        entry: of the table, in the manifest. source: the saved file of rows. target: the table's file, None for RAM.
    """
    if entry.get("codec") is None:
        table: Table = new_table(config, layer, rows, target, mode)
    else:
        codec: str | Codec = str(entry["codec"])
        if codebooks_name(entry) and mode == "r+":
            codec = read_codebooks(Path(f"{source}.codebooks"))
        table = EncodedTable(rows, config.head_dim, codec, target, mode=mode)
    dtype = str(table.dtype).removeprefix("torch.")
    actual = (table.dim, *unwritten(dtype, table.init, table.std, str(table.seed)))
    saved = (entry.get("dim"), *unwritten(*(entry.get(name) for name in ("dtype", "init", "std", "seed"))))
    if actual != saved or table.nbytes // table.rows != entry["row_bytes"]:
        table.close()
        raise ValueError(f"{source.parent / 'config.json'} makes layer {layer} {actual}, its manifest says {saved}")
    return table


def _check_some_blocks(home: Path, manifest: dict[str, Any]) -> None:
    """Check the first, middle and last written block of every table: enough to notice another memory's file."""
    for table in manifest["tables"].values():
        entry = manifest["files"][table["file"]]
        blocks, size = entry.get("blocks", []), int(entry["bytes"])
        if not blocks:
            continue
        written = written_blocks(entry) or range(len(blocks))
        some = sorted({written[0], written[len(written) // 2], written[-1]})
        if bad := bad_blocks(home / table["file"], entry, some):
            raise ValueError(
                f"{home / table['file']} ({size:,} bytes): block {bad[0]} of {len(blocks)} does not have its digest: "
                f"changed, torn, or another memory's file; `engram verify {home}` checks all blocks"
            )
