"""Files that were altered on purpose: every reader ends soon, with an error of the allowed kinds or a value."""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from test_formats import DEMO, QWEN, TOKENS, V41, VOCAB, convert, filled, inspect_file

from engram import EngramConfig, EngramMemory, TokenMap, Transformer, TransformerConfig, build_optimizer
from engram.cli import main
from engram.inspect.plan import read_shape
from engram.integrations.formats.readers import open_source, read_config, read_token_map, unknown_fields
from engram.lm.checkpoint import load_checkpoint, save_checkpoint
from engram.storage.manifest import manifest_digest, verify

ALLOWED = (ValueError, OSError, TypeError, IndexError)
EACH = 25  # mutations of each file
ODD = [b"-1", b"1e400", b"99999999999999999999", b"null", b"[]", b'"7"', b"0", b"2.5", b"NaN", b"{}"]  # for a digit


def model_of() -> Transformer:
    torch.manual_seed(0)
    memory = EngramMemory(EngramConfig(layers=(1,), heads=2, head_dim=8, rows_per_head=50), TokenMap.identity(32), 16)
    return Transformer(TransformerConfig(vocab_size=32, hidden_size=16, layers=2, heads=2, max_length=16), memory)


@pytest.fixture(scope="module")
def homes(tmp_path_factory) -> Path:
    """One of everything that is read."""
    home = tmp_path_factory.mktemp("whole")
    for name, config, to in (("v41", V41, "deepseek-v4.1"), ("qwen", QWEN, "qwen"), ("demo", DEMO, "demo")):
        filled(config, token_map=TokenMap.identity(VOCAB) if to == "qwen" else TOKENS).save(home / f"{name}-ours")
        convert(home / f"{name}-ours", home / name, to)
    convert(home / "v41-ours", home / "t.gguf", "gguf")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(30)} | {"[UNK]": 30}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(home / "tokenizer.json"))
    model = model_of()
    save_checkpoint(home / "run", model, build_optimizer(model, lr=0.01, table_lr=0.1), 5, {"config": {}})
    memory = EngramMemory(EngramConfig(rows_per_head=50), TokenMap.identity(32), 16, folder=home / "rows")
    for table in memory.tables.values():
        table.close()
    return home


def readers(home: Path) -> dict[str, list]:
    step = home / "run" / "step-00000005"
    model = model_of()
    rows = lambda: EngramMemory(EngramConfig(rows_per_head=50), TokenMap.identity(32), 16, folder=home / "rows")  # noqa: E731
    config = [lambda f: read_config(str(f)), lambda f: read_shape(str(f)), lambda f: unknown_fields(str(f))]
    whole = [lambda f: inspect_file(f.parent), lambda f: open_source(f.parent, token_map=None)]
    saved = [lambda f: EngramMemory.load(f.parent), lambda f: verify(f.parent), lambda f: inspect_file(f.parent)]
    resume = [
        lambda f: load_checkpoint(step, model, build_optimizer(model, lr=0.01, table_lr=0.1)),
        lambda f: inspect_file(step),
    ]
    return {
        **{f"{n}/config.json": [*config, *whole] for n in ("v41", "qwen", "demo")},
        "v41/model-00001-of-00002.safetensors": whole,
        "qwen/model.safetensors.index.json": whole,
        "demo/token_map.safetensors": whole,
        "t.gguf": [inspect_file, open_source],
        "tokenizer.json": [read_token_map],
        **{
            f"v41-ours/{n}": saved
            for n in ("manifest.json", "config.json", "fusion.safetensors", "token_map.safetensors")
        },
        "run/step-00000005/manifest.json": resume,
        "run/step-00000005/model.safetensors": resume,
        "run/step-00000005/optimizer.safetensors": resume,
        "rows/rows.json": [lambda f: [t.close() for t in rows().tables.values()]],
    }


def altered(content: bytes, chance: random.Random) -> bytes:
    """A file with a few bytes, digits or a piece of its first part altered."""
    data, reach = bytearray(content), min(len(content), 3000)
    kind = chance.randrange(5)
    if kind == 0:
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(reach)] = chance.randrange(256)
    elif kind == 1:
        data[chance.randrange(reach)] ^= 1 << chance.randrange(8)
    elif kind == 2:
        del data[chance.randrange(reach) :]
    elif kind == 3:
        at = chance.randrange(reach)
        del data[at : at + chance.randint(1, 40)]
    else:
        digits = [i for i in range(reach) if chr(data[i]).isdigit()]
        at = chance.choice(digits) if digits else 0
        data[at : at + 1] = chance.choice(ODD)
    return bytes(data)


def test_no_altered_file_raises_what_a_caller_does_not_expect_nor_takes_long(homes):
    chance, refused, begun = random.Random(0), 0, time.perf_counter()
    for name, looks in readers(homes).items():
        path = homes / name
        content = path.read_bytes()
        for number in range(EACH):
            path.write_bytes(altered(content, chance))
            for look in looks:
                since = time.perf_counter()
                try:
                    look(path)
                except ALLOWED:
                    refused += 1
                except BaseException as error:
                    raise AssertionError(f"{name}, mutation {number}: {type(error).__name__}: {error}") from error
                assert time.perf_counter() - since < 5, f"{name}, mutation {number}"
        path.write_bytes(content)
    assert refused > 10 * EACH and time.perf_counter() - begun < 60
    for name, looks in readers(homes).items():  # what was put back is read
        if "tokenizer" not in name:
            for look in looks:
                look(homes / name)


FIELDS = [
    ("config.json", "config", []), ("config.json", "hidden_size", "16"), ("config.json", "hidden_size", -1),
    ("config.json", "streams", 2**40), ("config.json", "streams", None), ("config.json", "config", None),
    ("manifest.json", "tables", []), ("manifest.json", "tables", {"1": {}}), ("manifest.json", "layout", "x"),
    ("manifest.json", "token_map", 3), ("manifest.json", "files", {}), ("manifest.json", "byte_order", ["little"]),
]  # fmt: skip


@pytest.mark.parametrize(("file", "field", "value"), FIELDS)
def test_saved_memories_that_were_altered_and_sealed_again_are_refused_by_name(file, field, value, tmp_path):
    from engram.storage.files import file_entry

    filled(V41).save(tmp_path / "m")
    path, manifest_path = tmp_path / "m" / file, tmp_path / "m" / "manifest.json"
    fields = json.loads(path.read_text())
    fields.pop(field)
    path.write_text(json.dumps(fields if value is None else fields | {field: value}))
    manifest = json.loads(manifest_path.read_text())
    if file != "manifest.json":
        manifest["files"][file] = file_entry(path)
    manifest.pop("digest")
    manifest_path.write_text(json.dumps(manifest | {"digest": manifest_digest(manifest)}))
    for mode in ("copy", "shared"):
        with pytest.raises((ValueError, TypeError), match=str(tmp_path / "m")):
            EngramMemory.load(tmp_path / "m", mode=mode)


@pytest.mark.parametrize("weights", [{}, {"1.value.weight": torch.zeros(2)}, b"no safetensors", "integers"])
def test_sealed_fusion_weights_that_are_others_are_refused_by_name(weights, tmp_path):
    from engram.storage.files import file_entry

    filled(V41).save(tmp_path / "m")
    path, manifest_path = tmp_path / "m" / "fusion.safetensors", tmp_path / "m" / "manifest.json"
    if isinstance(weights, bytes):
        path.write_bytes(weights)
    else:
        old = safetensors.torch.load_file(path)
        weights = {k: v.to(torch.int32) for k, v in old.items()} if weights == "integers" else weights
        safetensors.torch.save_file(weights, path)
    manifest = json.loads(manifest_path.read_text())
    manifest["files"]["fusion.safetensors"] = file_entry(path)
    manifest.pop("digest")
    manifest_path.write_text(json.dumps(manifest | {"digest": manifest_digest(manifest)}))
    with pytest.raises(ValueError, match=r"fusion\.safetensors"):
        EngramMemory.load(tmp_path / "m")


def test_names_of_tensors_are_neither_markup_nor_commands_and_are_not_cut_when_piped(tmp_path, monkeypatch, capsys):
    long = "a" * 300
    names = ["[/x]", "[red]x", "\x1b[31mred", "\x1b]0;title\x07", "\u202ecod", "new\nline", long]
    safetensors.torch.save_file({name: torch.zeros(2) for name in names}, tmp_path / "a.safetensors")
    monkeypatch.setattr(sys, "argv", ["engram", "inspect", str(tmp_path / "a.safetensors")])
    with pytest.raises(SystemExit) as ended:
        main()
    out = capsys.readouterr().out
    assert ended.value.code == 0 and "[/x]" in out and "[red]x" in out and long in out and "new⏎line" in out
    assert not set(out) & set("\x1b\x07\u202e")
    monkeypatch.setattr(sys, "argv", ["engram", "convert", str(tmp_path / "\x1b[31mred"), str(tmp_path / "o")])
    with pytest.raises(SystemExit) as ended:
        main()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "�[31mred" in error and "\x1b[31m" not in error


def test_tens_of_thousands_of_tensors_are_listed_in_seconds(tmp_path, monkeypatch, capsys):
    count = 30_000
    entries = {
        f"model.layers.{i}.mlp.w": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(count)
    }
    text = json.dumps(entries).encode()
    (tmp_path / "many.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(count))
    monkeypatch.setattr(sys, "argv", ["engram", "inspect", str(tmp_path / "many.safetensors")])
    begun = time.perf_counter()
    with pytest.raises(SystemExit):
        main()
    assert time.perf_counter() - begun < 10 and capsys.readouterr().out.count("\n") >= count


def test_runs_checkpoints_and_offloaded_rows_are_listed(homes, tmp_path):
    found = inspect_file(homes / "run")
    assert found["kind"] == "run" and found["steps"] == [5] and any(t["dtype"] == "rows" for t in found["tensors"])
    step = inspect_file(homes / "run" / "step-00000005")
    assert step["kind"] == "checkpoint" and step["tensors"] == found["tensors"]
    shutil.copytree(homes / "run", tmp_path / "run")
    setting = {"memory": json.loads(model_of().memory.config.to_json())}
    (tmp_path / "run" / "run.json").write_text(json.dumps({"arm": "engram", "setting": setting}))
    table = inspect_file(tmp_path / "run")["tables"][1]
    assert (table["rows"], table["dim"]) == (model_of().memory.tables[1].rows, 8)
    shutil.rmtree(tmp_path / "run" / "step-00000005")
    assert "no checkpoint yet" in inspect_file(tmp_path / "run")["problem"]


def test_hy4_flash_is_refused_with_what_is_missing_wherever_it_is_met(tmp_path, monkeypatch, capsys):
    safetensors.torch.save_file({"model.layers.1.memory.w": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "hy_v4_flash", "num_hidden_layers": 4}))
    reason = r"Hy4-flash \(hy_v4_flash\) cannot be read: its layer numbers, heads, row width, moduli"
    for call in (lambda: open_source(tmp_path), lambda: convert(tmp_path, tmp_path / "o", "engram")):
        with pytest.raises(ValueError, match=reason):
            call()
    assert "Hy4-flash" in inspect_file(tmp_path)["problem"]
    for command in (["plan", str(tmp_path)], ["convert", str(tmp_path), str(tmp_path / "o")]):
        monkeypatch.setattr(sys, "argv", ["engram", *command])
        with pytest.raises(SystemExit):
            main()
        assert "layer numbers, heads, row width" in capsys.readouterr().err
