"""plan: sizes of a memory that agree with the published models and with what is really allocated."""

from __future__ import annotations

import io
import json
import sys
import time

import numpy as np
import pytest
import torch
from rich.console import Console

from engram import EngramConfig, EngramMemory, NgramHasher, TokenMap, build_optimizer, plan
from engram.cli import main
from engram.inspect.plan import SHAPES, expected_collisions, read_shape
from engram.inspect.render import print_plan, size
from engram.integrations.formats.dialects import config_to_hf
from engram.integrations.formats.readers import unknown_fields
from engram.memory import build_layout

SMALL = EngramConfig(layers=(0, 2), orders=(2, 3), heads=2, head_dim=32, rows_per_head=(101, 301), row_multiple=8)


def test_the_published_sizes_come_out():
    deepseek = plan(EngramConfig.preset("deepseek-v4.1-flash"), *SHAPES["deepseek-v4.1-flash"])
    assert deepseek.rows == deepseek.addressed == {1: 384_006_168, 14: 384_016_682}
    assert f"{deepseek.storage['fp8'].total / 2**30:.2f}" == "188.83" and deepseek.storage["fp8"].row_bytes == 264
    qwen = plan(EngramConfig.preset("qwen3.8-flash-next"))
    assert qwen.rows == {1: 320_001_536} and qwen.addressed == {1: 320_001_446}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_small_memory_takes_what_was_planned(dtype):
    planned = plan(SMALL, hidden_size=24, streams=2, batch=3, context=5)
    memory = EngramMemory(SMALL.replace(table_dtype=dtype), TokenMap.identity(50), 24, streams=2)
    stored = planned.storage[dtype]
    assert stored.layers == {layer: table.nbytes for layer, table in memory.tables.items()}
    assert stored.total == sum(t.tensor.untyped_storage().nbytes() for t in memory.tables.values())
    assert planned.rows == {layer: table.rows for layer, table in memory.tables.items()}
    assert planned.dense == {
        layer: sum(p.numel() for p in memory.fusions[str(layer)].parameters()) for layer in SMALL.layers
    }
    for optimizer, state in planned.state.items():
        kept = build_optimizer(memory, table_optimizer=optimizer).row_optimizers
        assert state == sum(table.tensor.nbytes for o in kept for table in o.state.values())
    read = memory.recall(torch.zeros(3, 5, dtype=torch.int64)).row_ids
    count = sum(rows.numel() for rows in read.values())
    assert stored.step == count * stored.row_bytes and stored.token * 15 == stored.step
    assert planned.rows_per_token == count // 15


@pytest.mark.parametrize("codec", ["fp8", "int8", "int4", "pq4", "pq8"])
def test_encoded_rows_take_what_was_planned(codec):
    memory = EngramMemory(SMALL, TokenMap.identity(50), 24)
    memory.encode_tables(codec)
    planned = plan(SMALL).storage[codec]
    assert planned.layers == {layer: table.tensor.nbytes for layer, table in memory.tables.items()}
    assert all(table.tensor.shape[1] == planned.row_bytes for table in memory.tables.values())


def test_codecs_that_cannot_hold_the_rows_are_left_out():
    assert set(plan(SMALL.replace(head_dim=20)).storage) == {"float32", "bfloat16", "pq4"}


def test_planning_a_memory_larger_than_any_machine_allocates_nothing():
    huge = plan(SMALL.replace(rows_per_head=2**36), hidden_size=2**20)
    assert huge.storage["float32"].total > 2**46 and huge.fits(huge.storage["float32"].total) == "no"
    assert huge.fits(0) == "RAM" and huge.dense is not None


def test_as_many_n_grams_share_rows_as_expected():
    config = EngramConfig(layers=(1,), orders=(2, 3), heads=2, rows_per_head=2000)
    layout = build_layout(config, 997, 0)
    rng = np.random.default_rng(0)
    for column, order in enumerate(config.orders):
        ngrams = np.unique(rng.integers(1, 997, (3000, order)), axis=0)
        rows = NgramHasher(layout, TokenMap.identity(997))(ngrams)[1][:, -1].reshape(-1, 2, 2)[:, column]
        alone = np.stack([np.isin(rows[:, k], *np.where(np.bincount(rows[:, k]) == 1)) for k in range(2)], axis=1)
        expected = expected_collisions(order, [layout.moduli[1][column]], len(ngrams))
        assert 1 - alone.mean() == pytest.approx(expected.shared, abs=0.02)
        assert (~alone).all(1).mean() == pytest.approx(expected.shared_in_all, abs=0.02)
        assert len(np.unique(rows)) / sum(layout.moduli[1][column]) == pytest.approx(expected.used, abs=0.02)


def test_there_are_no_more_n_grams_than_the_vocabulary_allows():
    bigrams, trigrams = plan(SMALL, vocab=10, ngrams=500).collisions
    assert (bigrams.ngrams, bigrams.possible, trigrams.ngrams, trigrams.possible) == (100, 100, 500, 1000)
    fixed = plan(SMALL.replace(compressed_vocab=12), vocab=10, ngrams=500).collisions[0]
    assert fixed.possible == 144  # a vocabulary fixed by the configuration has priority
    one_row = plan(SMALL.replace(hash="one_row"), ngrams=5).collisions[0]
    assert (one_row.used, one_row.shared, one_row.shared_in_all) == (1, 1, 1)
    assert plan(SMALL, ngrams=1).collisions[0].shared == 0


def test_the_shape_of_a_model_is_read_beside_its_configuration(tmp_path):
    memory = EngramMemory(SMALL, TokenMap.identity(50), 24, streams=2)
    memory.save(tmp_path / "saved")
    assert read_shape(str(tmp_path / "saved" / "config.json")) == (24, 2)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"hidden_size": 64, "hc_mult": 4}}))
    assert read_shape(str(tmp_path / "config.json")) == (64, 4)
    assert read_shape("deepseek-v4.1-flash") == (5120, 4) and read_shape("demo") == (None, 1)


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_fit_the_terminal(width):
    out = io.StringIO()
    print_plan("it", plan(EngramConfig.preset("paper-40b"), *SHAPES["paper-40b"]), Console(file=out, width=width))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width and "…" not in out.getvalue()
    assert [size(n) for n in (999, 1536, 3 * 2**40)] == ["999 B", "1.50 KiB", "3.00 TiB"]


def cli(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["engram", "plan", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0), *capsys.readouterr()


def test_the_command_prints_json_and_a_table(monkeypatch, capsys, tmp_path):
    (tmp_path / "mine.json").write_text(SMALL.to_json())
    code, out, _ = cli(monkeypatch, capsys, tmp_path / "mine.json", "--hidden-size", 24, "--ngrams", "2k", "--json")
    read = json.loads(out)
    assert code == 0 and read["rows"] == {str(layer): rows for layer, rows in plan(SMALL).rows.items()}
    assert read["collisions"][0]["ngrams"] == 2000 and read["storage"]["fp8"]["fits"] == "RAM"
    EngramMemory(SMALL, TokenMap.identity(50), 24).save(tmp_path / "saved")
    assert json.loads(cli(monkeypatch, capsys, tmp_path / "saved", "--json")[1])["dense"] == read["dense"]
    assert cli(monkeypatch, capsys, "demo")[1].startswith("demo: 20,692,406 rows x 64")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["engrm"], "unknown preset 'engrm': choose one of demo"),
        (["gone.json"], "there is no file gone.json"),
        (["demo", "--hidden-size", "0"], "hidden_size must be >= 1"),
        (["demo", "--batch", "0"], "batch must be >= 1"),
        (["demo", "--ngrams", "many"], "a number of n-grams must be a positive number"),
        (["demo", "--folder", "/nonexistent"], "/nonexistent"),
        (["torn.json"], "torn.json is damaged, or is not a config"),
        (["llama.json"], "names no n-gram memory"),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "torn.json").write_text("{")
    (tmp_path / "llama.json").write_text('{"model_type": "llama"}')
    code, out, err = cli(monkeypatch, capsys, *arguments)
    assert code == 2 and not out and err.startswith("error: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"layers": [1], "heads": 4, "row_per_head": 50}', "unknown EngramConfig fields: row_per_head"),
        ('{"layers": [1], "orders": [2], "head": 4, "head_dim": 3}', "unknown EngramConfig fields: head"),
        ('{"config": {"layers": [1], "gait": 1}}', "unknown EngramConfig fields: gait"),
        ('{"config": [1]}', "config is a JSON object"),
        ('{"model_type": "hy_v4_flash"}', "Hy4-flash (hy_v4_flash) cannot be read: its layer numbers"),
        ('{"rows_per_head": 50, "hidden_size": "32"}', "unknown EngramConfig fields: hidden_size"),
        ('{"config": {"layers": [1]}, "hidden_size": "32"}', "hidden_size must be an int, not '32'"),
        ('{"config": {"layers": [1]}, "streams": [2]}', "streams must be an int, not [2]"),
        ('{"config": {"layers": [1], "head_dim": 1099511627776}, "hidden_size": 64}', "hidden_size x d_mem"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_config_file_that_cannot_be_planned_is_one_clear_line(text, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text(text)
    monkeypatch.setattr(sys, "argv", ["engram", "plan", str(tmp_path / "config.json")])
    with pytest.raises(SystemExit) as ended:
        main()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and error.startswith("error: ") and error.count("\n") == 1


def test_fields_about_a_memory_that_are_not_read_are_named(tmp_path, monkeypatch, capsys):
    fields = config_to_hf(EngramConfig.preset("deepseek-v4.1-flash"), "deepseek-v4.1", 64, 4)
    fields["text_config"] |= {"engram_moduli": [5], "engram_rotation": 1, "num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert unknown_fields(str(tmp_path / "config.json")) == ["engram_moduli", "engram_rotation"]
    (tmp_path / "own.json").write_text(json.dumps({"config": json.loads(EngramConfig().to_json()), "hc": 1}))
    assert unknown_fields(str(tmp_path / "own.json")) == ["hc"] and unknown_fields("paper-27b") == []
    monkeypatch.setattr(sys, "argv", ["engram", "plan", str(tmp_path / "config.json")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0 and "not read: engram_moduli, engram_rotation" in capsys.readouterr().err


def test_planning_as_many_heads_as_are_allowed_takes_seconds_and_more_are_refused():
    begun = time.perf_counter()
    assert plan(EngramConfig(layers=(1,), heads=2**13, head_dim=4)).rows_per_token == 2**14
    assert time.perf_counter() - begun < 10
    with pytest.raises(ValueError, match="hidden_size must be"):
        plan(EngramConfig(), hidden_size=2**60)
    with pytest.raises(ValueError, match="streams x hidden_size x d_mem"):
        plan(EngramConfig(heads=2**10), hidden_size=2**20, streams=2**20)
