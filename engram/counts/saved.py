"""Counts on disk: one file of nodes and one of slots per length of n-gram, and a manifest with their digests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engram.counts.level import Level, slots_for
from engram.storage.files import read_rows, write_rows
from engram.storage.folders import read_folder, whole_folder
from engram.storage.manifest import check_digest, load_manifest, manifest_digest

FORMAT = "engram-counts-1"


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.view(np.int32))


def save(folder: Path, levels: list[Level], facts: dict[str, Any], overwrite: bool) -> Path:
    """Write levels, and `facts` as fields of the manifest, to a new folder."""
    with whole_folder(folder, overwrite) as home:
        files = {}
        for n, level in enumerate(levels, 1):
            for name, array in (("nodes", level.nodes[: level.used]), ("slots", level.slots)):
                files[f"{n}-grams.{name}"] = write_rows(home / f"{n}-grams.{name}", _tensor(array))
        used = [level.used for level in levels]
        manifest: dict[str, Any] = {"format": FORMAT, **facts, "used": used, "files": files}
        manifest["digest"] = manifest_digest(manifest)
        (home / "manifest.json").write_text(json.dumps(manifest))
    return folder


def load(folder: Path) -> tuple[dict[str, Any], list[Level]]:
    """Return the manifest and the levels of a folder."""
    return read_folder(folder, _load)


def _load(folder: Path) -> tuple[dict[str, Any], list[Level]]:
    manifest = load_manifest(folder)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{folder} has format {manifest.get('format')!r}, not the counts {FORMAT!r} of this version")
    check_digest(folder / "manifest.json", manifest)
    levels = list[Level]()
    for n, used in enumerate(manifest["used"], 1):
        level = Level(8 if n < len(manifest["used"]) else 4)
        slots = manifest["files"][f"{n}-grams.slots"]["bytes"] // 4
        level.nodes, level.slots, level.used = (
            np.empty((used, level.words), np.uint32),
            np.empty(slots, np.uint32),
            used,
        )
        if slots & (slots - 1) or slots < slots_for(used):
            raise ValueError(f"{folder} has {slots:,} slots for {used:,} n-grams of {n} tokens: it is damaged")
        for name, array in (("nodes", level.nodes), ("slots", level.slots)):
            file = f"{n}-grams.{name}"
            read_rows(folder / file, _tensor(array), manifest["files"][file]["xxh3_128"])
        levels.append(level)
    return manifest, levels
