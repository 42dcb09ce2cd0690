"""device_of: the torch device that a name on the command line means."""

from __future__ import annotations

import torch


def device_of(name: str) -> torch.device:
    """Return the device of this name ("cuda:1"). Raise ValueError if this machine has none of that name."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):  # an odd name, a build without CUDA, no such card
        cards = torch.cuda.device_count()
        raise ValueError(
            f"no device {name!r} here: torch {torch.__version__} has the CPU and {cards} of cuda"
        ) from None
