"""Switches: parts of a memory that add nothing within a `with` block (EngramMemory.off)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engram.config import EngramConfig


@dataclass(frozen=True, eq=False)
class Switch:
    """The parts of one memory that one `with` block turns off: those that all fields select, where None selects all.

    Attributes:
        layers: layer numbers. orders: indices into config.orders, without ngrams.
        ngrams: {layer: row ids [n, C] of n n-grams, -1 at the columns of other orders}.
        positions: int64, positions of the text.
    """

    layers: frozenset[int]
    orders: tuple[int, ...] | None
    ngrams: Mapping[int, Tensor] | None
    positions: Tensor | None

    def at(self, row_ids: Tensor, start: int) -> Tensor | None:
        """Return bool [1, T]: the selected positions of row ids [B, T, C] that begin at position `start` of the text.
        Return None if all are selected."""
        if self.positions is None:
            return None
        return torch.isin(torch.arange(start, start + row_ids.shape[1]), self.positions)[None]

    def columns(self, layer: int, row_ids: Tensor, heads: int) -> Tensor | None:
        """Return bool, broadcast to [B, T, C]: the selected columns. Return None if the whole update is selected."""
        if self.orders is not None:
            column_orders = torch.arange(row_ids.shape[2]) // heads
            return torch.isin(column_orders, torch.tensor(self.orders, dtype=torch.int64))
        if self.ngrams is None:
            return None
        selected = torch.zeros_like(row_ids, dtype=torch.bool)
        for ngram in self.ngrams[layer]:
            own = ngram >= 0
            equal = (row_ids[..., own] == ngram[own]).all(-1)
            selected[..., own] |= equal[..., None]
        return selected


_ACTIVE: ContextVar[tuple[tuple[int, Switch], ...]] = ContextVar("engram switches", default=())


def active(memory: Any) -> tuple[Switch, ...]:
    """Return the switches of a memory in this thread (or asyncio task)."""
    return tuple(switch for owner, switch in _ACTIVE.get() if owner == id(memory))


@contextmanager
def switched(memory: Any, switch: Switch) -> Iterator[None]:
    """Turn a switch of a memory on within a `with` block, in this thread (or asyncio task)."""
    entry = (id(memory), switch)
    _ACTIVE.set((*_ACTIVE.get(), entry))
    try:
        yield
    finally:  # without a token: blocks of generators may end in another order than they began
        _ACTIVE.set(tuple(other for other in _ACTIVE.get() if other is not entry))


def masks(
    switches: Iterable[Switch], layer: int, row_ids: Tensor, start: int, heads: int
) -> tuple[Tensor | None, Tensor | bool | None]:
    """Combine switches for one layer and row ids [B, T, C].

    Returns:
        bool [B, T, C]: columns that read as zeros, or None; and where the update is zero: bool [B, T], True for
        everywhere, None for nowhere.
    """
    columns: Tensor | None = None
    off: Tensor | bool | None = None
    for switch in switches:
        if layer not in switch.layers:
            continue
        at, own = switch.at(row_ids, start), switch.columns(layer, row_ids, heads)
        if own is None and at is None:
            return None, True
        if own is None:
            at = at.expand(row_ids.shape[:2])  # type: ignore[union-attr]
            off = at if off is None else off | at
        else:
            own = own.expand(row_ids.shape) if at is None else (own & at[..., None]).expand(row_ids.shape)
            columns = own if columns is None else columns | own
    return columns, off


def make_switch(
    config: EngramConfig,
    hashed: Callable[[Tensor], Mapping[int, Tensor]],
    layers: Any,
    orders: Any,
    ngrams: Any,
    positions: Any,
) -> Switch:
    """Check the arguments of EngramMemory.off. hashed: returns the row ids of an n-gram as a text [1, n].

    Raises:
        ValueError: unknown layers or orders, n-grams of another length, negative positions. TypeError: arguments of
        another type.
    """
    known = {"layers": config.layers, "orders": config.orders}
    for name, chosen in (("layers", layers), ("orders", orders)):
        if chosen is not None and (unknown := sorted(set(_integers(name, chosen)) - set(known[name]))):
            raise ValueError(f"{name} {unknown} are not in the memory, which has {name} {list(known[name])}")
    chosen_layers = config.layers if layers is None else _integers("layers", layers)
    chosen_orders = config.orders if orders is None else _integers("orders", orders)
    rows = None if ngrams is None else _rows(config, hashed, _ngrams(ngrams, chosen_orders))
    places = None if positions is None else _integers("positions", positions)
    if places and min(places) < 0:
        raise ValueError(f"positions count from the start of the text, 0 or more, not {min(places)}")
    indices = None if orders is None or rows is not None else tuple(map(config.orders.index, chosen_orders))
    return Switch(
        frozenset(chosen_layers), indices, rows, None if places is None else torch.tensor(places, dtype=torch.int64)
    )


def _integers(name: str, values: Any) -> tuple[int, ...]:
    """Return one integer or several as a tuple."""
    if isinstance(values, bool | str | bytes):
        raise TypeError(f"{name} must be an integer or several, not {values!r}")
    if isinstance(values, Tensor) and (values.is_floating_point() or values.dtype == torch.bool or values.dim() > 1):
        raise TypeError(f"{name} must be integers in one dimension, not {values.dtype} of shape {list(values.shape)}")
    try:
        several = [values] if hasattr(values, "__index__") and not getattr(values, "ndim", 0) else list(values)
        if any(isinstance(value, bool) for value in several):
            raise TypeError
        return tuple(map(operator.index, several))
    except TypeError:
        raise TypeError(f"{name} must be an integer or several, not {values!r}") from None


def _ngrams(ngrams: Any, orders: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return n-grams as tuples of token ids, each as long as one of the orders."""
    if isinstance(ngrams, str | bytes) or not isinstance(ngrams, Iterable):
        raise TypeError(f"ngrams must be a list of sequences of token ids, not {ngrams!r}: encode texts first")
    listed = list(ngrams)
    if any(hasattr(ngram, "__index__") and not getattr(ngram, "ndim", 0) for ngram in listed):
        raise TypeError(f"ngrams must be a list of sequences of token ids, not {listed!r}: put one n-gram in a list")
    result = [_integers("the token ids of an n-gram", ngram) for ngram in listed]
    for ngram in result:
        if len(ngram) not in orders:
            raise ValueError(f"the n-gram {list(ngram)} has {len(ngram)} tokens: give n-grams of orders {list(orders)}")
    return result


def _rows(
    config: EngramConfig, hashed: Callable[[Tensor], Mapping[int, Tensor]], ngrams: list[tuple[int, ...]]
) -> dict[int, Tensor]:
    """Return {layer: row ids [n, C]} of n-grams, -1 at the columns of other orders."""
    columns = len(config.orders) * config.heads
    result = {layer: torch.full((len(ngrams), columns), -1) for layer in config.layers}
    for number, ngram in enumerate(ngrams):
        first = config.orders.index(len(ngram)) * config.heads
        own = slice(first, first + config.heads)
        for layer, row_ids in hashed(torch.tensor([ngram])).items():
            result[layer][number, own] = row_ids[0, -1, own]
    return result
