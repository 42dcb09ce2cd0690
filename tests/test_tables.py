"""HostTable and the row optimisers: exact against plain torch, and against torch's own optimisers."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.tables import kernels, reference
from engram.tables.optimizers import RowAdam, RowRMS
from engram.tables.table import HostTable


@pytest.fixture(params=["native", "torch"])
def path_of(request, monkeypatch):
    """Runs a test once with the compiled kernels and once without."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "native", None)
    elif kernels.native is None:
        pytest.skip("no compiled kernels here")
    return request.param


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
    with pytest.raises(BlockingIOError, match="already held"):
        HostTable(10, 4, path=tmp_path / "rows.bin")
    first.close()


def test_a_full_disk_is_an_error_and_leaves_no_file(tmp_path):
    with pytest.raises(OSError, match="no room for a table"):
        HostTable(2**40, 64, path=tmp_path / "rows.bin")  # 256 TiB
    assert not (tmp_path / "rows.bin").exists()


def test_a_closed_table_says_so():
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


def touched_step(seed: int, rows: int, dim: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, rows, (n,), generator=generator), torch.randn(n, dim, generator=generator)


def make(kind: str, table: HostTable):
    return RowRMS(table, lr=0.02) if kind == "rms" else RowAdam(table, lr=0.02)


@pytest.mark.skipif(kernels.native is None, reason="no compiled kernels here")
@pytest.mark.parametrize("kind", ["rms", "adam"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", ["zero", "normal"])
@settings(max_examples=15, deadline=None)
@given(
    dim=st.sampled_from([1, 2, 15, 16, 17, 32, 100]), n=st.integers(1, 2000), rows=st.sampled_from([7, 200, 100_000])
)
def test_the_fused_update_equals_the_torch_reference_bit_for_bit(kind, dtype, init, dim, n, rows):
    native = kernels.native
    tables = [HostTable(rows, dim, dtype, init=init, std=0.1, seed=9) for _ in range(2)]
    optimizers = [make(kind, table) for table in tables]
    try:
        for step in range(3):
            ids, grad = touched_step(step, rows, dim, n)
            kernels.native = native
            touched = optimizers[0].step(ids, grad)
            kernels.native = None
            assert optimizers[1].step(ids, grad) == touched == ids.unique().numel()
    finally:
        kernels.native = native
    assert torch.equal(tables[0].tensor, tables[1].tensor)
    for name in optimizers[0].state:
        assert torch.equal(optimizers[0].state[name].tensor, optimizers[1].state[name].tensor)


def test_adam_on_rows_equals_torch_sparse_adam(path_of):
    table = HostTable(50, 12)
    weight = torch.nn.Parameter(torch.zeros(50, 12))
    ours, theirs = RowAdam(table, lr=0.01), torch.optim.SparseAdam([weight], lr=0.01)
    for step in range(20):
        ids, grad = touched_step(step, 50, 12, 30)
        ours.step(ids, grad)
        with torch.sparse.check_sparse_tensor_invariants(False):
            weight.grad = torch.sparse_coo_tensor(ids[None], grad, (50, 12), check_invariants=False)
        theirs.step()
    torch.testing.assert_close(table.tensor, weight.data, rtol=2e-5, atol=2e-6)


def test_adam_on_rows_equals_dense_adam_where_every_row_is_touched(path_of):
    table = HostTable(20, 6)
    weight = torch.nn.Parameter(torch.zeros(20, 6))
    ours, theirs = RowAdam(table, lr=0.01, betas=(0.8, 0.95)), torch.optim.Adam([weight], lr=0.01, betas=(0.8, 0.95))
    for step in range(20):
        grad = torch.randn(20, 6, generator=torch.Generator().manual_seed(step))
        ours.step(torch.arange(20), grad)
        weight.grad = grad
        theirs.step()
    torch.testing.assert_close(table.tensor, weight.data, rtol=1e-4, atol=1e-6)


def test_rms_on_rows_of_width_one_equals_torch_rmsprop_on_touched_rows(path_of):
    table = HostTable(40, 1)
    ours = RowRMS(table, lr=0.01, beta2=0.9)
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(40)]  # one per row: only touched ones step
    theirs = [torch.optim.RMSprop([w], lr=0.01, alpha=0.9) for w in weights]
    for step in range(20):
        ids = torch.randperm(40, generator=torch.Generator().manual_seed(step))[:10]
        grad = torch.randn(10, 1, generator=torch.Generator().manual_seed(step))
        ours.step(ids, grad)
        for row, g in zip(ids.tolist(), grad, strict=True):
            weights[row].grad = g.clone()
            theirs[row].step()
    torch.testing.assert_close(table.tensor[:, 0], torch.cat([w.data for w in weights]), rtol=1e-5, atol=1e-7)


def test_untouched_rows_and_their_state_never_change(path_of):
    table = HostTable(100, 8, init="normal")
    before = table.gather(torch.arange(100)).clone()
    optimizer = RowAdam(table, lr=0.1)
    ids = torch.arange(0, 100, 2)
    for _ in range(5):
        optimizer.step(ids, torch.randn(50, 8))
    odd = torch.arange(1, 100, 2)
    assert torch.equal(table.gather(odd), before[odd])
    assert optimizer.state["m"].tensor[odd].count_nonzero() == 0
    assert not torch.equal(table.gather(ids), before[ids])


def test_duplicate_rows_sum_their_gradients(path_of):
    once, twice = HostTable(5, 4), HostTable(5, 4)
    grad = torch.randn(3, 4)
    RowRMS(once).step(torch.tensor([2]), (grad[0] + grad[1] + grad[2])[None])
    RowRMS(twice).step(torch.tensor([2, 2, 2]), grad)
    assert torch.equal(once.tensor, twice.tensor)


def test_an_update_does_not_depend_on_the_number_of_threads(monkeypatch):
    results = []
    for cores in (1, 2, 5):
        monkeypatch.setattr(kernels, "CORES", cores)
        table = HostTable(3000, 32)
        optimizer = RowRMS(table)
        for step in range(3):
            optimizer.step(*touched_step(step, 3000, 32, 9000))
        results.append(table.tensor.clone())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_stochastic_rounding_lets_small_updates_reach_a_bfloat16_row():
    def train(stochastic: bool) -> float:
        table = HostTable(512, 64, torch.bfloat16)
        table.write(torch.arange(512), torch.ones(512, 64))
        optimizer = RowRMS(table, lr=1e-4, stochastic_rounding=stochastic)  # far below bfloat16's step of 0.0078
        optimizer.state["v"].tensor.fill_(1.0)
        for _ in range(50):
            optimizer.step(torch.arange(512), torch.ones(512, 64))
        return table.gather(torch.arange(512)).float().mean().item()

    assert train(False) == 1.0
    assert abs(train(True) - 0.995) < 5e-4


def test_optimizer_state_survives_saving_and_refuses_another_table():
    table = HostTable(30, 4)
    optimizer = RowAdam(table)
    optimizer.step(*touched_step(0, 30, 4, 10))
    saved = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in optimizer.state_dict().items()}
    other = RowAdam(HostTable(30, 4))
    other.load_state_dict(saved)
    assert other.steps == 1 and torch.equal(other.state["m"].tensor, optimizer.state["m"].tensor)
    with pytest.raises(ValueError, match="optimiser state"):
        RowAdam(HostTable(31, 4)).load_state_dict(saved)
    with pytest.raises(ValueError, match="has state"):
        RowRMS(HostTable(30, 4)).load_state_dict(saved)


def test_without_a_compiled_library_a_warning_says_so():
    code = "import warnings; warnings.simplefilter('error'); import engram.tables.kernels as k; print(k.native)"
    run = [sys.executable, "-c", code]
    quiet = subprocess.run(run, capture_output=True, text=True, env={**os.environ, "ENGRAM_KERNELS": "torch"})
    assert quiet.stdout.strip() == "None", quiet.stderr
