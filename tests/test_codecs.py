"""Row codecs and EncodedTable: every codec against a slow reference, the fused decode against the codec."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram import EngramConfig, EngramMemory, TokenMap, Transformer, TransformerConfig, build_optimizer
from engram.tables import EncodedTable, HostTable, RowAdam, RowRMS, encode_table, kernels, report
from engram.tables.codecs import PQ, Fp8, Int, get_codec

BLOCK_CODECS = ["fp8", "int8", "int4"]


def normal(n: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def pq(dim: int, width: int = 4, seed: int = 0) -> PQ:
    """A product quantiser without training: random centroids."""
    books = torch.randn(dim // width, 256, width, generator=torch.Generator().manual_seed(seed))
    books[:, 0] = 0
    return PQ(books)


def codec_of(name: str, dim: int):
    return pq(dim, int(name[2])) if name.startswith("pq") else get_codec(name, dim)


def e4m3(byte: int) -> float:
    """The definition: sign, 4 exponent bits with bias 7, 3 mantissa bits, no infinity, 0x7F is NaN."""
    sign, exponent, mantissa = -1.0 if byte & 0x80 else 1.0, (byte >> 3) & 15, byte & 7
    if byte & 0x7F == 0x7F:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


# Blocks that hurt: zeros, subnormals, powers of two, the largest floats, and mixtures of sizes.
values = st.one_of(
    st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1.1754944e-38, 448.0, 449.0, 464.0, 1.0, -1.0, 3.4028235e38, -3e38]),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-1, 1, width=32),
)
blocks = st.lists(values, min_size=32, max_size=32)


def test_a_row_of_256_fp8_values_is_264_bytes_values_first_then_one_scale_per_32():
    row = torch.zeros(1, 256)
    row[0, 0], row[0, 1], row[0, 33], row[0, 255] = 448.0, -1.0, 0.5, 0.001953125 * 448
    stored = Fp8().encode(row)
    assert stored.shape == (1, 264) and stored.dtype == torch.uint8
    data = stored[0].tolist()
    assert data[0] == 0x7E  # 448 = 1.75 * 2**8: exponent 15, mantissa 6
    assert data[1] == 0xB8  # -1: sign, exponent 7
    assert data[256] == 127  # scale 2**0
    assert data[33] == 0x78 and data[257] == 127 - 9  # 0.5 = 256 * 2**-9: the smallest scale that holds it
    assert data[255] == 0x7E and data[263] == 127 - 9
    assert [i for i, byte in enumerate(data) if byte] == [0, 1, 33, 255, 256, 257, 263]


def test_every_fp8_value_and_scale_decodes_by_its_definition(path_of):
    stored = torch.zeros(256 * 8, 33, dtype=torch.uint8)  # every scale, and under it every value
    stored[:, :32] = torch.arange(256, dtype=torch.uint8).view(1, 8, 32).expand(256, 8, 32).reshape(-1, 32)
    stored[:, 32] = torch.arange(256, dtype=torch.uint8).repeat_interleave(8)
    table = EncodedTable(2048, 32, "fp8")
    table.tensor.copy_(stored)
    got = table.gather(torch.arange(2048)).view(256, 256).double().numpy()
    one = np.array([e4m3(byte) for byte in range(256)])
    scale = np.array([2.0 ** (s - 127) for s in range(255)] + [math.nan])
    exact = scale[:, None] * one
    exact[np.abs(exact) >= 2.0**128] *= np.inf  # 448 * 2**127 is beyond float32
    np.testing.assert_array_equal(got, exact)
    torch_scale = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu).float().double().numpy()
    np.testing.assert_array_equal(scale, torch_scale)


@pytest.mark.parametrize("name", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("scale", [1.0, 448.0, 1e-3, 1e-30, 1e-38, 1e-44, 1e38])
def test_the_compiled_encoder_stores_the_torch_encoders_bits(name, scale):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3000, 64, generator=generator) * scale
    rows[torch.rand(rows.shape, generator=generator) < 0.1] = 0.0
    rows = rows.nan_to_num(posinf=3.4e38, neginf=-3.4e38)
    rows[1], rows[2], rows[3] = 0.0, -0.0, 3.4e38
    rows[4] = torch.exp2(torch.arange(-149.0, 128.0, 277 / 64)[:64])
    rows[5] = 449 * torch.exp2(torch.arange(64.0) - 32)  # just above what a scale holds
    rows[6] = (torch.arange(64) + 0.5) * 2.0**-9  # ties among the subnormal values
    bits = torch.randint(-(2**31), 2**31, (2000, 64), generator=generator).to(torch.int32).view(torch.float32)
    rows = torch.cat([rows, torch.where(bits.isfinite(), bits, 1.0)])
    table = EncodedTable(len(rows), 64, name)
    ids = torch.randperm(len(rows), generator=generator)
    table.write(ids, rows)
    assert torch.equal(table.tensor[ids], table.codec.encode(rows))


@pytest.mark.parametrize("name", ["fp8", "int8", "int4"])
def test_a_write_with_a_value_that_is_not_finite_stores_nothing(name):
    table = EncodedTable(3000, 32, name)
    rows = torch.ones(3000, 32)
    rows[2500, 7] = torch.inf
    with pytest.raises(ValueError, match=r"row 2500 .* column 7"):
        table.write(torch.arange(3000), rows)
    assert not table.tensor.any()


@pytest.mark.parametrize("name", ["fp8", "pq4"])
def test_a_file_of_encoded_rows_opens_read_only_more_than_once(name, tmp_path):
    path, rows = tmp_path / "rows", torch.randn(5000, 32)
    table = EncodedTable(5000, 32, codec_of(name, 32), path)
    table.write(torch.arange(5000), rows)
    expected = table.gather(torch.arange(5000))
    table.close()
    one, two = (EncodedTable(5000, 32, name, path, mode="r") for _ in range(2))
    assert torch.equal(one.gather(torch.arange(5000)), expected)
    assert torch.equal(two.gather(torch.arange(5000)), expected)
    with pytest.raises(PermissionError):
        one.write(torch.arange(2), rows[:2])
    with pytest.raises(FileNotFoundError):
        EncodedTable(5000, 32, "fp8", tmp_path / "none", mode="r")
    with pytest.raises(ValueError, match="mode"):
        EncodedTable(5000, 32, "fp8", mode="r")


@settings(max_examples=60, deadline=None)
@given(blocks)
def test_fp8_takes_the_smallest_scale_and_the_nearest_value_ties_to_even(block):
    row = torch.tensor([block], dtype=torch.float32).clamp(-3e38, 3e38)
    stored = Fp8().encode(row)[0].tolist()
    largest, scale = row.abs().max().double().item(), 2.0 ** (stored[32] - 127)
    assert largest <= 448 * scale
    assert stored[32] == 0 or largest > 448 * scale / 2
    finite = [b for b in range(256) if b & 0x7F != 0x7F]
    for value, byte in zip(row[0].double().tolist(), stored[:32], strict=True):
        distance = {b: abs(e4m3(b) * scale - value) for b in finite}
        best = min(distance.values())
        assert distance[byte] == best
        nearest = {e4m3(b) for b in finite if distance[b] == best}
        assert len(nearest) == 1 or byte % 2 == 0


@pytest.mark.parametrize("bits", [4, 8])
@settings(max_examples=60, deadline=None)
@given(block=blocks)
def test_int_rows_are_within_half_a_step_of_the_value(bits, block):
    row, codec, top = torch.tensor([block], dtype=torch.float32).clamp(-3e38, 3e38), Int(bits), 2 ** (bits - 1) - 1
    stored = codec.encode(row)
    scale = stored[0, -2:].view(torch.bfloat16).double().item()
    largest = row.abs().max().double().item()
    decoded = codec.decode(stored, 32)
    assert decoded.isfinite().all()
    assert (decoded.double() - row.double()).abs().max().item() <= scale / 2 * (1 + 1e-6)
    assert scale * top >= largest * (1 - 1e-6) and scale * top <= max(largest * (1 + 2**-7), top * 2.0**-126)
    whole = (decoded.double() / (scale or 1.0)).round()
    assert whole.abs().max() <= top and torch.equal((whole * scale).float(), decoded)


def test_int_layouts_are_as_documented():
    row = torch.zeros(1, 32)
    row[0, 0], row[0, 1], row[0, 16], row[0, 31] = 7.0, -7.0, 3.0, -1.0
    four = Int(4).encode(row)[0].tolist()
    assert len(four) == 18 and four[16:] == [0x80, 0x3F]  # bfloat16 1.0, little-endian
    assert four[0] == 0x37 and four[1] == 0x09 and four[15] == 0xF0  # low nibble: value j, high: value j + 16
    row[0, 0] = 127.0
    eight = Int(8).encode(row)[0].tolist()
    assert len(eight) == 34 and eight[:2] == [127, 256 - 7] and eight[16] == 3 and eight[31] == 255
    assert eight[32:] == [0x80, 0x3F]


@pytest.mark.parametrize("width", [4, 8])
def test_pq_bytes_name_the_nearest_centroid(width):
    codec, rows = pq(16, width), normal(200, 16)
    stored = codec.encode(rows)
    assert stored.shape == (200, 16 // width)
    for m in range(16 // width):
        distance = torch.cdist(rows[:, m * width : (m + 1) * width].double(), codec.codebooks[m].double())
        chosen = distance.gather(1, stored[:, m : m + 1].long())[:, 0]
        torch.testing.assert_close(chosen, distance.amin(1))
        assert torch.equal(
            codec.decode(stored, 16)[:, m * width : (m + 1) * width], codec.codebooks[m][stored[:, m].long()]
        )


def test_pq_trained_on_few_distinct_rows_stores_them_exactly():
    rows = normal(200, 8)
    codec = PQ.train(rows, 4)
    assert torch.equal(codec.decode(codec.encode(rows), 8), rows)


def test_pq_training_beats_random_centroids_survives_huge_values_and_repeats_itself():
    rows = normal(3000, 8) * 1e30
    codec = PQ.train(rows, 4)
    error = (codec.decode(codec.encode(rows), 8).double() - rows.double()).square().mean().sqrt().item() / 1e30
    other = PQ(pq(8).codebooks * 1e30)
    assert error < 0.3 < (other.decode(other.encode(rows), 8).double() - rows.double()).square().mean().sqrt() / 1e29
    assert torch.equal(PQ.train(rows, 4).codebooks, codec.codebooks)


@pytest.mark.parametrize("name", [*BLOCK_CODECS, "pq4", "pq8"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_are_refused_with_their_place(name, bad):
    rows = normal(5, 64)
    rows[3, 40] = bad
    with pytest.raises(ValueError, match=r"row 3 of the 5 to encode holds -?(nan|inf) at column 40"):
        codec_of(name, 64).encode(rows)


@pytest.mark.parametrize("name", BLOCK_CODECS)
def test_the_largest_floats_saturate_and_never_become_infinite(name):
    codec, largest = get_codec(name, 32), torch.finfo(torch.float32).max
    rows = torch.full((2, 32), largest) * torch.linspace(-1, 1, 32)
    rows[1] = -largest
    decoded = codec.decode(codec.encode(rows), 32)
    assert decoded.isfinite().all() and (decoded.double() - rows.double()).abs().max() < 0.2 * largest


@pytest.mark.parametrize("name", [*BLOCK_CODECS, "pq4", "pq8"])
def test_a_fresh_table_and_written_zeros_decode_to_zeros(path_of, name):
    table = EncodedTable(100, 64, codec_of(name, 64))
    assert torch.equal(table.gather(torch.arange(100)), torch.zeros(100, 64))
    table.write(torch.tensor([7]), torch.zeros(1, 64))
    assert table.tensor.count_nonzero() == 0


@pytest.mark.parametrize("name", [*BLOCK_CODECS, "pq4"])
def test_no_rows_at_all_are_written_and_gathered(path_of, name):
    table = EncodedTable(10, 64, codec_of(name, 64))
    none = torch.empty(2, 0, dtype=torch.int64)
    table.write(none, torch.empty(2, 0, 64))
    assert table.gather(none).shape == (2, 0, 64)
    assert table.codec.decode(table.codec.encode(torch.empty(0, 64)), 64).shape == (0, 64)


@pytest.mark.skipif(kernels.native is None, reason="no compiled kernels here")
@pytest.mark.parametrize("name", [*BLOCK_CODECS, "pq4", "pq8"])
@settings(max_examples=12, deadline=None)
@given(dim=st.sampled_from([32, 64, 96, 256]), seed=st.integers(0, 9), power=st.integers(-44, 37))
def test_the_fused_gather_equals_the_codecs_decode_bit_for_bit(name, dim, seed, power):
    codec = codec_of(name, dim)
    table = EncodedTable(150, dim, codec)
    rows = normal(150, dim, seed) * 10.0 ** (power / 2) * torch.logspace(-20, 18, 150)[:, None]
    rows[::9] = 0
    rows[1, : dim // 2] = 1e-45
    table.write(torch.arange(150), rows)
    ids = torch.randint(0, 150, (40, 7), generator=torch.Generator().manual_seed(seed))
    expected = codec.decode(codec.encode(rows), dim)[ids]
    got = table.gather(ids)
    assert got.dtype == torch.float32 and torch.equal(got.view(torch.int32), expected.view(torch.int32))


@pytest.mark.skipif(kernels.native is None, reason="no compiled kernels here")
@pytest.mark.parametrize("name", BLOCK_CODECS)
def test_any_bytes_at_all_decode_alike_in_both_paths(name, monkeypatch):
    table = EncodedTable(500, 64, name)
    table.tensor.copy_(torch.randint(0, 256, table.tensor.shape, generator=torch.Generator().manual_seed(1)))
    fused = table.gather(torch.arange(500))
    monkeypatch.setattr(kernels, "native", None)
    assert torch.equal(fused.nan_to_num(12345.0), table.gather(torch.arange(500)).nan_to_num(12345.0))


@pytest.mark.parametrize("name", ["fp8", "pq4"])
def test_gather_does_not_depend_on_the_number_of_threads(monkeypatch, name):
    table = EncodedTable(2000, 32, codec_of(name, 32))
    table.write(torch.arange(2000), normal(2000, 32))
    ids = torch.randint(0, 2000, (9001,))
    results = []
    for cores in (1, 2, 5):
        monkeypatch.setattr(kernels, "CORES", cores)
        results.append(table.gather(ids))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("name", ["fp8", "int4", "pq8"])
def test_row_arithmetic_beyond_32_bits_reaches_the_right_row(path_of, name):
    codec = codec_of(name, 256)
    size = codec.row_bytes(256)
    table = EncodedTable(2**33 // size + 10, 256, codec)
    ids = torch.tensor([table.rows - 1, 2**32 // size + 1, 2**31 // size + 1])
    rows = normal(3, 256)
    table.write(ids, rows)
    assert torch.equal(table.gather(ids), codec.decode(codec.encode(rows), 256))
    assert table.gather(torch.tensor([0, 1, 2, 5])).count_nonzero() == 0


def test_gather_fills_the_callers_buffer_and_refuses_a_wrong_one(path_of):
    table = EncodedTable(100, 32, "fp8")
    table.write(torch.arange(100), normal(100, 32))
    ids, out = np.array([[1, 2], [50, 1]]), torch.empty(2, 2, 32)
    assert table.gather(ids, out) is out and torch.equal(out, table.gather(torch.from_numpy(ids)))
    for wrong in (
        torch.empty(2, 2, 31),
        torch.empty(2, 2, 32, dtype=torch.uint8),
        torch.empty(32, 2, 2).permute(1, 2, 0),
    ):
        with pytest.raises(ValueError, match="out must be"):
            table.gather(ids, wrong)


def test_row_ids_are_checked_as_a_host_tables_are():
    table = EncodedTable(10, 32, "int8")
    with pytest.raises(IndexError, match=r"row 10 at position \(1,\) is outside this table of 10 rows"):
        table.gather(torch.tensor([0, 10]))
    with pytest.raises(TypeError, match="int64"):
        table.gather(torch.tensor([0], dtype=torch.int32))
    with pytest.raises(ValueError, match="twice"):
        table.write(torch.tensor([1, 1]), torch.ones(2, 32))
    with pytest.raises(ValueError, match="need rows"):
        table.write(torch.tensor([1, 2]), torch.ones(2, 33))


@pytest.mark.parametrize("name", BLOCK_CODECS)
@pytest.mark.parametrize("dim", [0, 1, 31, 33, 80, 16416])
def test_a_width_that_is_not_a_multiple_of_32_is_refused(name, dim):
    with pytest.raises(ValueError, match=f"one scale per 32 values.*not {dim}"):
        EncodedTable(10, dim, name)


def test_unknown_codecs_and_wrong_widths_say_what_there_is():
    with pytest.raises(ValueError, match="unknown row codec 'fp4': expected one of fp8, int8, int4, pq4, pq8"):
        EncodedTable(10, 32, "fp4")
    with pytest.raises(ValueError, match="groups of 8 values, so it cannot hold 12"):
        EncodedTable(10, 12, "pq8")
    with pytest.raises(ValueError, match="trained on rows of 32 values, not 64"):
        EncodedTable(10, 64, pq(32))
    with pytest.raises(ValueError, match="zero vector"):
        PQ(torch.ones(2, 256, 4))
    with pytest.raises(ValueError, match=r"width 4 or 8"):
        PQ.train(normal(10, 32), 16)


def test_rows_of_another_size_are_refused():
    for codec, size in ((Fp8(), 264), (Int(8), 272), (Int(4), 144), (pq(256), 64)):
        with pytest.raises(ValueError, match=rf"are uint8 \[n, {size}\], not torch.uint8 \[3, {size + 1}\]"):
            codec.decode(torch.zeros(3, size + 1, dtype=torch.uint8), 256)


def test_scales_of_another_block_size_are_refused_and_released_tensors_interleave():
    rows = normal(6, 256)
    stored = Fp8().encode(rows)
    weight = stored[:, :256].contiguous().view(torch.float8_e4m3fn)
    scale = stored[:, 256:].contiguous().view(torch.float8_e8m0fnu)
    assert torch.equal(Fp8().pack(weight, scale), stored)
    with pytest.raises(ValueError, match=r"need scales \(6, 8\), one per 32 values of a row, not \(6, 2\)"):
        Fp8().pack(weight, scale[:, :2])
    with pytest.raises(ValueError, match=r"must be torch\.float8_e8m0fnu"):
        Fp8().pack(weight, scale.float())
    broken = stored[:, 256:].clone()
    broken[4, 1] = 255
    with pytest.raises(ValueError, match="row 4 holds a NaN"):
        Fp8().pack(weight, broken)


@pytest.mark.parametrize(
    ("name", "place", "byte"),
    [("fp8", 33, 255), ("fp8", 5, 0x7F), ("fp8", 5, 0xFF), ("int8", 65, 0xFF), ("int4", 33, 0x80), ("int4", 35, 0x7F)],
)
def test_a_file_with_a_nan_or_a_scale_no_encoder_writes_is_refused(path_of, tmp_path, name, place, byte):
    path = tmp_path / "rows.bin"
    table = EncodedTable(3000, 64, name, path)
    table.write(torch.arange(3000), normal(3000, 64))
    table.close()
    EncodedTable(3000, 64, name, path).close()
    size = table.row_bytes
    damaged = 64 if name == "fp8" and place == 33 else place
    data = bytearray(path.read_bytes())
    data[2222 * size + damaged] = byte
    if byte == 0x7F and name == "int4":
        data[2222 * size + damaged - 1] = 0x80  # infinity
    path.write_bytes(data)
    message = rf"row 2,222 of .*rows.bin is not a valid {name} row.*Expected {size} bytes per row"
    with pytest.raises(ValueError, match=message):
        EncodedTable(3000, 64, name, path)


def test_a_mapped_file_keeps_its_rows_its_lock_and_its_size(tmp_path):
    path, rows = tmp_path / "rows.bin", normal(300, 32)
    table = EncodedTable(300, 32, "fp8", path)
    table.write(torch.arange(300), rows)
    with pytest.raises(BlockingIOError, match="already open"):
        EncodedTable(300, 32, "fp8", path)
    table.close()
    assert path.stat().st_size == 300 * 33
    again = EncodedTable(300, 32, "fp8", path)
    assert torch.equal(again.gather(torch.arange(300)), Fp8().decode(Fp8().encode(rows), 32))
    again.close()
    with pytest.raises(ValueError, match="9,900 bytes, but 300 rows x 34 bytes of int8 need 10,200"):
        EncodedTable(300, 32, "int8", path)
    with pytest.raises(ValueError, match="is closed"):
        again.gather(torch.tensor([0]))


def test_pq_codebooks_lie_beside_the_rows_and_a_table_never_opens_without_them(tmp_path):
    path, rows, codec = tmp_path / "rows.bin", normal(300, 32), pq(32)
    with pytest.raises(ValueError, match=r"pass trained codebooks"):
        EncodedTable(300, 32, "pq4", path)
    table = EncodedTable(300, 32, codec, path)
    table.write(torch.arange(300), rows)
    expected = table.gather(torch.arange(300))
    table.close()
    again = EncodedTable(300, 32, "pq4", path)
    assert torch.equal(again.gather(torch.arange(300)), expected)
    again.close()
    with pytest.raises(ValueError, match="other codebooks"):
        EncodedTable(300, 32, pq(32, seed=5), path)
    with pytest.raises(ValueError, match="pq4 codebooks for rows of 32 values, not pq8"):
        EncodedTable(300, 32, "pq8", path)
    (tmp_path / "rows.bin.codebooks").unlink()
    with pytest.raises(FileNotFoundError, match=r"codebooks .*rows\.bin\.codebooks are gone"):
        EncodedTable(300, 32, "pq4", path)


@pytest.mark.parametrize("name", [*BLOCK_CODECS, "pq4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoding_a_normal_table_keeps_the_init_of_rows_never_written(name, dtype):
    table = HostTable(700, 32, dtype, init="normal", std=0.1, seed=4)
    table.write(torch.tensor([3]), torch.full((1, 32), 2.0))
    encoded = encode_table(table, name, block=256)
    rows = table.gather(torch.arange(700)).float()
    assert torch.equal(encoded.tensor, encoded.codec.encode(rows))
    facts = report(table, encoded)
    assert facts["codec"] == name and facts["rows_sampled"] == 700
    error = encoded.gather(torch.arange(700)).double() - rows.double()
    assert facts["max_error"] == error.abs().max() and abs(facts["rms_error"] - error.square().mean().sqrt()) < 1e-9


def resident_bytes() -> int:
    return int(open("/proc/self/statm").read().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_encoding_a_sparse_table_touches_no_pages_of_rows_never_written():
    table = HostTable(2**22, 64)
    ids = torch.tensor([5, 2**19, 2**22 - 1])
    table.write(ids, normal(3, 64))
    encode_table(HostTable(2**17, 64), "fp8")  # warm up
    before = resident_bytes()
    encoded = encode_table(table, "fp8")  # 264 MiB of rows
    assert resident_bytes() - before < 96 << 20
    assert torch.equal(encoded.gather(ids), Fp8().decode(Fp8().encode(table.gather(ids)), 64))
    assert encoded.gather(torch.arange(0, 1000))[6:].count_nonzero() == 0


@pytest.mark.parametrize("name", [*BLOCK_CODECS, "pq"])
def test_a_table_that_was_never_written_encodes_to_one_that_never_was(name):
    table = HostTable(300, 32)
    encoded = encode_table(table, name)
    assert encoded.tensor.count_nonzero() == 0 and encoded.gather(torch.arange(300)).count_nonzero() == 0
    assert report(table, encoded)["rms_error"] == 0


def test_an_encoded_file_appears_whole_or_not_at_all(tmp_path):
    table = HostTable(400, 32)
    table.write(torch.arange(400), normal(400, 32))
    encoded = encode_table(table, "pq4", tmp_path / "rows.pq4")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.pq4", "rows.pq4.codebooks"]
    encoded.close()
    with pytest.raises(ValueError, match="exists already"):
        encode_table(table, "pq4", tmp_path / "rows.pq4")
    EncodedTable(400, 32, "pq4", tmp_path / "rows.pq4").close()
    table.tensor[333, 1] = math.nan
    with pytest.raises(ValueError, match=r"rows 0 to 399 of the table cannot be encoded: row 333 .* column 1"):
        encode_table(table, "fp8", tmp_path / "rows.fp8")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(("name", "limit"), [("fp8", 0.27), ("int8", 0.27), ("int4", 0.15), ("pq4", 0.07)])
def test_stored_rows_have_the_size_the_codec_promises(name, limit):
    table = EncodedTable(100_000, 256, codec_of(name, 256))
    assert table.nbytes / (4 * 256 * 100_000) <= limit
    info = table.info()
    assert info["codec"] == name and info["bytes"] == table.nbytes and info["row_bytes"] * 100_000 == table.nbytes
    assert info["codebook_bytes"] == (64 * 256 * 4 * 4 if name == "pq4" else 0)


@pytest.mark.parametrize("optimizer", [RowRMS, RowAdam])
def test_an_encoded_table_is_not_trained(optimizer):
    with pytest.raises(ValueError, match=r"cannot be trained: its rows are stored as fp8"):
        optimizer(EncodedTable(10, 32, "fp8"))


SMALL = EngramConfig(layers=(1, 2), orders=(2, 3), heads=2, head_dim=32, rows_per_head=101, table_init="normal")
TEXT = torch.randint(0, 50, (2, 20), generator=torch.Generator().manual_seed(0))


def model() -> Transformer:
    torch.manual_seed(1)
    memory = EngramMemory(SMALL, TokenMap.identity(50), 32)
    return Transformer(TransformerConfig(vocab_size=50, hidden_size=32, layers=3, heads=2, max_length=64), memory)


@pytest.mark.parametrize("name", [*BLOCK_CODECS, "pq"])
def test_a_memory_with_encoded_tables_recalls_trains_its_dense_weights_and_reloads(name):
    ours, other = model(), model()
    ours.memory.tables[1].write(torch.arange(50), normal(50, 32))
    before = ours(TEXT)
    ours.memory.encode_tables(name)
    after = ours(TEXT)
    assert after.dtype == torch.float32 and not torch.equal(before, after)
    assert (before - after).abs().max() < 0.5 * before.abs().max()
    assert ours.memory.recall(TEXT).rows(1).dtype == torch.float32
    rows = {layer: table.tensor.clone() for layer, table in ours.memory.tables.items()}
    optimizer = build_optimizer(ours)
    ours(TEXT).logsumexp(-1).mean().backward()
    assert not any(ours.memory.gradients.values())
    optimizer.step()
    assert all(torch.equal(rows[layer], table.tensor) for layer, table in ours.memory.tables.items())
    other.memory.encode_tables(name)
    other.load_state_dict(ours.state_dict())
    assert torch.equal(other(TEXT), ours(TEXT))


def test_a_saved_memory_loads_into_the_same_codec_only():
    plain, fp8, int8 = model(), model(), model()
    fp8.memory.encode_tables("fp8")
    int8.memory.encode_tables("int8")
    for saved, target in ((plain, fp8), (fp8, plain), (fp8, int8)):
        with pytest.raises(ValueError, match="another row codec"):
            target.load_state_dict(saved.state_dict())
    with pytest.raises(ValueError, match="fp8 already"):
        fp8.memory.encode_tables("int8")
    state = {k: v.clone() for k, v in fp8.state_dict().items()}
    state["memory.tables.1"][3, 32] = 255
    with pytest.raises(ValueError, match="row 3 of this table is not a valid fp8 row"):
        fp8.load_state_dict(state)


def test_faiss_is_imported_by_training_only():
    code = (
        "import sys, torch; from engram.tables import EncodedTable; from engram.tables.codecs import PQ\n"
        "t = EncodedTable(10, 32, PQ(torch.zeros(8, 256, 4))); t.write(torch.arange(10), torch.ones(10, 32))\n"
        "t.gather(torch.arange(10)); print('faiss' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "False", run.stderr


def test_encoding_that_fails_halfway_leaves_no_file_and_can_be_tried_again(tmp_path):
    config = EngramConfig(layers=(0, 1), heads=2, head_dim=32, rows_per_head=97)
    memory = EngramMemory(config, TokenMap.identity(64), 16)
    memory.tables[1].write(torch.tensor([3]), torch.full((1, 32), torch.inf))
    for codec in ("fp8", "pq4"):
        with pytest.raises(ValueError, match="finite"):
            memory.encode_tables(codec, tmp_path)
        assert not list(tmp_path.iterdir()) and memory.codec is None
    memory.tables[1].write(torch.tensor([3]), torch.ones(1, 32))
    memory.encode_tables("pq4", tmp_path)
    assert memory.codec == "pq4"
