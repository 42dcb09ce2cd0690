"""Weak references to objects that other threads may add and drop while they are listed."""

from __future__ import annotations

import weakref
from typing import Generic, TypeVar

Item = TypeVar("Item")


class WeakList(Generic[Item]):
    """List of objects that it does not keep alive.

    A WeakSet can change size while it is iterated. Here adding, dropping and copying are one step of the interpreter
    each. There is no lock, which a fork could leave locked.

    A copy, also one from a pickle, is empty: it belongs to another object, which has added nothing yet.
    """

    def __init__(self) -> None:
        self._references: dict[weakref.ref[Item], None] = {}

    def add(self, item: Item) -> None:
        """Add an object; it leaves the list when it is deleted."""
        references = self._references
        references[weakref.ref(item, lambda gone: references.pop(gone, None))] = None  # type: ignore[func-returns-value]

    def living(self) -> list[Item]:
        """Return the objects that are alive at this moment."""
        return [item for reference in self._references.copy() if (item := reference()) is not None]

    def __len__(self) -> int:
        return len(self.living())

    def __reduce__(self) -> tuple[type[WeakList[Item]], tuple[()]]:
        return WeakList, ()
