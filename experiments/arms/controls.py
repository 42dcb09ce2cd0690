"""engram itself, and the controls that are one field of its configuration away. Source: arXiv 2601.07372.

one-row     every n-gram reads the same row: the module without the lookup.
random      rows are frozen noise: addresses tell n-grams apart, nothing is learned about them.
gate-one    the gate is fixed to 1, so that only the rows decide what is added.
switched-off  trained as engram; `finish` takes the memory away. Compare it with plain, which was trained without: the
            difference is how much a removal at inference overstates what the memory is worth.
All have Engram's table (one-row: one row per head) and, except for gate-one's missing key, Engram's dense weights.
"""

from __future__ import annotations

from dataclasses import replace

from engram.lm.run import Data, Setting, build_model
from engram.lm.transformer import Transformer
from experiments.arms.host import raw_ids


def engram(setting: Setting, data: Data, *, token_map: str = "compressed") -> Transformer:
    """Return the memory of the setting. token_map: "compressed" (the paper), or "identity": raw token ids are
    hashed."""
    maps = {"compressed": data.token_map, "identity": raw_ids(data)}
    if token_map not in maps:
        raise ValueError(f"token_map is {' or '.join(map(repr, maps))}, not {token_map!r}")
    return build_model(setting, "engram", maps[token_map])


def one_row(setting: Setting, data: Data) -> Transformer:
    return build_model(setting, "one-row", data.token_map)


def random(setting: Setting, data: Data) -> Transformer:
    return build_model(setting, "random", data.token_map)


def gate_one(setting: Setting, data: Data) -> Transformer:
    return build_model(replace(setting, memory=setting.memory.replace(gate="none")), "engram", data.token_map)


def switch_off(model: Transformer, setting: Setting, data: Data) -> Transformer:
    model.memory = None
    return model


ARMS = {
    "engram": engram,
    "one-row": one_row,
    "random": random,
    "gate-one": gate_one,
    "switched-off": engram,
}
FINISH = {"switched-off": switch_off}
