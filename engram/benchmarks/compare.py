"""Arms timed in turn in one process, so that other load on the machine affects all of them alike.

What runs before a call decides its time as much as the call does, so every figure belongs to a situation:

- "back to back": right after another call of the same arm. Threads are awake, caches hold what that call left.
- "after matrix products": right after five products of 512 x 512 matrices, as inside a model. The threads that torch
  computed with spin for about a millisecond (OMP_WAIT_POLICY, GOMP_SPINCOUNT), on the cores of the call.
- "after rest": after 10 ms without work. Threads are asleep, and cores may have lowered their clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

Row = dict[str, Any]  # {"what", "value", "unit", "ratio"}; ratio: time of this row / of the first (> 1: slower than it)
Arm = Callable[[], Any] | tuple[Callable[[], Any], Callable[[Any], Any]]

BACK_TO_BACK, AFTER_PRODUCTS, AFTER_REST = SITUATIONS = "back to back", "after matrix products", "after rest"
_REST = 0.01  # seconds
_MATRIX = 512


def _seconds(arm: Arm, situation: str, matrix: torch.Tensor) -> float:
    prepare, timed = arm if isinstance(arm, tuple) else (None, arm)
    argument = () if prepare is None else (prepare(),)
    if situation == BACK_TO_BACK:
        timed(*argument)
        argument = () if prepare is None else (prepare(),)
    elif situation == AFTER_PRODUCTS:
        for _ in range(5):
            matrix @ matrix
    else:
        time.sleep(_REST)
    began = time.perf_counter()
    timed(*argument)
    return time.perf_counter() - began


def compare(
    arms: Mapping[str, Arm],
    per_round: float,
    unit: str,
    rounds: int,
    times: bool = False,
    ceiling: str | None = None,
    situations: Sequence[str] = (AFTER_REST,),
) -> list[Row]:
    """Time the arms in turn, round after round.

    Args:
        arms: functions to time, by name. Of a pair, the first function makes the second one's argument, untimed.
        per_round: amount of work per call, such as rows. "value" is per_round / seconds, or seconds / per_round if
            `times`.
        unit: unit of "value".
        rounds: timed rounds, after two untimed ones.
        ceiling: the arm that shows the limit of the machine; every row then has "of_ceiling", its share of that.
        situations: out of SITUATIONS (see the top of the file); each round times every arm in each of them.

    Returns:
        One row per situation and arm, with "situation" and the median "seconds"; the ratios compare with the first arm
        in the same situation. If arms are timed back to back too, "of_back_to_back" is the share of that speed.
    """
    matrix = torch.randn(_MATRIX, _MATRIX, device="cpu")
    spent = {(situation, name): list[float]() for situation in situations for name in arms}
    for round_number in range(rounds + 2):
        for situation, name in spent:
            once = _seconds(arms[name], situation, matrix)
            if round_number >= 2:  # the first two warm up
                spent[situation, name].append(once)
    taken = {key: np.array(each) for key, each in spent.items()}
    first, rows = next(iter(arms)), []
    for (situation, name), seconds in taken.items():
        middle = float(np.median(seconds))
        row: Row = {"what": f"{situation}: {name}" if len(situations) > 1 else name}
        row |= {"value": middle / per_round if times else per_round / middle, "unit": unit}
        row |= {"ratio": float(np.median(seconds / taken[situation, first])), "situation": situation, "seconds": middle}
        if ceiling is not None:
            row["of_ceiling"] = float(np.median(taken[situation, ceiling] / seconds))
        if len(situations) > 1 and BACK_TO_BACK in situations:
            row["of_back_to_back"] = float(np.median(taken[BACK_TO_BACK, name] / seconds))
        rows.append(row)
    return rows


def as_bandwidth(rows: list[Row], name: str, nbytes: int, moved: int) -> None:
    """Turn the rows of the arm `name`, which reads `nbytes` in order, into the memory's speed in GB/s; "ratio" becomes
    the share of it that the first arm reaches with `moved` bytes per call."""
    for row in rows:
        if row["what"].endswith(name):
            ours = next(other for other in rows if other["situation"] == row["situation"])
            speed = nbytes / row["seconds"] / 1e9
            row |= {"value": speed, "unit": "GB/s", "ratio": moved / ours["seconds"] / 1e9 / speed}
