"""Time of a decoding step of the memory at growing positions of a text, and the memory of the process there."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from engram.addressing import TokenMap
from engram.benchmarks.compare import Row
from engram.config import EngramConfig
from engram.memory import EngramMemory
from engram.memory.cache import MemoryCache

VOCAB, WIDTH, PIECE = 2000, 256, 1024
MEMORY = EngramConfig(layers=(1, 3), heads=4, head_dim=32, rows_per_head=65_536, conv_init="uniform")


def resident() -> float:
    """Return the resident MiB of this process (Linux); 0 elsewhere."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0.0
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def _row(what: str, value: float, unit: str, first: float) -> Row:
    return {"what": what, "value": value, "unit": unit, "ratio": value / first if first else 1.0}


def _steps(config: EngramConfig, positions: Sequence[int], steps: int, name: str) -> list[Row]:
    """Time single tokens at each position, in turn. The text is read up to each position in large pieces."""
    memory = EngramMemory(config, TokenMap.identity(VOCAB), WIDTH).eval()
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, PIECE, WIDTH, generator=draw)

    def decode(cache: MemoryCache, count: int) -> None:
        recall = memory.recall(torch.randint(0, VOCAB, (1, count), generator=draw), cache=cache)
        for layer in config.layers:
            memory[layer](hidden[:, :count], recall)

    text, caches = MemoryCache(), []
    with torch.inference_mode():
        for position in positions:
            while text.length < position:
                decode(text, min(PIECE, position - text.length))
            caches.append(copy.copy(text))
        seconds = np.empty((steps, len(caches)))
        for step in range(steps):
            for i, cache in enumerate(caches):
                began = time.perf_counter()
                decode(cache, 1)
                seconds[step, i] = time.perf_counter() - began
    medians = (np.median(seconds, axis=0) * 1e3).tolist()
    states = [cache.nbytes / 2**20 for cache in caches]
    return [
        *(_row(f"{name}, position {p:,}", m, "ms/token", medians[0]) for p, m in zip(positions, medians, strict=True)),
        *(_row(f"{name}, state at {p:,}", s, "MiB", states[0]) for p, s in zip(positions, states, strict=True)),
    ]


def _model(positions: Sequence[int]) -> list[Row]:
    """Time a Mistral of 4 layers with a window of 256 tokens, which reads a text in pieces of 1,024. Its own state has
    the same size however long the text is."""
    from transformers import DynamicCache, MistralConfig, MistralForCausalLM

    from engram.integrations.transformers.attach import attach

    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=1, max_position_embeddings=2 * max(positions), sliding_window=256,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    attach(model, MEMORY, TokenMap.identity(VOCAB))
    cache, draw = DynamicCache(config=config), torch.Generator().manual_seed(0)
    length, times, rows = 0, [], []
    with torch.inference_mode():
        for position in positions:
            while length < position:
                began = time.perf_counter()
                # By position: the argument has had two names. input_ids, attention_mask, position_ids, the cache.
                model(torch.randint(0, VOCAB, (1, PIECE), generator=draw), None, None, cache, logits_to_keep=1)
                times.append(time.perf_counter() - began)
                length += PIECE
            rows.append((position, float(np.median(times[-20:])) * 1e3, resident()))
    return [
        *(_row(f"sliding window, position {p:,}", ms, f"ms/{PIECE:,} tokens", rows[0][1]) for p, ms, _ in rows),
        *(_row(f"sliding window, process at {p:,}", mib, "MiB", rows[0][2]) for p, _, mib in rows),
    ]


def bench_decode(
    positions: Sequence[int] = (1_000, 10_000, 100_000, 1_000_000),
    steps: int = 301,
    model_positions: Sequence[int] = (25_000, 100_000, 250_000),
) -> list[Row]:
    """Time the memory alone (d 256, one layer), with and without convolution, and two layers in a model of sliding
    windows.

    Returns:
        Rows whose "ratio" is this row over the first one of its kind: 1 if the position does not matter.

    Raises:
        ModuleNotFoundError: transformers is not installed.
    """
    rows = _steps(MEMORY.replace(layers=(1,)), positions, steps, "with convolution")
    rows += _steps(MEMORY.replace(layers=(1,), conv_kernel=0), positions, steps, "without convolution")
    return rows + _model(model_positions)
