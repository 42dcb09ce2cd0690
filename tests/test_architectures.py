"""engram.attach on every decoder architecture of this version of transformers: tiny random models, made generically."""

from __future__ import annotations

import inspect
import os
from typing import Any

import pytest
import torch
import transformers as hf
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import engram
from engram import EngramConfig, TokenMap
from tests.hf_models import CACHE, CONFIGS, ENDS, EYE, VOCAB, text

ZERO = EngramConfig(layers=(0, 2), orders=(2, 3), heads=2, head_dim=8, rows_per_head=101)
FULL = ZERO.replace(table_init="normal", conv_init="uniform")
IDENTITY = TokenMap.identity(VOCAB)
EVERY = "ENGRAM_EVERY_ARCHITECTURE"  # set in the environment: all architectures, not only CORE
CORE = ["bloom", "cohere2", "deepseek_v2", "deepseek_v4", "falcon", "gemma2", "gemma3n", "gemma4", "glm4", "gpt2"]
CORE += ["gpt_neox", "gpt_oss", "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "llama", "llama4", "longcat_flash"]
CORE += ["mamba", "minimax", "mistral", "mpt", "nemotron_h", "olmo2", "opt", "phi3", "qwen3_5", "qwen3_next", "rwkv"]
CORE += ["qwen4_exp", "recurrent_gemma", "roberta", "starcoder2", "xlstm"]
LAYERS = 4
LINEAR, FULL_ATTENTION = "linear_attention", "full_attention"
# What configurations call their sizes. Each takes those that it has.
SIZES: dict[str, Any] = {
    **{"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "head_dim": 8},
    **{"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 128, "is_decoder": True, **ENDS},
    **{"decoder_layers": LAYERS, "encoder_layers": LAYERS, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
    **{"num_decoder_layers": LAYERS, "num_decoder_attention_heads": 4, "encoder_attention_heads": 4},
    **{"d_ff": 48, "d_model": 32, "d_head": 8, "dim_ff": 48, "dim_head": 8, "ffn_dim": 48, "ffn_hidden_size": 48},
    **{"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "expert_ffn_hidden_size": 16},
    **{"n_routed_experts": 4, "n_shared_experts": 1, "num_experts": 4, "num_local_experts": 4},
    **{"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "zero_expert_num": 1},
    **{"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"index_n_heads": 4, "index_head_dim": 16, "index_topk": 8, "sliding_window": 6, "rotary_dim": 4},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"mamba_d_state": 4, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_num_heads": 4, "mamba_head_dim": 16},
    **{"state_size": 4, "lru_width": 32, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8},
    **{"global_head_dim": 8, "num_global_key_value_heads": 2, "ngram_vocab_size_ratio": 2},
}
MLA = {"num_key_value_heads": 4}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
SLIDING = {"layer_types": ["sliding_attention", FULL_ATTENTION] * (LAYERS // 2)}
HYBRID = {"layer_types": [LINEAR, FULL_ATTENTION] * (LAYERS // 2)}
EAR = {"hidden_size": 16, "intermediate_size": 16, "num_blocks": 1, "num_attention_heads": 2, "ext_pw_out_channel": 16}
EAR |= {"nemo_conv_channels": 16, "input_size": 8}
GEMMA3N = {"laurel_rank": 4, "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * LAYERS}
GEMMA3N |= {**SLIDING, "altup_num_inputs": 2}
# Of what no tiny model was made: parts of a model that have none of their own, or that need another model's output.
UNBUILT = {"blt", "dory", "emu3", "gemma4_assistant", "gemma4_unified_assistant", "mllama", "musicgen"}
UNBUILT |= {"musicgen_melody", "zamba2"}
LIST = r"does not know the architecture.*named layers, h, blocks with config.num_hidden_layers layers"
RECURRENT = r"keeps what it has decoded elsewhere than in keys and values: its cache has recurrent states only"
# Architectures that attach() refuses, and why.
REFUSED = {
    # Their layers lie deeper, under another name, or are not as many as the configuration says.
    **dict.fromkeys(("bert", "bert-generation", "big_bird", "camembert", "cpmant", "data2vec-text", "electra"), LIST),
    **dict.fromkeys(("ernie", "git", "hrm_text", "longcat_flash", "megatron-bert", "prophetnet", "reformer"), LIST),
    **dict.fromkeys(("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta"), LIST),
    **dict.fromkeys(("xlm-roberta-xl", "xlnet", "xmod"), LIST),
    **dict.fromkeys(("falcon_mamba", "mamba", "mamba2"), RECURRENT),
    **dict.fromkeys(("rwkv", "xlstm"), r"keeps what it has decoded elsewhere than in a Cache of transformers"),
    **dict.fromkeys(("gemma3n", "gemma3n_text"), r"pass hidden states \[2, 1, 2, 32\] on.*streams of another axis"),
}
# Decoders that by themselves give other logits for padded texts (absolute positions without position_ids, compressed
# blocks, states that read padding), or in pieces: there, only the rows that the memory reads are compared.
PADDING = {"bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "deepseek_v4", "marian", "mbart", "mvp"}
PADDING |= {"pegasus", "plbart", "recurrent_gemma", "trocr", "whisper"}
PIECES = {"moshi", "recurrent_gemma"}
# What some configurations need beside that, to be built or to be themselves.
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), MLA),
    **dict.fromkeys(("glm_moe_dsa", "longcat_flash", "minicpm3", "youtu", "dots3_note_text", "sarvam_mla"), MLA),
    "granitemoehybrid": HYBRID,
    "lfm2_moe": {"layer_types": ["conv", FULL_ATTENTION] * (LAYERS // 2)},
    "bailing_hybrid": {"layer_group_size": 2, **MLA},
    "kimi_linear": {
        **HYBRID,
        **MLA,
        "linear_attn_config": {"head_dim": 8, "num_heads": 4, "short_conv_kernel_size": 4},
    },
    "phi4_multimodal": {"vision_config": EYE, "audio_config": EAR},
    "zamba": {"layer_types": [LINEAR, "hybrid", LINEAR, "hybrid"], "attention_head_dim": 16},
    "bamba": {"attn_layer_indices": [1, 3]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "gemma3n_text": GEMMA3N,
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]], "window_size": 6},
    "falcon_h1": {"mamba_d_ssm": 64},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "nemotron_h": {"n_groups": 2, "layer_types": [LINEAR, "moe", FULL_ATTENTION, "mlp"]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48},
    },
    "cohere_compass_text": {**SLIDING, "rope_parameters": dict.fromkeys(SLIDING["layer_types"], ROPE)},
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 16)},
    "xlstm": {"num_heads": 4},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "qwen4_exp_text": dict(CONFIGS["qwen4_exp"]().to_dict()),
}


def tiny(kind: str) -> hf.PretrainedConfig:
    """A small configuration of one kind, of its text part if it has several."""
    default = CONFIG_MAPPING[kind]()
    part = default.get_text_config(decoder=True)
    part = default if isinstance(part, type(default)) else part  # which of an encoder-decoder has other names
    names = set(vars(part)) | set(type(part).attribute_map)
    sizes = {name: size for name, size in SIZES.items() if name in names}
    return type(part)(**sizes | SPECIAL.get(part.model_type, {}))


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    """A wrong row moves logits by 0.1 and more, another order of the sums by 0.00001."""
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def kinds() -> list[str]:
    known = [kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind not in UNBUILT]
    return known if os.environ.get(EVERY) else [kind for kind in known if kind in CORE]


@pytest.mark.parametrize("kind", kinds())
@torch.no_grad()
def test_attach_to(kind):
    """Zero rows change nothing; filled rows: cached equals uncached decoding, left padding equals no padding."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(tiny(kind)).eval()
    if kind in REFUSED:
        with pytest.raises(ValueError, match=rf"(?s){REFUSED[kind]}"):
            engram.attach(model, ZERO, IDENTITY)
        return
    ids = text()
    plain = model(ids).logits
    engram.attach(model, ZERO, IDENTITY)
    assert torch.equal(model(ids).logits, plain)
    engram.detach(model)
    torch.manual_seed(1)
    memory = engram.attach(model, FULL, IDENTITY)
    rows, recall = [], memory.recall

    def watched(*args, **kwargs):
        rows.append(recall(*args, **kwargs))
        return rows[-1]

    memory.recall = watched
    full = model(ids, use_cache=False).logits
    assert not torch.allclose(full, plain, atol=1e-3)
    taken = inspect.signature(model.forward).parameters

    if CACHE in taken:  # openai-gpt has none
        first = model(ids[:, :5], use_cache=True)
        cache = first.get(CACHE)
        if cache is None:  # kept from the caller
            cache = hf.DynamicCache(config=model.config)
            first = model(ids[:, :5], **{CACHE: cache}, use_cache=True)
        del rows[1:-1]
        pieces = [model(piece, **{CACHE: cache}, use_cache=True).logits for piece in ids[:, 5:].split([1, 1, 4, 1], 1)]
        for layer in FULL.layers:
            read = torch.cat([recall.row_ids[layer] for recall in rows[1:]], dim=1)
            assert torch.equal(read, rows[0].row_ids[layer])
        if kind not in PIECES:
            close(torch.cat([first.logits, *pieces], dim=1), full)

    pad = 4
    padded = torch.cat([torch.full((2, pad), 9), ids], dim=1)  # 9 is an ordinary token: only the mask says padding
    mask = torch.ones_like(padded).index_fill(1, torch.arange(pad), 0)
    places = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if "position_ids" in taken else {}
    logits = model(padded, attention_mask=mask, use_cache=False, **places).logits[:, pad:]
    for layer in FULL.layers:
        assert torch.equal(rows[-1].row_ids[layer][:, pad:], rows[0].row_ids[layer])
    assert torch.equal(rows[-1].dead, mask == 0)
    if kind not in PADDING:
        close(logits, full)
