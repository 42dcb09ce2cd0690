"""Ctrl-C at any moment of a call that works on several threads: no crash, each row old or new, all usable afterwards.

The tests run this file in a separate process, in which a thread sends SIGINT repeatedly.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator

import pytest
import torch

from engram.tables import EncodedTable, HostTable, RowAdagrad, RowAdam, RowRMS, RowSinkhorn, kernels

KINDS = {"rms": RowRMS, "adam": RowAdam, "adagrad": RowAdagrad, "sinkhorn": RowSinkhorn}
ROWS, DIM, N = 20_000, 64, 30_000


class Interrupter:
    """Send SIGINT from a thread, up to three times, at random moments of `attempt`. Outside `attempt` it is ignored."""

    def __init__(self, seed: int):
        self.random, self.armed, self.hits = random.Random(seed), False, 0
        signal.signal(signal.SIGINT, self._handle)

    def _handle(self, _: int, frame) -> None:
        if self.armed and frame.f_code is not Interrupter.attempt.__code__:  # the library's code is running
            self.hits += 1
            raise KeyboardInterrupt

    def attempts(self, interrupts: int) -> Iterator[int]:
        """Yield attempt numbers until `interrupts` signals arrived. The load decides how many it takes."""
        until = self.hits + interrupts
        for attempt in range(20 * interrupts):
            if self.hits >= until:
                return
            yield attempt

    def attempt(self, call, within: float) -> bool:
        """Run call() and interrupt it. Return True if it ran to its end."""
        delays = [self.random.random() * within, *(self.random.choice([0, 2e-5, 3e-4]) for _ in range(2))]

        def send() -> None:
            for delay in delays[: self.random.randint(1, 3)]:
                time.sleep(delay)
                os.kill(os.getpid(), signal.SIGINT)

        thread, began, whole = threading.Thread(target=send), False, False
        while True:
            try:
                if not began:
                    began = True
                    thread.start()
                    self.armed = True
                    call()
                    whole = True
                self.armed = False
                thread.join()
                return whole
            except KeyboardInterrupt:
                pass


def random_rows(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, DIM, generator=torch.Generator().manual_seed(seed))


def time_of(call) -> float:
    call()
    began = time.perf_counter()
    call()
    return 1.2 * (time.perf_counter() - began) + 2e-4


def reads(interrupter: Interrupter, interrupts: int) -> dict[str, int]:
    """Gather rows and hash ids under interrupts, which free buffers, and check that nothing writes into freed ones."""
    from engram import HashLayout, NgramHasher, TokenMap

    table, encoded = HostTable(ROWS, DIM), EncodedTable(ROWS, DIM, "fp8")
    table.tensor.copy_(random_rows(ROWS, 0))
    encoded.write(torch.arange(ROWS), table.tensor)
    hasher = NgramHasher(HashLayout.build(500, [1, 2], [2, 3], 8, 5000, pad_id=0), TokenMap.identity(500))
    ids = torch.randint(0, ROWS, (2 * N,), generator=torch.Generator().manual_seed(1))
    text = torch.randint(0, 500, (8, 4000), generator=torch.Generator().manual_seed(2))
    cut = wrong = 0
    for call in (lambda: table.gather(ids), lambda: encoded.gather(ids), lambda: hasher(text), encoded.validate):
        within = time_of(call)
        for _ in interrupter.attempts(interrupts):
            cut += not interrupter.attempt(call, within)
            again = [torch.full((size,), 7, dtype=torch.uint8) for size in (ids.numel() * DIM * 4, 1 << 20)]
            time.sleep(0.002)
            wrong += not all(bool((buffer == 7).all()) for buffer in again)
        wrong += not torch.equal(table.gather(ids), table.tensor[ids])
    return {"cut": cut, "wrong": wrong}


def writes(interrupter: Interrupter, interrupts: int) -> dict[str, int]:
    """Encode rows under interrupts, and check that each stored row is the old or the new one."""
    tables = [EncodedTable(ROWS, DIM, "int8") for _ in range(3)]
    ids = torch.arange(ROWS)
    for seed, table in enumerate(tables):
        table.write(ids, random_rows(ROWS, seed))
    old, new, subject = tables
    within, cut, wrong = time_of(lambda: new.write(ids, random_rows(ROWS, 1))), 0, 0
    rows = random_rows(ROWS, 1)
    for _ in interrupter.attempts(interrupts):
        subject.tensor.copy_(old.tensor)
        cut += not interrupter.attempt(lambda: subject.write(ids, rows), within)
        same = (subject.tensor == old.tensor).all(1) | (subject.tensor == new.tensor).all(1)
        wrong += int((~same).sum())
    return {"cut": cut, "wrong": wrong}


def steps(interrupter: Interrupter, interrupts: int, kind: str) -> dict[str, int]:
    """Run steps of a row optimizer under interrupts, and compare with the same steps without.

    Each row must be old or new together with its state, and `interrupted` must list the old ones.
    """
    tables = [HostTable(ROWS, DIM) for _ in range(2)]
    tables[0].tensor.copy_(random_rows(ROWS, 0))
    tables[1].tensor.copy_(tables[0].tensor)
    subject, peaceful = (KINDS[kind](table, lr=0.01) for table in tables)
    ids = torch.randint(0, ROWS, (N,), generator=torch.Generator().manual_seed(3))  # many ids occur twice
    touched, grad = ids.unique(), random_rows(N, 4)

    def parts(optimizer) -> list[torch.Tensor]:
        return [t.tensor.view(ROWS, -1)[touched] for t in (optimizer.table, *optimizer.state.values())]

    within, cut, wrong, partly = time_of(lambda: [o.step(ids, grad) for o in (subject, peaceful)]) / 2, 0, 0, 0
    for _ in interrupter.attempts(interrupts):
        old = parts(subject)
        cut += not interrupter.attempt(lambda: subject.step(ids, grad), within)
        now, left = parts(subject), subject.interrupted
        if subject.steps > peaceful.steps:  # the step began
            peaceful.step(ids, grad)
        new = parts(peaceful)
        is_old, is_new = (
            torch.stack([(a == b).all(1) for a, b in zip(now, other, strict=True)]).all(0) for other in (old, new)
        )
        wrong += int((~(is_old | is_new)).sum())
        if left is not None:
            wrong += not torch.equal(touched[~is_new], left.sort().values)
            partly += 0 < left.numel() < touched.numel()
        subject._unfinished = None
        tables[0].tensor.copy_(tables[1].tensor)
        for name, state in subject.state.items():
            state.tensor.copy_(peaceful.state[name].tensor)
    return {"cut": cut, "wrong": wrong, "partly": partly}


def campaign(interrupts: int, torchs: int, ours: int) -> None:
    torch.set_num_threads(torchs)
    kernels.set_threads(ours)
    interrupter, counts = Interrupter(seed=5), {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts["reads"] = reads(interrupter, interrupts)
        counts["writes"] = writes(interrupter, interrupts)
        for kind in KINDS:
            counts[kind] = steps(interrupter, interrupts, kind)
    done: list[int] = []
    kernels.spread(1000, 10, lambda lo, hi: done.extend(range(lo, hi)))
    counts["pool"] = {"cut": interrupter.hits, "wrong": sorted(done) != list(range(1000))}
    print(json.dumps(counts))


@pytest.fixture(scope="module", params=["6 1 3", "3 2 2"], ids=["on the pool", "on torch's threads"])
def counts(request):
    if kernels.native is None:
        pytest.skip("without kernels, threads are torch's")
    line = [sys.executable, __file__, *request.param.split()]
    run = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, f"ended with {run.returncode}: {run.stderr[-2000:]}"
    return json.loads(run.stdout)


@pytest.mark.parametrize("what", ["reads", "writes", *KINDS, "pool"])
def test_after_an_interrupt_at_any_moment_each_row_is_old_or_new_and_the_threads_work(counts, what):
    assert counts[what]["wrong"] == 0
    assert counts[what]["cut"] > 0  # interrupts did arrive


def after_pieces(monkeypatch, count: int) -> None:
    """Make the next call of spread raise KeyboardInterrupt after `count` pieces."""
    real = kernels.spread

    def spread(n, smallest, work, *held):
        for i in range(count):
            work(n * i // 8, n * (i + 1) // 8)
        monkeypatch.setattr(kernels, "spread", real)
        raise KeyboardInterrupt

    monkeypatch.setattr(kernels, "spread", spread)


@pytest.mark.skipif(kernels.native is None, reason="without kernels, a step is stored as a whole")
@pytest.mark.parametrize("kind", ["rms", "adam", "adagrad"])
@pytest.mark.parametrize("pieces", [0, 3, 8])
def test_an_interrupted_step_lists_the_rows_that_it_did_not_update_and_the_next_step_warns(monkeypatch, kind, pieces):
    table = HostTable(100, 4)
    optimizer = KINDS[kind](table, lr=0.1)
    ids, grad = torch.arange(20, 100), torch.ones(80, 4)
    after_pieces(monkeypatch, pieces)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(ids, grad)
    reached = 10 * pieces
    assert (table.tensor[20 : 20 + reached] < 0).all() and table.tensor[20 + reached :].count_nonzero() == 0
    if pieces == 8:
        assert optimizer.interrupted is None
        return
    assert optimizer.interrupted.tolist() == list(range(20 + reached, 100))
    with pytest.warns(UserWarning, match=rf"interrupted before it updated {80 - reached} of its rows"):
        optimizer.step(ids[:1], grad[:1])
    assert optimizer.interrupted is None


def test_an_interrupted_step_without_kernels_is_complete_or_has_no_effect(monkeypatch):
    monkeypatch.setattr(kernels, "native", None)
    for kind in KINDS.values():
        table = HostTable(50, 4)
        optimizer = kind(table, lr=0.1)
        real = kernels.wait

        def interrupted(futures, real=real):
            monkeypatch.setattr(kernels, "wait", real)
            raise KeyboardInterrupt

        monkeypatch.setattr(kernels, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(torch.arange(50), torch.randn(50, 4))
        assert table.tensor.any(1).all() and optimizer.interrupted is None


def test_after_an_error_spread_skips_the_remaining_pieces_and_waits_for_running_ones():
    running, begun = threading.Event(), []

    def work(lo: int, hi: int) -> None:
        begun.append(lo)
        if threading.current_thread() is threading.main_thread():
            running.wait(5)  # a helper thread is running its piece
            raise SystemExit(3)
        running.set()
        time.sleep(0.2)
        ended.append(lo)

    ended: list[int] = []
    if kernels.native is None:
        pytest.skip("one thread")
    with pytest.raises(SystemExit):
        kernels.spread(1000, 10, work)
    assert len(begun) == 2 and len(ended) == 1


if __name__ == "__main__":
    campaign(*map(int, sys.argv[1:]))
