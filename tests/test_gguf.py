"""GGUF tables in the names of llama.cpp, ik_llama.cpp and ds4, and our older files: read, listed, written."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from test_formats import QWEN, TOKENS, V41, VOCAB, D, M, convert, filled, inspect_file
from typer.testing import CliRunner

from engram import EngramConfig, EngramMemory, TokenMap
from engram.cli import app
from engram.integrations.formats.gguf import TYPES, GgufWriter, read_gguf
from engram.integrations.formats.readers import open_source

gguf = pytest.importorskip("gguf")
IDENTITY = TokenMap.identity(VOCAB)


def write(path: Path, memory: EngramMemory, form: str, arch: str = "deepseek41", **changes) -> Path:
    """A file as the engines write it. changes: keys below <arch>.engram that get another value, or None."""
    config, layout, writer = memory.config, memory.layout, gguf.GGUFWriter(path, arch)
    keys = {
        "layer_ids": list(config.layers), "head_count": config.heads, "key_length": config.head_dim,
        "max_ngram_size": config.orders[-1], "pad_id": config.pad_id,
        "primes": [p for i in config.layers for heads in layout.moduli[i] for p in heads],
        "offsets": [o for i in config.layers for o in layout.offsets[i]],
        "multipliers": [str(m) for i in config.layers for m in layout.multipliers[i]],
    }  # fmt: skip
    if arch == "deepseek41":
        keys["token_map"] = memory.hasher.token_map.table.tolist()
    else:
        writer.add_uint32(f"{arch}.vocab_size", VOCAB)
    for name, value in (keys | changes).items():
        add = writer.add_array if isinstance(value, list) else writer.add_uint32
        if value is not None:
            add(f"{arch}.engram.{name}", value)
    for layer, table in memory.tables.items():
        rows, kind = table.gather(torch.arange(table.rows)).float().numpy(), None
        if form == "I8":
            rows = table.tensor.numpy().view(np.int8)
        elif form == "F16":
            rows = rows.astype(np.float16)
        elif form != "F32":
            kind = gguf.GGMLQuantizationType[form]
            rows = gguf.quants.quantize(rows, kind)
        writer.add_tensor(f"blk.{layer}.engram_embd.weight", rows, raw_dtype=kind)
        writer.add_tensor(f"blk.{layer}.engram_q_norm.weight", np.ones((M, D), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", ["table.gguf", "table.bin", "without-suffix"])
@pytest.mark.parametrize("form", ["I8", "F16", "BF16", "F32", "Q8_0", "Q5_1"])
def test_tables_of_other_engines_are_listed_and_converted_with_what_their_keys_say(form, name, tmp_path):
    memory = filled(V41)
    if form == "I8":
        memory.encode_tables("fp8")
    path = write(tmp_path / name, memory, form)
    found = inspect_file(path)
    assert found["kind"] == "gguf" and found["problem"] is None and list(found["tables"]) == [1, 3]
    assert found["config"]["rows_per_head"] == 97 and found["config"]["gate_eps"] == 1e-20
    report = convert(path, tmp_path / "ours", "engram")
    again = EngramMemory.load(tmp_path / "ours")
    assert report["untrained"] and (again.hidden_size, again.streams) == (D, M)
    assert again.hasher.token_map.digest == TOKENS.digest and again.layout.digest == memory.layout.digest
    tensors, _ = read_gguf(path)
    for layer, table in memory.tables.items():
        rows = table.gather(torch.arange(table.rows)).float()
        stored = tensors[f"blk.{layer}.engram_embd.weight"]
        if form in ("Q8_0", "Q5_1"):
            packed = stored.read_bytes(stored.offset, stored.nbytes).view(table.rows, -1).numpy()
            wide = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[form])
            rows = torch.from_numpy(np.array(wide)).bfloat16().float()
        elif form == "F16":
            rows = rows.half().float()
        assert torch.equal(again.tables[layer].gather(torch.arange(table.rows)).float(), rows)
    hidden, ids = torch.randn(1, 5, M, D), torch.randint(0, VOCAB, (1, 5))
    assert torch.equal(again[1](hidden, again.recall(ids)), torch.zeros(1, 5, M, D))  # untrained: adds nothing


@pytest.mark.parametrize("padded", [True, False])
def test_tables_of_qwen_are_read_with_raw_ids(padded, tmp_path):
    config = QWEN.replace(row_multiple=128 if padded else 1)
    memory = filled(config, token_map=IDENTITY)
    path = write(tmp_path / "q.gguf", memory, "BF16", "qwen4exp")
    source = open_source(path)
    assert source.layout.multipliers == memory.layout.multipliers and source.layout.rows == memory.layout.rows
    assert source.config.conv_kernel == 4 and source.config.boundary == "eos"
    convert(path, tmp_path / "ours", "engram")
    again = EngramMemory.load(tmp_path / "ours")
    assert all(torch.equal(table.tensor, memory.tables[layer].tensor) for layer, table in again.tables.items())


@pytest.mark.parametrize(("config", "arch"), [(V41, "deepseek41"), (QWEN, "qwen4exp"), (V41.replace(seed=5), "engram")])
def test_what_convert_writes_has_the_engines_names_and_comes_back(config, arch, tmp_path):
    memory = filled(config, token_map=IDENTITY if config == QWEN else TOKENS)
    memory.save(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "t.gguf", "gguf")
    fields = gguf.GGUFReader(tmp_path / "t.gguf").fields
    keys = {name: fields[f"{arch}.engram.{name}"] for name in ("layer_ids", "head_count", "key_length", "pad_id")}
    assert fields["general.architecture"].contents() == arch
    assert [key.contents() for key in keys.values()] == [
        list(config.layers),
        config.heads,
        config.head_dim,
        config.pad_id,
    ]
    assert keys["head_count"].types == [gguf.GGUFValueType.UINT32]
    multipliers = [m for layer in config.layers for m in memory.layout.multipliers[layer]]
    assert fields[f"{arch}.engram.multipliers"].contents() == multipliers
    assert fields[f"{arch}.engram.token_map"].contents() == memory.hasher.token_map.table.tolist()
    assert inspect_file(tmp_path / "t.gguf")["config"] == json.loads(config.to_json())
    report = convert(tmp_path / "t.gguf", tmp_path / "back", "engram")
    again = EngramMemory.load(tmp_path / "back")
    assert report["lossless"] and again.config == memory.config and again.layout.digest == memory.layout.digest
    assert all(torch.equal(table.tensor, memory.tables[layer].tensor) for layer, table in again.tables.items())
    convert(tmp_path / "t.gguf", tmp_path / "u.gguf", "gguf")
    assert inspect_file(tmp_path / "u.gguf")["tables"] == inspect_file(tmp_path / "t.gguf")["tables"]


def test_older_files_of_ours_are_read_with_the_token_map_given(tmp_path):
    memory = filled(V41)
    specs = {f"blk.{i}.engram.weight": ("BF16", (t.rows, t.dim)) for i, t in memory.tables.items()}
    facts = {
        "engram.config": memory.config.to_json(), "engram.layout": memory.layout.to_json(),
        "engram.layout_digest": memory.layout.digest, "engram.token_map_digest": TOKENS.digest,
        "engram.hidden_size": D, "engram.streams": M,
    }  # fmt: skip
    writer = GgufWriter(tmp_path / "old.gguf", specs, facts)
    for layer, table in memory.tables.items():
        writer.append(f"blk.{layer}.engram.weight", table.tensor)
    writer.close()
    assert inspect_file(tmp_path / "old.gguf")["tables"][1]["rows"] == memory.tables[1].rows
    with pytest.raises(ValueError, match="comes without its tokenizer: give token_map"):
        convert(tmp_path / "old.gguf", tmp_path / "ours", "engram")
    swapped = TOKENS.table.copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    with pytest.raises(ValueError, match="was written with the token map"):
        convert(tmp_path / "old.gguf", tmp_path / "ours", "engram", token_map=TokenMap(swapped))
    convert(tmp_path / "old.gguf", tmp_path / "ours", "engram", token_map=TOKENS)
    again = EngramMemory.load(tmp_path / "ours")
    assert all(torch.equal(table.tensor, memory.tables[layer].tensor) for layer, table in again.tables.items())


PRIMES = [p for i in (1, 3) for heads in filled(V41).layout.moduli[i] for p in heads]


@pytest.mark.parametrize(("changes", "reason"), [
    ({"primes": [*PRIMES[:-1], 1009]}, "primes has 1009 at index 11, .* cannot take multipliers or moduli from a file"),
    ({"primes": PRIMES[:-1]}, "primes holds 11 numbers, expected 2 layers x 3 orders x 2 heads"),
    ({"primes": [float(p) for p in PRIMES]}, "primes must be an int, not 97.0"),
    ({"multipliers": [3] * 8}, "multipliers has 3 at index 0, but this configuration and vocabulary give"),
    ({"offsets": [0] * 12}, "offsets has 0 at index 1"),
    ({"offsets": [0]}, "offsets has 1 numbers, but .* give 12"),
    ({"layer_ids": [1, 4]}, r"holds tables of layers \[1, 3\], expected \[1, 4\]"),
    ({"key_length": 32}, r"engram_embd.weight is \[630, 64\], expected \[630, 32\]"),
    ({"max_ngram_size": 2**31}, "the longest n-gram of a memory has 2 to 16 tokens"),
    ({"head_count": 0}, "primes holds 12 numbers, expected 2 layers x 3 orders x 0 heads"),
    ({"token_map": [0, 2, 5]}, "not a token map"),
    ({"token_map": list(range(VOCAB + 1))}, "multipliers has"),
    ({"pad_id": 99}, "pad_id is 99, outside the token map"),
    ({"head_count": None}, r"lacks the key deepseek41.engram.head_count: give the configuration"),
])  # fmt: skip
def test_a_key_that_contradicts_the_layout_is_refused_by_name(changes, reason, tmp_path):
    path = write(tmp_path / "t.gguf", filled(V41), "BF16", **changes)
    with pytest.raises(ValueError, match=rf"t\.gguf.*{reason}|{reason}"):
        convert(path, tmp_path / "ours", "engram")
    assert inspect_file(path)["problem"] is not None and not (tmp_path / "ours").exists()


def test_a_configuration_given_is_checked_against_the_keys(tmp_path):
    path = write(tmp_path / "t.gguf", filled(V41), "BF16")
    assert open_source(path, V41).config == V41
    for wrong in (V41.replace(pad_id=3), V41.replace(rows_per_head=90, heads=1), V41.replace(orders=(2, 3))):
        with pytest.raises(ValueError, match=r"t.gguf.*(deepseek41.engram|expected \[)"):
            open_source(path, wrong)


def test_a_file_of_an_unknown_architecture_needs_its_configuration(tmp_path):
    path = write(tmp_path / "t.gguf", filled(V41), "BF16", "hy4")
    assert "architecture is 'hy4', not deepseek41 or qwen4exp" in inspect_file(path)["problem"]
    convert(path, tmp_path / "ours", "engram", config=V41, token_map=TOKENS)


def test_tables_alone_are_not_written_as_a_dialect_which_needs_all_weights(tmp_path):
    path = write(tmp_path / "t.gguf", filled(V41), "BF16")
    with pytest.raises(ValueError, match=r"only the tables of a memory: deepseek-v4\.1 needs its other weights too"):
        convert(path, tmp_path / "v41", "deepseek-v4.1")


def test_sizes_of_ggmls_types_are_those_of_the_gguf_package():
    for number, (name, block, width) in TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert kind.name == name and gguf.GGML_QUANT_SIZES[kind] == (block, width), name


def test_quantised_rows_without_the_gguf_package_are_a_clear_error(tmp_path, monkeypatch):
    path = write(tmp_path / "t.gguf", filled(V41), "Q8_0")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    assert inspect_file(path)["problem"] is None
    with pytest.raises(ValueError, match="is Q8_0, which the gguf package reads: pip install gguf"):
        convert(path, tmp_path / "ours", "engram")


def header(*parts: bytes, tensors: int = 0, keys: int = 1) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + b"".join(parts)


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


@pytest.mark.parametrize("content", [
    header(text("a"), struct.pack("<IIQ", 9, 4, 2**60)),
    header(text("a"), struct.pack("<IIQ", 9, 8, 2**23), bytes(1000)),
    header(text("a"), struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 1000),
    header(text("a"), struct.pack("<I", 77)),
    header(text(b"\xff"), struct.pack("<II", 4, 4)),
    header(keys=2**60),
    header(tensors=2**60, keys=0),
    header(text("t"), struct.pack("<I", 2**31), bytes(400), tensors=1, keys=0),
    header(text("t"), struct.pack("<IQQIQ", 2, 2**62, 2**62, 0, 0), bytes(400), tensors=1, keys=0),
    header(text("t"), struct.pack("<IQIQ", 1, 33, 8, 0), bytes(400), tensors=1, keys=0),
    header((text("t") + struct.pack("<IQIQ", 1, 32, 8, 0)) * 2, bytes(400), tensors=2, keys=0),
])  # fmt: skip
def test_headers_that_ask_for_more_than_the_file_pays_for_are_refused(content, tmp_path):
    (tmp_path / "t").write_bytes(content)
    for look in (read_gguf, inspect_file):
        with pytest.raises(ValueError, match=r"/t"):
            look(tmp_path / "t")


def test_the_command_line_says_that_projections_are_new(tmp_path):
    path = write(tmp_path / "t.gguf", filled(V41), "F16")
    result = CliRunner().invoke(app, ["inspect", str(path)])
    assert (
        result.exit_code == 0 and "blk.3.engram_embd.weight" in result.stdout and "layer 3: 834 rows" in result.stdout
    )
    result = CliRunner().invoke(app, ["convert", str(path), str(tmp_path / "ours")])
    assert result.exit_code == 0 and "the projections of this memory are new" in result.stdout
    assert isinstance(EngramMemory.load(tmp_path / "ours").config, EngramConfig)
