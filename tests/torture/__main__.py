"""Kills, Ctrl-C, errors of the operating system, damaged files and races, with counts: `make torture`.

The exit status is 1 if there was a wrong row, a mixed memory, a crash, a hang or an error of an unexpected kind.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def preload(home: Path) -> str:
    """Start this program again with the shim loaded first. Return the reason if that is not possible."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if sys.platform != "linux" or compiler is None:
        return "no C compiler" if compiler is None else "not Linux"
    library = home / "shim.so"
    made = subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, HERE / "shim.c", "-ldl"])
    if made.returncode:
        return f"{compiler} failed"
    os.environ["LD_PRELOAD"] = f"{library} {os.environ.get('LD_PRELOAD', '')}".strip()
    os.execv(sys.executable, [sys.executable, str(HERE), *sys.argv[1:], "--home", str(home)])


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/torture", description=__doc__.splitlines()[0])
    sizes = {"kills": 300, "interrupts": 200, "errors": 600, "mutants": 5000, "loads": 2000}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.home is None:
        home = Path(tempfile.mkdtemp(prefix="engram-torture-"))
        print(f"errors: skipped, {preload(home)}" if arguments.errors else "", flush=True)
        arguments.errors = 0
    else:
        home = arguments.home
    try:
        return run(arguments, home)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def run(arguments: argparse.Namespace, home: Path) -> int:
    import torch

    torch.set_num_threads(1)  # fork is safe only in a process without threads
    from faults import faults
    from interrupts import interrupts
    from kills import kills
    from mutants import mutants
    from races import races

    campaigns = {"loads": races, "mutants": mutants, "errors": faults, "kills": kills, "interrupts": interrupts}
    wrong = 0
    for name, campaign in campaigns.items():
        if size := getattr(arguments, name):
            tally = campaign(size, home / name, random.Random(f"{arguments.seed} {name}"))
            if tally is None:
                print(f"{name}: skipped, the shim was not loaded", flush=True)
                continue
            tally.show()
            wrong += len(tally.wrong)
    print(f"{wrong} wrong" if wrong else "nothing wrong: no wrong row, mixed memory, crash or hang", flush=True)
    return 1 if wrong else 0


sys.exit(main())
