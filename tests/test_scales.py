"""Released tables whose values are multiplied by scales, per table, row or block: e4m3 and int8 rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from test_formats import QWEN, VOCAB, D, M, convert, e4m3, e8m0, filled, inspect_file, rewrite

from engram import EngramMemory, TokenMap
from engram.integrations.formats.readers import open_source

STEM = "model.language_model.layers.{}.ple.ple_embedding.ngram_embedding."
SHARDS = 3


def floats(shape, dtype=torch.float32, seed=3):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 0.01 + 0.001).to(dtype)


def int8(shape, seed):
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def checkpoint(home: Path, values, scales, name="shard_{}.weight", stem=STEM) -> dict[int, torch.Tensor]:
    """A Qwen4-Exp checkpoint whose shards hold `values`; scales(rows of each shard) -> {name below the stem: tensor}.

    Returns what each layer's rows are: values x scales in float32.
    """
    filled(QWEN, token_map=TokenMap.identity(VOCAB)).save(home.with_name("memory"))
    convert(home.with_name("memory"), home, "qwen", shards=SHARDS)
    expected = {}
    for layer in QWEN.layers:
        file = next(f for f in home.glob("*.safetensors") if any(f"layers.{layer}." in n for n in header(f)))
        tensors = safetensors.torch.load_file(file)
        here = stem.format(layer)
        shards = [tensors.pop(f"{here}shard_{i}.weight") for i in range(SHARDS)]
        stored = [values(shard.shape, layer + i) for i, shard in enumerate(shards)]
        named, wide = scales([len(shard) for shard in shards])
        tensors |= {here + name.format(i): part for i, part in enumerate(stored)}
        tensors |= {here + key: value for key, value in named.items()}
        safetensors.torch.save_file(tensors, file)
        expected[layer] = torch.cat([part.float() for part in stored]) * wide
    (home / "model.safetensors.index.json").unlink()
    return expected


def header(file: Path) -> list[str]:
    with safetensors.safe_open(file, "pt") as opened:
        return list(opened.keys())


def for_table(scale):
    return lambda counts: ({"weight_scale": scale}, scale.float().view(1, 1))


def per_row(dtype, one_tensor, shape=(1,), name="weight_scale"):
    def make(counts):
        parts = [floats((n, *shape), dtype, seed=i) for i, n in enumerate(counts)]
        wide = torch.cat(parts).float().view(-1, 1)
        named = {name: torch.cat(parts)} if one_tensor else {f"shard_{i}.{name}": p for i, p in enumerate(parts)}
        return named, wide

    return make


def per_block(make, block, name="weight_scale_inv"):
    def scales(counts):
        parts = [make((n, 32 // block), i) for i, n in enumerate(counts)]
        return {f"shard_{i}.{name}": p for i, p in enumerate(parts)}, torch.cat(parts).float().repeat_interleave(
            block, 1
        )

    return scales


CASES = {
    "one bf16 scalar, as released": (e4m3, for_table(torch.tensor([0.01], dtype=torch.bfloat16)), "bfloat16"),
    "one float32 scalar": (e4m3, for_table(torch.tensor(0.0123)), "bfloat16"),
    "one power of two": (e4m3, for_table(torch.tensor([[2.0**-9]], dtype=torch.bfloat16)), "fp8"),
    "one e8m0": (e4m3, for_table(torch.tensor([117], dtype=torch.uint8).view(torch.float8_e8m0fnu)), "fp8"),
    "per row of each shard": (e4m3, per_row(torch.bfloat16, False), "bfloat16"),
    "per row of the table": (e4m3, per_row(torch.float32, True), "bfloat16"),
    "per row without a second dimension": (e4m3, per_row(torch.float16, False, shape=()), "bfloat16"),
    "per block of 16": (e4m3, per_block(lambda s, i: floats(s, seed=i), 16), "bfloat16"),
    "per block of 8, bf16": (e4m3, per_block(lambda s, i: floats(s, torch.bfloat16, i), 8), "bfloat16"),
    "per block of 16, e8m0": (e4m3, per_block(e8m0, 16), "bfloat16"),
    "per block of 32, e8m0": (e4m3, per_block(e8m0, 32, "scale"), "fp8"),
    "int8 per row": (int8, per_row(torch.float32, False), "bfloat16"),
    "int8 per row of the table": (int8, per_row(torch.bfloat16, True, name="scales"), "bfloat16"),
    "int8 per block": (int8, per_block(lambda s, i: floats(s, seed=i), 16), "bfloat16"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_scaled_rows_become_value_times_scale_in_float32_rounded_once(case, tmp_path):
    values, scales, kept = CASES[case]
    expected = checkpoint(tmp_path / "q", values, scales)
    found = inspect_file(tmp_path / "q")
    assert found["problem"] is None and found["tables"][0]["bytes"] < found["tables"][0]["rows"] * 32 * 4
    report = convert(tmp_path / "q", tmp_path / "ours", "engram")
    memory = EngramMemory.load(tmp_path / "ours")
    error = 0.0
    for layer, table in memory.tables.items():
        rows = expected[layer] if kept == "fp8" else expected[layer].bfloat16()
        assert memory.codec == (kept if kept == "fp8" else None)
        assert torch.equal(table.gather(torch.arange(table.rows)).float(), rows.float())
        error = max(error, float((rows.float() - expected[layer]).abs().max()))
    assert report["max_error"] == error and report["lossless"] == (error == 0.0)


def test_a_config_of_float32_rows_gets_the_products_themselves(tmp_path):
    expected = checkpoint(tmp_path / "q", e4m3, for_table(torch.tensor([0.01], dtype=torch.bfloat16)))
    config = QWEN.replace(table_dtype="float32")
    report = convert(tmp_path / "q", tmp_path / "ours", "engram", config=config)
    memory = EngramMemory.load(tmp_path / "ours")
    assert report["lossless"] and all(torch.equal(t.tensor, expected[i]) for i, t in memory.tables.items())


@pytest.mark.parametrize("name", ["shards.{}.weight", "shards.{}"])
@pytest.mark.parametrize("values", [e4m3, lambda shape, seed: floats(shape, torch.bfloat16, seed)])
def test_shards_named_as_mlx_does_are_read_in_their_order(name, values, tmp_path):
    scaled = values is e4m3
    scale = torch.tensor([0.01], dtype=torch.bfloat16)
    scales = for_table(scale) if scaled else lambda counts: ({}, torch.ones(1, 1))
    expected = checkpoint(tmp_path / "q", values, scales, name)
    convert(tmp_path / "q", tmp_path / "ours", "engram")
    for layer, table in EngramMemory.load(tmp_path / "ours").tables.items():
        assert torch.equal(table.tensor, expected[layer].bfloat16())


def test_scaled_rows_convert_to_the_other_formats_too(tmp_path):
    expected = checkpoint(tmp_path / "q", e4m3, for_table(torch.tensor([0.01], dtype=torch.bfloat16)))
    convert(tmp_path / "q", tmp_path / "again", "qwen", shards=2)
    rows = open_source(tmp_path / "again").rows[2]
    assert rows.codec == "bfloat16" and torch.equal(rows.read(0, rows.rows), expected[2].bfloat16())


def test_ragged_last_blocks_are_those_of_a_power_of_two_and_not_of_equal_parts():
    from engram.integrations.formats.safetensors_io import Stored
    from engram.integrations.formats.scales import Scale, read_scale

    values = Stored("w", Path("w"), "F8_E4M3", (5, 160), 0, 800)
    for count, block in ((2, 128), (3, 64), (5, 32), (10, 16), (20, 8), (1, 160)):
        stored = Stored("s", Path("s"), "F32", (5, count), 0, 20 * count)
        assert read_scale("w", "s", values, stored, 160, None, 0) == Scale(stored, block, 0)
    for shape in ((5, 4), (5, 6), (4, 5), (5, 2, 1), (2,)):  # 4 and 6 fit no power of two
        with pytest.raises(ValueError, match="Another block size decodes w without an error"):
            read_scale("w", "s", values, Stored("s", Path("s"), "F32", shape, 0, 4), 160, None, 0)


@pytest.mark.parametrize(("name", "value", "reason"), [
    ("weight_scale", None, r"shard_0.scale is missing: .*shard_0.weight is e4m3 and needs scales"),
    ("weight_scale", torch.ones(2), r"weight_scale is F32 \[2\], expected"),
    ("weight_scale", torch.ones(1, dtype=torch.int32), r"weight_scale is I32 \[1\], expected F8_E8M0"),
    ("weight_scale", torch.tensor([torch.nan]), "a value is NaN or infinite"),
    ("weight_scale", torch.tensor([torch.inf]), "a value is NaN or infinite"),
    ("shard_0.weight_scale", torch.ones(1), "both scale .*shard_0.weight: remove the one that does not apply"),
    ("shard_1.zero_point", torch.ones(1), "zero_point shifts the values of .*shard_1.weight"),
    ("biases", torch.ones(1), "biases shifts the values of .*shard_0.weight"),
    ("shard_1.weight", int8((1, 32), 0), "shard_0.weight has .* rows in 3 parts, expected"),
])  # fmt: skip
def test_scales_that_do_not_fit_are_refused_by_name(name, value, reason, tmp_path):
    checkpoint(tmp_path / "q", e4m3, for_table(torch.tensor([0.01], dtype=torch.bfloat16)))
    here = STEM.format(0)
    file = next(f for f in (tmp_path / "q").glob("*.safetensors") if here + "weight_scale" in header(f))
    tensors = safetensors.torch.load_file(file)
    tensors.pop(here + name, None)
    safetensors.torch.save_file(tensors | ({} if value is None else {here + name: value}), file)
    with pytest.raises(ValueError, match=reason):
        convert(tmp_path / "q", tmp_path / "ours", "engram")
    assert not (tmp_path / "ours").exists()


def test_projections_with_one_scale_or_one_per_row_are_read(tmp_path):
    filled(QWEN, token_map=TokenMap.identity(VOCAB)).save(tmp_path / "memory")
    convert(tmp_path / "memory", tmp_path / "q", "qwen")
    name = "model.language_model.layers.0.ple.key_proj.weight"
    values = e4m3((M * D, QWEN.d_mem), 4)
    rewrite(tmp_path / "q", name, values)
    (tmp_path / "q" / "model.safetensors.index.json").unlink()
    file = next(f for f in (tmp_path / "q").glob("*.safetensors") if name in header(f))
    for scale in (torch.tensor([0.5]), torch.tensor(0.25).bfloat16(), floats((M * D, 1)), floats((M * D,))):
        tensors = safetensors.torch.load_file(file) | {name + "_scale": scale}
        safetensors.torch.save_file(tensors, file)
        found = open_source(tmp_path / "q").weights[0]["key.weight"]
        assert torch.equal(found, values.float() * scale.float().view(-1, 1))


def test_an_offloaded_model_of_scaled_rows_computes_what_one_of_their_products_does(tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.23")
    from test_offload import qwen

    from engram.integrations.transformers.offload import load_offloaded

    model = qwen(torch.bfloat16)
    scale = torch.tensor([0.013], dtype=torch.bfloat16)
    tensors, plain = {}, {}
    for name, value in model.state_dict().items():
        plain[name] = value.clone()
        if name.endswith("ngram_embedding.weight"):
            stored = (value.float() / 0.013).clamp(-400, 400).to(torch.float8_e4m3fn)
            plain[name] = (stored.float() * scale.float()).bfloat16()
            stem = name.removesuffix("weight")
            tensors |= {f"{stem}shard_{i}.weight": part.clone() for i, part in enumerate(stored.chunk(4))}
            tensors[f"{stem}weight_scale"] = scale.clone()
        else:
            tensors[name] = value.clone()
    model.config.split_ngram_parts = 4
    for home, held in (("fp8", tensors), ("plain", plain)):
        model.config.save_pretrained(tmp_path / home)
        safetensors.torch.save_file(held, tmp_path / home / "model.safetensors", metadata={"format": "pt"})
    ids = torch.randint(8, 64, (1, 9))
    expected = transformers.Qwen4ExpForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for folder in (None, tmp_path / "rows", tmp_path / "rows"):
            found = load_offloaded(tmp_path / "fp8", folder, dtype=torch.bfloat16)
            assert torch.equal(found(ids).logits, expected(ids).logits)
    odd = {name.replace(".mlp.", ".ffn."): value for name, value in tensors.items()}
    safetensors.torch.save_file(odd, tmp_path / "fp8" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks .*mlp.* which would be random"):
        load_offloaded(tmp_path / "fp8")
