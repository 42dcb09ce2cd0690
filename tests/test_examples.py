"""The examples in the docstrings of the public names run and print what they show."""

from __future__ import annotations

import doctest
import inspect
from importlib import import_module

import pytest

import engram

# (module, name inside it) of public names, and of methods that a user calls first.
NAMES = sorted({(engram._HOME[name], name) for name in engram.__all__} | {("engram.memory", "EngramMemory.recall")})
WITHOUT = {"MemoryCallback", "bench", "offload"}  # need a Trainer, minutes, or a Qwen model


def example_of(module: str, name: str) -> doctest.DocTest | None:
    thing = import_module(module)
    for part in name.split("."):
        thing = getattr(thing, part)
    docstring = inspect.getdoc(thing) or ""
    parsed = doctest.DocTestParser().get_doctest(docstring, {}, name, inspect.getsourcefile(thing), 0)
    return parsed if parsed.examples else None


WITH_EXAMPLE = [(module, name) for module, name in NAMES if example_of(module, name)]


def test_public_names_have_an_example():
    assert {name for _, name in NAMES} - {name for _, name in WITH_EXAMPLE} == WITHOUT


@pytest.mark.parametrize("name", sorted(engram.__all__))
def test_a_public_docstring_has_its_sections(name):
    thing = getattr(engram, name)
    docstring = inspect.getdoc(thing) or ""
    needed = {"Raises:"}
    if inspect.isfunction(thing):
        needed |= {"Returns:"} | ({"Args:"} if inspect.signature(thing).parameters else set())
    assert {section for section in needed if f"\n{section}\n" not in docstring} == set()


@pytest.mark.parametrize(("module", "name"), WITH_EXAMPLE, ids=[name for _, name in WITH_EXAMPLE])
def test_the_example_of(module, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", None)
    shown: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    example = example_of(module, name)
    assert example is not None
    assert runner.run(example, out=shown.append).failed == 0, "".join(shown)
    assert "Example:" in (example.docstring or "")
