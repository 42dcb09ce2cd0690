"""EncodedTable: rows stored by a codec and decoded while they are gathered; encode_table makes one from a HostTable."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from engram.config import as_integer
from engram.storage.files import put, write_whole
from engram.storage.partial import partial_folder
from engram.storage.untrusted import read_tensors
from engram.tables import kernels
from engram.tables.arguments import as_output
from engram.tables.codecs import PQ, Codec, check_finite, get_codec
from engram.tables.protocol import Table
from engram.tables.stored import StoredRows
from engram.tables.table import HostTable

_SMALLEST = 1024  # rows below which one core is faster than two
_SAMPLE = 32_768  # rows that codebooks are trained on and errors measured on
_LOOK = 4096  # rows checked at the beginning, middle and end of a file that is opened read-only


class _Encoded(ctypes.Structure):
    """Mirror of `Encoded` in codecs.c."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("codebooks", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("codec", ctypes.c_int32),
        ("width", ctypes.c_int32),
    ]


class EncodedTable(StoredRows):
    """A table that reads as float32 [rows, dim] and stores `codec.row_bytes(dim)` bytes per row. Fresh rows read as 0.

    It is read like a HostTable. It cannot be trained: the row optimizers refuse it.

    Args:
        rows: number of rows. dim: values per row, one that the codec can hold.
        codec: "fp8", "int8", "int4", or a trained PQ (engram.tables.codecs).
        path: file of rows * row_bytes bytes, created or opened as by HostTable. The codebooks of a product quantiser
            lie in `path`.codebooks beside it; pass "pq4" or "pq8" to open such a file, the PQ itself to create one.
        mode: "r+", or "r" to map an existing file read-only, shared with other processes. "r+" reads every stored
            row once to check that an encoder wrote it; "r" checks some of them, so that any size opens at once.

    Raises:
        ValueError: a width the codec cannot hold; a file of another size, or with rows that no encoder writes.
        FileNotFoundError: product-quantised rows without their codebooks. BlockingIOError, OSError: as HostTable.
    """

    def __init__(
        self, rows: int, dim: int, codec: str | Codec, path: str | os.PathLike[str] | None = None, *, mode: str = "r+"
    ):
        rows, dim = as_integer("rows", rows), as_integer("dim", dim)
        if rows < 1:
            raise ValueError(f"a table needs rows >= 1, not {rows}")
        self._existed = path is not None and Path(path).exists()
        self.codec = _find_codec(codec, dim, None if path is None else Path(path), self._existed)
        self.row_bytes = self.codec.row_bytes(dim)
        super().__init__(rows, dim, torch.uint8, self.row_bytes, path, mode)
        self.init, self.std, self.seed = "zero", 1.0, 0
        self._begin()

    def _allocate(self) -> None:
        self._tensor = self._map(f"{self.rows:,} rows x {self.row_bytes} bytes of {self.codec.name}")
        books, width = (self.codec.codebooks, self.codec.width) if isinstance(self.codec, PQ) else (None, 0)
        self._struct = _Encoded(
            self._tensor.data_ptr(),
            None if books is None else books.data_ptr(),
            self.rows,
            self.dim,
            self.row_bytes,
            self.codec.code,
            width,
        )
        try:
            if self._existed and self.writable:
                self.validate()
            elif self._existed:
                for start in sorted({0, max(0, (self.rows - _LOOK) // 2), max(0, self.rows - _LOOK)}):
                    self.validate(start, min(start + _LOOK, self.rows))
            elif books is not None and self.path is not None:
                write_whole(self.codebook_path, safetensors.torch.save({"codebooks": books}))
        except BaseException:
            self.close()
            if not self._existed and self.path is not None:  # rows without their codebooks could never be opened
                self.path.unlink(missing_ok=True)
            raise

    @property
    def codebook_path(self) -> Path:
        """File of a mapped table's codebooks."""
        assert self.path is not None
        return _codebook_path(self.path)

    def validate(self, first: int = 0, stop: int | None = None) -> None:
        """Check stored rows first .. stop - 1, by default all (once through the file, at the speed of the disk).

        Raises:
            ValueError: the first row that no encoder writes: an fp8 NaN, or an int scale that is negative or not
            finite. Such bytes mean another codec, another block size or damage.
        """
        stored, bad = self.tensor, list[int]()
        stop = self.rows if stop is None else stop
        if isinstance(self.codec, PQ):
            PQ(self.codec.codebooks)  # checks them
        if kernels.native is not None:
            table = self.struct
            call = kernels.Call("decode_check", ctypes.addressof(table), first)
            wrong_row = kernels.spread(stop - first, _SMALLEST, call, table, stored)
            bad = [first + wrong_row] if wrong_row >= 0 else []
        else:
            for lo in range(first, stop, 65536):
                wrong = self.codec.wrong(stored[lo : min(lo + 65536, stop)], self.dim)
                bad += [lo + int(i) for i in wrong.nonzero()[:1]]
        if bad:
            raise ValueError(
                f"row {min(bad):,} of {self.path or 'this table'} is not a valid {self.codec.name} row: it holds a "
                f"NaN, or a scale that no encoder writes. Expected {self.row_bytes} bytes per row, one scale per 32 "
                f"values, for rows of {self.dim}"
            )

    def gather(self, row_ids: Tensor | np.ndarray, out: Tensor | None = None) -> Tensor:
        """Return decoded rows by id. row_ids: int64 [...]; out: contiguous float32 CPU tensor [..., dim] to fill.

        Returns:
            float32 [..., dim].

        Raises:
            IndexError, TypeError, ValueError: as HostTable.gather.
        """
        stored = self.tensor
        ids = self.check(row_ids)
        shape = (*ids.shape, self.dim)
        out = as_output(out, shape, torch.float32)
        if ids.numel() == 0:
            return out
        if kernels.native is not None:
            table = self.struct
            call = kernels.Call("decode", ctypes.addressof(table), ids.data_ptr(), out.data_ptr())
            kernels.spread(ids.numel(), _SMALLEST, call, table, stored, ids, out)
        else:
            out.copy_(self.codec.decode(stored.index_select(0, ids.flatten()), self.dim).view(shape))
        return out

    def write(self, row_ids: Tensor | np.ndarray, rows: Tensor) -> None:
        """Encode rows [..., dim] and store them under distinct row ids [...].

        Raises:
            ValueError: shapes that do not match, a row id that occurs twice, or values that are not finite.
        """
        ids = self._begin_write(row_ids, rows)
        self._store(rows.reshape(-1, self.dim), ids)

    def _store(self, rows: Tensor, ids: Tensor | None = None, first: int = 0) -> None:
        """Encode rows [n, dim] into the checked row ids [n], or into rows first .. first + n - 1."""
        stored = self.tensor
        if kernels.native is None or isinstance(self.codec, PQ):
            encoded = self.codec.encode(rows)
            if ids is None:
                stored[first : first + len(rows)] = encoded
            else:
                stored.index_copy_(0, ids, encoded)
            return
        values = rows.detach().to("cpu", torch.float32).contiguous()
        check_finite(values, self.codec)  # before anything is stored
        table, where = self.struct, 0 if ids is None else ids.data_ptr()
        call = kernels.Call("encode", ctypes.addressof(table), values.data_ptr(), where, first)
        kernels.spread(len(values), _SMALLEST, call, table, stored, values, ids)

    def info(self) -> dict[str, Any]:
        """Return HostTable.info, with the codec, the bytes per row and the bytes of the codebooks."""
        books = self.codec.codebooks.nbytes if isinstance(self.codec, PQ) else 0
        return {**super().info(), "codec": self.codec.name, "row_bytes": self.row_bytes, "codebook_bytes": books}

    def __repr__(self) -> str:
        return f"EncodedTable({self.rows:,} x {self.dim}, {self.codec.name}, {self.info()['where']})"


HostTable.register(EncodedTable)  # isinstance(table, HostTable) stays True for encoded rows


def _codebook_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.codebooks")


def _find_codec(codec: str | Codec, dim: int, path: Path | None, existed: bool) -> Codec:
    """Return the codec itself; for a file of product-quantised rows, with the codebooks that lie beside it."""
    named = get_codec(codec, dim) if isinstance(codec, str) else codec
    if not isinstance(named, PQ) or path is None:
        return named
    if not existed:
        if isinstance(codec, str):
            raise ValueError(f"{path} is a new file: pass trained codebooks (PQ.train), not {codec!r}")
        return named
    books = _codebook_path(path)
    if not books.is_file():
        raise FileNotFoundError(f"{path} holds {named.name} rows, but their codebooks {books} are gone")
    saved = read_codebooks(books)
    if (saved.dim, saved.width) != (dim, named.width):
        raise ValueError(
            f"{books} has {saved.name} codebooks for rows of {saved.dim} values, not {named.name} ones for {dim}"
        )
    if not isinstance(codec, str) and not torch.equal(saved.codebooks, named.codebooks):
        raise ValueError(f"{books} holds other codebooks than the codec: its rows mean other values")
    return saved


def encode_table(
    table: Table, codec: str | Codec, path: str | os.PathLike[str] | None = None, block: int | None = None
) -> EncodedTable:
    """Return a copy of a table in another codec, `block` rows at a time (default: about 4 MiB of float32).

    Never-written rows of a normal table become their init values; blocks of zeros are not written, so that a sparse
    table stays sparse. "pq4" and "pq8" are trained first. A file appears under its name when it is complete.

    Raises:
        ValueError: rows that are not finite, a width the codec cannot hold, an existing file at `path`. OSError: no
        disk space; nothing half-written stays behind.
    """
    final = None if path is None else Path(path)
    if final is not None and final.exists():
        raise ValueError(f"{final} exists already: encoding into it would mix two tables")
    if isinstance(codec, str):
        codec = get_codec(codec, table.dim)
        if isinstance(codec, PQ):
            codec = PQ.train(table.gather(_written_rows(table, _SAMPLE)).float(), codec.width)
    block = block or max(1, (1 << 20) // table.dim)
    if final is None:
        return _fill(EncodedTable(table.rows, table.dim, codec), table, block)
    with partial_folder(final) as partial:
        encoded = _fill(EncodedTable(table.rows, table.dim, codec, partial / final.name), table, block)
        try:
            place_table(encoded, final)
        except BaseException:
            encoded.close()
            raise
    return encoded


def place_table(encoded: EncodedTable, final: Path) -> None:
    """Rename the synced files of a table to their final names, the rows last, so they are never without codebooks."""
    books = encoded.codebook_path if isinstance(encoded.codec, PQ) else None
    rows, encoded.path = encoded.path, final
    assert rows is not None
    if books is not None:
        put(books, encoded.codebook_path)
    put(rows, final)


def _fill(encoded: EncodedTable, table: Table, block: int) -> EncodedTable:
    """Encode all rows of `table` into a new one, which is closed if that fails."""
    try:
        for lo in range(0, table.rows, block):
            hi = min(lo + block, table.rows)
            rows = table.gather(torch.arange(lo, hi, device="cpu")).float()
            if rows.any():
                try:
                    encoded._store(rows, first=lo)
                except ValueError as error:
                    raise ValueError(f"rows {lo:,} to {hi - 1:,} of the table cannot be encoded: {error}") from error
        encoded.flush()
    except BaseException:
        encoded.close()
        raise
    return encoded


def _written_rows(table: Table, count: int, seed: int = 0) -> Tensor:
    """Return ids of up to `count` rows that are not all zero, drawn at random; no more than 2^20 rows are read."""
    limit, generator = min(table.rows, 1 << 20), torch.Generator().manual_seed(seed)
    if table.rows <= limit:
        ids = torch.randperm(table.rows, generator=generator, device="cpu")
    else:
        ids = torch.randint(0, table.rows, (limit,), generator=generator, device="cpu").unique()
        ids = ids[torch.randperm(len(ids), generator=generator, device="cpu")]
    written: list[Tensor] = []
    for piece in ids.split(65536):
        written.append(piece[table.gather(piece).any(1)])
        if sum(map(len, written)) >= count:
            break
    chosen = torch.cat(written)[:count]
    if len(chosen) == 0 and table.rows > limit:
        raise ValueError(
            f"none of {limit:,} rows drawn from {table.rows:,} was ever written: there is nothing to measure"
        )
    return chosen


def report(table: Table, encoded: EncodedTable) -> dict[str, Any]:
    """Return the size and the errors of a codec: bytes (rows and codebooks), their ratio to float32 rows, and the
    largest and root mean square error on up to 32,768 rows that are not zero, beside the root mean square of their
    values.
    """
    ids = _written_rows(table, _SAMPLE)
    rows = table.gather(ids).double()
    error = encoded.gather(ids).double() - rows
    info = encoded.info()
    total = encoded.nbytes + info["codebook_bytes"]
    return {
        "codec": info["codec"],
        "row_bytes": info["row_bytes"],
        "bytes": total,
        "ratio": total / (4 * table.rows * table.dim),
        "rows_sampled": len(ids),
        "max_error": float(error.abs().max()) if len(ids) else 0.0,
        "rms_error": float(error.square().mean().sqrt()) if len(ids) else 0.0,
        "rms": float(rows.square().mean().sqrt()) if len(ids) else 0.0,
    }


def read_codebooks(path: Path) -> PQ:
    """Return the codec of a file of codebooks.

    Raises:
        ValueError: a damaged file, or codebooks that PQ refuses.
    """
    tensors = read_tensors(path, "the codebooks of a table")
    if list(tensors) != ["codebooks"]:
        raise ValueError(f"{path} holds the tensors {', '.join(tensors)[:80]}: expected codebooks alone")
    try:
        return PQ(tensors["codebooks"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
