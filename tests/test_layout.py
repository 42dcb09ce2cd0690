from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engram.addressing import HashLayout

GOLDEN = Path(__file__).parent / "golden"
SMALL = dict(compressed_vocab=1000, layers=[1, 3], orders=[2, 3], heads=2, rows_per_head=[97, 89], pad_id=2)


@pytest.mark.parametrize("name, pad", [("small", "pad"), ("demo", "pad_id"), ("deepseek_v41", "pad_id")])
def test_layout_equals_the_published_numbers(name: str, pad: str) -> None:
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    layout = HashLayout.build(
        golden["compressed_vocabulary"],
        [int(layer) for layer in golden["layers"]],
        golden["orders"],
        golden["heads"],
        golden["rows_per_head"],
        golden[pad],
        golden.get("seed", 0),
    )
    assert max(max(m) for m in layout.multipliers.values()) < 2 * int(golden["half_bound"])
    for layer, expected in golden["layers"].items():
        assert [str(m) for m in layout.multipliers[int(layer)]] == expected["multipliers"]
        assert [list(heads) for heads in layout.moduli[int(layer)]] == expected["moduli"]
        assert layout.rows[int(layer)] == expected["rows"]


def test_multipliers_are_odd_and_no_product_reaches_2_to_the_63() -> None:
    for vocab in (1, 2, 3, 1000, 99_092, 2**31 - 1):
        layout = HashLayout.build(vocab, range(8), [2, 3, 4], 1, 100, pad_id=0)
        for multipliers in layout.multipliers.values():
            assert all(m % 2 == 1 and m * (vocab - 1) < 2**63 for m in multipliers)


def test_head_ranges_do_not_overlap_and_fill_the_table() -> None:
    layout = HashLayout.build(1000, [0, 5], [2, 3, 4], 5, [300, 10, 300], pad_id=0)
    for layer in layout.layers:
        moduli = [p for heads in layout.moduli[layer] for p in heads]
        ends = [offset + p for offset, p in zip(layout.offsets[layer], moduli, strict=True)]
        assert layout.offsets[layer] == (0, *ends[:-1])
        assert layout.rows[layer] == ends[-1]


def test_no_prime_is_used_twice_in_the_whole_model() -> None:
    layout = HashLayout.build(1000, [0, 1, 2], [2, 3], 4, [50, 60], pad_id=0)
    moduli = [p for layer in layout.layers for heads in layout.moduli[layer] for p in heads]
    assert len(set(moduli)) == len(moduli)


def test_primes_equal_a_plain_search_with_trial_division() -> None:
    seen: set[int] = set()

    def smallest_above(c: int) -> int:
        c += 1
        while c in seen or c < 2 or any(c % i == 0 for i in range(2, int(c**0.5) + 1)):
            c += 1
        seen.add(c)
        return c

    layout = HashLayout.build(1000, [4, 0, 9], [2, 3, 4], 6, [1, 20, 1], pad_id=0)
    for layer in layout.layers:
        for rows, heads in zip(layout.rows_per_head, layout.moduli[layer], strict=True):
            c = rows - 1
            for prime in heads:
                c = smallest_above(c)
                assert prime == c


def test_strong_pseudoprimes_are_not_taken_for_primes() -> None:
    for composite in (2047, 1_373_653, 25_326_001, 3_215_031_751, 341_550_071_728_321 % 2**40):
        layout = HashLayout.build(10, [0], [2], 1, composite, pad_id=0)
        assert layout.moduli[0][0][0] > composite


def test_largest_published_layout_is_built_in_well_under_a_second() -> None:
    start = time.perf_counter()
    HashLayout.build(99_092, [1, 14], [2, 3, 4], 8, 20_000_000, pad_id=2)
    HashLayout.build(99_092, range(30), [2, 3], 8, 2_262_400, pad_id=2)
    assert time.perf_counter() - start < 0.5


def test_orders_may_leave_gaps() -> None:
    layout = HashLayout.build(1000, [1], [2, 4], 3, 100, pad_id=0)
    assert layout.columns == 6
    assert len(layout.multipliers[1]) == 4
    assert HashLayout.build(1000, [1], [3], 3, 100, pad_id=0).multipliers[1] == layout.multipliers[1][:3]


def test_one_row_layout_gives_every_column_exactly_one_row() -> None:
    layout = HashLayout.build(1000, [1, 3], [2, 3], 4, 65_536, pad_id=0, family="one_row")
    assert layout.offsets[3] == tuple(range(8))
    assert layout.rows == {1: 8, 3: 8}


def test_numbers_of_any_integer_type_are_accepted() -> None:
    assert HashLayout.build(np.int32(1000), np.array([1, 3]), (2, 3), np.int64(2), [97, 89], 2) == HashLayout.build(
        **SMALL
    )


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"layers": []}, "layers is empty"),
        ({"layers": [1, 1]}, "layers must be different"),
        ({"layers": [-1]}, "layers must be different numbers >= 0"),
        ({"orders": []}, "orders is empty"),
        ({"orders": [1, 2]}, "start at 2"),
        ({"orders": [3, 2]}, "ascend"),
        ({"orders": [2, 2]}, "ascend without repeats"),
        ({"orders": [2, 17]}, "orders must be at most 16"),
        ({"heads": 0}, "heads must be"),
        ({"rows_per_head": [97]}, "rows_per_head has 1 numbers for 2 orders"),
        ({"rows_per_head": 0}, "rows_per_head must be"),
        ({"rows_per_head": 2**41}, "rows_per_head must be"),
        ({"pad_id": 1000}, "pad_id 1000 is outside the compressed vocabulary of 1000: it must already be mapped"),
        ({"pad_id": -1}, "pad_id -1 is outside"),
        ({"compressed_vocab": 0}, "compressed_vocab must be"),
        ({"seed": -1}, "seed must be"),
        ({"family": "md5"}, "family (the hash) must be one of multiply_xor, xxh64, one_row, not 'md5'"),
    ],
)
def test_an_impossible_argument_is_refused_with_the_reason(change: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        HashLayout.build(**{**SMALL, **change})


@pytest.mark.parametrize("change", [{"heads": 2.0}, {"heads": True}, {"layers": 1}, {"orders": "23"}, {"pad_id": "2"}])
def test_argument_of_another_type_is_refused_by_name(change: dict) -> None:
    with pytest.raises(TypeError, match=next(iter(change))):
        HashLayout.build(**{**SMALL, **change})


@pytest.mark.parametrize("family", ["multiply_xor", "xxh64", "one_row"])
def test_layout_survives_json(family: str) -> None:
    layout = HashLayout.build(**SMALL, seed=2**60 + 1, family=family)
    again = HashLayout.from_json(layout.to_json())
    assert again == layout and again.multipliers == layout.multipliers and again.moduli == layout.moduli
    assert again.digest == layout.digest


def test_digest_tells_layouts_apart() -> None:
    layout = HashLayout.build(**SMALL)
    assert layout.digest != replace(layout, seed=1).digest
    assert hash(layout) == hash(HashLayout.build(**SMALL))


def test_multipliers_survive_a_json_reader_that_has_only_doubles() -> None:
    layout = HashLayout.build(**SMALL, seed=2**60 + 1)
    assert max(layout.multipliers[1]) > 2**52
    in_doubles = json.loads(layout.to_json(), parse_int=lambda digits: int(float(digits)))
    assert HashLayout.from_json(json.dumps(in_doubles)) == layout


def altered(field: str, value) -> str:
    """Return the JSON of the small layout with the value at the path `field` replaced."""
    whole = inner = json.loads(HashLayout.build(**SMALL).to_json())
    *path, last = field.split("/")
    for key in path:
        inner = inner[key]
    assert last in inner
    inner[last] = value
    return json.dumps(whole)


def test_multipliers_written_as_json_numbers_are_refused() -> None:
    numbers = [int(m) for m in HashLayout.build(**SMALL).multipliers[1]]
    with pytest.raises(
        ValueError, match=r'"multipliers" is not what .*layer 1: index 0: 7593627661414631 instead of "7'
    ):
        HashLayout.from_json(altered("multipliers/1", numbers))


@pytest.mark.parametrize(
    "field, value",
    [
        ("multipliers/1", ["7593627661414632", "479593001838623", "3563315849468963"]),
        ("moduli/3", [[107, 109], [113, 131]]),
        ("offsets/1", [0, 97, 198, 288]),
        ("rows/3", 457),
        ("seed", "1"),
        ("pad_id", 1000),
        ("heads", 3),
        ("heads", 10**12),
        ("layers", [1, 4]),
        ("orders", None),
        ("moduli", 7),
        ("family", "xxh65"),
        ("format", "engram-hash-layout-0"),
        ("compressed_vocab", 1001),
        ("compressed_vocab", 1000.5),
    ],
)
def test_json_that_does_not_fit_its_own_parameters_is_refused(field: str, value) -> None:
    with pytest.raises(ValueError, match=r"hash layout|pad_id|family"):
        HashLayout.from_json(altered(field, value))


def test_json_whose_modulus_was_changed_is_refused_with_the_fields_name() -> None:
    with pytest.raises(ValueError, match=r'"moduli" is not .*layer 3: index 1: index 1: 131 instead of 127'):
        HashLayout.from_json(altered("moduli/3", [[107, 109], [113, 131]]))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "7", "{}", "[" * 100_000, '{"format": "engram-hash-layout-1"}']
)
def test_text_that_is_not_a_layout_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="hash layout"):
        HashLayout.from_json(text)
