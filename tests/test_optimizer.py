"""EngramOptimizer and the row gradients that wait for it: each is applied once, to the memory it belongs to."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F

import engram
from engram import EngramConfig, EngramMemory, TokenMap, Transformer, TransformerConfig, build_optimizer
from engram.lm.evaluate import eval_mode, evaluate
from engram.tables import RowRMS
from tests.toy import VOCAB, corpus

CONFIG = EngramConfig(layers=(0, 1), heads=2, head_dim=8, rows_per_head=997)


def make(**changes) -> Transformer:
    torch.manual_seed(0)
    memory = EngramMemory(CONFIG.replace(**changes), TokenMap.identity(VOCAB), 32)
    shape = TransformerConfig(vocab_size=VOCAB, hidden_size=32, layers=2, heads=2, max_length=64)
    return Transformer(shape, memory)


def text(B: int = 4, T: int = 17, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCAB, (B, T), generator=torch.Generator().manual_seed(seed))


def loss_of(model: Transformer, ids: torch.Tensor, recall=None) -> torch.Tensor:
    logits = model(ids[:, :-1], recall=recall)
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def step(model: Transformer, optimizer: torch.optim.Optimizer, ids: torch.Tensor, recall=None) -> None:
    optimizer.zero_grad()
    loss_of(model, ids, recall).backward()
    optimizer.step()


def rows(model: Transformer) -> torch.Tensor:
    return torch.cat([table.tensor for table in model.memory.tables.values()]).clone()


def test_the_zero_grad_of_the_model_drops_the_gradients_of_rows_too():
    model = make()
    optimizer = build_optimizer(model)
    (loss_of(model, text()) * float("nan")).backward()
    model.zero_grad()
    loss_of(model, text(seed=1)).backward()
    optimizer.step()
    expected = make()
    step(expected, build_optimizer(expected), text(seed=1))
    assert torch.equal(rows(model), rows(expected)) and rows(model).any()
    (loss_of(model, text()) * float("nan")).backward()
    model.zero_grad()
    optimizer.step()  # nothing to do
    assert optimizer.touched == 0 and rows(model).isfinite().all()


def test_what_the_model_clears_between_forward_and_backward_is_gone():
    model = make()
    optimizer = build_optimizer(model)
    loss = loss_of(model, text()) * float("nan")
    model.zero_grad()
    loss.backward()  # a step that is skipped: its loss is not a number
    loss = loss_of(model, text(seed=1))
    model.zero_grad()
    loss.backward()
    optimizer.step()
    expected = make()
    step(expected, build_optimizer(expected), text(seed=1))
    assert torch.equal(rows(model), rows(expected)) and rows(model).any()


def test_one_backward_pass_through_two_forward_passes_keeps_the_gradients_of_both():
    ids, model, expected = text(), make(), make()
    optimizer, other = build_optimizer(model), build_optimizer(expected)
    (loss_of(model, ids[:2]) + loss_of(model, ids[2:])).backward()
    for half in (ids[:2], ids[2:]):
        loss_of(expected, half).backward()
    optimizer.step()
    other.step()
    assert optimizer.touched == other.touched and (rows(model) - rows(expected)).abs().max() < 1e-5


def test_rows_that_do_not_learn_beside_weights_that_do_are_said():
    model = make().eval()
    optimizer = build_optimizer(model)
    with pytest.warns(UserWarning, match=r"model\.train\(\)"):
        step(model, optimizer, text())
    assert optimizer.touched == 0 and not rows(model).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model.train(), optimizer, text())
    assert optimizer.touched


def test_a_state_beside_other_weights_of_the_memory_is_refused_at_the_next_step():
    model = make()
    optimizer = build_optimizer(model)
    step(model, optimizer, text())
    saved, weights = optimizer.state_dict(), {name: value.clone() for name, value in model.state_dict().items()}
    fresh = make()
    resumed = build_optimizer(fresh)
    resumed.load_state_dict(saved)
    for _ in range(2):  # not the first time alone
        with pytest.raises(RuntimeError, match="beside other weights"):
            step(fresh, resumed, text(seed=1))
    fresh = make()
    resumed = build_optimizer(fresh)
    resumed.load_state_dict(saved)  # in either order
    fresh.load_state_dict(weights)
    step(fresh, resumed, text(seed=1))
    step(model, optimizer, text(seed=1))
    assert torch.equal(rows(fresh), rows(model))


def test_rows_alone_accumulate_where_the_weights_are_frozen():
    model, whole = make(), make()
    for m in (model, whole):
        for weight in m.parameters():
            weight.requires_grad_(False)
    optimizer, other = (build_optimizer(m) for m in (model, whole))
    for half in text().split(2):
        loss_of(model, half).backward()
    optimizer.step()
    (2 * loss_of(whole, text())).backward()
    other.step()
    assert rows(model).any()
    torch.testing.assert_close(rows(model), rows(whole))


def test_an_optimizer_that_knows_no_rows_is_named():
    model = make()
    plain = torch.optim.AdamW(model.parameters())
    with pytest.warns(UserWarning, match="build_optimizer"):
        for seed in range(5):
            step(model, plain, text(seed=seed))
    assert max(len(pending) for pending in model.memory.gradients.values()) == 1, "they do not pile up"
    other = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(3):
            step(other, build_optimizer(other), text(seed=seed))


def test_a_frozen_memory_learns_nothing_and_thaws():
    model = make()
    model.memory.requires_grad_(False)
    optimizer = build_optimizer(model)
    step(model, optimizer, text())
    assert not rows(model).any() and optimizer.touched == 0 and not any(model.memory.gradients.values())
    model.memory.requires_grad_(True)
    optimizer = build_optimizer(model)
    step(model, optimizer, text())
    assert rows(model).any() and optimizer.touched > 0


def test_a_recall_that_is_used_again_has_the_rows_of_now():
    model = make()
    optimizer, ids = build_optimizer(model), text()
    again = model.memory.recall(ids[:, :-1])
    for _ in range(3):
        step(model, optimizer, ids, recall=again)
    expected = make()
    other = build_optimizer(expected)
    for _ in range(3):
        step(expected, other, ids)
    assert torch.equal(rows(model), rows(expected))


def test_whether_rows_learn_is_decided_where_they_are_used():
    model = make()
    optimizer, ids = build_optimizer(model), text()
    with torch.no_grad():
        early = model.memory.recall(ids[:, :-1])
        early.rows(0)
    step(model, optimizer, ids, recall=early)
    expected = make()
    step(expected, build_optimizer(expected), ids)
    assert optimizer.touched > 0 and torch.equal(rows(model), rows(expected))


def test_a_group_added_later_leaves_the_tables_their_rate():
    model = make()
    optimizer = build_optimizer(model, table_lr=0.03)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))], "lr": 1e-6})
    step(model, optimizer, text())
    assert {row_optimizer.lr for row_optimizer in optimizer.row_optimizers} == {0.03}


def test_a_step_hook_is_called_once_a_step():
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # torch then wraps the step that ours builds on
    model, calls = make(), []
    optimizer = build_optimizer(model)
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    step(model, optimizer, text())
    assert len(calls) == 1


def test_looking_at_a_model_leaves_every_module_in_its_mode():
    model = make().train()
    model.memory.eval()
    modes = [module.training for module in model.modules()]
    engram.generate(model, text()[:1, :4], 3)
    engram.explain(model, text()[0, :6])
    evaluate(model, corpus(documents=3))
    with pytest.raises(KeyError), eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == modes


def test_a_compiled_model_is_the_model():
    model, other = make(), make()
    compiled = torch.compile(model, backend="aot_eager")
    optimizers = build_optimizer(model), build_optimizer(other)
    for seed in range(2):
        for m, optimizer in zip((compiled, other), optimizers, strict=True):
            step(m, optimizer, text(seed=seed))
    torch.testing.assert_close(rows(model), rows(other))
    assert rows(model).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gains_of_a_model_in_half_precision_learn(dtype):
    model = make(table_init="normal", conv_init="uniform").to(dtype)
    gains = {name: p for name, p in model.memory.named_parameters() if name.endswith("_norm")}
    assert len(gains) == 6 and {p.dtype for p in gains.values()} == {torch.float32}
    rest = {p.dtype for name, p in model.memory.named_parameters() if name not in gains}
    assert rest == {dtype} and model(text()).dtype == dtype
    optimizer = build_optimizer(model, lr=1e-3)
    for seed in range(3):
        step(model, optimizer, text(seed=seed))
    assert all((gain != 1).any() for gain in gains.values())
    assert {p.dtype for p in model.double().memory.parameters()} == {torch.float64}


def interrupt(monkeypatch, owner, name: str, call: int) -> None:
    """Make the `call`-th call of a method (from 0) raise KeyboardInterrupt."""
    real, calls = getattr(owner, name), []

    def method(*arguments, **named):
        calls.append(name)
        if len(calls) - 1 == call:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(owner, name, method)


@pytest.mark.parametrize(
    ("owner", "name", "call", "updated"),
    [
        (torch.optim.AdamW, "step", 0, "nothing, or some of the dense weights, but not the rows of layer 0 and "),
        (RowRMS, "step", 0, "the dense weights, but not the rows of layer 0 and the rows of layer 1"),
        (RowRMS, "step", 1, "the dense weights and the rows of layer 0, but not the rows of layer 1"),
        (EngramMemory, "patch", 1, "the dense weights and the rows of layer 0, but not the rows of layer 1"),
    ],
)
def test_a_step_that_is_interrupted_says_what_it_has_updated_and_the_next_one_warns(
    monkeypatch, owner, name, call, updated
):
    model = make()
    optimizer = build_optimizer(model)
    step(model, optimizer, text())
    loss_of(model, text(seed=1)).backward()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt) as raised:
        interrupt(patched, owner, name, call)
        optimizer.step()
    assert f"it has updated {updated}" in optimizer.interrupted
    assert "Load the last checkpoint" in "".join(raised.value.__notes__)
    with pytest.warns(UserWarning, match="this is the state after a step that was interrupted"):
        optimizer.state_dict()
    with pytest.warns(UserWarning, match=f"the last step was interrupted: it has updated {updated}"):
        step(model, optimizer, text(seed=2))
    assert optimizer.interrupted is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, optimizer, text(seed=3))


def test_gradients_of_an_interrupted_step_are_never_applied_twice(monkeypatch):
    model = make()
    optimizer = build_optimizer(model, lr=0.0)
    loss_of(model, text()).backward()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupt(patched, EngramMemory, "patch", 0)  # the rows of layer 0 are updated by then
        optimizer.step()
    first, before = (table.tensor for table in model.memory.tables.values())
    once, before = first.clone(), before.clone()
    with pytest.warns(UserWarning, match="was interrupted"):
        optimizer.step()  # without a new backward pass: what waits is what was never used
    second = model.memory.tables[1].tensor
    assert torch.equal(first, once) and once.any() and not torch.equal(second, before)


def test_rows_fetched_ahead_of_an_interrupted_step_are_fetched_anew(monkeypatch):
    model = make()
    optimizer, ahead = build_optimizer(model), model.memory.recall(text(seed=1)[:, :-1])
    loss_of(model, text(seed=1)).backward()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupt(patched, EngramMemory, "patch", 0)
        optimizer.step()
    assert rows(model).any()
    with torch.no_grad():
        assert torch.equal(loss_of(model, text(seed=1), ahead), loss_of(model, text(seed=1)))


def test_a_loaded_state_ends_the_warnings_of_an_interrupted_step(monkeypatch):
    model = make()
    optimizer = build_optimizer(model)
    step(model, optimizer, text())
    saved = copy.deepcopy(optimizer.state_dict())
    loss_of(model, text(seed=1)).backward()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupt(patched, RowRMS, "step", 1)
        optimizer.step()
    optimizer.load_state_dict({k: v for k, v in saved.items() if k != "memories"})
    assert optimizer.interrupted is None


@pytest.mark.parametrize("let_go", ["optimizer", "memory", "table"])
def test_files_of_an_optimizer_that_a_traceback_keeps_alive_can_be_let_go(tmp_path, let_go):
    """As a notebook does after Ctrl-C: the traceback holds the frames, and they the optimizer and its tensors."""
    memory = EngramMemory(CONFIG, TokenMap.identity(VOCAB), 32, folder=tmp_path)
    optimizer = build_optimizer(memory)
    kept = [state.tensor for each in optimizer.row_optimizers for state in each.state.values()]
    with pytest.raises(BlockingIOError, match=r"layer-0.rows.v is locked by an earlier optimizer.*close\(\)"):
        build_optimizer(memory)
    if let_go == "optimizer":
        optimizer.close()
        build_optimizer(memory).close()
        memory.close()
    elif let_go == "memory":
        memory.close()
    else:
        for table in memory.tables.values():
            table.close()
    again = EngramMemory(CONFIG, TokenMap.identity(VOCAB), 32, folder=tmp_path)
    build_optimizer(again).close()
    again.close()
    assert all(tensor is not None for tensor in kept)


def test_an_optimizer_that_cannot_be_built_holds_no_files(tmp_path):
    memory = EngramMemory(CONFIG, TokenMap.identity(VOCAB), 32, folder=tmp_path)
    other = RowRMS(memory.tables[1])
    with pytest.raises(BlockingIOError, match="layer-1") as kept:
        build_optimizer(memory)
    other.close()
    build_optimizer(memory).close()
    assert kept.value is not None
    memory.close()
