"""Configurations and presets: what is refused, and that the presets have the published sizes."""

from __future__ import annotations

import json

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
        ({"gate": "tanh"}, "gate is one of signed_sqrt, plain, none"),
        ({"conv_kernel": -1}, "conv_kernel"),
        ({"table_init": "zero", "train_tables": False}, "frozen table of zeros"),
        ({"pad_id": -1}, "pad_id"),
        ({"table_dtype": "float16"}, "table_dtype is one of"),
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
    with pytest.raises(ValueError, match=r"unknown preset 'papr'; there are demo, paper-27b, paper-40b"):
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
def test_a_spread_of_rows_that_is_no_number_is_refused(std):
    with pytest.raises(ValueError, match="table_std"):
        EngramConfig(table_std=std)
