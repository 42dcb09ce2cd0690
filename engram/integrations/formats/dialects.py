"""The released dialects: their config fields and tensor names, translated to EngramConfig and EngramFusion and back.

    demo            the paper's single-file demo: float rows, biases, conv, one state dict per module
    deepseek-v4.1   DeepSeek-V4.1-Flash: e4m3 rows with an e8m0 scale per 32 values, one fused projection, no conv
    qwen            Qwen3.8-Flash-Next (Qwen4-Exp "PLE"): raw ids, EOS reset, split table, norm gains stored minus 1

The meaning of each field is in paper_notes/dialects.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from engram.addressing import HashLayout
from engram.config import LONGEST, EngramConfig, as_integers
from engram.memory import build_layout
from engram.tables.codecs import get_codec

DIALECTS = ("demo", "deepseek-v4.1", "qwen")

# Prefix of a layer's tensors.
_LAYER = r"(?:.*\.)?"
LARGEST_VOCABULARY = 1 << 26  # ids; the largest tokenizers have 2^20
HY4 = (
    "Tencent's Hy4-flash (hy_v4_flash) cannot be read: its layer numbers, heads, row width, moduli, multipliers (drawn "
    "when the model was built), boundary rule, gate and tensor names are not known to this version, and rows that are "
    "read under other rules are wrong without an error"
)
TABLE = {
    "demo": re.compile(rf"((?:{_LAYER}(\d+)\.)?(?:engram\.)?)multi_head_embedding\.embedding\.weight"),
    "deepseek-v4.1": re.compile(rf"({_LAYER}layers\.(\d+)\.engram\.)(?:embed|embed_tokens)\.weight"),
    "qwen": re.compile(
        rf"({_LAYER}layers\.(\d+)\.ple\.)ple_embedding\.ngram_embedding\."
        r"(?:shard_(\d+)\.weight|shards\.(\d+)(?:\.weight)?|weight)"
    ),
}


def _field(fields: Mapping[str, Any], *names: str) -> Any:
    """Return a field under the first of its names that is present. Raise ValueError if the config has none of them."""
    for name in names:
        if fields.get(name) is not None:
            return fields[name]
    raise ValueError(f"this config lacks {' or '.join(names)}")


def _number(fields: Mapping[str, Any], name: str, usual: int | None = None) -> int:
    """Return a whole number >= 1 from JSON, where it may be a float such as 8.0. usual: the value if it is missing."""
    value = fields[name] if usual is None else fields.get(name, usual)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value) or value < 1:
        raise ValueError(f"{name} must be a whole number >= 1, not {value!r}")
    return int(value)


def longest_orders(longest: int) -> tuple[int, ...]:
    """Return the orders 2 .. longest. Raise ValueError for a length that no memory has, before a tuple is made."""
    if not 2 <= longest <= LONGEST:
        raise ValueError(f"the longest n-gram of a memory has 2 to {LONGEST} tokens, not {longest:,}")
    return tuple(range(2, longest + 1))


def vocabulary(size: int) -> int:
    """Return `size`, or raise ValueError if it is too large: a token map takes 8 bytes per id."""
    if not 1 <= size <= LARGEST_VOCABULARY:
        raise ValueError(f"a vocabulary has 1 to {LARGEST_VOCABULARY:,} ids, not {size:,}")
    return size


def _text(published: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the fields about text, which multimodal models nest. Raise ValueError if they are not an object."""
    text = published.get("text_config") or published if isinstance(published, Mapping) else published
    if not isinstance(text, Mapping):
        raise ValueError(f"a config (or its text_config) is a JSON object, not {text!r}")
    return text


def dialect_of_config(published: Mapping[str, Any]) -> str:
    """Return the dialect of a config.json. Raise ValueError if it has no n-gram memory."""
    text = _text(published)
    refuse_unknown(published)
    for dialect, field in (("deepseek-v4.1", "engram_layer_ids"), ("qwen", "ple_layer_ids"), ("demo", "layer_ids")):
        if text.get(field):
            return dialect
    raise ValueError(
        "this config names no n-gram memory: expected engram_layer_ids (DeepSeek-V4.1), ple_layer_ids (Qwen4-Exp) or "
        "layer_ids (the released demo)"
    )


def refuse_unknown(published: Mapping[str, Any]) -> None:
    """Raise ValueError for models with an n-gram memory whose rules are not known to this version."""
    kinds = {str(fields.get("model_type")) for fields in (published, _text(published))}
    if any(kind.startswith("hy_v4") for kind in kinds):
        raise ValueError(HY4)


def config_from_hf(published: Mapping[str, Any]) -> EngramConfig:
    """Return the EngramConfig of a published config.json (as a dict), nested under text_config or not.

    Raises:
        ValueError: it has no memory, a field is missing, or its row counts do not follow from its own rules.
    """
    text = _text(published)
    dialect = dialect_of_config(published)
    try:
        config = {"demo": _from_demo, "deepseek-v4.1": _from_deepseek, "qwen": _from_qwen}[dialect](text)
    except KeyError as error:
        raise ValueError(f"this {dialect} config cannot be read: it lacks {error}") from error
    except (TypeError, OverflowError) as error:
        raise ValueError(f"this {dialect} config cannot be read: {error}") from error
    published_rows = text.get("engram_num_embeddings")
    if published_rows is not None:
        rows = list(layout_of(config).rows.values())
        if not isinstance(published_rows, list) or published_rows != rows:
            raise ValueError(
                f"engram_num_embeddings is {str(published_rows)[:80]}, but engram_vocab_size and its primes give {rows}"
            )
    return config


_KNOWN = {
    "demo": "layer_ids max_ngram_size n_embed_per_ngram n_head_per_ngram engram_vocab_size pad_id seed kernel_size "
    "compressed_vocab_size tokenizer_name_or_path",
    "deepseek-v4.1": "engram_layer_ids engram_num_embeddings engram_max_ngram_size engram_n_heads engram_head_dim "
    "engram_vocab_size engram_compressed_vocab_size engram_pad_token_id engram_pad_id",
    "qwen": "ple_layer_ids ple_embed_dim ple_conv_kernel_size ngram_size heads_per_ngram ngram_vocab_size_base "
    "make_ngram_vocab_size_divisible_by split_ngram_parts",
}


def unknown_in_hf(published: Mapping[str, Any]) -> list[str]:
    """Return the fields of a published config that are named after a memory and that `config_from_hf` does not read."""
    known = set(_KNOWN[dialect_of_config(published)].split())
    return sorted(n for n in _text(published) if re.search(r"engram|ngram|^ple_", n) and n not in known)


def _from_demo(text: Mapping[str, Any]) -> EngramConfig:
    heads, width = _number(text, "n_head_per_ngram"), _number(text, "n_embed_per_ngram")
    rows = as_integers("engram_vocab_size", text["engram_vocab_size"])
    if width % heads:
        raise ValueError(f"n_embed_per_ngram {text['n_embed_per_ngram']} is not a multiple of n_head_per_ngram {heads}")
    vocab = None if text.get("compressed_vocab_size") is None else _number(text, "compressed_vocab_size")
    return EngramConfig(
        layers=tuple(text["layer_ids"]),  # their order decides the primes: EngramConfig refuses any but ascending
        orders=longest_orders(_number(text, "max_ngram_size")),
        heads=heads,
        head_dim=width // heads,
        rows_per_head=rows[0] if len(set(rows)) == 1 else tuple(rows),
        pad_id=int(_field(text, "pad_id")),
        seed=int(text.get("seed", 0)),
        conv_kernel=int(text.get("kernel_size", 4)),
        bias=True,
        table_init="normal",
        conv_init="uniform",
        gate_eps=None,
        conv_eps=1e-5,
        compressed_vocab=None if vocab is None else vocabulary(vocab),
    )


def _from_deepseek(text: Mapping[str, Any]) -> EngramConfig:
    eps = float(text.get("rms_norm_eps", 1e-6))
    return EngramConfig(
        layers=tuple(text["engram_layer_ids"]),
        orders=longest_orders(_number(text, "engram_max_ngram_size")),
        heads=_number(text, "engram_n_heads"),
        head_dim=_number(text, "engram_head_dim"),
        rows_per_head=_number(text, "engram_vocab_size"),
        pad_id=int(_field(text, "engram_pad_token_id", "engram_pad_id")),
        conv_kernel=0,
        gate_eps=eps,
        boundary="dead",
        table_dtype="bfloat16",
        compressed_vocab=vocabulary(int(_field(text, "engram_compressed_vocab_size"))),
    )


def _from_qwen(text: Mapping[str, Any]) -> EngramConfig:
    orders, heads = longest_orders(_number(text, "ngram_size", 3)), _number(text, "heads_per_ngram", 8)
    eos = _field(text, "eos_token_id")
    if isinstance(eos, list) and not eos:
        raise ValueError("eos_token_id is an empty list: it must name the token that ends a text")
    width, eps = int(_field(text, "ple_embed_dim", "hidden_size")), float(text.get("rms_norm_eps", 1e-6))
    if width % (len(orders) * heads):
        raise ValueError(f"ple_embed_dim {width} is not a multiple of the {len(orders) * heads} heads")
    return EngramConfig(
        layers=tuple(layer - 1 for layer in text["ple_layer_ids"]),  # counted from 1 there; in this order
        orders=orders,
        heads=heads,
        head_dim=width // (len(orders) * heads),
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
        compressed_vocab=vocabulary(_number(text, "vocab_size", 248_320)),
    )


def config_to_hf(config: EngramConfig, dialect: str, hidden_size: int, streams: int) -> dict[str, Any]:
    """Return the fields of a dialect's config.json; `config_from_hf` reads them back to the same addresses."""
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
    """Raise ValueError if the dialect cannot express a rule of the memory: its rows would be read wrongly there."""
    rows = config.row_counts
    rules: dict[str, tuple[Any, ...]] = {
        "hash": ("multiply_xor",),
        "gate": ("signed_sqrt",),
        "orders": (tuple(range(2, config.orders[-1] + 1)),),
        "inject": ("residual",),
        "conv_dilation": (None, config.orders[-1]),
    }
    if dialect == "demo":
        rules |= {"boundary": ("pad",), "generator": ("pcg64",), "row_multiple": (1,), "bias": (True,)}
        rules |= {"gate_eps": (None,), "conv_eps": (1e-5,)}
    elif dialect == "deepseek-v4.1":
        rules |= {"boundary": ("dead",), "generator": ("pcg64",), "row_multiple": (1,), "seed": (0,)}
        rules |= {"bias": (False,), "conv_kernel": (0,)}
        get_codec("fp8", config.head_dim)
    elif dialect == "qwen":
        rules |= {"boundary": ("eos",), "generator": ("splitmix64",), "bias": (False,), "conv_eps": (config.gate_eps,)}
    else:
        raise ValueError(f"unknown dialect {dialect!r}; there are {', '.join(DIALECTS)}")
    if dialect != "demo" and len(set(rows)) > 1:
        raise ValueError(f"{dialect} has one rows_per_head for all orders, this memory has {rows}")
    if dialect != "deepseek-v4.1" and config.conv_kernel < 2:
        raise ValueError(f"{dialect} has a short convolution, this memory has conv_kernel={config.conv_kernel}")
    if dialect != "demo" and config.gate_eps is None:
        raise ValueError(f"{dialect} has an epsilon in its norms, this memory has gate_eps=None")
    if dialect != "demo" and config.compressed_vocab is None:
        raise ValueError(f"{dialect} has a vocabulary size in its config: give the memory a compressed_vocab")
    for name, allowed in rules.items():
        if getattr(config, name) not in allowed:
            raise ValueError(
                f"{dialect} cannot express {name}={getattr(config, name)!r} (there it is {allowed[0]!r}): rows that "
                f"were trained under one rule would be read under another"
            )


def layout_of(config: EngramConfig, pad_id: int = 0) -> HashLayout:
    """Return the hash layout of a configuration, for its vocabulary or, if it has none, any: rows do not depend on it.

    pad_id: compressed id that positions before the start of a text read as; needed if the layout is used for addresses.
    """
    return build_layout(config, config.compressed_vocab or 2**31 - 1, pad_id)


def table_sizes(config: EngramConfig, codec: str | None = None) -> dict[int, tuple[int, int]]:
    """Return {layer: (rows, bytes)} of a configuration's tables, without allocation. codec: None for table_dtype."""
    width = getattr(torch, config.table_dtype).itemsize * config.head_dim
    row = width if codec is None else get_codec(codec, config.head_dim).row_bytes(config.head_dim)
    return {layer: (rows, rows * row) for layer, rows in layout_of(config).rows.items()}


def fusion_from(dialect: str, get: Callable[[str], Tensor], config: EngramConfig, streams: int) -> dict[str, Tensor]:
    """Return EngramFusion's weights of one layer from a dialect's. get(name below the prefix) gives a float tensor."""
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
    """Return a dialect's tensors (names below the layer's prefix) from EngramFusion's weights."""
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
