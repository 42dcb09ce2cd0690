"""offload: a Qwen4-Exp model of transformers whose n-gram table lives outside of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

transformers = pytest.importorskip("transformers", minversion="5.23")

from engram.integrations.transformers.offload import HostedRows, load_offloaded, offload  # noqa: E402
from engram.storage.manifest import verify  # noqa: E402

EOS = 7


def qwen_config(**changes):
    shape = dict(
        vocab_size=64, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2,
        moe_intermediate_size=8, shared_expert_intermediate_size=8, num_experts=4, num_experts_per_tok=2, hc_count=2,
        hc_lowrank=4, ple_layer_ids=[1, 3], ple_embed_dim=32, heads_per_ngram=4, ngram_vocab_size_base=101,
        make_ngram_vocab_size_divisible_by=16, split_ngram_parts=3, eos_token_id=EOS, bos_token_id=1, pad_token_id=2,
        indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=8, indexer_compress_ratio=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
                         "mrope_section": [1, 1, 0], "mrope_interleaved": True},
    )  # fmt: skip
    return transformers.Qwen4ExpTextConfig(**{**shape, **changes})


def qwen(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    model = transformers.Qwen4ExpForCausalLM(qwen_config(**changes)).to(dtype).eval()
    for name, weight in model.named_parameters():
        if "ple" in name:
            torch.nn.init.normal_(weight, std=0.5)
    return model


def text(B=2, T=19) -> torch.Tensor:
    ids = torch.randint(8, 64, (B, T), generator=torch.Generator().manual_seed(1))
    ids[0, 6] = ids[0, 7] = ids[1, 11] = EOS
    return ids


@pytest.mark.parametrize("on_disk", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_logits_are_bit_identical_after_offload(tmp_path, on_disk, dtype):
    model = qwen(dtype)
    before = model(text()).logits
    tables = offload(model, tmp_path / "rows" if on_disk else None)
    assert sorted(tables) == [0, 2] and {t.dtype for t in tables.values()} == {dtype}
    assert torch.equal(model(text()).logits, before)
    if not on_disk:  # the table is what is read: other rows, other logits
        tables[0].write(torch.arange(tables[0].rows), torch.randn(tables[0].rows, tables[0].dim))
        assert not torch.equal(model(text()).logits, before)


@torch.no_grad()
def test_generation_with_a_cache_gives_the_same_tokens_after_offload(tmp_path):
    model, ids = qwen(), text()
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    before = model.generate(ids, **options)
    offload(model, tmp_path / "rows")
    assert torch.equal(model.generate(ids, **options), before)


def test_the_models_parameters_and_state_dict_shrink_by_the_tables(tmp_path):
    model = qwen()
    before = sum(p.numel() for p in model.parameters())
    tables = offload(model, tmp_path / "rows")
    assert before - sum(p.numel() for p in model.parameters()) == sum(t.rows * t.dim for t in tables.values())
    assert not any("ngram_embedding" in name for name in model.state_dict())


def test_casting_an_offloaded_model_casts_its_rows_as_casting_the_table_would(tmp_path):
    model, twin = qwen(), qwen()
    offload(model, tmp_path / "rows")
    with torch.no_grad():
        assert torch.equal(model.bfloat16()(text()).logits, twin.bfloat16()(text()).logits)


def test_an_offloaded_model_is_saved_without_its_rows(tmp_path):
    model = qwen()
    offload(model, tmp_path / "rows")
    model.save_pretrained(tmp_path / "saved")
    names = safetensors.torch.load_file(tmp_path / "saved" / "model.safetensors")
    assert any(".ple.key_proj" in name for name in names) and not any("ngram_embedding" in name for name in names)


def test_offloaded_rows_pass_engram_verify_and_a_changed_byte_does_not(tmp_path):
    offload(qwen(), tmp_path / "rows")
    assert [r["problem"] for r in verify(tmp_path / "rows")] == [None, None]
    with open(tmp_path / "rows" / "layer-0.float32", "r+b") as file:
        file.seek(1000)
        file.write(b"xxxx")
    assert any(r["problem"] for r in verify(tmp_path / "rows"))


def test_models_that_cannot_be_offloaded_are_refused_with_the_reason(tmp_path):
    with pytest.raises(ValueError, match="Linear has no n-gram table"):
        offload(torch.nn.Linear(2, 2))
    model = qwen()
    offload(model)
    with pytest.raises(ValueError, match="layer 0 is offloaded already"):
        offload(model)
    with pytest.raises(ValueError, match=r"layer 0 is torch.float16: expected torch.float32 or torch.bfloat16"):
        offload(qwen(torch.float16))
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError):
        offload(qwen(), tmp_path / "there")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Write a checkpoint with save_pretrained: split shards, real names."""
    folder = tmp_path_factory.mktemp("qwen") / "model"
    qwen(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("on_disk", [True, False])
@torch.no_grad()
def test_loading_offloaded_gives_the_logits_of_the_whole_model(checkpoint, tmp_path, on_disk):
    whole = transformers.Qwen4ExpForCausalLM.from_pretrained(checkpoint).eval()
    model = load_offloaded(checkpoint, tmp_path / "rows" if on_disk else None)
    assert type(model) is type(whole) and model.dtype == torch.bfloat16
    assert isinstance(model.model.layers[0].ple.ple_embedding.ngram_embedding, HostedRows)
    assert torch.equal(model(text()).logits, whole(text()).logits)


def test_a_folder_of_rows_is_opened_again_and_one_of_another_checkpoint_is_refused(checkpoint, tmp_path):
    load_offloaded(checkpoint, tmp_path / "rows")
    stamp = (tmp_path / "rows" / "manifest.json").stat().st_mtime_ns
    load_offloaded(checkpoint, tmp_path / "rows")
    assert (tmp_path / "rows" / "manifest.json").stat().st_mtime_ns == stamp
    qwen().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="is not the checkpoint's"):
        load_offloaded(tmp_path / "other", tmp_path / "rows")


def test_a_folder_whose_manifest_was_altered_is_refused(checkpoint, tmp_path):
    load_offloaded(checkpoint, tmp_path / "rows")
    manifest = tmp_path / "rows" / "manifest.json"
    text = manifest.read_text()
    for old, new in (("engram-offload-1", "engram-memory-1"), ('"form": "bfloat16"', '"form": "nonsense"')):
        manifest.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=r"manifest.json is not an engram-offload-1 manifest, or was altered"):
            load_offloaded(checkpoint, tmp_path / "rows")


def test_a_checkpoint_without_one_of_its_shards_is_refused_by_name(checkpoint, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((checkpoint / "config.json").read_text())
    tensors = safetensors.torch.load_file(checkpoint / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.2.ple.ple_embedding.ngram_embedding.shard_1.weight"))
    del tensors[name]
    safetensors.torch.save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"tensor {name} is missing"):
        load_offloaded(broken, tmp_path / "rows")
    assert not (tmp_path / "rows").exists()


def resident() -> int:
    """Return the bytes of this process's own memory in RAM; mapped files, which the system can drop, do not count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) << 10


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_resident_memory_falls_by_the_tables_size(tmp_path):
    code = """if True:
        import gc, sys
        from test_offload import offload, qwen, resident
        model = qwen(ple_layer_ids=[1], ngram_vocab_size_base=500_000)  # 8 x 500,000 rows x 16 bytes
        size = model.model.layers[0].ple.ple_embedding.ngram_embedding.weight.nbytes
        before = resident()
        offload(model, sys.argv[1])
        gc.collect()
        assert size > 64_000_000 and before - resident() > 0.9 * size
    """
    # In a process of its own: after training in this one, freed memory stays with it (tune_allocator).
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "rows")], check=True, env={**os.environ, "PYTHONPATH": path}
    )


def test_rows_of_a_checkpoint_that_has_changed_are_all_compared(checkpoint, tmp_path):
    home = tmp_path / "model"
    shutil.copytree(checkpoint, home)
    load_offloaded(home, tmp_path / "rows")
    shutil.copytree(home, tmp_path / "copy")  # same rows, other files
    for file in (tmp_path / "copy").iterdir():
        os.utime(file, ns=(1, 1))
    load_offloaded(tmp_path / "copy", tmp_path / "rows")
    file = next(
        f for f in sorted(home.glob("*.safetensors")) if any("ngram" in k for k in safetensors.torch.load_file(f))
    )
    tensors = safetensors.torch.load_file(file)
    name = max(key for key in tensors if "ngram_embedding" in key)
    tensors[name][-1] += 1  # one row
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="is not the checkpoint's"):
        load_offloaded(home, tmp_path / "rows")


def test_an_existing_folder_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "engram.integrations.transformers.offload.write_rows", lambda *_: pytest.fail("rows were written")
    )
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="give a new folder"):
        offload(qwen(), tmp_path / "there")
    qwen().save_pretrained(tmp_path / "model")
    with pytest.raises(FileExistsError, match="give a new folder"):
        load_offloaded(tmp_path / "model", tmp_path / "there")
