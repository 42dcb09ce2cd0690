"""Old import paths work for one version and name the new one."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

from engram._moved import LEFT, MOVED, SPLIT


@pytest.mark.parametrize("old", sorted(MOVED))
def test_an_old_import_path_is_served_by_the_new_module(old):
    for name in [name for name in sys.modules if name == old]:
        del sys.modules[name]
    with pytest.warns(DeprecationWarning, match=f"{old} has moved to {MOVED[old]}"):
        module = import_module(old)
    new = import_module(MOVED[old])
    assert all(getattr(module, name) is getattr(new, name) for name in vars(new) if not name.startswith("__"))


def test_the_warning_points_at_the_line_that_imports(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import engram\nfrom engram.recall import Recall\nfrom engram.lm import statistics\n")
    ran = subprocess.run([sys.executable, "-W", "always", str(script)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "script.py:2: DeprecationWarning: engram.recall has moved to engram.memory.recall" in ran.stderr
    assert "script.py:3: DeprecationWarning: engram.lm.statistics has moved" in ran.stderr


@pytest.mark.parametrize("old", sorted(SPLIT))
def test_an_old_module_that_was_split_serves_the_names_of_all_its_parts(old):
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning):
        module = import_module(old)
    for home in map(import_module, SPLIT[old]):
        own = [name for name, value in vars(home).items() if getattr(value, "__module__", None) == home.__name__]
        assert own and all(getattr(module, name) is getattr(home, name) for name in own)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        module.nothing  # noqa: B018


@pytest.mark.parametrize("module", sorted(LEFT))
def test_a_public_name_that_left_its_module_is_served_from_its_new_home(module):
    old, served = import_module(module), 0
    for home in map(import_module, LEFT[module]):
        for name, value in vars(home).items():
            if name.startswith("_") or getattr(value, "__module__", None) != home.__name__ or name in vars(old):
                continue
            with pytest.warns(DeprecationWarning, match=rf"{module}.{name} has moved to {home.__name__}:") as warned:
                assert getattr(old, name) is value
            assert warned[0].filename == __file__
            served += 1
    assert served > 10
    for name in ("nothing", "_exchange", "__path__", "shutil"):
        with pytest.raises(AttributeError, match=f"'{module}' has no attribute '{name}'"):
            getattr(old, name)


def test_the_old_name_of_inspect_file_is_served_with_a_warning():
    with pytest.warns(DeprecationWarning, match="inspect is called inspect_file now"):
        from engram.integrations.formats import inspect
    assert inspect is import_module("engram").inspect_file
