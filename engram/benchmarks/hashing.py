"""Speed of hashing beside the paper's demo in NumPy and the same computation in torch operations."""

from __future__ import annotations

import numpy as np
import torch

from engram.addressing import HashLayout, NgramHasher, TokenMap
from engram.benchmarks.compare import SITUATIONS, Row, as_bandwidth, compare
from engram.benchmarks.gather_update import SEQUENTIAL, read_words
from engram.tables import kernels


def transcription(ids: np.ndarray, layout: HashLayout, table: np.ndarray) -> dict[int, np.ndarray]:
    """Compute row ids of ids [B, T] as the paper's demo does, in plain NumPy."""
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
    """Compute the same in torch operations, all heads of an order at once."""
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


def bench_hash(rounds: int = 25, rows_per_head: int = 646_400) -> list[Row]:
    """Time the hashing of 32 x 512 tokens for two layers of 16 columns, in each situation."""
    B, T = 32, 512
    layout = HashLayout.build(98_627, (1, 15), (2, 3), 8, rows_per_head, pad_id=2)
    hasher = NgramHasher(layout, TokenMap.identity(98_627))
    ids = np.random.default_rng(0).integers(0, 98_627, (B, T))
    out = np.empty((len(layout.layers), B, T, layout.columns), np.int64)
    tensor, table = torch.from_numpy(ids), np.arange(98_627)
    torch_table, memory = torch.from_numpy(table), torch.ones(2**24)
    row_ids, expected = hasher(ids), transcription(ids, layout, table)
    for layer in layout.layers:
        assert np.array_equal(row_ids[layer], expected[layer]), "the benchmark compares two different functions"
    arms = {
        "engram, into a kept buffer": lambda: hasher(ids, out=out),
        "engram, into fresh memory": lambda: hasher(ids),
        "NumPy transcription": lambda: transcription(ids, layout, table),
        "torch operations": lambda: _torch_hash(tensor, layout, torch_table),
    }
    if kernels.native is not None:
        arms[SEQUENTIAL] = lambda: read_words(memory)
    rows = compare(arms, B * T / 1e6, "us/token", rounds, times=True, situations=SITUATIONS)
    as_bandwidth(rows, SEQUENTIAL, memory.nbytes, out.nbytes)
    return rows
