"""Rows out of a table and gradients into it, beside torch's own ways and what the memory of this machine allows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engram.benchmarks.compare import Row, compare
from engram.storage import limits
from engram.tables import HostTable, RowAdagrad, RowAdam, RowRMS, RowSinkhorn, kernels


def _affordable(wanted: int, copies: int) -> int:
    """Bytes for a table of which `copies` must fit in three quarters of the free memory: `wanted`, halved as needed."""
    free = limits.free_memory() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    while wanted > 1 << 26 and copies * wanted > free * 3 // 4:
        wanted //= 2
    return wanted


def _in_turn(items: list[Any]) -> Iterator[Any]:
    while True:
        yield from items


def bench_lookup() -> list[Row]:
    """131,072 random rows of 64, 256 and 1,024 B from 2 GiB into a reused buffer; for each width ours comes first."""
    nbytes = _affordable(2 << 30, 1)
    return [row for width in (64, 256, 1024) for row in lookup(nbytes, width)]


def lookup(nbytes: int, width: int, rounds: int = 21) -> list[Row]:
    """131,072 random rows of `width` bytes out of a table of `nbytes`, ours first, beside torch's ways."""
    n, rows, dim = 131_072, nbytes // width, width // 4
    table, rng = HostTable(rows, dim), np.random.default_rng(0)
    table.tensor.fill_(1.0)  # every page is there: no page faults in the measurement
    draws = _in_turn([torch.from_numpy(rng.integers(0, rows, n)) for _ in range(8)])
    out, bags, words = torch.zeros(n, dim), torch.arange(n), nbytes // 8 // 8  # an eighth of the table
    ceiling = "ceiling: C loop, prefetch and copy"
    arms: dict[str, Callable[[], Any]] = {
        "engram gather(out=)": lambda: table.gather(next(draws), out),
        "index_select(out=)": lambda: torch.index_select(table.tensor, 0, next(draws), out=out),
        "F.embedding": lambda: F.embedding(next(draws), table.tensor),
        "F.embedding_bag": lambda: F.embedding_bag(next(draws), table.tensor, bags, mode="sum"),
        "indexing": lambda: table.tensor[next(draws)],
    }
    if kernels.native is not None:
        arms[ceiling] = lambda: _copy_rows(table, next(draws), out)
        arms["sequential read"] = lambda: _read(table, words)
    found = compare(arms, n / 1e6, "Mrows/s", rounds, ceiling=ceiling if ceiling in arms else None)
    if kernels.native is not None:
        sequential = found[-1]
        rate = words * 8 * sequential["value"] / n / 1e3  # its value counts n rows a call
        share = found[0]["value"] * width / 1e3 / rate
        found[-1] = {"what": sequential["what"], "value": rate, "unit": "GB/s", "ratio": share}
    huge = "" if table.info()["huge_pages"] else " (no huge pages)"
    table.close()
    return [{**row, "what": f"{width} B{huge}: {row['what']}"} for row in found]


def _copy_rows(table: HostTable, ids: Tensor, out: Tensor) -> None:
    """The ceiling: one call per thread, no checks, nothing but prefetch and copy."""
    assert kernels.native is not None
    copy = kernels.native.engram_copy_rows
    data, source, target = table.tensor.data_ptr(), ids.data_ptr(), out.data_ptr()
    width = table.dim * 4
    _halves(len(ids), lambda lo, hi: copy(data, source, lo, hi, target, width))


def _read(table: HostTable, words: int) -> None:
    assert kernels.native is not None
    read, data = kernels.native.engram_read_words, table.tensor.data_ptr()
    _halves(words, lambda lo, hi: read(data, lo, hi))


def _halves(n: int, work: Callable[[int, int], None]) -> None:
    """One piece per core, on the kernels' own threads."""
    kernels.spread(n, -(-n // kernels.threads()), work)


def _fbgemm(table: HostTable) -> Callable[[Tensor, Tensor], Tensor] | None:
    """fbgemm's table over the same memory, whose backward pass updates the rows; None where it is not installed."""
    try:
        from fbgemm_gpu import split_table_batched_embeddings_ops_training as training
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    except (ImportError, OSError):  # not installed, or built for another torch
        return None
    place = EmbeddingLocation.HOST, training.ComputeDevice.CPU
    bags = training.SplitTableBatchedEmbeddingBagsCodegen(
        [(table.rows, table.dim, *place)],
        optimizer=training.OptimType.EXACT_ROWWISE_ADAGRAD,
        device=torch.device("cpu"),
    )
    bags.weights_host.data = table.tensor.view(-1)
    return bags


def _read_and_write(table: HostTable, state: HostTable, ids: Tensor, grad: Tensor) -> None:
    """The ceiling of a row-wise update: every byte it must touch is read, and those of rows and state written, with the
    prefetches and nothing else; ids in the order given, none twice."""
    assert kernels.native is not None
    touch, rows, moments = kernels.native.engram_touch_rows, table.tensor.data_ptr(), state.tensor.data_ptr()
    source, gradient = ids.data_ptr(), grad.data_ptr()
    _halves(len(ids), lambda lo, hi: touch(rows, moments, source, lo, hi, gradient, table.dim))


def bench_update(wanted: int = 4 << 30) -> list[Row]:
    """32,768 distinct random rows of 256 bytes, gradients given, in a table of `wanted` bytes, less if memory is short.

    All optimisers train the same table and share their moments, so that three times the table is all that is needed.
    """
    dim, n = 64, 32_768
    rows = max(_affordable(wanted, 3) // (4 * dim), n)
    rng = np.random.default_rng(0)
    draws = _in_turn([torch.from_numpy(rng.choice(rows, n, replace=False)) for _ in range(8)])
    grad, table = torch.randn(n, dim) * 1e-3, HostTable(rows, dim)
    rms, adagrad, adam, sinkhorn = (kind(table) for kind in (RowRMS, RowAdagrad, RowAdam, RowSinkhorn))
    halves = adam.state["moments"].tensor.view(2, rows, dim)  # the same memory as two tables of moments
    sinkhorn.state["m"] = SimpleNamespace(tensor=halves[0], path=None)  # type: ignore[assignment]
    for each in (table, *(state for o in (rms, adagrad, adam) for state in o.state.values())):
        each.tensor.fill_(0.5)  # every page is there: no page faults in the measurement
    sinkhorn.state["last"].tensor.fill_(0.0)
    weight = torch.nn.Parameter(table.tensor)
    sparse, sgd = torch.optim.SparseAdam([weight], lr=1e-3), torch.optim.SGD([weight], lr=1e-3)
    sparse.state[weight] = {"step": 0, "exp_avg": halves[0], "exp_avg_sq": halves[1]}
    small = torch.nn.Parameter(torch.zeros(2**17, dim))
    small.grad = torch.zeros_like(small)
    dense = torch.optim.Adam([small], lr=1e-3, fused=True)

    def stock(optimizer: torch.optim.Optimizer) -> None:
        weight.grad = torch.sparse_coo_tensor(next(draws)[None], grad, weight.shape, check_invariants=False)
        optimizer.step()

    arms: dict[str, Any] = {
        "engram RowRMS": lambda: rms.step(next(draws), grad),
        "engram RowAdagrad": lambda: adagrad.step(next(draws), grad),
        "engram RowAdam": lambda: adam.step(next(draws), grad),
        "engram RowSinkhorn": lambda: sinkhorn.step(next(draws), grad),
        "torch SparseAdam": lambda: stock(sparse),
        "torch SGD, sparse gradient": lambda: stock(sgd),
        f"torch Adam, dense, a table of {len(small):,} rows": dense.step,
    }
    if (lookup := _fbgemm(table)) is not None:
        bags = torch.arange(n + 1)
        arms["fbgemm row-wise Adagrad"] = (lambda: lookup(next(draws), bags), lambda out: out.backward(grad))
    ceiling = "ceiling: C loop over rows, state and gradient"
    if kernels.native is not None:
        state = rms.state["v"]
        arms[ceiling] = lambda: _read_and_write(table, state, next(draws), grad)
    found = compare(arms, n / 1e6, "Mrows/s", rounds=9, ceiling=ceiling if ceiling in arms else None)
    theirs = next(row for row in found if row["what"] == "torch SparseAdam")["value"]
    for row in found:
        row["of_sparse_adam"] = row["value"] / theirs
        row["table_bytes"] = table.nbytes
    return found
