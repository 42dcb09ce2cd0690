"""Tables of a question, from results.jsonl: means over seeds, and paired differences with their intervals."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engram.ablation.ngram_counts import ORDERS
from engram.ablation.statistics import Interval, over_seeds, paired_interval
from engram.ablation.tables import BUCKETS, percent
from engram.storage.files import write_whole
from experiments.lab.cell import Table, cell_of
from experiments.lab.results import Record, read_documents, read_results
from experiments.lab.tuning import budget_of


@dataclass(frozen=True)
class Row:
    """One arm of one table: its runs and their comparison with the baseline's of the same seeds.

    Attributes:
        runs: one per seed. paired: the seeds that the baseline has too.
        nats: difference in nats per token; None for the baseline, without common seeds, or if the tokenizers differ.
        bits: difference in bits per byte, which holds for any two tokenizers. Below 0, the arm is better.
        speed: tokens per processor second of training over the baseline's, the median over common seeds.
    """

    variant: str
    runs: tuple[Record, ...]
    paired: tuple[int, ...] = ()
    nats: Interval | None = None
    bits: Interval | None = None
    speed: float | None = None

    def mean(self, *names: str) -> float:
        """Return the mean over the seeds of runs[names[0]][names[1]]..."""
        values = []
        for run in self.runs:
            value: Any = run
            for name in names:
                value = value[name]
            values.append(value)
        return float(np.mean(values))


def tables_of(records: list[Record]) -> dict[Table, dict[str, list[Record]]]:
    """Return {table: {variant: one run per seed}}, tables in the order of the numbers in their captions. Of runs of the
    same variant but another kind (other rates, say) only the newest kind counts, so that no row mixes two kinds. A run
    whose variant was renamed counts under the newest name."""
    latest = {record["key"]: number for number, record in enumerate(records)}
    cells = [(cell_of(r), r) for number, r in enumerate(records) if latest[r["key"]] == number]
    newest: dict[tuple[Table, str], str] = {(cell.table, cell.variant): record["cell"] for cell, record in cells}
    tables: dict[Table, dict[str, dict[int, Record]]] = {}
    for cell, record in cells:
        if record["cell"] == newest[cell.table, cell.variant]:
            tables.setdefault(cell.table, {}).setdefault(cell.variant, {})[record["seed"]] = record
    return {
        table: {variant: [by_seed[seed] for seed in sorted(by_seed)] for variant, by_seed in tables[table].items()}
        for table in sorted(tables, key=lambda table: by_numbers(str(table)))
    }


def rows_of(home: Path, runs: dict[str, list[Record]], baseline: str) -> list[Row]:
    """Return the rows of one table, the baseline first, then by loss per byte.

    Raises:
        FileNotFoundError, ValueError: per-document losses that are missing or belong to other documents.
    """
    base = {run["seed"]: run for run in runs.get(baseline, [])}
    rows = [_row(home, variant, mine, base, variant == baseline) for variant, mine in runs.items()]
    return sorted(rows, key=lambda row: (row.variant != baseline, row.mean("bpb")))


def _row(home: Path, variant: str, runs: list[Record], base: dict[int, Record], is_base: bool) -> Row:
    seeds = tuple(run["seed"] for run in runs if run["seed"] in base)
    if is_base or not seeds:
        return Row(variant, tuple(runs), seeds)
    pairs = [(run, base[run["seed"]]) for run in runs if run["seed"] in base]
    if any(a["corpus"] != b["corpus"] for a, b in pairs):
        raise ValueError(
            f"{home.name}: {variant!r} was trained on another text than its baseline: run one of them again"
        )
    documents = [[documents_of(home, run) for run in side] for side in zip(*pairs, strict=True)]
    ours, theirs = (np.stack([one["nats"] for one in side]) for side in documents)
    sizes, base_sizes = (side[0] for side in documents)
    nats = None
    if np.array_equal(sizes["tokens"], base_sizes["tokens"]):  # the same tokenizer
        nats = paired_interval(ours, theirs, sizes["tokens"])
    bits = paired_interval(ours / math.log(2), theirs / math.log(2), sizes["bytes"])
    speeds = [(a["tokens"] / a["train_cpu_seconds"]) / (b["tokens"] / b["train_cpu_seconds"]) for a, b in pairs]
    return Row(variant, tuple(runs), seeds, nats, bits, float(np.median(speeds)))


def documents_of(home: Path, record: Record) -> dict[str, np.ndarray]:
    """Return {"nats", "tokens", "bytes"} of each held-out document of a run, float64. Raises FileNotFoundError if it
    has no arrays."""
    arrays = read_documents(home, record["key"], ("nats", "tokens", "bytes"))
    return {name: array.astype(np.float64) for name, array in arrays.items()}


def table(rows: list[Row], baseline: str) -> str:
    """Return Markdown. Bytes are of weights, tables and optimizer state together."""
    lines = [
        f"| arm | seeds | dense params, M | table params, M | MB with optimizer | MFLOPs per token | tokens, M "
        f"| lr / rows' | speed of {baseline}'s | loss, nats per token | difference, nats per token "
        "| difference, bits per byte | bits per byte |",
        "|---|" + "---:|" * 12,
    ]
    for row in rows:
        cells = [
            row.variant,
            f"{len(row.runs)}",
            f"{row.mean('parameters', 'dense') / 1e6:.2f}",
            f"{row.mean('parameters', 'table') / 1e6:.2f}",
            f"{size_of(row) / 1e6:,.0f}",
            f"{row.mean('flops_per_token', 'training') / 1e6:.1f}",
            f"{row.mean('tokens') / 1e6:.2f}",
            _rates(row),
            "" if row.speed is None or not row.mean("flops_per_token", "training") else f"{row.speed:.2f}",
            f"{row.mean('loss'):.4f}",
            interval(row.nats),
            interval(row.bits),
            f"{row.mean('bpb'):.4f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def size_of(row: Row) -> float:
    """Return the bytes of weights, tables and optimizer state together, mean over the seeds."""
    return sum(row.mean("bytes", part) for part in ("dense", "table", "optimizer_dense", "optimizer_rows"))


def _rates(row: Row) -> str:
    """Return the rate of the dense weights, and of rows if rows were trained."""
    train = row.runs[0]["setting"]["train"]
    return f"{train['lr']:g}" + (f" / {train['table_lr']:g}" if row.mean("bytes", "optimizer_rows") else "")


def seen_table(rows: list[Row], baseline: str, order: str) -> str:
    """Return Markdown: differences to the baseline in nats per token, by how often training saw the bigram or trigram
    before the token; "" if the runs did not count. Runs of another number of training tokens are left out, because they
    counted other n-grams."""
    base = {
        run["seed"]: run["seen"][order]
        for row in rows
        for run in row.runs
        if row.variant == baseline and run.get("seen")
    }
    if not base:
        return ""
    tokens = {bucket: sum(seen[bucket][0] for seen in base.values()) for bucket in BUCKETS}
    shares = (f"{name}: {percent(tokens[bucket] / sum(tokens.values()))}" for bucket, name in BUCKETS.items())
    lines = [f"| {order} before the token seen | " + " | ".join(shares) + " |", "|---|" + "---:|" * len(BUCKETS)]
    for row in rows:
        pairs = [(run["seen"][order], base[run["seed"]]) for run in row.runs if run.get("seen") and run["seed"] in base]
        same = [pair for pair in pairs if all(pair[0][bucket][0] == pair[1][bucket][0] for bucket in BUCKETS)]
        if same and row.variant != baseline:
            cells = (_spread([a[b][1] - c[b][1] for a, c in same if a[b][0]]) for b in BUCKETS)
            lines.append(f"| {row.variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    """ "-0.123 ± 0.045", a 95 % interval over seeds; the value alone for one seed."""
    if not values:
        return ""
    mean, low, _ = over_seeds(values)
    return f"{mean:+.3f}" + (f" ± {mean - low:.3f}" if math.isfinite(low) else "")


def interval(value: Interval | None) -> str:
    """ "-0.0123 (-0.0150 .. -0.0101)", or nothing."""
    return "" if value is None else f"{value.mean:+.4f} ({value.low:+.4f} .. {value.high:+.4f})"


def shared_fields(rows: list[Row]) -> str:
    """Return what the runs of one table share or vary in, and what single arms add, as sentences."""
    runs = [run for row in rows for run in row.runs]

    def all_of(name: str, form: Any = str) -> str:
        return " and ".join(sorted({form(run[name]) for run in runs}))

    def shape(setting: Record) -> str:
        model, train = setting["model"], setting["train"]
        return (
            f"{model['layers']} layers of {model['hidden_size']}, batches of {train['batch_size']} x {train['context']}"
        )

    lines = [
        f"{all_of('setting', shape)} tokens, vocabulary {all_of('vocabulary', '{:,}'.format)}; "
        f"corpus {all_of('corpus', lambda d: d[:12])}, 13-gram overlap with the training text "
        f"{all_of('overlap_13gram', '{:.4f}'.format)}; code {all_of('code', short)}; torch {all_of('torch')}; "
        f"threads {all_of('threads')}. FLOPs are three times the forward ones. Intervals: 95 %, paired, the "
        "wider of documents and seeds drawn and Student's over seeds; below 0, the arm is better than the baseline."
    ]
    few = [row.variant for row in rows if row.paired and len(row.paired) < max(len(r.paired) for r in rows)]
    if few:
        lines.append(f"Compared on fewer seeds than the others: {'; '.join(few)}.")
    for row in rows:
        extra = {name: value for run in row.runs[:1] for name, value in run["extra"].items()}
        if extra:
            words = ", ".join(f"{name.replace('_', ' ')} {_number(value)}" for name, value in extra.items())
            lines.append(f"- {row.variant} (seed {row.runs[0]['seed']}): {words}")
    return "\n".join(lines)


def short(commit: str) -> str:
    """Return the first digits of a commit, with -dirty if the code differed from it."""
    return commit[:10] + ("-dirty" if commit.endswith("-dirty") else "")


def _number(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_number(part)}" for name, part in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def tuning_table(records: list[Record], reported: Iterable[str] = ()) -> str:
    """Return Markdown: one row per arm and budget with its rates from the best on, and the reported labels without such
    a row. "" without runs."""
    budgets = {budget_of(record) for record in records}
    losses: dict[str, dict[tuple[float, float], float]] = {}
    for record in records:
        train, label = record["setting"]["train"], record["variant"]
        row = f"{label}, {budget_of(record) / 1e6:.2f}M tokens" if len(budgets) > 1 else label
        losses.setdefault(row, {})[train["lr"], train["table_lr"]] = record["loss"]
    if not losses:
        return ""
    lines = [
        "Learning rates, tuned with seed 0 on a slice of the training text (nats per token, at lr / table lr; arms",
        "without rows of their own have no second rate to tune):",
        "",
        "| arm | best | and the others that were tried |",
        "|---|---:|---|",
    ]
    if len(budgets) > 1:
        losses = {row: losses[row] for row in sorted(losses, key=by_numbers)}
    for label, row in losses.items():
        best, *others = (
            f"{row[rates]:.4f} at {rates[0]:g} / {rates[1]:g}" for rates in sorted(row, key=lambda rates: row[rates])
        )
        lines.append(f"| {label} | **{best}** | {'; '.join(others)} |")
    untuned = sorted(set(reported) - {record["variant"] for record in records})
    if untuned:
        lines += ["", f"Without a grid here, at the rates in the tables: {'; '.join(untuned)}."]
    edge = [label for label, row in losses.items() if _at_the_edge(row)]
    if edge:
        lines += ["", f"Best at the edge of its grid, so that a better rate may lie beyond it: {'; '.join(edge)}."]
    return "\n".join(lines)


def _at_the_edge(row: dict[tuple[float, float], float]) -> bool:
    """Return True if the best value of a rate is the smallest or the largest that was tried."""
    best = min(row, key=lambda rates: row[rates])
    for which in (0, 1):
        tried = sorted({rates[which] for rates in row})
        if len(tried) > 1 and best[which] in (tried[0], tried[-1]):
            return True
    return False


def document(home: Path, baseline: str, summary: Callable[[Path], str] | None = None, answers: str = "") -> str:
    """Return all tables of a question as Markdown. summary: a function of home, whose text goes before them. answers:
    the claims with their verdicts, before that."""
    parts = []
    tables = tables_of(read_results(home / "results.jsonl"))
    for group, runs in tables.items():
        rows = rows_of(home, runs, baseline)
        shown = [table(rows, baseline), shared_fields(rows)]
        seen = [text for order in ORDERS if (text := seen_table(rows, baseline, order))]
        if seen:
            shown.append(
                f"Nats per token minus {baseline}'s, by how often training saw the tokens before (± 95 % over seeds):"
            )
        parts.append("\n\n".join([f"### {group}", *shown, *seen]))
    if parts and summary is not None:
        parts.insert(0, summary(home))
    if answers:
        parts.insert(0, answers)
    tuning = tuning_table(read_results(home / "tune.jsonl"), [name for runs in tables.values() for name in runs])
    return "\n\n".join([*(parts or ["No runs yet."]), *([tuning] if tuning else [])])


def by_numbers(caption: str) -> list[tuple[int, str | float]]:
    """Return a key that sorts "4,096" before "16,384"."""
    parts = re.split(r"(\d[\d,]*\.?\d*)", caption)  # every second one is a number
    return [(0, float(part.replace(",", ""))) if number % 2 else (1, part) for number, part in enumerate(parts)]


def write_tables(home: Path, title: str, text: str, command: str = "python -m experiments report") -> None:
    """Write generated tables to home/tables.md, complete or not at all. command: what writes them."""
    source = f"Written by `{command}`. What they say: [README.md](README.md)."
    write_whole(home / "tables.md", f"# {title}: tables\n\n{source}\n\n{text}\n".encode())


def write_between_marks(readme: Path, text: str) -> None:
    """Replace the text between the marks of a README, and nothing else in it.

    Raises:
        ValueError: a README without the marks. FileNotFoundError: no README.
    """
    before, opening, rest = readme.read_text(encoding="utf-8").partition("<!-- table -->\n")
    _, closing, after = rest.partition("<!-- end -->\n")
    if not opening or not closing:
        raise ValueError(f"{readme} needs a line <!-- table --> and below it a line <!-- end -->, to write between")
    write_whole(readme, f"{before}{opening}{text}\n{closing}{after}".encode())
