"""Speed of rows from a mapped file, cold and warm: page faults, readahead, pread and the disk's ceiling, in one run."""

from __future__ import annotations

import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engram.benchmarks.compare import Row
from engram.storage import readahead
from engram.tables import HostTable

_DIM, _ROW = 64, 256  # float32: rows of 256 B, sixteen to a page
_THREADS = 32  # of pread


def bench_disk(gigabytes: float = 4.0, rows_per_gather: int = 4096, rounds: int = 5) -> list[Row]:
    """Time gathers of random rows of 256 B from a file of random bytes in the folder for temporary files.

    Cold means that the file was removed from the system's page cache before every gather. A cache below the system (of
    a virtual machine's host, or in the disk) may still have it, which the sequential ceiling of the same run shows.

    Returns:
        The arms, medians over the rounds; the first one is engram's. "ratio" is time / time of the first. The last row
        is the time that the prefetched pages (4 KiB or more per row) would take at the speed of a sequential read.

    Raises:
        OSError: not enough space for the file.
    """
    rows = int(gigabytes * 2**30) // _ROW
    with tempfile.TemporaryDirectory(prefix="engram-bench-") as folder:
        path = Path(folder) / "rows"
        table = HostTable(rows, _DIM, path=path)
        try:
            rng, out = np.random.default_rng(0), torch.empty(rows_per_gather, _DIM)
            values, step = table.tensor.view(torch.uint8).flatten(), 64 << 20
            for start in range(0, table.nbytes, step):
                piece = min(step, table.nbytes - start)
                values[start : start + piece] = torch.from_numpy(rng.integers(0, 256, piece, dtype=np.uint8))
                table.flush()  # after each piece, so that dirty pages do not pile up
            del values  # a view would keep the file mapped
            table.close()
            table = HostTable(rows, _DIM, path=path, mode="r")
            return _measure(table, path, rng, out, rounds)
        finally:
            table.close()


def _measure(table: HostTable, path: Path, rng: np.random.Generator, out: torch.Tensor, rounds: int) -> list[Row]:
    """Time every arm in each round. The first round warms up code and threads and is not counted."""
    file, buffer = os.open(path, os.O_RDONLY), bytearray(8 << 20)
    with ThreadPoolExecutor(_THREADS) as pool:
        arms = _arms(table, file, out, pool)
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        page_bytes, sequential = [], []
        for round_number in range(rounds + 1):
            ids = torch.from_numpy(rng.integers(0, table.rows, len(out)))
            for name, (cold, work) in arms.items():
                if cold:
                    table.drop()
                    _evict(file)
                else:
                    table.gather(ids, out)
                began = time.perf_counter()
                work(ids)
                if round_number:
                    seconds[name].append(time.perf_counter() - began)
            page_bytes.append(int(readahead.page_ranges(ids.numpy(), _ROW, table.nbytes)[:, 1].sum()))
            table.drop()
            _evict(file)
            size, began = min(table.nbytes, 1 << 30), time.perf_counter()
            for start in range(0, size, len(buffer)):
                os.preadv(file, [buffer], start)
            sequential.append(size / (time.perf_counter() - began))
    os.close(file)
    return _lines(seconds, len(out), float(np.median(page_bytes)), float(np.median(sequential)))


def _arms(table: HostTable, file: int, out: torch.Tensor, pool: ThreadPoolExecutor) -> dict[str, tuple[bool, Any]]:
    """Return {name: (cold, function of row ids that gathers them into `out`)}."""
    target = out.view(-1).numpy().view(np.uint8).data

    def read(ids: np.ndarray, first: int) -> None:
        for i, offset in enumerate((ids * _ROW).tolist(), first):
            os.preadv(file, [target[i * _ROW : (i + 1) * _ROW]], offset)

    def pread(ids: torch.Tensor) -> None:
        pieces = np.array_split(ids.numpy(), _THREADS)
        starts = np.cumsum([0, *map(len, pieces)])
        list(pool.map(read, pieces, starts.tolist()))

    def prefetched(ids: torch.Tensor) -> None:
        table.prefetch(ids)
        table.gather(ids, out)

    def with_read_around(ids: torch.Tensor) -> None:
        address = table.tensor.data_ptr()
        readahead.advise(address, table.nbytes, readahead.NORMAL)
        table.gather(ids, out)
        readahead.advise(address, table.nbytes, readahead.RANDOM)

    return {
        "cold, prefetch + gather": (True, prefetched),
        "cold, gather alone (page faults)": (True, lambda ids: table.gather(ids, out)),
        "cold, gather with the system's read-around": (True, with_read_around),
        f"cold, pread on {_THREADS} threads": (True, pread),
        "warm, gather": (False, lambda ids: table.gather(ids, out)),
        "warm, prefetch + gather": (False, prefetched),
        f"warm, pread on {_THREADS} threads": (False, pread),
    }


def _lines(seconds: dict[str, list[float]], rows: int, page_bytes: float, speed: float) -> list[Row]:
    """Return the lines of the report. page_bytes: of the pages of one gather; speed: bytes per second of a sequential
    read."""
    ours = np.array(seconds["cold, prefetch + gather"])
    lines: list[Row] = []
    for name, spent in seconds.items():
        ratio = float(np.median(np.array(spent) / ours))
        lines.append({"what": name, "value": rows / float(np.median(spent)) / 1e3, "unit": "krows/s", "ratio": ratio})
    least = page_bytes / speed
    what = f"ceiling: these pages at the {speed / 1e9:.2f} GB/s of a cold sequential read"
    ratio = least / float(np.median(ours))
    return [*lines, {"what": what, "value": rows / least / 1e3, "unit": "krows/s", "ratio": ratio}]


def _evict(file: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
