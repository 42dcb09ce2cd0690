"""The arms of the lab: none sees the future, each learns, and what is said to be matched is."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from engram import EngramConfig, HostTable, TokenMap, TransformerConfig, evaluate, train
from engram.fusion import EngramFusion
from engram.lm.run import Data, Setting
from engram.lm.train import Batches, TrainConfig
from engram.lm.transformer import Cache, Transformer
from experiments import arms
from experiments.arms import host, knn_lm, mixture
from experiments.arms.bigram_embedding import BigramAddress
from experiments.arms.kneser_ney import KneserNey, discounts
from experiments.arms.knn_lm import Neighbours
from experiments.arms.layer_embeddings import GatedRow
from experiments.arms.mixture import fit_weight, seen_windows
from experiments.arms.moe import MoE
from experiments.arms.product_key import ProductKeys
from tests.toy import VOCAB, corpus

TIME = 16
OPTIONS = {"moe+engram": {"experts": 4, "rows": 100}, "knn-lm": {"index": "exact"}}
MIXTURES = ("kneser-ney", "knn-lm")
PARTS = (slice(0, 5), slice(5, None))
OTHER_START = ("random", "wider", "deeper", "moe-total", "moe-active", "moe+engram")  # step-0 logits not plain's
LOOKING_BACK = ("engram", "gate-one", "bigram-embedding", "hashed-bigram", "over-encoding", "moe+engram")

SETTING = Setting(
    "toy",
    VOCAB,
    TransformerConfig(vocab_size=VOCAB, hidden_size=32, layers=2, heads=2, max_length=TIME),
    EngramConfig(layers=(1,), orders=(2, 3), heads=2, head_dim=8, rows_per_head=997),
    TrainConfig(tokens=20 * 4 * TIME, batch_size=4, context=TIME, lr=1e-2, table_lr=0.05, warmup_steps=3),
)
DATA = Data(None, TokenMap.identity(VOCAB), corpus(), corpus(10, seed=1), None, "toy")  # type: ignore[arg-type]
LARGE = replace(
    SETTING,
    model=TransformerConfig(vocab_size=4096, hidden_size=64, layers=2),
    memory=EngramConfig(layers=(1,), orders=(2, 3), heads=4, head_dim=32, rows_per_head=8192),
)
LARGE_DATA = replace(DATA, token_map=TokenMap.identity(4096))


@pytest.fixture(autouse=True)
def a_tune_slice_without_a_corpus(monkeypatch):
    held = {"tune": corpus(10, seed=2), "validation": DATA.validation}
    monkeypatch.setattr(mixture, "prepare", lambda setting, held_out: replace(DATA, validation=held[held_out]))


def build(name: str, setting: Setting = SETTING, data: Data = DATA) -> nn.Module:
    return arms.build(name, setting, data, **OPTIONS.get(name, {}))


@lru_cache
def trained(name: str):
    """(model, loss of each step) after 20 steps and finish(); shared, so tests leave it as it is."""
    model = build(name)
    log = train(model, DATA.train, SETTING.train)
    model = arms.finish(name, model, SETTING, DATA, **OPTIONS.get(name, {}))
    return model.eval(), [loss for _, loss in log.curve]


def some_ids(batch: int = 2, seed: int = 5) -> torch.Tensor:
    return torch.from_numpy(corpus(batch, TIME, seed).ids.astype(np.int64)).view(batch, TIME)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", arms.NAMES)
def test_no_logit_depends_on_a_later_token(name, training):
    model, _ = trained(name)
    ids = some_ids()
    changed = ids.clone()
    changed[:, 9] = (changed[:, 9] + 7) % VOCAB
    with torch.no_grad():
        model.train(training)
        before, after = model(ids), model(changed)
        model.eval()
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=0, atol=1e-5)
    assert (before[:, 9] - after[:, 9]).abs().max() > 1e-4


@pytest.mark.parametrize("name", arms.NAMES)
def test_padding_behind_a_window_changes_nothing(name):
    model, _ = trained(name)
    ids = some_ids(1)
    padded = torch.nn.functional.pad(ids[:, :7], (0, 9))
    with torch.no_grad():
        torch.testing.assert_close(model(padded)[:, :7], model(ids[:, :7]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in arms.NAMES if name not in MIXTURES])
def test_decoding_step_by_step_equals_the_full_pass(name):
    model, _ = trained(name)
    ids, cache = some_ids(1), Cache()
    with torch.no_grad():
        steps = [model(ids[:, a:b], cache=cache) for a, b in ((0, 5), (5, 6), (6, 7), (7, 16))]
        torch.testing.assert_close(torch.cat(steps, 1), model(ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_refuses_a_decoding_cache(name):
    with pytest.raises(ValueError, match="cache"):
        trained(name)[0](some_ids(1), cache=Cache())


@pytest.mark.parametrize("name", arms.NAMES)
def test_every_arm_learns(name):
    _, losses = trained(name)
    assert np.mean(losses[-3:]) < losses[0] - 0.1


@pytest.mark.parametrize("name", arms.NAMES)
def test_evaluate_runs_every_arm(name):
    loss = evaluate(trained(name)[0], DATA.validation).loss
    assert 0 < loss < math.log(VOCAB)


@pytest.mark.parametrize("name", LOOKING_BACK)
def test_rows_never_depend_on_the_document_before(name):
    memory = trained(name)[0].memory
    ids = some_ids(1)
    documents = (torch.arange(TIME) >= 6).long()[None]
    packed, alone = memory.recall(ids, documents), memory.recall(ids[:, 6:])
    crossing = memory.recall(ids)
    for layer in memory.config.layers:
        assert torch.equal(packed.row_ids[layer][:, 6:], alone.row_ids[layer])
        assert not torch.equal(crossing.row_ids[layer][:, 6:], alone.row_ids[layer])


@pytest.mark.parametrize("name", [name for name in arms.NAMES if name not in OTHER_START])
def test_before_the_first_step_the_model_is_the_plain_one(name):
    ids = some_ids()
    with torch.no_grad():
        assert torch.equal(build(name)(ids), build("plain")(ids))


@pytest.mark.parametrize("name", arms.NAMES)
def test_the_backbone_starts_the_same_in_every_arm(name):
    weights = {key.replace(".block.", "."): value for key, value in build(name).named_parameters()}
    for key, value in build("plain").named_parameters():
        if ".ffn." in key and name in ("wider", "moe-total", "moe-active", "moe+engram"):
            continue
        assert torch.equal(weights[key], value), key


@pytest.mark.parametrize("name", arms.NAMES)
def test_a_state_dict_goes_back_into_a_new_model(name):
    model, again = build(name), build(name)
    with torch.no_grad():
        next(iter(model.parameters())).add_(1)
    again.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def total(model) -> int:
    return sum(p.numel() for p in model.parameters()) + arms.tables(model)["parameters"]


@pytest.mark.parametrize("ffn", ["relu2", "swiglu"])
@pytest.mark.parametrize(
    ("name", "tolerance"), [("wider", 2e-4), ("moe-total", 5e-3), ("moe-active", 5e-3), ("over-encoding", 1e-2)]
)
def test_total_parameters_equal_engrams(name, tolerance, ffn):
    setting = replace(LARGE, model=replace(LARGE.model, ffn=ffn))
    assert total(build(name, setting, LARGE_DATA)) == pytest.approx(
        total(build("engram", setting, LARGE_DATA)), rel=tolerance
    )


@pytest.mark.parametrize("name", ["hashed-bigram", "over-encoding", "layer-embeddings", "product-key"])
def test_tables_are_as_large_as_engrams(name):
    ours, engrams = (arms.tables(build(n, LARGE, LARGE_DATA)) for n in (name, "engram"))
    assert ours["parameters"] == pytest.approx(engrams["parameters"], rel=5e-3)
    assert ours["bytes"] == 4 * ours["parameters"]


def test_engrams_size_is_what_its_model_has():
    size, model = host.engram_size(LARGE, LARGE_DATA), build("engram", LARGE, LARGE_DATA)
    assert {"parameters": size.table, "bytes": size.bytes} == arms.tables(model)
    assert size.module == host.count(model) - host.count(build("plain", LARGE, LARGE_DATA))


def test_value_embeddings_hold_a_row_per_token_and_layer():
    assert arms.tables(build("value-embeddings", LARGE, LARGE_DATA))["parameters"] == 4096 * 64 * 2


def test_moe_active_has_plains_active_weights_and_its_router():
    model, plain = build("moe-active", LARGE, LARGE_DATA), build("plain", LARGE, LARGE_DATA)
    router = 2 * 64 * model.extra_facts["experts"]
    assert model.extra_facts["active_dense_parameters"] == host.count(plain) + router


def test_deeper_reaches_engrams_flops_with_the_fewest_blocks():
    above = build("deeper").extra_facts["forward_flops_above_engram"]
    assert 0 <= above < host.block_flops(SETTING)


def test_a_larger_vocabulary_takes_the_tables_bytes_up_to_the_cap():
    size = host.engram_size(LARGE, LARGE_DATA)
    rows = arms.vocabulary_for(LARGE) - LARGE.vocab_size
    assert rows * 2 * 64 * 4 == pytest.approx(size.bytes, rel=0.005)
    huge = replace(SETTING, memory=SETTING.memory.replace(rows_per_head=10_000_000))
    assert arms.vocabulary_for(huge) == 32_768


def test_switched_off_is_trained_as_engram_and_answers_without_memory():
    off, on = trained("switched-off")[0], trained("engram")[0]
    assert off.memory is None
    plain = Transformer(on.config)
    plain.load_state_dict({key: v for key, v in on.state_dict().items() if not key.startswith("memory.")})
    with torch.no_grad():
        assert torch.equal(off(some_ids()), plain(some_ids()))
        assert not torch.equal(off(some_ids()), on(some_ids()))


def test_shuffled_addresses_do_not_depend_on_the_ids():
    memory = trained("shuffled")[0].memory
    first, second = (memory.recall(some_ids(seed=seed)).row_ids[1] for seed in (5, 6))
    assert torch.equal(first, second)


def test_shuffled_rows_in_training_are_the_neighbours():
    model, engram = build("shuffled"), build("engram")
    ids, documents = some_ids(4), torch.zeros(4, TIME, dtype=torch.long)
    ours, theirs = (m.train().memory.recall(ids, documents).row_ids[1] for m in (model, engram))
    assert torch.equal(ours, theirs.roll(1, 0))


@pytest.mark.parametrize("name", ["shuffled", "bigram-embedding", "layer-embeddings", "product-key"])
def test_fetching_ahead_changes_no_result(name):
    model = build(name)
    log = train(model, DATA.train, SETTING.train, prefetch=False)
    assert [loss for _, loss in log.curve] == trained(name)[1]


def test_bigrams_have_a_row_each_and_unknown_ones_share_a_row_that_stays_zero():
    model, _ = trained("bigram-embedding")
    address: BigramAddress = model.memory.hasher
    everything = torch.cartesian_prod(torch.arange(VOCAB), torch.arange(VOCAB))
    rows = address(everything)[0][:, 1, 0]
    text = set(zip(DATA.train.ids[:-1].tolist(), DATA.train.ids[1:].tolist(), strict=True))
    known = {(a, b) for a, b in text if b != 0} | {(0, b) for b in range(VOCAB)}
    of_known = [int(row) for (a, b), row in zip(everything.tolist(), rows, strict=True) if (a, b) in known]
    of_others = {int(row) for (a, b), row in zip(everything.tolist(), rows, strict=True) if (a, b) not in known}
    assert sorted(of_known) == list(range(address.rows - 1))
    assert of_others == {address.rows - 1}
    table: HostTable = model.memory.tables[0]
    assert table.tensor[-1].eq(0).all() and table.tensor[:-1].ne(0).any()


def test_with_the_gate_at_1_the_hidden_state_decides_nothing():
    memory, recall = trained("gate-one")[0].memory, trained("gate-one")[0].memory.recall(some_ids())
    with torch.no_grad():
        first, second = (memory[1](torch.randn(2, TIME, 32), recall) for _ in range(2))
    assert torch.equal(first, second) and first.ne(0).any()


def test_value_embeddings_act_through_attention_alone():
    model, plain = build("value-embeddings"), build("plain")
    for table in model.memory.tables.values():
        table.tensor.normal_()
    with torch.no_grad():
        assert not torch.equal(model(some_ids()), plain(some_ids()))
        for block in (*model.blocks, *plain.blocks):
            block.attention.out.weight.zero_()
        assert torch.equal(model(some_ids()), plain(some_ids()))


def test_the_short_convolution_adds_what_stood_a_lag_before():
    model = build("short-conv")
    block = model.blocks[1]
    nn.init.constant_(block.conv_weight[:, 2], 0.5)
    x, rope = torch.randn(1, TIME, 32), (model.cos[:TIME], model.sin[:TIME])
    lagged = x.clone()
    lagged[:, 2:] += 0.5 * block.conv_norm(x)[:, :-2]
    with torch.no_grad():
        torch.testing.assert_close(block(x, rope), block.block(lagged, rope))


def test_the_short_convolution_stands_where_engram_does_or_everywhere():
    has = [
        [hasattr(b, "conv_weight") for b in arms.build("short-conv", SETTING, DATA, **how).blocks]
        for how in ({}, {"everywhere": True})
    ]
    assert has[0] == [layer in SETTING.memory.layers for layer in range(len(has[0]))] and all(has[1])
    assert not all(has[0])


def test_engram_can_hash_raw_ids():
    merged = replace(DATA, token_map=TokenMap(np.arange(VOCAB) // 2))
    compressed, raw = (arms.build("engram", SETTING, merged, token_map=m) for m in ("compressed", "identity"))
    assert (compressed.memory.hasher.token_map.size, raw.memory.hasher.token_map.size) == (VOCAB // 2, VOCAB)


def test_unknown_names_and_options_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'engrm'.*engram, one-row, .*plain"):
        arms.build("engrm", SETTING, DATA)
    with pytest.raises(ValueError, match=r"engram, one-row, .*plain"):
        arms.finish("engrm", None, SETTING, DATA)
    with pytest.raises(TypeError, match=r"no option expert; it has experts, top_k"):
        arms.build("moe-total", SETTING, DATA, expert=3)
    with pytest.raises(TypeError, match="it has none"):
        arms.finish("plain", None, SETTING, DATA, k=3)
    with pytest.raises(ValueError, match="compressed"):
        arms.build("engram", SETTING, DATA, token_map="raw")


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("layer-embeddings", lambda width: GatedRow(32, width, host.residual_std(2))),
        ("product-key", lambda width: ProductKeys(32, 64, width, 4, 16)),
    ],
)
def test_fusions_of_an_arm_start_from_the_numbers_after_engrams_own(name, make):
    memory = build(name).memory
    host.seed_extras(SETTING)
    for _ in memory.config.layers:
        EngramFusion(memory.config, 32)
    for layer in memory.config.layers:
        expected, started = make(memory.config.head_dim).state_dict(), memory.fusions[str(layer)].state_dict()
        assert all(torch.equal(started[key], value) for key, value in expected.items()) and len(started)


@pytest.mark.parametrize("name", ["bigram-embedding", "hashed-bigram", "layer-embeddings", "value-embeddings"])
def test_rows_of_an_arm_start_at_zero_and_each_layer_has_its_own(name):
    tables = build(name).memory.tables
    assert all(table.tensor.eq(0).all() for table in tables.values())
    assert len({table.tensor.data_ptr() for table in tables.values()}) == len(tables)


def test_product_keys_have_no_rows_for_token_ids_alone():
    with pytest.raises(RuntimeError, match="hidden state"):
        build("product-key").memory.hasher(some_ids())


# Mixture of experts


@pytest.mark.parametrize("gated", [False, True])
def test_a_token_gets_the_sum_of_its_top_k_experts_alone(gated):
    torch.manual_seed(0)
    moe = MoE(16, experts=5, inner=6, top_k=2, gated=gated, std=0.5).eval()
    moe.bias.uniform_(-0.1, 0.1)
    x = torch.randn(2, 3, 16)
    scores = moe.router(x).sigmoid()
    for place in np.ndindex(2, 3):
        best = (scores[place] + moe.bias).topk(2).indices  # the bias chooses and does not weigh
        expected = torch.zeros(16)
        for e in best.tolist():
            inner = 12 if gated else 6
            up, down = moe.up[e * inner : (e + 1) * inner], moe.down[e * 6 : (e + 1) * 6]
            share = 2 * scores[place][e] / scores[place][best].sum()
            expected = expected + share * (moe._activate(up @ x[place]) @ down)
        torch.testing.assert_close(moe(x)[place], expected)


def test_the_bias_moves_the_load_toward_uniform():
    torch.manual_seed(0)
    moe = MoE(16, experts=8, inner=4, top_k=2, gated=False, std=0.1)
    x = torch.randn(4, 64, 16) + 1.0  # a common direction: some experts are everybody's favourites
    nn.init.normal_(moe.router.weight, std=0.1)
    moe(x)
    first = moe.load.float()
    for _ in range(300):
        moe(x)
    assert first.sum() == moe.load.sum() == 4 * 64 * 2
    assert first.max() > 1.6 * first.mean() and moe.load.max() < 1.15 * first.mean()


def test_the_bias_stays_as_it_is_outside_training():
    moe = MoE(16, experts=8, inner=4, top_k=2, gated=False, std=0.1).eval()
    moe(torch.randn(1, 8, 16))
    assert moe.bias.eq(0).all()


def test_more_experts_per_token_than_experts_are_refused():
    with pytest.raises(ValueError, match="top_k"):
        arms.build("moe-total", SETTING, DATA, experts=2, top_k=3)
    with pytest.raises(ValueError, match="top_k"):  # its one weight would be 1, and the router would not learn
        arms.build("moe-total", SETTING, DATA, experts=4, top_k=1)


# Product keys


def test_product_keys_find_the_best_of_all_products():
    torch.manual_seed(0)
    module = ProductKeys(32, n=11, value=4, heads=3, top_k=7)
    hidden = torch.randn(2, 5, 32)
    rows, scores = module.search(hidden)
    q = module.queries(hidden)
    halves = torch.einsum("bthsc,hsnc->bthsn", q, module.keys)
    every = (halves[..., 0, :, None] + halves[..., 1, None, :]).flatten(-2)  # row = i * n + j
    best = every.topk(7, dim=-1)
    torch.testing.assert_close(scores, best.values)
    assert torch.equal(rows, best.indices)


def test_queries_are_normalised_over_the_batch_and_at_evaluation_by_what_was_seen():
    torch.manual_seed(0)
    module = ProductKeys(32, n=11, value=4, heads=3, top_k=7, norm="batch")
    queries = module.queries(torch.randn(8, 50, 32))
    assert queries.mean((0, 1)).abs().max() < 1e-5 and (queries.var((0, 1)) - 1).abs().max() < 0.01
    hidden = torch.randn(2, 5, 32)
    together = module.eval().queries(hidden)
    torch.testing.assert_close(together[:1, :3], module.queries(hidden[:1, :3]))
    with pytest.raises(ValueError, match="norm"):
        arms.build("product-key", SETTING, DATA, norm="layer")


def test_only_the_values_read_are_trained():
    model = build("product-key").train()
    model(some_ids()).sum().backward()
    ((row_ids, grad),) = model.memory.gradients[1]
    assert grad.shape == (*row_ids.shape, 8) and grad.ne(0).any()


# Mixtures


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_sums_to_1(name):
    model, _ = trained(name)
    assert 0 < model.weight < 1
    with torch.no_grad():
        total = model(some_ids(4)).double().exp().sum(-1)
    assert (total - 1).abs().max() < 1e-6


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_is_better_on_held_out_text_than_the_model_alone(name):
    assert evaluate(trained(name)[0], DATA.validation).loss < evaluate(trained("plain")[0], DATA.validation).loss - 0.05


def test_the_weight_is_the_best_of_all():
    rng = np.random.default_rng(0)
    a, b = rng.random(500), rng.random(500) ** 3
    grid = np.linspace(0, 1, 2001)
    best = grid[np.argmax([np.log((1 - w) * a + w * b).mean() for w in grid])]
    assert fit_weight(a, b) == pytest.approx(best, abs=1e-3)


def test_windows_counted_are_those_trained_on_each_once():
    setting = replace(SETTING, train=replace(SETTING.train, tokens=400 * 4 * TIME))  # several epochs
    ids, documents = seen_windows(setting, DATA)
    batches = Batches(DATA.train, TIME, 4)
    rows = {tuple(row) for step in range(setting.train.steps) for row in batches(step)[0].tolist()}
    assert {tuple(row) for row in ids[:, :-1].tolist()} == rows
    assert len(ids) == batches.windows and documents.shape == (len(ids), TIME + 1)
    few, _ = seen_windows(SETTING, DATA)
    assert len(few) == 20 * 4


def test_another_text_is_refused_when_the_weight_is_fitted(monkeypatch):
    monkeypatch.setattr(mixture, "prepare", lambda setting, held_out: replace(DATA, digest="other"))
    with pytest.raises(ValueError, match="another text"):
        arms.finish("kneser-ney", build("plain"), SETTING, DATA)


# Kneser-Ney


def slow_kneser_ney(windows: list[list[int]], vocab: int, order: int):
    """p(w | context), word for word after Chen and Goodman, with dicts; 0 opens a document and is never predicted."""
    raw = {n: Counter(tuple(w[i : i + n]) for w in windows for i in range(len(w) - n + 1)) for n in range(1, order + 1)}
    counts = {order: dict(raw[order])}
    for n in range(1, order):
        left = defaultdict(set)
        for gram in raw[n + 1]:
            left[gram[1:]].add(gram[0])
        counts[n] = {gram: len(before) for gram, before in left.items()}
        if n > 1:
            counts[n] |= {gram: c for gram, c in raw[n].items() if gram[0] == 0}
    taken = {}
    for n in range(1, order + 1):
        of = Counter(counts[n].values())
        if all(of[k] for k in (1, 2, 3, 4)):
            y = of[1] / (of[1] + 2 * of[2])
            taken[n] = [0.0, *(min(max(k - (k + 1) * y * of[k + 1] / of[k], 0), k) for k in (1, 2, 3))]
        else:
            taken[n] = [0.0, 0.5, 1.0, 1.5]

    def p(word: int, context: tuple[int, ...]) -> float:
        n = len(context) + 1
        lower = 1 / vocab if n == 1 else p(word, context[1:])
        group = {gram[-1]: c for gram, c in counts[n].items() if gram[:-1] == context}
        if not group:
            return lower
        total, d = sum(group.values()), taken[n]
        gamma = sum(d[min(c, 3)] for c in group.values()) / total
        c = group.get(word, 0)
        return (c - d[min(c, 3)]) / total + gamma * lower

    return p


def toy_windows(count: int = 40, time: int = 13, vocab: int = 9) -> np.ndarray:
    rng = np.random.default_rng(3)
    ids = np.minimum(rng.geometric(0.35, (count, time)), vocab - 1)
    ids[::2, 0] = 0
    return ids.astype(np.int64)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_kneser_ney_agrees_with_a_slow_reference(order):
    ids = toy_windows()
    fast = KneserNey(ids, np.zeros_like(ids), 9, order)
    slow = slow_kneser_ney(ids.tolist(), 9, order)
    text = toy_windows(3)[:, :6]
    p = fast(torch.from_numpy(text))
    for b, t, word in np.ndindex(3, 6, 9):
        context = tuple(text[b, max(0, t - order + 2) : t + 1].tolist())
        assert float(p[b, t, word]) == pytest.approx(slow(word, context), abs=1e-6)


@pytest.mark.parametrize("budget", [None, 3000, 600, 40])
def test_kneser_ney_sums_to_1_and_keeps_to_its_bytes(budget):
    ids = toy_windows()
    counts = KneserNey(ids, np.zeros_like(ids), 9, 4, budget)
    p = counts(torch.from_numpy(toy_windows(8)))
    assert (p.double().sum(-1) - 1).abs().max() < 1e-6 and p.min() > 0
    empty = counts.unigram.nbytes + 3 * 4  # three orders without an n-gram: one end mark each
    assert budget is None or counts.nbytes <= max(budget, empty)
    assert budget is None or counts.nbytes < KneserNey(ids, np.zeros_like(ids), 9, 4).nbytes


def test_pruning_keeps_the_commonest_ngrams():
    ids = toy_windows()
    whole, pruned = (KneserNey(ids, np.zeros_like(ids), 9, 2, budget) for budget in (None, 400))
    raw = Counter((int(a), int(b)) for row in ids for a, b in pairwise(row))

    def kept(model: KneserNey) -> set[tuple[int, int]]:
        order = model.orders[2]
        contexts = np.repeat(order.contexts, np.diff(order.starts))
        return set(zip(contexts.tolist(), order.tokens.tolist(), strict=True))

    assert kept(whole) == set(raw)
    dropped = kept(whole) - kept(pruned)
    assert dropped and max(raw[gram] for gram in dropped) <= min(raw[gram] for gram in kept(pruned))


def test_kneser_ney_never_looks_into_another_document():
    ids = toy_windows()
    counts = KneserNey(ids, np.zeros_like(ids), 9, 4)
    text = torch.from_numpy(toy_windows(2))
    documents = (torch.arange(13) >= 5).long().expand(2, -1)
    assert torch.equal(counts(text, documents)[:, 5:], counts(text[:, 5:]))
    cut = np.zeros_like(ids)
    cut[:, 5:] = 1
    whole, pieces = counts._pack(ids, cut, 3), [counts._pack(ids[:, part], cut[:, part], 3) for part in PARTS]
    assert sorted(whole.tolist()) == sorted(np.concatenate(pieces).tolist())


def test_discounts_follow_the_counts_of_counts():
    c = np.array([1] * 8 + [2] * 4 + [3] * 2 + [4])
    y = 8 / 16
    expected = [1 - 2 * y * 4 / 8, 2 - 3 * y * 2 / 4, 3 - 4 * y * 1 / 2]
    np.testing.assert_allclose(discounts(c)[[0, 8, 12, 14]], [*expected, expected[2]])


def test_ngrams_that_do_not_pack_are_refused():
    ids = toy_windows()
    with pytest.raises(ValueError, match="63 bits"):
        KneserNey(ids, np.zeros_like(ids), 200_000, 4)


# Nearest neighbours


def test_an_exact_index_gives_the_neighbours_of_brute_force():
    rng = np.random.default_rng(0)
    keys, values = rng.normal(size=(300, 8)).astype(np.float32), rng.integers(0, VOCAB, 300)
    near = Neighbours(keys, values, VOCAB, "exact", k=5, probes=1)
    near.temperature, near.queries = 2.0, torch.from_numpy(rng.normal(size=(2, 3, 8)).astype(np.float32))
    p = near(torch.zeros(2, 3, dtype=torch.long))
    for place in np.ndindex(2, 3):
        distance = ((keys - near.queries[place].numpy()) ** 2).sum(1)
        best = np.argsort(distance)[:5]
        votes = np.exp(-distance[best] / 2)
        expected = np.bincount(values[best], votes / votes.sum(), VOCAB)
        np.testing.assert_allclose(p[place].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("index", knn_lm.INDEXES)
def test_every_index_finds_a_key_that_it_holds(index):
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(2000, 16)).astype(np.float32)
    near = Neighbours(keys, np.arange(2000), 2000, index, k=8, probes=16)
    _, tokens = near.search(keys[:50])
    assert np.mean([i in row for i, row in enumerate(tokens)]) > (0.7 if index == "ivfpq" else 0.99)
    assert near.nbytes < keys.nbytes if index == "ivfpq" else near.nbytes >= keys.nbytes


def test_votes_sum_to_1_where_an_index_finds_too_few():
    near = Neighbours(np.eye(4, dtype=np.float32), np.arange(4), 4, "exact", k=3, probes=1)
    votes = near.votes(np.array([[0.5, np.inf, np.inf], [np.inf] * 3, [1.0, 1.0, 1e9]]))
    np.testing.assert_allclose(votes.sum(1), 1)
    np.testing.assert_allclose(votes[0], [1, 0, 0], atol=1e-12)


def test_votes_of_far_neighbours_do_not_underflow():
    near = Neighbours(np.eye(4, dtype=np.float32), np.arange(4), 4, "exact", k=2, probes=1)
    share = 1 / (1 + math.exp(-1))
    np.testing.assert_allclose(near.votes(np.array([[2000.0, 2001.0]])), [[share, 1 - share]])


def test_the_datastore_can_be_limited_and_an_unknown_index_is_refused():
    few = arms.finish("knn-lm", build("plain"), SETTING, DATA, index="exact", limit=4 * TIME)
    assert few.extra_facts["keys"] <= 4 * TIME < trained("knn-lm")[0].extra_facts["keys"]
    with pytest.raises(ValueError, match="exact, ivf, ivfpq"):
        arms.finish("knn-lm", build("plain"), SETTING, DATA, index="hnsw")
