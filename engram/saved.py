"""A whole memory in one folder: what its addresses are, its rows, and its fusion weights.

    FOLDER/manifest.json            version, layout, token map, tables; digests of all files (engram/tables/files.py)
          /config.json              EngramConfig, hidden size, streams
          /token_map.safetensors    the tokenizer's compression
          /fusion.safetensors       dense weights of the fusion modules
          /layer-<i>.rows           raw rows of a layer's table, native little-endian, row-major

Everything is JSON, safetensors or raw rows; nothing is unpickled, and nothing is believed before it was checked.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
import xxhash

from engram.addressing import HashLayout, TokenMap
from engram.config import EngramConfig
from engram.tables.files import (
    bad_blocks,
    file_digest,
    file_entry,
    load_manifest,
    manifest_digest,
    read_rows,
    sync,
    whole_folder,
    write_rows,
)

if TYPE_CHECKING:
    from engram.memory import EngramMemory

FORMAT = "engram-memory-1"
_SMALL = ("config.json", "token_map.safetensors", "fusion.safetensors")


def save_memory(memory: EngramMemory, folder: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Writes a memory as one folder, which appears whole or not at all; see EngramMemory.save."""
    target = Path(folder)
    if target.exists():
        if not overwrite:
            raise FileExistsError(f"{target} exists: give another folder, or overwrite=True to replace a saved memory")
        if not (target / "manifest.json").is_file() and (not target.is_dir() or any(target.iterdir())):
            raise FileExistsError(f"{target} is no saved memory (it has no manifest.json), so it is not replaced")
    if memory.codec is not None:
        raise ValueError(
            f"the tables are stored as {memory.codec}, and a folder holds float32 or bfloat16 rows: save the memory "
            f"before it is encoded"
        )
    layout, token_map = memory.layout, memory.hasher.token_map
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "layout": json.loads(layout.to_json()),  # multipliers are strings there
        "layout_digest": layout.digest,
        "token_map": {"size": token_map.size, "digest": token_map.digest},
        "byte_order": sys.byteorder,
        "tables": {},
        "files": {},
    }
    facts = {"config": json.loads(memory.config.to_json()), "hidden_size": memory.hidden_size}
    facts["streams"] = memory.streams
    weights = {k: v.detach().cpu().contiguous() for k, v in memory.fusions.state_dict().items()}
    try:
        with whole_folder(target, overwrite) as partial:
            (partial / "config.json").write_text(json.dumps(facts, indent=1))
            token_map.save(partial / "token_map.safetensors")
            (partial / "token_map.safetensors").chmod((partial / "config.json").stat().st_mode & 0o777)
            (partial / "fusion.safetensors").write_bytes(safetensors.torch.save(weights))
            for name in _SMALL:
                manifest["files"][name] = file_entry(partial / name)
            for layer, table in memory.tables.items():
                name = f"layer-{layer}.rows"
                entry = write_rows(partial / name, table.tensor)
                manifest["files"][name] = entry
                manifest["tables"][str(layer)] = {
                    "file": name,
                    "rows": table.rows,
                    "dim": table.dim,
                    "dtype": str(table.dtype).removeprefix("torch."),
                    "row_bytes": table.nbytes // table.rows,
                    "init": table.init,
                    "std": table.std,
                    "seed": str(table.seed),
                    "binding": _binding(layout, layer, entry["xxh3_128"]),
                }
            manifest["digest"] = manifest_digest(manifest)
            (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
            sync(partial / "manifest.json")
    except FileExistsError:
        raise
    except OSError as error:
        raise OSError(
            error.errno,
            f"could not save the memory to {target}: {error.strerror or error}. Nothing half-written was left",
        ) from error
    return target


def _binding(layout: HashLayout, layer: int, digest: str) -> str:
    """Ties a file's digest to the layer and the addresses it was written for."""
    return xxhash.xxh3_128_hexdigest(f"{layout.digest} {layer} {digest}".encode())


def read_facts(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], HashLayout]:
    """A saved memory's manifest and layout, after every check that does not read the rows.

    Raises:
        FileNotFoundError: no memory there. ValueError: what is wrong with which file.
    """
    home = Path(folder)
    path = home / "manifest.json"
    manifest = load_manifest(home)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path} has format {manifest.get('format')!r}, this version reads {FORMAT!r}")
    try:
        layout = HashLayout.from_json(json.dumps(manifest["layout"]))
        tables = {int(k): (str(v["file"]), int(v["rows"]) * int(v["row_bytes"])) for k, v in manifest["tables"].items()}
        bindings = {int(k): v["binding"] for k, v in manifest["tables"].items()}
        rows = {int(k): int(v["rows"]) for k, v in manifest["tables"].items()}
        entries = {layer: manifest["files"][file] for layer, (file, _) in tables.items()}
        if layout.digest != manifest["layout_digest"] or rows != layout.rows:
            raise ValueError("layout, layout digest and rows of the tables do not belong together")
        if manifest["byte_order"] != sys.byteorder:
            raise ValueError(f"rows are {manifest['byte_order']}-endian, this machine is {sys.byteorder}-endian")
        _ = manifest["token_map"]["digest"], [manifest["files"][name] for name in _SMALL]
    except KeyError as error:
        raise ValueError(f"{path} is damaged: it lacks {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error
    for layer, (file, size) in tables.items():
        if entries[layer]["bytes"] != size:
            raise ValueError(f"{home / file} holds {entries[layer]['bytes']:,} bytes, layer {layer} needs {size:,}")
        for other, (twin, _) in tables.items():
            if other <= layer:
                continue
            if file == twin or os.path.samefile(home / file, home / twin):
                raise ValueError(f"{path}: layers {layer} and {other} name one file, {home / file}")
            same = entries[layer]["xxh3_128"] == entries[other]["xxh3_128"]
            if same and not _never_written(entries[layer]):
                raise ValueError(
                    f"{home / file} and {home / twin} of layers {layer} and {other} hold the same rows: one file was "
                    f"copied over the other"
                )
        if bindings[layer] != _binding(layout, layer, entries[layer]["xxh3_128"]):
            raise ValueError(
                f"{home / file} is not bound to layer {layer} of this layout: it was swapped with another layer's or "
                f"comes from another memory"
            )
    if manifest.get("digest") != manifest_digest(manifest):
        raise ValueError(f"{path} was altered: it does not have the digest it states")
    return manifest, layout


def _never_written(entry: dict[str, Any]) -> bool:
    """Whether all bytes of a file are zero, by its digest."""
    digest, left, zeros = xxhash.xxh3_128(), int(entry["bytes"]), bytes(1 << 20)
    if len(set(entry.get("blocks", [])[:-1])) > 1:
        return False
    while left:
        digest.update(zeros[: min(left, len(zeros))])
        left -= min(left, len(zeros))
    return digest.hexdigest() == entry["xxh3_128"]


def load_memory(
    folder: str | os.PathLike[str],
    mode: str = "copy",
    token_map: TokenMap | None = None,
    rows_in: str | os.PathLike[str] | None = None,
) -> EngramMemory:
    """Opens a saved memory; see EngramMemory.load."""
    from engram.memory import EngramMemory

    if mode not in ("copy", "shared") or (mode == "shared" and rows_in is not None):
        raise ValueError(f'mode is "copy" (where rows_in may name a folder) or "shared", not {mode!r}')
    home = Path(folder)
    manifest, layout = read_facts(home)
    for name in _SMALL:
        if file_digest(home / name) != manifest["files"][name]["xxh3_128"]:
            raise ValueError(f"{home / name} does not have the digest its manifest names: it was changed or torn")
    saved_map = TokenMap.load(home / "token_map.safetensors")
    if saved_map.digest != manifest["token_map"]["digest"]:
        raise ValueError(f"{home / 'token_map.safetensors'} is another token map than the rows were written with")
    if token_map is not None and token_map.digest != saved_map.digest:
        raise ValueError(
            f"{home} was saved with the token map {saved_map.digest[:12]} ({saved_map.size:,} ids), this one is "
            f"{token_map.digest[:12]} ({token_map.size:,} ids): another tokenizer or version, every row would be wrong"
        )
    facts = json.loads((home / "config.json").read_text())
    config = EngramConfig.from_json(json.dumps(facts["config"]))
    shared = mode == "shared"
    if shared:
        _check_some_blocks(home, manifest)
    where = home if shared else rows_in
    if rows_in is not None:
        Path(rows_in).mkdir(parents=True, exist_ok=True)
        for table in manifest["tables"].values():
            if (Path(rows_in) / table["file"]).exists():
                raise FileExistsError(f"{Path(rows_in) / table['file']} exists: rows_in is for new files")
    memory = EngramMemory(
        config, saved_map, facts["hidden_size"], facts["streams"], where, mode="r" if shared else "r+"
    )
    if memory.layout.digest != layout.digest:
        raise ValueError(f"{home / 'config.json'} gives another hash layout than {home / 'manifest.json'}")
    for layer, table in memory.tables.items():
        stated = manifest["tables"][str(layer)]
        found = (table.dim, str(table.dtype).removeprefix("torch."), table.init, table.std, str(table.seed))
        wanted = tuple(stated.get(name) for name in ("dim", "dtype", "init", "std", "seed"))
        if found != wanted:
            raise ValueError(f"{home / 'config.json'} describes layer {layer} as {found}, its manifest as {wanted}")
        if not shared:
            read_rows(home / stated["file"], table.tensor, manifest["files"][stated["file"]]["xxh3_128"])
    weights = safetensors.torch.load_file(home / "fusion.safetensors")
    for key, value in memory.fusions.state_dict().items():
        if key not in weights or weights[key].shape != value.shape:
            raise ValueError(f"{home / 'fusion.safetensors'} does not fit {home / 'config.json'}: {key}")
    dtypes = {value.dtype for value in weights.values()}
    if len(dtypes) == 1 and dtypes != {torch.float32}:
        memory.fusions.to(dtypes.pop())
    memory.fusions.load_state_dict(weights)
    return memory.eval() if shared else memory


def _check_some_blocks(home: Path, manifest: dict[str, Any]) -> None:
    """First, middle and last written block of every table: enough to notice another memory's file, in constant time."""
    for table in manifest["tables"].values():
        entry = manifest["files"][table["file"]]
        blocks, size = entry.get("blocks", []), int(entry["bytes"])
        if not blocks:
            continue
        common = max(set(blocks), key=blocks.count)  # holes, where there are any
        written = [i for i, digest in enumerate(blocks) if digest != common] or list(range(len(blocks)))
        some = sorted({written[0], written[len(written) // 2], written[-1]})
        if bad := bad_blocks(home / table["file"], entry, some):
            raise ValueError(
                f"{home / table['file']} ({size:,} bytes): block {bad[0]} of {len(blocks)} does not have its digest: "
                f"changed, torn, or another memory's file; `engram verify {home}` checks all blocks"
            )
