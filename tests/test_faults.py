"""The fault campaign in small: a few of each kind of what `make torture` does in full."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TORTURE = Path(__file__).parent / "torture"
SIZES = {"kills": 4, "interrupts": 4, "errors": 12, "mutants": 60, "loads": 20}


@pytest.mark.skipif(sys.platform != "linux", reason="signals and preloaded libraries of Linux")
def test_nothing_is_wrong_mixed_crashed_or_hanging_after_any_fault():
    sizes = [f"--{name}={size}" for name, size in SIZES.items()]
    where = os.pathsep.join([str(TORTURE.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": where}
    done = subprocess.run(
        [sys.executable, TORTURE, *sizes], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0 and "nothing wrong" in done.stdout, done.stdout + done.stderr
    campaigns = [line.partition(":")[0] for line in done.stdout.splitlines()]
    assert {"races", "mutants", "errors", "kills", "interrupts"} <= set(campaigns)
