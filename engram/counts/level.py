"""The n-grams of one length: nodes of the trie, and the hash table that finds them."""

from __future__ import annotations

import numpy as np

from engram.counts import reference
from engram.counts.reference import COUNT, DISTINCT, FIRST, PARENT, TOKEN
from engram.tables import kernels
from engram.tables.kernels import Call, spread

MOST = 2**32 - 1  # counts and node numbers are uint32
_SMALLEST = 4096  # keys of a piece: fewer cost more to hand over than they save


def slots_for(nodes: int) -> int:
    """Return the slots of a table for `nodes` nodes: a power of two, at most three quarters full."""
    return 1 << max(4, int(nodes * 4 // 3).bit_length())


class Level:
    """N-grams of one length, with the number of the node of their first n - 1 tokens.

    Args:
        words: uint32 per node: 8 if its n-grams can be contexts, 4 if not.
    """

    def __init__(self, words: int):
        self.words = words
        self.nodes = np.zeros((1, words), dtype=np.uint32)
        self.slots = np.zeros(slots_for(1), dtype=np.uint32)
        self.used = 1  # node 0 is none

    @property
    def nbytes(self) -> int:
        """Bytes of the nodes that exist and of their slots."""
        return self.used * self.words * 4 + self.slots.nbytes

    def reserve(self, more: int) -> None:
        """Make room for `more` nodes.

        Raises:
            ValueError: more nodes than 32 bits can number.
        """
        need = self.used + more
        if need > MOST:
            raise ValueError(f"{need:,} n-grams of one length do not fit: a count memory numbers {MOST:,}; prune it")
        if need > len(self.nodes):
            nodes = np.empty((min(MOST, max(need, self.used * 3 // 2)), self.words), dtype=np.uint32)
            nodes[: self.used] = self.nodes[: self.used]
            self.nodes = nodes
        if slots_for(need) > len(self.slots):
            slots = np.zeros(slots_for(need), dtype=np.uint32)
            if kernels.native is None:
                reference.place_all(self.nodes, slots, self.used)
            else:
                Call("counts_place", self.nodes.ctypes.data, slots.ctypes.data, len(slots) - 1, self.words)(
                    1, self.used
                )
            self.slots = slots

    def find(self, parents: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Return the children uint32 of `parents` with `tokens` (both uint32); 0 where there is none."""
        if kernels.native is None:
            return reference.find(self.nodes, self.slots, parents, tokens)
        found = np.empty(len(parents), dtype=np.uint32)
        pointers = [a.ctypes.data for a in (self.nodes, self.slots, parents, tokens, found)]
        call = Call("counts_find", *pointers, len(self.slots) - 1, self.words)
        spread(len(parents), _SMALLEST, call, self.nodes, self.slots, parents, tokens, found)
        return found

    def add(
        self, above: Level | None, parents: np.ndarray, tokens: np.ndarray, amounts: int | np.ndarray
    ) -> np.ndarray:
        """Add `amounts` to the counts of children, and make those that do not exist. reserve() was called before.

        Args:
            above: level of the parents, whose totals change; None for single tokens.
        """
        if kernels.native is None:
            every = np.broadcast_to(np.asarray(amounts), parents.shape)
            up = None if above is None else above.nodes
            found, self.used = reference.add(self.nodes, self.slots, up, parents, tokens, every, self.used)
            return found
        found, used = np.empty(len(parents), dtype=np.uint32), np.array([self.used], dtype=np.uint32)
        address, each = 0 if above is None else above.nodes.ctypes.data, isinstance(amounts, np.ndarray)
        Call(
            "counts_add",
            *(self.nodes.ctypes.data, self.slots.ctypes.data, address, parents.ctypes.data, tokens.ctypes.data),
            *(amounts.ctypes.data if isinstance(amounts, np.ndarray) else 0, found.ctypes.data, used.ctypes.data),
            *(len(self.slots) - 1, self.words, 0 if each else amounts),
        )(0, len(parents))
        self.used = int(used[0])
        return found

    def successors(self, contexts: np.ndarray, above: Level) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (start, tokens, counts): those of contexts[i] are tokens[start[i] : start[i + 1]]."""
        start = np.zeros(len(contexts) + 1, dtype=np.int64)
        np.cumsum(above.nodes[contexts, DISTINCT] * (contexts > 0), out=start[1:])
        first = above.nodes[contexts, FIRST] * (contexts > 0).astype(np.uint32)
        tokens, counts = np.empty(start[-1], dtype=np.int64), np.empty(start[-1], dtype=np.uint32)
        if kernels.native is None:
            reference.successors(self.nodes, first, start, tokens, counts)
        else:
            arrays = self.nodes, first, start, tokens, counts
            call = Call("counts_list", *(a.ctypes.data for a in arrays), self.words)
            spread(len(contexts), 64, call, *arrays)
        return start, tokens, counts

    def rebuilt(self, above: tuple[Level, np.ndarray] | None, keep: np.ndarray) -> tuple[Level, np.ndarray]:
        """Return a level with only the nodes `keep` (ascending numbers), and the new number of each old node.

        Args:
            above: the rebuilt level of the parents and the new numbers there; None for single tokens.
        """
        new, numbers = Level(self.words), np.zeros(self.used, dtype=np.uint32)
        new.reserve(len(keep))
        parents, tokens = self.nodes[keep, PARENT], np.ascontiguousarray(self.nodes[keep, TOKEN])
        parents = np.ascontiguousarray(parents) if above is None else above[1][parents]
        counts = self.nodes[keep, COUNT].astype(np.int64)
        up = None if above is None else above[0]
        numbers[keep] = new.add(up, parents, tokens, np.minimum(counts, 2**31 - 1).astype(np.int32))
        if (large := counts >= 2**31).any():
            new.add(up, parents[large], tokens[large], (counts[large] - (2**31 - 1) - 1).astype(np.int32))
            new.add(up, parents[large], tokens[large], 1)
        return new, numbers


def bytes_of(nodes: int, words: int) -> int:
    """Return the bytes of a level with `nodes` nodes and node 0."""
    return (nodes + 1) * words * 4 + slots_for(nodes + 1) * 4


def most_nodes(room: int, most: int, words: int) -> int:
    """Return the most nodes, up to `most`, that take at most `room` bytes; 0 if none do."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if bytes_of(middle, words) <= room else (low, middle - 1)
    return low
