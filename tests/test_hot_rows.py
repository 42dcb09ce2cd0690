"""The bounded cache of rows that experiments/scripts/hot_rows counts the hits of."""

from __future__ import annotations

import pytest
import torch

from engram import HostTable
from engram.tables import encode_table
from experiments.scripts.hot_rows.hot_rows import HotRows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hot_rows_are_the_tables_rows_bit_for_bit_within_their_memory(dtype):
    table = HostTable(5000, 16, dtype, init="normal", std=0.1)
    table.write(torch.arange(0, 5000, 3), torch.randn(1667, 16))
    hot = HotRows(table, 20_000)
    assert hot.nbytes <= 20_000 and hot.capacity < 500
    draw = torch.Generator().manual_seed(0)
    for _ in range(30):
        ids = (torch.rand(7, 31, generator=draw) ** 4 * 5000).long()
        assert torch.equal(hot.gather(ids), table.gather(ids))
        out = torch.empty(7, 31, 16)
        assert torch.equal(hot.gather(ids, out), table.gather(ids).float())
    assert 0.4 < hot.hit_rate < 1
    assert hot.gather(torch.empty(0, 3, dtype=torch.int64)).shape == (0, 3, 16)


def test_hot_rows_hit_what_was_read_and_make_room_for_the_newer():
    table = HostTable(10_000, 4)
    hot = HotRows(table, 32 * (16 + 16))
    hot.gather(torch.arange(8))
    assert hot.hits == 0
    hot.gather(torch.arange(8))
    assert 0 < hot.hits <= 8
    hits = hot.hits
    for start in range(100, 10_000, 100):
        hot.gather(torch.arange(start, start + 100))
    hot.gather(torch.arange(8))
    assert hot.hits == hits
    with pytest.raises(ValueError, match="at least 256 for rows of 16 bytes"):
        HotRows(table, 10)
    with pytest.raises(TypeError, match="nbytes must be an int"):
        HotRows(table, 1e6)


@pytest.mark.parametrize("codec", ["fp8", "int8", "pq4"])
def test_hot_rows_of_an_encoded_table_are_its_rows(codec):
    table = HostTable(1000, 32)
    table.write(torch.arange(1000), torch.randn(1000, 32))
    encoded = encode_table(table, codec)
    hot, ids = HotRows(encoded, 1 << 15), torch.tensor([1, 5, 7, 5])
    for _ in range(2):  # from the table, then from the cache
        assert torch.equal(hot.gather(ids), encoded.gather(ids))
        assert torch.equal(hot.gather(ids, torch.empty(4, 32)), encoded.gather(ids))
    assert hot.hits > 0
