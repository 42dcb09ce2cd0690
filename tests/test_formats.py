"""convert and inspect: every format to and fro, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from engram import EngramConfig, EngramMemory, TokenMap
from engram.cli import app
from engram.integrations import formats
from engram.integrations.formats import convert, inspect
from engram.integrations.gguf import read_gguf
from engram.integrations.sources import open_source
from engram.integrations.tensors import open_checkpoint

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
    """Random e4m3 bytes that are no NaN."""
    bits = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return torch.where(bits % 128 == 127, bits - 1, bits).view(torch.float8_e4m3fn)


def e8m0(shape, seed: int) -> torch.Tensor:
    """Random scales, the smallest (byte 0) among them."""
    bits = torch.randint(100, 150, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    bits.view(-1)[0] = 0
    return bits.view(torch.float8_e8m0fnu)


def v41_tensors(layer: int, rows: int) -> dict[str, torch.Tensor]:
    prefix, wide = f"layers.{layer}.engram.", V41.d_mem
    return {
        f"{prefix}embed.weight": e4m3((rows, 64), layer),
        f"{prefix}embed.scale": e8m0((rows, 2), layer),
        f"{prefix}wkv.weight": e4m3(((M + 1) * 64, wide), layer + 50),
        f"{prefix}wkv.scale": e8m0(((M + 1) * 2, wide // 32), layer + 51).view(torch.uint8).clamp(min=110).view(torch.float8_e8m0fnu),
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
    from engram.integrations.dialects import layout_of

    return layout_of(config).rows


@pytest.fixture
def v41(tmp_path: Path) -> Path:
    """A checkpoint as DeepSeek-V4.1's: the real names and dtypes, a file per layer, an index, a backbone's tensor."""
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
    """A memory with random rows and weights."""
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
    """Replaces (or removes) one tensor of a checkpoint in place."""
    for file in home.glob("*.safetensors"):
        tensors = safetensors.torch.load_file(file)
        if name in tensors:
            tensors.pop(name)
            safetensors.torch.save_file(tensors | ({} if value is None else {name: value}), file)


# --- to and fro ---


def test_v41_tensors_survive_the_way_into_our_folder_and_back_bit_for_bit(v41, tmp_path):
    report = convert(v41, tmp_path / "ours", "engram", token_map=TOKENS)
    assert report["lossless"] and report["rows"] == rows_of(V41)
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


def test_rows_of_a_v41_checkpoint_read_from_our_folder_as_values_times_scales(v41, tmp_path):
    convert(v41, tmp_path / "ours", "engram", token_map=TOKENS)
    memory = EngramMemory.load(tmp_path / "ours", mode="shared")
    assert memory.codec == "fp8" and memory.tables[1].nbytes == rows_of(V41)[1] * 66
    tensors = tensors_of(v41)
    for layer, table in memory.tables.items():
        scales = tensors[f"layers.{layer}.engram.embed.scale"].view(torch.uint8).double() - 127
        values = tensors[f"layers.{layer}.engram.embed.weight"].double() * 2**scales.repeat_interleave(32, 1)
        assert torch.equal(table.gather(torch.arange(table.rows)).double(), values)
