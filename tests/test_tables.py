"""HostTable: rows in, rows out, exact against plain torch."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from engram.tables import EncodedTable, RowAdam, RowRMS, Table, kernels, reference
from engram.tables.table import HostTable


def resident_bytes() -> int:
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", ["zero", "normal"])
def test_written_rows_come_back_and_others_read_as_their_init(path_of, dtype, init):
    table = HostTable(1000, 24, dtype, init=init, std=0.5, seed=3)
    before = table.gather(torch.arange(1000)).clone()
    ids = torch.tensor([[5, 999], [0, 77]])
    rows = torch.randn(2, 2, 24)
    table.write(ids, rows)
    assert torch.equal(table.gather(ids), rows.to(dtype))
    others = torch.tensor([i for i in range(1000) if i not in (5, 999, 0, 77)])
    assert torch.equal(table.gather(others), before[others])
    if init == "normal":
        assert abs(before.float().std().item() - 0.5) < 0.02 and abs(before.float().mean().item()) < 0.02
    else:
        assert before.count_nonzero() == 0


@pytest.mark.skipif(kernels.native is None, reason="no compiled kernels here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 3, 16, 33, 64])
def test_native_normal_init_equals_the_torch_reference_bit_for_bit(dtype, dim):
    table = HostTable(50, dim, dtype, init="normal", std=0.3, seed=2**63 + 5)
    expected = reference.init_rows(torch.arange(50), dim, 2**63 + 5, 0.3, dtype)
    assert torch.equal(table.gather(torch.arange(50)).float(), expected)


def test_a_zero_row_written_into_a_normal_table_stays_zero(path_of):
    for dtype in (torch.float32, torch.bfloat16):
        table = HostTable(10, 8, dtype, init="normal")
        table.write(torch.tensor([4]), torch.zeros(1, 8))
        assert table.gather(torch.tensor([4])).count_nonzero() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("init", ["zero", "normal"])
def test_creating_and_reading_a_huge_table_touches_no_pages(init):
    before = resident_bytes()
    table = HostTable(2**30, 64, init=init)  # 256 GiB of address space
    rows = table.gather(torch.randint(0, 2**30, (64,)))
    assert table.nbytes == 2**38 and (init == "zero") == (rows.count_nonzero() == 0)
    assert resident_bytes() - before < 64 << 20
    table.close()


def test_row_arithmetic_beyond_32_bits_reaches_the_right_row(path_of):
    table = HostTable(2**28, 64)  # element offsets up to 2**34
    ids = torch.tensor([2**28 - 1, 2**26, 2**26 + 1, 0])  # row * dim = 2**32: would wrap to row 0 in 32 bits
    table.write(ids, torch.arange(4.0)[:, None].expand(4, 64) + 1)
    assert table.gather(ids)[:, 0].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert table.gather(torch.tensor([1])).count_nonzero() == 0


def test_32_bit_row_ids_are_refused():
    with pytest.raises(TypeError, match="int64"):
        HostTable(10, 4).gather(torch.tensor([1], dtype=torch.int32))


@pytest.mark.parametrize("place", [0, 511, 512, 70_001, 99_999])
def test_a_gather_names_the_first_bad_row_at_any_position(path_of, place):
    ids = torch.zeros(100_000, dtype=torch.int64)
    ids[place] = 2**45  # reading it would end the process
    ids[place + 1 :: 7] = -1
    with pytest.raises(IndexError, match=rf"row {2**45} at position \({place},\)"):
        HostTable(10, 64).gather(ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 3, 16, 33, 64, 100, 256])
def test_a_gather_on_many_threads_equals_indexing(dtype, dim, monkeypatch):
    table = HostTable(5000, dim, dtype)
    table.tensor.copy_(torch.randn(5000, dim))
    ids = torch.randint(0, 5000, (20_000,))
    for cores in (1, 2, 5):
        monkeypatch.setattr(kernels, "CORES", cores)
        assert torch.equal(table.gather(ids), table.tensor[ids])


def test_an_error_in_one_piece_of_spread_work_reaches_the_caller(monkeypatch):
    monkeypatch.setattr(kernels, "CORES", 3)
    done = []

    def work(lo, hi):
        if lo == 0:
            raise ValueError("a bad piece")
        done.append((lo, hi))

    with pytest.raises(ValueError, match="a bad piece"):
        kernels.spread(1000, 10, work)
    kernels.spread(1000, 2000, lambda lo, hi: done.append((lo, hi)))
    assert done[-1] == (0, 1000)


def test_info_says_whether_huge_pages_were_granted(tmp_path):
    table = HostTable(2**17, 64)  # 32 MiB
    table.tensor.fill_(1.0)
    settings = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    allowed = settings.exists() and "[never]" not in settings.read_text()
    assert table.info()["huge_pages"] in ((True, False) if allowed else (False, None))
    table.close()
    assert table.info()["huge_pages"] is None


@pytest.mark.parametrize("bad", [-1, 10, 2**40])
def test_a_row_outside_the_table_raises_instead_of_clamping(path_of, bad):
    with pytest.raises(IndexError, match=rf"row {bad} at position \(1, 0\) is outside this table of 10 rows"):
        HostTable(10, 4).gather(torch.tensor([[3], [bad]]))


def test_gather_fills_the_callers_buffer_and_refuses_a_wrong_one(path_of):
    table = HostTable(100, 8, torch.bfloat16, init="normal")
    ids = np.array([1, 2, 50])
    out = torch.empty(3, 8)
    assert table.gather(ids, out) is out
    assert torch.equal(out, table.gather(ids).float())
    for wrong in (torch.empty(3, 7), torch.empty(3, 8, dtype=torch.float64), torch.empty(8, 3).T):
        with pytest.raises(ValueError, match="out must be"):
            table.gather(ids, wrong)


def test_a_mapped_file_keeps_its_rows_and_refuses_another_size(tmp_path):
    path = tmp_path / "rows.bin"
    table = HostTable(300, 16, path=path)
    table.write(torch.tensor([299]), torch.full((1, 16), 2.5))
    table.close()
    assert path.stat().st_size == 300 * 64
    again = HostTable(300, 16, path=path)
    assert again.gather(torch.tensor([299]))[0, 0] == 2.5
    again.close()
    with pytest.raises(ValueError, match="belongs to another layout or is torn"):
        HostTable(301, 16, path=path)


def test_two_layers_cannot_share_one_table_file(tmp_path):
    first = HostTable(10, 4, path=tmp_path / "rows.bin")
    with pytest.raises(BlockingIOError, match="already open"):
        HostTable(10, 4, path=tmp_path / "rows.bin")
    first.close()


def test_a_full_disk_is_an_error_and_leaves_no_file(tmp_path):
    with pytest.raises(OSError, match="no room for a table"):
        HostTable(2**40, 64, path=tmp_path / "rows.bin")  # 256 TiB
    assert not (tmp_path / "rows.bin").exists()


def test_a_closed_table_is_named_in_the_error():
    table = HostTable(10, 4)
    table.close()
    with pytest.raises(ValueError, match="is closed"):
        table.gather(torch.tensor([1]))


def test_a_meta_table_has_sizes_but_no_rows():
    with torch.device("meta"):
        table = HostTable(2**40, 80, torch.bfloat16)
    assert table.nbytes == 2**40 * 160
    with pytest.raises(ValueError, match="meta device"):
        table.gather(torch.zeros(1, dtype=torch.int64, device="cpu"))


def test_a_row_id_written_twice_in_one_write_is_refused():
    with pytest.raises(ValueError, match="twice"):
        HostTable(10, 4).write(torch.tensor([3, 3]), torch.ones(2, 4))


def test_without_a_compiled_library_there_is_a_warning():
    code = "import warnings; warnings.simplefilter('error'); import engram.tables.kernels as k; print(k.native)"
    run = [sys.executable, "-c", code]
    quiet = subprocess.run(run, capture_output=True, text=True, env={**os.environ, "ENGRAM_KERNELS": "torch"})
    assert quiet.stdout.strip() == "None", quiet.stderr


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((2.7, 4), "rows"),
        ((10, 4.0), "dim"),
        ((10, True), "dim"),
        (("10", 4), "rows"),
        ((torch.tensor(2.5), 4), "rows"),
    ],
)
def test_sizes_that_are_not_integers_are_refused(arguments, name):
    with pytest.raises(TypeError, match=f"{name} must be an int"):
        HostTable(*arguments)
    if name == "rows":
        with pytest.raises(TypeError, match="rows must be an int"):
            EncodedTable(arguments[0], 32, "fp8")
    assert HostTable(np.int64(10), np.int32(4)).tensor.shape == (10, 4)


def test_an_impossible_seed_or_deviation_of_initial_rows_is_refused():
    with pytest.raises(TypeError, match="seed must be an int"):
        HostTable(10, 4, init="normal", seed=1.5)
    for std in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="std is a standard deviation"):
            HostTable(10, 4, init="normal", std=std)


@pytest.mark.parametrize("rows", [[[1.0] * 4], np.ones((1, 4), np.float32), torch.ones(1, 4, dtype=torch.complex64)])
def test_rows_to_write_are_tensors_of_real_numbers(rows):
    with pytest.raises(TypeError, match="rows must be a tensor of real numbers"):
        HostTable(10, 4).write(torch.tensor([1]), rows)


@pytest.mark.parametrize("shape", [(), (4,), (1, 1, 4), (4, 1), (1, 5)])
def test_rows_to_write_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="need rows"):
        HostTable(10, 4).write(torch.tensor([1]), torch.ones(shape))


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_reading_works_and_writing_warns(monkeypatch, tmp_path, code):
    fcntl = pytest.importorskip("fcntl")
    path = tmp_path / "rows.bin"
    HostTable(10, 4, path=path).close()

    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HostTable(10, 4, path=path, mode="r").close()
    with pytest.warns(UserWarning, match=rf"rows.bin lies on a file system without locks \({os.strerror(code)}\)"):
        table = HostTable(10, 4, path=path)
    table.write(torch.tensor([1]), torch.ones(1, 4))
    assert table.gather(torch.tensor([1])).all()
    table.close()
    code = errno.EIO
    with pytest.raises(OSError, match=r"rows.bin cannot be locked: "):
        HostTable(10, 4, path=path)


@pytest.mark.skipif(kernels.native is None, reason="torch's own threads flush as they like")
def test_rows_read_and_encoded_do_not_depend_on_flushing_of_denormals():
    ids = torch.arange(4000)
    normal = HostTable(4000, 32, init="normal", std=1e-39)
    half = HostTable(4000, 32, torch.bfloat16, init="normal", std=1e-39)
    small = normal.gather(ids)
    found = []
    try:
        for flush in (False, True):
            if not torch.set_flush_denormal(flush):
                pytest.skip("this machine cannot flush denormals")
            encoded = [EncodedTable(4000, 32, codec) for codec in ("fp8", "int8", "int4")]
            for table in encoded:
                table._store(small, first=0)
            read = [table.gather(ids) for table in (normal, *encoded)] + [half.gather(ids, torch.empty(4000, 32))]
            found.append([table.tensor.clone() for table in encoded] + [rows.view(torch.int32) for rows in read])
    finally:
        torch.set_flush_denormal(False)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert small.any()


@pytest.mark.parametrize("row_ids", [[1], (1, 2), 1, "1", None, range(2)])
def test_row_ids_that_are_not_an_array_are_refused_by_their_type(row_ids):
    table = HostTable(4, 2)
    for call in (table.gather, table.check, lambda ids: table.write(ids, torch.ones(1, 2))):
        with pytest.raises(TypeError, match=f"row ids must be a tensor .* not {type(row_ids).__name__}"):
            call(row_ids)


TABLES = {
    "float": lambda folder: HostTable(10, 32),
    "file": lambda folder: HostTable(10, 32, path=folder / "rows"),
    "fp8": lambda folder: EncodedTable(10, 32, "fp8"),
    "int4": lambda folder: EncodedTable(10, 32, "int4"),
}


@pytest.mark.parametrize("kind", TABLES)
def test_every_table_has_what_the_protocol_lists(kind, tmp_path):
    table = TABLES[kind](tmp_path)
    members = {name for name in (*Table.__annotations__, *vars(Table)) if not name.startswith("_")}
    assert {"gather", "prefetch", "rows", "dim", "tensor", "close"} <= members
    assert {name for name in members if not hasattr(table, name)} == set()
    assert table.tensor.shape == table.stored_shape and table.tensor.nbytes == table.nbytes


@pytest.mark.parametrize("kind", TABLES)
def test_every_table_is_a_host_table_to_isinstance(kind, tmp_path):
    assert isinstance(TABLES[kind](tmp_path), HostTable)
    assert issubclass(EncodedTable, HostTable) and not isinstance(torch.zeros(10, 32), HostTable)


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_is_not_pickled_and_the_error_names_its_class(kind, tmp_path):
    table = TABLES[kind](tmp_path)
    with pytest.raises(TypeError, match=f"a {type(table).__name__} is not pickled"):
        pickle.dumps(table)


@pytest.mark.parametrize("rows", [torch.zeros(10, 32), np.zeros((10, 32), np.float32), None])
@pytest.mark.parametrize("optimizer", [RowRMS, RowAdam])
def test_a_row_optimizer_refuses_objects_that_are_not_tables(rows, optimizer):
    with pytest.raises(TypeError, match=f"trains the rows of a HostTable, not of a {type(rows).__name__}"):
        optimizer(rows)
