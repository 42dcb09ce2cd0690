"""Token ids -> row ids. No parameters, no storage, no model: deterministic, so it can run ahead of the forward pass."""

from .hasher import NgramHasher
from .layout import HashLayout
from .token_map import TokenMap

__all__ = ["HashLayout", "NgramHasher", "TokenMap"]
