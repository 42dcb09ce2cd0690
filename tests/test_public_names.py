"""The top-level names: what `import engram` imports, and that type checkers see every public name."""

from __future__ import annotations

import ast
import json
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import engram

ROOT = Path(engram.__file__).parent
HEAVY = ("torch", "numpy", "matplotlib", "faiss", "transformers", "typer", "rich", "PIL", "tokenizers")


def modules_after(code: str) -> set[str]:
    command = [sys.executable, "-c", f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return set(json.loads(ran.stdout))


def test_import_engram_brings_no_other_library():
    names = modules_after("import engram\ndir(engram)\nengram.__version__")
    assert not names & set(HEAVY)
    assert {name for name in names if name.startswith("engram.")} == {
        "engram._command",
        "engram._moved",
        "engram._version",
    }


def test_the_names_of_a_model_bring_torch_but_no_figures_compiler_or_command_line():
    names = modules_after(
        "import engram\nengram.EngramConfig, engram.EngramMemory, engram.HostTable, engram.build_optimizer\n"
        "engram.NgramHasher, engram.TokenMap, engram.Transformer, engram.train, engram.explain, engram.plan"
    )
    assert "torch" in names
    assert not names & {"torch._dynamo", "matplotlib", "faiss", "transformers", "typer", "rich", "PIL"}


def test_every_public_name_is_found_listed_and_imported_by_a_star():
    names: dict = {}
    exec("from engram import *", names)
    for name in engram.__all__:
        assert names[name] is getattr(engram, name)
        assert callable(getattr(engram, name))
    assert {*engram.__all__, "__version__", "inspect", "tables"} <= set(dir(engram))
    assert engram.__all__ == sorted(engram.__all__) and set(engram._HOME) == set(engram.__all__)


def test_type_checkers_see_the_names_that_are_imported_on_first_use():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {
        alias.name: f"{node.module}" for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == {**engram._HOME, **dict.fromkeys(engram._ROOMS, "engram")}


def test_functions_hide_no_package_and_no_package_hides_a_function():
    packages = {module.name for module in pkgutil.iter_modules([str(ROOT)])}
    assert not packages & set(engram.__all__)
    for name in engram._ROOMS:
        assert isinstance(getattr(engram, name), ModuleType)
    import_module("engram.benchmarks.compare")
    assert callable(engram.bench) and not isinstance(engram.bench, ModuleType)
    assert isinstance(engram.inspect, ModuleType)


@pytest.mark.parametrize("name", ["nothing", "benches", "_LAZY", "Memory"])
def test_an_unknown_name_is_an_attribute_error(name):
    with pytest.raises(AttributeError, match=f"module 'engram' has no attribute '{name}'"):
        getattr(engram, name)
