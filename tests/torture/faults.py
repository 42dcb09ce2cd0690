"""An error of the operating system in any call that writes files: an OSError is raised, and nothing is half-written."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from campaign_parts import Child, Tally, equal, memory, model, values
from kills import leftovers

from engram import EngramMemory, TokenMap, build_optimizer
from engram.integrations.formats import convert
from engram.lm.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from engram.storage.files import NotSynced, write_whole

CODES = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.ENOMEM, errno.EMFILE)


def faults(count: int, home: Path, draw: random.Random) -> Tally | None:
    try:
        shim = ctypes.CDLL(None)
        arm = shim.torture_arm
    except AttributeError:
        return None  # not loaded before libc
    arm.argtypes, arm.restype = [ctypes.c_long, ctypes.c_int], None
    tally = Tally("errors")
    kinds = (saved, replaced, checkpointed, converted, encoded, single)
    for number in range(count):
        kind, folder = kinds[number % len(kinds)], home / str(number)
        folder.mkdir(parents=True)
        at, code = draw.randint(1, 45) if number % 2 else draw.randint(1, 12), draw.choice(CODES)

        def work(kind: Callable = kind, folder: Path = folder, at: int = at, code: int = code) -> tuple:
            outcomes: list[str] = []

            def failing(write: Callable[[], object]) -> str:
                arm(at, code)
                try:
                    write()
                    outcomes.append("done")
                except NotSynced:
                    outcomes.append("new, not synced")
                except OSError:
                    outcomes.append("old")
                finally:
                    arm(0, 0)
                return outcomes[-1]

            return kind(folder, failing), outcomes

        result = Child(work).wait()
        if result[0] != "done":
            tally.fault(f"{kind.__name__}, call {at}, {errno.errorcode[code]}: {result}")
        else:
            problem, outcomes = result[1]
            for outcome in outcomes:
                tally.add(f"{kind.__name__} {outcome}")
            if problem is not None:
                tally.fault(f"{kind.__name__}, call {at}, {errno.errorcode[code]}, {outcomes}: {problem}")
        shutil.rmtree(folder)
    return tally


def _after(folder: Path, outcome: str, new: bool, old: bool) -> str | None:
    """Return what is wrong with the files after an error, None if nothing is."""
    if not (new if outcome in ("done", "new, not synced") else old):
        return f"ended as {outcome!r}, but the files do not match"
    return f"{leftovers(folder)} are left" if leftovers(folder) else None


def saved(folder: Path, failing: Callable) -> str | None:
    m = memory(0)
    outcome = failing(lambda: m.save(folder / "memory"))
    exists = (folder / "memory").exists()
    new = exists and equal(values(EngramMemory.load(folder / "memory")), values(m))
    return _after(folder, outcome, new, not exists)


def replaced(folder: Path, failing: Callable) -> str | None:
    one, two = memory(0), memory(1)
    one.save(folder / "memory")
    outcome = failing(lambda: two.save(folder / "memory", overwrite=True))
    loaded = values(EngramMemory.load(folder / "memory"))
    return _after(folder, outcome, equal(loaded, values(two)), equal(loaded, values(one)))


def checkpointed(folder: Path, failing: Callable) -> str | None:
    m, other = model(), model()
    m.memory.tables[0].tensor.fill_(3.0)
    outcome = failing(lambda: save_checkpoint(folder, m, build_optimizer(m), 1, {}))
    if exists := bool(checkpoints(folder)):
        load_checkpoint(checkpoints(folder)[0], other)
    return _after(folder, outcome, exists and equal(values(other.memory), values(m.memory)), not exists)


def converted(folder: Path, failing: Callable) -> str | None:
    memory(0).save(folder / "source")
    to = ("deepseek-v4.1", "gguf", "engram")[os.getpid() % 3]
    convert(folder / "source", folder / "expected", to)
    outcome = failing(lambda: convert(folder / "source", folder / "target", to))
    from kills import same_content

    exists = (folder / "target").exists()
    return _after(folder, outcome, exists and same_content(folder / "expected", folder / "target"), not exists)


def encoded(folder: Path, failing: Callable) -> str | None:
    m, expected = memory(0), memory(0)
    codec = ("int8", "fp8", "int4", "pq4")[os.getpid() % 4]
    expected.encode_tables(codec)
    outcome = failing(lambda: m.encode_tables(codec, folder / "tables"))
    if outcome != "done":
        if m.codec is not None:
            return "the tables were replaced in spite of the error"
        if left := [path.name for path in (folder / "tables").glob("*")]:
            return f"{left} are left"
        m.encode_tables(codec, folder / "tables")
    same = all(torch.equal(m.tables[i].tensor, expected.tables[i].tensor) for i in m.tables)
    return _after(folder, "done", same, True)


def single(folder: Path, failing: Callable) -> str | None:
    write_whole(folder / "file", b"old")
    TokenMap.identity(9).save(folder / "map")
    outcome = failing(lambda: write_whole(folder / "file", b"new"))
    content = (folder / "file").read_bytes()
    outcome_map = failing(lambda: TokenMap.identity(10).save(folder / "map"))
    size = TokenMap.load(folder / "map").size
    return _after(folder, outcome, content == b"new", content == b"old") or _after(
        folder, outcome_map, size == 10, size == 9
    )
