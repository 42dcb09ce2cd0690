"""The manifest of a folder: which files it holds, their sizes and digests, and `verify`, which compares them.

    FOLDER/manifest.json      "files": {name: {"bytes", "xxh3_128", "blocks": [xxh3-128 of each 16 MiB]}}, more fields
          /layer-<i>.rows     raw rows of one table; blocks that were never written are holes

The other fields of a saved memory are described in engram/memory/saved.py; digests and `verify` are the same for
saved memories and for checkpoints.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from engram.storage import files
from engram.storage.folders import between_renames, read_folder, replaced
from engram.storage.untrusted import read_json


def load_manifest(folder: str | os.PathLike[str], name: str = "manifest.json") -> dict[str, Any]:
    """Return a folder's manifest, after a check that "files" is well formed and each file exists with its size.

    Args:
        folder: the folder. name: the manifest's file name ("run.json" for the folder of a training run).

    Raises:
        FileNotFoundError: the folder has no manifest. ValueError: the manifest is damaged, or a file is missing,
        truncated or foreign.
    """
    home = Path(folder)
    path = home / name
    if not path.is_file():
        old = between_renames(home)
        hint = f"; a save was cut short: rename {old[0]} to {home}" if old else ""
        raise FileNotFoundError(f"{home} is not a saved memory or checkpoint: it has no {name}{hint}")
    manifest = read_json(path, "the manifest of a saved memory or checkpoint")
    try:
        entries = {str(k): (int(v["bytes"]), v["xxh3_128"], v.get("blocks", [])) for k, v in manifest["files"].items()}
        if not all(isinstance(digest, str) and isinstance(blocks, list) for _, digest, blocks in entries.values()):
            raise TypeError("a digest is a string, blocks are a list of them")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
    for name, (size, _, blocks) in entries.items():
        if Path(name).name != name or not (home / name).is_file():
            raise ValueError(f"{home} lacks the file {name!r} that its manifest names")
        actual = (home / name).stat().st_size
        if actual != size:
            raise ValueError(
                f"{home / name} holds {actual:,} bytes where {size:,} are expected: it is truncated or foreign"
            )
        if blocks and len(blocks) != -(-size // files.BLOCK):
            raise ValueError(f"{path} is damaged: {len(blocks)} block digests for {size:,} bytes of {name}")
    return manifest


def manifest_digest(manifest: dict[str, Any]) -> str:
    """Return the xxh3-128 of a manifest's canonical JSON without its own "digest"."""
    fields = {k: v for k, v in manifest.items() if k != "digest"}
    return xxhash.xxh3_128_hexdigest(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode())


def check_digest(path: Path, manifest: dict[str, Any]) -> bool:
    """Compare a manifest with the digest in it. Return False if it was written before manifests had a digest.

    Raises:
        ValueError: the manifest was altered, or it lacks the digest that its format requires.
    """
    if "digest" not in manifest and manifest.get("format") in (None, 1):
        return False
    if manifest.get("digest") != manifest_digest(manifest):
        raise ValueError(f"{path} was altered: it does not have the digest that is written in it")
    return True


def step_folders(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the folders step-<digits> in the folder of a training run, highest step last; other names are skipped."""
    matches = [(re.fullmatch(r"step-([0-9]+)", path.name), path) for path in Path(folder).glob("step-*/")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in matches if match)]


def verify(
    folder: str | os.PathLike[str], on_bytes: Callable[[str, int, int], None] | None = None
) -> list[dict[str, Any]]:
    """Read every byte of a saved memory, a checkpoint, or the folder of a training run, and compare digests.

    Args:
        folder: the folder that memory.save or `engram train` wrote.
        on_bytes: called with (file, bytes just read, bytes of all files), for a progress bar.

    Returns:
        One {"file", "bytes", "blocks", "bad_blocks", "problem", "note"} per file. problem: None if the file is
        intact. Blocks are numbered from 0 and 16 MiB long; a file without block digests (dense weights) is one block.
        note: why a file could not be checked, or None: an older version wrote it without digests, or the name of its
        folder is not a step's.

    Raises:
        FileNotFoundError: the folder holds nothing to verify.

    Example:
        >>> import engram, tempfile
        >>> config = engram.EngramConfig(layers=(0,), orders=(2,), heads=2, head_dim=4, rows_per_head=50)
        >>> memory = engram.EngramMemory(config, engram.TokenMap.identity(20), hidden_size=8)
        >>> folder = memory.save(tempfile.mkdtemp(), overwrite=True)
        >>> [entry["file"] for entry in engram.verify(folder) if entry["problem"]]
        []
    """
    home = Path(folder)
    steps = [] if (home / "manifest.json").is_file() else step_folders(home)
    if not steps:
        return _verify_files(home, "manifest.json", on_bytes)
    results = _verify_files(home, "run.json", on_bytes) if (home / "run.json").is_file() else []
    for step in steps:
        if (step / "manifest.json").is_file():
            results += _verify_files(step, "manifest.json", on_bytes)
        else:
            results.append(_result(step, problem=f"{step} is not a complete checkpoint: it has no manifest.json"))
    for other in sorted(set(home.glob("step-*/")) - set(steps)):
        results.append(_result(other, note=f"{other} was not checked: checkpoints are named step-<number>"))
    return results


def _result(path: Path, size: int = 0, problem: str | None = None, note: str | None = None) -> dict[str, Any]:
    """Make the entry of one file in the result of `verify`, before its blocks are read."""
    return {"file": str(path), "bytes": size, "blocks": 0, "bad_blocks": [], "problem": problem, "note": note}


def _verify_files(
    home: Path, name: str, on_bytes: Callable[[str, int, int], None] | None = None
) -> list[dict[str, Any]]:
    """Verify a manifest and the files that it lists."""
    return read_folder(home, lambda pinned: _verify_pinned(home, pinned, name, on_bytes))


def _verify_pinned(
    home: Path, pinned: Path, name: str, on_bytes: Callable[[str, int, int], None] | None
) -> list[dict[str, Any]]:
    path, results = home / name, list[dict[str, Any]]()
    try:
        if name == "run.json" and not _has_files(pinned / name):  # written before it had digests
            manifest: dict[str, Any] = {"files": {}}
        else:
            manifest = load_manifest(pinned, name)
        if not check_digest(pinned / name, manifest):
            note = f"{path} has no digest, because an older version wrote it: its fields were not checked"
            results.append(_result(path, (pinned / name).stat().st_size, note=note))
    except ValueError as error:
        _check_same(home, pinned)
        return [_result(home, problem=str(error).replace(str(pinned), str(home)))]
    total = sum(int(entry["bytes"]) for entry in manifest["files"].values())
    for name, entry in manifest["files"].items():
        path, bad = home / name, list[int]()
        problem: str | None = None
        try:
            bad = files.bad_blocks(
                pinned / name,
                entry,
                on_bytes=lambda n, path=path: on_bytes and on_bytes(str(path), n, total),  # type: ignore[misc]
            )
        except (OSError, ValueError) as error:
            problem = str(error).replace(str(pinned), str(home))
        blocks = max(len(entry.get("blocks", [])), 1)
        if bad:
            listed = ", ".join(map(str, bad[:8])) + (f" and {len(bad) - 8} more" if len(bad) > 8 else "")
            where = f"block {listed} of {blocks} (16 MiB each, from byte {bad[0] * files.BLOCK:,})"
            problem = f"{path}: {where if blocks > 1 else 'the file'} does not have its digest: changed or torn"
        if problem:
            _check_same(home, pinned)
        result = _result(path, int(entry["bytes"]), problem)
        results.append(result | {"blocks": blocks, "bad_blocks": bad})
    return results


def _has_files(path: Path) -> bool:
    """Return False if a run.json is one of the first version, which lists no files."""
    try:
        values = read_json(path, "the record of a run")
    except ValueError:
        return True  # damaged: load_manifest raises the error
    return not {"format", "files", "digest"}.isdisjoint(values)


def _check_same(shown: Path, pinned: Path) -> None:
    """Raise Replaced if `shown` no longer names the pinned folder."""
    if not (shown.exists() and os.path.samefile(shown, pinned)):
        raise replaced(shown)
