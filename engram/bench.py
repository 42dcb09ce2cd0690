"""How fast, beside what, on this machine: every figure is a median, and every ratio comes from one interleaved run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from engram.addressing import HashLayout, NgramHasher, TokenMap
from engram.bench_disk import bench_disk
from engram.config import EngramConfig
from engram.lm.train import train_step, tune_allocator
from engram.lm.transformer import Transformer, TransformerConfig
from engram.memory import EngramMemory
from engram.optimizer import build_optimizer
from engram.tables import HostTable, RowAdam, RowRMS

Row = dict[str, Any]  # {"what", "value", "unit", "ratio"}; ratio: ours over this line (> 1: ours is faster)


def bench(names: Sequence[str] = ("hash", "lookup", "update", "step")) -> dict[str, list[Row]]:
    """Runs the named benchmarks.

    Args:
        names: out of "hash", "lookup", "update", "step", "disk" (writes a file of 4 GiB in the temporary folder).

    Returns:
        {name: rows}; the first row is ours, each further one a stock alternative measured in turn with it. "value" is a
        median, "ratio" the median over the rounds of (alternative time / our time): above 1, ours is faster.

    Raises:
        ValueError: an unknown name.
    """
    unknown = [name for name in names if name not in _BENCHES]
    if unknown:
        raise ValueError(f"unknown benchmark {', '.join(unknown)}; there are {', '.join(_BENCHES)}")
    tune_allocator()
    return {name: _BENCHES[name]() for name in names}


def _compare(
    arms: dict[str, Callable[[], Any]], per_round: float, unit: str, rounds: int, times: bool = False
) -> list[Row]:
    """Times the arms in turn, round after round. value = per_round / seconds, or seconds / per_round if `times`."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for round_number in range(rounds + 2):
        for name, work in arms.items():
            began = time.perf_counter()
            work()
            if round_number >= 2:  # the first two warm up
                seconds[name].append(time.perf_counter() - began)
    ours = np.array(next(iter(seconds.values())))
    rows = []
    for name, spent in seconds.items():
        middle = float(np.median(spent))
        value = middle / per_round if times else per_round / middle
        rows.append({"what": name, "value": value, "unit": unit, "ratio": float(np.median(np.array(spent) / ours))})
    return rows


def transcription(ids: np.ndarray, layout: HashLayout, table: np.ndarray) -> dict[int, np.ndarray]:
    """The hash as the paper's demo writes it, in plain NumPy: what ours is compared with. ids [B, T]."""
    x = table[ids]
    T = x.shape[1]
    out = {}
    for layer in layout.layers:
        multipliers = layout.multipliers[layer]
        shifted = [np.pad(x, ((0, 0), (k, 0)), constant_values=layout.pad_id)[:, :T] for k in range(layout.orders[-1])]
        columns = []
        for n, moduli in zip(layout.orders, layout.moduli[layer], strict=True):
            mix = shifted[0] * multipliers[0]
            for k in range(1, n):
                mix = np.bitwise_xor(mix, shifted[k] * multipliers[k])
            columns += [mix % p for p in moduli]
        out[layer] = np.stack(columns, axis=2) + np.array(layout.offsets[layer])
    return out


def _torch_hash(ids: torch.Tensor, layout: HashLayout, table: torch.Tensor) -> dict[int, torch.Tensor]:
    """The same in torch operations, all heads of an order at once."""
    x = table[ids]
    T, N = x.shape[1], layout.orders[-1]
    padded = torch.nn.functional.pad(x, (N - 1, 0), value=layout.pad_id)
    out = {}
    for layer in layout.layers:
        mix, columns = padded[:, N - 1 :] * layout.multipliers[layer][0], []
        done = 1
        for n, moduli in zip(layout.orders, layout.moduli[layer], strict=True):
            for k in range(done, n):
                mix = mix ^ (padded[:, N - 1 - k : N - 1 - k + T] * layout.multipliers[layer][k])
            done = n
            columns.append(torch.remainder(mix.unsqueeze(-1), torch.tensor(moduli)))
        out[layer] = torch.cat(columns, dim=-1) + torch.tensor(layout.offsets[layer])
    return out


def _bench_hash() -> list[Row]:
    B, T = 32, 512
    layout = HashLayout.build(98_627, (1, 15), (2, 3), 8, 646_400, pad_id=2)
    hasher = NgramHasher(layout, TokenMap.identity(98_627))
    ids = np.random.default_rng(0).integers(0, 98_627, (B, T))
    tensor, table = torch.from_numpy(ids), np.arange(98_627)
    torch_table = torch.from_numpy(table)
    ours, theirs = hasher(ids), transcription(ids, layout, table)
    for layer in layout.layers:
        assert np.array_equal(ours[layer], theirs[layer]), "the benchmark compares two different functions"
    return _compare(
        {
            "engram": lambda: hasher(ids),
            "NumPy transcription": lambda: transcription(ids, layout, table),
            "torch operations": lambda: _torch_hash(tensor, layout, torch_table),
        },
        per_round=B * T / 1e6,
        unit="us/token",
        rounds=25,
        times=True,
    )


def _bench_lookup() -> list[Row]:
    rows, dim, n = 2**23, 32, 131_072  # 1 GiB of 128-byte rows
    table = HostTable(rows, dim)
    table.tensor.fill_(1.0)
    rng, out = np.random.default_rng(0), torch.empty(n, dim)
    draws = [torch.from_numpy(rng.integers(0, rows, n)) for _ in range(8)]
    turn = iter(range(1 << 30))
    return _compare(
        {
            "engram gather(out=)": lambda: table.gather(draws[next(turn) % 8], out),
            "index_select(out=)": lambda: torch.index_select(table.tensor, 0, draws[next(turn) % 8], out=out),
            "F.embedding": lambda: torch.nn.functional.embedding(draws[next(turn) % 8], table.tensor),
            "indexing": lambda: table.tensor[draws[next(turn) % 8]],
        },
        per_round=n / 1e6,
        unit="Mrows/s",
        rounds=15,
    )


def _bench_update() -> list[Row]:
    rows, dim, n = 2**21, 64, 32_768  # 512 MiB of 256-byte rows
    rng = np.random.default_rng(0)
    draws = [torch.from_numpy(rng.choice(rows, n, replace=False)) for _ in range(8)]
    grad, turn = torch.randn(n, dim) * 1e-3, iter(range(1 << 30))
    rms, adam = RowRMS(HostTable(rows, dim)), RowAdam(HostTable(rows, dim))
    weight = torch.nn.Parameter(torch.zeros(rows, dim))
    sparse = torch.optim.SparseAdam([weight], lr=1e-3)
    for table in (rms.table, adam.table, adam.state["m"], adam.state["v"]):
        table.tensor.fill_(0.5)  # every page is there: no page faults in the measurement

    def sparse_adam() -> None:
        ids = draws[next(turn) % 8][None]
        weight.grad = torch.sparse_coo_tensor(ids, grad, weight.shape, check_invariants=False)
        sparse.step()

    return _compare(
        {
            "engram RowRMS": lambda: rms.step(draws[next(turn) % 8], grad),
            "engram RowAdam": lambda: adam.step(draws[next(turn) % 8], grad),
            "torch SparseAdam": sparse_adam,
        },
        per_round=n / 1e6,
        unit="Mrows/s",
        rounds=9,
    )


def _bench_step() -> list[Row]:
    config = TransformerConfig(vocab_size=4096)
    memory_config = EngramConfig(layers=(1,), orders=(2, 3), heads=4, head_dim=32, rows_per_head=65_536)
    B, T = 8, 256
    ids = torch.from_numpy(np.minimum(np.random.default_rng(0).zipf(1.2, (64, B, T + 1)) - 1, 4095))
    documents = torch.zeros(B, T, dtype=torch.int64)
    arms = {}
    for name in ("with engram", "plain"):
        memory = EngramMemory(memory_config, TokenMap.identity(4096), 128) if name == "with engram" else None
        torch.manual_seed(0)
        model = Transformer(config, memory)
        optimizer, turn = build_optimizer(model), iter(range(1 << 30))

        def step(model=model, optimizer=optimizer, turn=turn) -> None:  # type: ignore[no-untyped-def]
            text = ids[next(turn) % 64]
            float(train_step(model, optimizer, (text[:, :-1], text[:, 1:], documents), 1.0))

        arms[name] = step
    rows = _compare(arms, per_round=1e-3, unit="ms/step", rounds=25, times=True)
    return rows


_BENCHES: dict[str, Callable[[], list[Row]]] = {
    "hash": _bench_hash,
    "lookup": _bench_lookup,
    "update": _bench_update,
    "step": _bench_step,
    "disk": bench_disk,
}
