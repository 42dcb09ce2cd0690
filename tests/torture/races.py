"""Readers beside a writer that overwrites: every load is one complete memory, the old or the new."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

from campaign_parts import Child, Tally, equal, memory, model, values

from engram import EngramMemory, build_optimizer
from engram.lm.checkpoint import load_checkpoint, save_checkpoint
from engram.storage.manifest import verify


def races(count: int, home: Path, draw: random.Random) -> Tally:
    tally = Tally("races")
    home.mkdir(parents=True)
    memories = [memory(seed) for seed in range(3)]
    contents = [values(m) for m in memories]
    memories[0].save(home / "memory")
    models = [model() for _ in range(3)]
    for number, m in enumerate(models):
        m.memory.tables[0].tensor.fill_(float(number))
        m.memory.tables[1].tensor.fill_(float(number))
    step = save_checkpoint(home / "run", models[0], build_optimizer(models[0]), 1, {"number": 0})

    def write_memories() -> None:
        for number in range(10**9):
            memories[number % 3].save(home / "memory", overwrite=True)

    def write_checkpoints() -> None:
        optimizers = [build_optimizer(m) for m in models]
        for number in range(10**9):
            save_checkpoint(home / "run", models[number % 3], optimizers[number % 3], 1, {"number": number % 3})

    def load(mode: str) -> str:
        found = values(EngramMemory.load(home / "memory", mode))
        return "one memory" if any(equal(found, content) for content in contents) else "MIXED"

    def check() -> str:
        return "one memory" if all(result["problem"] is None for result in verify(home / "memory")) else "FALSE ALARM"

    def resume() -> str:
        other = model()
        number = load_checkpoint(step, other)["facts"]["number"]
        return "one checkpoint" if equal(values(other.memory), values(models[number].memory)) else "MIXED"

    kinds = {"copy": lambda: load("copy"), "shared": lambda: load("shared"), "verify": check, "checkpoint": resume}
    share = {"copy": 0.4, "shared": 0.4, "verify": 0.1, "checkpoint": 0.1}
    for name, read in kinds.items():
        writer = Child(write_checkpoints if name == "checkpoint" else write_memories)
        loads = max(1, round(count * share[name]))
        for start in range(0, loads, 50):
            times = min(50, loads - start)
            result = Child(lambda r=read, n=times: [r() for _ in range(n)]).wait()
            if result[0] != "done":
                tally.fault(f"{name}: {result}")
                continue
            for found in result[1]:
                tally.fault(f"{name}: {found}") if found.isupper() else tally.add(f"{name} {found}")
        writer.signal(signal.SIGKILL)
        if (ended := writer.wait()) != ["killed"]:
            tally.fault(f"the writer beside {name}: {ended}")
    memories[0].save(home / "memory", overwrite=True)
    if left := [name for name in os.listdir(home) if name.startswith(".")]:
        tally.fault(f"{left} are left")
    del draw
    return tally
