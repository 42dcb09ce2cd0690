"""Measure what size costs: rows per second against the width of a row, and a training step against the rows stored, in
memory and in a file larger than memory. Write results.jsonl, tables.md and paper_notes/scale.png. The script is a
runner of its own because it times kernels and steps; no loss is measured.

    python experiments/scripts/scale/run.py width rows disk    # `disk` writes a file larger than memory
    python experiments/scripts/scale/run.py                    # tables and figure again, from results.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[3]))  # so that the lab is found where this is run as a script

from engram.benchmarks.compare import compare
from engram.benchmarks.gather_update import lookup
from engram.benchmarks.step import TIME, Trainer, main_job
from engram.lm.train import tune_allocator
from experiments.lab.report import write_tables
from experiments.lab.results import read_lines

HOME = Path(__file__).parent
FIGURE = HOME.parents[2] / "paper_notes" / "scale.png"
WIDTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)  # bytes per row
EXPONENTS = range(16, 27)  # exponents of the rows per head
REFERENCE = 17
ARMS = (
    "engram gather(out=)",
    "index_select(out=)",
    "F.embedding",
    "F.embedding_bag",
    "ceiling: C loop, prefetch and copy",
)
HEADS, ROW_BYTES = 8, 128  # sizes of the main job: two orders of four heads, 32 values of float32

Line = dict[str, Any]


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def width(rounds: int) -> list[Line]:
    """Time 131,072 random rows from 2 GiB into a kept buffer, for every width."""
    lines = []
    for size in WIDTHS:
        for row in lookup(2 << 30, size, rounds):
            what = row["what"].split(": ", 1)[1]
            lines.append({"kind": "width", "row_bytes": size, **row, "what": what})
    return lines


def step_seconds(trainer: Trainer, steps: int) -> list[float]:
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        trainer()
        seconds.append(time.perf_counter() - began)
    return seconds


def rows(rounds: int) -> list[Line]:
    """Time the main job's training step with 2^k rows per head in memory, each size in turn with 2^17."""
    lines = []
    for k in EXPONENTS:
        trainers = {REFERENCE: Trainer(128, main_job(2**REFERENCE)), k: Trainer(128, main_job(2**k))}
        stored = HEADS * 2**k * (ROW_BYTES + 4)
        written = stored < memory_bytes() // 2
        for trainer in trainers.values():
            if written and trainer.memory is not None:
                for table in trainer.memory.tables.values():
                    table.tensor.fill_(1e-3)
            step_seconds(trainer, 64)  # one epoch of its text: pages touched for the first time are the start's cost
        arms: dict[str, Callable[[], Any]] = {str(exponent): trainer for exponent, trainer in trainers.items()}
        found = compare(arms, 1e-3, "ms/step", rounds=rounds, times=True)
        line = {"kind": "rows", "log2_rows_per_head": k, "bytes": stored, "written": written, **found[-1]}
        lines.append({**line, "what": "in memory", "reference_ms": found[0]["value"]})
        for trainer in trainers.values():
            assert trainer.memory is not None
            trainer.memory.close()
    return lines


def disk(steps: int, folder: str | None, exponent: int | None) -> list[Line]:
    """Time the same step from files larger than memory: pages cold, then the same batches again."""
    k = exponent or int(np.ceil(np.log2(memory_bytes() / HEADS / ROW_BYTES)))
    k += HEADS * 2**k * ROW_BYTES < 1.2 * memory_bytes() and exponent is None
    home = tempfile.mkdtemp(prefix="engram-scale-", dir=folder)
    try:
        big, small = Trainer(128, main_job(2**k), folder=home), Trainer(128, main_job(2**REFERENCE))
        assert big.memory is not None
        table = big.memory.tables[1]
        began = time.perf_counter()
        chunk = (64 << 20) // ROW_BYTES
        values = torch.randn(chunk, table.dim, generator=torch.Generator().manual_seed(0)) * 1e-3
        for first in range(
            0, table.rows, chunk
        ):  # every row is written, so that the file has no holes that read as zeros
            table.tensor[first : first + chunk] = values[: min(chunk, table.rows - first)]
            table.flush()
        print(f"wrote {table.nbytes / 2**30:.1f} GiB in {time.perf_counter() - began:.0f} s", flush=True)
        step_seconds(small, 64)
        facts = {"kind": "disk", "log2_rows_per_head": k, "bytes": table.nbytes, "ram": memory_bytes(), "steps": steps}
        spent: dict[tuple[bool, str], list[tuple[float, float]]] = {}
        waited: dict[tuple[bool, str], float] = {}
        for fetch_ahead in (True, False, False, True):
            big.fetch_ahead = fetch_ahead
            for what in ("cold", "warm"):
                if what == "cold":
                    table.drop()
                    for state in big.optimizer.row_optimizers[0].state.values():
                        state.drop()
                big.turn, small.turn, big.ahead = 0, 0, None
                clock = big.memory.clock
                clock["waiting"] = 0.0
                key = fetch_ahead, what
                for _ in range(steps):
                    theirs, ours = step_seconds(small, 1)[0], step_seconds(big, 1)[0]
                    spent.setdefault(key, []).append((ours, theirs))
                waited[key] = waited.get(key, 0.0) + clock["waiting"]
        lines = []
        for (fetch_ahead, what), pairs in spent.items():
            ours, theirs = np.array(pairs).T
            line = {**facts, "what": f"{what}, {'next batch fetched ahead' if fetch_ahead else 'on demand'}"}
            lines.append({**line, **_in_turn(ours, theirs), "waiting_share": waited[fetch_ahead, what] / ours.sum()})
            print(json.dumps(lines[-1]), flush=True)
        lines += serve(big, small, facts, steps)
        big.memory.close()
        return lines
    finally:
        shutil.rmtree(home)


def _in_turn(ours: np.ndarray, theirs: np.ndarray) -> Line:
    """Summarise seconds of two things that took turns: medians and quartiles in milliseconds, and the median of the
    ratios."""
    low, middle, high = (float(q) * 1e3 for q in np.quantile(ours, (0.25, 0.5, 0.75)))
    reference = float(np.median(theirs)) * 1e3
    ratio = float(np.median(ours / theirs))
    return {
        "value": middle,
        "quartiles": [low, high],
        "mean": ours.mean() * 1e3,
        "ratio": ratio,
        "reference": reference,
    }


@torch.no_grad()
def serve(big: Trainer, small: Trainer, facts: Line, chunks: int) -> list[Line]:
    """Prefill one text, TIME tokens per chunk; the next chunk's rows are fetched while this chunk runs."""
    assert big.memory is not None
    lines = []
    for trainer in (big, small):
        trainer.model.eval()
    text = big.text.flatten(0, 1)[-chunks - 1 :, :TIME]
    for what in ("cold", "warm"):
        if what == "cold":
            big.memory.tables[1].drop()
        spent: dict[str, list[float]] = {"big": [], "small": []}
        for name, trainer in (("small", small), ("big", big)):
            assert trainer.memory is not None
            ahead = trainer.memory.recall(text[:1])
            for i in range(chunks):
                began = time.perf_counter()
                now, ahead = ahead, trainer.memory.recall(text[i + 1 : i + 2])
                trainer.model(text[i : i + 1], recall=now)
                spent[name].append(time.perf_counter() - began)
        line = {**facts, "kind": "serve", "what": f"{what} prefill, next chunk fetched ahead", "tokens": TIME}
        lines.append({**line, **_in_turn(np.array(spent["big"]), np.array(spent["small"]))})
        print(json.dumps(lines[-1]), flush=True)
    return lines


def tables(lines: list[Line]) -> str:
    """Return the results as Markdown."""
    text = []
    if by_width := [line for line in lines if line["kind"] == "width" and line["what"] in ARMS]:
        names = [name for name in ARMS if any(line["what"] == name for line in by_width)]
        text += [
            f"| row, bytes | {' | '.join(f'{name}, Mrows/s' for name in names)} |",
            "|---" * (len(names) + 1) + "|",
        ]
        for size in sorted({line["row_bytes"] for line in by_width}):
            cells = {line["what"]: f"{line['value']:.1f}" for line in by_width if line["row_bytes"] == size}
            text.append(f"| {size:,} | {' | '.join(cells.get(name, '') for name in names)} |")
    if by_rows := [line for line in lines if line["kind"] == "rows"]:
        text += ["", "| rows per head | rows and state, GB | ms per step | against 2^17 |", "|---|---|---|---|"]
        for line in by_rows:
            mark = "" if line["written"] else " *"
            size = f"{line['bytes'] / 1e9:.2f}{mark}"
            text.append(f"| 2^{line['log2_rows_per_head']} | {size} | {line['value']:.0f} | {line['ratio']:.2f} |")
        text += ["", "\\* more than half of memory: only the rows that the text reads were ever written."]
    for kind, unit in (("disk", "training step"), ("serve", "prefill chunk")):
        if found := [line for line in lines if line["kind"] == kind]:
            one = found[0]
            text += [
                "",
                f"{one['bytes'] / 2**30:.1f} GiB of written rows (2^{one['log2_rows_per_head']} per head) in a file, "
                f"{one['ram'] / 2**30:.1f} GiB of memory, {one['steps']} {unit}s:",
                "",
                f"| {unit} | median, ms | quartiles | mean | against 2^{REFERENCE} rows in memory | waiting |",
                "|---|---|---|---|---|---|",
            ]
            for line in found:
                waiting = f"{100 * line['waiting_share']:.0f} %" if "waiting_share" in line else ""
                ratio = f"{line['ratio']:.2f}"
                cells = [line["what"], f"{line['value']:.0f}", "{:.0f} to {:.0f}".format(*line["quartiles"])]
                text.append(f"| {' | '.join(cells)} | {line['mean']:.0f} | {ratio} | {waiting} |")
    return "\n".join(text)


def draw(lines: list[Line]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    by_width = [line for line in lines if line["kind"] == "width" and line["what"] in ARMS]
    for name in dict.fromkeys(line["what"] for line in by_width):
        points = [(line["row_bytes"], line["value"]) for line in by_width if line["what"] == name]
        style = {"color": "0.6", "linestyle": "--"} if name.startswith("ceiling") else {"marker": "o", "markersize": 4}
        left.plot(*zip(*points, strict=True), label=name, **style)
    left.set(xscale="log", yscale="log", xlabel="bytes of a row", ylabel="million rows per second")
    left.set_xticks(WIDTHS, [f"{size:,}" for size in WIDTHS], fontsize=8)
    left.set_yticks(ticks := [1, 2, 5, 10, 20, 50], [str(tick) for tick in ticks])
    left.minorticks_off()
    left.set_title("random rows out of 2 GiB, two cores", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    by_rows = [line for line in lines if line["kind"] == "rows"]
    for written, label in ((True, "in memory"), (False, "in memory, only rows in use written")):
        points = [(line["log2_rows_per_head"], line["ratio"]) for line in by_rows if line["written"] == written]
        if points:
            right.plot(
                *zip(*points, strict=True), "o", color="C0", fillstyle="full" if written else "none", label=label
            )
    for line in lines:
        if line["kind"] == "disk" and "ahead" in line["what"]:
            colour = "C3" if line["what"].startswith("cold") else "C2"
            label = f"{line['bytes'] / 2**30:.0f} GiB file, {line['what'].split(',')[0]} pages"
            right.plot(line["log2_rows_per_head"], line["ratio"], "s", color=colour, label=label)
    right.axhline(1, color="0.8", zorder=0)
    right.set(
        xlabel="rows per head (8 heads of 128-byte rows)", ylabel=f"training step, relative to 2^{REFERENCE} rows"
    )
    right.set_xticks(EXPONENTS, [f"$2^{{{k}}}$" for k in EXPONENTS])
    right.set_ylim(0, 1.1 * max(right.get_ylim()[1], 1))
    right.set_title("a training step, by rows stored", fontsize=10)
    right.legend(frameon=False, fontsize=8, loc="lower left")
    figure.savefig(FIGURE, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=["width", "rows", "disk", []], help="what to measure; none: draw")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=40, help="of `disk`, at most 64")
    parser.add_argument("--folder", help="where `disk` writes; default: the folder for temporary files")
    parser.add_argument("--exponent", type=int, help="of the rows per head of `disk`")
    given = parser.parse_args()
    tune_allocator()
    file = HOME / "results.jsonl"
    lines = read_lines(file)
    for part in given.parts:
        if part == "disk":
            new = disk(given.steps, given.folder, given.exponent)
        else:
            new = {"width": width, "rows": rows}[part](given.rounds)
        kinds = {line["kind"] for line in new}
        lines = [line for line in lines if line["kind"] not in kinds] + new
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_tables(HOME, "scale", tables(lines), "python experiments/scripts/scale/run.py")
    draw(lines)


if __name__ == "__main__":
    main()
