"""Configurations and presets: what is refused, and that the presets have the published sizes."""

from __future__ import annotations

import json
import time

import pytest
import torch

from engram import EngramConfig, EngramMemory, HashLayout, TokenMap


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layers": ()}, "layers must be"),
        ({"layers": (3, 1)}, "ascending"),
        ({"orders": (1, 2)}, "orders must be"),
        ({"orders": (3, 2)}, "ascending"),
        ({"heads": 0}, "heads and head_dim"),
        ({"rows_per_head": (10, 20, 30)}, "3 numbers for 2 orders"),
        ({"rows_per_head": 0}, "rows_per_head must be >= 1"),
        ({"gate": "tanh"}, "gate must be one of signed_sqrt, plain, none"),
        ({"conv_kernel": -1}, "conv_kernel"),
        ({"table_init": "zero", "train_tables": False}, "frozen table of zeros"),
        ({"pad_id": -1}, "pad_id"),
        ({"table_dtype": "float16"}, "table_dtype must be one of"),
        ({"orders": (2, 17)}, "orders must be at most 16, not 17"),
        ({"orders": range(2, 2**31)}, "orders must have at most 65,536 numbers"),
        (
            {"heads": 65_536},
            "1 layers x 2 orders x 65,536 heads are 131,072 hash heads: one model may have at most 65,536",
        ),
        ({"gate_eps": float("nan")}, "gate_eps must be finite"),
        ({"gate_eps": 0.0}, "gate_eps, the epsilon of a float32 norm, must be at least 1.18e-38, not 0"),
        ({"gate_eps": 1e-50}, "gate_eps, the epsilon"),
        ({"conv_eps": float("inf")}, "conv_eps must be finite"),
        ({"conv_eps": -1e-6}, "conv_eps, the epsilon"),
    ],
)
def test_bad_combinations_are_refused_with_a_reason(changes, reason):
    with pytest.raises(ValueError, match=reason):
        EngramConfig().replace(**changes)


def test_config_survives_json_and_refuses_unknown_fields():
    config = EngramConfig(layers=(1, 4), rows_per_head=(10, 20), gate_eps=None)
    assert EngramConfig.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match="unknown EngramConfig fields: gait"):
        EngramConfig.from_json('{"gait": "plain"}')


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown preset 'papr': choose one of demo, paper-27b, paper-40b"):
        EngramConfig.preset("papr")


@pytest.mark.parametrize(
    ("name", "rows", "billions", "fusion"),
    [
        # the paper rounds down to 5.7B and 18.5B; rows are the primes above rows_per_head, summed
        ("paper-27b", {1: 36_199_972, 14: 36_204_260}, 5.79, True),
        ("paper-40b", {1: 115_837_464, 14: 115_841_428}, 18.53, True),
        ("demo", {1: 10_344_164, 15: 10_348_242}, 1.32, False),
    ],
)
def test_presets_build_on_the_meta_device_with_the_published_sizes(name, rows, billions, fusion):
    config = EngramConfig.preset(name)
    with torch.device("meta"):
        memory = EngramMemory(config, TokenMap.identity(98_627), hidden_size=2560, streams=4)
    assert {layer: table.rows for layer, table in memory.tables.items()} == rows
    assert round(memory.table_parameters() / 1e9, 2) == billions
    assert all(p.device.type == "meta" for p in memory.parameters())
    if fusion:  # W_V and four W_K of 2560 x 1280, three gains and a convolution of 4 taps per stream
        expected = 5 * 2560 * 1280 + 4 * 2560 * 3 + 4 * 2560 * 4
        assert sum(p.numel() for p in memory.fusions["1"].parameters()) == expected


def test_a_preset_refuses_the_token_map_of_another_tokenizer():
    with torch.device("meta"), pytest.raises(ValueError, match="comes from another tokenizer"):
        EngramMemory(EngramConfig.preset("demo"), TokenMap.identity(99_092), hidden_size=64)


def test_rows_of_the_meta_tables_equal_the_layout():
    config = EngramConfig.preset("paper-27b")
    layout = HashLayout.build(98_627, config.layers, config.orders, config.heads, config.rows_per_head, pad_id=2)
    assert all(p >= 2_262_400 for layer in layout.layers for order in layout.moduli[layer] for p in order)


@pytest.mark.parametrize(
    "wrong",
    [{"layers": (1.7,)}, {"layers": "12"}, {"layers": 1}, {"heads": 2.5}, {"rows_per_head": 1e6}, {"head_dim": True}],
)
def test_numbers_that_are_not_whole_are_named_and_never_rounded(wrong):
    (name,) = wrong
    with pytest.raises(TypeError, match=f"{name} must be"):
        EngramConfig(**wrong)
    with pytest.raises(ValueError, match=f"{name} must be"):
        EngramConfig.from_json(json.dumps({name: wrong[name]}))


@pytest.mark.parametrize("std", [float("nan"), float("inf"), -1.0])
def test_a_standard_deviation_of_rows_that_is_not_a_number_is_refused(std):
    with pytest.raises(ValueError, match="table_std"):
        EngramConfig(table_std=std)


@pytest.mark.parametrize(
    "wrong",
    [
        {"conv_eps": "x"},
        {"conv_eps": None},
        {"gate_eps": "1e-6"},
        {"table_std": True},
        {"bias": 1},
        {"train_tables": "no"},
    ],
)
def test_values_of_another_kind_than_the_fields_are_named(wrong):
    (name,) = wrong
    with pytest.raises(TypeError, match=f"{name} must be"):
        EngramConfig(**wrong)
    with pytest.raises(ValueError, match=f"EngramConfig: {name} must be"):
        EngramConfig.from_json(json.dumps(wrong))


@pytest.mark.parametrize("text", ["[]", "[" * 10**5, '{"heads": NaN}', '{"table_std": 1e999}', "", '"x"'])
def test_text_that_is_not_an_object_of_finite_numbers_is_a_value_error(text):
    with pytest.raises(ValueError):
        EngramConfig.from_json(text)


def test_the_most_heads_that_are_allowed_get_their_primes_in_seconds():
    begun = time.perf_counter()
    layout = HashLayout.build(100, (1, 2), (2, 3), 2**12, 2**40, pad_id=0)  # a quarter of them
    assert time.perf_counter() - begun < 5 and len(layout.offsets[2]) == 2**13
    with pytest.raises(ValueError, match="131,072 hash heads: one model may have at most 65,536"):
        HashLayout.build(100, (1, 2), (2, 3), 2**15, 100, pad_id=0)


def test_the_epsilon_of_deepseek_v41_flash_tells_small_values_apart_and_never_gives_nan():
    config = EngramConfig.preset("deepseek-v4.1-flash")
    assert config.gate_eps == 1e-20
    small = config.replace(
        layers=(1,), heads=1, head_dim=32, rows_per_head=50, compressed_vocab=None, table_dtype="float32"
    )
    gates = {}
    for eps in (1e-20, 1e-6):
        torch.manual_seed(0)
        fusion = EngramMemory(small.replace(gate_eps=eps), TokenMap.identity(50), 64).fusions["1"]
        torch.manual_seed(1)
        hidden, rows = torch.randn(1, 7, 1, 64), torch.randn(1, 7, small.d_mem)
        scales = torch.tensor([0.0, 1e-30, 1e-22, 1e-12, 1e-4, 1.0, 1e4]).view(1, 7, 1)
        gates[eps] = fusion.gate(rows * scales, hidden * scales.unsqueeze(-1)).detach().flatten()
        out, _ = fusion(rows * scales, hidden * scales.unsqueeze(-1))
        assert gates[eps].isfinite().all() and out.isfinite().all()
    assert (gates[1e-20] - gates[1e-6]).abs()[4] > 0.05  # values near 1e-4
    assert torch.allclose(gates[1e-20][5:], gates[1e-6][5:], atol=1e-4)


def test_a_saved_memory_keeps_the_epsilon_it_was_saved_with(tmp_path):
    config = EngramConfig(layers=(1,), heads=1, head_dim=8, rows_per_head=50, gate_eps=1e-6, conv_kernel=0)
    EngramMemory(config, TokenMap.identity(50), 4).save(tmp_path / "m")
    assert EngramMemory.load(tmp_path / "m").config.gate_eps == 1e-6
