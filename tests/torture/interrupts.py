"""Ctrl-C, one or several times, in gathers, steps, saves and training: no crash, no wrong row."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
from campaign_parts import Child, Tally, equal, memory, model, trained, values

from engram import EngramMemory, HostTable
from engram.tables import RowRMS, kernels

ROWS, DIM = 400_000, 64


def interrupts(count: int, home: Path, draw: random.Random) -> Tally:
    tally = Tally("interrupts")
    home.mkdir(parents=True)
    kinds = (gathers, steps, saves, training)
    expected = trained(model())
    for number in range(count):
        kind, folder = kinds[number % 4], home / str(number)
        folder.mkdir()
        child = Child(lambda k=kind, f=folder: k(f, expected))
        wait_for(folder / "ready", child)
        for _ in range(draw.choice((1, 1, 2, 3))):
            time.sleep(draw.random() * 0.4)
            try:
                child.signal(signal.SIGINT)
            except ProcessLookupError:
                break
        (folder / "quiet").touch()
        result = child.wait()
        if result[0] in ("raised", "refused"):
            if kind is training and (result[1] == "KeyboardInterrupt" or "cut short" in result[-1]):
                result = ["interrupted"]
            elif result[1] == "KeyboardInterrupt":  # before or after what is tested
                result = ["interrupted outside"]
            elif result[0] == "refused":
                result = ["raised", *result[1:]]
        if tally.ended_well(result, kind.__name__) and result[0] == "done" and result[1] is not True:
            tally.fault(f"{kind.__name__}: {result[1]}")
        if kind is training and result[0] == "interrupted":
            again = Child(lambda f=folder: resumes(f, expected)).wait()
            if tally.ended_well(again, "training again") and again != ["done", True]:
                tally.fault(f"training after Ctrl-C: {again}")
        shutil.rmtree(folder)
    return tally


def wait_for(path: Path, child: Child) -> None:
    end = time.monotonic() + 60
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.005)


def until_quiet(folder: Path, work: Callable[[], None]) -> int:
    """Repeat work() until no more signals come, and return how often one interrupted it."""
    (folder / "ready").touch()
    hits = 0
    while not (folder / "quiet").exists():
        try:
            while not (folder / "quiet").exists():
                work()
        except KeyboardInterrupt:
            hits += 1
    return hits


def gathers(folder: Path, _: object) -> object:
    kernels.set_threads(2)
    table = HostTable(ROWS, DIM, path=folder / "rows")
    table.tensor.copy_(torch.arange(ROWS, dtype=torch.float32)[:, None].expand(ROWS, DIM))
    ids = torch.randint(0, ROWS, (300_000,), generator=torch.Generator().manual_seed(os.getpid()))
    until_quiet(folder, lambda: table.gather(ids))
    wrong = (table.gather(ids)[:, 0] != ids) | (table.gather(ids)[:, -1] != ids)
    unchanged = torch.equal(table.tensor[:, 3], torch.arange(ROWS, dtype=torch.float32))
    return True if unchanged and not wrong.any() else f"{int(wrong.sum())} gathered rows are wrong"


def steps(folder: Path, _: object) -> object:
    kernels.set_threads(2)
    ids, grad = torch.arange(ROWS), torch.ones(ROWS, DIM)
    one = HostTable(1, DIM)
    RowRMS(one, lr=0.01).step(torch.zeros(1, dtype=torch.int64), torch.ones(1, DIM))
    new, odd = one.tensor[0], list[str]()

    def step() -> None:
        table = HostTable(ROWS, DIM)
        optimizer = RowRMS(table, lr=0.01)
        try:
            optimizer.step(ids, grad)
        finally:
            rows = table.tensor.clone()
            is_new, is_old = (rows == new).all(1), (rows == 0).all(1)
            if not (is_new | is_old).all():
                odd.append(f"{int((~(is_new | is_old)).sum())} rows are neither old nor new")
            time.sleep(0.01)
            if not torch.equal(table.tensor, rows):
                odd.append("rows changed after the step had ended")

    until_quiet(folder, step)
    return True if not odd else odd[0]


def saves(folder: Path, _: object) -> object:
    memories = [memory(seed) for seed in range(2)]
    contents = [values(m) for m in memories]
    memories[0].save(folder / "memory")
    number = [0]

    def save() -> None:
        number[0] += 1
        memories[number[0] % 2].save(folder / "memory", overwrite=True)

    until_quiet(folder, save)
    loaded = values(EngramMemory.load(folder / "memory"))
    if not any(equal(loaded, content) for content in contents):
        return "a memory that is neither of the two"
    memories[0].save(folder / "memory", overwrite=True)
    left = [path.name for path in folder.iterdir() if ".partial-" in path.name]
    return True if not left else f"{left} are left"


def training(folder: Path, expected: list[torch.Tensor]) -> object:
    m = model(folder / "rows")
    (folder / "ready").touch()
    return equal(trained(m, folder / "run"), expected)


def resumes(folder: Path, expected: list[torch.Tensor]) -> bool:
    try:
        m = model(folder / "rows")
    except ValueError as error:
        if "delete" not in str(error):
            raise
        shutil.rmtree(folder / "rows")
        m = model(folder / "rows")
    return equal(trained(m, folder / "run"), expected)
