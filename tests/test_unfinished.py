"""Row files of an incomplete copy or training run raise an error that names them, until a checkpoint is loaded."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_files import CONFIG, HIDDEN, VOCAB, elsewhere, linux, memory, rows_of, same, saved  # noqa: F401

from engram import EngramConfig, EngramMemory, TokenMap, Transformer, TransformerConfig, build_optimizer
from engram.lm.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from engram.lm.train import TrainConfig, train

sys.path.insert(0, str(Path(__file__).parent))
import toy

TRAIN = TrainConfig(tokens=12 * 64, batch_size=4, context=16, warmup_steps=3)
ROWS = EngramConfig(layers=(0, 1), orders=(2,), heads=2, head_dim=8, rows_per_head=499, table_init="normal")


def model(folder: Path | None = None) -> Transformer:
    torch.manual_seed(0)
    kept = EngramMemory(ROWS, TokenMap.identity(toy.VOCAB), 32, folder=folder)
    torch.manual_seed(0)
    return Transformer(TransformerConfig(vocab_size=toy.VOCAB, hidden_size=32, layers=2, heads=2, max_length=16), kept)


def rows(m: Transformer) -> list[torch.Tensor]:
    return [table.gather(torch.arange(table.rows)) for table in m.memory.tables.values()]


class Stop(Exception):
    pass


def stop_at(last: int):
    def on_step(step: int, loss: float) -> None:
        if step == last:
            raise Stop

    return on_step


@pytest.fixture(scope="module")
def undisturbed() -> list[torch.Tensor]:
    m = model()
    train(m, toy.corpus(), TRAIN)
    return [*rows(m), *m.state_dict().values()]


@pytest.mark.parametrize("last", [1, 4, 11])
@pytest.mark.parametrize("run", ["run", None])
def test_rows_of_a_run_that_stopped_before_its_first_checkpoint_raise(tmp_path, last, run):
    home = None if run is None else tmp_path / run
    m = model(tmp_path / "rows")
    with pytest.raises(Stop):
        train(m, toy.corpus(), TRAIN, folder=home, on_step=stop_at(last))
    m.memory.close()
    with pytest.raises(ValueError, match=rf"{tmp_path / 'rows'} holds rows of training that was cut short.*delete"):
        model(tmp_path / "rows")


@pytest.mark.parametrize("last", [5, 7, 11])
def test_rows_of_a_run_with_checkpoints_are_used_only_after_one_is_loaded(tmp_path, undisturbed, last):
    m = model(tmp_path / "rows")
    with pytest.raises(Stop):
        train(m, toy.corpus(), TRAIN, folder=tmp_path / "run", checkpoint_every=2, on_step=stop_at(last))
    m.memory.close()
    again = model(tmp_path / "rows")
    uses = [
        lambda: again.memory.recall(torch.zeros(1, 4, dtype=torch.int64)),
        lambda: again.memory.save(tmp_path / "saved"),
        lambda: again.memory.encode_tables("int8"),
        lambda: train(again, toy.corpus(), TRAIN),
        lambda: train(again, toy.corpus(), TRAIN, folder=tmp_path / "other"),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=rf"cut short.*Load a checkpoint of {tmp_path / 'run'} over them"):
            use()
    train(again, toy.corpus(), TRAIN, folder=tmp_path / "run", checkpoint_every=2)
    found = [*rows(again), *again.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(found, undisturbed, strict=True))
    again.memory.close()
    assert "unfinished" not in json.loads((tmp_path / "rows" / "rows.json").read_text())
    model(tmp_path / "rows").memory.recall(torch.zeros(1, 4, dtype=torch.int64))


def test_training_with_new_row_files_resumes_from_the_checkpoint_of_a_stopped_run(tmp_path, undisturbed):
    m = model(tmp_path / "rows")
    with pytest.raises(Stop):
        train(m, toy.corpus(), TRAIN, folder=tmp_path / "run", checkpoint_every=3, on_step=stop_at(8))
    m.memory.close()
    for file in (tmp_path / "rows").iterdir():
        file.unlink()
    again = model(tmp_path / "rows")
    train(again, toy.corpus(), TRAIN, folder=tmp_path / "run")
    found = [*rows(again), *again.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(found, undisturbed, strict=True))


def test_training_continues_with_the_rows_of_a_finished_run(tmp_path):
    for folder in (tmp_path / "run", None):
        m = model(tmp_path / "rows")
        train(m, toy.corpus(), TRAIN, folder=folder)
        trained = [r.clone() for r in rows(m)]
        m.memory.close()
        again = model(tmp_path / "rows")
        assert all(torch.equal(a, b) for a, b in zip(rows(again), trained, strict=True))
        train(again, toy.corpus(), replace(TRAIN, seed=1))
        again.memory.close()


def test_row_files_without_an_unfinished_mark_open_normally(tmp_path):
    m = model(tmp_path)
    facts = m.memory._identity()
    m.memory.close()
    assert json.loads((tmp_path / "rows.json").read_text()) == facts, "what older versions wrote"
    model(tmp_path).memory.close()
    for mark in ("yes", {"run": 3}, {}):
        (tmp_path / "rows.json").write_text(json.dumps({**facts, "unfinished": mark}))
        with pytest.raises(ValueError, match="cut short"):
            model(tmp_path)


@pytest.mark.parametrize("key", ["tables.0", "tables.1"])
def test_load_state_dict_over_row_files_succeeds_or_leaves_them_marked_unfinished(tmp_path, key):
    state = model().memory.state_dict()
    m = model(tmp_path).memory
    m.load_state_dict(state)
    m.close()
    model(tmp_path).memory.close()
    m = model(tmp_path).memory
    with pytest.raises(RuntimeError):
        m.load_state_dict({**state, key: torch.zeros(3, 8)})
    m.close()
    with pytest.raises(ValueError, match="cut short"):
        model(tmp_path)


def test_loading_a_damaged_checkpoint_leaves_row_files_marked_unfinished(tmp_path):
    m = model(tmp_path / "rows")
    step = save_checkpoint(tmp_path / "run", m, build_optimizer(m), 1, {})
    file = sorted(step.glob("memory.tables.*.rows"))[-1]
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    with pytest.raises(ValueError, match="does not have the digest"):
        load_checkpoint(step, m)
    m.memory.close()
    again = model(tmp_path / "rows")
    with pytest.raises(ValueError, match="cut short"):
        again.memory.recall(torch.zeros(1, 4, dtype=torch.int64))


@linux
@pytest.mark.parametrize("after", [0, 1, 2])
def test_row_files_of_a_killed_copy_cannot_be_opened(saved, tmp_path, elsewhere, after):  # noqa: F811
    code = """
import engram.memory.saved
folder, count = Path(sys.argv[2]), int(sys.argv[3])
EngramMemory.load(sys.argv[1], rows_in=folder).close()
for rows in folder.glob("*.rows"):
    rows.unlink()  # rows.json stays
read_rows = engram.memory.saved.read_rows
def killed(*args):
    global count
    if count == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    count -= 1
    read_rows(*args)
engram.memory.saved.read_rows = killed
EngramMemory.claim = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
EngramMemory.load(sys.argv[1], rows_in=folder)
"""
    status, _ = elsewhere(code, saved, tmp_path / "work", after)
    assert status == -9 and (tmp_path / "work" / "layer-1.rows").exists()
    with pytest.raises(ValueError, match=r"rows.json does not name the memory of the rows"):
        EngramMemory(CONFIG, TokenMap.identity(VOCAB), HIDDEN, folder=tmp_path / "work")
    with pytest.raises(FileExistsError, match="delete the rows"):
        EngramMemory.load(saved, rows_in=tmp_path / "work")
    for rows_file in (tmp_path / "work").glob("*.rows"):
        rows_file.unlink()
    copied = EngramMemory.load(saved, rows_in=tmp_path / "work")
    assert same(copied, memory())
    copied.close()


@linux
def test_repeating_a_command_after_a_kill_gives_the_same_rows_or_raises(tmp_path, undisturbed, elsewhere):  # noqa: F811
    code = """
import test_unfinished
from test_unfinished import *
m = model(Path(sys.argv[1]) / "rows")
last = int(sys.argv[2])
kill = lambda step, loss: os.kill(os.getpid(), signal.SIGKILL) if step == last else None
train(m, toy.corpus(), TRAIN, folder=Path(sys.argv[1]) / "run", checkpoint_every=5, on_step=kill)
"""
    status, out = elsewhere(code, tmp_path, 3)
    assert status == -9, out
    status, out = elsewhere(code, tmp_path, 99)
    assert status == 1 and "cut short" in out and latest_checkpoint(tmp_path / "run") is None
    for name in os.listdir(tmp_path / "rows"):
        (tmp_path / "rows" / name).unlink()
    assert elsewhere(code, tmp_path, 7)[0] == -9
    assert elsewhere(code, tmp_path, 99) == (0, "")
    done = model(tmp_path / "rows")
    assert all(torch.equal(a, b) for a, b in zip(rows(done), undisturbed[:2], strict=True))
    done.memory.close()
