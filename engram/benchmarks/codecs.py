"""Encoding and decoding of rows, beside plain float32 rows and the codecs' torch code."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from engram.benchmarks.compare import Row, compare
from engram.tables import EncodedTable, HostTable, Table
from engram.tables.codecs import PQ, get_codec


def bench_codecs(rows: int = 1 << 20, dim: int = 256, n: int = 32_768, rounds: int = 9) -> list[Row]:
    """Time, per codec, n random rows gathered out of `rows` (decoding) and n rows of `dim` values written (encoding),
    each beside a float32 table. Bytes are counted as float32 on both sides."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    ids, values = torch.from_numpy(rng.choice(rows, n, replace=False)), torch.randn(n, dim, generator=generator)
    out, plain = torch.empty(n, dim), HostTable(rows, dim)
    tables: dict[str, Table] = {}
    for name in ("fp8", "int8", "int4", "pq4"):
        codec = PQ.train(values[:8192], 4) if name == "pq4" else get_codec(name, dim)
        tables[name] = EncodedTable(rows, dim, codec)
    for table in (plain, *tables.values()):
        table.tensor.fill_(0)  # touches every page, so that no page faults are measured
        table.write(ids, values)
    reading: dict[str, Callable[[], Any]] = {"gather float32": partial(plain.gather, ids, out)}
    writing: dict[str, Callable[[], Any]] = {"write float32": partial(plain.write, ids, values)}
    for name, table in tables.items():
        reading[f"gather {name}"] = partial(table.gather, ids, out)
        writing[f"write {name}"] = partial(table.write, ids, values)
    for name in ("fp8", "int8", "int4"):
        writing[f"encode {name} in torch"] = partial(get_codec(name, dim).encode, values)
    size = n * dim * 4 / 1e6
    measured = compare(reading, size, "MB/s", rounds) + compare(writing, size, "MB/s", rounds)
    for table in (plain, *tables.values()):
        table.close()
    return measured
