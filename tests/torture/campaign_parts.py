"""Memories and models that the campaigns save, train and damage, their comparison, and child processes."""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import toy

from engram import EngramConfig, EngramMemory, TokenMap, Transformer, TransformerConfig
from engram.lm.train import TrainConfig, train

MEMORY = EngramConfig(
    layers=(1, 3), heads=2, head_dim=64, rows_per_head=997, pad_id=2, conv_kernel=0, boundary="dead"
)  # a memory that every format can store
ROWS = EngramConfig(layers=(0, 1), orders=(2,), heads=2, head_dim=8, rows_per_head=499, table_init="normal")
TRAIN = TrainConfig(tokens=24 * 64, batch_size=4, context=16, warmup_steps=3)
REFUSED = (OSError, ValueError, TypeError, IndexError)
DEADLINE = 120  # seconds after which a child counts as hanging


def memory(seed: int) -> EngramMemory:
    torch.manual_seed(seed)
    m = EngramMemory(MEMORY, TokenMap.identity(64), 16)
    for table in m.tables.values():
        table.write(torch.arange(0, table.rows, 2), torch.randn((table.rows + 1) // 2, table.dim))
    return m


def values(m: EngramMemory) -> list[torch.Tensor]:
    """Return all rows and fusion weights of a memory."""
    rows = [table.gather(torch.arange(table.rows)) for table in m.tables.values()]
    return [*rows, *m.fusions.state_dict().values()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def model(folder: Path | None = None) -> Transformer:
    torch.manual_seed(0)
    kept = EngramMemory(ROWS, TokenMap.identity(toy.VOCAB), 32, folder=folder)
    torch.manual_seed(0)
    return Transformer(TransformerConfig(vocab_size=toy.VOCAB, hidden_size=32, layers=2, heads=2, max_length=16), kept)


def trained(m: Transformer, run: Path | None = None) -> list[torch.Tensor]:
    """Train from the newest checkpoint of the run, and return the model's values at the end."""
    train(m, toy.corpus(), TRAIN, folder=run, checkpoint_every=5, keep_checkpoints=2)
    return [*m.state_dict().values(), *values(m.memory)]


class Child:
    """A forked process that runs `work` and sends its result, or the error that ended it, through a pipe."""

    def __init__(self, work: Callable[[], object]):
        reading, writing = os.pipe()
        self.began = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reading)
            if sys.platform == "linux":
                ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends when its parent does
            os.setpgid(0, 0)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                answer = ["done", work()]
            except BaseException as error:  # also KeyboardInterrupt
                named = type(error).__name__, str(error)[:300]
                answer = ["refused" if isinstance(error, REFUSED) else "raised", *named]
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            os.write(writing, json.dumps(answer).encode())
            os._exit(0)
        os.close(writing)
        self.pipe = reading

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> list:
        """Return ["done", result], ["refused" or "raised", type, text], ["killed"], ["crash", signal] or ["hang"]."""
        text, hangs = b"", False
        while True:
            left = self.began + DEADLINE - time.monotonic()
            ready, _, _ = select.select([self.pipe], [], [], max(left, 0))
            if not ready:
                hangs = True
                os.kill(self.pid, signal.SIGKILL)
                break
            if not (piece := os.read(self.pipe, 1 << 16)):
                break
            text += piece
        os.close(self.pipe)
        status = os.waitpid(self.pid, 0)[1]
        if hangs:
            return ["hang"]
        if os.WIFSIGNALED(status):
            return ["killed"] if os.WTERMSIG(status) == signal.SIGKILL else ["crash", os.WTERMSIG(status)]
        return json.loads(text) if text else ["crash", f"exit {status}"]


def killed(work: Callable[[], object], after: float) -> list:
    child = Child(work)
    time.sleep(after)
    child.signal(signal.SIGKILL)
    return child.wait()


class Tally:
    """Counts of the outcomes, with those that are wrong."""

    def __init__(self, name: str):
        self.name, self.counts, self.wrong, self.began = name, Counter[str](), list[str](), time.monotonic()

    def add(self, what: str) -> None:
        self.counts[what] += 1

    def fault(self, what: str) -> None:
        self.counts["WRONG"] += 1
        self.wrong.append(what)

    def ended_well(self, result: list, what: str) -> bool:
        """Count how a child ended; a crash, a hang or an error of another kind is a fault."""
        if result[0] in ("crash", "hang", "raised"):
            self.fault(f"{what}: {result}")
            return False
        self.add(f"{what} {result[0]}")
        return True

    def show(self) -> None:
        counts = ", ".join(f"{count:,} {what}" for what, count in sorted(self.counts.items()))
        print(f"{self.name}: {counts} ({time.monotonic() - self.began:.0f} s)", flush=True)
        for wrong in self.wrong[:20]:
            print(f"  WRONG {wrong}", flush=True)
