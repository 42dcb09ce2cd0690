"""plan: what a configuration costs, before any of it is allocated. Sizes come from the classes themselves, which
allocate nothing on torch's meta device.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from engram.config import EngramConfig, as_integer
from engram.fusion import EngramFusion
from engram.memory import build_layout
from engram.storage.untrusted import read_json
from engram.tables import EncodedTable, HostTable, RowAdam, RowRMS, Table
from engram.tables.codecs import NAMES

_FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# (hidden size, residual streams) of the models that the presets belong to; that of the released demo is arbitrary.
SHAPES = {
    "paper-27b": (2560, 4),
    "paper-40b": (2560, 4),
    "deepseek-v4.1-flash": (5120, 4),
    "qwen3.8-flash-next": (2560, 4),
}


@dataclass(frozen=True)
class Storage:
    """Sizes of all tables in one storage format.

    Attributes:
        row_bytes: bytes per row.
        layers: {layer: bytes of its table}.
        total: bytes of all tables.
        token: bytes read per token.
        step: bytes read per step.
    """

    row_bytes: int
    layers: dict[int, int]
    total: int
    token: int
    step: int


@dataclass(frozen=True)
class Collisions:
    """Expected sharing of rows in one order, if the hash is as good as chance.

    m distinct n-grams fall into p rows of a head: a row stays empty with probability (1 - 1/p)^m, and an n-gram has its
    row to itself with probability (1 - 1/p)^(m - 1) (balls into bins: Mitzenmacher & Upfal, Probability and Computing,
    chapter 5; the row counts of the heads are coprime, so heads are taken as independent).

    Attributes:
        order: n-gram length.
        rows: p, the mean over the heads and layers.
        ngrams: m.
        possible: compressed vocabulary to the power of the order, which m never exceeds; None if the vocabulary is not
            known.
        used: share of the rows that some n-gram reads.
        shared: share of the n-grams that share their row in one head.
        shared_in_all: share of the n-grams that share their row in every head, with the same n-gram or others.
    """

    order: int
    rows: float
    ngrams: int
    possible: int | None
    used: float
    shared: float
    shared_in_all: float


@dataclass(frozen=True)
class Plan:
    """Result of `plan`: what a configuration costs.

    Attributes:
        rows: {layer: rows}.
        addressed: {layer: rows that the hash can reach}, fewer if tables are padded.
        row_values: values per row.
        rows_per_token: rows that one token reads, in all layers.
        storage: {format: Storage}, for float32, bfloat16 and every codec that can hold such rows.
        state: {"rms", "adam": bytes of the row optimizer's state}; adagrad has rms's size.
        dense: {layer: parameters of the fusion module}; None without a hidden size. Trained with AdamW, each parameter
            takes 16 bytes: weight, gradient and two moments.
        collisions: one Collisions per order.
        batch, context: sequences of a step, and tokens per sequence.
        machine: bytes of this machine: ram, ram_free, disk_free.
    """

    rows: dict[int, int]
    addressed: dict[int, int]
    row_values: int
    rows_per_token: int
    storage: dict[str, Storage]
    state: dict[str, int]
    dense: dict[int, int] | None
    collisions: list[Collisions]
    batch: int
    context: int
    machine: dict[str, int]

    def fits(self, count: int) -> str:
        """Return the smallest storage on this machine that holds `count` bytes: "RAM", "disk" or "no"."""
        if count <= self.machine["ram_free"]:
            return "RAM"
        return "disk" if count <= self.machine["disk_free"] else "no"

    def to_json(self) -> str:
        """Return all fields as JSON; each storage format also has "fits"."""
        storage = {name: asdict(s) | {"fits": self.fits(s.total)} for name, s in self.storage.items()}
        return json.dumps(asdict(self) | {"storage": storage})


def plan(
    config: EngramConfig,
    hidden_size: int | None = None,
    streams: int = 1,
    vocab: int | None = None,
    ngrams: int | None = None,
    batch: int = 32,
    context: int = 4096,
    folder: str | os.PathLike[str] = ".",
) -> Plan:
    """Compute what a memory costs, from its configuration alone: nothing is allocated, read or written.

    Args:
        config: the configuration.
        hidden_size, streams: of the model; without hidden_size the dense parameters are not known.
        vocab: compressed vocabulary, if the configuration does not fix it. It limits how many n-grams are possible.
        ngrams: distinct n-grams of each order in the text; default: as many as a head has rows.
        batch, context: sequences of a step, and tokens per sequence.
        folder: folder for the tables, whose disk's free space is reported.

    Returns:
        Plan. Sizes are bytes, or numbers of rows and parameters.

    Raises:
        ValueError: a size below 1, or a configuration whose layout cannot be built.

    Example:
        >>> import engram
        >>> plan = engram.plan(engram.EngramConfig.preset("deepseek-v4.1-flash"), hidden_size=5120, streams=4)
        >>> plan.rows
        {1: 384006168, 14: 384016682}
        >>> f"{plan.storage['fp8'].total / 2**30:.2f} GiB of fp8 rows, {plan.rows_per_token} rows per token"
        '188.83 GiB of fp8 rows, 48 rows per token'
    """
    sizes = {"hidden_size": hidden_size, "streams": streams, "vocab": vocab, "ngrams": ngrams}
    for name, value in {**sizes, "batch": batch, "context": context}.items():
        if value is not None and not 1 <= as_integer(name, value) < 2**48:
            raise ValueError(f"{name} must be >= 1 and below 2**48, not {value}")
    if (hidden_size or 1) * streams * config.d_mem >= 2**48:
        raise ValueError(
            f"streams x hidden_size x d_mem = {streams} x {hidden_size:,} x {config.d_mem:,} weights are more than any "
            f"model has: give the sizes of the model"
        )
    vocab = config.compressed_vocab or vocab
    layout = build_layout(config, vocab or 2**20, 0)  # neither argument changes the number of rows
    reads = config.columns * len(config.layers)
    storage: dict[str, Storage] = {}
    with torch.device("meta"):
        for name in (*_FLOATS, *NAMES):
            try:
                tables = {layer: _table(name, layout.rows[layer], config.head_dim) for layer in config.layers}
            except ValueError:  # a codec that cannot hold rows of this width
                continue
            nbytes = {layer: table.nbytes for layer, table in tables.items()}
            row = next(iter(nbytes.values())) // next(iter(layout.rows.values()))
            storage[name] = Storage(row, nbytes, sum(nbytes.values()), reads * row, reads * row * batch * context)
        floats = [_table("float32", layout.rows[layer], config.head_dim) for layer in config.layers]
        state = {"rms": sum(RowRMS(t).nbytes for t in floats), "adam": sum(RowAdam(t).nbytes for t in floats)}
        dense = None
        if hidden_size is not None:
            modules = {layer: EngramFusion(config, hidden_size, streams) for layer in config.layers}
            dense = {layer: sum(p.numel() for p in m.parameters()) for layer, m in modules.items()}
    collisions = []
    for index, order in enumerate(config.orders):
        moduli = [layout.moduli[layer][index] for layer in config.layers]
        collisions.append(expected_collisions(order, moduli, ngrams or config.row_counts[index], vocab))
    return Plan(
        rows=layout.rows,
        addressed={layer: sum(map(sum, layout.moduli[layer])) for layer in config.layers},
        row_values=config.head_dim,
        rows_per_token=reads,
        storage=storage,
        state=state,
        dense=dense,
        collisions=collisions,
        batch=batch,
        context=context,
        machine=_machine(folder),
    )


def expected_collisions(order: int, moduli: list[tuple[int, ...]], ngrams: int, vocab: int | None = None) -> Collisions:
    """Compute the Collisions of one order.

    Args:
        moduli: one tuple per layer, of the rows of each head.
        ngrams: distinct n-grams in the text.
        vocab: compressed vocabulary, None if it is not known.
    """
    possible = None if vocab is None else vocab**order
    m = ngrams if possible is None else min(ngrams, possible)
    empty, shared, in_all = [], [], []
    for heads in moduli:
        # log1p keeps digits that 1 - 1/p would lose. All n-grams share a single row, if there are several.
        empty += [math.exp(m * math.log1p(-1 / p)) if p > 1 else 0.0 for p in heads]
        layer = [-math.expm1((m - 1) * math.log1p(-1 / p)) if p > 1 else float(m > 1) for p in heads]
        shared += layer
        in_all.append(math.prod(layer))
    rows = sum(map(sum, moduli)) / len(shared)
    return Collisions(order, rows, m, possible, 1 - _mean(empty), _mean(shared), _mean(in_all))


def read_shape(name: str) -> tuple[int | None, int]:
    """Return (hidden size, streams) of a preset, or of a config.json or manifest at a path; (None, 1) if not given."""
    if not Path(name).exists():
        return SHAPES.get(name, (None, 1))
    fields = read_json(name, "a config")
    text = fields.get("text_config")
    fields = text if isinstance(text, dict) and text else fields
    streams = next((fields[key] for key in ("streams", "hc_mult", "hc_count") if fields.get(key)), 1)
    hidden_size = fields.get("hidden_size")
    try:
        return None if hidden_size is None else as_integer("hidden_size", hidden_size), as_integer("streams", streams)
    except TypeError as error:
        raise ValueError(f"{name}: {error}") from error


def _table(name: str, rows: int, dim: int) -> Table:
    return HostTable(rows, dim, _FLOATS[name]) if name in _FLOATS else EncodedTable(rows, dim, name)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _machine(folder: str | os.PathLike[str]) -> dict[str, int]:
    """Return the bytes of memory, of free memory, and of free disk of that folder."""
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")
    try:  # unlike the above, MemAvailable counts what the page cache would give back
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        pass
    try:  # a container may get less than the machine has; the page cache of files can be dropped
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        total, free = min(total, limit), min(free, max(0, limit - used + int(stat["inactive_file"])))
    except (OSError, KeyError, ValueError):
        pass
    return {"ram": total, "ram_free": free, "disk_free": shutil.disk_usage(folder).free}
