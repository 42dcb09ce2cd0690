"""The README's code runs as it stands there."""

from __future__ import annotations

import json
import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_library_example_of_the_readme_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(BLOCKS[0], names)
    assert "'rows'" in capsys.readouterr().out
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
