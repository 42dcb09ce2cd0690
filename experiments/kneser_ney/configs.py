"""Counts or a trained table? Kneser-Ney alone, beside plain and beside engram, at equal bytes."""

from __future__ import annotations

from pathlib import Path

from engram.lm.run import Setting
from experiments.lab.cell import SETTINGS, Run, Table, change
from experiments.lab.measures import table
from experiments.lab.report import Row, interval, rows_of, tables_of
from experiments.lab.results import Record, read_results
from experiments.lab.tuning import tuned
from experiments.tokens.configs import TABLES, TUNING, budget

__all__ = ["BASELINE", "SIZE", "TABLES", "configs", "summary"]

BASELINE, SIZE = "plain", "tiny"
FACTORS = (0.125, 0.25, 0.5, 1, 2, 4, 8)  # of the setting's training tokens
ROWS = (256, 1024, 4096, 16384, 65536)  # per head of engram; the counts get the bytes of that table
ALONE, WITH_PLAIN, WITH_ENGRAM = "kneser-ney alone", "plain + kneser-ney", "engram + kneser-ney"
# {name: (arm, base of its counts, arm whose rates it takes, share of the rows)}. engram + kneser-ney is half a table
# and counts of as many bytes, so that the sum of bytes stays the same.
ARMS = {
    "engram": ("engram", None, "engram", 1.0),
    ALONE: ("kneser-ney", "none", "plain", 1.0),
    WITH_PLAIN: ("kneser-ney", "plain", "plain", 1.0),
    WITH_ENGRAM: ("kneser-ney", "engram", "engram", 0.5),
}


def configs(size: str) -> list[Run]:
    """Return the runs against training tokens with the largest table, and against bytes with the tokens of
    the setting."""
    runs = []
    for factor in FACTORS:
        base = budget(SETTINGS[size], factor)
        runs.append(Run("kneser_ney", "plain", change(base, train=tuned("plain", base, TUNING)), size=size))
        for rows in ROWS if factor == 1 else ROWS[-1:]:
            runs += [_cell(base, name, rows, size) for name in ARMS]
    return runs


def _cell(base: Setting, name: str, rows: int, size: str) -> Run:
    arm, counts_beside, rates_of, share = ARMS[name]
    mine = change(base, {"rows_per_head": round(rows * share)}, tuned(rates_of, base, TUNING))
    options = () if counts_beside is None else (("base", counts_beside),)
    return Run("kneser_ney", arm, mine, options, label_of(name, rows), size)


def label_of(name: str, rows: int) -> str:
    return f"{name}, {rows:,} rows"


def parts_of(record: Record) -> tuple[str, int | None]:
    """Return (one of ARMS, rows per head of engram's table of as many bytes) of a result; ("plain", None) for plain."""
    for name, (arm, base, _, share) in ARMS.items():
        if (arm, base) == (record["arm"], record["options"].get("base")):
            return name, round(record["setting"]["memory"]["rows_per_head"] / share)
    return record["arm"], None


def against_engram(home: Path) -> list[tuple[Table, int, str, Row, Row]]:
    """Return (table, rows per head, name, its row with engram of as many bytes as baseline, engram's row) of every cell
    with counts that has a seed in common with engram. Raises what rows_of raises."""
    against = []
    for group, variants in tables_of(read_results(home / "results.jsonl")).items():
        cells = {parts_of(runs[0]): (variant, runs) for variant, runs in variants.items()}
        for (name, rows), (variant, runs) in cells.items():
            if rows is None or name == "engram" or ("engram", rows) not in cells:
                continue
            engram, its_runs = cells["engram", rows]
            base, row = rows_of(home, {engram: its_runs, variant: runs}, engram)
            if row.nats is not None:
                against.append((group, rows, name, row, base))
    return sorted(against, key=lambda cell: (str(cell[0]), cell[1], list(ARMS).index(cell[2])))


def summary(home: Path) -> str:
    """Return a table of counts against engram directly: which is ahead, at how many tokens and bytes."""
    head = (
        "table",
        "arm",
        "rows per head",
        "seeds",
        "MB of its table",
        "MB of engram's",
        "nats minus engram's",
        "ahead",
    )
    lines = []
    for place, rows, name, row, base in against_engram(home):
        assert row.nats is not None
        ahead = "engram" if row.nats.low > 0 else name if row.nats.high < 0 else "cannot tell"
        ahead = ahead if len(row.paired) > 1 else "one seed"
        sizes = [f"{one.mean('bytes', 'table') / 1e6:.2f}" for one in (row, base)]
        lines.append((place, name, f"{rows:,}", f"{len(row.paired)}", *sizes, interval(row.nats), ahead))
    return f"### Against engram, counts of at most as many bytes\n\n{table(head, lines, words=2)}"
