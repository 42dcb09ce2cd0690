"""Arms timed in turn in one process, so that other load on the machine affects all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Row = dict[str, Any]  # {"what", "value", "unit", "ratio"}; ratio: time of this row / of the first (> 1: slower than it)


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
    """Time the arms in turn, round after round.

    Args:
        arms: functions to time, by name. Of a pair, the first function makes the second one's argument, untimed.
        per_round: amount of work per call, such as rows. "value" is per_round / seconds, or seconds / per_round if
            `times`.
        unit: unit of "value".
        rounds: timed rounds, after two untimed ones.
        ceiling: the arm that shows the limit of the machine; every row then has "of_ceiling", its share of that.
        calls: how often an arm runs in its turn, timed together. With 1, the caches hold what the other arms left
            there; with more, most calls follow a call of the same arm.

    Returns:
        One row per arm; the ratios compare with the first one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for round_number in range(rounds + 2):
        for name, work in arms.items():
            prepare, timed = work if isinstance(work, tuple) else (None, work)
            argument = () if prepare is None else (prepare(),)
            time.sleep(_REST)
            began = time.perf_counter()
            for _ in range(calls):
                timed(*argument)
            if round_number >= 2:  # the first two warm up
                seconds[name].append((time.perf_counter() - began) / calls)
    first = np.array(next(iter(seconds.values())))
    rows = []
    for name, spent in seconds.items():
        middle = float(np.median(spent))
        value = middle / per_round if times else per_round / middle
        row: Row = {"what": name, "value": value, "unit": unit, "ratio": float(np.median(np.array(spent) / first))}
        if ceiling is not None:
            row["of_ceiling"] = float(np.median(np.array(seconds[ceiling]) / np.array(spent)))
        rows.append(row)
    return rows
