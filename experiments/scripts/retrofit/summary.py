"""Tables in tables.md and figure.png, from results.jsonl and the losses in documents.npz."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from engram.ablation.statistics import Interval, paired_interval
from experiments.lab.measures import cut, table
from experiments.lab.plots import COLOURS, INK, SOFT, STYLE, dot, save
from experiments.lab.report import short, write_tables
from experiments.lab.results import read_documents, read_results
from experiments.scripts.retrofit.arms import NAMES
from experiments.scripts.retrofit.recipe import recipe

Record = dict[str, Any]
Arms = dict[str, dict[int, Record]]  # {arm: {seed: run}}

OFF = "both, memory off"
BYTES_A_TOKEN = 5  # of English in this tokenizer, roughly: weighs nats per token against bits per byte
# What is compared: name of the arrays, what a loss is divided by (None: each fact counts once), unit.
MEASURES: dict[str, tuple[str, str | None, float]] = {
    "inside": ("inside_nats", "inside_bytes", math.log(2)),
    "outside": ("outside_nats", "outside_bytes", math.log(2)),
    "taught nats": ("taught_nats", "taught_tokens", 1.0),
    "untaught nats": ("untaught_nats", "untaught_tokens", 1.0),
    "taught exact": ("taught_exact", None, 1.0),
    "untaught exact": ("untaught_exact", None, 1.0),
    "taught rank": ("taught_rank", None, 1.0),
    "untaught rank": ("untaught_rank", None, 1.0),
    "rephrased nats": ("rephrased_nats", "rephrased_tokens", 1.0),
    "rephrased exact": ("rephrased_exact", None, 1.0),
}
PAIRS = (
    *(("memory", "lora"), ("memory", "full"), ("memory", "full-seconds"), ("memory", "one-row")),
    *(("both", "memory"), ("both", "lora"), ("both", OFF), (OFF, "lora")),
)


def arms_of(home: Path) -> Arms:
    """Return the runs of each arm by seed. If an arm was run with several rates, only the newest rates count. `both`
    with its memory switched off is one more arm.

    Raises:
        ValueError: runs of one seed that saw other batches, or another text.
    """
    records = read_results(home / "results.jsonl")
    newest = {r["arm"]: (r["lr"], r["table_lr"]) for r in records}
    arms: Arms = {}
    for record in records:
        if (record["lr"], record["table_lr"]) == newest[record["arm"]]:
            arms.setdefault(record["arm"], {})[record["seed"]] = record
    for seed in sorted({r["seed"] for runs in arms.values() for r in runs.values()}):
        here = {runs[seed]["arm"]: runs[seed]["batches"] for runs in arms.values() if seed in runs}
        if len(set(here.values())) > 1:
            raise ValueError(f"the arms of seed {seed} saw other batches: {here}; delete lines and run them again")
    if len({r["text"] for runs in arms.values() for r in runs.values()}) > 1:
        raise ValueError("results.jsonl holds runs on several texts: delete the lines of all but one")
    ordered = {name: arms[name] for name in NAMES if name in arms}
    if "both" in ordered:
        ordered[OFF] = ordered["both"]
    return ordered


def arrays(home: Path, arm: str, record: Record, names: tuple[str, ...]) -> list[np.ndarray]:
    """Return the arrays of one run from documents.npz. Raises FileNotFoundError if it has none."""
    names = tuple(f"off_{name}" for name in names) if arm == OFF else names
    found = read_documents(home, record["key"], names)
    return [found[name].astype(np.float64) for name in names]


def compared(home: Path, arms: Arms, ours: str, theirs: str | None, measure: str) -> Interval | None:
    """Return ours minus theirs, or ours alone, with its interval over seeds and documents (or facts). The reference has
    no seed: it is compared with every seed of the other. None without a common seed. Values that cannot be below 0 (or,
    of shares, above 1) are cut there."""
    losses, sizes, unit = MEASURES[measure]
    a, b = arms.get(ours, {}), arms.get(theirs or ours, {})
    seeds = sorted(set(a) & set(b)) if "reference" not in (ours, theirs) else sorted(a if theirs == "reference" else b)
    if not seeds or not a or not b:
        return None

    def stack(arm: str, runs: dict[int, Record], name: str) -> np.ndarray:
        return np.stack([arrays(home, arm, runs.get(seed, next(iter(runs.values()))), (name,))[0] for seed in seeds])

    mine = stack(ours, a, losses) / unit
    other = np.zeros_like(mine) if theirs is None else stack(theirs, b, losses) / unit
    weights = np.ones(mine.shape[1]) if sizes is None else stack(ours, a, sizes)[0]
    found = paired_interval(mine, other, weights)
    return found if theirs is not None else cut(found, 1.0 if measure.endswith(("exact", "rank")) else math.inf)


def shown(value: Interval | None, form: str) -> str:
    return "" if value is None else f"{value.mean:{form}} ({value.low:{form}} .. {value.high:{form}})"


def reading_table(home: Path, arms: Arms) -> str:
    head = ["arm", "seeds", "in-domain, bits per byte", "minus reference"]
    rows = []
    for arm, runs in arms.items():
        row = [arm, str(len(runs)) if arm != "reference" else ""]
        for side in ("inside", "outside"):
            row.append(shown(compared(home, arms, arm, None, side), ".4f"))
            row.append("" if arm == "reference" else shown(compared(home, arms, arm, "reference", side), "+.4f"))
        rows.append(row)
    return table([*head, "out-of-domain, bits per byte", "minus reference"], rows)


def facts_table(home: Path, arms: Arms) -> str:
    rows = []
    sides = {"taught": "taught", "rephrased": "asked in other words", "untaught": "never taught"}
    kinds = {"nats": ("nats per token", ".3f"), "exact": ("exact", ".1%"), "rank": ("rank", ".1%")}
    asked = [(side, kind) for kind in kinds for side in sides if f"{side} {kind}" in MEASURES]
    for arm in arms:
        cells = [shown(compared(home, arms, arm, None, f"{side} {kind}"), kinds[kind][1]) for side, kind in asked]
        rows.append([arm, *cells])
    return table(["arm", *(f"{sides[side]}: {kinds[kind][0]}" for side, kind in asked)], rows)


def pairs_table(home: Path, arms: Arms) -> str:
    forms = {
        "inside": "+.4f",
        "outside": "+.4f",
        "taught nats": "+.3f",
        "taught exact": "+.1%",
        "rephrased nats": "+.3f",
    }
    rows = []
    for ours, theirs in PAIRS:
        if ours in arms and theirs in arms:
            cells = [shown(compared(home, arms, ours, theirs, measure), form) for measure, form in forms.items()]
            rows.append([f"{ours} minus {theirs}", *cells])
    head = ["in-domain, bits per byte", "out-of-domain, bits per byte", "taught: nats per token", "exact"]
    return table(["", *head, "asked in other words: nats per token"], rows)


def costs_table(arms: Arms) -> str:
    head = ["arm", "lr / table lr", "trained parameters, M", "of them in rows", "LoRA rank", "all parameters, M"]
    head += ["optimizer state, MB", "steps", "tokens", "seconds", "CPU seconds", "tokens per CPU second"]
    rows = []
    for arm, runs in arms.items():
        if arm == OFF:
            continue
        first, values = next(iter(runs.values())), list(runs.values())

        def mean(name: str, values: list[Record] = values) -> float:
            return float(np.mean([record[name] for record in values]))

        row = [arm, "", "0", "", "", f"{mean('total_parameters') / 1e6:.1f}", *[""] * 7]
        if arm != "reference":
            rates = f"{first['lr']:g} / {first['table_lr']:g}" if first["memory"] else f"{first['lr']:g}"
            in_rows = mean("trained_parameters") - mean("dense_trained")
            row = [arm, rates, f"{mean('trained_parameters') / 1e6:.2f}", f"{in_rows / 1e6:.2f}" if in_rows else ""]
            row += [
                " to ".join(map(str, sorted({r["lora_rank"] for r in values if r["lora_rank"]}))),
                f"{mean('total_parameters') / 1e6:.1f}",
            ]
            row += [f"{mean('optimizer_bytes') / 1e6:.1f}", f"{mean('steps'):.0f}", f"{mean('tokens'):,.0f}"]
            row += [f"{mean('seconds'):.0f}", f"{mean('cpu_seconds'):.0f}"]
            row += [f"{mean('tokens') / mean('cpu_seconds'):.0f}"]
            row += [f"{(mean('peak_memory') - mean('loaded_memory')) / 1e6:,.0f}"]
        rows.append(row)
    return table([*head, "peak memory above the loaded model's, MB"], rows)


def tuning_table(records: list[Record]) -> str:
    rows = []
    for arm in dict.fromkeys(r["arm"] for r in records):
        mine = [r for r in records if r["arm"] == arm]
        best = min(mine, key=lambda r: (total(r), r["key"]))
        for r in sorted(mine, key=lambda r: (r["lr"], r["table_lr"])):
            cells = [f"{total(r):.4f}", f"{r['measures']['inside_bpb']:.4f}", f"{r['measures']['taught_nats']:.4f}"]
            table_lr = f"{r['table_lr']:g}" if r["memory"] else ""
            rows.append([arm, f"{r['lr']:g}", table_lr, *([f"**{cells[0]}**"] if r is best else cells[:1]), *cells[1:]])
    head = ["arm", "lr", "table lr", "criterion", "in-domain bits per byte", "taught facts, nats per token"]
    return table(head, rows, words=1)


def total(record: Record) -> float:
    """Return what tuning lowers, on services and taught facts that are not reported: bits per byte of the services
    plus, at BYTES_A_TOKEN, bits per byte of the facts."""
    return record["measures"]["inside_bpb"] + record["measures"]["taught_nats"] / math.log(2) / BYTES_A_TOKEN


def diverged(record: Record) -> bool:
    """Return True if the training loss ended above where it began. Only the training loss is read, nothing that is
    reported."""
    curve = record.get("curve", [])
    return len(curve) > 0 and float(np.mean(curve[-5:])) > float(np.mean(curve[:5]))


def document(home: Path) -> str:
    """Return all tables as Markdown. Raises ValueError without runs."""
    arms = arms_of(home)
    if not arms:
        raise ValueError("results.jsonl has no runs yet: python experiments/scripts/retrofit/run.py run")
    runs = [r for mine in arms.values() for r in mine.values()]
    code = " and ".join(dict.fromkeys(short(r["code"]) for r in runs))
    overlap = runs[0]["overlap_13gram"]
    shared = (
        f"13-grams found in the training text: {overlap['inside']:.4f} of the in-domain documents', "
        f"{overlap['outside']:.4f} of the others'. Threads {runs[0]['threads']}, torch {runs[0]['torch']}, code "
        f"{code}. In parentheses: 95 % intervals over seeds and documents (or facts)."
    )
    broken = [r for r in read_results(home / "results.jsonl") if diverged(r)]
    lost = [f"{r['arm']}, seed {r['seed']}, at lr {r['lr']:g}" for r in broken]
    shared += f" Diverged, and made again with the next best rate: {'; '.join(lost)}." if lost else ""
    tuned = read_results(home / "tune.jsonl")
    parts = [
        "### Reading",
        reading_table(home, arms),
        "### Closed-book facts",
        facts_table(home, arms),
        "### Arm against arm",
        "Same seeds, batches, documents and facts; losses below 0 and shares above 0 speak for the first.",
        pairs_table(home, arms),
        "### What each arm costs",
        costs_table(arms),
        shared,
        "### Learning rates",
        tuning_table(tuned),
        "### How it was made",
        recipe(tuned, BYTES_A_TOKEN),
    ]
    return "\n\n".join(parts)


def write(home: Path) -> None:
    """Write the tables to home/tables.md."""
    write_tables(home, "retrofit", document(home), "python experiments/scripts/retrofit/run.py report")


def draw(home: Path) -> Path:
    """Draw home/figure.png: what each arm gains on either text, and its answers to the facts."""
    arms = arms_of(home)
    names = [name for name in arms if name != "reference"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 2 * (1.1 + 0.27 * len(names))), dpi=160, layout="constrained")
        panels = figure.subplots(2, 2, sharey=True)
        for axes, side in zip(panels[0], ("inside", "outside"), strict=True):
            for place, arm in enumerate(names):
                dot(axes, place, compared(home, arms, arm, "reference", side), COLOURS[0])
            axes.axvline(0, color=SOFT, linewidth=1)
            axes.set_title("in-domain text" if side == "inside" else "out-of-domain text")
            axes.set_xlabel("bits per byte, minus the untouched model's (left is better)")
        said, asked = panels[1]
        for side, colour, shift in (("taught", COLOURS[0], -0.12), ("untaught", COLOURS[1], 0.12)):
            for place, arm in enumerate(names):
                label = {"taught": "taught", "untaught": "never taught"}[side] if place == 0 else None
                dot(said, place + shift, compared(home, arms, arm, None, f"{side} exact"), colour, label=label)
        said.set_title("facts said word for word")
        said.set_xlim(-0.03, 1.03)
        said.set_xlabel("share of facts, closed book (right is better; bars cut at 0 and 1)")
        said.legend(loc="lower right", frameon=True, facecolor="white")
        for place, arm in enumerate(names):
            dot(asked, place, compared(home, arms, arm, "reference", "rephrased nats"), COLOURS[0])
        asked.axvline(0, color=SOFT, linewidth=1)
        asked.set_title("taught facts, asked for in other words")
        asked.set_xlabel("nats per token, minus the untouched model's (left is better)")
        panels[0, 0].set_yticks(range(len(names)), names)
        for axes in panels[:, 0]:
            axes.tick_params(axis="y", labelcolor=INK)
        panels[0, 0].set_ylim(len(names) - 0.4, -0.6)
    return save(figure, home)
