"""Speed and memory of `engram convert` beside a copy of the file, and the time to open a large table file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from engram.addressing import TokenMap
from engram.benchmarks.compare import Row
from engram.config import EngramConfig
from engram.integrations.formats.dialects import config_to_hf, layout_of
from engram.integrations.formats.safetensors_io import Writer
from engram.tables import HostTable

_RUN = """
import json, resource, sys, time
from engram.integrations.formats import convert
def peak():  # KiB; getrusage would include the memory of the parent process when it forked
    try:
        lines = open("/proc/self/status").read().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
began = time.perf_counter()
report = convert(sys.argv[1], sys.argv[2], "engram")
seconds = time.perf_counter() - began
print(json.dumps({"seconds": seconds, "bytes": report["bytes"], "kib": peak(), "kib_before": before}))
"""


def bench_convert(gigabytes: float = 2.0, opened: float = 10.0) -> list[Row]:
    """Time the conversion of a synthetic DeepSeek-V4.1 checkpoint of random rows to a saved memory, in another process.

    Args:
        gigabytes: GiB of the table; the temporary folder needs three times that.
        opened: GiB of a sparse table file with a thousand rows, which is opened and read.

    Returns:
        Rows for `engram bench`; bytes are those of the table, which the conversion writes once and reads back once.

    Raises:
        OSError: not enough space for the files.
    """
    with tempfile.TemporaryDirectory(prefix="engram-bench-") as folder:
        home = Path(folder)
        size = _checkpoint(home / "v41", int(gigabytes * 2**30))
        ran = subprocess.run(
            [sys.executable, "-c", _RUN, str(home / "v41"), str(home / "ours")],
            capture_output=True,
            text=True,
            check=True,
        )
        measured = json.loads(ran.stdout)
        shutil.rmtree(home / "ours")
        began = time.perf_counter()
        shutil.copyfile(home / "v41" / "model.safetensors", home / "copy")
        _sync(home / "copy")
        copied = time.perf_counter() - began
        (home / "copy").unlink()
        seconds = _open_large(home / "large", int(opened * 2**30))
    what = f"{gigabytes:g} GiB of DeepSeek-V4.1 rows to our folder, read back and verified"
    return [
        {"what": what, "value": size / measured["seconds"] / 1e6, "unit": "MB/s", "ratio": 1.0},
        {
            "what": "a copy of the same file, synced",
            "value": size / copied / 1e6,
            "unit": "MB/s",
            "ratio": copied / measured["seconds"],
        },
        {
            "what": "peak memory of the conversion's process",
            "value": measured["kib"] / 1024,
            "unit": "MiB",
            "ratio": 1.0,
        },
        {"what": "of it before the conversion", "value": measured["kib_before"] / 1024, "unit": "MiB", "ratio": 1.0},
        {"what": f"opening a table file of {opened:g} GiB", "value": seconds * 1e3, "unit": "ms", "ratio": 1.0},
    ]


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _checkpoint(home: Path, nbytes: int) -> int:
    """Write one layer of random e4m3 rows with the released names, and return the table's bytes."""
    config = EngramConfig.preset("deepseek-v4.1-flash").replace(layers=(1,), compressed_vocab=100)
    config = config.replace(rows_per_head=max(100, nbytes // 264 // config.columns))
    rows, prefix = layout_of(config).rows[1], "layers.1.engram."
    home.mkdir()
    (home / "config.json").write_text(json.dumps(config_to_hf(config, "deepseek-v4.1", 64, 4)))
    TokenMap.identity(100).save(home / "token_map.safetensors")
    specs: dict[str, tuple[str, tuple[int, ...]]] = {
        f"{prefix}embed.weight": ("F8_E4M3", (rows, 256)),
        f"{prefix}embed.scale": ("F8_E8M0", (rows, 8)),
        f"{prefix}wkv.weight": ("BF16", (5 * 64, config.d_mem)),
        f"{prefix}q_weight": ("BF16", (4, 64)),
        f"{prefix}k_weight": ("BF16", (4, 64)),
    }
    writer, step = Writer(home / "model.safetensors", specs, {}), 1 << 17
    for first in range(0, rows, step):
        n = min(step, rows - first)
        bits = torch.randint(0, 256, (n, 256), dtype=torch.uint8)
        writer.append(f"{prefix}embed.weight", torch.where(bits % 128 == 127, bits - 1, bits))
        writer.append(f"{prefix}embed.scale", torch.randint(100, 150, (n, 8), dtype=torch.uint8))
    for name in list(specs)[2:]:
        writer.append(name, torch.ones(specs[name][1], dtype=torch.bfloat16))
    writer.close()
    return rows * 264


def _open_large(path: Path, nbytes: int) -> float:
    """Return the seconds to open a file of that size. Raise RuntimeError if a thousand random rows do not read as
    written."""
    dim, count = 256, 1000
    rows = nbytes // (dim * 4)
    ids = torch.randperm(rows)[:count]
    values = torch.randn(count, dim)
    with open(path, "wb") as file:
        file.truncate(rows * dim * 4)
        for row, value in zip(ids.tolist(), values, strict=True):
            file.seek(row * dim * 4)
            file.write(value.numpy().tobytes())
    began = time.perf_counter()
    table = HostTable(rows, dim, path=path, mode="r")
    seconds = time.perf_counter() - began
    try:
        if not torch.equal(table.gather(ids), values):
            raise RuntimeError("rows of the large file were not read as they were written")
    finally:
        table.close()
    return seconds
