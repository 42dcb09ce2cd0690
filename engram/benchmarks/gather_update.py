"""Speed of gathers and row updates, beside torch's own operations and the ceiling of this machine's memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engram.benchmarks.compare import AFTER_REST, SITUATIONS, Row, as_bandwidth, compare
from engram.storage import limits
from engram.tables import HostTable, RowAdagrad, RowAdam, RowRMS, RowSinkhorn, kernels

SEQUENTIAL = "sequential read"


def _affordable(nbytes: int, copies: int) -> int:
    """Return `nbytes`, halved until `copies` tables of this size fit in three quarters of the free memory."""
    free = limits.free_memory() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    while nbytes > 1 << 26 and copies * nbytes > free * 3 // 4:
        nbytes //= 2
    return nbytes


def _in_turn(items: list[Any]) -> Iterator[Any]:
    while True:
        yield from items


def bench_lookup() -> list[Row]:
    """Time gathers of 131,072 random rows of 64, 256 and 1,024 B from 2 GiB into a reused buffer, in each situation."""
    nbytes = _affordable(2 << 30, 1)
    return [row for width in (64, 256, 1024) for row in lookup(nbytes, width, situations=SITUATIONS)]


def lookup(nbytes: int, width: int, rounds: int = 21, situations: Sequence[str] = (AFTER_REST,)) -> list[Row]:
    """Time gathers of 131,072 random rows of `width` bytes out of a table of `nbytes`, beside torch's operations."""
    n, rows, dim = 131_072, nbytes // width, width // 4
    table, rng = HostTable(rows, dim), np.random.default_rng(0)
    table.tensor.fill_(1.0)  # touches every page, so that no page faults are measured
    draws = _in_turn([torch.from_numpy(rng.integers(0, rows, n)) for _ in range(8)])
    out, bags, part = torch.zeros(n, dim), torch.arange(n), table.tensor[: rows // 8]
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
        arms[SEQUENTIAL] = lambda: read_words(part)
    measured = compare(arms, n / 1e6, "Mrows/s", rounds, False, ceiling if ceiling in arms else None, situations)
    as_bandwidth(measured, SEQUENTIAL, part.nbytes, n * width)
    huge = "" if table.info()["huge_pages"] else " (no huge pages)"
    separator = ", " if len(situations) > 1 else ": "
    table.close()
    return [{**row, "what": f"{width} B{huge}{separator}{row['what']}"} for row in measured]


def _copy_rows(table: HostTable, ids: Tensor, out: Tensor) -> None:
    """Copy rows as fast as this machine can: one call per thread, without checks, only prefetch and copy."""
    addresses = table.tensor.data_ptr(), ids.data_ptr(), out.data_ptr()
    _halves(len(ids), kernels.Call("copy_rows", *addresses, table.dim * 4))


def read_words(memory: Tensor) -> None:
    """Read a contiguous tensor once, in order."""
    _halves(memory.nbytes // 8, kernels.Call("read_words", memory.data_ptr()))


def _halves(n: int, work: kernels.Call) -> None:
    """Run `work` on one piece per core, on the kernels' own threads."""
    kernels.spread(n, -(-n // kernels.threads()), work)


def _fbgemm(table: HostTable) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return fbgemm's table over the same memory, whose backward pass updates the rows; None if it is not installed."""
    try:
        from fbgemm_gpu import split_table_batched_embeddings_ops_training as training
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    except (ImportError, OSError):  # not installed, or built for another torch
        return None
    on_host = EmbeddingLocation.HOST, training.ComputeDevice.CPU
    bags = training.SplitTableBatchedEmbeddingBagsCodegen(
        [(table.rows, table.dim, *on_host)],
        optimizer=training.OptimType.EXACT_ROWWISE_ADAGRAD,
        device=torch.device("cpu"),
    )
    bags.weights_host.data = table.tensor.view(-1)
    return bags


def _read_and_write(table: HostTable, state: HostTable, ids: Tensor, grad: Tensor) -> None:
    """Read every byte that a row-wise update must touch, and write those of rows and state, with prefetches and nothing
    else: the ceiling of an update. `ids` are distinct and read in their order."""
    addresses = table.tensor.data_ptr(), state.tensor.data_ptr(), ids.data_ptr(), grad.data_ptr()
    _halves(len(ids), kernels.Call("touch_rows", *addresses, table.dim))


def bench_update(nbytes: int = 4 << 30, rounds: int = 15) -> list[Row]:
    """Time updates of 32,768 distinct random rows of 256 bytes in a table of `nbytes`, less if memory is short, in each
    situation.

    All optimizers train the same table and share their moments, so that three times the table is enough.
    """
    dim, n = 64, 32_768
    rows = max(_affordable(nbytes, 3) // (4 * dim), n)
    rng = np.random.default_rng(0)
    draws = _in_turn([torch.from_numpy(rng.choice(rows, n, replace=False)) for _ in range(8)])
    grad, table = torch.randn(n, dim) * 1e-3, HostTable(rows, dim)
    rms, adagrad, adam, sinkhorn = (kind(table) for kind in (RowRMS, RowAdagrad, RowAdam, RowSinkhorn))
    halves = adam.state["moments"].tensor.view(2, rows, dim)  # the same memory as two tables of moments
    sinkhorn.state["m"] = SimpleNamespace(tensor=halves[0], path=None)  # type: ignore[assignment]
    for each in (table, *(state for o in (rms, adagrad, adam) for state in o.state.values())):
        each.tensor.fill_(0.5)  # touches every page, so that no page faults are measured
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
        "torch index_add_, without state": lambda: table.tensor.index_add_(0, next(draws), grad, alpha=-1e-3),
        "torch SparseAdam": lambda: stock(sparse),
        "torch SGD, sparse gradient": lambda: stock(sgd),
        f"torch Adam, dense, a table of {len(small):,} rows": dense.step,
    }
    if (lookup := _fbgemm(table)) is not None:
        bags = torch.arange(n + 1)
        arms["fbgemm row-wise Adagrad"] = (lambda: lookup(next(draws), bags), lambda out: out.backward(grad))
    ceiling = "ceiling: C loop over rows, state and gradient"
    part = table.tensor[: rows // 16]
    if kernels.native is not None:
        state = rms.state["v"]
        arms[ceiling] = lambda: _read_and_write(table, state, next(draws), grad)
        arms[SEQUENTIAL] = lambda: read_words(part)
    measured = compare(arms, n / 1e6, "Mrows/s", rounds, False, ceiling if ceiling in arms else None, SITUATIONS)
    as_bandwidth(measured, SEQUENTIAL, part.nbytes, n * (3 * 4 * dim + 8))  # gradient, row and state read, two written
    for row in measured:
        of_adam = next(r for r in measured if r["situation"] == row["situation"] and r["what"].endswith("SparseAdam"))
        row["of_sparse_adam"] = of_adam["seconds"] / row["seconds"]
        row["table_bytes"] = table.nbytes
    return measured
