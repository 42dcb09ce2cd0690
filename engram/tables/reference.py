"""The row operations in plain torch: the reference of the tests, and the path of machines without a compiler.

Each function equals its twin in C bit for bit, so sums are written out in the order of the kernels.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

LANES = 16


@cache
def normal_quantiles() -> Tensor:
    """Return float32 [65536]: quantiles of N(0, 1) at (i + 0.5) / 65536, so that 16 random bits pick a normal value."""
    levels = (torch.arange(65536, dtype=torch.float64, device="cpu") + 0.5) / 65536
    return torch.special.ndtri(levels).float().contiguous()


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift int64 right as if it were uint64 (torch shifts arithmetically)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


def splitmix64(x: Tensor) -> Tensor:
    """Apply the splitmix64 finaliser to int64 tensors, wrapping like uint64."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def random_16bit(key: int, ids: Tensor, dim: int) -> Tensor:
    """Return int64 [n, dim] in [0, 65536): the bits that row ids[n] draws under `key`."""
    row_key = splitmix64(splitmix64(ids) ^ _signed(key))[:, None]
    column = torch.arange(dim, device="cpu")
    return (splitmix64(row_key + (column >> 2)) >> (16 * (column & 3))) & 0xFFFF


def init_rows(ids: Tensor, dim: int, seed: int, std: float, dtype: torch.dtype) -> Tensor:
    """Return float32 [n, dim]: the initial values of rows of a normal table."""
    values = normal_quantiles()[random_16bit(seed, ids, dim)] * torch.tensor(std, dtype=torch.float32, device="cpu")
    if dtype == torch.bfloat16:
        values = round_bfloat16(values, torch.tensor(0x8000, device="cpu")).float()
    return values


def round_bfloat16(x: Tensor, noise: Tensor) -> Tensor:
    """Round float32 to bfloat16 with `noise` added below the kept bits: random in [0, 65536) rounds stochastically."""
    bits = x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    kept = ((bits + noise) >> 16) & 0xFFFF
    special = (bits & 0x7F800000) == 0x7F800000
    kept = torch.where(special, (bits >> 16) | torch.where((bits & 0x7FFFFF) != 0, 0x40, 0), kept)
    return kept.to(torch.uint16).view(torch.bfloat16)


def read(stored: Tensor, ids: Tensor, normal: bool, seed: int, std: float) -> Tensor:
    """Return float32 [n, dim]: rows ids[n] of `stored` [rows, dim]; unwritten rows of a normal table read as init."""
    raw = stored.index_select(0, ids)
    out = raw.float()
    if normal:
        bits = raw.view(torch.int32 if raw.dtype == torch.float32 else torch.int16)
        fresh = (bits == 0).all(dim=1)
        if fresh.any():
            out[fresh] = init_rows(ids[fresh], stored.shape[1], seed, std, stored.dtype)
    return out


def write(stored: Tensor, ids: Tensor, values: Tensor, normal: bool, salt: int | None = None) -> None:
    """Store values (float32) as stored[ids], rounded to the table's dtype; `salt` seeds stochastic rounding."""
    if stored.dtype == torch.bfloat16:
        if salt is not None:
            noise = random_16bit(salt, ids, stored.shape[1])
        else:
            noise = 0x7FFF + ((values.contiguous().view(torch.int32).to(torch.int64) >> 16) & 1)
        values = round_bfloat16(values.contiguous(), noise)
    if normal:
        bits = values.contiguous().view(torch.int32 if values.dtype == torch.float32 else torch.int16)
        values = values.clone()
        values[(bits == 0).all(dim=1), 0] = -0.0
    stored.index_copy_(0, ids, values)


def group(ids: Tensor, grad: Tensor, in_order: bool = False) -> tuple[Tensor, Tensor]:
    """Return distinct row ids [U] and their summed gradients [U, dim]; duplicates are added in their order.

    in_order: True for the order of first appearance, as in the kernel, for optimizers whose result depends on it.
    """
    unique, which = torch.unique(ids, return_inverse=True)
    if unique.numel() == ids.numel():
        return ids, grad
    positions = torch.arange(ids.numel(), device="cpu")
    first = torch.full((unique.numel(),), ids.numel(), device="cpu").scatter_reduce_(0, which, positions, "amin")
    summed = grad[first]
    for i in torch.nonzero(first[which] != positions).flatten().tolist():
        summed[which[i]] += grad[i]
    if in_order:
        appearance = first.argsort()
        return unique[appearance], summed[appearance]
    return unique, summed


def _sum_lanes(x: Tensor) -> Tensor:
    """Return float32 [n]: row sums of x [n, dim], over 16 lanes and then by halves."""
    lanes = torch.zeros(len(x), LANES, device="cpu")
    for part in torch.nn.functional.pad(x, (0, -x.shape[1] % LANES)).split(LANES, dim=1):
        lanes = lanes + part
    half = LANES // 2
    while half:
        lanes = lanes[:, :half] + lanes[:, half : 2 * half]
        half //= 2
    return lanes[:, 0]


def mean_square(x: Tensor) -> Tensor:
    """Return float32 [n]: mean of x[n, dim]**2, summed over 16 lanes and then by halves."""
    return _sum_lanes(x * x) / torch.tensor(float(x.shape[1]), device="cpu")


def row_factor(x: Tensor, weight: Tensor) -> Tensor:
    """Return float32 [n]: 1 / sum of x[n, dim]**2 weight[dim]; 0 where the sum is 0."""
    total = _sum_lanes(x * x * weight)
    return torch.where(total > 0, 1 / total, 0.0)


def sum_in_order(x: Tensor) -> Tensor:
    """Return [a, dim]: sum of x [a, b, dim] over b, one after the other."""
    total = torch.zeros(len(x), x.shape[2], device="cpu")
    for part in x.unbind(1):
        total = total + part
    return total


def power(base: float, n: Tensor) -> Tensor:
    """Return float32: base ** n for int64 n >= 0, by squaring in float64."""
    result = torch.ones(n.shape, dtype=torch.float64, device="cpu")
    while (n > 0).any():
        result = torch.where((n & 1).bool(), result * base, result)
        n, base = n >> 1, base * base
    return result.float()


def f32(x: float) -> Tensor:
    """Return a float32 scalar: torch would use a Python float in double precision."""
    return torch.tensor(x, dtype=torch.float32, device="cpu")


def sqrt(x: Tensor) -> Tensor:
    """Return the correctly rounded square root: torch 2.13's differs in the last bit for 1 float32 in 5 on AVX-512."""
    return torch.from_numpy(np.sqrt(x.numpy()))
