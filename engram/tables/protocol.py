"""Table: what the rest of the code may use of a table, whatever stores its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


class Table(Protocol):
    """Rows that are read by row id. HostTable (float rows) and EncodedTable (rows of a codec) have all of this.

    Attributes:
        rows: number of rows. dim: values per row, as gather returns them.
        dtype: of the stored values; torch.uint8 if a codec wrote them.
        nbytes: bytes of all stored rows, without codebooks.
        path: file of the rows, None in memory. writable: False if the file was opened read-only.
        on_meta: True while a table made on the meta device has no memory; see materialize.
        init, std, seed: how rows that were never written read; see HostTable.
    """

    rows: int
    dim: int
    dtype: torch.dtype
    nbytes: int
    path: Path | None
    writable: bool
    on_meta: bool
    init: str
    std: float
    seed: int

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Shape of `tensor`."""

    @property
    def tensor(self) -> Tensor:
        """The stored values [rows, values or bytes per row], without a copy.

        Raises:
            ValueError: a closed or meta table. OSError: the table's file was truncated.
        """

    def check(self, row_ids: Tensor | np.ndarray) -> Tensor:
        """Return row ids as a contiguous int64 CPU tensor, after a check that each is a row of the table.

        Raises:
            TypeError: not int64. IndexError: a row outside the table. OSError: the table's file was truncated.
        """

    def gather(self, row_ids: Tensor | np.ndarray, out: Tensor | None = None) -> Tensor:
        """Return the rows [..., dim] of int64 row ids [...], in `out` if it is passed.

        Raises:
            IndexError, TypeError: see `check`. ValueError: `out` of another shape, dtype or layout; a closed table.
        """

    def prefetch(self, row_ids: Tensor | np.ndarray) -> int:
        """Start reading the file pages of these rows. Return the bytes requested, 0 for a table in memory."""

    def write(self, row_ids: Tensor | np.ndarray, rows: Tensor) -> None:
        """Store rows [..., dim] under distinct row ids [...], rounded or encoded.

        Raises:
            ValueError: shapes that do not match, a row id that occurs twice, values that a codec cannot hold.
            PermissionError: see `check_writable`.
        """

    def check_writable(self) -> None:
        """Raise PermissionError if rows cannot be written: the table is read-only, or its file belongs to the parent of
        this process."""

    def materialize(self) -> None:
        """Allocate the memory or file of a table that was made on the meta device."""

    def info(self) -> dict[str, Any]:
        """Return rows, dim, dtype, bytes, mode, location, huge pages and kernels, for logs."""

    def flush(self) -> None:
        """Force rows in a file to the disk."""

    def drop(self) -> None:
        """Release the pages of a file from memory; no row changes."""

    def close(self) -> None:
        """Flush and release the rows; further use raises ValueError."""
