"""Settings that the command line makes before torch is imported, and a program that imports engram does not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from engram import _command


@pytest.mark.parametrize(
    ("program", "line", "expected"),
    [
        ("/usr/bin/engram", ["/usr/bin/python", "/usr/bin/engram", "train"], True),
        ("C:/Scripts/engram.exe", ["python.exe"], True),
        ("-m", ["python", "-m", "engram", "train"], True),
        ("-m", ["python", "-X", "dev", "-m", "engram"], True),
        ("train.py", ["python", "train.py"], False),
        ("pytest", ["python", "-m", "pytest", "tests"], False),
        ("-m", ["python", "-m", "engramming"], False),
        ("-c", ["python", "-c", "import engram"], False),
        ("", [], False),
    ],
)
def test_the_command_line_is_distinguished_from_other_programs(program, line, expected):
    assert _command.is_command(program, line) == expected


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_threads_sleep_while_they_wait_unless_the_environment_decides(monkeypatch, name):
    monkeypatch.setattr(os, "environ", {"PATH": "/bin"})
    _command.sleep_while_waiting()
    assert os.environ == {"PATH": "/bin", "OMP_WAIT_POLICY": "PASSIVE"}
    monkeypatch.setattr(os, "environ", {name: "7"})
    _command.sleep_while_waiting()
    assert os.environ == {name: "7"}


@pytest.mark.parametrize(("command", "policy"), [("train", "PASSIVE"), ("bench", "None")])
def test_it_is_set_before_torch_is_imported_but_for_benchmarks(command, policy):
    code = """
import builtins, os, sys
sys.argv[0], real = "/x/engram", builtins.__import__
def look(name, *arguments, **named):
    if name == "torch":
        print(os.environ.get("OMP_WAIT_POLICY"))
        os._exit(0)
    return real(name, *arguments, **named)
builtins.__import__ = look
import engram
engram.HostTable
"""
    clean = {k: v for k, v in os.environ.items() if k not in _command._SETTINGS}
    line = [sys.executable, "-c", code, command]
    run = subprocess.run(line, capture_output=True, text=True, env=clean, timeout=60)
    assert run.stdout == f"{policy}\n", run.stderr
