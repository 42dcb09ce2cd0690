"""Training, checkpoints and generation on small synthetic text."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from engram import EngramConfig, EngramMemory, TokenMap, Transformer, TransformerConfig, evaluate, generate, train
from engram.lm.checkpoint import checkpoints, latest_checkpoint, load_checkpoint, read_manifest, save_checkpoint
from engram.lm.run_folder import alone_in
from engram.lm.train import Batches, TrainConfig, learning_rate_scale
from engram.optimizer import build_optimizer
from engram.storage.manifest import verify
from tests.toy import VOCAB, corpus

CONFIG = TrainConfig(tokens=30 * 4 * 16, batch_size=4, context=16, lr=1e-2, table_lr=0.05, warmup_steps=3)


def model(memory: bool = True, seed: int = 0) -> Transformer:
    config = EngramConfig(layers=(1,), heads=2, head_dim=8, rows_per_head=997, table_dtype="bfloat16")
    torch.manual_seed(seed + 1)
    engram = EngramMemory(config, TokenMap.identity(VOCAB), 32) if memory else None
    torch.manual_seed(seed)
    return Transformer(TransformerConfig(vocab_size=VOCAB, hidden_size=32, layers=2, heads=2, max_length=16), engram)


def weights(trained: Transformer) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in trained.state_dict().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a), [k for k in a if not torch.equal(a[k], b[k])]


def test_two_runs_with_the_same_seed_give_the_same_weights():
    runs = []
    for _ in range(2):
        m = model()
        log = train(m, corpus(), CONFIG)
        runs.append((weights(m), [loss for _, loss in log.curve]))
    assert_same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


def test_weights_and_rows_are_bit_identical_with_and_without_prefetching(monkeypatch):
    monkeypatch.setattr("engram.memory.recall._WORTH_A_THREAD", 0)
    runs = []
    for prefetch in (True, False):
        m = model()
        train(m, corpus(), CONFIG, prefetch=prefetch)
        runs.append(weights(m))
    assert_same(*runs)


def test_memory_learns_bigrams_that_the_plain_model_cannot_in_the_same_steps():
    data, held_out = corpus(400), corpus(30, seed=1)
    config = replace(CONFIG, tokens=150 * 64, table_lr=0.3)
    losses = []
    for memory in (False, True):
        m = model(memory)
        train(m, data, config)
        losses.append(evaluate(m, held_out).loss)
    assert losses[1] < losses[0] - 0.1


def test_the_log_counts_every_row_of_the_memory():
    from engram.lm.train import memory_traffic

    m, data = model(), corpus()
    log = train(m, data, CONFIG)
    facts = memory_traffic(log, m.memory)
    batches = Batches(data, CONFIG.context, CONFIG.batch_size, CONFIG.seed)
    touched = 0
    for step in range(CONFIG.steps):
        ids, _, documents = batches(step)
        touched += m.memory.recall(ids, documents).row_ids[1].unique().numel()
    assert facts["rows_read_per_step"] == 4 * 16 * 4 and facts["rows_touched_per_step"] == touched / CONFIG.steps
    assert facts["bytes_read_per_step"] == pytest.approx(256 * 16 + touched / CONFIG.steps * (16 + 4))
    assert facts["row_bytes"] == m.memory.tables[1].nbytes and facts["state_bytes"] == m.memory.tables[1].rows * 4
    assert 0 < facts["seconds"]["updating"] < facts["seconds"]["training"]


def test_all_models_with_the_same_seed_get_the_same_batches_and_another_seed_gives_others():
    data = corpus()
    a, b, other = (Batches(data, 16, 4, seed) for seed in (0, 0, 1))
    for step in (0, 7, 100):
        assert all(torch.equal(x, y) for x, y in zip(a(step), b(step), strict=True))
    assert not np.array_equal(a.order(0), other.order(0))


def test_an_epoch_visits_every_window_once_and_targets_are_the_next_tokens():
    data = corpus()
    batches = Batches(data, 16, 4)
    seen = np.concatenate([batches.order(step) for step in range(batches.per_epoch)])
    assert len(set(seen.tolist())) == len(seen) and len(seen) > batches.windows - 4
    ids, targets, documents = batches(3)
    assert torch.equal(ids[:, 1:], targets[:, :-1]) and documents.shape == ids.shape


def test_the_learning_rate_rises_stays_constant_and_falls_to_almost_zero():
    config = replace(CONFIG, tokens=100 * 64, warmup_steps=10, decay_share=0.4)
    scales = [learning_rate_scale(step, config) for step in range(100)]
    assert scales[0] == 0.1 and scales[10:60] == [1.0] * 50 and 0 < scales[-1] < 0.03
    assert all(a >= b for a, b in pairwise(scales[60:]))


def test_training_does_not_change_the_allocator_settings_of_the_process(monkeypatch):
    calls = []
    monkeypatch.setattr("engram.lm.train.tune_allocator", lambda: calls.append("tuned"))
    train(model(), corpus(), replace(CONFIG, tokens=64))
    assert calls == []


def test_a_text_shorter_than_one_batch_raises():
    with pytest.raises(ValueError, match="one batch needs 4 windows of 16"):
        train(model(), corpus(1, 20), CONFIG)


def test_a_loss_that_is_not_finite_stops_the_run():
    m = model()
    with torch.no_grad():
        m.norm.weight[0] = torch.inf
    with pytest.raises(FloatingPointError, match="lower lr"):
        train(m, corpus(), CONFIG)


def test_an_interrupted_run_resumes_to_bit_identical_weights_and_rows(tmp_path):
    whole = model()
    train(whole, corpus(), CONFIG)

    def stop(step: int, loss: float) -> None:
        if step == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model(), corpus(), CONFIG, folder=tmp_path, checkpoint_every=5, on_step=stop)
    assert latest_checkpoint(tmp_path).name == "step-00000015"
    resumed = model(seed=5)  # other initial weights, which the checkpoint replaces
    log = train(resumed, corpus(), CONFIG, folder=tmp_path, checkpoint_every=5)
    assert_same(weights(whole), weights(resumed))
    assert log.tokens == CONFIG.steps * 64 and len(log.curve) == CONFIG.steps


KILLED = """
import os, signal, sys, threading
from tests.test_train import *
folder, kill_at, delay = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
def on_step(step, loss):
    if step >= kill_at:
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
m = model()
train(m, corpus(), replace(CONFIG, tokens=60 * 64), folder=folder, checkpoint_every=4, on_step=on_step)
torch.save(m.state_dict(), folder + "/final.pt")
"""


def test_a_run_killed_by_sigkill_at_random_steps_ends_with_the_same_weights_and_rows(forked, tmp_path):
    def run(folder, kill_at: int = 99) -> int:  # of 60 steps
        delay = random.random() * 0.02  # so that the kill comes during a step or a save
        done = forked(KILLED, folder, kill_at, delay)
        assert done.returncode <= 0, done.stderr
        return done.returncode

    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    assert run(tmp_path / "whole") == 0
    for kill_at in sorted(random.sample(range(6, 55), 2)):
        assert run(tmp_path / "killed", kill_at) == -signal.SIGKILL
    assert run(tmp_path / "killed") == 0
    whole, killed = (torch.load(tmp_path / name / "final.pt", weights_only=True) for name in ("whole", "killed"))
    assert_same(whole, killed)


def test_the_newest_checkpoints_are_kept_and_a_run_resumes_from_them(tmp_path):
    whole = model()
    train(whole, corpus(), CONFIG, folder=tmp_path / "all", checkpoint_every=7)
    train(model(), corpus(), CONFIG, folder=tmp_path / "two", checkpoint_every=7, keep_checkpoints=2)
    assert [path.name for path in checkpoints(tmp_path / "all")] == [f"step-{step:08}" for step in (7, 14, 21, 28, 30)]
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["log.jsonl", "step-00000028", "step-00000030"]
    more_than_there_are = {"checkpoint_every": 7, "keep_checkpoints": 6}
    train(model(), corpus(), CONFIG, folder=tmp_path / "six", **more_than_there_are)
    assert len(checkpoints(tmp_path / "six")) == 5
    shutil.rmtree(latest_checkpoint(tmp_path / "two"))
    resumed = model()
    train(resumed, corpus(), CONFIG, folder=tmp_path / "two", keep_checkpoints=1)
    assert [path.name for path in checkpoints(tmp_path / "two")] == ["step-00000030"]
    assert_same(weights(whole), weights(resumed))
    with pytest.raises(ValueError, match="keep_checkpoints=-1 count steps and checkpoints"):
        train(model(), corpus(), CONFIG, folder=tmp_path / "none", keep_checkpoints=-1)


def saved(tmp_path):
    m = model()
    train(m, corpus(), CONFIG, folder=tmp_path)
    return latest_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "memory.tables.1.rows"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_the_error_for_a_damaged_checkpoint_names_the_file(tmp_path, name, damage):
    path = saved(tmp_path) / name
    if damage == "truncate":
        os.truncate(path, path.stat().st_size - 7)
    elif damage == "flip":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0x55
        path.write_bytes(data)
    else:
        path.unlink()
    m = model()
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load_checkpoint(path.parent, m, build_optimizer(m))


def test_the_next_checkpoint_deletes_incomplete_folders_of_killed_writers(tmp_path):
    (tmp_path / ".step-00000007.partial-1-1").mkdir(parents=True)
    (tmp_path / ".step-00000007.partial-1-1" / "tables.1.rows").write_bytes(b"x")
    train(model(), corpus(), CONFIG, folder=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", f"step-{CONFIG.steps:08d}"]


def test_a_damaged_manifest_and_an_empty_folder_raise(tmp_path):
    path = saved(tmp_path)
    (path / "manifest.json").write_text('{"format": 1, "files"')
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        read_manifest(path)
    with pytest.raises(FileNotFoundError, match="is not a checkpoint"):
        read_manifest(tmp_path / "nothing")


def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path):
    path = saved(tmp_path)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../../secret"] = {"bytes": 1, "xxh3_128": "0"}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="lacks the file"):
        read_manifest(path)


def reseal(path: Path, change) -> None:
    """Alter a checkpoint's manifest, and write it without a digest, as old versions did."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    manifest.pop("digest", None)
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 1}))


def resume(path: Path) -> dict:
    m = model()
    return load_checkpoint(path, m, build_optimizer(m))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"step": 30', '"step": 31'),
        ('"initial_lr": 0.01', '"initial_lr": 0.81'),
        ('"eps": 1e-08', '"eps": 1e-02'),
        ('"weight_decay": 0.1', '"weight_decay": 0.9'),
        ('"tokens": 1920', '"tokens": 1928'),
        ('"digest"', '"eigest"'),
        ('"groups"', '"froups"'),
    ],
)
def test_an_altered_manifest_of_a_checkpoint_raises_and_is_reported_by_verify(tmp_path, before, after):
    path = saved(tmp_path)
    text = (path / "manifest.json").read_text()
    assert before in text
    (path / "manifest.json").write_text(text.replace(before, after, 1))
    for read in (lambda: resume(path), lambda: train(model(), corpus(), CONFIG, folder=tmp_path)):
        with pytest.raises(ValueError, match=r"manifest\.json was altered"):
            read()
    assert any("manifest.json was altered" in str(result["problem"]) for result in verify(tmp_path))


def test_a_manifest_with_one_flipped_bit_raises_or_has_the_same_values(tmp_path):
    path = saved(tmp_path)
    file, draw = path / "manifest.json", random.Random(0)
    before, manifest = file.read_bytes(), resume(path)
    places = draw.sample(range(len(before)), 120) + [before.index(b'"format"') + i for i in range(12)]
    for place in places:
        data = bytearray(before)
        data[place] ^= 1 << draw.randrange(8)
        file.write_bytes(data)
        try:
            assert read_manifest(path) == manifest  # another spelling of the same values, such as 1E-08
        except ValueError as error:
            assert str(path) in str(error)


def test_old_checkpoints_without_a_manifest_digest_resume_and_verify_reports_it(tmp_path):
    whole = model()
    train(whole, corpus(), CONFIG)

    def stop(step: int, loss: float) -> None:
        if step == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model(), corpus(), CONFIG, folder=tmp_path, checkpoint_every=5, on_step=stop)
    for path in checkpoints(tmp_path):
        reseal(path, lambda manifest: None)
    results = verify(tmp_path)
    assert all(result["problem"] is None for result in results)
    assert sum("has no digest" in str(result["note"]) for result in results) == 3
    resumed = model(seed=5)
    train(resumed, corpus(), CONFIG, folder=tmp_path)
    assert_same(weights(whole), weights(resumed))


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.pop("step"),
        lambda manifest: manifest.update(step="30"),
        lambda manifest: manifest.pop("facts"),
        lambda manifest: manifest.pop("row_steps"),
        lambda manifest: manifest.update(row_steps=[{}]),
        lambda manifest: manifest.update(row_steps=[]),
        lambda manifest: manifest["groups"][0].pop("lr"),
        lambda manifest: manifest["groups"][0].update(betas=0.9),
        lambda manifest: manifest["groups"].pop(),
        lambda manifest: manifest.update(groups=7),
        lambda manifest: manifest["files"].pop("optimizer.safetensors"),
        lambda manifest: manifest["facts"].pop("log"),
        lambda manifest: manifest["facts"]["log"].update(odd=1),
        lambda manifest: manifest["facts"].pop("config"),
    ],
)
def test_an_incomplete_manifest_without_digest_raises_a_value_error_with_its_path(tmp_path, change):
    path = saved(tmp_path)
    reseal(path, change)
    with pytest.raises(ValueError, match="step-00000030"):
        train(model(), corpus(), CONFIG, folder=tmp_path)


def test_only_folders_named_after_a_step_are_checkpoints_and_steps_are_ordered_as_numbers(tmp_path):
    m = model()
    optimizer = build_optimizer(m)
    for step in (2, 99_999_999, 100_000_000, 1_000_000_000):
        save_checkpoint(tmp_path, m, optimizer, step, {})
    numbers = [2, 99_999_999, 100_000_000, 1_000_000_000]
    for other in ("step-best", "step-00000002.bak", "step-", "step--0000003", "step-0000000x", "old-step-00000009"):
        shutil.copytree(tmp_path / "step-00000002", tmp_path / other)
    assert [read_manifest(path)["step"] for path in checkpoints(tmp_path)] == numbers
    assert latest_checkpoint(tmp_path).name == "step-1000000000"
    results = verify(tmp_path)
    assert all(result["problem"] is None for result in results)
    assert sorted(Path(r["file"]).name for r in results if r["note"]) == sorted(
        ["step-best", "step-00000002.bak", "step-", "step--0000003", "step-0000000x"]
    )
    save_checkpoint(tmp_path, m, optimizer, 1_000_000_001, {}, keep=2)
    assert [read_manifest(path)["step"] for path in checkpoints(tmp_path)] == [1_000_000_000, 1_000_000_001]
    assert (tmp_path / "step-best").is_dir() and (tmp_path / "old-step-00000009").is_dir()


def test_a_checkpoint_renamed_to_another_step_raises(tmp_path):
    path = saved(tmp_path)
    shutil.copytree(path, tmp_path / "step-00000031")
    with pytest.raises(ValueError, match="step-00000031 holds step 30, not 31"):
        train(model(), corpus(), CONFIG, folder=tmp_path)
    shutil.copytree(path, tmp_path / "best")
    assert read_manifest(tmp_path / "best")["step"] == 30  # a folder name without a step number is not checked


def test_a_checkpoint_of_another_model_or_configuration_raises(tmp_path):
    path = saved(tmp_path)
    plain = model(memory=False)
    with pytest.raises(ValueError, match="saved from another model"):
        load_checkpoint(path, plain)
    with pytest.raises(ValueError, match="was trained with"):
        train(model(), corpus(), replace(CONFIG, lr=0.5), folder=tmp_path)


def log_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_each_step_has_one_line_in_the_log_of_its_folder(tmp_path):
    log = train(model(), corpus(), CONFIG, folder=tmp_path, evaluate=lambda: 1.5, evaluate_every=10)
    lines = log_lines(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, CONFIG.steps + 1))
    assert [[line["tokens"], line["loss"]] for line in lines] == log.curve
    assert (
        lines[0]["lr"] == pytest.approx(CONFIG.lr / 3)
        and lines[5]["lr"] == CONFIG.lr
        and lines[-1]["seconds"] == log.seconds
    )
    assert all(line["tokens_per_second"] > 0 for line in lines)
    assert [line["step"] for line in lines if line.get("validation_loss") == 1.5] == [10, 20, 30]


@pytest.mark.parametrize("torn", [b"", b'{"step": 18, "tok', b"not JSON\n", b'[]\n{"step": "x"}\n', b"\xff\n"])
def test_the_log_of_a_resumed_run_has_each_step_once(tmp_path, torn):
    def stop(step: int, loss: float) -> None:
        if step == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model(), corpus(), CONFIG, folder=tmp_path, checkpoint_every=5, on_step=stop)
    assert [line["step"] for line in log_lines(tmp_path)] == list(range(1, 18))
    first = (tmp_path / "log.jsonl").read_bytes().splitlines(keepends=True)[:15]
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write(torn)
    log = train(model(), corpus(), CONFIG, folder=tmp_path)
    assert [[line["tokens"], line["loss"]] for line in log_lines(tmp_path)] == log.curve
    assert (tmp_path / "log.jsonl").read_bytes().splitlines(keepends=True)[:15] == first
    for path in checkpoints(tmp_path):
        shutil.rmtree(path)
    train(model(), corpus(), CONFIG, folder=tmp_path)  # starts again at step 0
    assert [line["step"] for line in log_lines(tmp_path)] == list(range(1, CONFIG.steps + 1))


HOLDS = """
import sys, time
sys.path.insert(0, {root!r})
from engram.lm.run_folder import alone_in
with alone_in({folder!r}):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_cannot_train_in_a_folder_until_the_first_ends(tmp_path):
    code = HOLDS.format(root=str(Path(__file__).parents[1]), folder=str(tmp_path))
    first = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match=rf"another process \(pid {first.pid}\) trains in {tmp_path}"):
            train(model(), corpus(), CONFIG, folder=tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    finally:
        first.kill()
        first.wait()
    train(model(), corpus(), CONFIG, folder=tmp_path)
    assert not (tmp_path / ".lock").exists()


def test_a_run_that_fails_to_start_leaves_no_new_folder_and_deletes_no_existing_one(tmp_path):
    (tmp_path / "old").mkdir()
    for name in ("old", "new"):
        with pytest.raises(ValueError, match="one batch needs 4 windows"):
            train(model(), corpus(1, 20), CONFIG, folder=tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["old"] and not list((tmp_path / "old").iterdir())


def test_a_second_thread_cannot_train_in_a_folder_during_a_run_and_an_interrupt_frees_it(tmp_path):
    problems = []

    def second(step: int, loss: float) -> None:
        def other() -> None:
            try:
                train(model(), corpus(), CONFIG, folder=tmp_path / ".." / tmp_path.name)
            except BlockingIOError as error:
                problems.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        raise KeyboardInterrupt

    try:
        train(model(), corpus(), CONFIG, folder=tmp_path, on_step=second)
    except KeyboardInterrupt:
        interrupted = sys.exc_info()  # a notebook keeps the traceback
    assert interrupted and "another thread of this process" in problems[0]
    with alone_in(tmp_path), alone_in(tmp_path):  # blocks of one thread nest
        train(model(), corpus(), CONFIG, folder=tmp_path)
    assert latest_checkpoint(tmp_path).name == "step-00000030"


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_on_a_file_system_without_locks_training_warns_and_continues(tmp_path, monkeypatch, code):
    def flock(handle, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", flock)
    config = replace(CONFIG, tokens=64)
    with pytest.warns(UserWarning, match="without locks"):
        train(model(memory=False), corpus(), config, folder=tmp_path)
    assert latest_checkpoint(tmp_path).name == "step-00000001"


def test_a_full_disk_leaves_no_incomplete_checkpoint(tmp_path, monkeypatch):
    m = model()
    optimizer = build_optimizer(m)
    before = save_checkpoint(tmp_path, m, optimizer, 1, {})

    def full(path, rows):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engram.lm.checkpoint.write_rows", full)
    with pytest.raises(OSError, match=r"No space left on device.*Nothing half-written"):
        save_checkpoint(tmp_path, m, optimizer, 2, {})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert latest_checkpoint(tmp_path) == before


def test_evaluation_scores_every_token_but_the_first_of_each_document_once():
    m, data = model().eval(), corpus(7)
    result = evaluate(m, data)
    assert result.document_tokens.tolist() == [39] * 7
    assert np.isnan(result.position_nats).sum() == 7
    with torch.no_grad():  # the second window of the third document, by hand
        start = int(data.starts[2]) + 16
        ids = torch.from_numpy(data.ids[start : start + 16].astype(np.int64))[None]
        log_probs = m(ids).log_softmax(-1)
    for t in range(15):
        expected = -log_probs[0, t, int(data.ids[start + t + 1])].item()
        assert abs(result.position_nats[start + t] - expected) < 1e-4
    total = result.document_nats.sum()
    assert abs(result.loss - total / (39 * 7)) < 1e-9
    assert abs(result.bits_per_byte - total / np.log(2) / (7 * 120)) < 1e-9


def test_evaluation_raises_if_a_loss_is_not_finite():
    m, data = model(), corpus(documents=3)
    with pytest.raises(ValueError, match="context is 1 to"):
        evaluate(m, data, context=-5)
    with torch.no_grad():
        m.head.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"3 of 3 documents .* \(document 0, 1, 2\)"):
        evaluate(m, data)


def test_a_batches_function_is_called_once_per_step(tmp_path):
    requested_steps = []

    def batches(step: int):
        assert step < CONFIG.steps
        requested_steps.append(step)
        return Batches(corpus(), CONFIG.context, CONFIG.batch_size)(step)

    train(model(), corpus(), CONFIG, batches=batches, folder=tmp_path)
    assert requested_steps == list(range(CONFIG.steps))
    train(model(), corpus(), CONFIG, batches=batches, folder=tmp_path)  # no step is left to train
    assert len(requested_steps) == CONFIG.steps


def test_scored_probabilities_sum_to_one_over_the_vocabulary():
    m, data = model().eval(), corpus(1)
    total = 0.0
    for token in range(VOCAB):  # the loss of every possible token at one position
        ids = data.ids.copy()
        ids[16] = token  # the last target of the first window: nothing before it changes
        total += float(np.exp(-evaluate(m, data._replace(ids=ids)).position_nats[15].astype(np.float64)))
    assert abs(total - 1) < 1e-4


def test_greedy_generation_equals_taking_the_likeliest_token_without_a_cache():
    m = model().eval()
    train(m, corpus(), CONFIG)
    prompt = torch.tensor([[0, 5], [0, 9]])
    out = generate(m, prompt, 10, temperature=0)
    ids = prompt
    with torch.no_grad():
        for _ in range(10):
            ids = torch.cat([ids, m(ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(out, ids)


def test_generation_is_the_same_with_and_without_prefetching(monkeypatch):
    monkeypatch.setattr("engram.memory.recall._WORTH_A_THREAD", 0)
    m = model()
    train(m, corpus(), CONFIG)
    prompt = torch.from_numpy(corpus().ids[None, :9].astype(np.int64))
    out = [generate(m, prompt, 6, temperature=0, prefill=4, prefetch=prefetch) for prefetch in (True, False)]
    assert torch.equal(*out) and torch.equal(out[0], generate(m, prompt, 6, temperature=0))


def test_sampling_with_the_same_seed_gives_the_same_tokens_and_ends_at_the_stop_id():
    m = model()
    prompt = torch.tensor([[0, 5]])
    a, b, c = (generate(m, prompt, 12, seed=seed, top_k=5) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    first = int(a[0, 2])
    assert generate(m, prompt, 12, seed=1, top_k=5, stop_id=first).shape == (1, 3)


def test_generation_beyond_the_models_max_length_raises():
    with pytest.raises(ValueError, match="max_length 16"):
        generate(model(), torch.tensor([[0, 5]]), 15)
    with pytest.raises(ValueError, match="prompt must be"):
        generate(model(), torch.empty(1, 0, dtype=torch.int64), 3)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"tokens": -1}, "tokens=-1"),
        ({"top_k": 0}, "top_k=0"),
        ({"prefill": 0}, "prefill=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
    ],
)
def test_generation_with_a_number_out_of_its_range_raises(wrong, named):
    with pytest.raises(ValueError, match=named):
        generate(model(), torch.tensor([[0, 5]]), **{"tokens": 3, **wrong})


def test_tied_embeddings_are_still_tied_after_saving_and_loading(tmp_path):
    shape = TransformerConfig(vocab_size=VOCAB, hidden_size=32, layers=1, heads=2, max_length=16, tie_embeddings=True)
    trained, loaded = Transformer(shape), Transformer(shape)
    train(trained, corpus(), CONFIG, folder=tmp_path)
    load_checkpoint(latest_checkpoint(tmp_path), loaded)
    assert_same(weights(trained), weights(loaded))
    assert loaded.head.weight is loaded.embedding.weight


@pytest.mark.parametrize("ends", [KeyboardInterrupt, SystemExit, ZeroDivisionError])
def test_a_stopped_run_can_be_repeated_while_its_traceback_is_kept(tmp_path, ends):
    config = EngramConfig(layers=(0, 1), heads=2, head_dim=8, rows_per_head=97)
    memory = EngramMemory(config, TokenMap.identity(VOCAB), 32, folder=tmp_path)
    m = Transformer(TransformerConfig(vocab_size=VOCAB, hidden_size=32, layers=2, heads=2, max_length=16), memory)

    def end(step: int, loss: float) -> None:
        if step == 3:
            raise ends

    with pytest.raises(ends) as kept:
        train(m, corpus(), CONFIG, on_step=end)
    assert kept.tb is not None  # a notebook keeps it too, with the frames that refer to optimizer and state
    train(m, corpus(), CONFIG)
    memory.close()
