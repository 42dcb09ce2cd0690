"""The kernels of counts.c in plain Python, for installations without a compiler and for the tests: the same bits."""

from __future__ import annotations

import numpy as np

PARENT, TOKEN, COUNT, NEXT, FIRST, DISTINCT, ONCE, TOTAL = range(8)
_MASK = (1 << 64) - 1


def hash_key(parent: int, token: int) -> int:
    """Return the 64-bit hash of a key, splitmix64 of both halves."""
    x = ((parent << 32 | token) + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def probe(nodes: np.ndarray, slots: np.ndarray, parent: int, token: int) -> int:
    """Return the slot that holds the child of `parent` with `token`, or the free one where it belongs."""
    place, mask = hash_key(parent, token) & (len(slots) - 1), len(slots) - 1
    while slots[place] and not (nodes[slots[place], PARENT] == parent and nodes[slots[place], TOKEN] == token):
        place = (place + 1) & mask
    return place


def find(nodes: np.ndarray, slots: np.ndarray, parents: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return the children of `parents` with `tokens`, 0 where there is none."""
    pairs = zip(parents.tolist(), tokens.tolist(), strict=True)
    return np.array([slots[probe(nodes, slots, p, t)] if p else 0 for p, t in pairs], dtype=np.uint32)


def add(
    nodes: np.ndarray,
    slots: np.ndarray,
    above: np.ndarray | None,
    parents: np.ndarray,
    tokens: np.ndarray,
    amounts: np.ndarray,
    used: int,
) -> tuple[np.ndarray, int]:
    """Add to the counts of children and make those that do not exist. Return the children and the nodes now used."""
    found = np.zeros(len(parents), dtype=np.uint32)
    for i, (parent, token, amount) in enumerate(zip(parents.tolist(), tokens.tolist(), amounts.tolist(), strict=True)):
        if not parent:
            continue
        place = probe(nodes, slots, parent, token)
        if not slots[place]:
            slots[place] = used
            nodes[used] = 0
            nodes[used, [PARENT, TOKEN]] = parent, token
            if above is not None:
                nodes[used, NEXT], above[parent, FIRST] = above[parent, FIRST], used
            used += 1
        node = found[i] = slots[place]
        old = int(nodes[node, COUNT])
        nodes[node, COUNT] = now = old + amount
        if above is not None:
            above[parent, DISTINCT] = int(above[parent, DISTINCT]) + (now > 0) - (old > 0)
            above[parent, ONCE] = int(above[parent, ONCE]) + (now == 1) - (old == 1)
            above[parent, TOTAL] = int(above[parent, TOTAL]) + amount
    return found, used


def place_all(nodes: np.ndarray, slots: np.ndarray, used: int) -> None:
    """Write the nodes 1 to used - 1 to free slots."""
    for node in range(1, used):
        slots[probe(nodes, slots, int(nodes[node, PARENT]), int(nodes[node, TOKEN]))] = node


def successors(nodes: np.ndarray, first: np.ndarray, start: np.ndarray, tokens: np.ndarray, counts: np.ndarray) -> None:
    """Write the successors of each context to tokens and counts, from `start` on."""
    for i, node in enumerate(first.tolist()):
        at = int(start[i])
        while node and at < start[i + 1]:
            if nodes[node, COUNT]:
                tokens[at], counts[at] = nodes[node, TOKEN], nodes[node, COUNT]
                at += 1
            node = int(nodes[node, NEXT])
