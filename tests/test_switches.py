"""EngramMemory.off: parts of a memory turned off within a `with` block, in every way a model runs."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest
import torch

import engram
from engram import EngramConfig, EngramMemory, TokenMap, Transformer, TransformerConfig, build_optimizer, explain
from engram.lm.transformer import Cache
from tests.hf_models import VOCAB, build, text

FULL = EngramConfig(
    layers=(0, 2), orders=(2, 3), heads=2, head_dim=8, rows_per_head=1009, table_init="normal", conv_init="uniform"
)
IDENTITY = TokenMap.identity(VOCAB)
IDS = torch.tensor([[3, 5, 9, 5, 9, 12, 7, 5]])


def own(config: EngramConfig = FULL) -> tuple[Transformer, EngramMemory]:
    torch.manual_seed(0)
    memory = EngramMemory(config, IDENTITY, 32)
    return Transformer(TransformerConfig(VOCAB, 32, layers=3, heads=2, max_length=64), memory).eval(), memory


def attached(name: str = "llama", config: EngramConfig = FULL):
    model = build(name)
    torch.manual_seed(1)
    return model, engram.attach(model, config, IDENTITY)


def added(memory: EngramMemory, layer: int = 0, ids: torch.Tensor = IDS, recall=None) -> torch.Tensor:
    """Return what a layer adds to hidden states that do not depend on the memory."""
    hidden = torch.randn(*ids.shape, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return memory[layer](hidden, memory.recall(ids) if recall is None else recall)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "deepseek_v4", "qwen4_exp"])
@torch.no_grad()
def test_with_all_off_an_attached_model_is_the_model_alone_and_afterwards_it_is_as_it_was(name):
    alone = build(name)(text()).logits
    model, memory = attached(name)
    on = model(text()).logits
    with memory.off():
        assert torch.equal(model(text()).logits, alone)
    assert torch.equal(model(text()).logits, on) and not torch.equal(on, alone)


@pytest.mark.parametrize("inject", ["residual", "values"])
@torch.no_grad()
def test_with_all_off_a_transformer_is_the_model_without_memory(inject):
    model, memory = own(FULL.replace(inject=inject))
    on = model(IDS)
    with memory.off():
        off = model(IDS)
    model.memory = None
    assert torch.equal(off, model(IDS)) and not torch.equal(off, on)


@pytest.mark.parametrize("layer, other", [(0, 2), (2, 0)])
def test_a_layer_that_is_off_adds_nothing_and_the_others_go_on(layer, other):
    _, memory = own()
    before = added(memory, other)
    with memory.off(layers=layer):
        assert not added(memory, layer).any()
        assert torch.equal(added(memory, other), before)


@pytest.mark.parametrize("positions", [3, [0], [1, 4, 7], range(2, 5), torch.tensor([6, 7]), np.array([5])])
def test_positions_that_are_off_get_nothing_and_the_others_get_what_they_got(positions):
    _, memory = own()
    before, chosen = added(memory), torch.zeros(8, dtype=torch.bool)
    chosen[torch.as_tensor(positions if isinstance(positions, int) else list(positions))] = True
    with memory.off(positions=positions):
        after = added(memory)
    assert not after[0, chosen].any() and torch.equal(after[0, ~chosen], before[0, ~chosen])


@pytest.mark.parametrize("order", [2, 3])
def test_rows_of_an_order_that_is_off_read_as_zeros(order):
    _, memory = own(FULL.replace(conv_kernel=0))
    with memory.off(orders=order):
        off = added(memory)
    for layer in memory.config.layers:
        table = memory.tables[layer]
        ids = memory.hasher(IDS)[layer][0, :, (order - 2) * 2 : order * 2 - 2].unique()
        table.write(ids, torch.zeros(len(ids), 8))
    memory.renew_recalls()
    torch.testing.assert_close(added(memory), off)


@pytest.mark.parametrize("ngrams, ends", [([(5, 9)], [2, 4]), ([(9, 12)], [5]), ([(3, 5), (12, 7, 5)], [1, 7])])
def test_an_ngram_is_off_where_it_ends_and_nowhere_else(ngrams, ends):
    _, memory = own(FULL.replace(conv_kernel=0))
    before = added(memory)
    with memory.off(ngrams=ngrams):
        changed = (added(memory) != before).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == ends


def test_an_ngram_is_off_in_every_sequence_but_not_across_documents():
    _, memory = own(FULL.replace(conv_kernel=0))
    ids, documents = torch.tensor([[5, 9, 5, 9], [7, 5, 9, 3]]), torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0]])
    before = added(memory, 0, ids, memory.recall(ids, documents))
    with memory.off(ngrams=[(5, 9)]):
        after = added(memory, 0, ids, memory.recall(ids, documents))
    assert (after != before).any(-1).tolist() == [[False, True, False, False], [False, False, True, False]]


def test_arguments_select_what_all_of_them_select_and_blocks_add_up():
    _, memory = own(FULL.replace(conv_kernel=0))
    before = [added(memory, layer) for layer in (0, 2)]
    with memory.off(layers=2, ngrams=[(5, 9)], positions=[4]):
        assert torch.equal(added(memory, 0), before[0])
        assert (added(memory, 2) != before[1]).any(-1)[0].nonzero().flatten().tolist() == [4]
        with memory.off(positions=0), memory.off(layers=0):
            assert not added(memory, 0).any()
            assert (added(memory, 2) != before[1]).any(-1)[0].nonzero().flatten().tolist() == [0, 4]
        assert torch.equal(added(memory, 0), before[0])
    assert torch.equal(added(memory, 2), before[1])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_the_block_turns_the_memory_on_again(error):
    _, memory = own()
    before = added(memory)
    with pytest.raises(error), memory.off(), memory.off(layers=0):
        raise error
    assert torch.equal(added(memory), before)


def test_blocks_that_end_in_another_order_leave_no_switch_behind():
    _, memory = own()
    before, first, second = added(memory), memory.off(layers=0), memory.off(positions=1)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(added(memory)[0, 2:], before[0, 2:]) and not added(memory)[0, 1].any()
    second.__exit__(None, None, None)
    assert torch.equal(added(memory), before)


def test_other_threads_other_memories_and_copies_are_not_switched():
    model, memory = own()
    before, results = added(memory), []
    twin = copy.deepcopy(model).memory
    with memory.off():
        thread = threading.Thread(target=lambda: results.append(added(memory)))
        thread.start()
        thread.join()
        assert not added(memory).any()
        assert torch.equal(results[0], before) and torch.equal(added(twin), before)


def test_a_recall_made_before_the_block_is_off_in_it_and_one_made_in_it_stays_off():
    _, memory = own()
    early = memory.recall(IDS)
    before = added(memory, recall=early)
    with memory.off():
        late = memory.recall(IDS)
        assert not added(memory, recall=early).any()
    assert torch.equal(added(memory, recall=early), before) and not added(memory, recall=late).any()


@pytest.mark.parametrize(
    "what", [{}, {"layers": 2}, {"orders": 3}, {"ngrams": [(5, 9), (9, 5)]}, {"positions": [2, 6]}]
)
@torch.no_grad()
def test_decoding_with_a_cache_equals_the_full_forward_pass(what):
    model, memory = own()
    with memory.off(**what):
        full, cache = model(IDS), Cache()
        pieces = [model(piece, cache=cache) for piece in IDS.split([3, 1, 1, 3], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), full, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_decoding_goes_on_after_the_block():
    model, memory = own()
    cache = Cache()
    with memory.off(layers=2):
        model(IDS[:, :4], cache=cache)
    with memory.off(layers=2, positions=range(4)):
        full = model(IDS)[:, 4:]
    torch.testing.assert_close(model(IDS[:, 4:], cache=cache), full, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generate_writes_what_the_model_alone_writes(name):
    options = {"max_new_tokens": 8, "do_sample": False}
    alone = build(name).generate(text(), **options)
    model, memory = attached(name)
    on = model.generate(text(), **options)
    with memory.off():
        assert torch.equal(model.generate(text(), **options), alone)
    assert torch.equal(model.generate(text(), **options), on)


@pytest.mark.parametrize("kind", ["own", "attached"])
def test_explain_shows_what_is_off(kind):
    model, memory = own() if kind == "own" else attached()
    with memory.off(layers=0, positions=3):
        layers = explain(model, IDS, losses=False).layers
    assert layers[0].added[3] == layers[0].gate[3] == 0 and (np.delete(layers[0].added, 3) > 0).all()
    assert (layers[2].added > 0).all()
    with memory.off():
        explanation = explain(model, IDS)
    assert all(not layer.added.any() and not layer.gate.any() for layer in explanation.layers.values())
    assert np.allclose(explanation.loss, explanation.loss_off, equal_nan=True, atol=1e-5)


@pytest.mark.parametrize("first", ["lora", "memory"])
@torch.no_grad()
def test_peft_turns_off_a_memory_that_was_attached_to_its_adapters(first):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    alone = build("llama")(text()).logits
    model, memory = attached() if first == "memory" else (build("llama"), None)
    base = model(text()).logits  # with the memory, if it is a part of the model that PEFT gets
    model = peft.get_peft_model(model, lora)
    memory = engram.attach(model, FULL, IDENTITY) if memory is None else memory
    on = model(text()).logits
    for wrapped in (model, copy.deepcopy(model)):
        with wrapped.disable_adapter():
            assert torch.equal(wrapped(text()).logits, base)
            with wrapped.get_submodule("base_model.model.model.engram").off():
                assert torch.equal(wrapped(text()).logits, alone)
        assert torch.equal(wrapped(text()).logits, on)
    assert not torch.equal(on, base)


def test_the_memory_off_is_the_reference_of_preference_training():
    model, memory = attached()
    model.requires_grad_(False)
    memory.requires_grad_(True)
    model.train()
    chosen, rejected = text(seed=1), text(seed=2)
    optimizer = build_optimizer(model, lr=0.01, table_lr=0.1)

    def margin() -> torch.Tensor:
        return model(input_ids=rejected, labels=rejected).loss - model(input_ids=chosen, labels=chosen).loss

    with torch.no_grad():
        reference = build("llama").train()
        expected = reference(input_ids=rejected, labels=rejected).loss - reference(input_ids=chosen, labels=chosen).loss
    losses = []
    for _ in range(6):
        with torch.no_grad(), memory.off():
            off = margin()
        assert torch.equal(off, expected)
        loss = -torch.nn.functional.logsigmoid(margin() - off)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_a_training_pass_with_a_layer_off_collects_no_gradient_for_its_rows():
    model, memory = own()
    model.train()
    build_optimizer(model, lr=0.01, table_lr=0.1)
    with memory.off(layers=0):
        model(IDS).sum().backward()
    assert not memory.gradients[0] and memory.gradients[2]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_of_a_pass_are_those_of_its_own_switches_when_it_is_computed_again(checkpointed):
    model, memory = attached()
    model.train()
    build_optimizer(model, lr=0.01, table_lr=0.1)
    if checkpointed:
        model.gradient_checkpointing_enable()
    with memory.off(orders=3):
        loss = model(input_ids=text(), labels=text()).loss
    loss.backward()
    _, gradient = memory.gradients[0][0]
    by_column = gradient.unflatten(-1, (-1, 8)) if gradient.dim() < 4 else gradient
    assert by_column[..., :2, :].any() and not by_column[..., 2:, :].any()


@torch.no_grad()
def test_a_compiled_model_is_switched_too():
    model, memory = own()
    compiled = torch.compile(model, backend="eager")
    for what in ({}, {"positions": 2}, {"orders": 2}, None):
        if what is None:
            torch.testing.assert_close(compiled(IDS), model(IDS))
            continue
        with memory.off(**what):
            torch.testing.assert_close(compiled(IDS), model(IDS))


@pytest.mark.parametrize(
    "what, error, words",
    [
        ({"layers": 1}, ValueError, r"layers \[1\] are not in the memory, which has layers \[0, 2\]"),
        ({"layers": [0, 7, 5]}, ValueError, r"layers \[5, 7\]"),
        ({"orders": 4}, ValueError, r"orders \[4\] are not in the memory, which has orders \[2, 3\]"),
        ({"layers": "0"}, TypeError, "layers must be an integer or several, not '0'"),
        ({"orders": 2.0}, TypeError, "orders must be"),
        ({"layers": True}, TypeError, "layers must be"),
        ({"positions": -1}, ValueError, "positions count from the start of the text, 0 or more, not -1"),
        ({"positions": torch.ones(1, 8, dtype=torch.bool)}, TypeError, "positions must be integers in one dimension"),
        ({"positions": [0.5]}, TypeError, "positions must be"),
        ({"ngrams": [(1, 2, 3, 4)]}, ValueError, r"the n-gram \[1, 2, 3, 4\] has 4 tokens: give n-grams of orders"),
        ({"ngrams": [(5, 9)], "orders": 3}, ValueError, r"has 2 tokens: give n-grams of orders \[3\]"),
        ({"ngrams": (5, 9)}, TypeError, "put one n-gram in a list"),
        ({"ngrams": "New York"}, TypeError, "encode texts first"),
        ({"ngrams": ["of"]}, TypeError, "the token ids of an n-gram must be"),
        ({"ngrams": [(5, VOCAB)]}, IndexError, str(VOCAB)),
        ({"ngrams": [(5, -1)]}, ValueError, "has ids that are not text"),
    ],
)
def test_what_the_memory_does_not_have_is_refused_before_anything_is_off(what, error, words):
    _, memory = own()
    before = added(memory)
    with pytest.raises(error, match=words):
        memory.off(**what)
    assert torch.equal(added(memory), before)


@pytest.mark.parametrize("what", [{"layers": ()}, {"orders": []}, {"ngrams": []}, {"positions": []}, {"positions": 99}])
def test_an_empty_selection_turns_nothing_off(what):
    _, memory = own()
    before = added(memory)
    with memory.off(**what):
        assert torch.equal(added(memory), before)
