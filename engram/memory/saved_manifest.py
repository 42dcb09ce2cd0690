"""The manifest of a saved memory: its format, and every check of it that reads no rows."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import xxhash

from engram.addressing import HashLayout
from engram.storage.files import written_blocks, zero_digest
from engram.storage.manifest import load_manifest, manifest_digest
from engram.storage.untrusted import read_json

FORMAT = "engram-memory-1"
SMALL_FILES = ("config.json", "token_map.safetensors", "fusion.safetensors")


def is_saved(folder: Path) -> bool:
    """Return True if manifest.json is a saved memory's, of any version: checkpoints and offloaded rows have one too."""
    try:
        file_format = read_json(folder / "manifest.json", "a manifest")["format"]
        return str(file_format).startswith(FORMAT.rpartition("-")[0])
    except (OSError, ValueError, KeyError):
        return False


def new_manifest(layout: HashLayout, token_map: dict[str, Any]) -> dict[str, Any]:
    """Make a manifest without tables and files. token_map: the size and digest of the memory's token map."""
    return {
        "format": FORMAT,
        "layout": json.loads(layout.to_json()),  # multipliers are strings there
        "layout_digest": layout.digest,
        "token_map": token_map,
        "byte_order": sys.byteorder,
        "tables": {},
        "files": {},
    }


def binding(layout: HashLayout, layer: int, digests: Sequence[str]) -> str:
    """Return a digest that ties the files of a table to the layer and the addresses they were written for.

    digests: of the file of rows, and of the codebooks if there are any.
    """
    return xxhash.xxh3_128_hexdigest(" ".join([layout.digest, str(layer), *digests]).encode())


def codebooks_name(table: dict[str, Any]) -> str | None:
    """Return the name of the file with a product-quantised table's codebooks; None for other codecs."""
    return f"{table['file']}.codebooks" if str(table.get("codec")).startswith("pq") else None


def read_manifest(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], HashLayout]:
    """Return a saved memory's manifest and layout, after every check that does not read the rows.

    Raises:
        FileNotFoundError: the folder holds no saved memory. ValueError: what is wrong with which file.
    """
    home = Path(folder)
    path = home / "manifest.json"
    manifest = load_manifest(home)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path} has format {manifest.get('format')!r}, this version reads {FORMAT!r}")
    try:
        layout = HashLayout.from_json(json.dumps(manifest["layout"]))
        tables = {int(layer): table for layer, table in manifest["tables"].items()}
        sizes = {layer: int(table["rows"]) * int(table["row_bytes"]) for layer, table in tables.items()}
        rows = {layer: int(table["rows"]) for layer, table in tables.items()}
        if layout.digest != manifest["layout_digest"] or rows != layout.rows:
            raise ValueError("layout, layout digest and rows of the tables do not belong together")
        if manifest["byte_order"] != sys.byteorder:
            raise ValueError(f"rows are {manifest['byte_order']}-endian, this machine is {sys.byteorder}-endian")
        names = {layer: [table["file"], *filter(None, [codebooks_name(table)])] for layer, table in tables.items()}
        digests = {layer: [manifest["files"][name]["xxh3_128"] for name in names[layer]] for layer in tables}
        bindings = {layer: table["binding"] for layer, table in tables.items()}
        _ = manifest["token_map"]["digest"], [manifest["files"][name] for name in SMALL_FILES]
    except KeyError as error:
        raise ValueError(f"{path} is damaged: it lacks {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error
    files = {layer: str(table["file"]) for layer, table in tables.items()}
    _check_files(home, {layer: manifest["files"][file] for layer, file in files.items()}, files, sizes)
    for layer, file in files.items():
        if bindings[layer] != binding(layout, layer, digests[layer]):
            raise ValueError(
                f"{home / file} is not bound to layer {layer} of this layout: it was swapped with another layer's or "
                f"comes from another memory"
            )
    if manifest.get("digest") != manifest_digest(manifest):
        raise ValueError(f"{path} was altered: it does not have the digest that is written in it")
    return manifest, layout


def _check_files(home: Path, entries: dict[int, dict[str, Any]], files: dict[int, str], sizes: dict[int, int]) -> None:
    """Raise ValueError if a layer's file of rows has another size than its table, or is also another layer's."""
    for layer, file in files.items():
        if entries[layer]["bytes"] != sizes[layer]:
            raise ValueError(
                f"{home / file} holds {entries[layer]['bytes']:,} bytes, layer {layer} needs {sizes[layer]:,}"
            )
    for layer, other in combinations(sorted(files), 2):
        path, twin = home / files[layer], home / files[other]
        if path == twin or os.path.samefile(path, twin):
            raise ValueError(f"{home / 'manifest.json'}: layers {layer} and {other} name one file, {path}")
        same = entries[layer]["xxh3_128"] == entries[other]["xxh3_128"]
        if same and not _never_written(entries[layer]):
            raise ValueError(
                f"{path} and {twin} of layers {layer} and {other} hold the same rows: one file was copied over the "
                f"other"
            )


def _never_written(entry: dict[str, Any]) -> bool:
    """Return True if all bytes of a file are zero, by its digest."""
    return not written_blocks(entry) if entry.get("blocks") else entry["xxh3_128"] == zero_digest(int(entry["bytes"]))
