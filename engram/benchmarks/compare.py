"""Arms timed in turn in one process, so that whatever else the machine does hits all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Row = dict[str, Any]  # {"what", "value", "unit", "ratio"}; ratio: ours over this line (> 1: ours is faster)


_REST = 0.01  # seconds: torch's OpenMP threads spin for a while after their work, on the cores of the next arm


def compare(
    arms: Mapping[str, Callable[[], Any] | tuple[Callable[[], Any], Callable[[Any], Any]]],
    per_round: float,
    unit: str,
    rounds: int,
    times: bool = False,
    ceiling: str | None = None,
    calls: int = 1,
) -> list[Row]:
    """Times the arms in turn, round after round. value = per_round / seconds, or seconds / per_round if `times`.

    arms: what to time; of a pair the first makes, off the clock, what the second is called with.
    calls: how often an arm runs in its turn, timed together. With 1 every call finds what the other arms left in the
    caches; with more, most calls find what the one before left there.
    ceiling: the arm that shows what the machine can do; every row then says "of_ceiling", its share of that.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for round_number in range(rounds + 2):
        for name, work in arms.items():
            prepare, timed = work if isinstance(work, tuple) else (None, work)
            given = () if prepare is None else (prepare(),)
            time.sleep(_REST)
            began = time.perf_counter()
            for _ in range(calls):
                timed(*given)
            if round_number >= 2:  # the first two warm up
                seconds[name].append((time.perf_counter() - began) / calls)
    ours = np.array(next(iter(seconds.values())))
    rows = []
    for name, spent in seconds.items():
        middle = float(np.median(spent))
        value = middle / per_round if times else per_round / middle
        row: Row = {"what": name, "value": value, "unit": unit, "ratio": float(np.median(np.array(spent) / ours))}
        if ceiling is not None:
            row["of_ceiling"] = float(np.median(np.array(seconds[ceiling]) / np.array(spent)))
        rows.append(row)
    return rows
