"""Tables of released checkpoints opened in place: the rows of convert's reader, lookups, refusals, size."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_formats import QWEN, TOKENS, V41, VOCAB, D, M, convert, filled, rewrite, v41  # noqa: F401
from test_scales import CASES, checkpoint

import engram
from engram import EngramConfig, EngramMemory, TokenMap
from engram.integrations.formats.readers import open_source
from tests.hf_models import build, text


def values(rows) -> torch.Tensor:
    """All rows in float32 as `convert` reads them."""
    read = rows.read(0, rows.rows)
    if rows.codec != "fp8":
        return read.float()
    exponents = read[:, rows.dim :].contiguous().view(torch.float8_e8m0fnu).float().repeat_interleave(32, 1)
    return read[:, : rows.dim].contiguous().view(torch.float8_e4m3fn).float() * exponents


def check_equal(path: Path, **arguments) -> None:
    """Every row of every layer is that of `convert`'s reader, in any order, shape and output."""
    source, tables = open_source(path, **arguments), engram.open_tables(path, **arguments)
    assert set(tables) == set(source.rows)
    for layer, table in tables.items():
        expected = values(source.rows[layer])
        assert (table.rows, table.dim) == expected.shape and not table.writable
        ids = torch.randperm(table.rows, generator=torch.Generator().manual_seed(layer)).repeat(2)[: table.rows + 5]
        out = torch.full((len(ids), table.dim), 7.0)
        assert table.gather(ids, out) is out and torch.equal(out, expected[ids])
        assert torch.equal(table.gather(ids[:6].view(2, 1, 3)), expected[ids[:6]].view(2, 1, 3, -1))
        table.drop()
        assert 0 <= table.prefetch(ids) <= 64 * table.nbytes + 2**20
        assert torch.equal(copy.deepcopy(table).gather(ids), expected[ids])
        table.close()


@pytest.mark.parametrize("case", CASES)
def test_scaled_rows_are_gathered_as_value_times_scale(case, tmp_path):
    make, scales, _ = CASES[case]
    expected = checkpoint(tmp_path / "q", make, scales)
    check_equal(tmp_path / "q")
    tables = engram.open_tables(tmp_path / "q")
    for layer, rows in expected.items():
        assert torch.equal(tables[layer].gather(torch.arange(len(rows))), rows)


@pytest.mark.parametrize(
    ("to", "shards"),
    [("deepseek-v4.1", 1), ("deepseek-v4.1", 3), ("deepseek-v4.1-interleaved", 1), ("deepseek-v4.1-interleaved", 2)],
)
def test_tables_of_v41_are_gathered_from_every_layout(v41, tmp_path, to, shards):  # noqa: F811
    check_equal(v41)
    convert(v41, tmp_path / "other", to, shards=shards)
    check_equal(tmp_path / "other")


@pytest.mark.parametrize("shards", [1, 3])
def test_bf16_shards_of_qwen_and_gguf_files_are_gathered(shards, tmp_path):
    filled(QWEN, token_map=TokenMap.identity(VOCAB)).save(tmp_path / "memory")
    convert(tmp_path / "memory", tmp_path / "q", "qwen", shards=shards)
    check_equal(tmp_path / "q")
    convert(tmp_path / "memory", tmp_path / "q.gguf", "gguf")
    check_equal(tmp_path / "q.gguf")


@pytest.mark.parametrize("form", ["I8", "F16", "BF16", "Q8_0", "F32"])
def test_tables_of_other_engines_are_gathered(form, tmp_path):
    pytest.importorskip("gguf")
    from test_gguf import write

    memory = filled(V41)
    if form == "I8":
        memory.encode_tables("fp8")
    check_equal(write(tmp_path / "table.gguf", memory, form))


def test_a_memory_reads_opened_tables_and_neither_trains_nor_saves_them(v41, tmp_path):  # noqa: F811
    tables = engram.open_tables(v41, token_map=TOKENS)
    config = open_source(v41, token_map=TOKENS).config
    memory = EngramMemory(config, TOKENS, D, M, tables=tables)
    copied = convert(v41, tmp_path / "own", "engram", token_map=TOKENS) and EngramMemory.load(tmp_path / "own")
    ids = torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    for layer in config.layers:
        assert torch.equal(memory.recall(ids).rows(layer), copied.recall(ids).rows(layer))
    assert not memory.trains_tables
    with pytest.raises(PermissionError, match="opened read-only"):
        tables[config.layers[0]].write(torch.tensor([0]), torch.zeros(1, config.head_dim))
    with pytest.raises(ValueError, match="in the checkpoint's own form"):
        memory.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_attached_opened_tables_compute_and_explain_what_the_copy_does(tmp_path):
    config = EngramConfig(layers=(1,), orders=(2, 3), heads=2, head_dim=8, rows_per_head=50, gate="none")
    plain = EngramMemory(config, TokenMap.identity(64), 32)
    plain.tables[1].write(torch.arange(plain.tables[1].rows), torch.randn(plain.tables[1].rows, 8))
    for weight in plain.fusions.parameters():
        torch.nn.init.normal_(weight)
    convert(plain.save(tmp_path / "memory"), tmp_path / "m.gguf", "gguf")
    tables = engram.open_tables(tmp_path / "m.gguf")
    memory = EngramMemory(config, TokenMap.identity(64), 32, tables=tables, fusions={1: plain.fusions["1"]})
    ids, models = text(), [build("llama"), build("llama")]
    models[1].load_state_dict(models[0].state_dict())
    for model, attached in zip(models, (plain, memory), strict=True):
        engram.attach(model, attached)
        model.eval()
    with torch.no_grad():
        assert torch.equal(models[0](ids).logits, models[1](ids).logits)
    first, second = (engram.explain(model, ids[0], losses=False) for model in models)
    assert (first.layers[1].rows == second.layers[1].rows).all() and (first.layers[1].added > 0).all()
    assert (first.layers[1].added == second.layers[1].added).all()


def test_bad_ids_closed_tables_and_saved_memories_are_refused(v41, tmp_path):  # noqa: F811
    table = next(iter(engram.open_tables(v41).values()))
    for bad in (-1, table.rows):
        with pytest.raises(IndexError, match=f"row {bad} is outside"):
            table.gather(torch.tensor([0, bad]))
    with pytest.raises(TypeError):
        table.gather(torch.tensor([0], dtype=torch.int32))
    with pytest.raises(OSError, match="was truncated"):
        with open(table.path, "r+b") as file:
            file.truncate(1000)
        table.gather(torch.tensor([0]))
    table.close()
    table.close()
    with pytest.raises(ValueError, match="closed"):
        table.gather(torch.tensor([0]))
    with pytest.raises(ValueError, match="is a saved memory"):
        engram.open_tables(filled(V41).save(tmp_path / "memory"))


def test_what_does_not_fit_is_refused_by_name(v41):  # noqa: F811
    name = f"layers.{V41.layers[0]}.engram.embed.scale"
    rewrite(v41, name, torch.zeros(7, 5, dtype=torch.uint8))
    with pytest.raises(ValueError, match=name):
        engram.open_tables(v41)
    next(v41.glob("model-00002*")).unlink()
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors, which is missing|" + name):
        engram.open_tables(v41)


def test_hy4_is_refused_with_what_is_not_known(v41):  # noqa: F811
    (v41 / "config.json").write_text(json.dumps({"model_type": "hy_v4_flash"}))
    with pytest.raises(ValueError, match="moduli, multipliers"):
        engram.open_tables(v41)


LARGE = r"""
import json, re, sys, time, torch, engram
def resident():
    return int(re.search(r"VmRSS:\s+(\d+)", open("/proc/self/status").read())[1])
warm = engram.open_tables(sys.argv[2])
before, began = resident(), time.perf_counter()
table = engram.open_tables(sys.argv[1])[1]
seconds = time.perf_counter() - began
table.gather(torch.arange(0, table.rows, table.rows // 100))
after = resident()
print(json.dumps([seconds, (after - before) / 1024, table.nbytes]))
"""


def test_a_table_of_190_gib_opens_in_a_second_and_50_mb(v41, tmp_path):  # noqa: F811
    config = EngramConfig(
        layers=(1,), orders=(2, 3), heads=8, head_dim=256, rows_per_head=48_300_000, boundary="dead", conv_kernel=0,
        gate_eps=1e-6, table_dtype="bfloat16", compressed_vocab=VOCAB,
    )  # fmt: skip
    from engram.integrations.formats.dialects import config_to_hf, layout_of

    rows, home = layout_of(config).rows[1], tmp_path / "large"
    home.mkdir()
    (home / "config.json").write_text(json.dumps(config_to_hf(config, "deepseek-v4.1", D, M)))
    shapes = {"weight": ("F8_E4M3", 256), "scale": ("F8_E8M0", 8)}
    at, header = 0, {}
    for name, (dtype, width) in shapes.items():
        entry = {"dtype": dtype, "shape": [rows, width], "data_offsets": [at, at + rows * width]}
        header[f"layers.1.engram.embed.{name}"], at = entry, at + rows * width
    text = json.dumps(header).encode()
    with open(home / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    command = [sys.executable, "-c", LARGE, str(home), str(v41)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    seconds, megabytes, nbytes = json.loads(ran.stdout)
    assert nbytes > 190 * 2**30 and seconds < 1 and megabytes < 50
