"""Does each part of the memory earn its place? One part changed at a time, from the memory of the setting."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from experiments.lab.cell import HOME, SETTINGS, Run, change
from experiments.lab.tuning import LRS, TABLE_LRS, rate_grid, tuned

BASELINE, SIZE = "engram", "tiny"
TABLES = ()
TUNING = HOME / "components" / "tune.jsonl"

# Steps of these optimizers are not on one scale, so each has a grid of its own. RMS has no bias correction and begins
# with ten times its rate; the others need rates as much larger.
TABLE_OPTIMIZERS: dict[str, tuple[float, ...]] = {
    "adam": (0.03, 0.1, 0.3),
    "adagrad": (0.1, 0.3, 1.0),
    "sinkhorn": (0.1, 0.3, 1.0),
}


def changes(layers: int) -> dict[str, dict[str, Any]]:
    """Return {label: fields of the memory that change} for a model with this many layers."""
    table = {
        "gate: plain": {"gate": "plain"},
        "gate: none": {"gate": "none"},
        "conv: none": {"conv_kernel": 0},
        "conv: none, gate: none": {"conv_kernel": 0, "gate": "none"},
        # Rows per head change with heads and orders, so that the table keeps its bytes.
        "heads: 1": {"heads": 1, "rows_per_head": 4 * 65536},
        "heads: 2": {"heads": 2, "rows_per_head": 2 * 65536},
        "heads: 8": {"heads": 8, "rows_per_head": 65536 // 2},
        "orders: 2": {"orders": (2,), "rows_per_head": 2 * 65536},
        "orders: 3": {"orders": (3,), "rows_per_head": 2 * 65536},
        "orders: 2, 3, 4": {"orders": (2, 3, 4), "rows_per_head": 2 * 65536 // 3},
        "rows of 8": {"head_dim": 8, "rows_per_head": 4 * 65536},
        "rows of 16": {"head_dim": 16, "rows_per_head": 2 * 65536},
        "rows of 64": {"head_dim": 64, "rows_per_head": 65536 // 2},
        "rows of 128": {"head_dim": 128, "rows_per_head": 65536 // 4},
        "hash: xxh64": {"hash": "xxh64"},
        "init: normal, 0.02": {"table_init": "normal", "table_std": 0.02},
        "init: normal, 1": {"table_init": "normal", "table_std": 1.0},
        "into attention values": {"inject": "values"},
    }
    # Sites: each layer alone; then with the bytes of one table shared out among the sites, and with a whole table each.
    table |= {f"layer {layer}": {"layers": (layer,)} for layer in range(layers) if layer != 1}
    pairs = {"two layers": (0, 1) if layers == 2 else (1, layers - 1)}
    if layers > 2:
        pairs["all layers"] = tuple(range(layers))
    for name, sites in pairs.items():
        table[f"{name}, same bytes"] = {"layers": sites, "rows_per_head": 65536 // len(sites)}
        table[f"{name}, a table each"] = {"layers": sites}
        table[f"{name}, a table each, values"] = {"layers": sites, "inject": "values"}
        table[f"{name}, a table each, no gate, no conv"] = {"layers": sites, "gate": "none", "conv_kernel": 0}
    return table


def cells(size: str) -> list[Run]:
    """Return every change at engram's rates; a row optimizer at the middle of its own grid."""
    setting = SETTINGS[size]
    base = change(setting, train=tuned("engram", setting))

    def cell(label: str, memory: dict[str, Any] | None = None, options: tuple[Any, ...] = (), **train: Any) -> Run:
        return Run("components", "engram", change(base, memory, train), options, label, size)

    runs = [cell(label, memory) for label, memory in changes(base.model.layers).items()]
    runs.append(cell("token map: raw ids", options=(("token_map", "identity"),)))
    for name, rates in TABLE_OPTIMIZERS.items():
        runs.append(cell(f"optimiser: {name}", table_optimizer=name, table_lr=rates[1]))
    return runs


def configs(size: str) -> list[Run]:
    setting = SETTINGS[size]
    unchanged = [
        Run("components", arm, change(setting, train=tuned(arm, setting)), size=size) for arm in ("engram", "plain")
    ]
    runs = []
    for run in cells(size):
        rates = tuned(run.variant, setting, TUNING)
        if size != "tiny":  # the grids are of tiny; at longer training engram's lower lr is better
            rates.pop("lr", None)
        runs.append(replace(run, setting=change(run.setting, train=rates)))
    return unchanged + runs


def tune() -> list[Run]:
    """Return, at tiny, a grid of lr for each change of the module and of table_lr for each row optimizer; the other
    rate is engram's. Rows that go into attention values have a grid of both: the best rates of value embeddings are far
    from engram's."""
    runs = []
    for cell in cells("tiny"):
        own = TABLE_OPTIMIZERS.get(cell.setting.train.table_optimizer)
        into_values = cell.setting.memory.inject == "values"
        runs += rate_grid([cell], TUNING, () if own else LRS, own or (TABLE_LRS if into_values else ()))
    return runs
