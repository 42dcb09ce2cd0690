"""Decoding state of a memory, kept inside a cache of transformers, so that both change together.

Beam search, assisted decoding and callers reorder, repeat, crop and copy a cache. Its class is replaced by a subclass,
whose methods apply each change of the keys and values to the memory's ids and convolution inputs too. The state is an
attribute of the cache, so it is copied and deleted with the cache.
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

CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # names of the argument in different versions


def cache_argument(model: nn.Module) -> str | None:
    """Return the name of the argument in which a model's forward() takes a Cache of transformers, or None.

    It is the argument that is annotated with Cache or a subclass. If none is, it is the first of CACHE_NAMES that has
    no annotation or one of plain tuples and lists, as in older models. Arguments for caches of other kinds are skipped.
    """
    scope = getattr(inspect.unwrap(model.forward), "__globals__", {})
    parameters = inspect.signature(model.forward).parameters
    kinds = {name: _cache_classes(parameter.annotation, scope) for name, parameter in parameters.items()}
    annotated = (name for name, classes in kinds.items() if any(issubclass(k, Cache) for k in classes))
    return next(annotated, next((name for name in CACHE_NAMES if name in kinds and not kinds[name]), None))


def _cache_classes(annotation: Any, scope: dict[str, Any]) -> list[type]:
    """Return the classes named ...Cache in an annotation. If it is text, look its names up in `scope`."""
    if isinstance(annotation, str):
        paths = [path.split(".") for path in re.findall(r"[\w.]+", annotation)]
        parts = tuple(reduce(lambda o, name: getattr(o, name, None), path[1:], scope.get(path[0])) for path in paths)
    else:
        parts = typing.get_args(annotation) or (annotation,)
    return [k for k in parts if inspect.isclass(k) and k.__name__.endswith("Cache")]


@contextmanager
def _changing(cache: Any) -> Iterator[MemoryCache]:
    """Remove the memory's state from a cache while both are changed, and put it back afterwards. After an interruption
    the state stays away, so that the cache is refused. After an error of transformers it is put back as it was: if its
    length differs from the cache's, the cache is refused."""
    state = cache.engram
    cache.engram = None
    if state is None:  # an earlier change or forward pass was interrupted: this change cannot repair it
        yield MemoryCache()
        return
    try:
        yield state
    except Exception:
        cache.engram = state
        raise
    cache.engram = state


def _check_crop(state: MemoryCache, removed: int) -> None:
    """If the memory cannot undo `removed` positions, raise ValueError."""
    if state.rewindable < removed < state.length:  # transformers refuses to remove more positions than the cache has
        raise ValueError(
            f"this crop removes {removed} of {state.length} positions, and the memory can undo at most "
            f"{state.rewindable}: draft fewer tokens at a time, or start with an empty cache"
        )


class _Followed:
    """Methods that a cache gets while it holds the state of a memory."""

    engram: MemoryCache | None  # None during a change, and for good if the change was interrupted
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
            if follows:  # check before the keys and values are cropped
                _check_crop(state, -tokens_to_remove if tokens_to_remove <= 0 else before - tokens_to_remove)
            super().crop(tokens_to_remove)  # type: ignore[misc]
            if follows:
                state.rewind(before - positions(self))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copy and pickle by the name of the class of transformers: this subclass cannot be imported by a name."""
        return _unpickled, (type(self).__bases__[1],), self.__dict__


def _unpickled(kind: type) -> Any:
    return object.__new__(_followed(kind))


_subclasses: dict[type, type] = {}  # class of transformers -> its subclass with _Followed


def _followed(kind: type) -> type:
    if kind not in _subclasses:
        attributes = {"__module__": kind.__module__, "__doc__": kind.__doc__}
        _subclasses[kind] = type(kind.__name__, (_Followed, kind), attributes)
    return _subclasses[kind]


def positions(cache: Any) -> int:
    """Return the number of positions whose keys and values a cache holds."""
    return int(cache.get_seq_length())


def follow(cache: Cache, state: MemoryCache, owner: int) -> None:
    """Store `state` in a cache of the same positions. owner: number of the attachment whose state it is."""
    if not isinstance(cache, _Followed):
        cache.__class__ = _followed(type(cache))
    cache.engram, cache.engram_owner = state, owner  # type: ignore[attr-defined]


def suspend(cache: Any) -> None:
    """Remove the memory's state from a cache during a forward pass. If the pass fails, only some layers have its keys
    and values, so the cache stays without state and later passes refuse it."""
    cache.engram = None


def state_of(cache: Any, owner: int, time: int) -> MemoryCache:
    """Return the memory's state in a cache: a new state if the cache is empty, else the one stored there.

    Args:
        time: positions of the forward pass that begins. Assisted decoding may crop all of them again, so the state
            keeps what a crop of that many positions needs.

    Raises:
        TypeError: a tuple or list of tensors, as older versions of transformers kept keys and values. ValueError: a
        cache of another kind (paged), or one whose positions are not those that the memory has processed.
    """
    if isinstance(cache, (tuple, list)):
        raise TypeError(
            f"the cache is a {type(cache).__name__}: expected a Cache of transformers (DynamicCache, StaticCache, ...)"
        )
    if not isinstance(cache, Cache):
        raise ValueError(
            f"the cache is a {type(cache).__name__}: expected a Cache of transformers (DynamicCache, StaticCache, "
            f"...). If it is the paged cache of generate_batch, call generate() instead, or detach() the memory"
        )
    past = positions(cache)
    if past == 0:
        follow(cache, MemoryCache(), owner)
    state = getattr(cache, "engram", None)
    if state is None or getattr(cache, "engram_owner", None) != owner:
        raise ValueError(
            f"the cache holds {past} positions that this memory has not seen: it was filled by another model or before "
            f"the memory was attached, or a forward pass or a change of it was interrupted. Start with an empty cache"
        )
    if state.length != past:
        raise ValueError(
            f"the cache holds {past} positions, the memory has seen {state.length}: the cache was changed by other "
            f"means than its methods (crop, reorder_cache, batch_select_indices, batch_repeat_interleave, reset), or "
            f"a forward pass was interrupted. Start with an empty cache"
        )
    state.margin = max(REWIND, time)
    return state
