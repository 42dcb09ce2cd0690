"""Recalls in flight beside other threads and in forked processes."""

from __future__ import annotations

import copy
import gc
import os
import signal
import sys
import threading
import time

import pytest
import torch

from engram import EngramConfig, EngramMemory, HostTable, TokenMap, Transformer, TransformerConfig, build_optimizer
from engram.memory.recall import Recall
from engram.storage.weak import WeakList
from engram.tables import kernels, prefetch

SMALL = EngramConfig(layers=(1, 2), orders=(2, 3), heads=2, head_dim=32, rows_per_head=211)


def make() -> EngramMemory:
    torch.manual_seed(0)
    memory = EngramMemory(SMALL, TokenMap.identity(50), 32)
    for table in memory.tables.values():
        table.write(torch.arange(table.rows), torch.randn(table.rows, table.dim))
    return memory


def text(seed=0):
    return torch.randint(0, 50, (2, 20), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def threaded(monkeypatch):
    monkeypatch.setattr("engram.memory.recall._WORTH_A_THREAD", 0)  # the fetching thread runs even for this small text


@pytest.fixture
def stuck(monkeypatch, threaded):
    """Keep the fetching thread busy, so that later requests stay in flight."""
    monkeypatch.setattr(prefetch, "_thread", kernels.Threads(1, "stuck"))
    go_on = threading.Event()
    busy = prefetch._thread.pool.submit(go_on.wait, 60)
    yield
    go_on.set()
    busy.result()


def child(work, seconds=30) -> int:
    """Return the exit code of work() in a forked process: 0 if it returns True."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if work() else 1)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(2)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("the child hangs")


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


def use(memory, recall, wanted):
    return torch.equal(recall.rows(2), wanted)


def hashes(memory, recall, wanted):
    return torch.equal(recall.row_ids[1], memory.recall(text()).row_ids[1])


def patches(memory, recall, wanted):
    memory.patch(2, torch.arange(4))
    return torch.equal(recall.rows(2), wanted)


def writes(memory, recall, wanted):
    row = recall.row_ids[2][0, 3, 1:2]
    memory.tables[2].write(row, torch.full((1, 32), 9.0))
    memory.patch(2, row)
    return torch.equal(recall.rows(2).unflatten(2, (4, 32))[0, 3, 1], torch.full((32,), 9.0))


def renews(memory, recall, wanted):
    memory.load_state_dict(memory.state_dict())
    return torch.equal(recall.rows(2), wanted)


def encodes(memory, recall, wanted):
    memory.encode_tables("fp8")
    return torch.equal(recall.rows(2), memory.recall(text()).rows(2))


def trains(memory, recall, wanted):
    model = Transformer(TransformerConfig(50, hidden_size=32, layers=3, heads=2), memory)
    optimizer = build_optimizer(model)
    for given in (recall, memory.recall(text(1))):
        model(text(), recall=given).logsumexp(-1).mean().backward()
        optimizer.step()
    return not torch.equal(recall.rows(2), wanted)


@forks
@pytest.mark.parametrize("work", [use, hashes, patches, writes, renews, encodes, trains])
def test_a_forked_process_fetches_rows_in_flight_again(stuck, work):
    memory = make()
    wanted = memory.tables[2].gather(memory.hasher(text())[2]).flatten(2)
    recall = memory.recall(text())
    assert child(lambda: work(memory, recall, wanted)) == 0


@forks
def test_a_fork_in_the_middle_of_a_fetch_or_a_patch_blocks_no_child(threaded, monkeypatch):
    memory, inside, go_on = make(), threading.Event(), threading.Event()
    wanted = memory.tables[2].gather(memory.hasher(text())[2]).flatten(2)
    gather, here = HostTable.gather, os.getpid()

    def slow(self, *args, **kwargs):
        if os.getpid() == here:
            inside.set()
            go_on.wait(30)
        return gather(self, *args, **kwargs)

    monkeypatch.setattr(HostTable, "gather", slow)
    recall = memory.recall(text())
    other = threading.Thread(target=memory.patch, args=(2, torch.arange(4)))  # holds the recall while it waits
    assert inside.wait(30)
    other.start()
    time.sleep(0.05)
    try:
        assert child(lambda: use(memory, recall, wanted) and patches(memory, recall, wanted)) == 0
    finally:
        go_on.set()
        other.join()
    assert torch.equal(recall.rows(2), wanted)


@forks
def test_rows_that_had_arrived_before_a_fork_are_those_of_the_child(threaded):
    memory = make()
    recall = memory.recall(text())
    before = recall.rows(2).clone()
    assert child(lambda: use(memory, recall, before) and writes(memory, recall, before)) == 0
    assert torch.equal(recall.rows(2), before)  # a table in memory is the child's own


def test_an_error_of_the_work_is_raised_in_every_use(threaded):
    def fail():
        raise OSError("no such row")

    task = prefetch.Task(fail, True)
    task.end()
    for _ in range(2):
        with pytest.raises(OSError, match="no such row"):
            task.result()
    with pytest.raises(OSError, match="no such row"):
        prefetch.Task(fail, False)


# --- threads ---


@pytest.fixture
def often_switched():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(*works, seconds=1.5):
    """Run each work(turn) repeatedly on its own thread, and raise what one of them raised."""
    errors, until = [], time.monotonic() + seconds

    def run(work):
        turn = 0
        try:
            while not errors and time.monotonic() < until:
                work(turn)
                turn += 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_recalls_of_one_thread_do_not_disturb_the_updates_of_another(often_switched):
    memory = make()
    model = Transformer(TransformerConfig(50, hidden_size=32, layers=3, heads=2), memory)
    optimizer = build_optimizer(model)

    def train(turn):
        model(text(turn)).logsumexp(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    many = [memory.recall(text(i)) for i in range(100)]

    def look(turn):
        many[turn % 100] = memory.recall(text(turn))
        assert many[turn % 100].rows(1).shape == (2, 20, 128)

    together(train, look, look)


def test_a_recall_may_be_used_renewed_and_patched_at_once(often_switched, threaded):
    memory, shared = make().eval(), []
    wanted = memory.recall(text()).rows(1).clone()
    touched = torch.arange(memory.tables[1].rows)
    shared.append(memory.recall(text()))

    def use_it(turn):
        if turn % 3 == 0:
            shared[0] = memory.recall(text())
        assert torch.equal(shared[0].rows(1), wanted)

    def renew_all(turn):
        for recall in memory.recalls.living():
            recall.renew()

    together(use_it, lambda turn: memory.patch(1, touched), renew_all)


def test_a_row_written_while_its_recall_begins_is_renewed(threaded, monkeypatch):
    """A recall is known before it reads: an update that overtakes its fetch finds it."""
    memory = make().eval()
    row = memory.hasher(text())[1][0, 3, 2:3]
    gather, started, written = HostTable.gather, threading.Event(), threading.Event()

    def slow(self, *args, **kwargs):
        found = gather(self, *args, **kwargs)
        if not started.is_set():
            started.set()
            written.wait(30)
        return found

    monkeypatch.setattr(HostTable, "gather", slow)
    made = []
    maker = threading.Thread(target=lambda: made.append(memory.recall(text())))
    maker.start()
    assert started.wait(30)
    memory.tables[1].write(row, torch.full((1, 32), 9.0))
    patcher = threading.Thread(target=memory.patch, args=(1, row))
    patcher.start()
    written.set()
    patcher.join()
    maker.join()
    assert torch.equal(made[0].rows(1).unflatten(2, (4, 32))[0, 3, 2], torch.full((32,), 9.0))


def test_a_patch_that_was_interrupted_leaves_no_old_row_behind(threaded, monkeypatch):
    memory = make().eval()
    recalls = [memory.recall(text()) for _ in range(3)]
    row = recalls[0].row_ids[1][0, 3, 2:3]
    memory.tables[1].write(row, torch.full((1, 32), 9.0))
    patch, seen = Recall.patch, []

    def stop(self, *args):
        seen.append(self)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return patch(self, *args)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Recall, "patch", stop)
        memory.patch(1, row)
    for recall in recalls:
        assert torch.equal(recall.rows(1).unflatten(2, (4, 32))[0, 3, 2], torch.full((32,), 9.0))


def test_a_weak_list_can_be_listed_while_it_changes(often_switched):
    class Thing:
        pass

    many, listed = [Thing() for _ in range(2000)], WeakList()
    for thing in many:
        listed.add(thing)

    def change(turn):
        many[turn % 2000] = Thing()
        listed.add(many[turn % 2000])

    def look(turn):
        assert all(type(thing) is Thing for thing in listed.living())

    together(change, change, look, seconds=1)


def test_a_weak_list_lists_live_objects_and_its_copy_is_empty():
    class Thing:
        pass

    kept, listed = [Thing() for _ in range(3)], WeakList()
    for thing in kept:
        listed.add(thing)
        listed.add(thing)
    assert set(listed.living()) == set(kept) and len(listed) == 3
    assert len(copy.deepcopy(listed)) == 0
    del kept[1], thing
    gc.collect()
    assert len(listed) == 2
