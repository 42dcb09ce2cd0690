"""The lab's runner, statistics and tables, on a corpus of made-up words and models that train in a moment."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import forks
import numpy as np
import pytest
import torch

from engram.config import EngramConfig
from engram.lm.run import Setting, prepare
from engram.lm.train import Batches, TrainConfig
from engram.lm.transformer import TransformerConfig
from experiments.__main__ import chosen, main, new, runs_of, seeds_of, tune
from experiments.arms.knn_lm import INDEXES
from experiments.lab import caches, cell, claims_page, execute, readme, report, results, runner, tuning
from experiments.lab.cell import HOME, SETTINGS, Run, Table, cell_of, names
from experiments.lab.results import append, read_documents, read_results, write_documents
from experiments.lab.trainings import FILE, training_of
from experiments.lab.tuning import rate_grid, tuned
from experiments.lab.version import processor
from experiments.slots.summary import log_fit


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    home = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 4)) for _ in range(60)]
    for number in range(60):
        text = " ".join(words[w] for w in rng.zipf(1.5, 80) % 60)
        (home / f"{number}.txt").write_text(text)
    return Setting(
        corpus=str(home),
        vocab_size=300,
        model=TransformerConfig(vocab_size=300, hidden_size=16, layers=2, heads=2, max_length=32),
        memory=EngramConfig(layers=(1,), heads=2, head_dim=4, rows_per_head=50),
        train=TrainConfig(tokens=600, batch_size=2, context=32, warmup_steps=2),
    )


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def finished(setting, tmp_path_factory):
    """A home where plain and engram ran with two seeds, and the runs."""
    home = tmp_path_factory.mktemp("home")
    runs = [Run("toy", arm, setting).seeded(seed) for arm in ("plain", "engram") for seed in (0, 1)]
    (home / "toy").mkdir()
    for run in runs:
        record, documents = runner.execute(run)
        append(home / "toy" / "results.jsonl", record)
        write_documents(home / "toy", run.key, documents)
    return home, runs


@pytest.fixture
def children(forked, monkeypatch):
    """Fork the runs of a sweep and the processes that make its texts, instead of starting new processes."""

    def run(command, input, env=None, **_):
        _, _, module, *arguments = command
        if module == "experiments.lab.runner":
            asked = Run.from_json(input)
            folder = caches.Path(env[caches.FOLDER]) / caches.key_of(asked.setting, asked.held_out)
            if not folder.exists():  # else the run has it made by one more process
                caches.save(folder, prepare(asked.setting, asked.held_out))
            arguments[-1] = str(forked.pid)  # the parent that it watches
        text = input if isinstance(input, str) else input.decode()
        return forked(forks.MODULE.format(module), *arguments, input=text, env=env)

    monkeypatch.setattr(subprocess, "run", run)


def fake(label, seed=0, lr=3e-3, table_lr=0.03, loss=1.0, **other):
    setting = {"train": {"lr": lr, "table_lr": table_lr, "tokens": 560_000}}
    setting |= {"corpus": "g", "vocab_size": 300, "model": {"layers": 2}}
    return {
        "key": f"{label}{seed}{lr}{table_lr}",
        "experiment": "toy",
        "arm": label,
        "variant": label,
        "size": "",
        "options": {},
        "held_out": "validation",
        "seed": seed,
        "setting": setting,
        "loss": loss,
    } | other


def test_runs_from_before_a_field_was_added_keep_their_place(finished, tmp_path):
    home, runs = finished
    shutil.copytree(home, tmp_path / "home")
    file = tmp_path / "home" / "toy" / "results.jsonl"
    records = read_results(file)
    for record in records:  # as a version without the field wrote them
        del record["setting"]["memory"]["row_multiple"]
        results.rename_documents(file.parent, {record["key"]: f"old{record['key']}"})
        record["key"] = record["cell"] = f"old{record['key']}"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert runner.rekey(tmp_path / "home", "toy", file) == len(runs)
    assert read_results(file) == read_results(home / "toy" / "results.jsonl")
    assert results.document_keys(file.parent) == {run.key for run in runs}
    assert runner.rekey(tmp_path / "home", "toy", file) == 0


def test_the_key_changes_with_whatever_decides_the_outcome_and_with_nothing_else(setting):
    run = Run("toy", "plain", setting)
    others = [
        replace(run, arm="engram"),
        replace(run, options=(("rows", 3),)),
        replace(run, held_out="tune"),
        replace(run, setting=cell.change(setting, train={"lr": 0.5})),
        replace(run, setting=cell.change(setting, {"gate": "none"})),
        run.seeded(1),
    ]
    assert len({r.key for r in [run, *others]}) == 7
    assert replace(run, experiment="other", variant="x", size="y").key == run.key


def test_repetitions_with_other_seeds_share_their_cell(setting):
    run = Run("toy", "engram", setting)
    assert run.seeded(1).kind == run.seeded(2).kind == run.key
    assert run.seeded(2).setting.memory.seed == 2


def test_the_key_does_not_hang_on_the_order_of_the_options(setting):
    a, b = (
        Run("toy", "x", setting, options) for options in ((("k", 1), ("index", "ivf")), (("index", "ivf"), ("k", 1)))
    )
    assert a == b and a.key == b.key


def test_the_key_is_the_same_in_another_process():
    code = "from experiments.config import *; print(Run('toy', 'engram', SETTINGS['tiny'], (('rows', 3),)).key)"
    env = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(HOME.parent)}
    printed = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert printed.strip() == Run("toy", "engram", SETTINGS["tiny"], (("rows", 3),)).key


def test_a_run_survives_its_json(setting):
    run = Run("toy", "engram", setting, (("index", "ivf"), ("k", 3)), "variant", "size", "tune").seeded(4)
    assert Run.from_json(run.to_json()) == run
    assert Run.from_json(run.to_json()).key == run.key


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("size", SETTINGS)
def test_every_experiment_lists_distinct_runs_with_its_baseline_in_every_group(name, size):
    module = cell.questions(name)
    runs = module.configs(size)
    assert len({run.key for run in runs}) == len({(run.table, run.variant) for run in runs}) == len(runs)
    assert len({str(run.table) for run in runs}) == len({run.table for run in runs})
    assert {(run.experiment, run.size) for run in runs} == {(name, size)}
    for table in {run.table for run in runs}:
        assert module.BASELINE in {run.variant for run in runs if run.table == table}


@pytest.mark.parametrize("name", [n for n in names() if hasattr(cell.questions(n), "tune")])
def test_nothing_is_tuned_on_the_reported_text(name):
    runs = cell.questions(name).tune()
    assert runs and {run.held_out for run in runs} == {"tune"}


def test_only_and_corpus_select_and_change_the_runs():
    runs = runs_of("sceptic", [0, 1], ["plain", "knn-lm"], "tiny", "stdlib")
    assert [run.variant for run in runs[:4]] == ["plain", *(f"knn-lm ({index}, 1,024)" for index in INDEXES)]
    assert {run.setting.corpus for run in runs} == {"stdlib"} and [run.seed for run in runs] == [0] * 4 + [1] * 4
    assert {str(run.table) for run in runs} == {"tiny: stdlib"}


def test_a_label_with_commas_is_chosen_by_an_option_of_its_own():
    only = chosen("components", ["engram,plain", "orders: 2, 3, 4"])
    assert [run.variant for run in runs_of("components", [0], only)] == ["engram", "plain", "orders: 2, 3, 4"]
    assert chosen("components", None) is None


def test_changes_of_the_memory_keep_engrams_rate_where_no_grid_of_theirs_is_of_that_length():
    runs = {run.variant: run.setting.train for run in runs_of("components", [0], size="small")}
    del runs["plain"]
    assert {train.lr for train in runs.values()} == {runs["engram"].lr}
    assert runs["optimiser: adam"].table_lr != runs["engram"].table_lr  # a rate of another kind of step


def test_groups_are_chosen_by_a_part_of_their_name():
    runs = runs_of("tokens", [0], groups=[": kjv", "2.24M"])
    assert len(runs) == 2 * (4 + 1) + 2 and all(": kjv" in str(run.table) or "2.24M" in str(run.table) for run in runs)
    assert [run.arm for run in runs_of("tokens", [0], ["plain"], groups=["+kjv, 2.24M"])] == ["plain"]
    with pytest.raises(ValueError, match=r"no group with 2\.5M in its name; it has tiny: kjv, 0\.28M tokens;"):
        runs_of("tokens", [0], groups=["2.5M"])
    with pytest.raises(ValueError, match="recall has no tuning run left after --only and --group"):
        tune("recall", groups=["4 in 8"])


def test_an_arm_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"no arm plian.* it has .*plain"):
        runs_of("sceptic", [0], ["plian"])


@pytest.mark.parametrize("text", ["", "0,0", "a", "-1"])
def test_bad_seeds_are_refused(text):
    with pytest.raises(Exception, match="seeds are"):
        seeds_of(text)


def test_a_run_again_gives_the_same_loss(setting, finished):
    home, runs = finished
    before = read_results(home / "toy" / "results.jsonl")[2]
    again, documents = runner.execute(runs[2])
    assert again["arm"] == "engram"
    assert again["loss"] == pytest.approx(before["loss"], abs=1e-6)
    np.testing.assert_allclose(documents["nats"], read_documents(home / "toy", runs[2].key)["nats"], rtol=1e-6)


def test_a_result_names_the_processor(finished, tmp_path):
    (recorded,) = {json.dumps(run["processor"]) for run in read_results(finished[0] / "toy" / "results.jsonl")}
    assert json.loads(recorded) == processor() and json.loads(recorded)["name"]
    flags = "fpu avx2 avx512f avx512_bf16 amx_tile avx512vl"
    (tmp_path / "intel").write_text(f"processor\t: 0\nmodel name\t: Some CPU @ 2.1 GHz\nflags\t\t: {flags}\n")
    (tmp_path / "amd").write_text("model name\t: Other CPU\nflags\t\t: fpu avx avx2\n")
    (tmp_path / "arm").write_text("processor\t: 0\nFeatures\t: fp asimd\n")
    every = ["avx2", "avx512f", "avx512_bf16", "amx_tile"]
    assert processor(tmp_path / "intel") == {"name": "Some CPU @ 2.1 GHz", "extensions": every}
    assert processor(tmp_path / "amd") == {"name": "Other CPU", "extensions": ["avx2"]}
    assert processor(tmp_path / "arm")["extensions"] == []
    assert "extensions" not in processor(tmp_path / "none")


def test_a_result_says_what_ran_and_what_it_cost(setting, finished):
    plain, _, engram, _ = read_results(finished[0] / "toy" / "results.jsonl")
    # 2 heads of 2 orders, 53 and more rows each, of 4 values; RMS keeps one number a row
    rows = engram["parameters"]["table"] // 4
    assert rows >= 4 * 50
    assert engram["bytes"]["table"] == 16 * rows and engram["bytes"]["optimizer_rows"] == 4 * rows
    assert plain["parameters"]["table"] == plain["bytes"]["table"] == plain["bytes"]["optimizer_rows"] == 0
    assert plain["bytes"]["optimizer_dense"] == 2 * plain["bytes"]["dense"] == 8 * plain["parameters"]["dense"]
    assert engram["parameters"]["dense"] > plain["parameters"]["dense"]
    assert engram["tokens"] == 640 and engram["peak_memory"] > 2**20 and engram["seed"] == 0
    assert engram["setting"]["train"]["lr"] == setting.train.lr and len(engram["sources"]) == 16
    assert json.loads(json.dumps(engram)) == engram and len(engram["curve"]) <= 40


def test_flops_are_two_for_each_weight_of_a_product_and_token(setting, finished):
    plain = read_results(finished[0] / "toy" / "results.jsonl")[0]
    d, vocabulary, context = 16, plain["vocabulary"], 32
    attention = 2 * 2 * context * d  # scores and weighted values, per token
    expected = 2 * (2 * 12 * d * d + vocabulary * d) + 2 * attention
    assert plain["flops_per_token"]["forward"] == expected
    assert plain["flops_per_token"]["training"] == 3 * expected


def test_losses_are_split_by_how_often_training_saw_the_tokens_before(setting, finished):
    home, runs = finished
    data, train = prepare(setting), runs[0].setting.train
    batches = Batches(data.train, train.context, train.batch_size, train.seed)
    trained = Counter()
    for step in range(train.steps):
        ids, _, documents = (part.tolist() for part in batches(step))
        for row, numbers in zip(ids, documents, strict=True):
            inside = [i for i in range(1, len(row)) if numbers[i] == numbers[i - 1]]
            trained.update(tuple(row[i - 1 : i + 1]) for i in inside)
    expected = Counter()
    held = data.validation
    for begin, end in pairwise(held.starts.tolist()):
        for i in range(begin + 1, end - 1):  # the last token of a document predicts nothing
            count = trained[tuple(held.ids[i - 1 : i + 1].tolist())]
            expected["0" if count == 0 else "1" if count == 1 else "2-9" if count < 10 else "10+"] += 1
    plain = read_results(home / "toy" / "results.jsonl")[0]
    found = plain["seen"]["bigram"]
    assert {bucket: tokens for bucket, (tokens, _) in found.items()} == {b: expected[b] for b in found}
    assert expected["0"] and expected["2-9"]  # else this shows little
    assert sum(tokens for tokens, _ in plain["seen"]["trigram"].values()) < expected.total()


def test_the_table_of_seen_tokens_compares_seeds_that_counted_alike(tmp_path):
    def run(label, seed, losses, tokens=5):
        seen = {"trigram": {b: [tokens, loss] for b, loss in zip(("0", "1", "2-9", "10+"), losses, strict=True)}}
        return {"label": label, "seed": seed, "seen": seen}

    plain = [run("plain", 0, [4.0, 3.0, 2.0, 1.0]), run("plain", 1, [4.0, 3.0, 2.0, 1.0])]
    arm = [run("arm", 0, [4.0, 2.5, 1.5, 1.0]), run("arm", 1, [4.0, 2.7, 1.5, 1.0])]
    other = [run("longer", 0, [1.0] * 4, tokens=6)]
    rows = [report.Row("plain", tuple(plain)), report.Row("arm", tuple(arm)), report.Row("longer", tuple(other))]
    head, _, *lines = report.seen_table(rows, "plain", "trigram").splitlines()
    assert head.count("25 %") == 4 and len(lines) == 1
    assert lines[0] == "| arm | +0.000 ± 0.000 | -0.400 ± 1.271 | -0.500 ± 0.000 | +0.000 ± 0.000 |"
    assert report.seen_table([report.Row("plain", ({"label": "plain", "seed": 0},))], "plain", "trigram") == ""


def test_every_arm_of_a_seed_sees_the_same_batches(setting, monkeypatch):
    seen = {}

    def spy(arm):
        asked = seen.setdefault(arm, [])
        call = Batches.__call__
        monkeypatch.setattr(execute, "train", lambda model, data, how, on_step: asked.extend(
            call(Batches(data, how.context, how.batch_size, how.seed), step)[0].tolist() for step in range(5)
        ))  # fmt: skip

    for arm in ("plain", "engram"):
        spy(arm)
        with pytest.raises(AttributeError):  # there is no log: the spy trained nothing
            runner.execute(Run("toy", arm, setting).seeded(3))
    assert seen["plain"] == seen["engram"] and len(seen["plain"]) == 5


def test_a_run_tunes_the_allocator_before_it_trains(setting, monkeypatch):
    order = []
    trained = execute.train
    monkeypatch.setattr(execute, "tune_allocator", lambda: order.append("tuned"))
    monkeypatch.setattr(execute, "train", lambda *args, **how: order.append("trained") or trained(*args, **how))
    runner.execute(Run("toy", "plain", setting))
    assert order == ["tuned", "trained"]


def test_a_budget_in_epochs_is_of_the_runs_own_text(setting):
    record, _ = runner.execute(Run("toy", "plain", setting, (("epochs", 0.25),)))
    text = len(prepare(setting).train.ids)
    assert 0 <= record["tokens"] - text / 4 < 64 and record["text_tokens"] == text
    assert record["setting"]["train"]["tokens"] == 600  # what was asked for stays what it was


def test_a_sweep_writes_each_run_once_and_goes_on_where_it_was(children, setting, tmp_path, capsys):
    runs = [Run("toy", "plain", setting)]
    assert runner.sweep(runs, tmp_path, others=()) == 0
    first = (tmp_path / "toy" / "results.jsonl").read_text()
    assert results.document_keys(tmp_path / "toy") == {runs[0].key}
    assert runner.sweep(runs, tmp_path, others=()) == 0
    assert (tmp_path / "toy" / "results.jsonl").read_text() == first and first.count("\n") == 1
    assert "1 of 1 runs are made" in capsys.readouterr().out


def test_a_run_made_again_is_compared_and_nothing_is_written(children, setting, finished, tmp_path, capsys):
    home, runs = finished
    shutil.copytree(home, tmp_path / "home")
    file = tmp_path / "home" / "toy" / "results.jsonl"
    records = read_results(file)
    records[1]["loss"] += 1e-5
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    before = file.read_bytes()
    assert runner.run_again(runs[:2], tmp_path / "home") == 1 and file.read_bytes() == before
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert "seed 0" in first and first.endswith("0.0e+00 apart")
    assert "seed 1" in second and second.endswith("NOT THE SAME")
    with pytest.raises(ValueError, match="plain seed 7 did not run yet"):
        runner.run_again([runs[0].seeded(7)], tmp_path / "home")


def test_a_run_that_another_experiment_has_is_taken_over(setting, finished, tmp_path):
    home, runs = finished
    mine = replace(runs[0], experiment="mine", variant="base", size="g")
    (tmp_path / "toy").symlink_to(home / "toy")
    assert runner.sweep([mine], tmp_path, others=("toy",), limit_minutes=0) == 0
    (line,) = read_results(tmp_path / "mine" / "results.jsonl")
    assert (line["variant"], line["size"], line["experiment"]) == ("base", "g", "mine")
    assert line["loss"] == read_results(home / "toy" / "results.jsonl")[0]["loss"]
    assert results.document_keys(tmp_path / "mine") == {mine.key}


def test_a_text_made_ready_for_a_sweep_gives_the_same_record(setting, finished, tmp_path, monkeypatch):
    home, runs = finished
    caches.save(tmp_path / caches.key_of(setting, "validation"), prepare(setting))
    monkeypatch.setenv(caches.FOLDER, str(tmp_path))
    monkeypatch.setattr(caches, "make", None)  # nothing is made again
    record, documents = runner.execute(runs[2])
    before = read_results(home / "toy" / "results.jsonl")[2]
    record = json.loads(json.dumps(record))
    measured = {"train_seconds", "train_cpu_seconds", "evaluation_seconds", "total_seconds", "peak_memory"}
    assert {name: record[name] for name in record.keys() - measured} == {
        name: before[name] for name in before.keys() - measured
    }
    saved = read_documents(home / "toy", runs[2].key)
    assert all(np.array_equal(documents[name], saved[name]) for name in ("nats", "tokens", "bytes"))


@pytest.mark.parametrize(
    ("alone", "like"),
    [
        (Run("toy", "plain", Setting()), Run("toy", "kneser-ney", Setting(), (("order", 3),))),
        (Run("toy", "engram", Setting()), Run("toy", "switched-off", Setting())),
    ],
)
def test_runs_of_a_sweep_that_train_alike_train_once_with_the_same_result(alone, like, setting, tmp_path, monkeypatch):
    alone, like = (replace(run, setting=setting) for run in (alone, like))
    assert training_of(alone) == training_of(like)
    first, others = runner.execute(like)
    monkeypatch.setenv(FILE, str(tmp_path / "trained.pt"))
    trained = runner.execute(alone)[0]
    shared, losses = runner.execute(like)
    assert [run["training_shared"] for run in (first, trained, shared)] == [False, False, True]
    same = ("loss", "train_loss", "curve", "tokens", "bytes", "extra")
    assert [shared[name] for name in same] == [first[name] for name in same]
    assert shared["train_cpu_seconds"] == trained["train_cpu_seconds"]
    assert np.array_equal(losses["nats"], others["nats"])


def test_a_sweep_shares_the_training_of_runs_that_are_not_alone_with_it(children, setting, tmp_path):
    runs = [Run("toy", arm, setting) for arm in ("engram", "switched-off", "plain")]
    assert runner.sweep(runs, tmp_path, others=()) == 0
    lines = read_results(tmp_path / "toy" / "results.jsonl")
    assert [line["training_shared"] for line in lines] == [False, True, False]


def test_what_trains_otherwise_has_another_digest(setting):
    plain, engram = Run("toy", "plain", setting), Run("toy", "engram", setting)
    others = [
        plain.seeded(1),
        replace(plain, held_out="tune"),
        replace(plain, options=(("epochs", 2),)),
        replace(plain, setting=cell.change(setting, train={"lr": 1e-3})),
        engram,
        replace(engram, options=(("token_map", "identity"),)),
        replace(engram, setting=cell.change(setting, {"rows_per_head": 77})),
        replace(engram, arm="random"),
    ]
    assert len({training_of(run) for run in (plain, *others)}) == len(others) + 1
    assert training_of(replace(plain, setting=cell.change(setting, {"rows_per_head": 77}))) == training_of(plain)
    assert training_of(replace(plain, arm="kneser-ney", options=(("base", "none"),))) is None


@pytest.mark.parametrize("held_out", ["validation", "tune"])
def test_a_text_survives_its_folder(setting, tmp_path, held_out):
    made = prepare(setting, held_out)
    caches.save(tmp_path / "text", made)
    read = caches.load(tmp_path / "text")
    for name in ("train", "validation"):
        for a, b in zip(getattr(made, name), getattr(read, name), strict=True):
            assert a.dtype == b.dtype and np.array_equal(a, b)
    assert (read.digest, read.token_map.digest) == (made.digest, made.token_map.digest)
    assert (read.overlap, read.overlap.grams, read.overlap.worst) == (
        made.overlap,
        made.overlap.grams,
        made.overlap.worst,
    )
    spelled_out = "a <|endoftext|> b"
    assert read.tokenizer.encode(spelled_out).ids == made.tokenizer.encode(spelled_out).ids


def test_the_runs_of_a_sweep_have_one_folder_of_texts_and_leave_none_behind(setting, tmp_path, monkeypatch):
    monkeypatch.setattr(runner.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(runner, "_child_command", lambda *_: [sys.executable, "-c", TEXTS_OF_THE_SWEEP])
    runs = [Run("toy", "plain", setting, variant=label).seeded(seed) for seed, label in enumerate("abc")]
    assert runner.sweep(runs, tmp_path / "home", workers=2, others=()) == 0
    results = read_results(tmp_path / "home" / "toy" / "results.jsonl")
    assert [r["is_folder"] for r in results] == [True] * 3 and len({r["texts"] for r in results}) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


TEXTS_OF_THE_SWEEP = f"""
import json, os
texts = os.environ["{caches.FOLDER}"]
print(json.dumps({{"key": "k", "texts": texts, "is_folder": os.path.isdir(texts), "loss": 1.0, "total_seconds": 1.0}}))
"""


def test_a_text_that_two_runs_need_at_once_is_made_once(setting, tmp_path, monkeypatch):
    monkeypatch.setenv(caches.FOLDER, str(tmp_path))
    made = []

    def in_this_process(command, **how):
        made.append(command)
        time.sleep(0.2)
        caches.save(tmp_path / caches.key_of(setting, "validation"), prepare(setting))

    monkeypatch.setattr(caches.subprocess, "run", in_this_process)
    with ThreadPoolExecutor(3) as pool:
        texts = list(pool.map(caches.prepare, [setting, setting, replace(setting, train=TrainConfig(seed=5))]))
    assert len(made) == 1 and len({text.digest for text in texts}) == 1


def test_a_text_that_cannot_be_made_fails_with_its_own_reason(children, setting, tmp_path, monkeypatch):
    monkeypatch.setenv(caches.FOLDER, str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no-such-text"):
        caches.prepare(replace(setting, corpus="no-such-text"))


def test_a_crash_is_written_down_and_the_sweep_goes_on(setting, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_child_command", lambda *_: [sys.executable, "-c", CRASH_OR_RESULT])
    runs = [Run("toy", arm, setting, variant=arm) for arm in ("bad", "plain")]
    assert runner.sweep(runs, tmp_path, others=()) == 1
    assert [r["variant"] for r in read_results(tmp_path / "toy" / "results.jsonl")] == ["plain"]
    log = (tmp_path / "toy" / "failures.log").read_text()
    assert "ZeroDivisionError" in log and runs[0].key in log and "Traceback" in log


CRASH_OR_RESULT = """
import json, sys
run = json.loads(sys.stdin.read())
if run["arm"] == "bad": 1 / 0
print(json.dumps({"key": "k", "variant": run["variant"], "loss": 1.0, "total_seconds": 1.0}))
"""


def test_a_run_on_another_device_is_another_run_in_another_table(setting, monkeypatch):
    run = Run("toy", "plain", setting)
    assert run.on("cpu") == run
    with pytest.raises(ValueError, match="no device 'tpu': choose cpu"):
        run.on("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    there = run.on("cuda")
    assert there.key != run.key and str(there.table) == f"{run.table}, on cuda" and there.variant == run.variant
    assert training_of(there) != training_of(run)


def test_a_run_whose_sweep_is_gone_before_it_began_ends_at_its_first_step(forked, setting, tmp_path):
    _, _, module, *arguments = [*runner._child_command(tmp_path, 1)[:-1], str(2**22 + 1)]  # the number of no process
    done = forked(forks.MODULE.format(module), *arguments, input=Run("toy", "plain", setting).to_json())
    assert done.returncode != 0 and not done.stdout and "the sweep is gone" in done.stderr


def test_a_child_reports_its_own_traceback(children, setting, tmp_path):
    assert runner.sweep([Run("toy", "no-such-arm", setting)], tmp_path, others=()) == 1
    assert "unknown arm 'no-such-arm'" in (tmp_path / "toy" / "failures.log").read_text()


def test_no_new_run_begins_after_the_limit(setting, tmp_path):
    assert runner.sweep([Run("toy", "plain", setting)], tmp_path, others=(), limit_minutes=0) == 0
    assert read_results(tmp_path / "toy" / "results.jsonl") == []


def test_a_finished_run_waits_while_another_sweep_writes_the_file_anew(tmp_path):
    file = tmp_path / "results.jsonl"
    with ThreadPoolExecutor(1) as other:
        with results.alone(tmp_path):
            done = other.submit(append, file, {"key": "late"})
            time.sleep(0.2)
            assert not done.done() and not file.exists()
            file.write_text('{"key": "early"}\n')
        done.result(timeout=10)
    assert [record["key"] for record in read_results(file)] == ["early", "late"]


def test_an_incomplete_last_line_is_refused_by_name_and_removed_by_the_next_sweep(tmp_path, capsys):
    file = tmp_path / "results.jsonl"
    append(file, fake("plain"))
    with file.open("a") as stream:
        stream.write('{"key": "half')
    with pytest.raises(ValueError, match=r"results\.jsonl is incomplete"):
        read_results(file)
    assert results.repair(file) == 13 and results.repair(file) == 0
    assert [r["variant"] for r in read_results(file)] == ["plain"]
    assert "removed an incomplete last line" in capsys.readouterr().err


def test_a_line_that_is_not_a_result_is_named(tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text(json.dumps(fake("plain")) + "\nnonsense\n")
    with pytest.raises(ValueError, match="line 2 is not a result"):
        read_results(file)


def test_the_second_rate_is_tuned_at_the_best_first_rate(setting, tmp_path):
    file, cell = tmp_path / "tune.jsonl", Run("toy", "engram", setting)
    first = rate_grid([cell], file)
    assert [run.setting.train.lr for run in first] == list(tuning.LRS)
    for run, loss in zip(first, (2.0, 1.0, 1.5), strict=True):
        append(file, fake("engram", lr=run.setting.train.lr, loss=loss) | {"key": run.key})
    second = rate_grid([cell], file)[3:]
    assert [(r.setting.train.lr, r.setting.train.table_lr) for r in second] == [(3e-3, 0.01), (3e-3, 0.1)]


def test_a_grid_goes_on_beyond_an_edge_where_its_best_rate_lies_and_ends_somewhere(setting, tmp_path):
    file, cell, tried = tmp_path / "tune.jsonl", Run("toy", "engram", setting), []
    for _ in range(tuning.WIDEST):  # the larger the rate, the better: without an end
        new = [run for run in rate_grid([cell], file, table_lrs=()) if run.setting.train.lr not in tried]
        for run in new:
            tried.append(run.setting.train.lr)
            append(file, fake("engram", lr=tried[-1], loss=1 / tried[-1]) | {"key": run.key})
    assert tried == [1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2]


def test_the_chosen_rates_are_those_of_the_lowest_loss(setting, tmp_path):
    file = tmp_path / "tune.jsonl"
    assert tuned("engram", setting, file) == {}
    for lr, loss in ((1e-3, 3.0), (2e-3, 1.0), (4e-3, 2.0)):
        append(file, fake("engram", lr=lr, loss=loss))
    append(file, fake("plain", lr=9e-3, loss=0.5))
    assert tuned("engram", setting, file) == {"lr": 2e-3, "table_lr": 0.03}


def test_the_chosen_rates_are_those_of_the_nearest_budget(setting, tmp_path):
    file, tokens = tmp_path / "tune.jsonl", setting.train.tokens
    for factor, lr in ((1, 4e-3), (8, 2e-3)):  # the larger budget has the lower loss
        line = fake("engram", lr=lr, loss=1 / factor)
        line["setting"]["train"]["tokens"] = factor * tokens
        append(file, line)
    for factor, lr in ((0.1, 4e-3), (2, 4e-3), (4, 2e-3), (100, 2e-3)):
        asked = cell.change(setting, train={"tokens": round(factor * tokens)})
        assert tuned("engram", asked, file)["lr"] == lr
        assert tuned("engram", setting, file, tokens=factor * tokens)["lr"] == lr


@pytest.mark.parametrize("name", ["sensitivity", "vocabulary"])
def test_passes_over_a_text_are_given_the_rates_of_the_tokens_that_they_come_to(name):
    came_to = {(cell_of(r).table, r["arm"]): r["tokens"] for r in read_results(HOME / name / "results.jsonl")}
    for run in runs_of(name, [0]):
        if (
            "facts:1:" in run.setting.corpus
        ):  # compared with the text that says each line eight times, at that one's rates
            continue
        rates = tuned(run.arm, run.setting, tokens=came_to[run.table, run.arm])
        assert rates and rates == {rate: getattr(run.setting.train, rate) for rate in rates}


def test_rows_compare_with_the_baseline_of_the_same_seeds(finished):
    home, _ = finished
    (runs,) = report.tables_of(read_results(home / "toy" / "results.jsonl")).values()
    alone = {**runs, "engram": runs["engram"][1:]}
    plain, engram = report.rows_of(home / "toy", alone, "plain")
    assert (plain.variant, engram.paired) == ("plain", (1,))
    difference = runs["engram"][1]["loss"] - runs["plain"][1]["loss"]
    assert engram.nats.mean == pytest.approx(difference, abs=1e-5)
    assert engram.bits.mean == pytest.approx(runs["engram"][1]["bpb"] - runs["plain"][1]["bpb"], abs=1e-5)
    assert engram.nats.low <= engram.nats.mean <= engram.nats.high


def test_arms_with_another_tokenizer_are_compared_per_byte_alone(finished, tmp_path):
    home, _ = finished
    (runs,) = report.tables_of(read_results(home / "toy" / "results.jsonl")).values()
    for run in [*runs["plain"], *runs["engram"]]:
        other = read_documents(home / "toy", run["key"])
        if run["arm"] == "engram":
            other["tokens"] = other["tokens"] // 2
        write_documents(tmp_path, run["key"], other)
    _, engram = report.rows_of(tmp_path, runs, "plain")
    assert engram.nats is None and engram.bits is not None


def test_runs_of_an_older_kind_are_left_out_of_a_row():
    old = [fake("engram", seed, cell="old") for seed in (0, 1, 2)]
    new = [fake("engram", seed, cell="new") for seed in (0,)]
    assert report.tables_of(old + new) == {Table("toy", "", "g"): {"engram": new}}


def test_a_relabelled_run_has_its_new_row_alone():
    old = fake("engram", cell="c")
    new = old | {"variant": "memory"}
    assert report.tables_of([old, new]) == {Table("toy", "", "g"): {"memory": [new]}}


def test_the_report_writes_between_its_marks_and_nothing_else(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("# Question\n\n<!-- table -->\nold\n<!-- end -->\n\n## More\n")
    report.write_between_marks(readme, "new")
    assert readme.read_text() == "# Question\n\n<!-- table -->\nnew\n<!-- end -->\n\n## More\n"


def test_the_tables_of_a_question_have_a_row_for_each_variant(finished):
    home, _ = finished
    report.write_tables(home / "toy", "toy", report.document(home / "toy", "plain"))
    written = (home / "toy" / "tables.md").read_text()
    assert written.startswith("# toy: tables\n\nWritten by `python -m experiments report`.")
    lines = [line for line in written.splitlines() if line.startswith(("| plain", "| engram"))]
    assert [line.split(" | ")[:2] for line in lines[:2]] == [["| plain", "2"], ["| engram", "2"]]
    assert [line.count("±") for line in lines[2:]] == [4, 4]  # by bigrams and trigrams seen


def test_a_readme_without_marks_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("# Question\n")
    with pytest.raises(ValueError, match="<!-- table -->"):
        report.write_between_marks(tmp_path / "README.md", "new")


def test_a_missing_side_file_is_named(finished, tmp_path):
    (runs,) = report.tables_of(read_results(finished[0] / "toy" / "results.jsonl")).values()
    with pytest.raises(FileNotFoundError, match=r"documents\.npz is missing"):
        report.rows_of(tmp_path, runs, "plain")
    write_documents(tmp_path, "another", {"nats": np.zeros(3)})
    with pytest.raises(FileNotFoundError, match=f"no array {runs['engram'][0]['key']}/nats.*and run it again"):
        report.rows_of(tmp_path, runs, "plain")


def test_tables_stand_in_the_order_of_their_numbers():
    captions = ["tiny: kjv, 10.28M", "tiny: 16,384", "tiny: 4,096", "small: 1", "tiny: 257 (bytes)", "tiny: kjv, 2.14M"]
    runs = [fake("plain", cell=text) | {"key": text} for text in captions]
    for run, caption in zip(runs, captions, strict=True):
        run["setting"] = {**run["setting"], "corpus": caption}
    ordered = ["small: 1", "tiny: 257 (bytes)", "tiny: 4,096", "tiny: 16,384", "tiny: kjv, 2.14M", "tiny: kjv, 10.28M"]
    assert [str(table) for table in report.tables_of(runs)] == ordered


def test_the_tuning_table_marks_the_best_and_warns_at_the_edge():
    inside = [fake("a", lr=lr, loss=loss) for lr, loss in ((1.0, 3.0), (2.0, 1.0), (4.0, 2.0))]
    outside = [fake("b", lr=lr, loss=loss) for lr, loss in ((1.0, 3.0), (2.0, 2.0), (4.0, 1.5))]
    table = report.tuning_table(inside + outside, ["a", "c", "b"])
    assert "| a | **1.0000 at 2 / 0.03** | 2.0000 at 4 / 0.03; 3.0000 at 1 / 0.03 |" in table
    assert table.splitlines()[-1].endswith("lie beyond it: b.")
    assert table.splitlines()[-3].endswith("in the tables: c.")


def test_the_tuning_table_keeps_budgets_apart():
    longer = fake("a", lr=2.0, loss=1.0)
    longer["setting"]["train"]["tokens"] *= 2
    table = report.tuning_table([fake("a", lr=2.0, loss=3.0), longer])
    assert "| a, 0.56M tokens | **3.0000 at 2 / 0.03** |" in table and "| a, 1.12M tokens | **1.0000" in table


@pytest.mark.parametrize("name", names())
def test_every_question_has_the_tables_of_its_results_and_says_what_they_do_not_show(name):
    readme = (HOME / name / "README.md").read_text()
    assert "](tables.md)" in readme and "## What this does not show\n" in readme
    answers = claims_page.answers(claims_page.all_findings(name=name), name)
    made = report.document(HOME / name, cell.questions(name).BASELINE, cell.hook(name, "summary"), answers)
    assert (HOME / name / "tables.md").read_text().endswith(f"\n\n{made}\n"), f"python -m experiments report {name}"


def test_the_claims_are_those_of_the_committed_results():
    found = claims_page.all_findings()  # here, because it compares what those tables compare
    assert claims_page.document(found) == claims_page.FILE.read_text(), "python -m experiments report"
    short = f"<!-- table -->\n{claims_page.in_short(found)}\n<!-- end -->"
    assert short in claims_page.SHORT.read_text(), "python -m experiments report"


def test_the_log_fit_finds_the_slope_that_is_there(tmp_path):
    rng, tokens = np.random.default_rng(0), np.full(40, 100.0)

    def row(label, loss):
        runs = []
        for seed in (0, 1):
            nats = 100 * (loss + rng.normal(0, 0.02, 40))
            run = fake(label, seed, loss=loss)
            write_documents(tmp_path, run["key"], {"nats": nats, "tokens": tokens, "bytes": tokens})
            runs.append(run)
        return report.Row(label, tuple(runs), (0, 1))

    cells = {2**power: row(f"2^{power}", 5 - 0.1 * power) for power in (2, 4, 6)}
    slope, band, off = log_fit(tmp_path, cells, row("plain", 5.0), draws=300)
    assert off.low < 0 < off.high and abs(off.mean) < 0.01
    bent = cells | {2**6: row("bent", 5 - 0.45)}
    off = log_fit(tmp_path, bent, row("plain", 5.0), draws=300).off
    assert off.mean == pytest.approx(-0.05, abs=0.01) and off.low < off.mean < off.high < 0
    assert slope.mean == pytest.approx(-0.1, abs=0.01) and slope.low < -0.1 < slope.high
    np.testing.assert_allclose(band[1], [-0.2, -0.4, -0.6], atol=0.02)
    assert (band[0] < band[1]).all() and (band[1] < band[2]).all()


@pytest.mark.parametrize("name", [n for n in names() if cell.hook(n, "measure") is None])  # test_lab_measures has those
def test_every_figure_is_drawn_from_the_results_alone(name, tmp_path):
    module = cell.questions(name)
    cells = [run for run in module.configs(module.SIZE)][:6]
    home = made_up_results(tmp_path / name, cells, module.BASELINE)
    path = importlib.import_module(f"experiments.{name}.plot").draw(home)
    assert path == home / "figure.png" and path.read_bytes()[:4] == b"\x89PNG"


def made_up_results(home, cells, baseline):
    home.mkdir(parents=True)
    rng, tokens = np.random.default_rng(0), np.full(20, 50.0)
    for run in cells:
        nats = 50 * (4 - 0.1 * (run.variant != baseline) + rng.normal(0, 0.1, 20))
        record = fake(run.variant, loss=float(nats.mean() / 50), cell=run.kind, arm=run.arm)
        record |= {"experiment": run.experiment, "size": run.size, "options": dict(run.options)}
        record |= {"key": run.key, "setting": json.loads(run.setting.to_json()), "bpb": 1.0, "corpus": "c"}
        record |= {"tokens": run.setting.train.tokens, "text_tokens": 10**6, "train_cpu_seconds": 1.0}
        record["bytes"] = {"dense": 10**6, "table": 10**7, "optimizer_dense": 0, "optimizer_rows": 0}
        append(home / "results.jsonl", record | {"vocabulary": run.setting.vocab_size})
        write_documents(home, run.key, {"nats": nats, "tokens": tokens, "bytes": 3 * tokens})
    return home


def test_a_figure_without_results_says_what_to_run(tmp_path):
    with pytest.raises(ValueError, match="no runs yet: python -m experiments run"):
        importlib.import_module("experiments.slots.plot").draw(tmp_path / "slots")


def test_the_command_line_fails_where_there_is_nothing_to_tune(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["experiments", "run", "slots", "--tune"])
    assert main() == 1
    assert "no grid of its own" in capsys.readouterr().err


# documents.npz


def arrays_of(number):
    return {
        "nats": np.linspace(number, number + 1, 7, dtype=np.float32),
        "tokens": np.arange(7, dtype=np.int32),
        "measured_states": np.full((2, 3), number, np.float16),
        "empty": np.empty((0, 4)),
    }


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


def test_arrays_of_many_runs_come_back_bit_for_bit(tmp_path):
    for number in range(4):
        write_documents(tmp_path, f"key{number}", arrays_of(number))
    same(read_documents(tmp_path, "key1"), arrays_of(1))
    write_documents(tmp_path, "key1", arrays_of(10))  # made again: replaced
    for number, expected in enumerate((0, 10, 2, 3)):
        same(read_documents(tmp_path, f"key{number}"), arrays_of(expected))
    assert results.document_keys(tmp_path) == {f"key{number}" for number in range(4)}
    assert list(read_documents(tmp_path, "key2", ("tokens",))) == ["tokens"]
    assert [path.name for path in tmp_path.iterdir()] == ["documents.npz"]
    with np.load(tmp_path / "documents.npz") as archive:  # a reader of its own needs NumPy alone
        assert archive["key3/nats"][0] == 3


def test_the_arrays_of_one_run_are_read_without_those_of_others(tmp_path, monkeypatch):
    for number in range(3):
        write_documents(tmp_path, f"key{number}", arrays_of(number))
    opened, plain_open = [], zipfile.ZipFile.open

    def spy(archive, name, *how, **others):
        opened.append(getattr(name, "filename", name))
        return plain_open(archive, name, *how, **others)

    monkeypatch.setattr(zipfile.ZipFile, "open", spy)
    read_documents(tmp_path, "key1", ("nats",))
    assert set(opened) == {"key1/nats.npy"}


@pytest.mark.parametrize("renamed", [True, False])
def test_documents_that_cannot_be_written_leave_the_old_file(tmp_path, monkeypatch, renamed):
    write_documents(tmp_path, "old", arrays_of(1))
    before = (tmp_path / "documents.npz").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_documents(tmp_path, "old" if renamed else "new", arrays_of(2))
    assert (tmp_path / "documents.npz").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["documents.npz"]


def test_two_sweeps_that_write_documents_at_once_lose_none(tmp_path):
    code = "import sys, numpy as np; from pathlib import Path; from experiments.lab.results import write_documents\n"
    code += "for n in range(10): write_documents(Path(sys.argv[1]), f'{sys.argv[2]}{n}', {'nats': np.full(50, n)})"
    env = {**os.environ, "PYTHONPATH": str(HOME.parent)}
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name], env=env) for name in "ab"]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    assert results.document_keys(tmp_path) == {f"{name}{n}" for name in "ab" for n in range(10)}
    assert read_documents(tmp_path, "b7")["nats"].tolist() == [7] * 50


@pytest.mark.parametrize("name", names())
def test_every_committed_result_has_its_documents_and_a_cell_with_a_caption(name):
    records = read_results(HOME / name / "results.jsonl")
    assert {record["key"] for record in records} <= results.document_keys(HOME / name)
    tables = {cell_of(record).table for record in records}
    assert len({str(table) for table in tables}) == len(tables)
    for record in records[:: max(1, len(records) // 10)]:
        setting = Setting.from_json(json.dumps(record["setting"]))
        options, how = tuple(record["options"].items()), (record["held_out"], record.get("device", "cpu"))
        run = Run(name, record["arm"], setting, options, record["variant"], record["size"], *how)
        assert (run.key, run.kind, run.cell) == (record["key"], record["cell"], cell_of(record))


# A question and an arm in a file of their own


FORGET = (
    "import sys\nfor name in [name for name in sys.modules if name.startswith('experiments')]: del sys.modules[name]\n"
)


@pytest.fixture
def lab(forked, tmp_path):
    """A copy of the lab without its results, and how to run code with it in a process of its own."""
    ignored = shutil.ignore_patterns("*.npz", "*.jsonl", "*.png", "*.md", "__pycache__", "scripts")
    shutil.copytree(HOME, tmp_path / "experiments", ignore=ignored)
    home = tmp_path / "experiments"
    shutil.copy(HOME / "sceptic" / "tune.jsonl", home / "sceptic")
    path = os.pathsep.join((str(tmp_path), str(HOME.parent)))

    def call(code, *arguments):
        env = {**os.environ, "PYTHONPATH": path, "MPLBACKEND": "agg"}
        return forked(FORGET + code, *arguments, cwd=tmp_path, env=env, timeout=120)

    return home, call


def test_a_new_question_runs_reports_and_plots_from_its_configs_alone(lab, setting):
    home, run = lab

    def call(*arguments):
        return run(forks.MODULE.format("experiments"), *arguments)

    assert "edit configs.py" in call("new", "short_texts").stdout
    configs = home / "short_texts" / "configs.py"
    small = f"Setting.from_json({setting.to_json()!r})"  # so that it takes a moment and not a minute
    text = configs.read_text().replace("Write the question here, in one line.", "Do short texts need a memory?")
    text = text.replace("SETTINGS[size]", small).replace("import SETTINGS, Run", "import Run, Setting")
    configs.write_text(text)
    assert "short_texts" in (listed := call("list").stdout) and "Do short texts need a memory?" in listed
    done = call("run", "short_texts", "--seeds", "0")
    assert done.returncode == 0, done.stderr
    for command in ("report", "plot"):
        made = call(command, "short_texts")
        assert made.returncode == 0, made.stderr
    tables = (home / "short_texts" / "tables.md").read_text()
    assert "\n### tiny: " in tables and "\n| plain | 1 |" in tables and "\n| engram | 1 |" in tables
    assert (home / "short_texts" / "figure.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in (home / "short_texts").iterdir() if path.name != "__pycache__") == [
        *("README.md", "__init__.py", "configs.py", "documents.npz", "figure.png", "results.jsonl", "tables.md"),
    ]


def test_a_new_question_makes_a_text_of_its_own_without_an_edit_elsewhere(lab):
    home, run = lab
    run(forks.MODULE.format("experiments"), "new", "digits")
    with (home / "digits" / "configs.py").open("a") as file:
        file.write(MAKING)
    code = "from experiments.lab.caches import make; from engram.lm.run import Setting\n"
    code += "for corpus in ('digits:7', 'digits:8', 'recall:4/4+0'):\n"
    code += "    print(make(Setting(corpus=corpus, vocab_size=300), 'validation').validation.ids[:5].tolist())\n"
    done = run(code)
    assert done.returncode == 0, done.stderr
    sevens, eights, recall = done.stdout.splitlines()
    assert (sevens, eights) == ("[7, 7, 7, 7, 7]", "[8, 8, 8, 8, 8]") and recall.startswith("[0, ")


MAKING = """

def prepare(setting, held_out):
    import numpy as np

    from engram import TokenMap
    from engram.lm.run import Data
    from engram.lm.tokenizer import Encoded

    ids = np.full(50, int(setting.corpus.partition(":")[2]), np.int32)
    text = Encoded(ids, np.zeros(50, np.int32), np.array([0, 50]), np.array([50]))
    return Data(None, TokenMap.identity(300), text, text, 0.0, "digits")


MAKES = {"digits": prepare}
"""


def test_a_kind_of_text_that_two_questions_make_is_refused_by_their_names(monkeypatch):
    made = {"one": SimpleNamespace(MAKES={"digits": print}), "two": SimpleNamespace(MAKES={"digits": repr})}
    monkeypatch.setattr(caches, "names", lambda: (*made, "three"))
    monkeypatch.setattr(caches, "questions", lambda name: made.get(name, SimpleNamespace()))
    with pytest.raises(ValueError, match="'digits:' are made by one and by two"):
        caches.maker_of("digits:3")
    assert caches.maker_of("letters:3") is None and caches.maker_of("digits") is None


@pytest.mark.parametrize("name", ["sceptic", "Two Words", "2nd", "Upper"])
def test_a_new_question_needs_a_free_name(name, tmp_path):
    (tmp_path / "sceptic").mkdir()
    with pytest.raises(ValueError, match=r"exists: choose another name|lower-case Python identifier"):
        new(name, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["sceptic"]


def test_an_arm_is_a_file_that_is_found(lab):
    home, run = lab
    (home / "arms" / "aaa_twice.py").write_text(
        '"""twice: plain with its head doubled."""\n\nfrom experiments.arms.host import plain\n\n\n'
        "def build(setting, data, *, factor=2.0):\n    model = plain(setting, data)\n"
        "    model.head.weight.data *= factor\n    return model\n\n\n"
        'ARMS = {"twice": build, "plain-again": plain}\n'
    )
    code = "from experiments import arms; print(arms.NAMES); print(arms.trained_as('longer', {}))\n"
    code += "print(arms.trained_as('plain-again', {}), arms.trained_as('twice', {'factor': 3.0}))\n"
    names_found, longer, others = run(code).stdout.splitlines()
    assert "'twice'" in names_found and "'knn-lm'" in names_found and longer == "('plain', {})"
    assert others == "('plain', {}) ('twice', {'factor': 3.0})"


def test_sizes_are_called_by_name_or_letter(capsys, monkeypatch):
    assert [cell.size_named(text) for text in ("S", "T", "small", "tiny")] == ["small", "tiny", "small", "tiny"]
    with pytest.raises(ValueError, match="unknown size 'M'; the sizes are small, tiny"):
        cell.size_named("M")
    runs = runs_of("sceptic", [0], ["plain"], size="tiny", groups=["T: wiki"])
    assert runs == runs_of("sceptic", [0], ["plain"], size="tiny", groups=["tiny: wiki"])
    with pytest.raises(SystemExit):
        monkeypatch.setattr(sys, "argv", ["experiments", "run", "sceptic", "--setting", "M"])
        main()
    assert "unknown size 'M'" in capsys.readouterr().err


def modules_of_the_lab() -> list[str]:
    files = (file.relative_to(HOME.parent) for file in HOME.rglob("*.py"))
    return sorted(".".join(file.with_suffix("").parts) for file in files if file.stem not in ("__init__", "__main__"))


def test_every_module_of_the_lab_can_be_imported_first():
    loaded = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "experiments"}
    try:
        for name in modules_of_the_lab():
            for other in [other for other in sys.modules if other.partition(".")[0] == "experiments"]:
                del sys.modules[other]
            importlib.import_module(name)
    finally:
        for other in [other for other in sys.modules if other.partition(".")[0] == "experiments"]:
            del sys.modules[other]
        sys.modules.update(loaded)


# What may have digits in a README: sources, methods, levels, code, links, and what `report` writes between marks.
NOT_COUNTED = re.compile(
    r"```.*?```|(?m:^    [^\n]*$)|`[^`]*`|<!-- table -->.*?<!-- end -->|\]\([^)]*\)|arXiv \d{4}\.\d{5}|95 %|\d+-grams?",
    re.S,
)
TYPED = re.compile(r"(?<![\w.-])[-+]?\d")


@pytest.mark.parametrize(
    "file", [*HOME.rglob("README.md")], ids=lambda file: file.parent.relative_to(HOME.parent).as_posix()
)
def test_no_number_in_a_readme_of_the_lab_is_typed(file):
    assert [line for line in NOT_COUNTED.sub("", file.read_text()).splitlines() if TYPED.search(line)] == []


@pytest.mark.parametrize(
    ("text", "typed"),
    [
        ("loss falls by 0.05 nats", True),
        ("-3 % of the speed", True),
        ("- 48 services", True),
        ("rows as int4 or fp8, 95 % intervals, 13-gram overlap, arXiv 2601.07372, `--seeds 0`", False),
        ("<!-- table -->\n| 4.5 |\n<!-- end -->\n    run x 3\n", False),
    ],
)
def test_typed_numbers_are_told_from_names_code_and_generated_parts(text, typed):
    assert bool(TYPED.search(NOT_COUNTED.sub("", text))) is typed


def test_the_readme_of_the_lab_has_the_sizes_and_the_losses_on_other_machines(tmp_path):
    assert f"<!-- table -->\n{readme.sizes()}\n\n{readme.machines()}\n<!-- end -->" in (HOME / "README.md").read_text()
    line = {"processor": "a fourth CPU", "seed": 1, "loss": 4.6}
    (tmp_path / "machines.jsonl").write_text(json.dumps(line) + "\n")
    text = readme.machines(file=tmp_path / "machines.jsonl")
    assert "| a fourth CPU |  | 4.6 |  |" in text and "by up to 0.057" in text
