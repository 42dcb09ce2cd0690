"""The README's code runs as it stands there."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
CONSOLE = re.findall(r"```console\n(.*?)```", README, re.S)


def test_the_library_example_of_the_readme_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(BLOCKS[0], names)
    assert "'rows'" in capsys.readouterr().out
    exec(BLOCKS[4], names)
    assert names["found"].layers[1].rows.shape == (64, 2, 4)
    names.update(i=1, x=names["torch"].zeros(8, 256, 128), ids=names["ids"][:, :-1])
    exec(BLOCKS[1], names)
    assert names["served"].tables[1].info()["codec"] == "fp8"
    exec(BLOCKS[2], names)
    assert names["x"].shape == (8, 256, 128)


def test_the_transformers_example_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from hf_models import build

    import engram

    names: dict = {"engram": engram, "EngramConfig": engram.EngramConfig, "tokenizer": engram.TokenMap.identity(64)}
    names["model"] = build("llama")
    exec(BLOCKS[3], names)
    again = engram.attach(build("llama"), "adapter", names["tokenizer"])
    assert again.layout.digest == names["memory"].layout.digest


def test_explain_and_plan_say_what_the_readme_shows(capsys, monkeypatch):
    import torch
    from hf_models import build

    import engram
    from engram.cli import main

    model = build("llama")
    engram.attach(model, engram.EngramConfig(layers=(1,), heads=4, head_dim=32), engram.TokenMap.identity(64))
    exec(BLOCKS[4], {"engram": engram, "model": model, "ids": torch.arange(3, 15)[None]})
    assert "['7 8', '6 7 8']" in capsys.readouterr().out
    _, _, after = CONSOLE[0].partition("$ engram plan")
    arguments, *shown = after.splitlines()
    monkeypatch.setattr(sys, "argv", ["engram", "plan", *shlex.split(arguments)])
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main()
    printed = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert len(shown) == 4
    for line in shown:
        assert any(one.startswith(" ".join(line.split())) for one in printed), line


def test_the_command_line_is_there_as_a_module_too():
    ran = subprocess.run([sys.executable, "-m", "engram", "verify", "nowhere"], capture_output=True, text=True)
    assert ran.returncode == 2 and "nowhere is no saved memory" in ran.stderr.replace("\n", " ")


def test_the_lm_eval_task_of_the_readme_runs(capsys, monkeypatch, tmp_path):
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install -e '.[lm-eval]' in the project's folder")
    import datasets
    import tokenizers
    import transformers as hf

    import engram
    from engram.cli import main

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.S)
    task, data = re.findall(r"# (\S+); its data is (\S+):", block)[0]
    Path(task).parent.mkdir()
    Path(task).write_text(block)
    Path(data).write_text(block[block.index("{") : block.index("\n")])
    letters = {letter: i for i, letter in enumerate(map(chr, range(32, 127)))}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="~")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=95, max_position_embeddings=64, **shape))
    model.save_pretrained("models/llama")
    tokenizer.save_pretrained("models/llama")
    engram.attach(model, engram.EngramConfig(layers=(1,), heads=2, head_dim=8), tokenizer).save("adapter")
    monkeypatch.setattr(sys, "argv", shlex.split(CONSOLE[1].splitlines()[1].removeprefix("$ ")))
    with pytest.raises(SystemExit) as end:
        main()
    report = json.loads(capsys.readouterr().out)
    assert not end.value.code and [row["metric"] for row in report["results"]] == ["acc", "acc_norm"]


def test_the_readme_names_no_file_that_is_not_there():
    root = Path(__file__).parent.parent
    for target in re.findall(r"\]\(([^)#:]+)\)", re.sub(r"```.*?```", "", README, flags=re.S)):
        assert (root / target).exists(), target


def test_the_figures_of_the_readme_are_those_of_its_report():
    report = json.loads((Path(__file__).parent.parent / "docs" / "report.json").read_text())
    for entry in report["summary"]:
        (line,) = (line for line in README.splitlines() if line.startswith(f"| {entry['arm']} |"))
        wanted = [f"{entry['loss']:.3f}", f"{entry['bpb']:.3f}"]
        if entry["difference"]:
            wanted += [f"{entry['difference'][key]:+.3f}".replace("-", "−") for key in ("mean", "low", "high")]
        assert all(figure in line for figure in wanted), line
    assert f"{report['runs'][0]['tokens']:,} training tokens" in README
