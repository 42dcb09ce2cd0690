"""Threads of the kernels, torch's own or a pool of ours: the same bits on any number, wherever a call comes from.

The file runs itself in processes of their own, because tests run with one torch thread: see `campaign`.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch

from engram import HashLayout, NgramHasher, TokenMap
from engram.tables import EncodedTable, HostTable, RowAdagrad, RowAdam, RowRMS, RowSinkhorn, kernels
from engram.tables.codecs import PQ

OPTIMIZERS = (RowRMS, RowAdam, RowAdagrad, RowSinkhorn)
ROWS, DIM, N = 3000, 64, 9000
TEAMS = [(1, 1), (2, 2), (3, 3), (5, 5), (1, 3), (2, 5)]  # threads of torch and of the kernels


@cache
def random_rows(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed))


@cache
def row_ids(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, ROWS, (n,), generator=torch.Generator().manual_seed(seed))


def digest(*arrays) -> str:
    whole = hashlib.sha256()
    for array in arrays:
        whole.update(np.ascontiguousarray(array).view(np.uint8))
    return whole.hexdigest()


def gathered(dtype: torch.dtype, init: str) -> str:
    table = HostTable(ROWS, DIM, dtype, init=init, seed=3)
    table.write(torch.arange(0, ROWS, 3), random_rows(ROWS // 3))
    return digest(table.gather(row_ids(N), torch.empty(N, DIM)).numpy())


def trained(kind: type, dtype: torch.dtype = torch.float32) -> str:
    table = HostTable(ROWS, DIM, dtype, init="normal", seed=3)
    optimizer = kind(table)
    for step in range(3):
        optimizer.step(row_ids(N, step), random_rows(N, step))  # each row several times
    rows = (table.tensor, *(state.tensor for state in optimizer.state.values()))
    return digest(*(part.view(torch.uint8).numpy() for part in rows))


def coded(codec: str | PQ) -> str:
    table = EncodedTable(N, DIM, codec)
    if isinstance(codec, PQ):  # encoded by torch, slowly
        table.tensor.copy_(torch.arange(table.tensor.numel()).view_as(table.tensor) % 251)
    else:
        table._store(random_rows(N), first=0)
        table.write(torch.arange(0, N, 2), random_rows(N // 2, 1))
        table.validate()
    return digest(table.tensor.numpy(), table.gather(row_ids(N)).numpy())


def hashed(family: str) -> str:
    layout = HashLayout.build(500, range(4), [2, 3, 4], 8, 65_536, pad_id=0, family=family)
    ids = np.random.default_rng(0).integers(0, 500, (8, 4096))
    return digest(*NgramHasher(layout, TokenMap.identity(500))(ids).values())


def works() -> dict[str, Callable[[], str]]:
    """Every kernel that is spread over threads, on enough items."""
    books = torch.randn(DIM // 4, 256, 4, generator=torch.Generator().manual_seed(0))
    books[:, 0] = 0
    return {
        "gather": lambda: gathered(torch.float32, "zero"),
        "gather of initial rows": lambda: gathered(torch.bfloat16, "normal"),
        **{kind.__name__: lambda kind=kind: trained(kind) for kind in OPTIMIZERS},
        "rounded": lambda: trained(RowRMS, torch.bfloat16),
        **{codec: lambda codec=codec: coded(codec) for codec in ("fp8", "int8", "int4")},
        "pq4": lambda: coded(PQ(books)),
        **{family: lambda family=family: hashed(family) for family in ("multiply_xor", "xxh64")},
    }


class Regions:
    """Count the parallel regions of torch's runtime that the kernels run in while the context lasts."""

    def __enter__(self) -> Regions:
        self.count, self.real = 0, kernels.native.engram_parallel
        kernels.native.engram_parallel = self.call
        return self

    def call(self, *arguments) -> int:
        self.job = arguments[0]
        state = self.real(*arguments)
        self.count += state >= 0
        return state

    def __exit__(self, *_) -> None:
        kernels.native.engram_parallel = self.real


def measured(which: list[str] | None = None) -> dict[str, list]:
    """{kernel: [digest of its results, regions it ran in]}"""
    found = {}
    for name, work in works().items():
        if which is None or name in which:
            with Regions() as regions:
                found[name] = [work(), regions.count]
    return found


def use(torchs: int, ours: int) -> None:
    torch.set_num_threads(torchs)
    kernels.set_threads(ours)


def nested() -> dict[str, dict]:
    """The kernels called inside a parallel region, and by a thread that began there."""
    parallel = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)(
        kernels._openmp()[0]
    )
    found, main = {}, threading.get_ident()

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def inside(_: int) -> None:
        if threading.get_ident() == main:
            found["nested"] = measured()
            thread = threading.Thread(target=lambda: found.update(thread=measured()))
            thread.start()
            thread.join()

    parallel(inside, None, 2, 0)
    return found


def forked() -> dict[str, list]:
    """The kernels in a forked process, which ends itself if torch's threads are waited for."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        signal.alarm(30)
        found = measured(["gather", "rounded", "RowRMS", "RowAdam", "multiply_xor"])
        os.write(writing, json.dumps(found).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    assert os.waitpid(child, 0)[1] == 0, "the forked process waited for threads that it does not have"
    return json.loads(text)


def campaign() -> dict[str, dict]:
    found: dict[str, dict] = {}
    for torchs, ours in TEAMS:
        use(torchs, ours)
        found[f"{torchs} {ours}"] = measured()
    use(2, 2)
    found |= nested()
    found["forked"] = forked()
    mirror = ctypes.CFUNCTYPE(ctypes.c_int)
    wrong = mirror(lambda: 99)  # the number of threads of a runtime that torch does not use
    parallel, in_parallel, _ = kernels._openmp()
    kernels.native.engram_use_openmp(parallel, in_parallel, ctypes.cast(wrong, ctypes.c_void_p))
    found["another runtime"] = measured()
    kernels._openmp = lambda: None
    kernels._joined = kernels._join_torch()
    found["no symbol"] = measured()
    return found


def run(what: str, **environment: str) -> dict[str, dict]:
    clean = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "ENGRAM_THREADS")}
    line = [sys.executable, __file__, what]
    done = subprocess.run(line, capture_output=True, text=True, timeout=200, env=clean | environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def found() -> dict[str, dict]:
    if not kernels._joined:
        pytest.skip("no compiled kernels, or no OpenMP runtime in this torch")
    return run("campaign")


@pytest.mark.parametrize("where", [*(f"{a} {b}" for a, b in TEAMS[1:]), "nested", "thread", "forked"])
def test_every_kernel_gives_the_same_bits_on_any_threads(found, where):
    assert len(found[where]) == (5 if where == "forked" else len(works()))
    for name, (result, _) in found[where].items():
        assert result == found["1 1"][name][0], name


@pytest.mark.parametrize("where", ["another runtime", "no symbol"])
def test_without_torchs_runtime_the_pool_gives_the_same_bits(found, where):
    assert {name: result for name, (result, _) in found[where].items()} == {
        name: result for name, (result, _) in found["1 1"].items()
    }
    assert not any(regions for _, regions in found[where].values())


def test_kernels_run_on_torchs_threads_where_their_numbers_are_equal(found):
    for team in ("2 2", "3 3", "5 5"):
        assert all(regions > 0 for _, regions in found[team].values())
    for elsewhere in ("1 1", "1 3", "2 5", "nested", "thread", "forked"):
        assert not any(regions for _, regions in found[elsewhere].values())


@pytest.mark.skipif(kernels.native is None, reason="no compiled kernels here")
@pytest.mark.parametrize("setting", [{"OMP_NUM_THREADS": "1"}, {"ENGRAM_THREADS": "1"}])
def test_settings_of_the_environment_change_no_bit(found, setting):
    for name, (result, regions) in run("as set", **setting).items():
        assert (result, regions) == (found["1 1"][name][0], 0)


class Slow(kernels.Call):
    """A call whose pieces take `seconds` and are noted; refuses the items that `refused` names."""

    def __init__(self, seconds: float, refused: range = range(0)):
        self.pieces: list[tuple[int, int]] = []

        @ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64)
        def function(_: bytes, lo: int, hi: int) -> int:
            time.sleep(seconds)
            self.pieces.append((lo, hi))
            return next((item for item in range(lo, hi) if item in refused), -1)

        self.function, self.address = function, ctypes.cast(function, ctypes.c_void_p).value
        self.arguments = b""


def slow() -> dict[str, dict]:
    """Pieces that take longer than a region may, some that are refused, and an interrupt between two of them."""
    use(2, 2)
    found = {}
    for name, refused in (("whole", range(0)), ("refused", range(777, 5000))):
        work = Slow(0.02, refused)
        with Regions() as regions:
            item = kernels.spread(1000, 10, work)
        found[name] = {"item": item, "regions": regions.count, "pieces": sorted(work.pieces)}
    table = HostTable(2**28, 16)  # 16 GiB of address space, read in a second
    words = kernels.Call("read_words", table.tensor.data_ptr())
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    with Regions() as regions:
        try:
            kernels.spread(2**31, 2**17, words, table)
        except KeyboardInterrupt:
            found["interrupted"] = {"begun": regions.job[0], "pieces": regions.job[1]}
    return found


@pytest.fixture(scope="module")
def pieces() -> dict[str, dict]:
    if not kernels._joined:
        pytest.skip("no compiled kernels, or no OpenMP runtime in this torch")
    return run("slow")


def test_long_work_takes_several_regions_and_does_every_piece_once(pieces):
    for what, item in (("whole", -1), ("refused", 777)):
        assert pieces[what]["item"] == item and pieces[what]["regions"] > 1
        assert [lo for lo, _ in pieces[what]["pieces"]] == list(range(0, 1000, 125))
        assert [hi for _, hi in pieces[what]["pieces"]] == list(range(125, 1001, 125))


def test_an_interrupt_ends_a_call_between_two_regions(pieces):
    assert 0 < pieces["interrupted"]["begun"] < pieces["interrupted"]["pieces"]


@pytest.mark.parametrize(
    ("fixed", "cores", "torchs", "expected"),
    [
        (None, 8, 8, (8, True)),
        (None, 8, 3, (3, True)),
        (None, 8, 1, (1, False)),
        (None, 8, 16, (8, False)),  # a control group leaves fewer cores than torch has threads
        (4, 4, 4, (4, True)),
        (4, 4, 8, (4, False)),
        (8, 8, 4, (8, False)),
        (1, 1, 1, (1, False)),
    ],
)
def test_a_number_of_threads_that_is_torchs_means_torchs_threads(monkeypatch, fixed, cores, torchs, expected):
    monkeypatch.setattr(kernels, "_fixed", fixed)
    monkeypatch.setattr(kernels, "CORES", cores)
    monkeypatch.setattr(kernels, "_torch_began_with", 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: torchs)
    monkeypatch.setattr(kernels, "_joined", True)
    assert kernels._team() == expected and kernels.threads() == expected[0]
    monkeypatch.setattr(kernels, "_joined", False)
    assert kernels._team() == (expected[0], False)


@pytest.mark.skipif(kernels.native is None, reason="no compiled kernels here")
@pytest.mark.parametrize("n", [1, 16, 64, 1000])
def test_few_rows_are_gathered_by_the_calling_thread(monkeypatch, n):
    monkeypatch.setattr(kernels, "_team", lambda: pytest.fail("asked for threads"))
    table = HostTable(ROWS, DIM)
    table.tensor.copy_(random_rows(ROWS))
    assert torch.equal(table.gather(row_ids(n)), table.tensor[row_ids(n)])


if __name__ == "__main__":
    print(json.dumps({"campaign": campaign, "slow": slow, "as set": measured}[sys.argv[1]]()))
