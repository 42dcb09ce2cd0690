"""Saved memories: written completely or not at all, checked before use, shared by processes; errors name the file."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from engram import EngramConfig, EngramMemory, HostTable, TokenMap, build_optimizer, cli
from engram.storage import readahead
from engram.storage.files import BLOCK, write_rows
from engram.storage.manifest import manifest_digest, verify
from engram.tables import RowAdam, RowRMS

VOCAB, HIDDEN = 64, 16
CONFIG = EngramConfig(layers=(1, 3), heads=2, head_dim=8, rows_per_head=997, table_init="normal", table_std=0.1)
linux = pytest.mark.skipif(sys.platform != "linux", reason="signals, limits and locks of Linux")


def memory(seed: int = 0, config: EngramConfig = CONFIG, rows: int = 500) -> EngramMemory:
    """Return a memory in whose tables every other row was written."""
    torch.manual_seed(seed)
    m = EngramMemory(config, TokenMap.identity(VOCAB), HIDDEN)
    for table in m.tables.values():
        ids = torch.arange(rows) * 2
        table.write(ids, torch.randn(rows, table.dim))
    return m


def rows_of(m: EngramMemory) -> list[torch.Tensor]:
    return [table.gather(torch.arange(table.rows)) for table in m.tables.values()]


def same(a: EngramMemory, b: EngramMemory) -> bool:
    weights = zip(a.fusions.state_dict().values(), b.fusions.state_dict().values(), strict=True)
    pairs = [*zip(rows_of(a), rows_of(b), strict=True), *weights]
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.fixture(scope="module")
def elsewhere(forked):
    """elsewhere(code, *arguments) -> (exit status, output) of another process, which imports all names of this file."""
    names = "import json, os, random, signal, sys, tempfile, time\nfrom test_files import *\n"

    def run(code: str, *arguments: object) -> tuple[int, str]:
        done = forked(names + code, *arguments)
        return done.returncode, done.stdout + done.stderr

    return run


def alter(folder: Path, change) -> None:
    """Change a manifest and write its new digest, so that the digest does not reveal the change."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    manifest["digest"] = manifest_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


@pytest.fixture
def saved(tmp_path) -> Path:
    return memory().save(tmp_path / "memory")


# The folder.


@pytest.mark.parametrize("mode", ["copy", "shared"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_memory_loads_with_the_same_rows_weights_and_outputs(tmp_path, mode, dtype):
    m = memory(config=CONFIG.replace(table_dtype=dtype)).eval()
    loaded = EngramMemory.load(m.save(tmp_path / "memory"), mode).eval()
    assert same(m, loaded)
    assert loaded.config == m.config and loaded.layout == m.layout
    ids, hidden = torch.randint(0, VOCAB, (2, 9)), torch.randn(2, 9, HIDDEN)
    assert torch.equal(m[1](hidden, m.recall(ids)), loaded[1](hidden, loaded.recall(ids)))


ENCODED = CONFIG.replace(head_dim=32, table_init="zero")


@pytest.mark.parametrize("codec", ["fp8", "int8", "int4", "pq4", "pq8"])
def test_encoded_tables_are_saved_and_loaded_with_their_codec(codec, tmp_path):
    m = memory(config=ENCODED)
    m.encode_tables(codec)
    m.save(tmp_path / "memory")
    assert all(result["problem"] is None for result in verify(tmp_path / "memory"))
    ids = torch.randint(0, VOCAB, (3, 9))
    hidden = torch.randn(3, 9, HIDDEN)
    expected = m.eval()[1](hidden, m.recall(ids))
    for arguments in ({}, {"mode": "shared"}, {"rows_in": tmp_path / "copy"}):
        again = EngramMemory.load(tmp_path / "memory", **arguments).eval()
        assert again.codec == codec and same(m, again) and not again.trains_tables
        assert torch.equal(again[1](hidden, again.recall(ids)), expected)
        again.save(tmp_path / "again", overwrite=True)
        assert same(m, EngramMemory.load(tmp_path / "again"))
        again.close()
    rows = (tmp_path / "memory" / f"layer-1.{codec}").stat().st_size
    assert rows == m.tables[1].nbytes


@pytest.mark.parametrize("mode", ["copy", "shared"])
def test_codebooks_of_another_layer_are_refused(tmp_path, mode):
    m = memory(config=ENCODED)
    m.encode_tables("pq4")
    home = m.save(tmp_path / "memory")
    one, other = (home / f"layer-{layer}.pq4.codebooks" for layer in (1, 3))
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match=r"layer-1\.pq4\.codebooks does not have the digest"):
        EngramMemory.load(home, mode)
    other.write_bytes(kept)
    manifest = json.loads((home / "manifest.json").read_text())
    files = manifest["files"]
    files[one.name], files[other.name] = files[other.name], files[one.name]
    manifest["digest"] = manifest_digest(manifest)
    (home / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="not bound to layer 1"):
        EngramMemory.load(home, mode)
    one.unlink()
    with pytest.raises(ValueError, match=r"lacks the file 'layer-1\.pq4\.codebooks'"):
        EngramMemory.load(home, mode)


def test_a_manifest_that_names_another_codec_is_refused(tmp_path):
    m = memory(config=ENCODED)
    m.encode_tables("fp8")
    home = m.save(tmp_path / "memory")
    manifest = json.loads((home / "manifest.json").read_text())
    for table in manifest["tables"].values():
        table["codec"] = "int4"
    manifest["digest"] = manifest_digest(manifest)
    (home / "manifest.json").write_text(json.dumps(manifest))
    for mode in ("copy", "shared"):
        with pytest.raises(ValueError, match=r"layer-1\.fp8|layer 1"):
            EngramMemory.load(home, mode)


def test_tables_of_another_shape_than_the_configuration_are_refused():
    with pytest.raises(ValueError, match="the configuration needs"):
        EngramMemory(CONFIG, TokenMap.identity(VOCAB), HIDDEN, tables={1: HostTable(10, 8), 3: HostTable(10, 8)})


def test_tables_passed_to_the_constructor_must_be_those_that_loading_makes(tmp_path):
    rows, config = memory().layout.rows, CONFIG.replace(table_init="zero", seed=3)
    tables = {layer: HostTable(memory(config=config).layout.rows[layer], 8) for layer in config.layers}
    given = EngramMemory(config, TokenMap.identity(VOCAB), HIDDEN, tables=tables)
    given.tables[1].write(torch.tensor([5]), torch.ones(1, 8))
    assert same(EngramMemory.load(given.save(tmp_path / "given")), given)
    for other in ({"dtype": torch.bfloat16}, {"init": "normal"}, {}):
        tables = {layer: HostTable(rows[layer], 8, **other) for layer in CONFIG.layers}
        with pytest.raises(ValueError, match="the table of layer 1 has"):
            EngramMemory(CONFIG, TokenMap.identity(VOCAB), HIDDEN, tables=tables)


def test_fusion_weights_come_back_in_their_own_dtype(tmp_path):
    m = memory()
    m.fusions.to(torch.bfloat16)
    loaded = EngramMemory.load(m.save(tmp_path / "memory"))
    dtypes = {name: v.dtype for name, v in m.fusions.state_dict().items()}
    assert dtypes["1.value.weight"] == torch.bfloat16
    assert {name: v.dtype for name, v in loaded.fusions.state_dict().items()} == dtypes


def test_rows_never_written_take_no_disk_space(tmp_path):
    m = memory(config=CONFIG.replace(rows_per_head=2_000_003), rows=100)
    folder = m.save(tmp_path / "memory")
    file = (folder / "layer-1.rows").stat()
    assert file.st_size > 15 * BLOCK and file.st_blocks * 512 <= 2 * BLOCK
    assert torch.equal(EngramMemory.load(folder, "shared").tables[1].gather(torch.arange(300)), rows_of(m)[0][:300])


def test_an_existing_folder_is_replaced_only_with_overwrite_and_only_if_it_is_a_memory(saved, tmp_path):
    other = memory(seed=1)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        other.save(saved)
    other.save(saved, overwrite=True)
    assert same(EngramMemory.load(saved), other)
    assert [p.name for p in tmp_path.iterdir()] == ["memory"]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(FileExistsError, match="is not a saved memory"):
        other.save(tmp_path / "photos", overwrite=True)
    assert (tmp_path / "photos" / "cat.jpg").exists()
    (tmp_path / "checkpoint").mkdir()  # these have a manifest as well
    (tmp_path / "checkpoint" / "manifest.json").write_text('{"format": 1}')
    with pytest.raises(FileExistsError, match="is not a saved memory"):
        other.save(tmp_path / "checkpoint", overwrite=True)


def test_readers_of_a_replaced_memory_keep_the_old_rows(saved):
    reader = EngramMemory.load(saved, "shared")
    memory(seed=1).save(saved, overwrite=True)
    assert same(reader, memory())


def test_without_an_exchange_of_folders_two_renames_replace_the_old_one(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("engram.storage.folders._exchange", lambda a, b: False)
    other = memory(seed=1)
    other.save(saved, overwrite=True)
    assert same(EngramMemory.load(saved), other)
    assert [p.name for p in tmp_path.iterdir()] == ["memory"]


def test_rows_copied_into_files_train_there_and_leave_the_saved_folder_alone(saved, tmp_path):
    loaded = EngramMemory.load(saved, rows_in=tmp_path / "work")
    assert loaded.tables[1].path == tmp_path / "work" / "layer-1.rows"
    RowRMS(loaded.tables[1]).step(torch.arange(5), torch.ones(5, 8))
    assert not same(loaded, memory()) and same(EngramMemory.load(saved), memory())
    trained = [table.tensor.clone() for table in loaded.tables.values()]
    loaded.close()
    again = EngramMemory(loaded.config, loaded.hasher.token_map, HIDDEN, folder=tmp_path / "work")  # its own rows
    assert all(torch.equal(table.tensor, old) for table, old in zip(again.tables.values(), trained, strict=True))
    again.close()
    with pytest.raises(FileExistsError, match="new files"):
        EngramMemory.load(saved, rows_in=tmp_path / "work")
    rows = sorted(saved.glob("layer-*.rows"))[-1]
    rows.write_bytes(bytes([rows.read_bytes()[0] ^ 1]) + rows.read_bytes()[1:])
    with pytest.raises(ValueError, match="digest"):
        EngramMemory.load(saved, rows_in=tmp_path / "other")
    assert not list((tmp_path / "other").iterdir())
    with pytest.raises(ValueError, match="saved memory, which is not trained in place"):
        EngramMemory(CONFIG, TokenMap.identity(VOCAB), HIDDEN, folder=saved)


# Read-only tables.


def test_rows_of_a_shared_memory_cannot_be_written_trained_or_loaded_over(saved):
    shared = EngramMemory.load(saved, "shared")
    table = shared.tables[1]
    attempts = [
        lambda: table.write(torch.tensor([0]), torch.zeros(1, 8)),
        lambda: RowRMS(table),
        lambda: RowAdam(table),
        lambda: build_optimizer(shared),
        lambda: shared.train().recall(torch.zeros(1, 4, dtype=torch.int64)),
        lambda: shared.load_state_dict(memory().state_dict()),
    ]
    for attempt in attempts:
        with pytest.raises(PermissionError, match=r"layer-1.rows is opened read-only"):
            attempt()
    assert same(shared, memory())


def test_the_fusion_weights_of_a_shared_memory_still_get_gradients(saved):
    shared = EngramMemory.load(saved, "shared")
    assert not shared.training
    ids = torch.randint(0, VOCAB, (2, 9))
    shared[1](torch.randn(2, 9, HIDDEN), shared.recall(ids)).sum().backward()
    assert any(p.grad is not None for p in shared.fusions.parameters()) and not shared.gradients[1]


@linux
def test_two_processes_read_one_folder_and_share_its_pages(saved, elsewhere):
    shared = EngramMemory.load(saved, "shared")
    code = """
m = EngramMemory.load(sys.argv[1], "shared")
digest = xxhash.xxh3_128_hexdigest(torch.cat(rows_of(m)).numpy().tobytes())
maps = open("/proc/self/maps").read()
print(digest, any("layer-1.rows" in line and " r--s " in line for line in maps.splitlines()))
"""
    _, out = elsewhere(code, saved)
    assert out.split() == [xxhash.xxh3_128_hexdigest(torch.cat(rows_of(shared)).numpy().tobytes()), "True"]


@linux
def test_a_file_is_open_in_one_trainer_or_in_readers(tmp_path):
    path = tmp_path / "rows"
    trainer = HostTable(100, 8, path=path)
    with pytest.raises(BlockingIOError, match="a table that trains it"):
        HostTable(100, 8, path=path, mode="r")
    trainer.close()
    readers = [HostTable(100, 8, path=path, mode="r") for _ in range(2)]
    with pytest.raises(BlockingIOError, match="already open"):
        HostTable(100, 8, path=path)
    for reader in readers:
        reader.close()
    HostTable(100, 8, path=path).close()


def test_opening_for_reading_creates_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        HostTable(100, 8, path=tmp_path / "rows", mode="r")
    with pytest.raises(ValueError, match="mode must be"):
        HostTable(100, 8, mode="r")
    assert not list(tmp_path.iterdir())


@linux
def test_a_file_truncated_under_a_live_table_raises_and_does_not_crash(tmp_path, elsewhere):
    code = """
table = HostTable(4096, 64, path=sys.argv[1])
table.write(torch.arange(10), torch.ones(10, 64))
os.truncate(sys.argv[1], 4096)
for work in (table.gather, table.prefetch, lambda ids: table.write(ids, torch.ones(1, 64))):
    try:
        work(torch.tensor([4000]))
    except OSError as error:
        print(error)
"""
    status, out = elsewhere(code, tmp_path / "rows")
    assert status == 0, out
    assert out.count("was truncated to 4,096 bytes under a table of 1,048,576") == 3


@linux
@pytest.mark.parametrize("file", ["layer-3.rows", "layer-1.rows.v"])
def test_a_truncated_file_raises_and_does_not_crash_wherever_its_rows_are_used(tmp_path, elsewhere, file):
    code = """
import copy
from engram import Transformer, TransformerConfig
from engram.lm.checkpoint import load_checkpoint, save_checkpoint
home, file = Path(sys.argv[1]), sys.argv[2]
m = EngramMemory(CONFIG.replace(head_dim=32), TokenMap.identity(VOCAB), HIDDEN, folder=home / "tables")
model = Transformer(TransformerConfig(VOCAB, HIDDEN, 4, 2, 16), m)
optimizer = build_optimizer(model)
model(torch.ones(1, 8, dtype=torch.int64)).sum().backward()
optimizer.step()
checkpoint = save_checkpoint(home / "run", model, optimizer, 1, {})
state, rows = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
os.truncate(home / "tables" / file, 5000)
table = ".v" not in file
for name, work in {
    "save_checkpoint": lambda: save_checkpoint(home / "run", model, optimizer, 2, {}),
    "load_checkpoint": lambda: load_checkpoint(checkpoint, model, optimizer),
    "save": lambda: m.save(home / "saved") if table else optimizer.state_dict(),
    "state_dict": lambda: copy.deepcopy(model.state_dict() if table else optimizer.state_dict()),
    "load_state_dict": lambda: model.load_state_dict(state) if table else optimizer.load_state_dict(rows),
    "encode": lambda: m.encode_tables("int8") if table else optimizer.row_optimizers[0].state_dict(),
    "step": lambda: (model(torch.ones(1, 8, dtype=torch.int64)).sum().backward(), optimizer.step()),
}.items():
    try:
        work()
        print(name, "did not notice")
    except OSError as error:
        print(name, "OK" if file in str(error) and "was truncated to 5,000 bytes" in str(error) else error)
"""
    status, out = elsewhere(code, tmp_path, file)
    assert status == 0, out
    assert out.count("OK") == 7, out


@linux
def test_a_forked_process_reads_the_files_of_its_parent_and_cannot_write_them(tmp_path, elsewhere):
    code = """
path = Path(sys.argv[1]) / "rows"
table = HostTable(100, 8, path=path)
table.write(torch.arange(100), torch.ones(100, 8))
kinds = [RowRMS(table)]
saved = kinds[0].state_dict()
kinds[0].step(torch.tensor([1]), torch.zeros(1, 8))
from engram.tables import EncodedTable
encoded = EncodedTable(100, 32, "fp8", path.with_name("encoded"))
before = table.tensor.clone()
if (child := os.fork()) == 0:
    assert table.gather(torch.tensor([5])).all() and encoded.gather(torch.tensor([5])).shape == (1, 32)
    for work in (
        lambda: table.write(torch.tensor([5]), torch.zeros(1, 8)),
        lambda: encoded.write(torch.tensor([5]), torch.ones(1, 32)),
        lambda: kinds[0].step(torch.tensor([5]), torch.ones(1, 8)),
        lambda: kinds[0].load_state_dict(saved),
        lambda: RowAdam(table),
    ):
        try:
            work()
            os._exit(1)
        except PermissionError as error:
            assert "was opened by process" in str(error)
    table.close()  # lets go of the child's hold, not of the parent's lock
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(table.tensor, before)
try:
    HostTable(100, 8, path=path)
    print("not locked any more")
except BlockingIOError:
    pass
memory = HostTable(10, 4)  # not in a file: a child has a copy of its own
if (child := os.fork()) == 0:
    RowRMS(memory).step(torch.tensor([1]), torch.ones(1, 4))
    os._exit(0 if memory.tensor[1].all() else 1)
assert os.waitpid(child, 0)[1] == 0 and not memory.tensor.any()
"""
    status, out = elsewhere(code, tmp_path)
    assert (status, out) == (0, "")


@linux
def test_holes_of_a_file_get_their_space_before_it_is_written(tmp_path):
    entry = write_rows(tmp_path / "rows", torch.zeros(BLOCK // 32, 8))
    assert (tmp_path / "rows").stat().st_blocks == 0 and len(entry["blocks"]) == 1
    HostTable(BLOCK // 32, 8, path=tmp_path / "rows").close()
    assert (tmp_path / "rows").stat().st_blocks * 512 >= BLOCK


# Files that are not what they should be.


def test_a_flipped_bit_is_found_by_verify_with_its_block(tmp_path):
    folder = memory(config=CONFIG.replace(rows_per_head=600_011)).save(tmp_path / "memory")
    assert all(result["problem"] is None for result in verify(folder))
    flip(folder / "layer-3.rows", 2 * BLOCK + 12345)
    problems = [result for result in verify(folder) if result["problem"]]
    assert [(Path(p["file"]).name, p["bad_blocks"]) for p in problems] == [("layer-3.rows", [2])]
    assert "layer-3.rows: block 2 of 5 (16 MiB each, from byte 33,554,432)" in problems[0]["problem"]
    with pytest.raises(ValueError, match=r"layer-3.rows does not have the digest.*engram verify"):
        EngramMemory.load(folder)


@pytest.mark.parametrize("mode", ["copy", "shared"])
@pytest.mark.parametrize("name", ["layer-1.rows", "token_map.safetensors", "fusion.safetensors", "config.json"])
def test_a_torn_truncated_or_missing_file_is_refused_by_name(saved, name, mode):
    original = (saved / name).read_bytes()
    damages = {
        "does not have": bytes([original[0] ^ 1]) + original[1:],
        "truncated or foreign": original[:-1],
    }
    for wording, damaged in damages.items():
        (saved / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{name}.*{wording}"):
            EngramMemory.load(saved, mode)
    (saved / name).unlink()
    with pytest.raises(ValueError, match=f"lacks the file '{name}'"):
        EngramMemory.load(saved, mode)


@pytest.mark.parametrize("mode", ["copy", "shared"])
def test_a_file_of_another_memory_of_equal_shape_is_refused(saved, tmp_path, mode):
    other = memory(seed=1).save(tmp_path / "other")
    shutil.copy(other / "layer-1.rows", saved / "layer-1.rows")
    with pytest.raises(ValueError, match=r"layer-1.rows"):
        EngramMemory.load(saved, mode)


def one_row() -> EngramConfig:
    return CONFIG.replace(hash="one_row")  # its tables have equal sizes, so sizes cannot tell them apart


def test_swapped_files_are_refused_even_if_their_digests_were_swapped_too(tmp_path):
    folder = memory(config=one_row(), rows=2).save(tmp_path / "memory")
    os.rename(folder / "layer-1.rows", folder / "x")
    os.rename(folder / "layer-3.rows", folder / "layer-1.rows")
    os.rename(folder / "x", folder / "layer-3.rows")
    for mode in ("copy", "shared"):
        with pytest.raises(ValueError, match=r"layer-1.rows"):
            EngramMemory.load(folder, mode)

    def swap(manifest):
        files = manifest["files"]
        files["layer-1.rows"], files["layer-3.rows"] = files["layer-3.rows"], files["layer-1.rows"]

    alter(folder, swap)
    with pytest.raises(ValueError, match=r"layer-1.rows is not bound to layer 1"):
        EngramMemory.load(folder)


def test_two_layers_that_name_one_file_or_hold_the_same_rows_are_refused(tmp_path):
    folder = memory(config=one_row(), rows=2).save(tmp_path / "memory")
    text = (folder / "manifest.json").read_text()

    def one_file(manifest):
        manifest["tables"]["3"]["file"] = "layer-1.rows"

    alter(folder, one_file)
    with pytest.raises(ValueError, match=r"layers 1 and 3 name one file, .*layer-1.rows"):
        EngramMemory.load(folder)
    (folder / "manifest.json").write_text(text)
    (folder / "layer-3.rows").unlink()
    os.link(folder / "layer-1.rows", folder / "layer-3.rows")
    with pytest.raises(ValueError, match="layers 1 and 3 name one file"):
        EngramMemory.load(folder)
    (folder / "layer-3.rows").unlink()
    shutil.copy(folder / "layer-1.rows", folder / "layer-3.rows")

    def same_digest(manifest):
        manifest["files"]["layer-3.rows"] = manifest["files"]["layer-1.rows"]

    alter(folder, same_digest)
    with pytest.raises(ValueError, match=r"layers 1 and 3 hold the same rows"):
        EngramMemory.load(folder)


def test_layers_that_were_never_written_may_be_equal(tmp_path):
    m = EngramMemory(one_row(), TokenMap.identity(VOCAB), HIDDEN)
    assert same(EngramMemory.load(m.save(tmp_path / "memory")), m)


def test_another_token_map_is_refused(saved):
    shifted = TokenMap(np.roll(np.arange(VOCAB), 1))
    with pytest.raises(ValueError, match="another tokenizer or version"):
        EngramMemory.load(saved, token_map=shifted)
    assert same(EngramMemory.load(saved, token_map=TokenMap.identity(VOCAB)), memory())


def test_multipliers_that_went_through_doubles_are_refused(saved):
    def as_doubles(manifest):
        multipliers = manifest["layout"]["multipliers"]
        manifest["layout"]["multipliers"] = {k: [float(m) for m in v] for k, v in multipliers.items()}

    alter(saved, as_doubles)
    with pytest.raises(ValueError, match=r'manifest.json: hash layout: "multipliers".*rounded'):
        EngramMemory.load(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": 3}', '{"files": {}}', '{"files": {"a": {"bytes": "x"}}}'])
def test_a_damaged_or_foreign_manifest_is_refused(saved, text):
    (saved / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest.json"):
        EngramMemory.load(saved)


def test_an_altered_manifest_is_refused(saved):
    text = (saved / "manifest.json").read_text()
    (saved / "manifest.json").write_text(text.replace('"std": 0.1', '"std": 0.2'))
    with pytest.raises(ValueError, match=r"manifest.json was altered"):
        EngramMemory.load(saved)
    assert "manifest.json was altered" in verify(saved)[0]["problem"]


def test_a_manifest_cannot_point_outside_its_folder(saved, tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    entry = {"bytes": 6, "xxh3_128": "0", "blocks": ["0"]}
    alter(saved, lambda manifest: manifest["files"].update({"../secret": entry}))
    with pytest.raises(ValueError, match=r"lacks the file '\.\./secret'"):
        EngramMemory.load(saved)


def test_verify_reads_checkpoints_and_runs_and_the_command_names_the_block(saved, tmp_path, capsys):
    from engram.lm.checkpoint import save_checkpoint

    m = memory()
    checkpoint = save_checkpoint(tmp_path / "run", m, build_optimizer(m), 1, {})
    assert all(result["problem"] is None for result in verify(tmp_path / "run"))
    flip(checkpoint / "tables.1.rows", 77)
    with pytest.raises(SystemExit) as stop:
        cli.files.verify(tmp_path / "run", as_json=True)
    printed = capsys.readouterr()
    assert stop.value.code == 2 and "tables.1.rows" in printed.err
    wrong = [f for f in json.loads(printed.out)["files"] if f["problem"]]
    assert [(Path(f["file"]).name, f["bad_blocks"]) for f in wrong] == [("tables.1.rows", [0])]
    cli.files.verify(saved)
    assert "is complete and unchanged: 5 files" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="no manifest"):
        verify(tmp_path)


# Faults while writing.


@linux
def test_a_disk_that_fills_up_leaves_nothing_half_written_and_the_old_memory_complete(saved, tmp_path, elsewhere):
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
for name, overwrite in (("memory", True), ("new", False)):
    try:
        memory(seed=1).save(sys.argv[1] + "/" + name, overwrite)
    except OSError as error:
        print(error)
"""
    _, out = elsewhere(code, tmp_path)
    assert out.count("could not save the memory") == 2 and out.count("Nothing half-written was left") == 2, out
    assert [p.name for p in tmp_path.iterdir()] == ["memory"]
    assert same(EngramMemory.load(saved), memory())


@linux
def test_a_save_killed_at_any_moment_leaves_the_old_memory_or_the_new_one(tmp_path, elsewhere):
    code = """
torch.set_num_threads(1)  # a process without threads may fork
folder, memories, draw, seen = Path(sys.argv[1]), [memory(seed) for seed in (1, 2)], random.Random(0), set()
memories[0].save(folder)
began = time.perf_counter()
memories[1].save(folder, overwrite=True)
whole = time.perf_counter() - began
left = 0
for attempt in range(60):
    if attempt >= 20 and len(seen) == 2 and left:  # kills did hit saves; on a busy machine that takes more of them
        break
    if (child := os.fork()) == 0:
        for i in range(10**6):
            memories[i % 2].save(folder, overwrite=True)
    time.sleep(draw.random() * 2.5 * whole * (1 + attempt / 10))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if folder.exists():
        loaded = EngramMemory.load(folder)
        seen.add(next(i for i, m in enumerate(memories) if same(loaded, m)))
        assert all(result["problem"] is None for result in verify(folder))
    left += len(list(folder.parent.iterdir())) > 1
memories[0].save(folder, overwrite=True)
print(sorted(seen), left > 0, [p.name for p in folder.parent.iterdir()])
"""
    _, out = elsewhere(code, tmp_path / "memory")
    assert out == "[0, 1] True ['memory']\n"  # kills did hit saves, and the next save cleared what they left


@pytest.mark.skipif(not hasattr(os, "setuid"), reason="no users to be without rights")
def test_a_folder_without_write_rights_is_named_and_its_rows_can_still_be_read(elsewhere):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        memory().save(folder / "memory")
        HostTable(100, 8, path=folder / "rows").close()
        for path in (folder, folder / "memory"):
            path.chmod(0o555)
        (folder / "rows").chmod(0o444)
        code = """
memory()  # imports everything
if os.getuid() == 0:
    os.setuid(65534)
m = EngramMemory.load(sys.argv[1] + "/memory", "shared")
HostTable(100, 8, path=sys.argv[1] + "/rows", mode="r").gather(torch.tensor([1]))
for work in (lambda: m.save(sys.argv[1] + "/new"), lambda: HostTable(100, 8, path=sys.argv[1] + "/rows")):
    try:
        work()
    except OSError as error:
        print(error)
"""
        if os.getuid() == 0 and not all(parent.stat().st_mode & 0o001 for parent in folder.parents):
            pytest.skip(f"no other user may enter {folder.parent}")
        _, out = elsewhere(code, folder)
        folder.chmod(0o755)
        (folder / "memory").chmod(0o755)
    assert "could not save the memory" in out and "Permission denied" in out, out
    assert 'rows cannot be written (Permission denied): open it with mode="r"' in out, out


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no /dev/shm")
def test_a_shared_memory_disk_that_is_too_small_is_an_error_before_the_first_row():
    path = Path(f"/dev/shm/engram-test-{os.getpid()}")
    with pytest.raises(OSError, match=f"no room for a table of .* bytes at {path}"):
        HostTable(2**42, 64, path=path)
    assert not path.exists()


def test_saving_over_a_link_keeps_the_link(tmp_path):
    memory().save(tmp_path / "one")
    (tmp_path / "link").symlink_to(tmp_path / "one")
    memory(seed=1).save(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink() and same(EngramMemory.load(tmp_path / "one"), memory(seed=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "one"]


def test_a_checkpoint_without_its_manifest_is_not_a_complete_run(tmp_path):
    for step in ("step-00000001", "step-00000002"):
        memory().save(tmp_path / step)
    (tmp_path / "step-00000002" / "manifest.json").unlink()
    problems = [result["problem"] for result in verify(tmp_path) if result["problem"]]
    assert len(problems) == 1 and "step-00000002" in problems[0] and "no manifest.json" in problems[0]


FORKED = """
import os, torch
from engram import EngramConfig, EngramMemory, TokenMap
config = EngramConfig(layers=(1,), heads=4, head_dim=32, rows_per_head=5000, table_init="normal")
memory = EngramMemory(config, TokenMap.identity(64), 16).eval()
ids = torch.randint(0, 64, (8, 2048))
rows = memory.recall(ids).rows(1)
if (child := os.fork()) == 0:
    os._exit(0 if torch.equal(memory.recall(ids).rows(1), rows) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@linux
def test_a_forked_process_looks_rows_up_with_threads_of_its_own():
    one = {**os.environ, "OMP_NUM_THREADS": "1"}  # torch's own threads do not outlive a fork
    done = subprocess.run([sys.executable, "-c", FORKED], env=one, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# Readahead and hot rows.


def test_page_ranges_cover_every_row_once_and_merge_neighbours():
    rng = np.random.default_rng(0)
    for row_bytes in (8, 264, 4096, 10_000):
        ids = rng.integers(0, 3000, 400)
        nbytes = 3000 * row_bytes
        ranges = readahead.page_ranges(ids, row_bytes, nbytes, page=4096)
        start, end = ranges[:, 0], ranges.sum(1)
        assert (start[1:] > end[:-1]).all() and (start % 4096 == 0).all() and end[-1] <= nbytes
        which = np.searchsorted(start, ids * row_bytes, side="right") - 1
        assert (ids * row_bytes >= start[which]).all() and ((ids + 1) * row_bytes <= end[which]).all()
    assert readahead.page_ranges(np.arange(1000), 100, 100_000).tolist() == [[0, 100_000]]
    assert len(readahead.page_ranges(np.empty(0, np.int64), 8, 8000)) == 0


def drop_pages(table: HostTable) -> None:
    """Drop the table's pages from the page cache. If the file system cannot, as one in memory, skip the test."""
    table.drop()
    pages = -(-table.nbytes // mmap.PAGESIZE)
    states = (ctypes.c_ubyte * pages)()
    address, nbytes = ctypes.c_void_p(table.tensor.data_ptr()), ctypes.c_size_t(table.nbytes)
    assert ctypes.CDLL(None).mincore(address, nbytes, states) == 0
    if sum(state & 1 for state in states) > pages // 2:
        pytest.skip("this file system keeps its pages in memory")


@linux
@pytest.mark.parametrize("batched", [True, False])
def test_prefetching_changes_no_row_and_reads_no_more_than_the_pages(tmp_path, monkeypatch, batched):
    if not batched:
        monkeypatch.setattr(readahead, "_advise_batches", lambda ranges, address: 0)
    table = HostTable(100_000, 64, path=tmp_path / "rows")
    table.write(torch.arange(100_000), torch.randn(100_000, 64))
    ids = torch.randint(0, 100_000, (500,))
    before = table.gather(ids)
    drop_pages(table)
    assert 500 * 200 < table.prefetch(ids) <= table.nbytes
    assert torch.equal(table.gather(ids), before)
    assert table.prefetch(ids) == 0, "all of them are in memory now"
    assert HostTable(100, 8).prefetch(torch.arange(3)) == 0
    assert table.prefetch(torch.empty(0, dtype=torch.int64)) == 0
    with pytest.raises(IndexError, match="outside this table"):
        table.prefetch(torch.tensor([100_000]))


@linux
def test_checking_whether_rows_are_in_memory_reads_none_of_them(tmp_path):
    table = HostTable(100_000, 64, path=tmp_path / "rows")
    drop_pages(table)
    ids = torch.randint(0, 100_000, (500,)).numpy()
    for _ in range(100):  # each requests 4 pages or more: reads would fill the sample
        assert not readahead.in_memory(table._file, table.tensor.data_ptr(), ids, 256)


@linux
def test_pages_of_another_users_file_are_checked_by_reading_without_waiting(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    table = HostTable(10_000, 64, path=tmp_path / "rows")
    ids = torch.randint(0, 10_000, (500,))
    table.gather(ids)
    assert table.prefetch(ids) == 0
    drop_pages(table)
    assert table.prefetch(ids) in (0, table.nbytes), "0 where the disk is quicker than the system call"
    assert torch.equal(table.gather(ids), torch.zeros(500, 64))


@linux
def test_a_memory_in_files_prefetches_its_cold_pages_before_it_reads_them(tmp_path, monkeypatch):
    asked, will_need = [], readahead.will_need
    monkeypatch.setattr(readahead, "will_need", lambda *a: asked.append(will_need(*a)) or asked[-1])
    m = EngramMemory(CONFIG.replace(rows_per_head=50_000), TokenMap.identity(VOCAB), HIDDEN, folder=tmp_path)
    for table in m.tables.values():
        table.tensor.fill_(1.0)
        drop_pages(table)
    ids = torch.randint(0, VOCAB, (4, 32))
    cold = m.recall(ids).rows(1).detach().clone()
    assert asked and asked[0] > 0
    m.recall(ids).rows(3)
    asked.clear()
    assert torch.equal(m.recall(ids).rows(1), cold) and not asked
    m.close()


@pytest.mark.parametrize("sizes", [[1] * 23, [23], [10, 0, 13], [5, 18]])
def test_rows_that_come_in_parts_of_any_size_are_written_like_one_tensor(tmp_path, monkeypatch, sizes):
    monkeypatch.setattr("engram.storage.files.BLOCK", 100)
    rows = torch.arange(23 * 6, dtype=torch.float32).view(23, 6)
    rows[8:17] = 0  # a whole block of zeros at least
    told = []
    whole = write_rows(tmp_path / "whole", rows)
    parts = write_rows(tmp_path / "parts", iter(rows.split(sizes)), told.append)
    assert parts == whole and sum(told) == whole["bytes"] == rows.nbytes
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes() == rows.numpy().tobytes()
