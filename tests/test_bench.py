"""Small benchmarks: every arm works, engram's comes first, every figure is a number above zero."""

from __future__ import annotations

import math

import pytest

from engram.benchmarks.attach import MEMORY, SHAPE, bench_attach
from engram.benchmarks.codecs import bench_codecs
from engram.benchmarks.compare import SITUATIONS, as_bandwidth, compare
from engram.benchmarks.decode import bench_decode
from engram.benchmarks.disk import bench_disk
from engram.benchmarks.gather_update import bench_update, lookup
from engram.benchmarks.hashing import bench_hash


def check(rows, ours):
    assert rows[0]["what"].endswith(ours) and rows[0]["ratio"] in (1.0, pytest.approx(1.0))
    assert all(math.isfinite(row["value"]) and row["value"] > 0 and row["ratio"] > 0 for row in rows)
    assert len({row["what"] for row in rows}) == len(rows) > 1


def test_lookup_measures_every_arm():
    check(lookup(1 << 20, 64, rounds=1), "engram gather(out=)")


def test_hashing_measures_every_arm_in_each_situation():
    rows = bench_hash(rounds=1, rows_per_head=50)
    check(rows, "engram, into a kept buffer")
    assert [row["situation"] for row in rows] == [s for s in SITUATIONS for _ in range(len(rows) // 3)]


def test_update_measures_every_arm():
    rows = bench_update(1 << 20, rounds=1)
    check(rows, "engram RowRMS")
    assert [row["of_sparse_adam"] for row in rows if row["what"].endswith("torch SparseAdam")] == [1, 1, 1]


def test_codecs_measure_every_arm():
    check(bench_codecs(rows=2000, dim=64, n=1000, rounds=1), "gather float32")


def test_disk_measures_every_arm(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    check(bench_disk(gigabytes=0.01, rows_per_gather=256, rounds=1), "prefetch + gather")
    assert not any(tmp_path.iterdir())


def test_attach_measures_both_arms_with_the_same_weights():
    pytest.importorskip("transformers")
    small = {"vocab_size": 64, "hidden_size": 18, "intermediate_size": 32, "num_hidden_layers": 3}
    memory = MEMORY.replace(layers=(1,), rows_per_head=64, head_dim=8)
    check(bench_attach(rounds=1, shape={**SHAPE, **small}, memory=memory), "with memory")


def test_decode_measures_a_step_and_what_is_held_at_every_position():
    pytest.importorskip("transformers")
    rows = bench_decode(positions=(20, 700, 1000), steps=2, model_positions=(1024, 2048))
    assert len(rows) == 2 * 6 + 4 and rows[0]["ratio"] == 1.0
    assert all(math.isfinite(row["value"]) and row["value"] > 0 for row in rows)
    held = [row["value"] for row in rows if "state at" in row["what"]]
    assert held[1] == held[2] and held[4] == held[5]  # beyond the margin, the state does not grow with the text


def test_arms_take_turns_and_what_they_need_is_made_off_the_clock():
    called, made = [], []
    arms = {"a": lambda: called.append("a"), "b": (lambda: made.append("x") or "x", lambda given: called.append(given))}
    rows = compare(arms, 1.0, "1/s", rounds=2)
    assert called == ["a", "x"] * 4 and made == ["x"] * 4
    assert [row["what"] for row in rows] == ["a", "b"]


def test_each_round_times_every_arm_in_each_situation(monkeypatch):
    called = []
    monkeypatch.setattr("time.sleep", lambda seconds: called.append("rest"))
    arms = {name: lambda name=name: called.append(name) for name in ("a", "b")}
    rows = compare(arms, 1.0, "s", rounds=1, times=True, situations=SITUATIONS)
    assert called == ["a", "a", "b", "b", "a", "b", "rest", "a", "rest", "b"] * 3
    assert [row["what"] for row in rows] == [f"{situation}: {name}" for situation in SITUATIONS for name in arms]
    assert [row["of_back_to_back"] for row in rows[:2]] == [1, 1]


def test_reading_in_order_becomes_the_speed_of_memory_and_the_first_arms_share_of_it():
    rows = [
        {"what": f"{situation}: {name}", "situation": situation, "seconds": seconds, "ratio": 1.0}
        for situation, times in (("x", (2.0, 1.0)), ("y", (4.0, 0.5)))
        for name, seconds in zip(("ours", "read"), times, strict=True)
    ]
    as_bandwidth(rows, "read", nbytes=10**9, moved=10**9)
    assert [(row["value"], row["unit"], row["ratio"]) for row in rows[1::2]] == [(1, "GB/s", 0.5), (2, "GB/s", 0.125)]
