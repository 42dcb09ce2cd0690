"""The forward pass of a model of transformers with an attached memory, beside the same pass without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from engram.addressing import TokenMap
from engram.benchmarks.compare import Row, compare
from engram.config import EngramConfig

BATCH, TIME, VOCAB = 8, 256, 49_152
# The shape of SmolLM2-135M. The weights are random: their values do not change the time.
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
MEMORY = EngramConfig(layers=(1, 15), orders=(2, 3), heads=8, head_dim=32, rows_per_head=65_536)


def bench_attach(rounds: int = 11, shape: dict[str, Any] | None = None, memory: EngramConfig = MEMORY) -> list[Row]:
    """Time a forward pass of 8 x 256 tokens, logits included, with 16 rows of 128 B per token in each of two layers.

    Args:
        shape: fields of a LlamaConfig; default: SmolLM2-135M's.

    Raises:
        ModuleNotFoundError: transformers is not installed.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from engram.integrations.transformers.attach import attach

    config = LlamaConfig(**(shape or SHAPE))
    plain = LlamaForCausalLM(config).eval()
    with torch.device("meta"):
        remembering = LlamaForCausalLM(config).eval()
    remembering.load_state_dict(plain.state_dict(), assign=True)  # the same weights, not a copy of them
    remembering.tie_weights()
    remembering.model.rotary_emb = plain.model.rotary_emb  # its frequencies are not in the state dict
    attach(remembering, memory, TokenMap.identity(config.vocab_size))
    ids = np.minimum(np.random.default_rng(0).zipf(1.2, (BATCH, TIME)) - 1, config.vocab_size - 1)
    text = torch.from_numpy(ids)

    def forward(model: Any) -> Callable[[], Any]:
        def run() -> None:
            with torch.inference_mode():
                model(input_ids=text, use_cache=False)

        return run

    arms: dict[str, Callable[[], Any]] = {"with memory": forward(remembering), "model alone": forward(plain)}
    with torch.inference_mode():  # with rows of zeros both models must give the same logits
        assert torch.equal(remembering(text[:1], use_cache=False).logits, plain(text[:1], use_cache=False).logits)
    return compare(arms, per_round=1.0, unit="s", rounds=rounds, times=True)
