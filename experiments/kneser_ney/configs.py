"""Counts or a trained table? Kneser-Ney alone, beside plain and beside engram, at equal bytes."""

from __future__ import annotations

from pathlib import Path

from engram.lm.run import Setting
from experiments.config import SETTINGS, Run, change, read_results, tuned
from experiments.measures import table
from experiments.report import Row, groups_of, interval, rows_of
from experiments.tokens.configs import TUNING, budget, group_of

BASELINE, SETTING = "plain", "T"
FACTORS = (0.125, 0.25, 0.5, 1, 2, 4, 8)  # of the setting's training tokens
ROWS = (256, 1024, 4096, 16384, 65536)  # a head of engram; the counts get the bytes of that table
ALONE, WITH_PLAIN, WITH_ENGRAM = "kneser-ney alone", "plain + kneser-ney", "engram + kneser-ney"
# arm, base of its counts, whose rates, and the share of the rows: engram + kneser-ney is half a table and counts of as
# many bytes, so that the bytes are the same again.
ARMS = {
    "engram": ("engram", None, "engram", 1.0),
    ALONE: ("kneser-ney", "none", "plain", 1.0),
    WITH_PLAIN: ("kneser-ney", "plain", "plain", 1.0),
    WITH_ENGRAM: ("kneser-ney", "engram", "engram", 0.5),
}


def configs(setting_name: str) -> list[Run]:
    """Against training tokens with the largest table; against bytes with the tokens of the setting."""
    runs = []
    for factor in FACTORS:
        base = budget(SETTINGS[setting_name], factor)
        group = group_of(setting_name, base)
        runs.append(Run("kneser_ney", "plain", change(base, train=tuned("plain", base, TUNING)), group=group))
        for rows in ROWS if factor == 1 else ROWS[-1:]:
            runs += [_cell(base, name, rows, group) for name in ARMS]
    return runs


def _cell(base: Setting, name: str, rows: int, group: str) -> Run:
    arm, counts_beside, rates_of, share = ARMS[name]
    mine = change(base, {"rows_per_head": round(rows * share)}, tuned(rates_of, base, TUNING))
    options = () if counts_beside is None else (("base", counts_beside),)
    return Run("kneser_ney", arm, mine, options, label_of(name, rows), group)


def label_of(name: str, rows: int) -> str:
    return f"{name}, {rows:,} rows"


def parts_of(label: str) -> tuple[str, int | None]:
    """(name, rows a head) of a label; no rows for plain."""
    name, _, rows = label.partition(", ")
    return name, int(rows.removesuffix(" rows").replace(",", "")) if rows else None


def against_engram(home: Path) -> list[tuple[str, int, str, Row, Row]]:
    """(group, rows a head, name, its row with engram of as many bytes as baseline, engram's row) of every cell with
    counts that has a seed in common with engram. Raises what rows_of raises."""
    found = []
    for group, labels in groups_of(read_results(home / "results.jsonl")).items():
        for label, runs in labels.items():
            name, rows = parts_of(label)
            if rows is None or name == "engram" or label_of("engram", rows) not in labels:
                continue
            engram = label_of("engram", rows)
            base, row = rows_of(home, {engram: labels[engram], label: runs}, engram)
            if row.nats is not None:
                found.append((group, rows, name, row, base))
    return sorted(found, key=lambda cell: (cell[0], cell[1], list(ARMS).index(cell[2])))


def summary(home: Path) -> str:
    """Counts against engram directly: who is ahead, at how many tokens and bytes."""
    head = ("table", "arm", "rows a head", "seeds", "MB of its table", "MB of engram's", "nats minus engram's", "ahead")
    lines = []
    for group, rows, name, row, base in against_engram(home):
        assert row.nats is not None
        ahead = "engram" if row.nats.low > 0 else name if row.nats.high < 0 else "cannot tell"
        ahead = ahead if len(row.paired) > 1 else "one seed"
        sizes = [f"{one.mean('bytes', 'table') / 1e6:.2f}" for one in (row, base)]
        lines.append((group, name, f"{rows:,}", f"{len(row.paired)}", *sizes, interval(row.nats), ahead))
    return f"### Against engram, counts of at most as many bytes\n\n{table(head, lines, words=2)}"
