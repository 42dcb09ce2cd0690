"""Row codecs: how a row is stored. Each encodes and decodes in plain torch; codecs.c gives the same bits.

    name   bytes of a row of D values      what a row holds, in order
    fp8    D + D/32       (264 at 256)     D e4m3fn values; one e8m0 scale per 32 values. DeepSeek-V4.1's row.
    int8   D + D/16       (272 at 256)     D signed integers -127..127; one bfloat16 scale per 32 values
    int4   D/2 + D/16     (144 at 256)     blocks of 16 bytes: byte j has value j below and value j + 16 above, each
                                           a two's complement -7..7; then one bfloat16 scale per 32 values
    pq4    D/4            (64 at 256)      product quantisation: byte m names one of the 256 centroids of values
    pq8    D/8            (32 at 256)      4 m .. 4 m + 3 (8 m .. 8 m + 7); the codebooks lie beside the rows

fp8: value = fp32(e4m3) * 2 ** (e8m0 - 127), where e8m0 0 means 2 ** -127 and 255 NaN. int: value = integer * scale; the
scale is bfloat16 for its range (a float16 one ends at 65,504) and because it is rounded up before it is divided by, so
that its few bits cost at most 1/128 of step width. Bytes that are all zero decode to zeros in every codec (centroid 0
of a product quantiser is the zero vector), so a fresh table reads as zeros and its pages stay untouched.

Rows must be finite. Values beyond +-3e38 are stored as that: rounding them up could reach infinity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engram._extras import require

BLOCK = 32  # values per scale
LARGEST = 3e38


def _checked(rows: Tensor, codec: Codec) -> Tensor:
    """Return rows [n, dim] as finite contiguous float32 on the CPU."""
    if rows.dim() != 2:
        raise ValueError(f"{codec.name} encodes rows [n, dim], not a tensor of shape {tuple(rows.shape)}")
    codec.row_bytes(rows.shape[1])
    rows = rows.detach().to("cpu", torch.float32).contiguous()
    check_finite(rows, codec)
    return rows.clamp(-LARGEST, LARGEST)


def check_finite(rows: Tensor, codec: Codec) -> None:
    """Raise ValueError for the first value of rows [n, dim] that is NaN or infinite."""
    if rows.numel() and not rows.abs().amax().isfinite():  # several times faster than isfinite().all()
        row, column = (~rows.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"row {row} of the {rows.shape[0]:,} to encode holds {rows[row, column].item()} at column {column}: "
            f"{codec.name} stores finite values only"
        )


def _sized(stored: Tensor, dim: int, codec: Codec) -> Tensor:
    """Return stored rows uint8 [n, row_bytes], after a check of their size."""
    size = codec.row_bytes(dim)
    if stored.dtype != torch.uint8 or stored.dim() != 2 or stored.shape[1] != size:
        raise ValueError(
            f"{codec.name} rows of width {dim} are uint8 [n, {size}], not {stored.dtype} {list(stored.shape)}"
        )
    return stored


def _whole_blocks(dim: int, name: str) -> int:
    if dim < BLOCK or dim % BLOCK or dim > 16384:
        raise ValueError(
            f"{name} keeps one scale per {BLOCK} values, so a row must have a multiple of {BLOCK} values up to 16384, "
            f"not {dim}"
        )
    return dim // BLOCK


class Fp8:
    """e4m3 values and power-of-two scales (see the top of the file)."""

    name, code = "fp8", 0

    def row_bytes(self, dim: int) -> int:
        """Return the bytes per stored row. Raise ValueError for a width that this codec cannot hold."""
        return dim + _whole_blocks(dim, self.name)

    def encode(self, rows: Tensor) -> Tensor:
        """Encode rows float32 [n, dim] as uint8 [n, row_bytes]: per block the smallest scale under which its largest
        value is at most 448, then round to nearest, ties to even. Raise ValueError for NaN, infinity or a
        width it cannot hold."""
        rows = _checked(rows, self)
        blocks = rows.view(len(rows), rows.shape[1] // BLOCK, BLOCK)
        mantissa, exponent = torch.frexp(blocks.abs().amax(2))  # largest = mantissa * 2 ** exponent; 448 = 0.875 * 2**9
        power = (exponent - 9 + (mantissa > 0.875)).clamp(min=-127).masked_fill(mantissa == 0, -127)
        shrunk = blocks * torch.ldexp(torch.ones_like(mantissa), -power)[..., None]  # a power of two: exact
        values = shrunk.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
        return torch.cat([values.flatten(1), (power + 127).to(torch.uint8)], dim=1)

    def decode(self, stored: Tensor, dim: int) -> Tensor:
        """Decode stored rows uint8 [n, row_bytes] to float32 [n, dim]. Raise ValueError for rows of another size."""
        stored = _sized(stored, dim, self)
        values = stored[:, :dim].contiguous().view(torch.float8_e4m3fn).float().view(len(stored), dim // BLOCK, BLOCK)
        power = stored[:, dim:].to(torch.int32)
        scales = torch.where(power == 0, 0x00400000, power << 23).view(torch.float32)  # the bits of 2 ** (power - 127)
        scales = scales.masked_fill(power == 255, torch.nan)
        return (values * scales[..., None]).flatten(1)

    def wrong(self, stored: Tensor, dim: int) -> Tensor:
        """Return bool [n]: True for stored rows that hold a NaN scale (255) or a NaN value (0x7F, 0xFF)."""
        return self.decode(stored, dim).isnan().any(1)

    def pack(self, values: Tensor, scales: Tensor) -> Tensor:
        """Pack the two tensors of a released checkpoint: float8_e4m3fn [n, dim] and float8_e8m0fnu [n, dim / 32]
        (either may come as uint8) as rows uint8 [n, row_bytes].

        Raises:
            ValueError: dtypes or shapes that do not match (another block size decodes without any error, to wrong
            values), or NaN scales or values.
        """
        for name, part, dtype in (("values", values, torch.float8_e4m3fn), ("scales", scales, torch.float8_e8m0fnu)):
            if part.dtype not in (dtype, torch.uint8):
                raise ValueError(f"fp8 {name} must be {dtype} or torch.uint8, not {part.dtype}")
        expected = (values.shape[0], _whole_blocks(values.shape[1], self.name))
        if tuple(scales.shape) != expected:
            raise ValueError(
                f"values {tuple(values.shape)} need scales {expected}, one per {BLOCK} values of a row, not "
                f"{tuple(scales.shape)}: these were made with another block size"
            )
        stored = torch.cat([values.view(torch.uint8), scales.view(torch.uint8)], dim=1)
        bad = self.wrong(stored, values.shape[1])
        if bad.any():
            raise ValueError(f"row {int(bad.nonzero()[0])} holds a NaN value (0x7F, 0xFF) or a NaN scale (255)")
        return stored


class Int:
    """Symmetric integers of 8 or 4 bits with a bfloat16 scale per block (see the top of the file)."""

    def __init__(self, bits: int):
        if bits not in (4, 8):
            raise ValueError(f"integer rows have 4 or 8 bits per value, not {bits}")
        self.bits, self.name, self.code = bits, f"int{bits}", 1 if bits == 8 else 2

    def row_bytes(self, dim: int) -> int:
        """Return the bytes per stored row. Raise ValueError for a width that this codec cannot hold."""
        return dim * self.bits // 8 + 2 * _whole_blocks(dim, self.name)

    def encode(self, rows: Tensor) -> Tensor:
        """Encode rows float32 [n, dim] as uint8 [n, row_bytes]: scale = (largest of the block) / (127 or 7) rounded up
        to bfloat16, value / scale rounded to nearest, ties to even. Raise ValueError as Fp8.encode."""
        rows = _checked(rows, self)
        blocks, top = rows.view(len(rows), rows.shape[1] // BLOCK, BLOCK), 2 ** (self.bits - 1) - 1
        largest = blocks.abs().amax(2)
        high = ((largest / top).view(torch.int32) + 0xFFFF) >> 16  # upper half of the float32, rounded up
        high = torch.where(largest > 0, high.clamp(min=1), 0)  # at least the smallest bfloat16
        scales = (high << 16).view(torch.float32)
        integers = (blocks / scales.masked_fill(high == 0, 1.0)[..., None]).round().clamp(-top, top).to(torch.int8)
        values = integers.view(torch.uint8)
        if self.bits == 4:
            values = (values[..., :16] & 15) | (values[..., 16:] << 4)
        return torch.cat([values.flatten(1), high.to(torch.int16).view(torch.uint8)], dim=1)

    def decode(self, stored: Tensor, dim: int) -> Tensor:
        """Decode stored rows uint8 [n, row_bytes] to float32 [n, dim]. Raise ValueError for rows of another size."""
        stored = _sized(stored, dim, self)
        size = dim * self.bits // 8
        values = stored[:, :size].contiguous()
        if self.bits == 4:
            nibbles = values.view(len(stored), dim // BLOCK, 16)
            values = ((torch.cat([nibbles & 15, nibbles >> 4], dim=2) ^ 8).view(torch.int8) - 8).view(torch.uint8)
        scales = stored[:, size:].contiguous().view(torch.bfloat16).float()
        return (values.view(torch.int8).float().view(len(stored), dim // BLOCK, BLOCK) * scales[..., None]).flatten(1)

    def wrong(self, stored: Tensor, dim: int) -> Tensor:
        """Return bool [n]: True for stored rows with a scale that is negative, infinite or NaN."""
        scales = _sized(stored, dim, self)[:, dim * self.bits // 8 :].contiguous().view(torch.bfloat16)
        return (scales.signbit() | ~scales.isfinite()).any(1)


class PQ:
    """Product quantisation: each `width` values in turn become the number of its nearest centroid.

    Args:
        codebooks: float32 [dim / width, 256, width], width 4 or 8; centroid 0 of each is the zero vector. See `train`.

    Raises:
        ValueError: codebooks of another shape or dtype, not finite, or with another centroid 0.
    """

    code = 3

    def __init__(self, codebooks: Tensor):
        shape = tuple(codebooks.shape)
        if codebooks.dtype != torch.float32 or len(shape) != 3 or shape[1] != 256 or shape[2] not in (4, 8):
            raise ValueError(f"codebooks are float32 [dim / width, 256, width 4 or 8], not {codebooks.dtype} {shape}")
        if not codebooks.isfinite().all() or codebooks[:, 0].any():
            raise ValueError("codebooks must be finite, with the zero vector as centroid 0")
        self.codebooks = codebooks.detach().cpu().contiguous().clone()
        self.width, self.dim = shape[2], shape[0] * shape[2]
        self.name = f"pq{self.width}"

    @staticmethod
    def train(rows: Tensor, width: int = 4, seed: int = 0) -> PQ:
        """Train codebooks on a sample of rows float32 [n, dim], by k-means (faiss). 30,000 rows are plenty.

        Raises:
            ValueError: width not 4 or 8, dim not a multiple of it, values that are not finite.
            ModuleNotFoundError: faiss is not installed (extra `pq`).
        """
        if width not in (4, 8) or rows.dim() != 2 or rows.shape[1] % width:
            raise ValueError(f"pq takes width 4 or 8 and rows [n, multiple of it], not {width} and {list(rows.shape)}")
        if not rows.isfinite().all():
            raise ValueError("product quantisation cannot be trained on rows that are not finite")
        parts = rows.detach().cpu().float().view(len(rows), rows.shape[1] // width, width)
        codebooks = torch.zeros(parts.shape[1], 256, width, device="cpu")
        for m in range(parts.shape[1]):
            points = parts[:, m][parts[:, m].any(1)]
            distinct = points.unique(dim=0)
            if len(distinct) <= 255:
                codebooks[m, 1 : 1 + len(distinct)] = distinct
                continue
            require("the training of pq codebooks", "faiss")
            import faiss  # not needed to read or write rows, only here

            exponent = torch.frexp(points.abs().max())[1]
            unit = torch.ldexp(torch.ones((), device="cpu"), exponent)  # squares must not overflow
            kmeans = faiss.Kmeans(width, 255, niter=15, seed=seed, min_points_per_centroid=1)
            kmeans.train((points / unit).numpy())
            codebooks[m, 1:] = torch.from_numpy(kmeans.centroids) * unit
        return PQ(codebooks)

    def row_bytes(self, dim: int) -> int:
        """Return the bytes per stored row. Raise ValueError for a width other than the codebooks'."""
        if dim != self.dim:
            raise ValueError(f"these {self.name} codebooks were trained on rows of {self.dim} values, not {dim}")
        return dim // self.width

    def encode(self, rows: Tensor) -> Tensor:
        """Encode rows float32 [n, dim] as uint8 [n, row_bytes], the nearest centroids. Raise as Fp8.encode."""
        rows = _checked(rows, self)
        stored = torch.empty(len(rows), self.row_bytes(self.dim), dtype=torch.uint8, device="cpu")
        books = self.codebooks.double()  # float32 squares overflow from 1.8e19 on
        for lo in range(0, len(rows), 8192):
            parts = rows[lo : lo + 8192].double().view(-1, *books.shape[::2])
            for m, book in enumerate(books):
                distance = book.square().sum(1) - 2 * parts[:, m] @ book.T
                nearest = distance.argmin(1).masked_fill(~parts[:, m].any(1), 0)
                stored[lo : lo + 8192, m] = nearest.to(torch.uint8)
        return stored

    def decode(self, stored: Tensor, dim: int) -> Tensor:
        """Decode stored rows uint8 [n, row_bytes] to float32 [n, dim]. Raise ValueError for rows of another size."""
        stored = _sized(stored, dim, self)
        return self.codebooks[torch.arange(stored.shape[1], device="cpu"), stored.long()].flatten(1)

    def wrong(self, stored: Tensor, dim: int) -> Tensor:
        """Return bool [n], all False: every byte names a centroid."""
        return torch.zeros(len(_sized(stored, dim, self)), dtype=torch.bool, device="cpu")


Codec = Fp8 | Int | PQ
NAMES = ("fp8", "int8", "int4", "pq4", "pq8")


def get_codec(name: str, dim: int) -> Codec:
    """Return the codec of this name for rows of `dim` values; "pq" is "pq4". A pq codec starts with codebooks of zeros.

    Raises:
        ValueError: an unknown name, or a width that the codec cannot hold.
    """
    if name in ("pq", "pq4", "pq8"):
        width = 8 if name == "pq8" else 4
        if dim % width:
            raise ValueError(f"pq{width} splits a row into groups of {width} values, so it cannot hold {dim}")
        return PQ(torch.zeros(dim // width, 256, width, device="cpu"))
    codecs: dict[str, Codec] = {"fp8": Fp8(), "int8": Int(8), "int4": Int(4)}
    if name not in codecs:
        raise ValueError(f"unknown row codec {name!r}: expected one of {', '.join(NAMES)}")
    codecs[name].row_bytes(dim)
    return codecs[name]
