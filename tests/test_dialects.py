"""The shipped dialects: published sizes, config spellings, and rules that equal code of other projects."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hasher import check
from tokenizers_v3_v4 import token_map as real_token_map

from engram import EngramConfig, EngramMemory, HashLayout, NgramHasher, TokenMap
from engram.integrations.formats.dialects import config_from_hf, config_to_hf, fusion_from, layout_of, table_sizes
from engram.memory.recall import MemoryCache
from engram.tables import EncodedTable

V41 = "deepseek-v4.1-flash"
QWEN = "qwen3.8-flash-next"
GOLDEN = json.loads((Path(__file__).parent / "golden" / "deepseek_v41.json").read_text())
EOS = 7

# The fields of the published files that concern the memory.
V41_JSON = {
    "model_type": "deepseek_v41",
    "text_config": {
        "engram_layer_ids": [1, 14], "engram_num_embeddings": [384_006_168, 384_016_682], "engram_max_ngram_size": 4,
        "engram_n_heads": 8, "engram_head_dim": 256, "engram_vocab_size": 16_000_000,
        "engram_compressed_vocab_size": 99_092, "engram_pad_token_id": 2, "hidden_size": 5120, "hc_mult": 4,
        "rms_norm_eps": 1e-20,
    },
}  # fmt: skip
QWEN_JSON = {
    "text_config": {
        "ple_layer_ids": [2], "ple_embed_dim": 2560, "ple_conv_kernel_size": 4, "ngram_size": 3, "heads_per_ngram": 8,
        "ngram_vocab_size_base": 20_000_000, "make_ngram_vocab_size_divisible_by": 128, "seed": 1234,
        "eos_token_id": 248_044, "vocab_size": 248_320, "hidden_size": 2560, "hc_count": 4, "rms_norm_eps": 1e-6,
    },
}  # fmt: skip
DEMO_JSON = {
    "tokenizer_name_or_path": "deepseek-ai/DeepSeek-V3", "engram_vocab_size": [646_400, 646_400], "max_ngram_size": 3,
    "n_embed_per_ngram": 512, "n_head_per_ngram": 8, "layer_ids": [1, 15], "pad_id": 2, "seed": 0, "kernel_size": 4,
}  # fmt: skip


# --- published sizes and spellings ---


def test_v41_preset_has_the_published_rows_and_bytes_with_nothing_allocated():
    config = EngramConfig.preset(V41)
    sizes = table_sizes(config, "fp8")
    assert {layer: rows for layer, (rows, _) in sizes.items()} == {1: 384_006_168, 14: 384_016_682}
    assert round(sum(size for _, size in sizes.values()) / 2**30, 2) == 188.83
    assert len(config.layers) * config.columns * 264 == 12_672  # bytes read per token
    with torch.device("meta"):
        tables = {i: EncodedTable(rows, config.head_dim, "fp8") for i, (rows, _) in sizes.items()}
        memory = EngramMemory(config, TokenMap.identity(99_092), 5120, 4, tables=tables)
    assert memory.codec == "fp8" and {i: t.nbytes for i, t in memory.tables.items()} == {
        i: s[1] for i, s in sizes.items()
    }


def test_v41_preset_gives_the_golden_multipliers_and_moduli():
    layout = layout_of(EngramConfig.preset(V41), GOLDEN["pad_id"])
    for layer, golden in GOLDEN["layers"].items():
        assert [str(m) for m in layout.multipliers[int(layer)]] == golden["multipliers"]
        assert [list(heads) for heads in layout.moduli[int(layer)]] == golden["moduli"]


def test_v41_preset_hashes_with_the_real_tokenizers_map():
    token_map = real_token_map("v4")
    assert (token_map.size, token_map.digest) == (
        EngramConfig.preset(V41).compressed_vocab,
        GOLDEN["token_map_sha256_int64_le"],
    )
    layout = layout_of(EngramConfig.preset(V41), int(token_map.table[2]))
    ids = np.random.default_rng(0).integers(0, len(token_map.table), (2, 30))
    ids[0, 4] = ids[0, 5] = ids[1, 0] = -1
    check(layout, token_map, ids)


def test_qwen_preset_has_the_published_rows_padded():
    layout = layout_of(EngramConfig.preset(QWEN))
    assert sum(p for heads in layout.moduli[1] for p in heads) == 320_001_446
    assert layout.rows == {1: 320_001_536}
    assert table_sizes(EngramConfig.preset(QWEN)) == {1: (320_001_536, 320_001_536 * 320)}


@pytest.mark.parametrize(
    ("published", "preset"),
    [(V41_JSON, V41), (QWEN_JSON, QWEN), (DEMO_JSON | {"compressed_vocab_size": 98_627}, "demo")],
)
def test_published_configs_read_as_the_presets(published, preset):
    assert config_from_hf(published) == EngramConfig.preset(preset)
    assert config_from_hf(published.get("text_config", published)) == EngramConfig.preset(preset)  # not nested


def test_the_other_spelling_of_the_pad_id_is_read():
    text = dict(V41_JSON["text_config"])
    text["engram_pad_id"] = text.pop("engram_pad_token_id") + 3
    assert config_from_hf({"text_config": text}).pad_id == 5


@pytest.mark.parametrize("preset", [V41, QWEN, "demo"])
def test_a_config_survives_its_dialects_spelling(preset):
    config = EngramConfig.preset(preset)
    dialect = {V41: "deepseek-v4.1", QWEN: "qwen", "demo": "demo"}[preset]
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config, dialect, 64, 4)))) == config


@pytest.mark.parametrize(
    ("published", "reason"),
    [
        ({"hidden_size": 3}, "names no n-gram memory"),
        ({"text_config": V41_JSON["text_config"] | {"engram_num_embeddings": [384_006_168, 384_006_168]}},
         "engram_num_embeddings is .* but engram_vocab_size and its primes give"),
        ({"engram_layer_ids": [1]}, "cannot be read: it lacks 'engram_max_ngram_size'"),
        ({"ple_layer_ids": [1]}, "lacks eos_token_id"),
        (DEMO_JSON | {"layer_ids": [15, 1]}, r"ascending and >= 0, not \(15, 1\)"),
        (QWEN_JSON["text_config"] | {"ple_layer_ids": [4, 2]}, r"ascending and >= 0, not \(3, 1\)"),
        (QWEN_JSON["text_config"] | {"ple_embed_dim": 2561}, "ple_embed_dim 2561 is not a multiple"),
        (DEMO_JSON | {"n_embed_per_ngram": 513}, "n_embed_per_ngram 513"),
        (DEMO_JSON | {"n_head_per_ngram": 0}, "n_head_per_ngram must be a whole number >= 1, not 0"),
        (DEMO_JSON | {"max_ngram_size": 2**31}, "the longest n-gram of a memory has 2 to 16 tokens, not 2,147,483,648"),
        (DEMO_JSON | {"n_embed_per_ngram": "512"}, "n_embed_per_ngram must be a whole number"),
        (DEMO_JSON | {"engram_vocab_size": 3}, "engram_vocab_size must be a sequence"),
        (QWEN_JSON["text_config"] | {"ngram_size": 2**31}, "2 to 16 tokens, not 2,147,483,648"),
        (QWEN_JSON["text_config"] | {"heads_per_ngram": 0}, "heads_per_ngram must be a whole number >= 1"),
        (QWEN_JSON["text_config"] | {"vocab_size": 10**9}, "a vocabulary has 1 to 67,108,864 ids, not 1,000,000,000"),
        (QWEN_JSON["text_config"] | {"eos_token_id": []}, "eos_token_id is an empty list"),
        (QWEN_JSON["text_config"] | {"rms_norm_eps": 0}, "gate_eps, the epsilon of a float32 norm"),
        (V41_JSON["text_config"] | {"engram_max_ngram_size": 2**31}, "2 to 16 tokens"),
        (V41_JSON["text_config"] | {"engram_n_heads": 65_536}, "393,216 hash heads: one model may have at most 65,536"),
        (V41_JSON["text_config"] | {"engram_layer_ids": "12"}, "layers must be"),
        (V41_JSON["text_config"] | {"engram_num_embeddings": 5}, "engram_num_embeddings is 5"),
        (V41_JSON["text_config"] | {"model_type": "hy_v4_flash"}, "Hy4-flash .* layer numbers, heads, row width"),
        ({"model_type": "hy_v4_flash", "num_hidden_layers": 4}, "Hy4-flash"),
        ({"text_config": {"model_type": "hy_v4_flash_text"}}, "Hy4-flash"),
    ],
)  # fmt: skip
def test_a_config_that_makes_no_sense_is_refused_with_the_field(published, reason):
    with pytest.raises(ValueError, match=reason):
        config_from_hf(published)


@pytest.mark.parametrize(
    ("preset", "dialect", "changes", "reason"),
    [
        ("paper-27b", "qwen", {}, "cannot express boundary='pad'"),
        (V41, "demo", {}, "short convolution"),
        (QWEN, "deepseek-v4.1", {}, "cannot express"),
        (V41, "deepseek-v4.1", {"gate": "none"}, "cannot express gate='none'"),
        (V41, "deepseek-v4.1", {"orders": (2, 4)}, "orders="),
        (QWEN, "qwen", {"rows_per_head": (100, 200)}, "one rows_per_head for all orders"),
        ("demo", "demo", {"conv_dilation": 2}, "conv_dilation=2"),
    ],
)
def test_a_memory_that_a_dialect_has_no_words_for_is_refused(preset, dialect, changes, reason):
    with pytest.raises(ValueError, match=reason):
        config_to_hf(EngramConfig.preset(preset).replace(**changes), dialect, 64, 4)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"boundary": "bos"}, "boundary must be one of pad, dead, eos"),
        ({"generator": "mt19937"}, "generator must be one of pcg64, splitmix64"),
        ({"generator": "splitmix64", "hash": "xxh64"}, "generator='splitmix64' draws multipliers"),
        ({"row_multiple": 0}, "row_multiple must be >= 1"),
    ],
)
def test_bad_combinations_of_dialect_fields_are_refused(changes, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        EngramConfig().replace(**changes)


# --- layouts ---


def layout(boundary: str, orders=(2, 3, 4), generator="pcg64", family="multiply_xor") -> HashLayout:
    return HashLayout.build(50, (1, 3), orders, 2, 97, EOS, 5, family, boundary, generator, 8)


def test_a_dialects_layout_survives_json_and_other_layouts_keep_their_digest():
    one = layout("eos", generator="splitmix64")
    again = HashLayout.from_json(one.to_json())
    assert again == one and again.multipliers == one.multipliers and again.rows == one.rows
    assert len({one.digest, layout("eos").digest, layout("dead").digest, layout("pad").digest}) == 4
    plain = HashLayout.build(1000, [1, 3], [2, 3], 2, [97, 89], pad_id=2)
    assert "boundary" not in plain.to_json() and "generator" not in plain.to_json()


@pytest.mark.parametrize(
    ("field", "value"), [("boundary", "pad"), ("boundary", "sos"), ("generator", "pcg64"), ("row_multiple", 4)]
)
def test_json_whose_dialect_was_altered_is_refused(field, value):
    altered = json.loads(layout("eos", generator="splitmix64").to_json()) | {field: value}
    with pytest.raises(ValueError, match=r"hash layout|boundary must be one of"):
        HashLayout.from_json(json.dumps(altered))


# --- boundary rules: C, NumPy and torch equal the slow reference ---


def small_map() -> TokenMap:
    return TokenMap(np.concatenate([np.arange(50), np.arange(16, 6, -1)]))  # raw 59 is compressed 7, EOS too


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_every_path_equals_the_reference_with_boundaries_anywhere(data):
    boundary = data.draw(st.sampled_from(["dead", "eos", "pad"]))
    tokens = st.sampled_from([*range(12), 59, *([-1, -1] if boundary == "dead" else [])])
    time, back = data.draw(st.integers(1, 12)), data.draw(st.integers(0, 3))
    rows = st.lists(tokens, min_size=time, max_size=time)
    before = st.lists(st.sampled_from([*range(12), -1, 59]), min_size=back, max_size=back)
    ids = [data.draw(rows), data.draw(rows)]
    lookback = [data.draw(before), data.draw(before)] if back else None
    documents = (
        np.sort(np.array(data.draw(st.lists(rows, min_size=2, max_size=2))), 1) if data.draw(st.booleans()) else None
    )
    family = data.draw(st.sampled_from(["multiply_xor", "xxh64"]))
    check(layout(boundary, family=family), small_map(), np.array(ids), lookback, documents)


def test_long_texts_with_boundaries_at_the_edges_of_the_kernels_blocks():
    ids = np.random.default_rng(0).integers(8, 60, (2, 300))
    for boundary, mark in (("dead", -1), ("eos", EOS)):
        marked = ids.copy()
        marked[0, [0, 125, 127, 128, 255, 256, 299]] = mark
        check(layout(boundary), small_map(), marked)


def test_eos_is_known_by_its_compressed_id():
    raw, alias = np.array([[8, EOS, 9, 10]]), np.array([[8, 59, 9, 10]])
    found = [check(layout("eos"), small_map(), ids)[1] for ids in (raw, alias)]
    np.testing.assert_array_equal(*found)


def test_only_minus_one_is_dead_and_only_where_the_rule_has_it():
    run = NgramHasher(layout("dead"), small_map())
    with pytest.raises(ValueError, match=r"ids\[0, 1\] is -2: placeholder ids .* only -1 marks a dead position"):
        run(np.array([[3, -2]]))
    for boundary in ("pad", "eos"):
        with pytest.raises(ValueError, match=r"ids\[0, 1\] is -1: placeholder"):
            NgramHasher(layout(boundary), small_map())(np.array([[3, -1]]))


def test_text_before_a_dead_position_or_an_eos_never_reaches_behind_it():
    for boundary, mark in (("dead", -1), ("eos", EOS)):
        one, other = np.array([[9, 10, 11, mark, 12, 13, 14]]), np.array([[20, 21, 22, mark, 12, 13, 14]])
        run = NgramHasher(layout(boundary), small_map())
        np.testing.assert_array_equal(run(one)[1][:, 4:], run(other)[1][:, 4:])
        assert (run(one)[1][:, :3] != run(other)[1][:, :3]).any()


# --- DeepSeek-V4.1: the whole layer, written a second time from the specification alone ---


def v41_layer(config, token_map, tables, weights, ids, hidden):
    """Plain Python and float64, one position at a time: V4.1's rules as the specification words them."""
    V, N, K = token_map.size, config.orders[-1], config.heads
    half = max(1, ((2**63 - 1) // V) // 2)
    pad, seen, out = int(token_map.table[config.pad_id]), set(), {}

    def prime_after(c):
        c += 1
        while c in seen or any(c % i == 0 for i in range(2, int(c**0.5) + 1)):
            c += 1
        seen.add(c)
        return c

    for layer in config.layers:
        m = [2 * int(r) + 1 for r in np.random.default_rng(10007 * layer).integers(0, half, size=N, dtype=np.int64)]
        moduli, start = [], [0]
        for _ in range(2, N + 1):
            c = config.rows_per_head - 1
            for _ in range(K):
                c = prime_after(c)
                moduli.append(c)
                start.append(start[-1] + c)
        B, T, M, d = hidden.shape
        result = torch.zeros(B, T, M, d, dtype=torch.float64)
        for b in range(B):
            for t in range(T):
                if ids[b][t] == -1:
                    continue  # gate 0: nothing is added
                window, latched = [int(token_map.table[ids[b][t]])], False
                for step in range(1, N):
                    latched = latched or t - step < 0 or ids[b][t - step] == -1
                    window.append(pad if latched else int(token_map.table[ids[b][t - step]]))
                rows, column = [], 0
                for n in range(2, N + 1):
                    mix = 0
                    for i in range(n):
                        mix ^= window[i] * m[i]
                    for _ in range(K):
                        rows.append(tables[layer][start[column] + mix % moduli[column]].double())
                        column += 1
                projected = weights[layer]["wkv"].double() @ torch.cat(rows)
                value = projected[M * d :]
                for stream in range(M):
                    h, key = hidden[b, t, stream].double(), projected[stream * d : (stream + 1) * d]
                    h = h / (h.square().mean() + config.gate_eps).sqrt() * weights[layer]["q"][stream].double()
                    key = key / (key.square().mean() + config.gate_eps).sqrt() * weights[layer]["k"][stream].double()
                    s = float(h @ key) / d**0.5
                    s = np.sign(s) * max(abs(s), 1e-6) ** 0.5
                    result[b, t, stream] = value / (1 + np.exp(-s))
        out[layer] = result
    return out


V41_SMALL = EngramConfig.preset(V41).replace(
    layers=(1, 2), heads=2, head_dim=32, rows_per_head=89, compressed_vocab=50, table_dtype="float32"
)


def v41_memory() -> tuple[EngramMemory, dict]:
    torch.manual_seed(0)
    memory = EngramMemory(V41_SMALL, small_map(), hidden_size=12, streams=3).double()
    weights = {}
    for layer, table in memory.tables.items():
        table.write(torch.arange(table.rows), torch.randn(table.rows, table.dim))
        raw = {
            "wkv.weight": torch.randn(4 * 12, V41_SMALL.d_mem),
            "q_weight": torch.randn(3, 12),
            "k_weight": torch.randn(3, 12),
        }
        memory.fusions[str(layer)].load_state_dict(fusion_from("deepseek-v4.1", raw.__getitem__, V41_SMALL, 3))
        weights[layer] = {"wkv": raw["wkv.weight"], "q": raw["q_weight"], "k": raw["k_weight"]}
    return memory, weights


def test_a_v41_memory_equals_the_second_implementation_with_dead_positions():
    memory, weights = v41_memory()
    ids = torch.randint(0, 60, (2, 11), generator=torch.Generator().manual_seed(0))
    ids[0, 3] = ids[0, 4] = ids[1, 0] = ids[1, 9] = -1
    hidden = torch.randn(2, 11, 3, 12, dtype=torch.float64)
    tables = {layer: table.tensor for layer, table in memory.tables.items()}
    expected = v41_layer(V41_SMALL, small_map(), tables, weights, ids.tolist(), hidden)
    recall = memory.recall(ids)
    for layer in V41_SMALL.layers:
        found = memory[layer](hidden, recall)
        torch.testing.assert_close(found, expected[layer], rtol=1e-6, atol=1e-6)  # rows are float32
        assert not found[ids == -1].any() and found[ids >= 0].any(-1).all()


@pytest.mark.parametrize("pieces", [[1] * 11, [4, 1, 1, 5]])
def test_decoding_with_dead_positions_equals_the_full_forward(pieces):
    memory, _ = v41_memory()
    ids = torch.randint(0, 60, (1, 11), generator=torch.Generator().manual_seed(1))
    ids[0, 3] = ids[0, 7] = -1
    hidden, cache = torch.randn(1, 11, 3, 12, dtype=torch.float64), MemoryCache()
    whole = memory[1](hidden, memory.recall(ids))
    steps = zip(ids.split(pieces, 1), hidden.split(pieces, 1), strict=True)
    parts = [memory[1](h, memory.recall(i, cache=cache)) for i, h in steps]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-12, atol=1e-12)


def test_rows_of_dead_positions_get_no_gradient():
    memory = EngramMemory(V41_SMALL, small_map(), hidden_size=12, streams=3).train()
    ids = torch.tensor([[3, 4, -1, 5, -1]])
    recall = memory.recall(ids)
    memory[1](torch.randn(1, 5, 3, 12), recall).sum().backward()
    ((row_ids, gradient),) = memory.gradients[1]
    assert torch.equal(row_ids, recall.row_ids[1][ids >= 0]) and len(gradient) == 3


def test_a_convolution_sees_nothing_from_dead_positions():
    config = V41_SMALL.replace(conv_kernel=4, conv_init="uniform")
    memory = EngramMemory(config, small_map(), hidden_size=12).double()
    for table in memory.tables.values():
        table.write(torch.arange(table.rows), torch.randn(table.rows, table.dim))
    ids = torch.tensor([[-1, 3, 4, -1, 5, 6, 7, 8, 9]])
    hidden = torch.randn(1, 9, 12, dtype=torch.float64)
    changed = hidden.clone()
    changed[0, 3] += 1
    assert torch.equal(memory[1](hidden, memory.recall(ids)), memory[1](changed, memory.recall(ids)))


# --- Qwen4-Exp: transformers' own layer is the oracle ---


def ple_layer(layer=2):
    """Qwen4ExpTextPLELayer in float64 with everything random, its config, and our memory with the same weights."""
    pytest.importorskip("transformers", minversion="5.23")
    from test_offload import qwen_config
    from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextPLELayer

    hf = qwen_config()
    torch.manual_seed(0)
    ple = Qwen4ExpTextPLELayer(hf, layer, hf.ple_layer_ids.index(layer + 1)).double().eval()
    for weight in ple.parameters():
        torch.nn.init.normal_(weight)
    config = config_from_hf(hf.to_dict()).replace(table_dtype="float32")
    memory = EngramMemory(config, TokenMap.identity(hf.vocab_size), hf.hidden_size, hf.hc_count).double()
    table = ple.ple_embedding.ngram_embedding.weight.detach()
    table.copy_(table.float())  # our rows are float32
    memory.tables[layer].write(torch.arange(len(table)), table)
    get = ple.state_dict().__getitem__
    weights = fusion_from("qwen", get, config, hf.hc_count)
    memory.fusions[str(layer)].load_state_dict(weights)
    return hf, ple, memory


def qwen_text(T=24) -> torch.Tensor:
    ids = torch.randint(8, 64, (3, T), generator=torch.Generator().manual_seed(3))
    ids[0, 5] = ids[0, 6] = ids[1, 0] = ids[1, 20] = ids[2, 7] = EOS
    return ids


@pytest.mark.parametrize("layer", [0, 2])
def test_addresses_and_rows_equal_transformers_own(layer):
    _, ple, memory = ple_layer(layer)
    asked = []
    ple.ple_embedding.ngram_embedding.register_forward_pre_hook(lambda module, args: asked.append(args[0]))
    with torch.no_grad():
        rows = ple.ple_embedding(qwen_text(), None)
    recall = memory.recall(qwen_text())
    assert torch.equal(asked[0], recall.row_ids[layer])
    assert torch.equal(rows, recall.rows(layer).double())
    layout = memory.layout
    assert layout.rows[layer] == ple.ple_embedding.ngram_embedding.num_embeddings
    assert [p for heads in layout.moduli[layer] for p in heads] == ple.ple_embedding.head_vocab_sizes
    assert list(layout.multipliers[layer]) == ple.ple_embedding.layer_multipliers.tolist()


def test_gate_value_and_convolution_equal_transformers_own():
    hf, ple, memory = ple_layer()
    hidden = torch.randn(3, 24, hf.hc_count, hf.hidden_size, dtype=torch.float64)
    with torch.no_grad():
        expected = ple(hidden.flatten(2), qwen_text(), None)
        found = memory[2](hidden, memory.recall(qwen_text()))
    # its norms run in float32 whatever the input
    torch.testing.assert_close(found.flatten(2), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("pieces", [[24], [1] * 24, [5, 1, 1, 1, 13, 1, 2]])
def test_cached_decoding_with_eos_inside_equals_transformers_own(pieces):
    from transformers import DynamicCache

    hf, ple, memory = ple_layer()
    hidden = torch.randn(3, 24, hf.hc_count, hf.hidden_size, dtype=torch.float64)
    theirs, ours = DynamicCache(config=hf), MemoryCache()
    for ids, h in zip(qwen_text().split(pieces, 1), hidden.split(pieces, 1), strict=True):
        with torch.no_grad():
            expected = ple(h.flatten(2), ids, theirs)
            found = memory[2](h, memory.recall(ids, cache=ours))
        torch.testing.assert_close(found.flatten(2), expected, rtol=2e-5, atol=2e-5)
