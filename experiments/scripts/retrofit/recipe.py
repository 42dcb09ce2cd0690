"""The part of tables.md that says how the runs were made, with the sizes that the code uses."""

from __future__ import annotations

import inspect
from typing import Any

from experiments.scripts.retrofit.arms import GGUF, MEMORY
from experiments.scripts.retrofit.data import EXCERPT, REPORTED, TUNING, pack
from experiments.scripts.retrofit.job import CLIP, WARM_UP
from experiments.scripts.retrofit.measure import CANDIDATES


def recipe(tuned: list[dict[str, Any]], bytes_per_token: int) -> str:
    """Return Markdown. tuned: lines of tune.jsonl. bytes_per_token: the weight of a fact's token in what tuning
    lowers."""
    packed = inspect.signature(pack).parameters
    orders, layers = (" and ".join(map(str, numbers)) for numbers in (MEMORY.orders, MEMORY.layers))
    steps = " or ".join(str(count) for count in sorted({line["steps"] for line in tuned}))
    lines = (
        f"Model: `{GGUF}`, 4-bit weights made float32 again.",
        f"Text: excerpts of about {EXCERPT:,} characters from the documentation of {REPORTED.services} web services, "
        f"and {REPORTED.facts} facts, {REPORTED.copies} times each; batches of {packed['batch'].default} x "
        f"{packed['context'].default} tokens.",
        f"Held out: excerpts of {REPORTED.inside} other services, the beginnings of {REPORTED.outside} Wikipedia "
        f"articles, and {REPORTED.facts} facts that were never taught.",
        f"Rank: fewer nats per token than {CANDIDATES - 1} descriptions of other facts (chance: {1 / CANDIDATES:.1%}).",
        f"Memory: orders {orders} before layers {layers} (counted from 0), {MEMORY.heads} heads of {MEMORY.head_dim} "
        f"values per order, {MEMORY.rows_per_head:,} rows per head.",
        f"Training: {WARM_UP} steps of warm-up, then linearly down to zero; gradients clipped at {CLIP:g}.",
        f"Tuning: seed 0, {steps} steps, {TUNING.inside} services and {TUNING.facts} facts; nats per token of facts "
        f"count as bits per byte at {bytes_per_token} bytes per token.",
    )
    return "\n".join(f"- {line}" for line in lines)
