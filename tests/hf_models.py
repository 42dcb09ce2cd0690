"""Tiny random decoders of transformers, one per architecture that the tests attach a memory to."""

from __future__ import annotations

import inspect

import torch
import transformers as hf

VOCAB, IMAGE = 64, 60
# Name of the argument and the output for keys and values in this version of transformers.
CACHE = "cache" if "cache" in inspect.signature(hf.LlamaModel.forward).parameters else "past_key_values"
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BASE = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, **ENDS}
LLAMA = {**BASE, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 128}
GEMMA = {**LLAMA, "head_dim": 8, "sliding_window": 8}
GEMMA["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
MLA = {**LLAMA, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8}
MLA |= {"qk_nope_head_dim": 8, "moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 2}
MLA |= {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
CSA, HCA = "compressed_sparse_attention", "heavily_compressed_attention"
V4 = {**BASE, "num_key_value_heads": 1, "head_dim": 16, "q_lora_rank": 16, "moe_intermediate_size": 16}
V4 |= {"n_routed_experts": 8, "num_experts_per_tok": 2, "layer_types": ["sliding_attention", CSA, HCA]}
V4 |= {"mlp_layer_types": ["hash_moe", "moe", "moe"], "compress_rates": {CSA: 4, HCA: 8}, "sliding_window": 8}
V4 |= {"o_groups": 2, "o_lora_rank": 16, "index_n_heads": 8, "index_head_dim": 16, "index_topk": 4}
V4 |= {"partial_rotary_factor": 0.5, "max_position_embeddings": 128}
# Eight indexer heads: with two, so many scores of untrained weights are exactly 0 that their order is chance.
EYE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
EYE |= {"image_size": 16, "patch_size": 4}

QWEN4 = {**BASE, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "hc_lowrank": 8}
QWEN4 |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "linear_key_head_dim": 8}
QWEN4 |= {"shared_expert_intermediate_size": 16, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
QWEN4 |= {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16}
QWEN4 |= {"indexer_compress_ratio": 4, "linear_num_value_heads": 4}
QWEN4 |= {"layer_types": ["linear_attention", "indexed_attention", "linear_attention"]}

CONFIGS = {
    "gpt2": lambda: hf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=128, **ENDS),
    "llama": lambda: hf.LlamaConfig(**LLAMA),
    "mistral": lambda: hf.MistralConfig(**LLAMA, sliding_window=6),
    "qwen3": lambda: hf.Qwen3Config(**LLAMA, head_dim=8),
    "gemma3": lambda: hf.Gemma3TextConfig(**GEMMA),
    "deepseek_v3": lambda: hf.DeepseekV3Config(**MLA),
    "deepseek_v32": lambda: hf.DeepseekV32Config(**MLA, index_topk=8, index_head_dim=16, index_n_heads=8),
    "deepseek_v4": lambda: hf.DeepseekV4Config(**V4),
    "qwen4_exp": lambda: hf.Qwen4ExpTextConfig(**QWEN4),
    "mixtral": lambda: hf.MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2),
    "gemma3_images": lambda: hf.Gemma3Config(
        text_config=dict(GEMMA),
        vision_config=dict(EYE),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=61,
        eoi_token_index=62,
    ),
}


def build(name: str) -> hf.PreTrainedModel:
    """Build a model in eval mode, with the same weights on every call."""
    torch.manual_seed(0)
    kind = hf.AutoModelForImageTextToText if name == "gemma3_images" else hf.AutoModelForCausalLM
    return kind.from_config(CONFIGS[name]()).eval()


def text(batch: int = 2, time: int = 12, seed: int = 0) -> torch.Tensor:
    """Draw ids without the special ones at both ends of the vocabulary."""
    return torch.randint(3, IMAGE, (batch, time), generator=torch.Generator().manual_seed(seed))
