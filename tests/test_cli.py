"""The command line and the main job, end to end on a small text; errors of the input exit with code 2."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import engram as engram_package
from engram import EngramConfig, cli, evaluate
from engram.ablation.ablate import ablate
from engram.cli.options import parse_count, parse_seeds
from engram.lm.run import Setting, build_model, load_run, prepare, save_run
from engram.lm.tokenizer import train_tokenizer
from engram.lm.train import TrainConfig, train
from engram.lm.transformer import TransformerConfig
from engram.storage.manifest import verify
from engram.tables import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUN = "from engram.cli import main; main()"


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    """Write a folder of small documents with strong bigrams."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklmnop"), 5)) for _ in range(300)]
    follows = rng.integers(0, 300, (300, 3))
    for i in range(240):
        word, text = int(rng.integers(300)), []
        for _ in range(150):
            text.append(words[word])
            word = int(follows[word, rng.integers(3)])
        (folder / f"{i:03d}.txt").write_text(" ".join(text) + ".")
    return folder


@pytest.fixture
def engram(forked):
    """The command, in a process of its own."""
    return lambda *arguments, **env: forked(RUN, *arguments, env={**os.environ, "HF_HUB_OFFLINE": "1", **env})


def new_process(*arguments, **env):
    """The command, in a process that imports the library itself."""
    command = [sys.executable, "-c", RUN, *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **env}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)


def small_report(engram, text_folder, tmp_path, name: str) -> dict:
    done = engram(
        "ablate", "--corpus", text_folder, "--budget", "6k", "--out", tmp_path / name, ENGRAM_CACHE=str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / name).iterdir()} == {"report.json", "curves.png", "report.html", "log.jsonl"}
    report = json.loads((tmp_path / name / "report.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
    for run in report["runs"]:
        losses = [line["loss"] for line in lines if (line["arm"], line["seed"]) == (run["arm"], run["seed"])]
        assert losses == [loss for _, loss in run["train_curve"]]
    assert len(lines) == sum(len(run["train_curve"]) for run in report["runs"])
    return report


@pytest.mark.parametrize("command", ["train", "ablate"])
def test_a_command_that_trains_tunes_the_allocator_first(command, text_folder, tmp_path, monkeypatch, capsys):
    def tuned():
        raise ValueError("the allocator is tuned now")

    monkeypatch.setattr("engram.lm.train.tune_allocator", tuned)
    monkeypatch.setattr(sys, "argv", ["engram", command, "--corpus", str(text_folder), "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit):
        cli.main()
    assert "the allocator is tuned now" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_ablate_writes_its_report_and_repeats_its_numbers_exactly(engram, text_folder, tmp_path):
    report = small_report(engram, text_folder, tmp_path, "a")
    assert [run["arm"] for run in report["runs"]] == ["plain", "one-row", "engram"]
    assert report["corpus"]["validation_documents"] > 0 and report["summary"][0]["difference"] is None
    for row in report["summary"][1:]:
        assert row["difference"]["low"] <= row["difference"]["mean"] <= row["difference"]["high"]
    plain, one_row, full = report["runs"]
    assert plain["parameters"]["table"] == 0 and one_row["parameters"]["table"] == 8 * 32
    assert full["parameters"]["table"] > 8 * 32 * 65_536 and 0 < full["memory"]["unique_ratio"] < 1
    for order in ("bigram", "trigram"):
        buckets = [bucket for bucket in full["seen"][order].values() if bucket[0]]
        assert 0 < sum(tokens for tokens, _ in buckets) < report["corpus"]["validation_tokens"]
        assert all(0 < loss < 20 for _, loss in buckets)  # a position that predicts nothing would make this NaN
    again = small_report(new_process, text_folder, tmp_path, "b")  # with another order of hashes
    assert [run["loss"] for run in again["runs"]] == [run["loss"] for run in report["runs"]]
    assert again["summary"] == report["summary"]


def test_ablate_leaves_the_log_of_a_trained_run_alone(engram, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "log.jsonl").write_text("a line\n")
    done = engram("ablate", "--out", tmp_path)
    assert done.returncode == 2 and f"{tmp_path} is the folder of a run of `engram train`" in done.stderr
    assert (tmp_path / "log.jsonl").read_text() == "a line\n"


def test_each_run_is_reported_as_soon_as_it_can_be_compared(text_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path))
    setting = Setting(
        corpus=str(text_folder),
        vocab_size=300,
        model=TransformerConfig(300, hidden_size=16, layers=2, heads=2, max_length=32),
        memory=EngramConfig(layers=(1,), orders=(2,), heads=1, head_dim=8, rows_per_head=64),
        train=TrainConfig(tokens=256, batch_size=4, context=32),
    )
    seen = []
    last = ablate(setting, ["engram", "plain"], [0, 1], on_report=seen.append)
    assert [[(run["arm"], run["seed"]) for run in report["runs"]] for report in seen] == [
        [("engram", 0)],
        [("engram", 0), ("plain", 0)],
        [("engram", 0), ("plain", 0)],  # the second seed has only one arm yet
        [("engram", 0), ("plain", 0), ("engram", 1), ("plain", 1)],
    ]
    assert [
        [(row["arm"], row["seeds"], row["difference"] is not None) for row in report["summary"]] for report in seen
    ] == [
        [("engram", 1, False)],
        [("engram", 1, True), ("plain", 1, False)],
        [("engram", 1, True), ("plain", 1, False)],
        [("engram", 2, True), ("plain", 2, False)],
    ]
    assert seen[-1] == last


@pytest.mark.filterwarnings("ignore")
def test_a_trained_run_is_resumed_evaluated_and_continued(engram, text_folder, tmp_path):
    arguments = ("train", "--corpus", text_folder, "--budget", "8k", "--out", tmp_path / "run", "--device", DEVICE)
    cache = {"ENGRAM_CACHE": str(tmp_path)}
    assert engram(*arguments, **cache).returncode == 0
    again = engram(*arguments, **cache)
    assert again.returncode == 0, again.stderr  # nothing left to do
    scored = engram("evaluate", tmp_path / "run", "--json", "--device", DEVICE, **cache)
    assert scored.returncode == 0, scored.stderr
    figures = json.loads(scored.stdout)
    assert figures["documents"] > 0 and 0 < figures["bpb"] < 10
    said = engram("generate", tmp_path / "run", "abc", "--tokens", 5, "--device", DEVICE, **cache)
    assert said.returncode == 0 and said.stdout.startswith("abc")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ablate", "--arms", "plain,engrm"), "arms must be distinct names out of plain, one-row, random, engram"),
        (("ablate", "--budget", "much"), "a token budget must be a positive number"),
        (("ablate", "--seeds", "a"), "seeds must be integers"),
        (("ablate", "--corpus", "/nonexistent/text"), "/nonexistent/text"),
        (("ablate", "--held-out", "test"), "validation or tune"),
        (("ablate", "--device", "cuda:99"), "this machine has no device 'cuda:99': torch"),
        (("generate", "run", "--device", "gpu"), "this machine has no device 'gpu': torch"),
        (("evaluate", "/nonexistent/run"), "holds no run.json"),
        (("bench", "fast"), "unknown benchmark fast: choose from hash"),
        (("train",), "unknown arm 'engrm'"),
        (("ablate", "--no-such-option"), "No such option"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(engram, arguments, message, text_folder, tmp_path):
    if arguments[0] == "train":
        arguments = ("train", "--arm", "engrm", "--out", tmp_path / "x", "--corpus", text_folder)
    done = engram(*arguments, ENGRAM_CACHE=str(tmp_path))
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


def test_an_empty_corpus_and_one_too_short_exit_with_2_and_write_nothing(engram, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "short").mkdir()
    for i in range(60):
        (tmp_path / "short" / f"{i}.txt").write_text(f"only {i} words")
    for name in ("empty", "short"):
        out = tmp_path / f"out-{name}"
        done = engram("ablate", "--corpus", tmp_path / name, "--out", out, ENGRAM_CACHE=str(tmp_path))
        assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("error: "), done.stderr
        assert not list(out.iterdir())


def test_every_command_has_help():
    for command in ("ablate", "train", "evaluate", "generate", "bench"):
        done = new_process(command, "--help")
        assert done.returncode == 0 and "Usage" in done.stdout


@pytest.mark.parametrize(("text", "count"), [("1.1M", 1_100_000), ("500k", 500_000), ("42", 42), ("2G", 2_000_000_000)])
def test_budgets_are_read_with_their_units(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "0", "-5", "M", "nan", "1e99"])
def test_budgets_that_are_not_positive_numbers_are_refused(text):
    with pytest.raises(ValueError, match="token budget"):
        parse_count(text)


def test_seeds_are_read():
    assert parse_seeds("0,1,2") == [0, 1, 2]


def test_a_rate_of_zero_is_a_rate():
    from engram.cli.training import _setting

    train = _setting("kjv", "30k", 0.0, 0.0).train
    assert (train.lr, train.table_lr) == (0.0, 0.0)
    usual = _setting("kjv", "30k", None, None).train
    assert usual.lr > 0 and usual.table_lr > 0


def test_a_folder_with_another_run_is_left_as_it_is(engram, text_folder, tmp_path):
    out, env = tmp_path / "run", {"ENGRAM_CACHE": str(tmp_path)}
    arguments = ["train", "--out", out, "--corpus", text_folder, "--budget", "6k", "--arm", "plain"]
    assert engram(*arguments, **env).returncode == 0
    before = (out / "run.json").read_bytes()
    other = tmp_path / "other"
    shutil.copytree(text_folder, other)
    (other / "more.txt").write_text("one more document of a few words")
    for change, named in (
        (["--arm", "engram"], "another arm"),
        (["--budget", "8k"], "another setting"),
        (["--corpus", other], "another"),
    ):
        done = engram(*arguments, *change, **env)
        assert done.returncode == 2 and named in done.stderr.splitlines()[-1], done.stderr
        assert (out / "run.json").read_bytes() == before
    (text_folder / "more.txt").write_text("one more document of a few words")
    try:
        done = engram(*arguments, **env)
        assert done.returncode == 2 and "another text" in done.stderr.splitlines()[-1], done.stderr
    finally:
        (text_folder / "more.txt").unlink()
    assert engram("evaluate", out, "--json", **env).returncode == 0
    for name, damaged in (("tokenizer.json", "{}"), ("run.json", '{"arm": "plain"}'), ("run.json", '{"arm"')):
        kept = (out / name).read_bytes()
        (out / name).write_text(damaged)
        done = engram("evaluate", out, **env)
        assert done.returncode == 2 and f"{out / name} is" in done.stderr and "Traceback" not in done.stderr
        (out / name).write_bytes(kept)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Train a tiny run, and return its folder, setting and data."""
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "cache"))
    setting = tiny_setting(tmp_path / "text")
    data = prepare(setting)
    save_run(tmp_path / "run", setting, "engram", data)
    train(build_model(setting, "engram", data.token_map), data.train, setting.train, folder=tmp_path / "run")
    return tmp_path / "run", setting, data


def tiny_setting(folder) -> Setting:
    folder.mkdir()
    for i in range(80):
        (folder / f"{i:02d}.txt").write_text(f"text {i} of several words that follow each other, " * 4)
    return Setting(
        corpus=str(folder),
        vocab_size=300,
        model=TransformerConfig(300, hidden_size=16, layers=2, heads=2, max_length=32),
        memory=EngramConfig(layers=(1,), orders=(2,), heads=1, head_dim=8, rows_per_head=64),
        train=TrainConfig(tokens=512, batch_size=4, context=32),
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"rope_base": 10000', '"rope_base": 20000'),
        ('"gate_eps": 1e-06', '"gate_eps": 2e-06'),
        ('"text"', '"uext"'),
        ('"digest"', '"eigest"'),
        ('"format": 2', '"format": 3'),
        ('"format"', '"gormat"'),
    ],
)
def test_an_altered_run_is_refused_by_name_and_found_by_verify(run, before, after):
    home, setting, data = run
    text = (home / "run.json").read_text()
    assert text.count(before) >= 1
    (home / "run.json").write_text(text.replace(before, after, 1))
    for read in (lambda: load_run(home), lambda: save_run(home, setting, "engram", data)):
        with pytest.raises(ValueError, match=re.escape(str(home / "run.json"))):
            read()
    assert any(str(home / "run.json") in str(result["problem"]) for result in verify(home))


def test_no_flipped_bit_of_a_run_is_loaded_as_another_run(run):
    home, setting, _ = run
    file, draw = home / "run.json", random.Random(0)
    before = file.read_bytes()
    for place in draw.sample(range(len(before)), 80):
        data = bytearray(before)
        data[place] ^= 1 << draw.randrange(8)
        file.write_bytes(data)
        try:
            assert load_run(home)[2] == setting  # another spelling of the same values
        except ValueError as error:
            assert str(file) in str(error)


@pytest.mark.parametrize("name", ["tokenizer.json", "token_map.safetensors"])
def test_a_changed_tokenizer_of_a_run_is_refused_by_name(run, name):
    home, _, _ = run
    data = (home / name).read_bytes()
    other = data.replace(b'"merges"', b'"merges" ') if name == "tokenizer.json" else data[:-1] + b"x"
    (home / name).write_bytes(other)
    with pytest.raises(ValueError, match=f"{name} is missing or was changed"):
        load_run(home)
    assert any(name in str(result["problem"]) for result in verify(home))
    (home / name).unlink()
    with pytest.raises(ValueError, match=name):
        load_run(home)


def test_a_run_from_before_digests_loads_and_gets_them_when_it_is_trained_again(run, capsys):
    home, setting, data = run
    values = json.loads((home / "run.json").read_text())
    (home / "run.json").write_text(json.dumps({name: values[name] for name in ("arm", "setting", "text")}))
    assert load_run(home)[2] == setting
    cli.files.verify(home)
    assert f"note: {home / 'run.json'} has no digest" in capsys.readouterr().err
    save_run(home, setting, "engram", data)
    assert load_run(home)[2] == setting and not any(result["note"] for result in verify(home))


def test_a_run_goes_on_with_its_own_tokenizer_only(run):
    home, setting, data = run
    other = train_tokenizer(["quite another text, with other pairs of letters"], 270)
    with pytest.raises(ValueError, match="a run with another tokenizer"):
        save_run(home, setting, "engram", replace(data, tokenizer=other))
    assert load_run(home)[2] == setting


def inside(*arguments) -> None:
    """Run a command in this process."""
    cli.app([*map(str, arguments)], standalone_mode=False)


@pytest.fixture
def threads():
    """Restore the threads of torch and of the kernels after a test that changes them."""
    before = torch.get_num_threads(), kernels.CORES
    yield
    torch.set_num_threads(before[0])
    kernels.set_threads(before[1])


@pytest.mark.usefixtures("threads")
def test_threads_reach_torch_and_the_kernels(run):
    home, _, _ = run
    for arguments in (("evaluate", home), ("generate", home, "text", "--tokens", 2), ("explain", home, "text")):
        for count in (2, 3):
            inside(*arguments, "--threads", count)
            assert torch.get_num_threads() == kernels.CORES == count


@pytest.mark.usefixtures("threads")
def test_the_default_threads_are_those_that_the_process_may_use(run, monkeypatch):
    torch.set_num_threads(8)
    monkeypatch.setattr(kernels, "CORES", 3)
    inside("generate", run[0], "text", "--tokens", 1)
    assert torch.get_num_threads() == 3
    torch.set_num_threads(1)  # as with OMP_NUM_THREADS=1
    inside("generate", run[0], "text", "--tokens", 1)
    assert torch.get_num_threads() == 1


def test_every_command_that_computes_has_threads(capsys):
    commands = {command.callback.__name__: command.callback for command in cli.app.registered_commands}
    computing = {"ablate", "train", "evaluate", "generate", "explain", "bench", "convert"}
    assert computing == {name for name, call in commands.items() if "threads" in call.__annotations__}
    for count in ("0", "-1", "many", "1000000"):
        with pytest.raises(SystemExit) as stop:
            cli.app(["bench", "--threads", count])
        assert stop.value.code == 2 and "threads" in capsys.readouterr().err


def test_long_commands_print_plain_lines_on_stderr_and_json_alone_on_stdout(run, monkeypatch, capsys):
    monkeypatch.setattr("engram.lm.progress.EVERY", 0.001)
    home, setting, _ = run
    capsys.readouterr()
    inside("evaluate", home, "--json")
    out, err = capsys.readouterr()
    assert json.loads(out)["tokens"] > 0 and "reading model and text: 0:00 since it began" in err
    inside("verify", home, "--json")
    out, err = capsys.readouterr()
    assert json.loads(out)["whole"] is True
    inside("train", "--out", home.parent / "new", "--corpus", setting.corpus, "--budget", "4k")
    out, err = capsys.readouterr()
    assert "engram, seed 0: 1 of 2 steps" in err and "4,096 tokens in" in out
    lines = [json.loads(line) for line in (home.parent / "new" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]


def test_evaluation_tells_how_many_tokens_it_has_scored(run):
    home, setting, data = run
    model = load_run(home)[0]
    seen = []
    result = evaluate(model, data.validation, on_tokens=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (result.document_tokens.sum(),) * 2 and [done for done, _ in seen] == sorted(
        {done for done, _ in seen}
    )
    told = []
    arms = ["plain", "engram"]
    ablate(setting, arms, on_evaluate=lambda arm, seed, done, total: told.append((arm, seed, done == total)))
    assert {(arm, 0, True) for arm in arms} <= set(told)


def test_versions_are_shown_and_every_public_name_is_listed(capsys):
    inside("--version")
    out = capsys.readouterr().out
    kind = "with compiled kernels" if kernels.native is not None else "without compiled kernels"
    assert out.startswith(f"engram {engram_package.__version__} (torch {torch.__version__}") and kind in out
    assert set(engram_package.__all__) | {"__version__"} <= set(dir(engram_package))
    assert {"attach", "detach"} <= set(dir(engram_package))
