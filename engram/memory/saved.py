"""A whole memory in one folder: what its addresses are, its rows, and its fusion weights.

    FOLDER/manifest.json            version, layout, token map, tables; digests of all files (engram/storage/files.py)
          /config.json              EngramConfig, hidden size, streams
          /token_map.safetensors    the tokenizer's compression
          /fusion.safetensors       dense weights of the fusion modules
          /layer-<i>.rows           raw rows of a layer's table, native little-endian, row-major; or, of encoded tables,
          /layer-<i>.<codec>        rows as engram/tables/codecs.py describes them, and for pq4 and pq8
          /layer-<i>.<codec>.codebooks    safetensors

Everything is JSON, safetensors or raw rows; nothing is unpickled, and nothing is believed before it was checked.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
import xxhash
from torch import Tensor, nn

from engram.addressing import HashLayout, NgramHasher, TokenMap
from engram.config import EngramConfig, whole
from engram.fusion import EngramFusion
from engram.memory.build import hash_layout, new_table, unwritten
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
    zero_digest,
)
from engram.storage.folders import read_folder, whole_folder
from engram.storage.manifest import load_manifest, manifest_digest
from engram.storage.untrusted import read_json, read_tensors
from engram.tables import EncodedTable, Table
from engram.tables.codecs import PQ, Codec
from engram.tables.encoded import read_codebooks

FORMAT = "engram-memory-1"
_SMALL = ("config.json", "token_map.safetensors", "fusion.safetensors")


class Saveable(Protocol):
    """What save_memory reads of a memory."""

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
    """What a saved memory is put together from. weights: of all fusion modules, by the keys of their state dict.
    new_files: the tables lie in new files, which go if the memory does not come to be."""

    config: EngramConfig
    token_map: TokenMap
    hidden_size: int
    streams: int
    tables: dict[int, Table]
    weights: dict[str, Tensor]
    new_files: bool

    def discard(self) -> None:
        """Close the tables, and delete their files if they are new, so that the load can be tried again."""
        for table in self.tables.values():
            table.close()
            if self.new_files and table.path is not None:
                table.path.unlink(missing_ok=True)
                if isinstance(table, EncodedTable):
                    table.codebook_path.unlink(missing_ok=True)


def save_memory(
    memory: Saveable,
    folder: str | os.PathLike[str],
    overwrite: bool = False,
    rows: Callable[[int, Path], dict[str, Any]] | None = None,
) -> Path:
    """Writes a memory as one folder, which appears whole or not at all; see EngramMemory.save.

    rows: writes the rows of a layer to a path and returns write_rows' entry, where they are not in the memory's tables.
    """
    target = Path(folder)
    memory.check_finished()
    if not isinstance(memory.hasher, NgramHasher):
        raise ValueError(
            f"the rows are addressed by a {type(memory.hasher).__name__}, which a saved memory cannot name: save "
            f"state_dict() instead"
        )
    if target.exists():
        if not overwrite:
            raise FileExistsError(f"{target} exists: give another folder, or overwrite=True to replace a saved memory")
        if not _is_saved(target) and (not target.is_dir() or any(target.iterdir())):
            raise FileExistsError(f"{target} is not a saved memory (by its manifest.json), so it is not replaced")
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
    with torch.device("meta"):
        plain = EngramFusion(memory.config, memory.hidden_size, memory.streams).state_dict()
    if odd := set(weights) ^ {f"{layer}.{name}" for layer in memory.config.layers for name in plain}:
        raise ValueError(
            f"the fusion weights are not those of a memory ({min(odd)}): another library has wrapped them, as PEFT "
            f'does with target_modules="all-linear". Undo that first (merge_and_unload): no one could load the folder'
        )
    try:
        with whole_folder(target, overwrite) as partial:
            (partial / "config.json").write_text(json.dumps(facts, indent=1))
            token_map.save(partial / "token_map.safetensors")
            (partial / "fusion.safetensors").write_bytes(safetensors.torch.save(weights))
            for name in _SMALL:
                manifest["files"][name] = file_entry(partial / name)
            for layer, table in memory.tables.items():
                name = f"layer-{layer}.{memory.codec or 'rows'}"
                entry = rows(layer, partial / name) if rows else write_rows(partial / name, table.tensor)
                manifest["files"][name] = entry
                digests = [entry["xxh3_128"]]
                if isinstance(table, EncodedTable) and isinstance(table.codec, PQ):
                    books = partial / f"{name}.codebooks"
                    books.write_bytes(safetensors.torch.save({"codebooks": table.codec.codebooks}))
                    manifest["files"][books.name] = file_entry(books)
                    digests.append(manifest["files"][books.name]["xxh3_128"])
                manifest["tables"][str(layer)] = {
                    "file": name,
                    "rows": table.rows,
                    "dim": table.dim,
                    "dtype": str(table.dtype).removeprefix("torch."),
                    "row_bytes": table.nbytes // table.rows,
                    "codec": memory.codec,
                    "init": table.init,
                    "std": table.std,
                    "seed": str(table.seed),
                    "binding": _binding(layout, layer, digests),
                }
            manifest["digest"] = manifest_digest(manifest)
            (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
    except (FileExistsError, NotSynced):
        raise
    except OSError as error:
        raise OSError(
            error.errno,
            f"could not save the memory to {target}: {error.strerror or error}. Nothing half-written was left",
        ) from error
    return target


def _is_saved(folder: Path) -> bool:
    """Return True if manifest.json is a saved memory's, of any version: checkpoints and offloaded rows have one too."""
    try:
        found = read_json(folder / "manifest.json", "a manifest")["format"]
        return str(found).startswith(FORMAT.rpartition("-")[0])
    except (OSError, ValueError, KeyError):
        return False


def _binding(layout: HashLayout, layer: int, digests: Sequence[str]) -> str:
    """Ties the digests of a table's files to the layer and the addresses they were written for."""
    return xxhash.xxh3_128_hexdigest(" ".join([layout.digest, str(layer), *digests]).encode())


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
        small = [*_SMALL, *(_codebooks(v) for v in manifest["tables"].values() if _codebooks(v))]
        digests = {name: manifest["files"][name]["xxh3_128"] for name in small}
        books = {int(k): [digests[_codebooks(v)]] if _codebooks(v) else [] for k, v in manifest["tables"].items()}
        _ = manifest["token_map"]["digest"]
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
        if bindings[layer] != _binding(layout, layer, [entries[layer]["xxh3_128"], *books[layer]]):
            raise ValueError(
                f"{home / file} is not bound to layer {layer} of this layout: it was swapped with another layer's or "
                f"comes from another memory"
            )
    if manifest.get("digest") != manifest_digest(manifest):
        raise ValueError(f"{path} was altered: it does not have the digest it states")
    return manifest, layout


def _codebooks(table: dict[str, Any]) -> str | None:
    """Name of the file with a product-quantised table's codebooks; None for other codecs."""
    return f"{table['file']}.codebooks" if str(table.get("codec")).startswith("pq") else None


def _never_written(entry: dict[str, Any]) -> bool:
    """Return True if all bytes of a file are zero, by its digest."""
    return not written_blocks(entry) if entry.get("blocks") else entry["xxh3_128"] == zero_digest(int(entry["bytes"]))


def load_parts(
    folder: str | os.PathLike[str],
    mode: str = "copy",
    token_map: TokenMap | None = None,
    rows_in: str | os.PathLike[str] | None = None,
) -> Parts:
    """Read and check the parts of a saved memory; see EngramMemory.load."""
    if mode not in ("copy", "shared") or (mode == "shared" and rows_in is not None):
        raise ValueError(f'mode is "copy" (where rows_in may name a folder) or "shared", not {mode!r}')
    home = Path(folder)
    return read_folder(home, lambda pinned: _load(home, pinned, mode == "shared", token_map, rows_in))


def _load(
    shown: Path, home: Path, shared: bool, token_map: TokenMap | None, rows_in: str | os.PathLike[str] | None
) -> Parts:
    """home: where the files of the folder `shown` are read (see pinned_folder)."""
    manifest, layout = read_facts(home)
    books = [name for table in manifest["tables"].values() if (name := _codebooks(table))]
    for name in (*_SMALL, *books):
        if file_digest(home / name) != manifest["files"][name]["xxh3_128"]:
            raise ValueError(f"{home / name} does not have the digest its manifest names: it was changed or torn")
    saved_map = TokenMap.load(home / "token_map.safetensors")
    if saved_map.digest != manifest["token_map"]["digest"]:
        raise ValueError(f"{home / 'token_map.safetensors'} is another token map than the rows were written with")
    if token_map is not None:
        try:
            saved_map.extend(token_map)
        except ValueError as error:
            raise ValueError(f"{shown}: {error}") from None
    config, hidden_size, streams = _read_shape(home / "config.json")
    if shared:
        _check_some_blocks(home, manifest)
    if hash_layout(config, saved_map).digest != layout.digest:
        raise ValueError(f"{home / 'config.json'} gives another hash layout than {home / 'manifest.json'}")
    if rows_in is not None:
        Path(rows_in).mkdir(parents=True, exist_ok=True)
        for stated in manifest["tables"].values():
            if (Path(rows_in) / stated["file"]).exists():
                raise FileExistsError(
                    f"{Path(rows_in) / stated['file']} exists: rows_in is for new files. Give another folder, or "
                    f"delete the rows (if a load was cut short, they are half a copy)"
                )
        # If rows were deleted and their rows.json was not, it would vouch for half a copy after a kill.
        (Path(rows_in) / "rows.json").unlink(missing_ok=True)
        sync(Path(rows_in))
    parts = Parts(config, saved_map, hidden_size, streams, {}, {}, rows_in is not None)
    tables = parts.tables
    try:
        for layer in config.layers:
            stated, path = manifest["tables"][str(layer)], home / manifest["tables"][str(layer)]["file"]
            target = path if shared else None if rows_in is None else Path(rows_in) / path.name
            tables[layer] = _open(config, layer, layout.rows[layer], stated, path, target, "r" if shared else "r+")
            if shared:
                tables[layer].path = shown / path.name
            else:
                read_rows(path, tables[layer].tensor, manifest["files"][path.name]["xxh3_128"])
        parts.weights = read_tensors(home / "fusion.safetensors", "the fusion weights of a memory")
        _check_weights(home, parts)
    except BaseException:
        parts.discard()
        raise
    return parts


def _check_weights(home: Path, parts: Parts) -> None:
    """Raise ValueError if a weight of the fusion modules is missing or has another shape."""
    weights = parts.weights
    with torch.device("meta"):
        plain = EngramFusion(parts.config, parts.hidden_size, parts.streams).state_dict()
    for layer in parts.config.layers:
        for name, value in plain.items():
            key = f"{layer}.{name}"
            if key not in weights or weights[key].shape != value.shape or not weights[key].is_floating_point():
                raise ValueError(f"{home / 'fusion.safetensors'} does not fit {home / 'config.json'}: {key}")


def _read_shape(path: Path) -> tuple[EngramConfig, int, int]:
    """Config, hidden size and streams of a saved memory's config.json."""
    facts = read_json(path, "the config of a saved memory")
    try:
        config = EngramConfig.from_json(json.dumps(facts["config"]))
        hidden_size, streams = whole("hidden_size", facts["hidden_size"]), whole("streams", facts["streams"])
    except KeyError as error:
        raise ValueError(f"{path} is damaged: it lacks {error}") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not (1 <= hidden_size < 2**31 and 1 <= streams < 2**15):
        raise ValueError(f"{path}: hidden_size and streams must be sizes of a model, not {hidden_size} and {streams}")
    return config, hidden_size, streams


def _open(
    config: EngramConfig, layer: int, rows: int, stated: dict[str, Any], source: Path, target: Path | None, mode: str
) -> Table:
    """The table of one layer: the saved file itself (mode "r"), or an empty one for a copy of its rows ("r+")."""
    if stated.get("codec") is None:
        table: Table = new_table(config, layer, rows, target, mode)
    else:
        codec: str | Codec = str(stated["codec"])
        if _codebooks(stated) and mode == "r+":
            codec = read_codebooks(Path(f"{source}.codebooks"))
        table = EncodedTable(rows, config.head_dim, codec, target, mode=mode)
    dtype = str(table.dtype).removeprefix("torch.")
    found = (table.dim, *unwritten(dtype, table.init, table.std, str(table.seed)))
    wanted = (stated.get("dim"), *unwritten(*(stated.get(name) for name in ("dtype", "init", "std", "seed"))))
    if found != wanted or table.nbytes // table.rows != stated["row_bytes"]:
        table.close()
        raise ValueError(f"{source.parent / 'config.json'} makes layer {layer} {found}, its manifest says {wanted}")
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
