"""Decoding state that follows a cache of transformers: what beam search, assisted decoding or a user does to the keys
and values of a cache happens to the memory's ids and convolution inputs too.

The state lives in the cache object itself, whose class is exchanged for a subclass that does to the state what it does
to the layers. So it is copied, handed on and forgotten with the cache, and nothing has to be told.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from torch import nn
from transformers import Cache

from engram.memory.cache import REWIND, MemoryCache

CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # what transformers has called the argument over time


def cache_argument(model: nn.Module) -> str | None:
    """Return the name of the argument in which a model's forward() takes a Cache of transformers, or None.

    It is the argument that is annotated with Cache or a subclass. If none is, it is the first of CACHE_NAMES that has
    no annotation or one of plain tuples and lists, as in older models; a cache class of another kind does not count.
    """
    scope = getattr(inspect.unwrap(model.forward), "__globals__", {})
    taken = inspect.signature(model.forward).parameters
    kinds = {name: _cache_classes(parameter.annotation, scope) for name, parameter in taken.items()}
    annotated = (name for name, classes in kinds.items() if any(issubclass(k, Cache) for k in classes))
    return next(annotated, next((name for name in CACHE_NAMES if name in kinds and not kinds[name]), None))


def _cache_classes(annotation: Any, scope: dict[str, Any]) -> list[type]:
    """Return the classes named ...Cache in an annotation, which may be text to be read in `scope`."""
    if isinstance(annotation, str):
        paths = [path.split(".") for path in re.findall(r"[\w.]+", annotation)]
        parts = tuple(reduce(lambda o, name: getattr(o, name, None), path[1:], scope.get(path[0])) for path in paths)
    else:
        parts = typing.get_args(annotation) or (annotation,)
    return [k for k in parts if inspect.isclass(k) and k.__name__.endswith("Cache")]


@contextmanager
def _changing(cache: Any) -> Iterator[MemoryCache]:
    """Take the memory's state out of a cache while both are changed, so that an interruption between the two leaves a
    cache that is refused. An error of transformers leaves the state as it was: its length shows what was changed."""
    state = cache.engram
    cache.engram = None
    if state is None:  # an earlier change or forward pass was interrupted: this one cannot mend it
        yield MemoryCache()
        return
    try:
        yield state
    except Exception:
        cache.engram = state
        raise
    cache.engram = state


def _check_crop(state: MemoryCache, removed: int) -> None:
    """Raise ValueError if the memory cannot follow a crop of so many positions."""
    if state.rewindable < removed < state.length:  # transformers itself refuses to remove more than there are
        raise ValueError(
            f"this crop takes back {removed} of {state.length} positions, and the memory keeps what a crop of "
            f"{state.rewindable} needs: draft fewer tokens at a time, or start with an empty cache"
        )


class _Followed:
    """Mixed into the class of a cache that a memory follows."""

    engram: MemoryCache | None  # None while it changes, and for good if that was interrupted
    engram_owner: int

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        with _changing(self) as state:
            super().reorder_cache(beam_idx)  # type: ignore[misc]
            state.select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        with _changing(self) as state:
            super().batch_select_indices(indices)  # type: ignore[misc]
            state.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        with _changing(self) as state:
            super().batch_repeat_interleave(repeats)  # type: ignore[misc]
            if state.ids is not None:
                state.select(torch.arange(len(state.ids)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        before = positions(self)
        with _changing(self) as state:
            follows = before == state.length
            if follows:  # before the keys and values are cut
                _check_crop(state, -tokens_to_remove if tokens_to_remove <= 0 else before - tokens_to_remove)
            super().crop(tokens_to_remove)  # type: ignore[misc]
            if follows:
                state.rewind(before - positions(self))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copied and pickled by the name of the class beneath: this one has no place to be imported from."""
        return _unpickled, (type(self).__bases__[1],), self.__dict__


def _unpickled(kind: type) -> Any:
    return object.__new__(_followed(kind))


_kinds: dict[type, type] = {}


def _followed(kind: type) -> type:
    if kind not in _kinds:
        about = {"__module__": kind.__module__, "__doc__": kind.__doc__}
        _kinds[kind] = type(kind.__name__, (_Followed, kind), about)
    return _kinds[kind]


def positions(cache: Any) -> int:
    """Positions whose keys and values a cache holds."""
    return int(cache.get_seq_length())


def follow(cache: Cache, state: MemoryCache, owner: int) -> None:
    """Make `state`, of the attachment with the number `owner`, part of a cache of the same positions."""
    if not isinstance(cache, _Followed):
        cache.__class__ = _followed(type(cache))
    cache.engram, cache.engram_owner = state, owner  # type: ignore[attr-defined]


def suspend(cache: Any) -> None:
    """Take the memory's state out of a cache for the length of a forward pass: if the pass does not end well, some
    layers have its keys and values and others do not, and the cache is refused from then on."""
    cache.engram = None


def state_of(cache: Any, owner: int, time: int) -> MemoryCache:
    """The memory's state of a cache: a new one for an empty cache, else the one that has followed it.

    Args:
        time: positions of the forward pass that begins. Assisted decoding may take any of them back, so the state
            keeps what such a crop needs, however many there are.

    Raises:
        TypeError: tuples of tensors, as older versions of transformers kept keys and values. ValueError: a cache of
        another kind (paged), or with positions that the memory has not seen, or not like this.
    """
    if isinstance(cache, (tuple, list)):
        raise TypeError(
            f"the cache is a {type(cache).__name__}: the memory follows a Cache of transformers (DynamicCache, "
            f"StaticCache, ...)"
        )
    if not isinstance(cache, Cache):
        raise ValueError(
            f"the cache is a {type(cache).__name__}, not a Cache of transformers (DynamicCache, StaticCache, ...): the "
            f"memory cannot follow it. If it is the paged cache of generate_batch, use generate(), or detach() the "
            f"memory"
        )
    past = positions(cache)
    if past == 0:
        follow(cache, MemoryCache(), owner)
    state = getattr(cache, "engram", None)
    if state is None or getattr(cache, "engram_owner", None) != owner:
        raise ValueError(
            f"the cache holds {past} positions that this memory has not seen: it was filled by another model or "
            f"before the memory was attached, or a forward pass or a change of it broke off. Start with an empty cache"
        )
    if state.length != past:
        raise ValueError(
            f"the cache holds {past} positions, the memory has seen {state.length}: the cache was changed by "
            f"other means than its methods (crop, reorder_cache, batch_select_indices, batch_repeat_interleave, "
            f"reset), or a forward pass broke off. Start with an empty cache"
        )
    state.margin = max(REWIND, time)
    return state
