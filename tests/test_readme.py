"""The README is short, and what it says is so. Its examples run in test_docs.py, with those of the pages."""

from __future__ import annotations

import json
import re
import subprocess
import sys

from documents import ROOT, blocks, examples

PAGE = ROOT / "README.md"
README = PAGE.read_text()


def test_the_readme_is_read_in_a_few_minutes():
    assert len(README.splitlines()) <= 100 and len(README.split()) <= 800


def test_the_readme_shows_the_library_in_few_lines():
    lines = {name: sum(code.count("\n") for code in codes) for name, codes in examples(PAGE).items()}
    assert lines["library"] <= 14 and lines["attach"] <= 5
    assert all(marker == "example" for marker, _, language, _ in blocks(PAGE) if language == "python")


def test_the_command_line_is_there_as_a_module_too():
    ran = subprocess.run([sys.executable, "-m", "engram", "verify", "nowhere"], capture_output=True, text=True)
    assert ran.returncode == 2 and "nowhere is not a saved memory" in ran.stderr.replace("\n", " ")


def test_the_readme_names_no_file_that_is_not_there():
    for target in re.findall(r"\]\(([^)#:]+)\)", re.sub(r"```.*?```", "", README, flags=re.S)):
        assert (ROOT / target).exists(), target


def test_the_figures_of_the_readme_are_those_of_its_report():
    report = json.loads((ROOT / "docs" / "report.json").read_text())
    for entry in report["summary"]:
        (line,) = (line for line in README.splitlines() if line.startswith(f"| {entry['arm']} |"))
        expected = [f"{entry['loss']:.3f}", f"{entry['bpb']:.3f}"]
        if entry["difference"]:
            expected += [f"{entry['difference'][key]:+.3f}".replace("-", "−") for key in ("mean", "low", "high")]
        assert all(figure in line for figure in expected), line
    assert f"{report['runs'][0]['tokens']:,} training tokens" in README
