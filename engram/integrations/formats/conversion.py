"""convert: write a memory in another format, a block of rows at a time.

    engram                      our folder (engram/memory/saved.py); e4m3 rows stay e4m3, in rows of dim + dim / 32
                                bytes, if their scales are powers of two that such rows can hold: e8m0 scales per
                                32 values or more, or one scale for all. Rows with other scales, and int8 rows, are
                                value * scale in float32, rounded to the config's table_dtype (bfloat16 without a
                                config)
    demo                        float32 rows, one state dict
    deepseek-v4.1               e4m3 and e8m0 tensors; with shards > 1 one file per tensor-parallel rank
    deepseek-v4.1-interleaved   the same in one uint8 tensor, values and scales of a row side by side
    qwen                        bfloat16 or float32 rows in `shards` tensors
    gguf                        one file with only the tables and the keys that address them; fp8 rows as I8

Memory use does not depend on the table's size: blocks of 64 MiB as float32. All written bytes are read back and
compared by digest, and random rows are compared with the source through the reader of the target's own format.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engram.addressing import TokenMap
from engram.config import EngramConfig
from engram.integrations.formats.dialects import check_dialect
from engram.integrations.formats.readers import Source, open_source
from engram.integrations.formats.recoder import Recoder
from engram.integrations.formats.stored_rows import Rows
from engram.integrations.formats.writers import Step, write_engram, write_gguf, write_safetensors
from engram.storage.files import put
from engram.storage.folders import pinned_folder, whole_folder
from engram.storage.manifest import verify
from engram.storage.partial import partial_folder

FORMATS = ("engram", "demo", "deepseek-v4.1", "deepseek-v4.1-interleaved", "qwen", "gguf")
_SAMPLE = 256  # rows per table that are compared one by one


@dataclass(frozen=True)
class _Target:
    """Target of `convert`; the fields are its arguments."""

    path: Path
    to: str
    shards: int
    by: str

    def check(self) -> None:
        """Raise ValueError for arguments that do not fit together, FileExistsError if the target exists."""
        if self.to not in FORMATS:
            raise ValueError(f"unknown format {self.to!r}: expected one of {', '.join(FORMATS)}")
        if self.by not in ("row", "head") or self.shards < 1:
            raise ValueError(f'shards is >= 1 and by is "row" or "head", not {self.shards} and {self.by!r}')
        if self.shards > 1 and self.to not in ("deepseek-v4.1", "deepseek-v4.1-interleaved", "qwen"):
            raise ValueError(f"{self.to} has no shards")
        if self.path.exists():
            raise FileExistsError(f"{self.path} exists: convert writes a new one")


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
    """Write the memory at `source` as `target` in another format. The target appears complete and verified, or not at
    all.

    Args:
        source: a saved memory; safetensors of a dialect, a file or a folder; or a GGUF file.
        target: a folder, or with "gguf" a file, that does not exist.
        to: one of FORMATS. A memory whose rules the format cannot express is refused.
        config: if the source has no config.json. token_map: that of the model's tokenizer; "engram" and "gguf" need it.
        shards: tensor-parallel ranks of "deepseek-v4.1", or parts of the table of "qwen".
        by: "row", ranks hold equally many rows; or "head", each rank holds complete columns (order-major).
        on_bytes: called with (bytes done, bytes of all), for a progress bar.

    Returns:
        {"target", "to", "rows", "bytes", "max_error", "lossless", "untrained"}. max_error: the largest difference
        between a value and the value stored for it, 0.0 if nothing was rounded. untrained: True if the source has only
        tables (GGUF), so that the fusion weights are those of a new memory and add nothing to the hidden state.

    Raises:
        ValueError: what is wrong with which tensor. FileExistsError: the target exists. OSError: the disk is full, or
        it returns other bytes than were written.

    Example:
        >>> import engram, tempfile
        >>> config = engram.EngramConfig(layers=(0,), orders=(2,), heads=2, head_dim=4, rows_per_head=50)
        >>> memory = engram.EngramMemory(config, engram.TokenMap.identity(20), hidden_size=8)
        >>> folder = tempfile.mkdtemp()
        >>> source = memory.save(folder + "/memory")
        >>> report = engram.convert(source, folder + "/memory.gguf", "gguf")
        >>> report["rows"], report["lossless"]
        ({0: 112}, True)
        >>> engram.inspect_file(folder + "/memory.gguf")["kind"]
        'gguf'
    """
    wanted = _Target(Path(target), to, shards, by)
    with pinned_folder(source) as pinned:  # so that all of it is one memory, even if a writer replaces it meanwhile
        return _convert(pinned, wanted, config, token_map, on_bytes)


def _convert(
    path: Path,
    target: _Target,
    config: EngramConfig | None,
    token_map: TokenMap | None,
    on_bytes: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    """Convert the memory at `path`, a pinned path; see `convert`."""
    target.check()
    source = open_source(path, config, token_map)
    _check_source(source, path, target.to)
    recoders = {layer: Recoder(rows, _target_codec(target.to, rows)) for layer, rows in source.rows.items()}
    total = sum(recoder.rows.bytes_as(recoder.codec) for recoder in recoders.values())
    target.path.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(target.path.parent).free) < total:
        raise OSError(errno.ENOSPC, f"no room for {target.path}: its tables take {total:,} bytes, {free:,} are free")
    done = 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        if on_bytes:
            on_bytes(min(done, 2 * total), 2 * total)  # written once, read back once

    _write(source, recoders, target, step)
    error = max(recoder.error for recoder in recoders.values())
    return {
        "target": str(target.path),
        "to": target.to,
        "rows": {layer: rows.rows for layer, rows in source.rows.items()},
        "bytes": total,
        "max_error": error,
        "lossless": error == 0.0,
        "untrained": target.to == "engram" and not source.weights,
    }


def _check_source(source: Source, path: Path, to: str) -> None:
    """Raise ValueError if the source is damaged, or lacks what the format `to` needs, or follows other rules."""
    if source.kind == "engram":  # opening it checked some blocks; the copy gets new digests, so check all of them
        for result in verify(path):
            if result["problem"]:
                raise ValueError(result["problem"])
    if to != "gguf" and not source.weights:
        if to != "engram":
            raise ValueError(f"{path} holds only the tables of a memory: {to} needs its other weights too")
        if not source.hidden_size:
            raise ValueError(f"{path} does not give the model's hidden size, which a memory needs")
    if to not in ("engram", "gguf"):
        check_dialect(source.config, to.removesuffix("-interleaved"))
    if to == "qwen" and source.token_map is not None:
        vocabulary = len(source.token_map.table)
        if source.token_map.digest != TokenMap.identity(vocabulary).digest:
            raise ValueError(
                f"{path} hashes the ids that its token map gives, and Qwen4-Exp hashes the ids themselves: it would "
                f"read other rows. Only a memory that was trained with TokenMap.identity can be written as qwen"
            )
    if to in ("engram", "gguf") and source.token_map is None:
        raise ValueError(f"{path} comes without its tokenizer: give token_map (--tokenizer), which addresses need")


def _target_codec(to: str, rows: Rows) -> str:
    """Return the codec of rows in a format: their own if the format can hold it, else the one they are rounded to."""
    if to == "demo":
        return "float32"
    if to.startswith("deepseek"):
        return "fp8"
    return "bfloat16" if rows.kept == "fp8" and to == "qwen" else rows.kept


def _write(source: Source, recoders: dict[int, Recoder], target: _Target, step: Step) -> None:
    """Write the target, completely or not at all, and compare it with the source through its own reader."""
    if target.to == "gguf":
        with partial_folder(target.path) as partial:
            file = partial / target.path.name
            write_gguf(source, recoders, file, step)
            _compare(source, recoders, open_source(file))
            put(file, target.path)
        return
    with whole_folder(target.path, overwrite=False) as home:
        if target.to == "engram":
            write_engram(source, recoders, home / "memory", step)
            for file in (home / "memory").iterdir():
                os.replace(file, home / file.name)
            (home / "memory").rmdir()
        else:
            write_safetensors(source, recoders, home, target.to, target.shards, target.by, step)
        _compare(source, recoders, open_source(home))


def _compare(source: Source, recoders: dict[int, Recoder], written: Source) -> None:
    """Compare random rows and all dense weights with the source. Raise OSError for the first that differs."""
    generator = torch.Generator().manual_seed(0)
    for layer, recoder in recoders.items():
        rows = source.rows[layer].rows
        picked = torch.randint(0, rows, (min(_SAMPLE, rows),), generator=generator, device="cpu").tolist()
        for row in {0, rows - 1, *picked}:
            if not torch.equal(recoder.read(row, row + 1), written.rows[layer].read(row, row + 1)):
                raise OSError(f"row {row:,} of {written.rows[layer].name} does not read back as it was written")
        for name, value in source.weights.get(layer, {}).items():
            copy = written.weights.get(layer, {}).get(name)  # None: a GGUF file has no weights
            if copy is not None and not torch.allclose(value, copy, rtol=0, atol=2e-7 * float(value.abs().max())):
                raise OSError(f"the weights {name} of layer {layer} do not read back as they were written")
