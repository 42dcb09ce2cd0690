"""Files with a flipped bit, a cut end or a foreign piece: an error names the file, or its values are read unchanged."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import toy
from campaign_parts import DEADLINE, Child, Tally, equal, memory, model, trained, values

from engram import EngramMemory, TokenMap, build_optimizer
from engram.integrations.formats import convert, inspect_file
from engram.integrations.formats.readers import open_source, read_config
from engram.lm.checkpoint import load_checkpoint, save_checkpoint
from engram.storage.manifest import verify

BATCH = 50


def mutants(count: int, home: Path, draw: random.Random) -> Tally:
    tally = Tally("mutants")
    home.mkdir(parents=True)
    subjects = list(_subjects(home / "whole").items())
    per = -(-count // len(subjects))
    for name, (folder, check) in subjects:
        files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        for start in range(0, per, BATCH):
            seeds = [draw.random() for _ in range(min(BATCH, per - start))]
            work = home / "work"
            result = Child(lambda f=folder, c=check, p=files, s=seeds, w=work: _batch(f, c, p, s, w)).wait()
            if result[0] != "done":
                last = (work / "progress").read_text() if (work / "progress").exists() else "the beginning"
                tally.fault(f"{name}: {result} at {last} (after at most {DEADLINE} s)")
                continue
            for outcome, what in result[1]:
                if outcome == "WRONG":
                    tally.fault(f"{name}: {what}")
                else:
                    tally.add(outcome)
        tally.add(f"of {name}: {per}")
    return tally


def _batch(folder: Path, check: Callable, files: list[Path], seeds: list[float], work: Path) -> list:
    outcomes = []
    for seed in seeds:
        draw = random.Random(seed)
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(folder, work)
        victim = work / draw.choice(files)
        before = victim.read_bytes()
        after = damage(before, draw)
        victim.write_bytes(after)
        what = f"{victim.relative_to(work)} {len(before)} -> {len(after)} bytes, seed {seed}"
        (work / "progress").write_text(what)
        try:
            problem = check(work)
        except (OSError, ValueError, TypeError, IndexError) as error:
            if "/work" in str(error) or not isinstance(error, OSError):
                outcomes.append(["refused", ""])
            else:
                outcomes.append(["WRONG", f"{what}: {type(error).__name__} names no file: {error}"])
        except BaseException as error:
            outcomes.append(["WRONG", f"{what}: {type(error).__name__}: {error}"])
        else:
            outcomes.append(["WRONG", f"{what}: {problem}"] if problem and before != after else ["read", ""])
    return outcomes


def damage(data: bytes, draw: random.Random) -> bytes:
    kind, at = draw.random(), draw.randrange(max(len(data), 1))
    if draw.random() < 0.5:
        at = min(at, draw.randrange(4096))  # headers are at the beginning
    if kind < 0.6:
        return data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :] if data else b"x"
    if kind < 0.85:
        return data[:at]
    piece = draw.choice((b"\xff" * 8, b"\x00" * 8, b"9" * 20, b"[" * 3000, b'"', b"-1", b"1e999", b"NaN"))
    return data[:at] + piece + data[at + (len(piece) if draw.random() < 0.5 else 0) :]


def _subjects(home: Path) -> dict[str, tuple[Path, Callable[[Path], str | None]]]:
    """Return {name: (folder of undamaged files, check(copy of it) -> what is wrong if the copy was accepted)}."""
    m, t = memory(0), model()
    trained(t)
    content, rows = values(m), values(t.memory)
    m.save(home / "memory")
    encoded = memory(0)
    encoded.encode_tables("pq4")
    encoded_content = values(encoded)
    encoded.save(home / "encoded")
    save_checkpoint(home / "checkpoint", t, build_optimizer(t), 3, {"note": "whole"})
    step = next((home / "checkpoint").iterdir()).name
    for to in ("deepseek-v4.1", "deepseek-v4.1-interleaved", "gguf"):
        (home / to).mkdir()
        convert(home / "memory", home / to / "x" if to != "gguf" else home / to / "x.gguf", to)
    (home / "config").mkdir()
    shutil.copy(home / "deepseek-v4.1" / "x" / "config.json", home / "config")
    (home / "map").mkdir()
    TokenMap.identity(64).save(home / "map" / "map")
    run(home / "run")

    def saved(folder: Path, expected: list, whole: Path) -> str | None:
        found = []
        if all(result["problem"] is None for result in verify(folder)):
            found.append("verify finds it whole")
        for mode in ("copy", "shared"):
            try:
                if not equal(values(EngramMemory.load(folder, mode)), expected):
                    found.append(f"loads with other values ({mode})")
            except (OSError, ValueError):
                continue
        same = all(_alike(path, whole / path.name) for path in folder.iterdir() if path.name != "progress")
        return None if same else "; ".join(found) or None

    def checkpoint(folder: Path) -> str | None:
        found, other = [], model()
        if all(result["problem"] is None for result in verify(folder / step)):
            found.append("verify finds it whole")
        optimizer = build_optimizer(other)
        manifest = load_checkpoint(folder / step, other, optimizer)
        if not equal(values(other.memory), rows) or manifest["facts"] != {"note": "whole"}:
            found.append("loads with other values")
        same = all(_alike(path, home / "checkpoint" / step / path.name) for path in (folder / step).iterdir())
        return None if same else "; ".join(found) or None

    def record(folder: Path) -> str | None:
        from engram.lm.run import _read_run

        found = _read_run(folder)
        same = _alike(folder / "run.json", home / "run" / "run.json")
        return None if same or found["setting"] == _read_run(home / "run")["setting"] else "another setting is read"

    def header(folder: Path) -> None:
        inspect_file(folder / "x")

    def source(folder: Path) -> None:
        for layer in (opened := open_source(folder / "x")).rows:
            opened.rows[layer].read(0, 100)

    return {
        "saved memories": (home / "memory", lambda f: saved(f, content, home / "memory")),
        "encoded memories": (home / "encoded", lambda f: saved(f, encoded_content, home / "encoded")),
        "checkpoints": (home / "checkpoint", checkpoint),
        "run.json": (home / "run", record),
        "safetensors": (home / "deepseek-v4.1", source),
        "interleaved safetensors": (home / "deepseek-v4.1-interleaved", source),
        "headers": (home / "deepseek-v4.1", header),
        "GGUF": (home / "gguf", lambda f: inspect_file(f / "x.gguf") and None),
        "config.json": (home / "config", lambda f: read_config(str(f / "config.json")) and None),
        "token maps": (home / "map", lambda f: TokenMap.load(f / "map") and None),
    }


def run(home: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    from engram.lm.run import Data, Setting, save_run

    tokenizer = Tokenizer(BPE())
    data = Data(tokenizer, TokenMap.identity(toy.VOCAB), toy.corpus(), toy.corpus(), None, "digest")  # type: ignore[arg-type]
    save_run(home, Setting(), "engram", data)
    for file in home.iterdir():
        if file.name != "run.json":
            file.unlink()


def _alike(one: Path, two: Path) -> bool:
    """Return True if two files have the same bytes or the same JSON values."""
    a, b = one.read_bytes(), two.read_bytes() if two.exists() else b""
    if a == b or one.name == "progress":
        return True
    try:
        return one.suffix == ".json" and json.loads(a) == json.loads(b)
    except (ValueError, RecursionError):
        return False
