from __future__ import annotations

import copy
import ctypes
import hashlib
import json
import os
import pickle
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_hash import hash_of, row_ids
from tokenizers_v3_v4 import token_map as real_token_map

from engram.addressing import HashLayout, NgramHasher, TokenMap, hasher
from engram.tables import kernels

GOLDEN = Path(__file__).parent / "golden"
VOCAB = 60


def small_map() -> TokenMap:
    """Make a map of 60 raw ids onto 50 compressed ones; raw 59 is compressed 7."""
    table = np.concatenate([np.arange(50), np.arange(16, 6, -1)])
    return TokenMap(table)


def small_layout(orders=(2, 3), heads=2, rows=(97, 89), family="multiply_xor", layers=(1, 3), seed=0) -> HashLayout:
    return HashLayout.build(50, layers, orders, heads, rows, pad_id=7, seed=seed, family=family)


def every_path(layout, token_map, ids, lookback=None, documents=None) -> dict[int, np.ndarray]:
    """Return the row ids of the C kernel and of torch operations, from numpy and torch, int64 and int32, after checking
    that all are equal."""
    results = []
    for dtype in (np.int64, np.int32):
        arrays = [None if a is None else np.asarray(a, dtype) for a in (ids, lookback, documents)]
        tensors = [None if a is None else torch.from_numpy(a) for a in arrays]
        for kernel in (hasher._kernel, None):
            with patch.object(hasher, "_kernel", kernel):
                run = NgramHasher(layout, token_map)
                results += [run(*arrays), run(*tensors)]
                assert all(isinstance(rows, np.ndarray) for rows in results[-2].values())
                assert all(isinstance(rows, torch.Tensor) for rows in results[-1].values())
    for result in results:
        for layer, rows in result.items():
            assert rows.dtype in (np.int64, torch.int64)
            np.testing.assert_array_equal(np.asarray(rows), np.asarray(results[0][layer]))
    return results[0]


def check(layout, token_map, ids, lookback=None, documents=None) -> dict[int, np.ndarray]:
    """Return the row ids after checking that every path equals the slow reference."""
    found = every_path(layout, token_map, ids, lookback, documents)
    expected = row_ids(layout, token_map, ids, lookback, documents)
    for layer in layout.layers:
        np.testing.assert_array_equal(found[layer], expected[layer])
    return found


def random_ids(shape=(3, 9), seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, shape)


def test_compiled_kernel_is_what_runs() -> None:
    if kernels.native is None and not os.environ.get("CI"):
        pytest.skip("no compiled kernels: only the torch path is tested")
    assert hasher._kernel is not None


# --- published numbers ---


def test_rows_of_the_small_example_equal_the_published_ones() -> None:
    golden = json.loads((GOLDEN / "small.json").read_text())
    layout = HashLayout.build(1000, [1, 3], [2, 3], 2, [97, 89], pad_id=golden["pad"])
    found = check(layout, TokenMap.identity(1000), [golden["compressed_ids"]])
    for layer, expected in golden["indices"].items():
        assert (found[int(layer)][0] - layout.offsets[int(layer)]).tolist() == expected


def test_rows_of_real_text_equal_the_released_demos() -> None:
    golden = json.loads((GOLDEN / "demo.json").read_text())
    token_map = real_token_map("v3")
    layout = HashLayout.build(token_map.size, [1, 15], [2, 3], 8, 646_400, pad_id=golden["pad_id"])
    found = check(layout, token_map, [golden["raw_ids"]])
    for layer, digest in golden["sha256_int64_le"].items():
        indices = found[int(layer)][0] - layout.offsets[int(layer)]
        assert indices[:4].tolist() == golden["first_rows"][layer]
        assert hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest() == digest


def test_layout_of_the_largest_released_model_hashes_alike_on_every_path() -> None:
    token_map = real_token_map("v4")
    layout = HashLayout.build(token_map.size, [1, 14], [2, 3, 4], 8, 16_000_000, pad_id=2)
    found = check(layout, token_map, np.random.default_rng(0).integers(0, len(token_map.table), (2, 40)))
    assert max(rows.max() for rows in found.values()) > 2**28


# --- the window ---


def test_bigram_window_never_reads_future_tokens() -> None:
    ids = random_ids((1, 12))
    whole = every_path(small_layout(), small_map(), ids)
    for t in range(1, 12):
        changed = ids.copy()
        changed[:, t:] = (changed[:, t:] + 1) % VOCAB
        rows = every_path(small_layout(), small_map(), changed)
        for layer in (1, 3):
            np.testing.assert_array_equal(rows[layer][:, :t], whole[layer][:, :t])


def test_rows_of_an_order_depend_on_exactly_that_many_tokens() -> None:
    layout = small_layout(orders=(2, 4), heads=8, rows=10_007)
    ids = np.array([[1, 2, 3, 4, 5], [1, 9, 3, 4, 5], [9, 2, 3, 4, 5]])
    base, third_back_differs, fourth_back_differs = every_path(layout, small_map(), ids)[1][:, -1]
    assert (base[:8] == third_back_differs[:8]).all() and (base[8:] != third_back_differs[8:]).all()
    assert (base == fourth_back_differs).all()


def test_first_multiplier_belongs_to_the_current_token() -> None:
    layout = small_layout()
    (m0, m1, m2), ((p, _), (q, _)) = layout.multipliers[1], layout.moduli[1]
    rows = every_path(layout, TokenMap.identity(50), [[11, 22, 33]])[1][0, 2] - layout.offsets[1]
    assert rows[0] == (33 * m0 ^ 22 * m1) % p != (22 * m0 ^ 33 * m1) % p
    assert rows[2] == (33 * m0 ^ 22 * m1 ^ 11 * m2) % q != (11 * m0 ^ 22 * m1 ^ 33 * m2) % q


def test_remainder_is_taken_of_the_whole_mix_and_not_of_its_last_product() -> None:
    layout = small_layout()
    (m0, m1, _), p = layout.multipliers[1], layout.moduli[1][0][0]
    row = every_path(layout, TokenMap.identity(50), [[22, 33]])[1][0, 1, 0]
    assert row == ((33 * m0) ^ (22 * m1)) % p != (33 * m0) ^ ((22 * m1) % p)


def test_all_heads_of_an_order_share_the_mix() -> None:
    layout = small_layout(heads=5, rows=1000)
    found = every_path(layout, TokenMap.identity(50), [[3, 4, 5]])
    for layer in layout.layers:
        for n in (2, 3):
            mix = hash_of(layout, layer, [5, 4, 3][:n])
            expected = [mix % p for p in layout.moduli[layer][n - 2]]
            columns = slice((n - 2) * 5, (n - 1) * 5)
            assert (found[layer][0, 2] - layout.offsets[layer])[columns].tolist() == expected


def test_rows_stay_in_the_range_of_their_head() -> None:
    layout = small_layout(heads=3, rows=[10, 50])
    found = every_path(layout, small_map(), random_ids((4, 200)))
    for layer in layout.layers:
        starts = np.array(layout.offsets[layer])
        ends = np.append(starts[1:], layout.rows[layer])
        assert (found[layer] >= starts).all() and (found[layer] < ends).all()


# --- boundaries ---


def test_first_positions_are_padded_with_the_pad_id_and_not_with_a_repeated_token() -> None:
    layout, pad = small_layout(), 7
    rows = every_path(layout, TokenMap.identity(50), [[11, 22]])[1][0]
    with_pads = every_path(layout, TokenMap.identity(50), [[pad, pad, 11, 22]])[1][0, 2:]
    repeated = every_path(layout, TokenMap.identity(50), [[11, 11, 11, 22]])[1][0, 2:]
    np.testing.assert_array_equal(rows, with_pads)
    assert (rows != repeated).any(axis=1).all()


def test_pad_stands_as_a_compressed_id_and_not_as_a_raw_one() -> None:
    raw_pad = 59  # compressed 7; raw 7 is compressed 7 too, compressed 59 does not exist
    token_map = small_map()
    layout = HashLayout.build(50, [1], [2, 3], 2, 97, pad_id=int(token_map.table[raw_pad]))
    rows = check(layout, token_map, [[20, 21]])[1][0]
    np.testing.assert_array_equal(rows, check(layout, token_map, [[raw_pad, raw_pad, 20, 21]])[1][0, 2:])


def test_window_does_not_cross_into_another_document() -> None:
    ids = random_ids((2, 10))
    documents = np.repeat([[4, 4, 4, 9, 9, 9, 9, 1, 0, 0]], 2, axis=0)
    packed = check(small_layout(orders=(2, 3, 4), rows=97), small_map(), ids, documents=documents)
    for first, last in ((0, 3), (3, 7), (7, 8), (8, 10)):
        alone = every_path(small_layout(orders=(2, 3, 4), rows=97), small_map(), ids[:, first:last])
        for layer in (1, 3):
            np.testing.assert_array_equal(packed[layer][:, first:last], alone[layer])


def test_everything_older_than_another_document_is_pad_even_if_its_number_returns() -> None:
    ids = [[11, 22, 33]]
    found = check(small_layout(), small_map(), ids, documents=[[1, 2, 1]])
    alone = every_path(small_layout(), small_map(), [[33]])
    np.testing.assert_array_equal(found[1][:, 2:], alone[1])


def test_lookback_belongs_to_the_document_of_the_first_position() -> None:
    ids, lookback = [[11, 22, 33]], [[4, 5]]
    found = check(small_layout(), small_map(), ids, lookback, documents=[[6, 6, 8]])
    whole = every_path(small_layout(), small_map(), [[4, 5, 11, 22]])
    np.testing.assert_array_equal(found[1][:, :2], whole[1][:, 2:])


def test_negative_lookback_id_stands_before_the_start_and_so_does_everything_older() -> None:
    layout = small_layout(orders=(2, 3, 4), rows=97)
    found = check(layout, small_map(), [[11, 22], [11, 22]], [[4, -1, 5], [-1, -1, -1]])
    np.testing.assert_array_equal(found[1][0], every_path(layout, small_map(), [[5, 11, 22]])[1][0, 1:])
    np.testing.assert_array_equal(found[1][1], every_path(layout, small_map(), [[11, 22]])[1][0])


@given(
    time=st.integers(1, 40),
    cuts=st.lists(st.integers(0, 40), max_size=6),
    orders=st.sampled_from([(2,), (2, 3), (3,), (2, 4), (2, 3, 4, 5)]),
    family=st.sampled_from(["multiply_xor", "xxh64"]),
    packed=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_text_hashed_in_pieces_with_lookback_equals_the_whole(time, cuts, orders, family, packed, seed) -> None:
    rng = np.random.default_rng(seed)
    layout = small_layout(orders=orders, rows=97, family=family)
    ids = random_ids((2, time), seed)
    documents = np.cumsum(rng.random((2, time)) < 0.3, axis=1) if packed else None
    run, back = NgramHasher(layout, small_map()), orders[-1] - 1
    whole = run(ids, documents=documents)
    bounds = sorted({0, time, *(c for c in cuts if c < time)})
    for first, last in pairwise(bounds):
        lookback = ids[:, max(0, first - back) : first].copy()
        if packed:  # ids of other documents are marked by the caller
            before = documents[:, max(0, first - back) : first]
            lookback[before != documents[:, first : first + 1]] = -1
        for pieces in (lambda a: a, torch.from_numpy):
            texts = None if documents is None else pieces(documents[:, first:last])
            rows = run(pieces(ids[:, first:last]), pieces(lookback), texts)
            for layer in layout.layers:
                np.testing.assert_array_equal(np.asarray(rows[layer]), whole[layer][:, first:last])


@given(
    batch=st.integers(0, 3),
    time=st.integers(0, 12),
    orders=st.sets(st.integers(2, 7), min_size=1, max_size=3),
    heads=st.integers(1, 9),
    rows=st.sampled_from([1, 97, 2**15 - 20, 2**15, 65_536, 2**40]),
    family=st.sampled_from(["multiply_xor", "xxh64", "one_row"]),
    back=st.integers(-1, 6),
    packed=st.booleans(),
    seed=st.integers(0, 2**63 - 1),
)
@settings(max_examples=150, deadline=None)
def test_numpy_torch_and_c_equal_the_reference(batch, time, orders, heads, rows, family, back, packed, seed) -> None:
    layout = small_layout(sorted(orders), heads, rows, family, layers=(0, 5), seed=seed)
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, VOCAB, (batch, time))
    lookback = rng.integers(-1, VOCAB, (batch, min(back, max(orders) - 1))) if back >= 0 else None
    documents = rng.integers(0, 2, (batch, time)) if packed else None
    check(layout, small_map(), ids, lookback, documents)


def test_rows_do_not_depend_on_how_the_work_is_split_over_cores() -> None:
    layout = small_layout()
    ids, documents = random_ids((5, 300)), np.sort(random_ids((5, 300), 1), axis=1)
    whole = every_path(layout, small_map(), ids, documents=documents)
    run = NgramHasher(layout, small_map())
    for pieces in (2, 7, 40):
        bounds = [ids.size * i // pieces for i in range(pieces + 1)]

        def spread(n, smallest, work, *held, bounds=bounds):
            for first, last in pairwise(bounds):
                work(first, last)
            return -1

        with patch.object(kernels, "spread", spread):
            rows = run(ids, documents=documents)
        for layer in layout.layers:
            np.testing.assert_array_equal(rows[layer], whole[layer])


# --- exact arithmetic ---


def test_huge_multipliers_give_equal_non_negative_remainders_on_every_path() -> None:
    for vocab in (1, 2, 3, 5):  # the smaller the vocabulary, the larger the multipliers
        layout = HashLayout.build(vocab, range(6), [2, 3, 4], 8, 40_000, pad_id=0)
        assert max(max(m) for m in layout.multipliers.values()) * max(vocab - 1, 1) > 2**61
        ids = np.random.default_rng(vocab).integers(0, vocab, (4, 20))
        found = check(layout, TokenMap.identity(vocab), ids)
        assert min(rows.min() for rows in found.values()) >= 0


@pytest.mark.parametrize("heads", [8, 5, 1])
@pytest.mark.parametrize("smallest", [1, 2**15], ids=["any_modulus", "large_moduli"])
def test_remainders_by_multiplication_are_exact_at_the_edges_of_every_quotient(heads: int, smallest: int) -> None:
    if hasher._kernel is None:
        pytest.skip("no compiled kernels")
    sizes = [smallest, 32_768, 65_536, 646_400, 16_000_000, 2**31, 2**32, 2**39, 2**40]
    layout = HashLayout.build(7, [0], range(2, 2 + len(sizes)), heads, sizes, pad_id=0)
    moduli = [p for of_order in layout.moduli[0] for p in of_order]
    values = {0, 1, 2**53 - 1, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1}
    for p in moduli:
        tops = [2**64 // p, 2**63 // p, 2**62 // p, 2**53 // p, 2**52 // p, 2**51 // p, 2**32 // p]
        quotients = [k + d for k in tops for d in (-1, 0, 1)] + [2**e for e in range(0, 64, 3)]
        values |= {q * p + d for q in quotients for d in (-2, -1, 0, 1, 2)}
    x = np.array(sorted(v for v in values if 0 <= v < 2**64), np.uint64)

    # A hand-made plan: the table holds the values themselves and the mix is the current token times one.
    run = NgramHasher(layout, TokenMap.identity(7))
    run._multipliers[:] = 0
    run._multipliers[:, 0] = 1
    run._plan.table, run._plan.vocab = x.ctypes.data, len(x)
    ids, out = np.arange(len(x)), np.empty((len(x), len(moduli)), np.int64)
    call = kernels.Call("hash", ctypes.addressof(run._plan), ids.ctypes.data, 0, 0, 0, 1, len(x), out.ctypes.data)
    assert call(0, len(x)) == -1
    np.testing.assert_array_equal(out - run._offsets[0], (x[:, None] % np.array(moduli, np.uint64)).astype(np.int64))


@pytest.mark.parametrize("orders", [(2,), (3,), (4,), (5,), (2, 3, 4, 5), (8, 9)])
def test_xxh64_equals_the_xxhash_package(orders: tuple[int, ...]) -> None:
    token_map = TokenMap.identity(99_092)
    for seed in (0, 1, 2**63 - 1):
        layout = HashLayout.build(99_092, [1, 15], orders, 8, 646_400, pad_id=2, seed=seed, family="xxh64")
        check(layout, token_map, np.random.default_rng(seed).integers(0, 99_092, (2, 12)))


def test_the_one_row_hash_gives_every_column_its_offset() -> None:
    found = check(small_layout(family="one_row"), small_map(), random_ids())
    assert (found[3] == np.arange(4)).all()


def test_rows_beyond_32_bits_are_exact() -> None:
    layout = HashLayout.build(50, [0], [2, 3], 8, 2**33, pad_id=7)
    assert check(layout, small_map(), random_ids())[0].max() > 2**35


# --- no state, no salt ---


def test_another_process_gives_the_same_rows() -> None:
    script = (
        "import hashlib, numpy as np; from engram.addressing import HashLayout, NgramHasher, TokenMap\n"
        "h = NgramHasher(HashLayout.build(50, [1, 3], [2, 3], 2, [97, 89], pad_id=7), TokenMap.identity(50))\n"
        "print(hashlib.sha256(h(np.arange(50)[None])[3].tobytes()).hexdigest())"
    )
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": root}
    out = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    here = NgramHasher(small_layout(), TokenMap.identity(50))(np.arange(50)[None])[3]
    assert out.stdout.strip() == hashlib.sha256(here.tobytes()).hexdigest()


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_ids_changed_in_place_give_new_rows(kind) -> None:
    run = NgramHasher(small_layout(), small_map())
    ids = kind([[1, 2, 3]])
    before = run(ids)[1]
    ids[0, 1] = 9
    after = run(ids)[1]
    assert (np.asarray(before) != np.asarray(after)).any()
    np.testing.assert_array_equal(np.asarray(after), row_ids(small_layout(), small_map(), [[1, 9, 3]])[1])


def test_copied_and_pickled_hashers_give_the_same_rows() -> None:
    run = NgramHasher(small_layout(), small_map())
    expected = run(random_ids())[3]
    for again in (copy.deepcopy(run), pickle.loads(pickle.dumps(run))):
        np.testing.assert_array_equal(again(random_ids())[3], expected)


def test_strided_read_only_and_mapped_ids_are_read_as_they_look(tmp_path: Path) -> None:
    random_ids((6, 8)).tofile(tmp_path / "ids")
    ids = np.memmap(tmp_path / "ids", np.int64, "r", shape=(6, 8))
    layout = small_layout()
    for view in (ids[::2, 1::3], ids.T, ids[:, ::-1]):
        for kernel in (hasher._kernel, None):
            with patch.object(hasher, "_kernel", kernel):
                rows = NgramHasher(layout, small_map())(view)[1]
            np.testing.assert_array_equal(rows, row_ids(layout, small_map(), view)[1])


# --- bad input, the same answer on every path ---


@pytest.fixture(params=["c", "torch"])
def run(request, monkeypatch) -> NgramHasher:
    if request.param == "torch":
        monkeypatch.setattr(hasher, "_kernel", None)
    elif hasher._kernel is None:
        pytest.skip("no compiled kernels")
    return NgramHasher(small_layout(), small_map())


def test_placeholder_ids_are_refused(run: NgramHasher) -> None:
    with pytest.raises(ValueError, match=r"ids\[1, 2\] is -1: placeholder ids .* must be removed before hashing"):
        run(np.array([[1, 2, 3], [4, 5, -1]]))


def test_id_out_of_range_raises_instead_of_being_clamped(run: NgramHasher) -> None:
    with pytest.raises(IndexError, match=r"ids\[0, 1\] is 60, outside the token map's vocabulary of 60"):
        run(torch.tensor([[1, 60, 3]]))
    with pytest.raises(IndexError, match=r"lookback\[0, 1\] is 61"):
        run(np.array([[1, 2, 3]]), lookback=np.array([[-1, 61]]))


@pytest.mark.parametrize("ids", [np.zeros(3, np.int64), torch.zeros(1, 2, 3, dtype=torch.int64)])
def test_ids_that_are_not_batch_by_time_are_refused(run: NgramHasher, ids) -> None:
    with pytest.raises(ValueError, match=r"ids must be \[batch, time\], not of shape"):
        run(ids)


@pytest.mark.parametrize(
    "ids", [np.zeros((1, 2)), np.zeros((1, 2), bool), np.zeros((1, 2), np.uint16), torch.zeros(1, 2), [[1, 2]]]
)
def test_ids_of_another_type_are_refused(run: NgramHasher, ids) -> None:
    with pytest.raises(TypeError, match="ids"):
        run(ids)


@pytest.mark.parametrize("shape", [(1, 3), (2, 2), (2, 0)])
def test_lookback_that_does_not_fit_is_refused(run: NgramHasher, shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"lookback has shape .* must be \[1, 0\.\.2\]"):
        run(np.zeros((1, 4), np.int64), lookback=np.zeros(shape, np.int64))


def test_documents_that_do_not_fit_are_refused(run: NgramHasher) -> None:
    with pytest.raises(ValueError, match=r"documents has shape \[1, 3\], ids \[1, 4\]"):
        run(np.zeros((1, 4), np.int64), documents=np.zeros((1, 3), np.int64))


def test_numpy_and_torch_arguments_are_not_mixed(run: NgramHasher) -> None:
    with pytest.raises(TypeError, match="lookback is ndarray"):
        run(torch.zeros((1, 4), dtype=torch.int64), lookback=np.zeros((1, 2), np.int64))


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_rows_go_into_the_callers_buffer_and_a_wrong_one_is_refused(kind):
    layout = HashLayout.build(1000, (1, 3), (2, 3), 2, (97, 89), pad_id=2)
    hasher = NgramHasher(layout, TokenMap.identity(1000))
    ids = np.random.default_rng(0).integers(0, 1000, (3, 17))
    out = np.full((2, 3, 17, 4), -1)
    expected = hasher(ids)
    if kind == "torch":
        ids, out = torch.from_numpy(ids), torch.from_numpy(out)
    rows = hasher(ids, out=out)
    for i, layer in enumerate((1, 3)):
        assert np.array_equal(np.asarray(out[i]), expected[layer]) and np.array_equal(np.asarray(rows[layer]), out[i])
    for wrong in (out[:1], out[..., :3], out.astype(np.int32) if kind == "numpy" else out.int()):
        with pytest.raises(ValueError, match="out must be a contiguous int64"):
            hasher(ids, out=wrong)
