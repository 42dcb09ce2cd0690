"""over-encoding: hashed n-gram embeddings at the input only (OverEncoding, arXiv 2501.16975).

Orders 2 and 3 of raw token ids are hashed into heads of narrow rows, the rows of a position are concatenated, projected
to the hidden size (which is the sum of one projection per head) and added to the token embedding. Heads and row width
are the setting's; rows are as many as Engram has over all its layers, so the table has Engram's size.

Differs from the source: rows start at zero instead of random, the sum is not divided by the number of terms (the
embedding here is as small as plain's), and the table is trained by the row optimizer of Engram's table.
"""

from __future__ import annotations

from engram import EngramMemory
from engram.lm.run import Data, Setting
from engram.lm.transformer import Transformer
from experiments.arms.host import engram_size, raw_ids, with_memory
from experiments.arms.rows import row_config


def build(setting: Setting, data: Data, *, rows: int | None = None) -> Transformer:
    """Return the decoder with these embeddings. rows: per head; default: Engram's number of table values in all."""
    heads, width = setting.memory.heads, setting.memory.head_dim
    rows = rows or max(1, engram_size(setting, data).table // (2 * heads * width))
    config = row_config(setting, layers=(0,), orders=(2, 3), rows_per_head=rows)
    return with_memory(setting, data, lambda: EngramMemory(config, raw_ids(data), setting.model.hidden_size))


ARMS = {"over-encoding": build}
