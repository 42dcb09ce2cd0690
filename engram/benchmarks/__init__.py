"""Timings on this machine beside alternatives: every figure is a median, every ratio comes from one interleaved run.

The figures of "hash", "lookup" and "update" name their situation: back to back, right after matrix products (as inside
a model), or after 10 ms of rest; compare.py describes them. All others are taken after rest, but for those of "decode",
whose steps follow each other. `engram bench` leaves the waiting threads of OpenMP as a program that imports engram has
them; the other commands let them sleep (OMP_WAIT_POLICY=PASSIVE).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from engram.benchmarks.attach import bench_attach
from engram.benchmarks.codecs import bench_codecs
from engram.benchmarks.compare import Row
from engram.benchmarks.convert import bench_convert
from engram.benchmarks.decode import bench_decode
from engram.benchmarks.disk import bench_disk
from engram.benchmarks.gather_update import bench_lookup, bench_update
from engram.benchmarks.hashing import bench_hash
from engram.benchmarks.step import bench_prefetch, bench_scale, bench_step
from engram.lm.train import tune_allocator

_BENCHES: dict[str, Callable[[], list[Row]]] = {
    "hash": bench_hash,
    "lookup": bench_lookup,
    "update": bench_update,
    "codecs": bench_codecs,
    "step": bench_step,
    "prefetch": bench_prefetch,
    "scale": bench_scale,
    "disk": bench_disk,
    "convert": bench_convert,
    "attach": bench_attach,
    "decode": bench_decode,
}


USUAL = ("hash", "lookup", "update", "step")


def bench(names: Sequence[str] = USUAL, on_name: Callable[[str], Any] | None = None) -> dict[str, list[Row]]:
    """Run the named benchmarks.

    Args:
        names: any of "hash", "lookup", "update", "codecs", "step", "prefetch", "scale" (step time against rows stored),
            "disk" and "convert" (which write files of 4 and 6 GiB in the temporary folder), "attach" and "decode" (a
            step at growing positions of a text), which need transformers.
        on_name: called with the name of each benchmark before it runs.

    Returns:
        {name: rows}. A row is {"what", "value", "unit", "ratio"}; the first one is engram's, each further one an
        alternative measured in turn with it. "value" is a median, "ratio" the median over the rounds of (time of this
        row / time of the first in the same situation): above 1, engram is faster. If the machine's ceiling was measured
        in the same rounds, "of_ceiling" is the share of it that the row reaches; "of_back_to_back" is the share of the
        row's own speed back to back.

    Raises:
        ValueError: an unknown name.
    """
    unknown = [name for name in names if name not in _BENCHES]
    if unknown:
        raise ValueError(f"unknown benchmark {', '.join(unknown)}: choose from {', '.join(_BENCHES)}")
    tune_allocator()
    results = {}
    for name in names:
        if on_name is not None:
            on_name(name)
        results[name] = _BENCHES[name]()
    return results
