"""The notebooks and examples run from top to bottom."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest
import torch

import engram

ROOT = Path(__file__).parent.parent


@pytest.fixture
def jupyter_writes_here_only(tmp_path, monkeypatch):
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))


@pytest.mark.usefixtures("jupyter_writes_here_only")
@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # beside other work, threads that wait for each other take minutes
    notebook = nbformat.read(path, as_version=4)
    shortened = 0
    for cell in notebook.cells:  # half of the steps: enough for what is asserted below
        shortened += cell.source.count("steps=120")
        cell.source = cell.source.replace("steps=120", "steps=60")
    assert shortened == 3
    resources = {"metadata": {"path": str(ROOT)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    printed = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", ()))
    assert "logits unchanged: True" in printed and printed.count(": True") == 4 and ": False" not in printed
    before, memory = (
        float(line.split()[-1]) for line in printed.splitlines() if line.startswith(("before ", "memory "))
    )
    assert memory < before - 0.1


def test_the_deepseek_v4_example_gives_a_memory_to_four_streams_at_two_layers(monkeypatch):
    spec = importlib.util.spec_from_file_location("deepseek_v4_tiny", ROOT / "examples" / "deepseek_v4_tiny.py")
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, example)  # where its dataclass looks its annotations up
    spec.loader.exec_module(example)
    model = example.backbone(300)
    memory = engram.attach(model, example.MEMORY.replace(rows_per_head=101), engram.TokenMap.identity(300))
    arm = example.Arm("with memory", model, engram.build_optimizer(model))
    for _ in range(2):
        arm.step(torch.arange(64).view(2, 32), torch.arange(1, 65).view(2, 32), 1.0)
    assert memory.streams == 4 and list(memory.tables) == [1, 3] and arm.losses[1] < arm.losses[0]
    assert all(table.tensor.any() for table in memory.tables.values())
