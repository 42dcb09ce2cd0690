"""The row optimizers: native against plain torch bit for bit, both against torch's own and against dense forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.optimizer import build_optimizer
from engram.tables import HostTable, RowAdagrad, RowAdam, RowRMS, RowSinkhorn, kernels

KINDS = {"rms": RowRMS, "adam": RowAdam, "adagrad": RowAdagrad, "sinkhorn": RowSinkhorn}


def touched_step(seed: int, rows: int, dim: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, rows, (n,), generator=generator), torch.randn(n, dim, generator=generator)


@pytest.mark.skipif(kernels.native is None, reason="no compiled kernels here")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", ["zero", "normal"])
@settings(max_examples=8, deadline=None)
@given(
    dim=st.sampled_from([1, 2, 15, 16, 17, 32, 100]), n=st.integers(1, 2000), rows=st.sampled_from([7, 200, 100_000])
)
def test_the_fused_update_equals_the_torch_reference_bit_for_bit(kind, dtype, init, dim, n, rows):
    native = kernels.native
    tables = [HostTable(rows, dim, dtype, init=init, std=0.1, seed=9) for _ in range(2)]
    optimizers = [KINDS[kind](table, lr=0.02) for table in tables]
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


@pytest.mark.parametrize("kind", KINDS)
def test_untouched_rows_and_their_state_never_change(path_of, kind):
    table = HostTable(100, 8, init="normal")
    before = table.gather(torch.arange(100)).clone()
    optimizer = KINDS[kind](table, lr=0.1)
    ids = torch.arange(0, 100, 2)
    for _ in range(5):
        optimizer.step(ids, torch.randn(50, 8))
    odd = torch.arange(1, 100, 2)
    assert torch.equal(table.gather(odd), before[odd])
    assert all(state.tensor.view(100, -1)[odd].count_nonzero() == 0 for state in optimizer.state.values())
    assert not torch.equal(table.gather(ids), before[ids])


@pytest.mark.parametrize("kind", KINDS)
def test_duplicate_rows_sum_their_gradients(path_of, kind):
    once, twice = HostTable(5, 4), HostTable(5, 4)
    grad = torch.randn(3, 4)
    KINDS[kind](once).step(torch.tensor([2]), (grad[0] + grad[1] + grad[2])[None])
    KINDS[kind](twice).step(torch.tensor([2, 2, 2]), grad)
    assert torch.equal(once.tensor, twice.tensor)


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_does_not_depend_on_the_number_of_threads(kind, monkeypatch):
    results = []
    for cores in (1, 2, 5):
        monkeypatch.setattr(kernels, "CORES", cores)
        table = HostTable(3000, 32)
        optimizer = KINDS[kind](table)
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


@pytest.mark.parametrize("kind", KINDS)
def test_optimizer_state_survives_saving_and_the_next_step_is_the_same(kind):
    table, copy = HostTable(30, 4), HostTable(30, 4)
    optimizer, other = KINDS[kind](table), KINDS[kind](copy)
    for step in range(4):
        optimizer.step(*touched_step(step, 30, 4, 10))
    copy.tensor.copy_(table.tensor)
    other.load_state_dict({k: v.clone() if torch.is_tensor(v) else v for k, v in optimizer.state_dict().items()})
    assert other.steps == 4
    for each in (optimizer, other):
        each.step(*touched_step(9, 30, 4, 10))
    assert torch.equal(copy.tensor, table.tensor)
    assert all(torch.equal(other.state[name].tensor, state.tensor) for name, state in optimizer.state.items())


def test_optimizer_state_refuses_another_table_and_another_kind():
    adam = RowAdam(HostTable(30, 4))
    adam.step(*touched_step(0, 30, 4, 5))
    saved = adam.state_dict()
    with pytest.raises(ValueError, match="optimizer state"):
        RowAdam(HostTable(31, 4)).load_state_dict(saved)
    for kind in (RowRMS, RowAdagrad, RowSinkhorn):
        with pytest.raises(ValueError, match="has state"):
            kind(HostTable(30, 4)).load_state_dict(saved)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_state_holds_no_tensors_and_makes_another_fresh(kind, tmp_path):
    fresh, used = KINDS[kind](HostTable(30, 8)), KINDS[kind](HostTable(30, 8, path=tmp_path / "rows"))
    assert fresh.state_dict() == {"steps": 0} == used.state_dict()
    used.step(*touched_step(0, 30, 8, 5))
    assert set(used.state_dict()) == {"steps", *used.state}
    fresh.load_state_dict(used.state_dict())
    assert set(fresh.state_dict()) == {"steps", *fresh.state}  # loaded is not fresh any more
    fresh.load_state_dict({"steps": 0})
    assert fresh.steps == 0 and not any(state.tensor.any() for state in fresh.state.values())
    used.close()
    used.table.close()


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_of_a_mapped_table_lies_beside_its_file_and_a_new_optimizer_starts_from_zero(kind, tmp_path):
    table = HostTable(20, 8, path=tmp_path / "rows")
    optimizer = KINDS[kind](table)
    assert {path.name for path in tmp_path.iterdir()} == {"rows", *(f"rows.{name}" for name in optimizer.state)}
    optimizer.step(*touched_step(0, 20, 8, 5))
    with pytest.raises(BlockingIOError):
        KINDS[kind](table)
    optimizer.close()
    again, reference = KINDS[kind](table), KINDS[kind](HostTable(20, 8))  # the steps of before are not in the files
    reference.table.write(torch.arange(20), table.gather(torch.arange(20)))
    for seed in (6, 7):
        for each in (again, reference):
            each.step(*touched_step(seed, 20, 8, 5))
    assert torch.equal(table.tensor, reference.table.tensor)
    again.close()
    table.close()


def test_decays_and_rates_that_make_no_sense_are_refused():
    table = HostTable(20, 8)
    for wrong in ({"beta2": 1.0}, {"beta2": 1.5}, {"lr": float("nan")}, {"lr": -1.0}):
        with pytest.raises(ValueError, match="must"):
            RowRMS(table, **wrong)
    for betas in ((1.0, 0.999), (0.9,)):
        with pytest.raises(ValueError, match=r"two numbers in \[0, 1\)"):
            RowAdam(table, betas=betas)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_with_a_bad_row_names_it_and_changes_nothing(path_of, kind):
    table = HostTable(10, 4)
    optimizer = KINDS[kind](table)
    with pytest.raises(IndexError, match=r"row 10 at position \(1, 0\) is outside"):
        optimizer.step(torch.tensor([[3], [10]]), torch.ones(2, 1, 4))
    assert table.tensor.count_nonzero() == 0 and optimizer.steps == 0
    assert all(state.tensor.count_nonzero() == 0 for state in optimizer.state.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_on_a_huge_table_costs_its_rows_only(kind):
    table = HostTable(2**36, 64)  # 16 TiB of address space
    optimizer = KINDS[kind](table)
    ids = torch.tensor([2**36 - 1, 5, 2**32 + 5])
    assert optimizer.step(ids, torch.ones(3, 64)) == 3
    assert (table.gather(ids) < 0).all()


def test_adagrad_on_rows_of_width_one_equals_torch_adagrad(path_of):
    table, weight = HostTable(40, 1), torch.nn.Parameter(torch.zeros(40, 1))
    ours, theirs = RowAdagrad(table, lr=0.05), torch.optim.Adagrad([weight], lr=0.05)
    for step in range(20):
        ids = torch.randperm(40, generator=torch.Generator().manual_seed(step))[:10]
        grad = torch.randn(10, 1, generator=torch.Generator().manual_seed(step))
        ours.step(ids, grad)
        weight.grad = torch.zeros(40, 1).index_copy_(0, ids, grad)  # a zero gradient leaves Adagrad's rows alone
        theirs.step()
    torch.testing.assert_close(table.tensor, weight.data, rtol=1e-5, atol=1e-7)


def dense_sinkhorn_direction(momentum: torch.Tensor, grad: torch.Tensor, beta: float, tau: float) -> torch.Tensor:
    """The balanced look-ahead of a whole matrix, as the recipe reads, in float64."""
    u = grad + beta * momentum
    norm = u.norm(dim=1, keepdim=True)
    u = torch.where(norm <= tau * norm.mean(), 0.0, u)
    for k in range(11):
        size = u.norm(dim=1 - k % 2, keepdim=True)  # rows, columns, ..., rows
        u = torch.where(size > 0, u / size, u)
    return u


@pytest.mark.parametrize("rows, dim", [(50, 8), (200, 33), (3, 16)])
def test_sinkhorn_equals_its_dense_form_where_every_row_is_touched(path_of, rows, dim):
    table = HostTable(rows, dim)
    optimizer = RowSinkhorn(table, lr=0.1)
    weight, momentum = (torch.zeros(rows, dim, dtype=torch.float64) for _ in range(2))
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        grad = torch.randn(rows, dim, generator=generator) * torch.rand(rows, 1, generator=generator) ** 3
        grad[1] *= 1e-6  # masked
        ids = torch.randperm(rows, generator=generator)
        optimizer.step(ids, grad[ids])
        momentum = 0.95 * momentum + grad
        weight -= 0.18 * 0.1 * math.sqrt(dim) * dense_sinkhorn_direction(momentum, grad.double(), 0.95, 1e-3)
    torch.testing.assert_close(table.tensor.double(), weight, rtol=2e-4, atol=2e-6)
    assert table.tensor[1].count_nonzero() == 0 and table.tensor[0].count_nonzero() == dim


def test_sinkhorn_momentum_of_a_row_that_waited_equals_the_dense_momentum(path_of):
    optimizer = RowSinkhorn(HostTable(30, 8))
    dense = torch.zeros(30, 8, dtype=torch.float64)
    for step in range(60):
        ids, grad = touched_step(step, 30, 8, 4)
        optimizer.step(ids, grad)
        dense = 0.95 * dense
        dense.index_add_(0, ids, grad.double())
    waited = (0.95 ** (60 - optimizer.state["last"].tensor.double())) * optimizer.state["m"].tensor
    torch.testing.assert_close(waited, dense, rtol=1e-4, atol=1e-6)


def test_a_sinkhorn_step_has_the_same_size_whatever_the_gradients_size(path_of):
    for size in (1e-6, 1.0, 1e6):
        table = HostTable(100, 16)
        RowSinkhorn(table, lr=0.1).step(torch.arange(100), size * torch.randn(100, 16))
        torch.testing.assert_close(table.tensor.square().mean(1).sqrt(), torch.full((100,), 0.018), rtol=1e-3, atol=0)


def test_sinkhorn_survives_gradients_and_columns_of_zeros(path_of):
    table = HostTable(20, 4)
    optimizer = RowSinkhorn(table)
    optimizer.step(torch.arange(20), torch.zeros(20, 4))
    assert table.tensor.count_nonzero() == 0
    grad = torch.randn(20, 4)
    grad[:, 2] = 0
    optimizer.step(torch.arange(20), grad)
    assert table.tensor.isfinite().all() and table.tensor[:, 2].count_nonzero() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_build_optimizer_makes_each_kind_of_row_optimizer(kind):
    from engram import EngramConfig, EngramMemory, TokenMap

    config = EngramConfig(layers=(1,), orders=(2,), heads=2, head_dim=8, rows_per_head=50)
    memory = EngramMemory(config, TokenMap.identity(100), 16)
    (made,) = build_optimizer(memory, table_optimizer=kind).row_optimizers
    assert type(made) is KINDS[kind] and made.table is memory.tables[1]
    with pytest.raises(ValueError, match="'rms', 'adam', 'adagrad', 'sinkhorn', not 'sgd'"):
        build_optimizer(memory, table_optimizer="sgd")


@pytest.fixture
def flush_denormals():
    """flush_denormals(on): of this thread alone, after those of the pool have begun."""
    kernels.spread(1000, 1, lambda lo, hi: None)
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush denormals")
    yield torch.set_flush_denormal
    torch.set_flush_denormal(False)


@pytest.mark.skipif(kernels.native is None, reason="torch's own threads flush as they like")
@pytest.mark.parametrize("kind", ["rms", "adam", "adagrad"])
@pytest.mark.parametrize("scale", [1e-20, 3e-20, 1e-21])
def test_denormal_moments_depend_neither_on_flushing_nor_on_the_number_of_threads(
    kind, scale, monkeypatch, flush_denormals
):
    results = []
    grad = torch.randn(3000, 32, generator=torch.Generator().manual_seed(0)) * scale
    for flush in (False, True):
        for cores in (1, 2, 4):
            flush_denormals(False)  # of torch.randn and the like, which are not looked at here
            monkeypatch.setattr(kernels, "CORES", cores)
            table = HostTable(3000, 32)
            optimizer = KINDS[kind](table)
            flush_denormals(flush)
            for _ in range(3):
                optimizer.step(torch.arange(3000), grad)
            states = [state.tensor.view(torch.int32) for state in optimizer.state.values()]
            results.append([table.tensor.view(torch.int32), *states])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))
    assert ((results[0][1] & 0x7FFFFFFF > 0) & (results[0][1] & 0x7FFFFFFF < 1 << 23)).any()  # denormals


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("ids", "shape"),
    [([3], (4, 3)), ([3], (4,)), ([1, 2], (8,)), ([[1], [2]], (2, 4)), ([1, 2], (4, 2)), ([1], (2, 1, 4))],
)
def test_a_gradient_of_another_shape_is_refused_and_not_reshaped(path_of, kind, ids, shape):
    optimizer = KINDS[kind](HostTable(10, 4))
    with pytest.raises(ValueError, match="need a real gradient"):
        optimizer.step(torch.tensor(ids), torch.ones(shape))
    with pytest.raises(ValueError, match="need a real gradient"):
        optimizer.step(torch.tensor([1]), torch.ones(1, 4, dtype=torch.complex64))
    assert optimizer.steps == 0 and not optimizer.table.tensor.any()
