"""convert and inspect: every format in both directions, and the inputs that are refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from engram import EngramConfig, EngramMemory, HashLayout, TokenMap
from engram.cli import app
from engram.integrations.formats import conversion, convert, inspect_file, recoder
from engram.integrations.formats.gguf import read_gguf
from engram.integrations.formats.readers import open_source, read_config
from engram.integrations.formats.safetensors_io import Stored, open_checkpoint
from engram.storage.manifest import verify

VOCAB, D, M = 40, 6, 2
TOKENS = TokenMap(np.concatenate([np.arange(VOCAB), np.arange(10)]))
V41 = EngramConfig(
    layers=(1, 3), orders=(2, 3, 4), heads=2, head_dim=64, rows_per_head=97, pad_id=2, conv_kernel=0, boundary="dead",
    table_dtype="bfloat16", compressed_vocab=VOCAB,
)  # fmt: skip
DEMO = EngramConfig(
    layers=(1, 3), heads=2, head_dim=32, rows_per_head=(97, 61), pad_id=2, bias=True, table_init="normal",
    conv_init="uniform", gate_eps=None, conv_eps=1e-5, compressed_vocab=VOCAB,
)  # fmt: skip
QWEN = EngramConfig(
    layers=(0, 2), heads=2, head_dim=32, rows_per_head=97, pad_id=7, seed=1234, boundary="eos", generator="splitmix64",
    row_multiple=8, table_dtype="bfloat16", compressed_vocab=VOCAB,
)  # fmt: skip


def e4m3(shape, seed: int) -> torch.Tensor:
    """Return random e4m3 bytes that are not NaN."""
    bits = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return torch.where(bits % 128 == 127, bits - 1, bits).view(torch.float8_e4m3fn)


def e8m0(shape, seed: int) -> torch.Tensor:
    """Return random scales, the smallest (byte 0) among them."""
    bits = torch.randint(100, 150, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    bits.view(-1)[0] = 0
    return bits.view(torch.float8_e8m0fnu)


def v41_tensors(layer: int, rows: int) -> dict[str, torch.Tensor]:
    prefix, wide = f"layers.{layer}.engram.", V41.d_mem
    return {
        f"{prefix}embed.weight": e4m3((rows, 64), layer),
        f"{prefix}embed.scale": e8m0((rows, 2), layer),
        f"{prefix}wkv.weight": e4m3(((M + 1) * 64, wide), layer + 50),
        f"{prefix}wkv.scale": e8m0(((M + 1) * 2, wide // 32), layer + 51),
        f"{prefix}q_weight": torch.randn(M, 64).bfloat16(),
        f"{prefix}k_weight": torch.randn(M, 64).bfloat16(),
    }  # fmt: skip


V41_JSON = {
    "model_type": "deepseek_v41",
    "text_config": {
        "engram_layer_ids": [1, 3], "engram_max_ngram_size": 4, "engram_n_heads": 2, "engram_head_dim": 64,
        "engram_vocab_size": 97, "engram_compressed_vocab_size": VOCAB, "engram_pad_id": 2, "hidden_size": 64,
        "hc_mult": M,
    },
}  # fmt: skip


def rows_of(config: EngramConfig) -> dict[int, int]:
    from engram.integrations.formats.dialects import layout_of

    return layout_of(config).rows


@pytest.fixture
def v41(tmp_path: Path) -> Path:
    """Write a checkpoint like DeepSeek-V4.1's: real names and dtypes, a file per layer, an index, another tensor."""
    home = tmp_path / "v41"
    home.mkdir()
    names: dict[str, str] = {}
    for i, (layer, rows) in enumerate(rows_of(V41).items()):
        tensors = v41_tensors(layer, rows) | {f"layers.{layer}.attn.wq_a.weight": torch.zeros(3, 3)}
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        safetensors.torch.save_file(tensors, home / file)
        names |= dict.fromkeys(tensors, file)
    (home / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (home / "config.json").write_text(json.dumps(V41_JSON))
    return home


def filled(config: EngramConfig, streams: int = M, token_map: TokenMap = TOKENS) -> EngramMemory:
    """Return a memory with random rows and weights."""
    torch.manual_seed(0)
    memory = EngramMemory(config, token_map, D, streams)
    for table in memory.tables.values():
        table.write(torch.arange(table.rows), torch.randn(table.rows, table.dim))
    for weight in memory.fusions.parameters():
        torch.nn.init.normal_(weight)
    return memory


def tensors_of(home: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted(home.glob("model*.safetensors")) for k, v in safetensors.torch.load_file(f).items()}


def rewrite(home: Path, name: str, value: torch.Tensor | None) -> None:
    """Replace or remove one tensor of a checkpoint in place."""
    for file in home.glob("*.safetensors"):
        tensors = safetensors.torch.load_file(file)
        if name in tensors:
            tensors.pop(name)
            safetensors.torch.save_file(tensors | ({} if value is None else {name: value}), file)


# --- to and fro ---


def test_v41_tensors_convert_to_our_folder_and_back_bit_for_bit(v41, tmp_path):
    report = convert(v41, tmp_path / "ours", "engram", token_map=TOKENS)
    assert report["lossless"] and report["rows"] == rows_of(V41)
    assert all(result["problem"] is None for result in verify(tmp_path / "ours"))
    convert(tmp_path / "ours", tmp_path / "back", "deepseek-v4.1")
    before, after = tensors_of(v41), tensors_of(tmp_path / "back")
    for layer in V41.layers:
        for part in ("embed.weight", "embed.scale"):
            name = f"layers.{layer}.engram.{part}"
            assert before[name].dtype == after[name].dtype
            assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))
        wkv = before[f"layers.{layer}.engram.wkv.weight"].float()
        scale = before[f"layers.{layer}.engram.wkv.scale"].float()
        wide = torch.kron(scale, torch.ones(32, 32))
        assert torch.equal(after[f"layers.{layer}.engram.wkv.weight"].float(), wkv * wide)


def test_rows_of_a_converted_v41_checkpoint_are_values_times_scales(v41, tmp_path):
    convert(v41, tmp_path / "ours", "engram", token_map=TOKENS)
    memory = EngramMemory.load(tmp_path / "ours", mode="shared")
    assert memory.codec == "fp8" and memory.tables[1].nbytes == rows_of(V41)[1] * 66
    tensors = tensors_of(v41)
    for layer, table in memory.tables.items():
        scales = tensors[f"layers.{layer}.engram.embed.scale"].view(torch.uint8).double() - 127
        values = tensors[f"layers.{layer}.engram.embed.weight"].double() * 2 ** scales.repeat_interleave(32, 1)
        assert torch.equal(table.gather(torch.arange(table.rows)).double(), values)


@pytest.mark.parametrize("to", ["deepseek-v4.1", "deepseek-v4.1-interleaved"])
@pytest.mark.parametrize(("shards", "by"), [(1, "row"), (3, "row"), (4, "head"), (5, "head")])
def test_every_layout_of_v41_tensors_reads_back_as_the_same_rows(v41, tmp_path, to, shards, by):
    convert(v41, tmp_path / "there", to, shards=shards, by=by)
    before, after = open_source(v41), open_source(tmp_path / "there")
    for layer in V41.layers:
        assert len(after.rows[layer].parts) == shards
        assert torch.equal(
            before.rows[layer].read(0, before.rows[layer].rows), after.rows[layer].read(0, after.rows[layer].rows)
        )
        assert all(torch.equal(v, after.weights[layer][k]) for k, v in before.weights[layer].items())


def test_ranks_by_head_have_complete_columns_and_ranks_by_row_differ_by_at_most_one_row(v41, tmp_path):
    layout = open_source(v41).layout
    convert(v41, tmp_path / "head", "deepseek-v4.1", shards=4, by="head")
    convert(v41, tmp_path / "row", "deepseek-v4.1", shards=4, by="row")
    starts = [start for start, _, _ in open_source(tmp_path / "head").rows[1].parts]
    assert set(starts) <= set(layout.offsets[1]) and len(starts) == 4
    sizes = [values.shape[0] for _, values, _ in open_source(tmp_path / "row").rows[1].parts]
    assert sum(sizes) == layout.rows[1] and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("config", "to"), [(DEMO, "demo"), (QWEN, "qwen")])
def test_our_folder_converts_to_a_dialect_and_back(config, to, tmp_path):
    token_map = TOKENS if to == "demo" else TokenMap.identity(VOCAB)
    memory = filled(config, token_map=token_map)
    memory.save(tmp_path / "ours")
    there = convert(tmp_path / "ours", tmp_path / "there", to, shards=3 if to == "qwen" else 1)
    back = convert(tmp_path / "there", tmp_path / "back", "engram")
    assert there["lossless"] and back["lossless"]
    again = EngramMemory.load(tmp_path / "back")
    assert again.layout.digest == memory.layout.digest
    for layer in config.layers:
        assert torch.equal(again.tables[layer].tensor, memory.tables[layer].tensor)
    ids = torch.randint(0, VOCAB, (2, 9))
    hidden = torch.randn(2, 9, M, D)
    for layer in config.layers:
        found = again[layer](hidden, again.recall(ids))
        torch.testing.assert_close(found, memory[layer](hidden, memory.recall(ids)), rtol=1e-5, atol=1e-5)


def test_demo_tensors_have_the_demos_names_and_shapes(tmp_path):
    filled(DEMO).save(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "demo", "demo")
    found = {k: tuple(v.shape) for k, v in tensors_of(tmp_path / "demo").items() if k.startswith("layers.1.")}
    rows, wide, p = rows_of(DEMO)[1], DEMO.d_mem, "layers.1.engram."
    per_stream = {
        f"{p}{name}.{i}.{kind}": shape
        for i in range(M)
        for name, kind, shape in [
            ("key_projs", "weight", (D, wide)), ("key_projs", "bias", (D,)), ("norm1", "weight", (D,)),
            ("norm2", "weight", (D,)), ("short_conv.norms", "weight", (D,)),
        ]
    }  # fmt: skip
    assert found == per_stream | {
        f"{p}multi_head_embedding.embedding.weight": (rows, 32), f"{p}multi_head_embedding.offsets": (4,),
        f"{p}value_proj.weight": (D, wide), f"{p}value_proj.bias": (D,), f"{p}short_conv.conv.weight": (M * D, 1, 4),
    }  # fmt: skip


def test_one_module_of_the_demo_without_any_prefix_is_read(tmp_path):
    config = DEMO.replace(layers=(1,))
    filled(config).save(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "demo", "demo")
    bare = {k.removeprefix("layers.1.engram."): v for k, v in tensors_of(tmp_path / "demo").items()}
    safetensors.torch.save_file(bare, tmp_path / "module.safetensors")
    report = convert(tmp_path / "module.safetensors", tmp_path / "back", "engram", config=config, token_map=TOKENS)
    assert report["rows"] == rows_of(config)


def test_a_checkpoint_of_transformers_converts_and_gives_its_rows(tmp_path):
    pytest.importorskip("transformers", minversion="5.23")
    from test_offload import qwen

    model = qwen(torch.bfloat16)
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "ours", "engram")
    memory = EngramMemory.load(tmp_path / "ours")
    for layer in (0, 2):
        weight = model.model.layers[layer].ple.ple_embedding.ngram_embedding.weight
        assert memory.tables[layer].dtype == torch.bfloat16 and torch.equal(memory.tables[layer].tensor, weight)


def test_what_convert_writes_as_qwen_loads_into_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.23")
    from test_offload import qwen

    model = qwen(torch.bfloat16)
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "qwen", "qwen", shards=3)
    backbone = {
        k: v for k, v in safetensors.torch.load_file(tmp_path / "hf" / "model.safetensors").items() if ".ple." not in k
    }
    ours = {k.replace("language_model.", ""): v for k, v in tensors_of(tmp_path / "qwen").items()}
    (tmp_path / "both").mkdir()
    safetensors.torch.save_file(backbone | ours, tmp_path / "both" / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(tmp_path / "hf" / "config.json", tmp_path / "both")
    again, info = transformers.Qwen4ExpForCausalLM.from_pretrained(tmp_path / "both", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = torch.randint(8, 64, (1, 9))
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids).logits, model(ids).logits)


def test_a_memory_with_a_token_map_is_not_written_as_qwen_which_has_none(tmp_path):
    table = TokenMap.identity(VOCAB).table.copy()
    table[[3, 4]] = table[[4, 3]]  # as many ids, and pad where it was: the layout is the same
    filled(QWEN, token_map=TokenMap(table)).save(tmp_path / "ours")
    with pytest.raises(ValueError, match="token map"):
        convert(tmp_path / "ours", tmp_path / "qwen", "qwen")
    assert not (tmp_path / "qwen").exists()


def test_rows_that_must_be_rounded_are_reported(tmp_path):
    config = V41.replace(table_dtype="float32")
    memory = filled(config)
    memory.save(tmp_path / "ours")
    report = convert(tmp_path / "ours", tmp_path / "v41", "deepseek-v4.1")
    assert not report["lossless"] and 0 < report["max_error"] < 0.3
    source = open_source(tmp_path / "v41")
    memory.encode_tables("fp8")
    assert torch.equal(source.rows[1].read(0, source.rows[1].rows), memory.tables[1].tensor)


@pytest.mark.parametrize("codec", ["fp8", "int8"])
def test_encoded_folders_convert_to_the_values_they_read_as(codec, tmp_path):
    memory = filled(QWEN, token_map=TokenMap.identity(VOCAB))
    memory.encode_tables(codec)
    memory.save(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "qwen", "qwen")
    rows = open_source(tmp_path / "qwen").rows[0]
    table = memory.tables[0]
    assert torch.equal(rows.read(0, rows.rows).float(), table.gather(torch.arange(table.rows)))


def test_never_written_rows_of_a_normal_table_convert_to_the_values_they_read_as(tmp_path):
    memory = EngramMemory(DEMO, TOKENS, D, M)
    memory.save(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "demo", "demo")
    rows = open_source(tmp_path / "demo").rows[1]
    assert torch.equal(rows.read(0, rows.rows), memory.tables[1].gather(torch.arange(memory.tables[1].rows)))
    assert rows.read(0, 5).abs().min() > 0


def test_blocks_smaller_than_the_table_give_the_same_files(v41, tmp_path, monkeypatch):
    convert(v41, tmp_path / "one", "engram", token_map=TOKENS)
    monkeypatch.setattr(recoder, "BLOCK", 4 * 64 * 10)  # ten rows
    convert(v41, tmp_path / "many", "engram", token_map=TOKENS)
    one, many = (json.loads((tmp_path / n / "manifest.json").read_text()) for n in ("one", "many"))
    assert one["tables"] == many["tables"]  # digests of the rows are in there
    assert all(one["files"][name] == many["files"][name] for name in ("layer-1.fp8", "layer-3.fp8"))


def test_no_more_than_a_block_is_ever_read_at_once(v41, tmp_path, monkeypatch):
    asked, read = [], Stored.read
    monkeypatch.setattr(recoder, "BLOCK", 4 * 64 * 10)

    def spy(self, first=0, stop=None):
        if "embed" in self.name or self.name.endswith(".fp8"):
            asked.append((self.shape[0] if stop is None else stop) - first)
        return read(self, first, stop)

    monkeypatch.setattr(Stored, "read", spy)
    convert(v41, tmp_path / "ours", "engram", token_map=TOKENS)
    convert(tmp_path / "ours", tmp_path / "back", "deepseek-v4.1")
    assert max(asked) == 10 and sum(asked) > 4 * sum(rows_of(V41).values())


def test_the_tokenizer_beside_a_checkpoint_gives_its_token_map(v41, tmp_path):
    from tokenizers import Tokenizer, models

    words = [f"w{i}" for i in range(VOCAB)] + [f"W{i}" for i in range(10)]  # equal to the first ten but for their case
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    tokenizer.save(str(v41 / "tokenizer.json"))
    convert(v41, tmp_path / "ours", "engram")
    assert EngramMemory.load(tmp_path / "ours", mode="shared").hasher.token_map.digest == TOKENS.digest


# --- GGUF ---


@pytest.mark.parametrize("config", [V41, DEMO])
def test_gguf_holds_the_rows_and_what_addresses_them(config, tmp_path):
    memory = filled(config.replace(table_dtype="float32"))
    memory.save(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "t.gguf", "gguf")
    tensors, facts = read_gguf(tmp_path / "t.gguf")
    for layer, table in memory.tables.items():
        stored = tensors[f"blk.{layer}.engram_embd.weight"]
        assert stored.offset % 32 == 0 and torch.equal(stored.read(), table.tensor)
    assert HashLayout.from_json(facts["engram.layout"]).digest == memory.layout.digest
    assert facts["engram.token_map_digest"] == TOKENS.digest


def test_gguf_reads_in_the_gguf_package(v41, tmp_path):
    gguf = pytest.importorskip("gguf")
    convert(v41, tmp_path / "t.gguf", "gguf", token_map=TOKENS)
    source = open_source(v41)
    reader = gguf.GGUFReader(tmp_path / "t.gguf")
    assert [(t.name, t.tensor_type.name, t.shape.tolist()) for t in reader.tensors] == [
        (f"blk.{layer}.engram_embd.weight", "I8", [66, rows]) for layer, rows in rows_of(V41).items()
    ]
    for tensor, rows in zip(reader.tensors, source.rows.values(), strict=True):  # e4m3 values, then scales
        assert tensor.data.view(np.uint8).tobytes() == rows.read(0, rows.rows).numpy().tobytes()
    assert reader.fields["engram.streams"].contents() == source.streams


def test_a_torn_gguf_file_is_refused(tmp_path):
    filled(DEMO).save(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "t.gguf", "gguf")
    data = (tmp_path / "t.gguf").read_bytes()
    for length in (3, 20, 200, len(data) - 1000):
        (tmp_path / "torn.gguf").write_bytes(data[:length])
        with pytest.raises(ValueError, match="torn"):
            read_gguf(tmp_path / "torn.gguf")


# --- what is refused ---


def test_a_missing_shard_is_refused_by_name(v41, tmp_path):
    (v41 / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"layers.3.engram.embed.weight is in the shard .*model-00002-of-00002.saf"):
        convert(v41, tmp_path / "ours", "engram", token_map=TOKENS)
    (v41 / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"the shard .*model-00002-of-00002.safetensors is missing"):
        convert(v41, tmp_path / "ours", "engram", token_map=TOKENS)
    assert not (tmp_path / "ours").exists()


def test_a_missing_rank_is_refused_by_name(v41, tmp_path):
    convert(v41, tmp_path / "tp", "deepseek-v4.1", shards=3)
    (tmp_path / "tp" / "model1-mp3.safetensors").unlink()
    with pytest.raises(ValueError, match=r"the shard .*model1-mp3.safetensors is missing"):
        open_source(tmp_path / "tp")


def test_a_table_under_two_names_is_refused(v41):
    file = v41 / "model-00001-of-00002.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["layers.1.engram.embed_tokens.weight"] = tensors["layers.1.engram.embed.weight"].clone()
    safetensors.torch.save_file(tensors, file)
    (v41 / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"embed.* and .*embed.* are both tables of layer 1: remove one"):
        open_source(v41)


def test_ranks_under_each_others_names_are_refused(v41, tmp_path):
    home = tmp_path / "tp"
    convert(v41, home, "deepseek-v4.1", shards=2)
    os.rename(home / "model0-mp2.safetensors", tmp_path / "first")
    os.rename(home / "model1-mp2.safetensors", home / "model0-mp2.safetensors")
    os.rename(tmp_path / "first", home / "model1-mp2.safetensors")
    with pytest.raises(ValueError, match=r"model0-mp2.safetensors was written as rank 1/2"):
        open_source(home)


def test_ranks_that_differ_in_a_weight_that_all_have_are_refused(v41, tmp_path):
    home = tmp_path / "tp"
    convert(v41, home, "deepseek-v4.1", shards=2)
    tensors = safetensors.torch.load_file(home / "model1-mp2.safetensors")
    tensors["layers.1.engram.q_weight"] = tensors["layers.1.engram.q_weight"] * 2
    safetensors.torch.save_file(tensors, home / "model1-mp2.safetensors")
    with pytest.raises(ValueError, match=r"q_weight is not the same in .*model0-mp2.* and in .*model1-mp2"):
        open_source(home)


def test_a_config_of_another_layout_beside_tensors_that_we_wrote_is_refused(v41, tmp_path):
    convert(v41, tmp_path / "ours", "engram", token_map=TOKENS)
    convert(tmp_path / "ours", tmp_path / "back", "deepseek-v4.1")
    published = json.loads((tmp_path / "back" / "config.json").read_text())
    published["text_config"]["engram_pad_token_id"] = 3
    (tmp_path / "back" / "config.json").write_text(json.dumps(published))
    with pytest.raises(ValueError, match="its tensors were written for the hash layout"):
        open_source(tmp_path / "back")


def test_a_config_given_for_tensors_of_another_dialect_is_refused(tmp_path):
    filled(DEMO).save(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "demo", "demo")
    with pytest.raises(ValueError, match="demo cannot express bias=False"):
        open_source(tmp_path / "demo", DEMO.replace(bias=False))


def test_scales_in_bytes_read_like_scales_in_e8m0(v41):
    before = open_source(v41).weights[1]
    scale = tensors_of(v41)["layers.1.engram.wkv.scale"]
    rewrite(v41, "layers.1.engram.wkv.scale", scale.view(torch.uint8))
    assert all(torch.equal(value, before[name]) for name, value in open_source(v41).weights[1].items())


def altered_v41(name: str, value):
    return lambda home: rewrite(home, f"layers.1.engram.{name}", value)


ROWS = rows_of(V41)[1]
NAN_SCALE = e8m0((ROWS, 2), 0).view(torch.uint8).index_fill(0, torch.tensor([77]), 255).view(torch.float8_e8m0fnu)
NAN_VALUE = e4m3((ROWS, 64), 0).view(torch.uint8).index_fill(0, torch.tensor([77]), 127).view(torch.float8_e4m3fn)


@pytest.mark.parametrize(("name", "value", "reason"), [
    ("embed.scale", e8m0((ROWS, 3), 0), r"embed.scale is F8_E8M0 \[\d+, 3\], expected .* such as \[\d+, 2\]"),
    ("embed.scale", torch.ones(ROWS, 2).int(), r"layers.1.engram.embed.scale is I32 .* expected F8_E8M0"),
    ("embed.scale", torch.ones(ROWS - 1, 1), r"layers.1.engram.embed.scale is F32 .* expected F8_E8M0"),
    ("embed.scale", None, r"layers.1.engram.embed.scale is missing: layers.1.engram.embed.weight is e4m3"),
    ("embed.scale", NAN_SCALE, r"layers.1.engram.embed.weight, rows 0 to \d+: row 77 .* NaN"),
    ("embed.weight", NAN_VALUE, r"layers.1.engram.embed.weight, rows 0 to \d+: row 77 .* NaN"),
    ("embed.weight", e4m3((ROWS, 32), 0), r"layers.1.engram.embed.weight is F8_E4M3 .* expected rows of 64"),
    ("embed.weight", torch.zeros(ROWS, 64, dtype=torch.int32), r"embed.weight is I32, expected one of F32"),
    ("wkv.scale", e8m0((3, 3), 0), r"wkv.scale is F8_E8M0 \[3, 3\] .* expected a scale per 32 x 32"),
    ("wkv.weight", None, "tensor layers.1.engram.wkv.weight is missing"),
    ("k_weight", torch.ones(M, 63), r"k_weight is \[2, 63\], expected \[2, 64\]"),
    ("q_weight", torch.full((M, 64), torch.nan), "q_weight holds a value that is not finite"),
    ("q_weight", torch.ones(M, 64).int(), "q_weight is I32, expected F32, BF16, F16 or F8_E4M3"),
    ("q_weight", torch.ones(0, 64), r"q_weight is \[0, 64\]: these are not the weights of a memory"),
    ("wkv.weight", torch.zeros(3, 2, 2), r"wkv.weight is \[3, 2, 2\], expected \[192, 384\]"),
    ("wkv.weight", torch.zeros(192, 384), "wkv.scale scales layers.1.engram.wkv.weight, which is F32, not F8_E4M3"),
    ("wkv.scale", torch.ones(0, 12), r"wkv.scale is F32 \[0, 12\] .* expected a scale per 32 x 32"),
    ("wkv.weight", torch.zeros(192, 384, dtype=torch.complex64), "wkv.weight is C64, expected F32"),
])  # fmt: skip
def test_an_altered_tensor_is_refused_by_name_with_what_was_expected(v41, tmp_path, name, value, reason):
    rewrite(v41, f"layers.1.engram.{name}", value)
    (v41 / "model.safetensors.index.json").unlink()  # which would name a removed tensor first
    with pytest.raises(ValueError, match=reason):
        convert(v41, tmp_path / "ours", "engram", token_map=TOKENS)
    assert not (tmp_path / "ours").exists()


def test_swapped_layers_are_refused(v41, tmp_path):
    files = [v41 / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    one, other = (safetensors.torch.load_file(file) for file in files)
    safetensors.torch.save_file({k.replace("layers.1.", "layers.3."): v for k, v in one.items()}, files[1])
    safetensors.torch.save_file({k.replace("layers.3.", "layers.1."): v for k, v in other.items()}, files[0])
    with pytest.raises(
        ValueError, match=r"layers.1.engram.embed.weight has .* rows, expected .* the layers are swapped"
    ):
        open_source(v41)


def test_two_layers_with_one_file_are_refused(v41, tmp_path):
    one = safetensors.torch.load_file(v41 / "model-00001-of-00002.safetensors")
    copy = {k.replace("layers.1.", "layers.3."): v for k, v in one.items()}
    safetensors.torch.save_file(copy, v41 / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match=r"layers.3.engram.embed.weight has .* that is the size of layer 1's table"):
        open_source(v41)


def test_two_tensors_that_share_bytes_are_refused(tmp_path):
    safetensors.torch.save_file({"a": torch.zeros(4), "b": torch.ones(4)}, tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(data.replace(b"[16,32]", b"[0,16] "))
    with pytest.raises(ValueError, match="two tensors share bytes"):
        open_checkpoint(tmp_path)


def test_a_truncated_file_is_refused(v41):
    file = v41 / "model-00002-of-00002.safetensors"
    os.truncate(file, file.stat().st_size - 10)
    with pytest.raises(ValueError, match="torn"):
        open_source(v41)


@pytest.mark.parametrize("token_map", [TokenMap.identity(VOCAB + 1), TokenMap.identity(VOCAB - 1)])
def test_a_token_map_of_another_tokenizer_version_is_refused(v41, tmp_path, token_map):
    with pytest.raises(
        ValueError, match=r"engram_compressed_vocab_size is 40: it comes from another tokenizer version"
    ):
        convert(v41, tmp_path / "ours", "engram", token_map=token_map)


def test_a_token_map_of_the_same_size_is_refused_if_the_checkpoint_has_its_own(v41, tmp_path):
    TOKENS.save(v41 / "token_map.safetensors")
    with pytest.raises(ValueError, match="is not the one in"):
        convert(v41, tmp_path / "ours", "engram", token_map=TokenMap.identity(VOCAB))


def grown(*added: int) -> TokenMap:
    """Return TOKENS with added tokens of these classes; classes from VOCAB on are new."""
    return TokenMap(np.concatenate([TOKENS.table, added]))


@pytest.mark.parametrize("added", [(VOCAB,), (VOCAB, VOCAB + 1, VOCAB + 2), (3, VOCAB, 5)])
def test_a_tokenizer_with_added_tokens_converts_to_the_same_memory(v41, tmp_path, added):
    TOKENS.save(v41 / "token_map.safetensors")
    swapped = TOKENS.table.copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    source = v41
    for i, to in enumerate(("engram", "gguf", "engram")):
        for name, token_map in (("plain", None), ("grown", grown(*added))):
            convert(source, tmp_path / f"{i} {name}", to, token_map=token_map)
        plain, other = open_source(tmp_path / f"{i} plain"), open_source(tmp_path / f"{i} grown")
        assert plain.token_map.digest == other.token_map.digest == TOKENS.digest
        assert all(torch.equal(plain.rows[n].read(0, 9), other.rows[n].read(0, 9)) for n in (1, 3))
        with pytest.raises(ValueError, match=r"given is not the one in .* differ in 2 of the 50 ids, first in id 3"):
            convert(source, tmp_path / "x", "gguf", token_map=TokenMap(np.concatenate([swapped, added])))
        with pytest.raises(ValueError, match="which the other one lacks"):
            convert(source, tmp_path / "x", "gguf", token_map=TokenMap(TOKENS.table[:-1]))
        source = tmp_path / f"{i} grown"


@pytest.mark.parametrize("added", [["new"], ["new", "Ｗ3", "newer"], ["w40", "w41"]])
def test_a_tokenizer_beside_a_checkpoint_may_have_grown_if_the_earlier_one_is_passed(v41, tmp_path, added):
    from tokenizers import Tokenizer, models

    words = [f"w{i}" for i in range(VOCAB)] + [f"W{i}" for i in range(10)] + added
    ids = {word: i for i, word in enumerate(dict.fromkeys(words))}
    Tokenizer(models.WordLevel(ids, unk_token="w0")).save(str(v41 / "tokenizer.json"))
    for token_map in (None, TokenMap.from_tokenizer(Tokenizer.from_file(str(v41 / "tokenizer.json")))):
        with pytest.raises(ValueError, match="engram_compressed_vocab_size is 40"):
            convert(v41, tmp_path / "ours", "engram", token_map=token_map)
    swapped = TOKENS.table.copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    with pytest.raises(ValueError, match="is not the one in"):
        convert(v41, tmp_path / "ours", "engram", token_map=TokenMap(swapped))
    convert(v41, tmp_path / "ours", "engram", token_map=TOKENS)
    assert open_source(tmp_path / "ours").token_map.digest == TOKENS.digest


@pytest.mark.parametrize("to", ["engram", "gguf"])
def test_a_format_that_stores_addresses_needs_the_tokenizer(v41, tmp_path, to):
    with pytest.raises(ValueError, match="give token_map"):
        convert(v41, tmp_path / "there", to)
    convert(v41, tmp_path / "there", to, token_map=TOKENS)
    if to == "gguf":
        layout = HashLayout.from_json(read_gguf(tmp_path / "there")[1]["engram.layout"])
        assert layout.pad_id == TOKENS.table[2] and layout.compressed_vocab == VOCAB


def test_32_bit_row_ids_and_moduli_of_another_layout_are_refused_by_name(tmp_path):
    filled(QWEN, token_map=TokenMap.identity(VOCAB)).save(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "qwen", "qwen", shards=2)
    name = "model.language_model.layers.0.ple.ple_embedding.ngram_heads_offsets"
    good = tensors_of(tmp_path / "qwen")[name]
    rewrite(tmp_path / "qwen", name, good.int())
    with pytest.raises(ValueError, match=f"{name} is I32, expected I64: row ids need 64 bits"):
        open_source(tmp_path / "qwen")
    rewrite(tmp_path / "qwen", name, good + torch.tensor([0, 0, 2, 2]))
    with pytest.raises(ValueError, match=rf"{name} has 200 at index 2, expected 198"):
        open_source(tmp_path / "qwen")
    rewrite(tmp_path / "qwen", name, good)
    name = name.replace("offsets", "vocab_sizes")
    rewrite(tmp_path / "qwen", name, torch.tensor([97, 101, 103, 109]))
    with pytest.raises(
        ValueError, match=f"{name} has 109 at index 3, expected 107: its rows were addressed by another"
    ):
        open_source(tmp_path / "qwen")


def test_rows_that_are_not_finite_are_refused_by_name(tmp_path):
    filled(QWEN, token_map=TokenMap.identity(VOCAB)).save(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "qwen", "qwen", shards=2)
    name = "model.language_model.layers.0.ple.ple_embedding.ngram_embedding.shard_1.weight"
    rows = tensors_of(tmp_path / "qwen")[name]
    rows[3, 4] = torch.inf
    rewrite(tmp_path / "qwen", name, rows)
    with pytest.raises(ValueError, match=r"ngram_embedding.shard_0.weight, rows 0 to \d+: a value is NaN or infinite"):
        convert(tmp_path / "qwen", tmp_path / "back", "engram")


@pytest.mark.parametrize(
    ("to", "reason"), [("qwen", "short convolution"), ("demo", "short convolution"), ("onnx", "unknown")]
)
def test_a_format_that_cannot_hold_the_memory_is_refused(v41, tmp_path, to, reason):
    with pytest.raises(ValueError, match=reason):
        convert(v41, tmp_path / "there", to)


def test_a_target_that_exists_is_not_touched(v41, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError):
        convert(v41, tmp_path / "there", "deepseek-v4.1")
    with pytest.raises(ValueError, match="demo has no shards"):
        convert(v41, tmp_path / "new", "demo", shards=2)


def test_more_ranks_than_columns_are_refused(v41, tmp_path):
    with pytest.raises(ValueError, match="6 columns cannot be given to 99 ranks"):
        convert(v41, tmp_path / "there", "deepseek-v4.1", shards=99, by="head")


def test_a_disk_without_room_is_refused_before_anything_is_written(v41, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: Free)
    with pytest.raises(OSError, match=r"no room for .*there: its tables take [\d,]+ bytes, 100 are free"):
        convert(v41, tmp_path / "there", "deepseek-v4.1")


@pytest.mark.parametrize("to", ["deepseek-v4.1", "gguf"])
def test_a_disk_that_fills_up_leaves_nothing_and_is_named_with_the_tensor(v41, tmp_path, monkeypatch, to):
    from engram.integrations.formats import safetensors_io as tensors

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensors.os, "pwrite", full)
    with pytest.raises(OSError, match=r"could not write tensor \S*engram\S* to .*there.*No space left"):
        convert(v41, tmp_path / "new" / "there", to, token_map=TOKENS)
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("text", ["[]", "3", '{"text_config": 3}', '{"text_config": [1]}'])
def test_a_config_that_is_not_an_object_is_refused(v41, text):
    (v41 / "config.json").write_text(text)
    with pytest.raises(ValueError, match="object"):
        open_source(v41)
    with pytest.raises(ValueError, match="JSON object"):
        read_config(str(v41 / "config.json"))


class Free:
    free = 100


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_an_invalid_index_is_refused_by_name(v41, text):
    (v41 / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json cannot be read"):
        open_source(v41)


def test_a_disk_that_returns_one_wrong_byte_is_refused(v41, tmp_path, monkeypatch):
    from engram.integrations.formats import safetensors_io as tensors

    write, done = os.pwrite, []

    def flip(file, data, at):
        if len(data) == ROWS * 64 and not done:  # the values of layer 1: one bit of row 5
            data = bytearray(data)
            data[5 * 64] ^= 1
            done.append(at)
        return write(file, data, at)

    monkeypatch.setattr(tensors.os, "pwrite", flip)
    monkeypatch.setattr(conversion, "_compare", lambda *args: None)  # random rows would rarely find it
    with pytest.raises(OSError, match=r"tensor layers.1.engram.embed.weight does not read back as it was written"):
        convert(v41, tmp_path / "there", "deepseek-v4.1")
    assert done and not (tmp_path / "there").exists()


# --- inspect and the command line ---


def test_inspect_names_the_dialect_rows_and_bytes(v41):
    found = inspect_file(v41)
    assert found["kind"] == "deepseek-v4.1" and found["problem"] is None
    rows = rows_of(V41)[3]
    assert found["tables"][3] == {"rows": rows, "dim": 64, "form": "fp8", "bytes": rows * 66}
    scale = next(t for t in found["tensors"] if t["name"] == "layers.3.engram.embed.scale")
    assert (scale["dtype"], scale["shape"], scale["bytes"]) == ("F8_E8M0", [rows, 2], rows * 2)


def test_inspect_reports_what_is_wrong_and_what_is_not_a_memory(v41, tmp_path):
    (v41 / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors, which is missing" in inspect_file(v41)["problem"]
    safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    assert inspect_file(tmp_path / "a.safetensors")["kind"] == "other"
    with pytest.raises(FileNotFoundError):
        inspect_file(tmp_path / "nothing")


def test_the_command_line_converts_and_inspects(v41, tmp_path):
    TOKENS.save(tmp_path / "map.safetensors")
    run = CliRunner().invoke
    result = run(app, ["convert", str(v41), str(tmp_path / "ours"), "--tokenizer", str(tmp_path / "map.safetensors")])
    assert result.exit_code == 0 and "nothing was rounded; read back and equal" in result.stdout
    result = run(app, ["inspect", str(tmp_path / "ours"), "--json"])
    assert json.loads(result.stdout)["kind"] == "engram"
    result = run(app, ["inspect", str(v41)])
    assert f"layer 1: {ROWS:,} rows x 64, fp8" in result.stdout


# --- what looks whole and is not ---


def test_a_damaged_folder_of_ours_is_not_given_new_digests(tmp_path, monkeypatch):
    monkeypatch.setattr("engram.storage.files.BLOCK", 1 << 12)  # more blocks than opening a folder looks at
    memory = filled(DEMO.replace(rows_per_head=997))
    memory.save(tmp_path / "ours")
    file, entry = tmp_path / "ours" / "layer-1.rows", 3 * (1 << 12) + 7
    content = bytearray(file.read_bytes())
    content[entry] ^= 1
    file.write_bytes(content)
    for to in ("engram", "demo"):
        with pytest.raises(ValueError, match=r"layer-1.rows: block 3 of"):
            convert(tmp_path / "ours", tmp_path / to, to)
        assert not (tmp_path / to).exists()


@pytest.mark.parametrize("name", ["weights{}-mp12", "model_{:02}-mp12", "model{:02}-mp12"])
def test_ranks_are_joined_by_number_whatever_their_file_names(v41, tmp_path, name):
    convert(v41, tmp_path / "tp", "deepseek-v4.1", shards=12)
    other = tmp_path / "other"
    other.mkdir()
    for rank in range(12):
        shutil.copy(tmp_path / "tp" / f"model{rank}-mp12.safetensors", other / (name.format(rank) + ".safetensors"))
    shutil.copy(tmp_path / "tp" / "config.json", other)
    for layer, rows in open_source(tmp_path / "tp").rows.items():
        assert torch.equal(open_source(other).rows[layer].read(0, rows.rows), rows.read(0, rows.rows))
    (other / (name.format(11) + ".safetensors")).unlink()
    with pytest.raises(ValueError, match=r"11-mp12.safetensors is missing: there are 12"):
        open_source(other)


def test_a_token_map_of_the_same_size_is_compared_with_the_tokenizer_beside_the_checkpoint(v41, tmp_path):
    from tokenizers import Tokenizer, models

    words = [f"w{i}" for i in range(VOCAB)] + [f"W{i}" for i in range(10)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    tokenizer.save(str(v41 / "tokenizer.json"))
    with pytest.raises(ValueError, match="is not the one in"):
        convert(v41, tmp_path / "ours", "engram", token_map=TokenMap.identity(VOCAB))
    convert(v41, tmp_path / "ours", "engram", token_map=TOKENS)


@pytest.mark.parametrize("to", ["engram", "gguf", "deepseek-v4.1"])
def test_fp8_rows_that_read_as_infinite_are_refused_by_name(v41, tmp_path, to):
    name = "layers.1.engram.embed"
    values, scales = (tensors_of(v41)[f"{name}.{part}"].view(torch.uint8).clone() for part in ("weight", "scale"))
    values[5, 0], scales[5, 0] = 0x7E, 254  # 448 x 2^127
    rewrite(v41, f"{name}.weight", values.view(torch.float8_e4m3fn))
    rewrite(v41, f"{name}.scale", scales.view(torch.float8_e8m0fnu))
    with pytest.raises(ValueError, match=r"embed.weight.*, rows 0 to \d+: a value is NaN or infinite"):
        convert(v41, tmp_path / "out", to, token_map=TOKENS)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [float("inf")], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1.9], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4.0]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "__metadata__": None},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "__metadata__": [1]},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "__metadata__": {"x": 1}},
    ],
)
def test_a_header_of_odd_values_is_refused_and_not_rounded(tmp_path, header):
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(ValueError, match="its header cannot be read"):
        open_checkpoint(tmp_path)


def test_a_gguf_file_without_a_real_alignment_is_refused(tmp_path):
    convert_to = tmp_path / "memory.gguf"
    filled(QWEN, token_map=TokenMap.identity(VOCAB)).save(tmp_path / "ours")
    convert(tmp_path / "ours", convert_to, "gguf")
    content = convert_to.read_bytes()
    at = content.index(b"general.alignment") + len(b"general.alignment") + 4
    convert_to.write_bytes(content[:at] + bytes(4) + content[at + 4 :])
    with pytest.raises(ValueError, match=r"general.alignment is 0"):
        read_gguf(convert_to)
