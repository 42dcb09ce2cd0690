"""CountMemory against a twin of dictionaries, and against bad input."""

from __future__ import annotations

import warnings
from collections import Counter

import numpy as np
import pytest

import engram
from engram.counts import CountMemory
from engram.counts.level import MOST
from engram.tables import kernels

VOCAB = 12


class Twin:
    """The same counts, the obvious way."""

    def __init__(self, orders):
        self.orders, self.grams = orders, {n: Counter() for n in orders}

    def observe(self, ids, documents, step=1):
        for row, numbers in zip(ids.tolist(), documents.tolist(), strict=True):
            for n in self.orders:
                for at in range(n - 1, len(row)):
                    gram, where = tuple(row[at - n + 1 : at + 1]), set(numbers[at - n + 1 : at + 1])
                    if min(gram) >= 0 and len(where) == 1:
                        self.grams[n][gram] += step

    def read(self, context, target, without=()):
        grams = Counter(self.grams[len(context) + 1])
        grams.subtract(without)
        following = {gram[-1]: count for gram, count in grams.items() if gram[:-1] == context and count > 0}
        once = sum(count == 1 for count in following.values())
        return sum(following.values()), len(following), once, following.get(target, 0)


def text(seed, rows=3, length=120, dead=True):
    rng = np.random.default_rng(seed)
    ids = rng.integers(-1 if dead else 0, VOCAB, (rows, length)) // rng.integers(1, 3, (rows, length))
    return ids, np.cumsum(rng.random((rows, length)) < 0.05, axis=1)


def context_of(ids, documents, row, at, n):
    """Tokens before the target of `at`, or None if they cross a document or a dead position."""
    begin = at - n + 2
    if begin < 0 or ids[row, begin : at + 1].min() < 0 or len({*documents[row, begin : at + 1].tolist()}) > 1:
        return None
    return tuple(ids[row, begin : at + 1].tolist())


def expect(twin, ids, targets, documents, leave_out=None):
    result = np.zeros((4, *ids.shape, len(twin.orders)), dtype=np.int64)
    for row, at in np.ndindex(ids.shape):
        for i, n in enumerate(twin.orders):
            if (context := context_of(ids, documents, row, at, n)) is None:
                continue
            others = []
            if leave_out == "document":
                others = [t for t in range(ids.shape[1]) if documents[row, t] == documents[row, at]]
            elif leave_out == "position":
                others = [at]
            without = Counter()
            for t in others:
                last = t + 1 == ids.shape[1]
                inside = targets[row, t] >= 0 and (last or documents[row, t] == documents[row, t + 1])
                if inside and context_of(ids, documents, row, t, n) is not None:
                    without[(*context_of(ids, documents, row, t, n), int(targets[row, t]))] += 1
            result[:, row, at, i] = twin.read(context, int(targets[row, at]), without)
    return result


def same(reading, expected):
    for part, name in zip(expected, reading._fields, strict=True):
        np.testing.assert_array_equal(getattr(reading, name), part, err_msg=name)


def targets_of(ids, documents):
    targets = np.full_like(ids, -1)
    targets[:, :-1] = ids[:, 1:]
    return targets


@pytest.fixture(params=["compiled", "python"])
def either(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(kernels, "native", None)
    return request.param


@pytest.mark.parametrize("orders", [(2,), (2, 3, 4), (3, 5)])
@pytest.mark.parametrize("leave_out", [None, "position", "document"])
def test_counts_equal_those_of_dictionaries(orders, leave_out, either):
    ids, documents = text(0)
    counts, twin = CountMemory(VOCAB, orders), Twin(orders)
    assert counts.observe(ids, documents) == (ids >= 0).sum() == counts.positions
    twin.observe(ids, documents)
    targets = targets_of(ids, documents)
    same(counts.lookup(ids, targets, documents, leave_out=leave_out), expect(twin, ids, targets, documents, leave_out))
    for context in {gram[:-1] for n in orders for gram in twin.grams[n]}:
        tokens, times = counts.successors(context)
        found = dict(zip(tokens.tolist(), times.tolist(), strict=True))
        assert found == {g[-1]: c for g, c in twin.grams[len(context) + 1].items() if g[:-1] == context and c}
        assert tokens.tolist() == sorted(found)


def test_compiled_and_python_kernels_make_the_same_bits(monkeypatch):
    made = []
    for native in (kernels.native, None):
        monkeypatch.setattr(kernels, "native", native)
        counts = CountMemory(VOCAB, (2, 4))
        for seed in range(3):
            counts.observe(*text(seed))
        counts.forget(*text(1))
        made.append(counts)
    for a, b in zip(made[0].levels, made[1].levels, strict=True):
        np.testing.assert_array_equal(a.nodes[: a.used], b.nodes[: b.used])
        np.testing.assert_array_equal(a.slots, b.slots)


def test_large_texts_grow_the_tables_and_pieces_join(monkeypatch):
    rng = np.random.default_rng(5)
    ids = rng.integers(0, 50, (1, 40_000))
    counts = CountMemory(50, (2, 3, 4))
    counts.observe(ids)
    for n in (2, 3, 4):
        grams = Counter(zip(*(ids[0, k : ids.shape[1] - n + 1 + k].tolist() for k in range(n)), strict=True))
        nodes = counts.levels[n - 1].nodes[1 : counts.levels[n - 1].used]
        assert len(nodes) == len(grams) and sorted(nodes[:, 2].tolist()) == sorted(grams.values())
    half = CountMemory(50, (2, 3, 4))
    monkeypatch.setattr("engram.counts.memory._CHUNK", 7)
    half.observe(ids[:, :5000])
    whole = CountMemory(50, (2, 3, 4))
    monkeypatch.setattr("engram.counts.memory._CHUNK", 5000)
    whole.observe(ids[:, :5000])
    same(half.lookup(ids[:, :900], ids[:, 1:901]), whole.lookup(ids[:, :900], ids[:, 1:901]))


@pytest.mark.parametrize("length", [1, 2, 5])
def test_lookback_reads_as_the_whole_text_does(length):
    ids, documents = text(3)
    counts = CountMemory(VOCAB)
    counts.observe(ids, documents)
    targets = targets_of(ids, documents)
    whole = counts.lookup(ids, targets)
    piece = counts.lookup(ids[:, 40:], targets[:, 40:], lookback=ids[:, 40 - length : 40])
    have = min(length, 2) + 1  # contexts of one token always, longer ones at the start only with enough look-back
    for part, full in zip(piece, whole, strict=True):
        np.testing.assert_array_equal(part[:, :, :have], full[:, 40:, :have])


def test_forgetting_a_text_undoes_it_exactly(either):
    first, second = text(1), text(2)
    counts, once = CountMemory(VOCAB), CountMemory(VOCAB)
    counts.observe(*first)
    once.observe(*first)
    counts.observe(*second)
    assert counts.forget(*second) == (second[0] >= 0).sum()
    assert (counts.positions, counts.texts) == (once.positions, once.texts)
    for ids, documents in (first, second):
        targets = targets_of(ids, documents)
        same(counts.lookup(ids, targets, documents), once.lookup(ids, targets, documents))
    for token in range(VOCAB):
        for a, b in zip(counts.successors([token]), once.successors([token]), strict=True):
            np.testing.assert_array_equal(a, b)
    counts.observe(*second)
    once.observe(*second)
    same(counts.lookup(second[0], targets, second[1]), once.lookup(second[0], targets, second[1]))


@pytest.mark.parametrize("other", [[[1, 2, 3, 9]], [[9]], [[1, 2, 3, 1, 2, 3]], [[3, 2, 1]]])
def test_forgetting_what_was_not_observed_is_refused_and_changes_nothing(other):
    counts = CountMemory(VOCAB, (2, 3))
    counts.observe([[1, 2, 3, 4]])
    before = [level.nodes[: level.used].copy() for level in counts.levels]
    with pytest.raises(ValueError, match=r"n-gram \[.*\] more often than it was counted"):
        counts.forget(other)
    for level, nodes in zip(counts.levels, before, strict=True):
        np.testing.assert_array_equal(level.nodes[: level.used], nodes)
    assert counts.positions == 4


def test_pruning_keeps_to_its_bytes_and_contexts_stay_consistent():
    ids, documents = text(7, rows=8, length=400)
    counts = CountMemory(VOCAB)
    counts.observe(ids, documents)
    assert counts.prune(counts.nbytes) == 0 and not counts.pruned  # only room that the text did not need
    full = counts.nbytes
    for budget in (full * 3 // 4, full // 2, full // 4, full // 8):
        assert counts.prune(budget) > 0
        assert counts.nbytes <= budget and counts.pruned and "pruned" in repr(counts)
        for n, level in enumerate(counts.levels[:-1], 1):
            for node in range(1, level.used):
                _, tokens, times = counts.levels[n].successors(np.array([node], dtype=np.uint32), level)
                assert level.nodes[node, 5:8].tolist() == [len(tokens), (times == 1).sum(), times.sum()]
        targets = targets_of(ids, documents)
        for leave_out in (None, "position", "document"):
            reading = counts.lookup(ids, targets, documents, leave_out=leave_out)
            assert all((part >= 0).all() for part in reading) and (reading.hits <= reading.total).all()
    with pytest.raises(ValueError, match="not pruned"):
        counts.forget(ids, documents)
    with pytest.raises(ValueError, match="single tokens alone take"):
        counts.prune(10)


def test_pruning_drops_the_rarest_of_the_highest_order_first():
    counts = CountMemory(VOCAB, (2, 3))
    counts.observe([[1, 2, 3]] * 5 + [[1, 2, 4]] + [[5, 6, 7]] * 2)
    assert counts.prune(counts.nbytes) == 0
    assert counts.prune(counts.nbytes - 1) == 1
    assert counts.successors([1, 2])[0].tolist() == [3] and counts.successors([5, 6])[0].tolist() == [7]
    assert counts.successors([2])[0].tolist() == [3, 4]


def test_saved_counts_load_verify_and_grow_on(tmp_path):
    counts = CountMemory(VOCAB)
    counts.observe(*text(1))
    folder = counts.save(tmp_path / "counts")
    assert not [entry for entry in engram.verify(folder) if entry["problem"]]
    loaded = CountMemory.load(folder, vocab_size=VOCAB)
    assert repr(loaded) == repr(counts) and loaded.texts == counts.texts
    for memory in (counts, loaded):
        memory.observe(*text(2))
    ids, documents = text(2)
    same(loaded.lookup(ids, ids, documents), counts.lookup(ids, ids, documents))
    with pytest.raises(FileExistsError):
        counts.save(folder)
    with pytest.raises(ValueError, match="vocabulary of 12, not 13"):
        CountMemory.load(folder, vocab_size=13)


@pytest.mark.parametrize("file", ["4-grams.nodes", "2-grams.slots", "manifest.json"])
def test_a_torn_file_is_an_error_by_name(file, tmp_path):
    counts = CountMemory(VOCAB)
    counts.observe(*text(1))
    path = counts.save(tmp_path / "counts") / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest|digest|damaged"):
        CountMemory.load(path.parent)
    path.write_bytes(content[:-5])
    with pytest.raises(ValueError, match=r"truncated|manifest|damaged"):
        CountMemory.load(path.parent)


def test_a_text_observed_twice_is_legal_and_said():
    counts = CountMemory(VOCAB, (2,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        counts.observe([[1, 2]])
        counts.observe([[1, 3]])
    with pytest.warns(UserWarning, match="was observed before, so its n-grams count 2 times"):
        counts.observe([[1, 2]])
    assert counts.successors([1])[1].tolist() == [2, 1]


def test_counts_that_could_overflow_are_refused_before_anything_is_counted():
    counts = CountMemory(VOCAB, (2,))
    counts.observe([[1, 2]])
    counts.positions = MOST - 1
    with pytest.raises(ValueError, match="could overflow a count of 32 bits"):
        counts.observe([[1, 2]])
    assert counts.successors([1])[1].tolist() == [1] and len(counts.texts) == 1


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda c: c.observe([[VOCAB]]), IndexError, "outside the vocabulary of 12"),
        (lambda c: c.observe([[0.5]]), TypeError, "ids must be integers"),
        (lambda c: c.observe([[[1]]]), ValueError, r"\[T\] or \[B, T\]"),
        (lambda c: c.observe([[1, 2]], [[0]]), ValueError, "must have the shape of ids"),
        (lambda c: c.lookup([[1, 2]], [[1]]), ValueError, "must have the shape of ids"),
        (lambda c: c.lookup([[1]], [[99]]), IndexError, "targets have 99"),
        (lambda c: c.lookup([[1]], [[1]], leave_out="row"), ValueError, "leave_out is None"),
        (lambda c: c.lookup([[1]], [[1]], lookback=[[1], [2]]), ValueError, "lookback has 2 rows"),
        (lambda c: c.successors([1, 2, 3, 4]), ValueError, "a context is 1 to 3 tokens"),
        (lambda c: CountMemory(0), ValueError, "vocab_size is 1"),
        (lambda c: CountMemory(5, (1, 2)), ValueError, "2 or more"),
        (lambda c: CountMemory(5, (3, 2)), ValueError, "ascending"),
        (lambda c: CountMemory(5, (2, 17)), ValueError, "at most 16"),
        (lambda c: CountMemory(5.5), TypeError, "vocab_size must be an int"),
    ],
)
def test_bad_input_is_an_error_by_name(call, error, words):
    counts = CountMemory(VOCAB)
    with pytest.raises(error, match=words):
        call(counts)
    assert counts.positions == 0


def test_an_empty_text_counts_nothing():
    counts = CountMemory(VOCAB)
    assert counts.observe(np.zeros((0, 5), dtype=np.int64)) == counts.observe([-1, -1]) == 0
    assert counts.lookup([[1]], [[2]]).total.tolist() == [[[0, 0, 0]]]
