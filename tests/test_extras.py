"""Packages of extras: the library works without them, and what needs one names the extra."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from engram import cli
from engram._extras import EXTRAS, not_installed, require
from engram.ablation.figure import figure_png, figure_svg
from engram.tables.codecs import PQ

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}


def test_the_library_and_its_command_need_seven_packages():
    needed = {"numpy", "torch", "xxhash", "tokenizers", "safetensors", "typer", "rich"}
    assert names(PROJECT["dependencies"]) == needed


def test_every_extra_that_an_error_names_is_one_and_comes_with_dev():
    extras = PROJECT["optional-dependencies"]
    (own,) = (requirement for requirement in extras["dev"] if requirement.startswith("engram-lm["))
    assert set(EXTRAS.values()) <= set(extras) and set(EXTRAS.values()) <= set(re.findall(r"[\w-]+", own))


@pytest.mark.parametrize(
    ("module", "extra", "call"),
    [
        ("faiss", "pq", lambda: PQ.train(torch.randn(300, 8), 4)),
        ("matplotlib", "ablation", lambda: figure_png({})),
        ("PIL", "ablation", lambda: figure_png({})),
        ("matplotlib", "ablation", lambda: figure_svg({})),
        ("transformers", "hf", lambda: require("engram.attach", "transformers")),
    ],
)
def test_a_missing_package_is_named_with_its_extra(module, extra, call, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf"needs {module}, .*pip install -e '\.\[{extra}\]'"):
        call()


def test_a_missing_package_of_no_extra_keeps_its_error():
    error = ModuleNotFoundError("No module named 'numpy'", name="numpy")
    assert not_installed("a table", error) is error


def test_few_codebooks_need_no_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    rows = torch.randn(200, 8).round()
    codec = PQ.train(rows, 4)
    assert torch.equal(codec.decode(codec.encode(rows), 8), rows)


@pytest.mark.parametrize("module", ["matplotlib", "PIL"])
def test_an_ablation_without_its_figure_is_refused_before_the_work(module, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(sys, "argv", ["engram", "ablate", "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and not (tmp_path / "run").exists()
    assert f"`engram ablate` needs {module}, which is not installed: pip install -e" in capsys.readouterr().err


def test_another_missing_module_is_a_fault_of_the_program_and_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli, "app", lambda: require("x", "no_module_of_this_name"))
    with pytest.raises(ModuleNotFoundError, match="no_module_of_this_name"):
        cli.main()


LIBRARY_ALONE = """
import sys
sys.modules |= dict.fromkeys(["faiss", "matplotlib", "PIL", "transformers", "lm_eval", "datasets"])
import engram, torch
config = engram.EngramConfig(layers=(1,), heads=2, head_dim=8, rows_per_head=100)
memory = engram.EngramMemory(config, engram.TokenMap.identity(64), hidden_size=32)
model = engram.Transformer(engram.TransformerConfig(64, hidden_size=32, layers=2, heads=2), memory)
optimizer = engram.build_optimizer(model, lr=1e-3, table_lr=0.03)
model(torch.randint(0, 64, (1, 8))).sum().backward()
optimizer.step()
assert optimizer.touched > 0
engram.plan, engram.convert, engram.explain, engram.evaluate, engram.generate, engram.load_run, engram.verify
from engram.cli import app
"""


def test_the_library_works_without_any_extra():
    ran = subprocess.run([sys.executable, "-c", LIBRARY_ALONE], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
