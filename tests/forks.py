"""Processes for tests, forked from one that has imported the library: a new one imports torch for seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SERVER = """
import json, os, random, signal, sys, tempfile, time, traceback
import torch._dynamo  # which the first optimizer of torch imports
import engram.ablation.figure, engram.ablation.html_report, engram.cli, engram.lm.progress, engram.lm.run_folder
import experiments.lab.runner, test_files, toy


def child(asked, files):
    for number, file in enumerate(files):
        file.seek(0)
        os.dup2(file.fileno(), number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    sys.path[:0] = [path for path in asked["env"].get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.argv, status = ["-c", *asked["arguments"]], 0
    signal.alarm(asked["timeout"])
    try:
        exec(asked["code"], {"__name__": "__main__"})
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


for line in sys.stdin:
    asked = json.loads(line)
    files = [tempfile.TemporaryFile() for _ in range(3)]
    files[0].write(asked["input"].encode())
    files[0].flush()
    if (number := os.fork()) == 0:
        child(asked, files)
    status = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
    texts = []
    for file in files[1:]:
        file.seek(0)
        texts.append(file.read().decode())
    print(json.dumps([status, *texts]), flush=True)
"""
MODULE = "import runpy\nrunpy.run_module({!r}, run_name='__main__', alter_sys=True)"  # python -m


class Forks:
    """Call it like subprocess.run(..., capture_output=True, text=True), with code in place of a command.

    Attributes:
        pid: of the process that forks, the parent of all others.
    """

    def __init__(self, server: subprocess.Popen[str]):
        self._server, self.pid = server, server.pid

    def __call__(
        self,
        code: str,
        *arguments: Any,
        input: str = "",
        env: dict[str, str] | None = None,
        cwd: str | os.PathLike[str] = ".",
        timeout: int = 280,
    ) -> subprocess.CompletedProcess[str]:
        """Run `code` as the main module. A process that is killed has the number of the signal, below 0, as its
        returncode; one that takes longer than `timeout` seconds is killed."""
        assert self._server.stdin is not None and self._server.stdout is not None
        texts = [str(argument) for argument in arguments]
        asked = {"code": code, "arguments": texts, "input": input, "env": dict(os.environ if env is None else env)}
        asked |= {"cwd": os.path.abspath(cwd), "timeout": timeout}
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        status, out, err = json.loads(self._server.stdout.readline())
        return subprocess.CompletedProcess([code, *texts], status, out, err)


@contextmanager
def served() -> Iterator[Forks]:
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as server:
        yield Forks(server)
        server.stdin.close()  # type: ignore[union-attr]
