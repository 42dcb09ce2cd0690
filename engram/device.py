"""The torch device of a name, as the command line and the functions take it."""

from __future__ import annotations

import torch


def device_of(name: str) -> torch.device:
    """Return the device of this name ("cuda:1"). Raise ValueError if this machine has no such device."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):  # an odd name, a build without CUDA, no such card
        cards = torch.cuda.device_count()
        raise ValueError(
            f"this machine has no device {name!r}: torch {torch.__version__} reports the CPU and {cards} CUDA devices"
        ) from None
