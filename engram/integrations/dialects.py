"""The shipped dialects: their config fields and tensor names, read into EngramConfig and EngramFusion and back.

    demo            the paper's single-file demo: float rows, biases, conv, one state dict per module
    deepseek-v4.1   DeepSeek-V4.1-Flash: e4m3 rows with an e8m0 scale per 32 values, one fused projection, no conv
    qwen            Qwen3.8-Flash-Next (Qwen4-Exp "PLE"): raw ids, EOS reset, split table, norm gains stored minus 1

What each field means is in paper_notes/dialects.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from engram.addressing import HashLayout
from engram.config import EngramConfig
from engram.memory import build_layout
from engram.tables.codecs import get_codec

DIALECTS = ("demo", "deepseek-v4.1", "qwen")

# Where a layer's tensors hang; the group is the prefix of the names below.
_LAYER = r"(?:.*\.)?"
TABLE = {
    "demo": re.compile(rf"((?:{_LAYER}(\d+)\.)?(?:engram\.)?)multi_head_embedding\.embedding\.weight"),
    "deepseek-v4.1": re.compile(rf"({_LAYER}layers\.(\d+)\.engram\.)(?:embed|embed_tokens)\.weight"),
    "qwen": re.compile(rf"({_LAYER}layers\.(\d+)\.ple\.)ple_embedding\.ngram_embedding\.(?:shard_(\d+)\.)?weight"),
}


def _field(fields: Mapping[str, Any], *names: str) -> Any:
    """The first of several spellings of a field. Raises ValueError where none is there."""
    for name in names:
        if fields.get(name) is not None:
            return fields[name]
    raise ValueError(f"this config lacks {' or '.join(names)}")


def _text(published: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields that are about text: nested where a model sees more. Raises ValueError where it is no object."""
    text = published.get("text_config") or published if isinstance(published, Mapping) else published
    if not isinstance(text, Mapping):
        raise ValueError(f"a config (or its text_config) is a JSON object, not {text!r}")
    return text


def dialect_of_config(published: Mapping[str, Any]) -> str:
    """Which dialect a config.json speaks. Raises ValueError for one without an n-gram memory."""
    text = _text(published)
    for dialect, field in (("deepseek-v4.1", "engram_layer_ids"), ("qwen", "ple_layer_ids"), ("demo", "layer_ids")):
        if text.get(field):
            return dialect
    raise ValueError(
        "this config names no n-gram memory: expected engram_layer_ids (DeepSeek-V4.1), ple_layer_ids (Qwen4-Exp) or "
        "layer_ids (the released demo)"
    )


def config_from_hf(published: Mapping[str, Any]) -> EngramConfig:
    """EngramConfig of a published config.json (as a dict), nested under text_config or not, in any of the spellings.

    Raises:
        ValueError: no memory in it, a field missing, or row counts that its own rules do not give.
    """
    text = _text(published)
    dialect = dialect_of_config(published)
    try:
        config = {"demo": _from_demo, "deepseek-v4.1": _from_deepseek, "qwen": _from_qwen}[dialect](text)
    except (TypeError, KeyError, OverflowError) as error:
        raise ValueError(f"this {dialect} config cannot be read: {error}") from error
    stated = text.get("engram_num_embeddings")
    if stated is not None:
        rows = list(layout_of(config).rows.values())
        if [int(n) for n in stated] != rows:
            raise ValueError(
                f"engram_num_embeddings is {list(stated)}, but engram_vocab_size and its primes give {rows}"
            )
    return config


def _from_demo(text: Mapping[str, Any]) -> EngramConfig:
    heads, rows = int(text["n_head_per_ngram"]), [int(n) for n in text["engram_vocab_size"]]
    if int(text["n_embed_per_ngram"]) % heads:
        raise ValueError(f"n_embed_per_ngram {text['n_embed_per_ngram']} is no multiple of n_head_per_ngram {heads}")
    return EngramConfig(
        layers=tuple(text["layer_ids"]),  # their order decides the primes: refused where it is not ascending
        orders=tuple(range(2, int(text["max_ngram_size"]) + 1)),
        heads=heads,
        head_dim=int(text["n_embed_per_ngram"]) // heads,
        rows_per_head=rows[0] if len(set(rows)) == 1 else tuple(rows),
        pad_id=int(_field(text, "pad_id")),
        seed=int(text.get("seed", 0)),
        conv_kernel=int(text.get("kernel_size", 4)),
        bias=True,
        table_init="normal",
        conv_init="uniform",
        gate_eps=None,
        conv_eps=1e-5,
        compressed_vocab=text.get("compressed_vocab_size"),
    )


def _from_deepseek(text: Mapping[str, Any]) -> EngramConfig:
    eps = float(text.get("rms_norm_eps", 1e-6))
    return EngramConfig(
        layers=tuple(text["engram_layer_ids"]),
        orders=tuple(range(2, int(text["engram_max_ngram_size"]) + 1)),
        heads=int(text["engram_n_heads"]),
        head_dim=int(text["engram_head_dim"]),
        rows_per_head=int(text["engram_vocab_size"]),
        pad_id=int(_field(text, "engram_pad_token_id", "engram_pad_id")),
        conv_kernel=0,
        gate_eps=eps,
        boundary="dead",
        table_dtype="bfloat16",
        compressed_vocab=int(_field(text, "engram_compressed_vocab_size")),
    )


def _from_qwen(text: Mapping[str, Any]) -> EngramConfig:
    eos, n, heads = _field(text, "eos_token_id"), int(text.get("ngram_size", 3)), int(text.get("heads_per_ngram", 8))
    width, eps = int(_field(text, "ple_embed_dim", "hidden_size")), float(text.get("rms_norm_eps", 1e-6))
    if width % ((n - 1) * heads):
        raise ValueError(f"ple_embed_dim {width} is no multiple of the {(n - 1) * heads} heads")
    return EngramConfig(
        layers=tuple(layer - 1 for layer in text["ple_layer_ids"]),  # counted from 1 there; in this order
        orders=tuple(range(2, n + 1)),
        heads=heads,
        head_dim=width // ((n - 1) * heads),
        rows_per_head=int(text.get("ngram_vocab_size_base", 20_000_000)),
        pad_id=int(eos[0] if isinstance(eos, list) else eos),
        seed=int(text.get("seed", 1234)),
        conv_kernel=int(text.get("ple_conv_kernel_size", 4)),
        gate_eps=eps,
        conv_eps=eps,
        boundary="eos",
        generator="splitmix64",
        row_multiple=int(text.get("make_ngram_vocab_size_divisible_by", 128)),
        table_dtype="bfloat16",
        compressed_vocab=int(text.get("vocab_size", 248_320)),
    )


def config_to_hf(config: EngramConfig, dialect: str, hidden_size: int, streams: int) -> dict[str, Any]:
    """The fields of a config.json in a dialect's spelling; `config_from_hf` reads them back to the same addresses."""
    check_dialect(config, dialect)
    orders, rows = config.orders, config.row_counts
    shape = {"hidden_size": hidden_size}
    if dialect == "demo":
        width = {"n_embed_per_ngram": config.heads * config.head_dim, "n_head_per_ngram": config.heads}
        rules = {"pad_id": config.pad_id, "seed": config.seed, "kernel_size": config.conv_kernel}
        vocab = {"engram_vocab_size": list(rows), "compressed_vocab_size": config.compressed_vocab}
        layers = {"layer_ids": list(config.layers), "max_ngram_size": orders[-1]}
        return {**layers, **vocab, **width, **rules, **shape, "hc_mult": streams}
    if dialect == "deepseek-v4.1":
        text = {
            "engram_layer_ids": list(config.layers),
            "engram_num_embeddings": list(layout_of(config).rows.values()),
            "engram_max_ngram_size": orders[-1],
            "engram_n_heads": config.heads,
            "engram_head_dim": config.head_dim,
            "engram_vocab_size": rows[0],
            "engram_compressed_vocab_size": config.compressed_vocab,
            "engram_pad_token_id": config.pad_id,
            "rms_norm_eps": config.gate_eps,
        }
        return {"text_config": {**text, **shape, "hc_mult": streams}}
    text = {
        "ple_layer_ids": [layer + 1 for layer in config.layers],
        "ple_embed_dim": config.d_mem,
        "ple_conv_kernel_size": config.conv_kernel,
        "ngram_size": orders[-1],
        "heads_per_ngram": config.heads,
        "ngram_vocab_size_base": rows[0],
        "make_ngram_vocab_size_divisible_by": config.row_multiple,
        "seed": config.seed,
        "eos_token_id": config.pad_id,
        "vocab_size": config.compressed_vocab,
        "rms_norm_eps": config.gate_eps,
    }
    return {"text_config": {**text, **shape, "hc_count": streams}}


def check_dialect(config: EngramConfig, dialect: str) -> None:
    """Raises ValueError where a memory does what the dialect has no words for: its rows would be read wrongly there."""
    rows = config.row_counts
    wanted: dict[str, tuple[Any, ...]] = {
        "hash": ("multiply_xor",),
        "gate": ("signed_sqrt",),
        "orders": (tuple(range(2, config.orders[-1] + 1)),),
        "inject": ("residual",),
        "conv_dilation": (None, config.orders[-1]),
    }
    if dialect == "demo":
        wanted |= {"boundary": ("pad",), "generator": ("pcg64",), "row_multiple": (1,), "bias": (True,)}
        wanted |= {"gate_eps": (None,), "conv_eps": (1e-5,)}
    elif dialect == "deepseek-v4.1":
        wanted |= {"boundary": ("dead",), "generator": ("pcg64",), "row_multiple": (1,), "seed": (0,)}
        wanted |= {"bias": (False,), "conv_kernel": (0,)}
        get_codec("fp8", config.head_dim)
    elif dialect == "qwen":
        wanted |= {"boundary": ("eos",), "generator": ("splitmix64",), "bias": (False,), "conv_eps": (config.gate_eps,)}
    else:
        raise ValueError(f"unknown dialect {dialect!r}; there are {', '.join(DIALECTS)}")
    if dialect != "demo" and len(set(rows)) > 1:
        raise ValueError(f"{dialect} has one rows_per_head for all orders, this memory has {rows}")
    if dialect != "deepseek-v4.1" and config.conv_kernel < 2:
        raise ValueError(f"{dialect} has a short convolution, this memory has conv_kernel={config.conv_kernel}")
    if dialect != "demo" and config.gate_eps is None:
        raise ValueError(f"{dialect} states the epsilon of its norms, this memory has gate_eps=None")
    if dialect != "demo" and config.compressed_vocab is None:
        raise ValueError(f"{dialect} states its vocabulary: give the memory a compressed_vocab")
    for name, allowed in wanted.items():
        if getattr(config, name) not in allowed:
            raise ValueError(
                f"{dialect} cannot say {name}={getattr(config, name)!r} (there it is {allowed[0]!r}): rows that were "
                f"trained under one rule would be read under another"
            )


def layout_of(config: EngramConfig, pad_id: int = 0) -> HashLayout:
    """The hash layout of a configuration whose vocabulary is known, or any vocabulary: rows do not depend on it.

    pad_id: compressed id that stands before the start of a text; give it where the layout is used for addresses.
    """
    return build_layout(config, config.compressed_vocab or 2**31 - 1, pad_id)


def table_sizes(config: EngramConfig, codec: str | None = None) -> dict[int, tuple[int, int]]:
    """{layer: (rows, bytes)} of a configuration's tables, nothing allocated. codec: None for rows in table_dtype."""
    width = getattr(torch, config.table_dtype).itemsize * config.head_dim
    row = width if codec is None else get_codec(codec, config.head_dim).row_bytes(config.head_dim)
    return {layer: (rows, rows * row) for layer, rows in layout_of(config).rows.items()}


def fusion_from(dialect: str, get: Callable[[str], Tensor], config: EngramConfig, streams: int) -> dict[str, Tensor]:
    """EngramFusion's weights of one layer from a dialect's. get(name below the layer's prefix) -> float tensor."""
    if dialect == "demo":
        gains = {ours: [get(f"{name}.{i}.weight") for i in range(streams)] for ours, name in _DEMO_NORMS.items()}
        return {
            "value.weight": get("value_proj.weight"),
            "value.bias": get("value_proj.bias"),
            "key.weight": torch.cat([get(f"key_projs.{i}.weight") for i in range(streams)]),
            "key.bias": torch.cat([get(f"key_projs.{i}.bias") for i in range(streams)]),
            "conv_weight": get("short_conv.conv.weight"),
            **{name: torch.stack(gain) for name, gain in gains.items()},
        }
    if dialect == "deepseek-v4.1":
        both = get("wkv.weight")  # M keys, then the value
        d = both.shape[0] // (streams + 1)
        gains2 = {"query_norm": get("q_weight"), "key_norm": get("k_weight")}
        return {"key.weight": both[: streams * d], "value.weight": both[streams * d :], **gains2}
    weights = {"key.weight": get("key_proj.weight"), "value.weight": get("value_proj.weight")}
    weights |= {ours: (1 + get(f"{name}.weight").float()).view(streams, -1) for ours, name in _QWEN_NORMS.items()}
    return {**weights, "conv_weight": get("conv1d.weight")}


def fusion_to(dialect: str, weights: Mapping[str, Tensor], streams: int) -> dict[str, Tensor]:
    """The other way: a dialect's tensors (names below the layer's prefix) from EngramFusion's weights."""
    if dialect == "demo":
        out = {"value_proj.weight": weights["value.weight"], "value_proj.bias": weights["value.bias"]}
        for kind in ("weight", "bias"):
            parts = weights[f"key.{kind}"].chunk(streams)
            out |= {f"key_projs.{i}.{kind}": part for i, part in enumerate(parts)}
        for ours, name in _DEMO_NORMS.items():
            out |= {f"{name}.{i}.weight": gain for i, gain in enumerate(weights[ours])}
        return {**out, "short_conv.conv.weight": weights["conv_weight"]}
    if dialect == "deepseek-v4.1":
        gains = {"q_weight": weights["query_norm"], "k_weight": weights["key_norm"]}
        return {"wkv.weight": torch.cat([weights["key.weight"], weights["value.weight"]]), **gains}
    out = {"key_proj.weight": weights["key.weight"], "value_proj.weight": weights["value.weight"]}
    out |= {f"{name}.weight": (weights[ours].float() - 1).flatten() for ours, name in _QWEN_NORMS.items()}
    return {**out, "conv1d.weight": weights["conv_weight"]}


_DEMO_NORMS = {"key_norm": "norm1", "query_norm": "norm2", "conv_norm": "short_conv.norms"}
_QWEN_NORMS = {"key_norm": "norm_key", "query_norm": "norm_query", "conv_norm": "norm_conv"}
