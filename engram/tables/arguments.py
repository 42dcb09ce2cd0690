"""Checks of the row ids and buffers that callers pass to tables."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def as_ids(row_ids: Tensor | np.ndarray) -> Tensor:
    """Return row ids as a contiguous int64 CPU tensor, not checked against any table.

    Raises:
        TypeError: neither a tensor nor a NumPy array, or not int64.
    """
    if not isinstance(row_ids, (Tensor, np.ndarray)):
        raise TypeError(f"row ids must be a tensor or a NumPy array of int64, not {type(row_ids).__name__}")
    ids = torch.from_numpy(row_ids) if isinstance(row_ids, np.ndarray) else row_ids
    if ids.dtype != torch.int64:
        raise TypeError(f"row ids must be int64, not {ids.dtype}")
    return ids.contiguous() if ids.device.type == "cpu" else ids.cpu().contiguous()


def as_output(out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a buffer for rows: `out`, after a check that it fits (in `dtype` or float32), or a new one of `dtype`."""
    if out is None:
        return torch.empty(shape, dtype=dtype, device="cpu")
    if tuple(out.shape) != shape or not out.is_contiguous() or out.device.type != "cpu":
        raise ValueError(f"out must be a contiguous CPU tensor of shape {shape}, not {tuple(out.shape)}")
    if out.dtype not in (dtype, torch.float32):
        allowed = "torch.float32" if dtype == torch.float32 else f"{dtype} or torch.float32"
        raise ValueError(f"out must be {allowed}, not {out.dtype}")
    return out
