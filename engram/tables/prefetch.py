"""Fetching rows ahead of their use: a gather that runs on a thread of its own while the model computes."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from engram.tables.table import HostTable

_SMALLEST = 1 << 18  # bytes below which waking a thread costs more than the copy
_thread = ThreadPoolExecutor(1, thread_name_prefix="engram-fetch")


def fetch(table: HostTable, row_ids: Tensor, out: Tensor) -> Future[Tensor]:
    """Starts table.gather(row_ids, out) and returns at once; .result() waits for the rows, or raises what it raised.

    Small gathers are done before returning.
    """
    table.check(row_ids)  # a bad id is the caller's error: raise it here, where the caller's stack is
    if out.nbytes >= _SMALLEST:
        return _thread.submit(table.gather, row_ids, out)
    done: Future[Tensor] = Future()
    done.set_result(table.gather(row_ids, out))
    return done
