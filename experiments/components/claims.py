"""Claims about the parts of the memory."""

from pathlib import Path

from experiments.lab.cell import Table
from experiments.lab.claims import OTHERS, PAPER, QWEN, SCEPTICS, V41, Claim, loss
from experiments.lab.results import read_results


def _claim(source: str, words: str, variant: str, rule: str, **how: int) -> Claim:
    """Return a claim about one variant against the unchanged memory; a part without a grid of rates takes the memory's,
    at small all do."""

    def remark(home: Path, table: Table) -> str:
        grids = {record["variant"] for record in read_results(home / "tune.jsonl")}
        return ", engram's rates" if variant not in grids or table.size != "tiny" else ""

    return loss(source, words, variant, "engram", rule, remark=remark, **how)


CLAIMS = [
    _claim(PAPER, "The token map earns its place", "token map: raw ids", "above"),
    _claim(PAPER, "The convolution matters little", "conv: none", "near"),
    _claim(PAPER, "4-grams are slightly worse at equal bytes", "orders: 2, 3, 4", "above"),
    _claim(PAPER, "Two layers are better than one", "two layers, same bytes", "below"),
    _claim(SCEPTICS, "Gate and convolution can both go", "conv: none, gate: none", "no worse", short=17),
    _claim(V41, "The convolution can go", "conv: none", "no worse", short=16),
    _claim(V41, "4-grams are worth their rows", "orders: 2, 3, 4", "no worse"),
    _claim(V41, "Rows train as well with Sinkhorn-balanced momentum", "optimiser: sinkhorn", "no worse"),
    _claim(QWEN, "Raw token ids do as well as the token map", "token map: raw ids", "no worse"),
    _claim(QWEN, "Rows train as well with Adam", "optimiser: adam", "no worse"),
    _claim(OTHERS, "The hash does not matter", "hash: xxh64", "near"),
    _claim(OTHERS, "Rows should start at zero", "init: normal, 0.02", "above"),
    _claim(OTHERS, "Rows should not start at N(0, 1)", "init: normal, 1", "above"),
]
