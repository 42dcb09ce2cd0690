"""Recoder: blocks of one table's rows, checked and stored with the codec of another format."""

from __future__ import annotations

import torch
from torch import Tensor

from engram.integrations.formats.stored_rows import Rows
from engram.tables import EncodedTable

BLOCK = 64 << 20  # bytes of a block's rows as float32


class Recoder:
    """Reader of one table's rows, block by block, checked and stored with the codec of another format.

    error: the largest difference between a value and the value stored for it; 0.0 if nothing was rounded.
    """

    def __init__(self, rows: Rows, codec: str):
        self.rows, self.codec, self.error = rows, codec, 0.0
        self.block = max(1, min(BLOCK // (4 * rows.dim), rows.rows))
        fp8 = "fp8" in (rows.codec, codec)
        self._scratch = EncodedTable(self.block, rows.dim, "fp8") if fp8 else None
        self._ids = torch.arange(self.block)

    def read(self, first: int, stop: int) -> Tensor:
        """Return rows first .. stop - 1, at most `block` of them, in the target's codec.

        Raises:
            ValueError: a value is NaN or infinite.
        """
        block, scratch = self.rows.read(first, stop), self._scratch
        n = stop - first
        try:
            if self.rows.codec == "fp8":
                assert scratch is not None
                scratch.tensor[:n] = block
                scratch.validate(0, n)
                values = scratch.gather(self._ids[:n])  # the largest scales make infinities of finite bytes
            else:
                values = block
            if not torch.stack(torch.aminmax(values)).isfinite().all():
                raise ValueError("a value is NaN or infinite")
        except ValueError as error:
            raise ValueError(f"tensor {self.rows.name}, rows {first:,} to {stop - 1:,}: {error}") from error
        if self.codec == self.rows.codec:
            return block
        wide = values.float()
        if self.codec == "fp8":
            assert scratch is not None
            scratch._store(wide)
            stored, back = scratch.tensor[:n].clone(), scratch.gather(self._ids[:n])
        else:
            stored = wide.to(getattr(torch, self.codec))
            back = stored.float()
        self.error = max(self.error, float((back - wide).abs().max()))
        return stored
