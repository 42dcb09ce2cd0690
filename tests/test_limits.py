"""What a container leaves of its machine: cores, free memory, and the pages and threads that follow from them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from engram.storage import limits, mapping
from engram.tables import HostTable, kernels

MIB, GIB = 1 << 20, 1 << 30


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """machine(files): a machine with 8 cores and 20 GiB free, on which these are the files of control groups."""
    monkeypatch.setattr(limits, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(limits, "PROC", tmp_path / "proc")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)

    def make(groups: str, files: dict[str, object]) -> None:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable: {20 * GIB // 1024} kB\n")
        (tmp_path / "proc/self/cgroup").write_text(groups)
        for name, content in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n")

    return make


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {}, 8),
        ("0::/\n", {"cpu.max": "max 100000"}, 8),
        ("0::/\n", {"cpu.max": "200000 100000"}, 2),
        ("0::/\n", {"cpu.max": "250000 100000"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000"}, 1),
        ("0::/\n", {"cpu.max": "1600000 100000"}, 8),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "100000 50000"}, 2),
        ("4:cpu,cpuacct:/x\n0::/\n", {"cpu,cpuacct/x/cpu.cfs_quota_us": 400000}, 8),  # no period
        (
            "4:cpu,cpuacct:/x\n0::/\n",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": 400000, "cpu,cpuacct/x/cpu.cfs_period_us": 100000},
            4,
        ),
        ("1:cpu:/docker/abc\n", {"cpu/cpu.cfs_quota_us": 300000, "cpu/cpu.cfs_period_us": 100000}, 3),  # not visible
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": -1, "cpu/cpu.cfs_period_us": 100000}, 8),
        ("0::/../..\n", {"cpu.max": "200000 100000"}, 2),
        ("0::/\n", {"cpu.max": "damaged"}, 8),
    ],
)
def test_cores_are_those_that_affinity_and_quotas_leave(machine, groups, files, expected):
    machine(groups, files)
    assert limits.cores() == expected


V1 = "memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {}, 20 * GIB),
        ("0::/\n", {"memory.max": "max", "memory.current": GIB}, 20 * GIB),
        ("0::/\n", {"memory.max": 2 * GIB, "memory.current": GIB}, GIB),
        ("0::/\n", {"memory.max": 90 * GIB, "memory.current": GIB}, 20 * GIB),
        ("0::/\n", {"memory.max": 2 * GIB, "memory.current": 3 * GIB}, 0),
        ("0::/\n", {"memory.max": "max", "memory.high": 3 * GIB, "memory.current": GIB}, 2 * GIB),
        ("0::/a/b\n", {"a/memory.max": 4 * GIB, "a/memory.current": GIB, "a/b/memory.max": "max"}, 3 * GIB),
        (
            "0::/\n",
            {"memory.max": 2 * GIB, "memory.current": 2 * GIB, "memory.stat": f"anon 5\ninactive_file {GIB}"},
            GIB,
        ),
        ("4:memory:/\n", {V1[0]: 2 * GIB, V1[1]: GIB}, GIB),
        ("4:memory:/docker/abc\n", {V1[0]: 2 * GIB, V1[1]: GIB}, GIB),
        ("4:memory:/\n", {V1[0]: 9223372036854771712, V1[1]: GIB}, 20 * GIB),
    ],
)
def test_free_memory_is_what_the_machine_and_every_control_group_leave(machine, groups, files, expected):
    machine(groups, files)
    assert limits.free_memory() == expected


def test_a_system_without_proc_knows_no_free_memory_and_counts_its_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "PROC", tmp_path)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert limits.free_memory() == 0 and limits.cores() == os.cpu_count()


def test_huge_pages_are_for_tables_that_fit_into_the_memory_of_the_container(machine, monkeypatch):
    def sizes() -> list[int]:
        return [len(memory) for memory in mapping._on_huge_pages.living()]

    machine("0::/\n", {"memory.max": 64 * MIB, "memory.current": 0})
    monkeypatch.setattr(mapping, "_on_huge_pages", type(mapping._on_huge_pages)())
    large, small = HostTable(40 * MIB // 256, 64), HostTable(30 * MIB // 256, 64)
    assert sizes() == [small.nbytes]
    another = HostTable(30 * MIB // 256, 64)  # fits alone, not beside the other
    assert sizes() == [small.nbytes]
    for table in (large, small, another):
        table.close()
    assert sizes() == []


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_few_rows_of_a_large_table_in_a_small_container_make_few_pages_resident(machine):
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    machine("0::/\n", {"memory.max": GIB, "memory.current": 0})
    table = HostTable(4 * GIB // 256, 64)
    before = resident()
    table.write(torch.arange(100) * (table.rows // 100), torch.ones(100, 64))
    assert resident() - before < 16 * MIB
    table.close()


def test_the_number_of_threads_follows_torch_unless_it_was_set(monkeypatch):
    monkeypatch.setattr(kernels, "_fixed", None)
    monkeypatch.setattr(kernels, "CORES", 8)
    monkeypatch.setattr(kernels, "_torch_began_with", 8)
    for torchs, expected in ((8, 8), (3, 3), (16, 8)):
        monkeypatch.setattr(torch, "get_num_threads", lambda torchs=torchs: torchs)
        assert kernels.threads() == expected
    monkeypatch.setattr(kernels._threads, "count", kernels._threads.count)
    kernels.set_threads(5)
    assert kernels.threads() == kernels.CORES == 5 and kernels._threads.count >= 4


@pytest.mark.parametrize(("count", "error"), [(0, ValueError), (-2, ValueError), (1.5, TypeError), (True, TypeError)])
def test_a_number_of_threads_that_cannot_be_is_refused(count, error):
    with pytest.raises(error, match=r"threads must be 1 or more|count must be an int"):
        kernels.set_threads(count)


@pytest.mark.parametrize("text", ["0", "two", "-1", "1.5"])
def test_the_environment_says_how_many_threads_or_is_refused(monkeypatch, text):
    monkeypatch.setenv("ENGRAM_THREADS", "3")
    assert kernels._from_environment() == 3
    monkeypatch.setenv("ENGRAM_THREADS", text)
    with pytest.raises(ValueError, match="ENGRAM_THREADS is a number of threads"):
        kernels._from_environment()
