"""SIGKILL at a random moment of training, saving, converting, encoding: files are old, new or absent, never mixed."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

from campaign_parts import Child, Tally, equal, killed, memory, model, trained, values

from engram import EngramMemory
from engram.integrations.formats import convert
from engram.integrations.formats.readers import open_source
from engram.storage.manifest import verify


def leftovers(home: Path) -> list[str]:
    return [path.name for path in home.rglob(".*") if ".partial-" in path.name or path.name.endswith(".tmp")]


def kills(count: int, home: Path, draw: random.Random) -> Tally:
    tally = Tally("kills")
    share = [count - 3 * (count // 4), *[count // 4] * 3]
    training(share[0], home / "training", draw, tally)
    saving(share[1], home / "saving", draw, tally)
    converting(share[2], home / "converting", draw, tally)
    encoding(share[3], home / "encoding", draw, tally)
    return tally


def training(count: int, home: Path, draw: random.Random, tally: Tally) -> None:
    expected, began = trained(model()), time.monotonic()
    trained(model())
    whole = time.monotonic() - began
    done = 0
    while done < count:
        shutil.rmtree(home, ignore_errors=True)
        for attempt in range(1000):
            if attempt % 5 == 4 or done >= count:  # not killed, so that every run is compared
                result = Child(lambda: equal(trained(model(home / "rows"), home / "run"), expected)).wait()
            else:
                work = lambda: equal(trained(model(home / "rows"), home / "run"), expected)  # noqa: E731
                result = killed(work, draw.random() * whole)
                done += result == ["killed"]
            if not tally.ended_well(result, "training"):
                break
            if result[0] == "refused":
                if "cut short" not in result[2]:
                    tally.fault(f"training after a kill: {result}")
                    break
                shutil.rmtree(home / "rows")  # the remedy in the message
            elif result[0] == "done":
                if not result[1]:
                    tally.fault("training ended with other weights or rows after kills")
                break


def saving(count: int, home: Path, draw: random.Random, tally: Tally) -> None:
    home.mkdir(parents=True)
    memories = [memory(seed) for seed in range(2)]
    contents, target = [values(m) for m in memories], home / "memory"
    began = time.monotonic()
    memories[0].save(target)
    whole = time.monotonic() - began
    shutil.rmtree(target)
    for number in range(count):
        work, after = lambda n=number: str(memories[n % 2].save(target, overwrite=True)), draw.random() * 1.5 * whole
        tally.ended_well(killed(work, after), "saving")
        if target.exists():
            loaded = values(EngramMemory.load(target))
            if not any(equal(loaded, content) for content in contents):
                tally.fault(f"saving: kill {number} left a memory that is neither of the two")
            if any(result["problem"] for result in verify(target)):
                tally.fault(f"saving: kill {number} left a memory in which verify reports errors")
    memories[0].save(target, overwrite=True)
    if leftovers(home):
        tally.fault(f"saving: {leftovers(home)} are left")


def converting(count: int, home: Path, draw: random.Random, tally: Tally) -> None:
    home.mkdir(parents=True)
    source = memory(0).save(home / "source")
    formats, whole = ("deepseek-v4.1", "gguf", "engram"), {}
    for to in formats:
        began = time.monotonic()
        convert(source, home / to, to)
        whole[to] = time.monotonic() - began
    for number in range(count):
        to = formats[number % 3]
        target = home / f"x-{to}"
        work, after = lambda to=to, target=target: len(convert(source, target, to)), draw.random() * 1.5 * whole[to]
        tally.ended_well(killed(work, after), "converting")
        if target.exists() and not same_content(home / to, target):
            tally.fault(f"converting to {to}: kill {number} left incomplete or other files")
        if target.is_dir():
            shutil.rmtree(target)
        target.unlink(missing_ok=True)
        if number + 3 >= count:  # a conversion after the kills removes what they left
            convert(source, target, to)
            if not same_content(home / to, target):
                tally.fault(f"converting to {to}: the conversion after kills wrote other files")
    if leftovers(home):
        tally.fault(f"converting: {leftovers(home)} are left")


def same_content(one: Path, two: Path) -> bool:
    if one.is_file():
        return two.is_file() and one.read_bytes() == two.read_bytes()
    if sorted(p.name for p in one.iterdir()) != sorted(p.name for p in two.iterdir()):
        return False
    a, b = open_source(one), open_source(two)
    rows = all(equal([a.rows[i].read(0, 500)], [b.rows[i].read(0, 500)]) for i in a.rows)
    weights = all(equal(list(a.weights[i].values()), list(b.weights[i].values())) for i in a.rows)
    return rows and weights


def encoding(count: int, home: Path, draw: random.Random, tally: Tally) -> None:
    codecs = ("pq4", "int8", "fp8")
    expected, whole = {}, {}
    for codec in codecs:
        m, began = memory(0), time.monotonic()
        m.encode_tables(codec, home / codec)
        whole[codec] = time.monotonic() - began
        m.close()
        expected[codec] = {path.name: path.read_bytes() for path in (home / codec).iterdir()}
    m = memory(0)
    for number in range(count):
        codec, folder = codecs[number % 3], home / f"x-{codecs[number % 3]}"
        result = killed(lambda c=codec, f=folder: m.encode_tables(c, f), draw.random() * 1.5 * whole[codec])
        tally.ended_well(result, "encoding")
        found = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} if folder.exists() else {}
        if any(expected[codec].get(name) != content for name, content in found.items()):
            tally.fault(f"encoding {codec}: kill {number} left part of a table")
        rows = {name for name in found if not name.endswith(".codebooks")}
        if any(f"{name}.codebooks" in expected[codec] and f"{name}.codebooks" not in found for name in rows):
            tally.fault(f"encoding {codec}: kill {number} left rows without codebooks")
        for name in found:
            (folder / name).unlink()
        if number + 3 >= count:
            tally.ended_well(Child(lambda c=codec, f=folder: m.encode_tables(c, f)).wait(), "encoding after kills")
    if leftovers(home):
        tally.fault(f"encoding: {leftovers(home)} are left")
