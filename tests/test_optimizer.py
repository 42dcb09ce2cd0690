"""EngramOptimizer and the row gradients that wait for it: nothing is learned twice, from nowhere, or by nobody."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F

import engram
from engram import EngramConfig, EngramMemory, TokenMap, Transformer, TransformerConfig, build_optimizer
from engram.lm.evaluate import eval_mode, evaluate
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
    loss.backward()  # a step that is skipped: its loss is no number
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
