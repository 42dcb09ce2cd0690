"""Slow, obvious reference of the hash: Python integers, one token, one head at a time, straight from the paper's
definition. Every fast path must equal it."""

from __future__ import annotations

import numpy as np
import xxhash

from engram.addressing import HashLayout, TokenMap


def row_ids(layout: HashLayout, token_map: TokenMap, ids, lookback=None, documents=None) -> dict[int, np.ndarray]:
    """{layer: int64 [B, T, C]} for ids [B, T]."""
    batch, time = np.shape(ids)
    out = {layer: np.zeros((batch, time, layout.columns), np.int64) for layer in layout.layers}
    for b in range(batch):
        for t in range(time):
            window = window_of(layout, token_map, b, t, ids, lookback, documents)
            for layer in layout.layers:
                column = 0
                for n, moduli in zip(layout.orders, layout.moduli[layer], strict=True):
                    for modulus in moduli:
                        row = hash_of(layout, layer, window[:n]) % modulus
                        out[layer][b, t, column] = row + layout.offsets[layer][column]
                        column += 1
    return out


def window_of(layout: HashLayout, token_map: TokenMap, b, t, ids, lookback, documents) -> list[int]:
    """Compressed ids of token t and the N-1 before it, current token first, pad from the first boundary on."""
    if ids[b][t] < 0:  # DEAD
        return [layout.pad_id] * max(layout.orders)
    window = [int(token_map.table[ids[b][t]])]
    for step in range(1, max(layout.orders)):
        place = t - step
        if place >= 0:
            raw = int(ids[b][place])
            same_document = documents is None or documents[b][place] == documents[b][t]
        else:  # the ids before the batch belong to the document of position 0
            back = 0 if lookback is None else np.shape(lookback)[1]
            raw = int(lookback[b][back + place]) if back + place >= 0 else -1
            same_document = documents is None or documents[b][0] == documents[b][t]
        if raw < 0 or not same_document:
            break
        if layout.boundary == "eos" and token_map.table[raw] == layout.pad_id:
            break  # reads as the end-of-sequence token itself, and so does all before it
        window.append(int(token_map.table[raw]))
    return window + [layout.pad_id] * (max(layout.orders) - len(window))


def hash_of(layout: HashLayout, layer: int, window: list[int]) -> int:
    """The n-gram's hash, before the remainder. window: compressed ids, current token first."""
    if layout.family == "xxh64":
        text_order = np.array(window[::-1], dtype="<i8").tobytes()
        return xxhash.xxh64(text_order, seed=layout.seed + 10007 * layer).intdigest()
    mix = 0
    for token, multiplier in zip(window, layout.multipliers[layer], strict=False):
        assert 0 <= token * multiplier < 2**63
        mix ^= token * multiplier
    return mix
