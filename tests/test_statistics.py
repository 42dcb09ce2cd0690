from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from engram.ablation import statistics
from engram.ablation.statistics import (
    bits_per_byte,
    loss_by_count,
    ngram_counts,
    over_seeds,
    paired_bootstrap,
    paired_interval,
    wider,
)


def arms(rng, documents=150, effect=-0.3, seeds=None, seed_spread=0.0):
    """Draw two arms over documents of unequal length and difficulty whose true per-token difference is `effect`."""
    weights = rng.integers(20, 400, documents).astype(float)
    shape = (documents,) if seeds is None else (seeds, documents)
    base = (4 + rng.normal(0, 1, documents)) * weights
    own = effect + rng.normal(0, 0.4, documents) + (0 if seeds is None else rng.normal(0, seed_spread, (seeds, 1)))
    b = np.broadcast_to(base, shape) + rng.normal(0, 5, shape)
    return b + own * weights, b, weights


def test_the_interval_covers_a_known_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    inside = 0
    for trial in range(400):
        a, b, weights = arms(rng)
        interval = paired_bootstrap(a, b, weights, samples=500, seed=trial)
        inside += interval.low <= -0.3 <= interval.high
    assert 0.90 <= inside / 400 <= 0.98


def test_with_seeds_the_interval_covers_the_truth_although_documents_are_shared_by_all_seeds():
    # Separate draws of documents for every seed would cover far less: the variance that seeds share would be averaged.
    rng = np.random.default_rng(1)
    inside = 0
    for trial in range(300):
        a, b, weights = arms(rng, seeds=8, seed_spread=0.02)
        interval = paired_bootstrap(a, b, weights, samples=500, seed=trial)
        inside += interval.low <= -0.3 <= interval.high
    assert 0.90 <= inside / 300 <= 0.99


@pytest.mark.parametrize("seeds", [2, 3])
def test_of_few_seeds_that_vary_the_wider_interval_covers_the_truth_where_the_bootstrap_does_not(seeds):
    rng, inside = np.random.default_rng(8), {paired_bootstrap: 0, paired_interval: 0}
    for _ in range(200):
        a, b, weights = arms(rng, documents=40, seeds=seeds, seed_spread=0.3)
        for measure in inside:
            interval = measure(a, b, weights)
            inside[measure] += interval.low <= -0.3 <= interval.high
    assert inside[paired_bootstrap] / 200 < 0.85 and inside[paired_interval] / 200 > 0.93


def test_the_wider_interval_contains_both_and_is_the_bootstrap_of_one_seed():
    a, b, weights = arms(np.random.default_rng(9), seeds=3, seed_spread=0.05)
    drawn, student = paired_bootstrap(a, b, weights), over_seeds((a - b).sum(axis=1) / weights.sum())
    both = paired_interval(a, b, weights)
    assert both.mean == drawn.mean == pytest.approx(student.mean)
    assert both[1:] == (min(drawn.low, student.low), max(drawn.high, student.high))
    assert paired_interval(a[:1], b[:1], weights) == paired_bootstrap(a[:1], b[:1], weights)
    assert wider(drawn, over_seeds([1.0])) == drawn


def test_identical_arms_give_an_interval_of_no_width_at_zero():
    a, _, weights = arms(np.random.default_rng(2))
    assert paired_bootstrap(a, a, weights) == (0.0, 0.0, 0.0)


def test_a_constant_difference_gives_an_interval_of_no_width_there():
    a, _, weights = arms(np.random.default_rng(3))
    assert paired_bootstrap(a - 0.25 * weights, a, weights) == pytest.approx((-0.25, -0.25, -0.25))


def test_pairing_narrows_the_interval():
    a, b, weights = arms(np.random.default_rng(4))
    shuffled = np.random.default_rng(5).permutation(len(b))
    paired = paired_bootstrap(a / weights, b / weights, np.ones_like(weights))
    unpaired = paired_bootstrap(a / weights, (b / weights)[shuffled], np.ones_like(weights))
    assert paired.high - paired.low < 0.5 * (unpaired.high - unpaired.low)


def test_a_spread_between_seeds_widens_the_interval():
    rng = np.random.default_rng(6)
    calm = paired_bootstrap(*arms(rng, seeds=5, seed_spread=0.0))
    wild = paired_bootstrap(*arms(rng, seeds=5, seed_spread=0.5))
    assert wild.high - wild.low > 2 * (calm.high - calm.low)


def test_the_mean_is_weighted_by_tokens_and_not_by_documents():
    interval = paired_bootstrap(np.array([10.0, 0.0]), np.array([0.0, 0.0]), np.array([1.0, 9.0]))
    assert interval.mean == pytest.approx(1.0)


def test_one_seed_as_a_row_equals_one_seed_as_a_vector():
    a, b, weights = arms(np.random.default_rng(7))
    assert paired_bootstrap(a[None], b[None], weights) == paired_bootstrap(a, b, weights)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    a, b, weights = arms(np.random.default_rng(8))
    first = paired_bootstrap(a, b, weights, seed=1)
    assert first == paired_bootstrap(a, b, weights, seed=1) != paired_bootstrap(a, b, weights, seed=2)
    assert first.low < first.mean < first.high


@pytest.mark.parametrize("seeds", [None, 3])
def test_draws_that_were_kept_are_the_draws_that_would_be_made_anew(seeds, monkeypatch):
    first, second = (arms(np.random.default_rng(k), seeds=seeds) for k in (9, 10))
    kept = [paired_bootstrap(*both) for both in (first, second, first)]
    monkeypatch.setattr(statistics, "_MOST_KEPT", 0)
    assert kept == [paired_bootstrap(*both) for both in (first, second, first)] and kept[0] != kept[1]


@pytest.mark.parametrize(
    ("a", "b", "weights"),
    [
        ([1.0, 2.0], [1.0, 2.0, 3.0], [1.0, 1.0]),
        ([1.0, 2.0], [1.0, 2.0], [1.0]),
        ([1.0], [1.0], [1.0]),
        ([1.0, math.nan], [1.0, 2.0], [1.0, 1.0]),
        ([1.0, 2.0], [1.0, 2.0], [1.0, 0.0]),
    ],
    ids=["arms-differ", "weights-differ", "one-document", "nan", "zero-weight"],
)
def test_losses_that_cannot_be_paired_are_refused(a, b, weights):
    with pytest.raises(ValueError):
        paired_bootstrap(np.array(a), np.array(b), np.array(weights))


def slow_counts(ids, documents, order):
    grams = {}
    for end in range(order - 1, len(ids)):
        window = slice(end - order + 1, end + 1)
        if len(set(documents[window].tolist())) == 1:
            grams[end] = tuple(ids[window].tolist())
    return grams


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("vocab", [5, 2**15])
def test_ngram_counts_equal_a_slow_count_with_a_dictionary(order, vocab):
    rng = np.random.default_rng(order)
    train, held = (
        np.where(rng.random(n) < 0.5, rng.integers(0, 4, n), vocab - 1 - rng.integers(0, 2, n)) for n in (3000, 500)
    )
    train_docs, held_docs = (
        np.sort(rng.integers(0, n // 8, n)) for n in (3000, 500)
    )  # many documents are shorter than the order
    seen = Counter(slow_counts(train, train_docs, order).values())
    grams = slow_counts(held, held_docs, order)
    expected = [seen[grams[t]] if t in grams else -1 for t in range(len(held))]
    found = ngram_counts(train.astype(np.int32), train_docs, order).lookup(held.astype(np.int32), held_docs)
    assert found.dtype == np.int64 and found.tolist() == expected
    assert max(expected) > 0 and (order == 1 or -1 in expected)


def test_a_document_number_that_comes_back_does_not_join_its_parts():
    ids, documents = np.array([1, 2, 3]), np.array([0, 1, 0])
    assert ngram_counts(ids, documents, 3).keys.size == 0
    assert ngram_counts(ids, documents, 3).lookup(ids, documents).tolist() == [-1, -1, -1]


def test_a_batch_is_looked_up_row_by_row():
    ids = np.array([1, 2, 1, 2, 3])
    counts = ngram_counts(ids, np.zeros(5, int), 2)
    batch = np.array([[1, 2, 3], [2, 1, 1]])
    assert counts.lookup(batch, np.zeros((2, 3), int)).tolist() == [[-1, 2, 1], [-1, 1, 0]]


def test_a_text_shorter_than_the_order_has_no_ngrams():
    for order in (2, 3, 4, 6):
        counts = ngram_counts(np.array([1]), np.array([0]), order)
        assert counts.lookup(np.array([1, 1, 1, 1]), np.zeros(4, int)).max() == (-1 if order > 4 else 0)


@pytest.mark.parametrize(("ids", "order"), [([2**21, 1, 1], 3), ([-1, 1, 1], 2), ([1, 1, 1], 0)])
def test_ids_that_do_not_pack_exactly_are_refused(ids, order):
    with pytest.raises(ValueError, match="to pack exactly"):
        ngram_counts(np.array(ids), np.zeros(3, int), order)


def test_the_largest_ids_of_every_order_stay_apart():
    for order in (2, 3, 4):
        top = 2 ** (63 // order) - 1
        ids = np.array([top] * order + [top - 1])
        assert ngram_counts(ids, np.zeros(order + 1, int), order).counts.tolist() == [1, 1]


def test_losses_are_split_by_count_and_add_up_again():
    counts = np.array([-1, 0, 0, 1, 2, 9, 10, 5000])
    losses = np.array([100.0, 1, 3, 5, 7, 9, 11, 13])
    split = loss_by_count(losses, counts)
    assert split == {"0": (2, 2.0), "1": (1, 5.0), "2-9": (2, 8.0), "10+": (2, 12.0)}
    assert sum(n * loss for n, loss in split.values()) == losses[1:].sum()


def test_an_empty_bucket_has_no_loss():
    tokens, loss = loss_by_count(np.array([1.0]), np.array([0]))["10+"]
    assert tokens == 0 and math.isnan(loss)


def test_bits_per_byte_of_a_uniform_guess_over_bytes_is_eight():
    assert bits_per_byte(1000 * math.log(256), 1000) == pytest.approx(8.0)
    with pytest.raises(ValueError, match="need a text of at least 1 byte, not of 0"):
        bits_per_byte(1.0, 0)
