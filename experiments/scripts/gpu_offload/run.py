"""Time a host table of 42 GiB that feeds a decoder of about 1B parameters on a GPU: throughput with the memory over
without.

    python experiments/scripts/gpu_offload/run.py            # on a machine with a GPU and 48 GiB of free host memory
    python experiments/scripts/gpu_offload/run.py --tiny     # the same code on a CPU in a minute, to see that it runs
    python experiments/scripts/gpu_offload/run.py --tables   # tables.md again, from results.jsonl

Each finished row is appended to results.jsonl; rows that are in it are skipped. Prefill: tokens per second of a prompt
of 512 tokens. Decode: tokens per second of 64 steps after it. The models run in turn; the ratio is the median over
rounds. The script is a runner of its own because it needs a GPU and times inference; no loss is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

# Keys and values that grow by a token each step would otherwise fill the card with blocks too small for the next one.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
import torch

sys.path.insert(0, str(Path(__file__).parents[3]))  # so that the lab is found where this is run as a script

from engram import EngramConfig, EngramMemory, TokenMap, Transformer, TransformerConfig
from engram.lm.transformer import Cache
from engram.tables import kernels
from experiments.lab.measures import table as markdown
from experiments.lab.report import write_tables
from experiments.lab.results import read_lines

HERE = Path(__file__).parent
SCRIPT = "experiments/scripts/gpu_offload/run.py"
VOCAB = 32_768
BATCHES = (1, 32, 256)


def build(tiny: bool, device: torch.device) -> tuple[Transformer, Transformer]:
    """Return the decoder with and without memory, same backbone weights, bfloat16 on a GPU."""
    shape = TransformerConfig(
        VOCAB,
        hidden_size=256 if tiny else 2048,
        layers=4 if tiny else 18,
        heads=4 if tiny else 16,
        max_length=1024,
    )
    memory_config = EngramConfig(
        layers=(1, 2) if tiny else (1, 9),
        orders=(2, 3),
        heads=8,
        head_dim=80,
        rows_per_head=2**12 if tiny else 2**23 + 2**19,  # 2 layers x 16 heads x 8.9M rows x 160 B = 42 GiB
        table_dtype="bfloat16",
    )
    models = []
    for with_memory in (True, False):
        torch.manual_seed(1)
        memory = EngramMemory(memory_config, TokenMap.identity(VOCAB), shape.hidden_size) if with_memory else None
        if memory is not None:
            fill(memory)
        torch.manual_seed(0)
        model = Transformer(shape, memory).eval().to(device)
        models.append(model.to(torch.bfloat16) if device.type == "cuda" else model)
    return models[0], models[1]


def fill(memory: EngramMemory) -> None:
    """Write real values into every row: a table of untouched pages would be read out of the cache."""
    for table in memory.tables.values():
        block = (torch.randn(min(table.rows, 2**20), table.dim) * 0.02).to(table.dtype)
        for start in range(0, table.rows, len(block)):
            piece = table.tensor[start : start + len(block)]
            piece.copy_(block[: len(piece)])


@torch.no_grad()
def run(model: Transformer, ids: torch.Tensor, steps: int) -> tuple[float, float]:
    """Return the seconds of the prefill, and of `steps` greedy decoding steps after it."""
    device, cache = ids.device, Cache()

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    began = now()
    token = model(ids, cache=cache)[:, -1:].argmax(-1)
    middle = now()
    for _ in range(steps):
        token = model(token, cache=cache)[:, -1:].argmax(-1)
    return middle - began, now() - middle


def tables(lines: list[dict[str, Any]]) -> str:
    """Return the results as Markdown: the ratios of each batch, or "not measured"."""
    rows = []
    for batch in BATCHES:
        mine = [line for line in lines if line["batch"] == batch]
        for line in mine or [{}]:
            ratios = (line.get(f"{phase}_ratio") for phase in ("prefill", "decode"))
            rows.append((f"{batch}", *("not measured" if ratio is None else f"{ratio:.3f}" for ratio in ratios)))
    return markdown(("batch", "prefill, with / without", "decode, with / without"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small model, any device, nothing is saved")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tables", action="store_true", help="write tables.md again from results.jsonl")
    arguments = parser.parse_args()
    if not arguments.tables:
        measure(parser, arguments)
    if not arguments.tiny:
        write_tables(HERE, "gpu_offload", tables(read_lines(HERE / "results.jsonl")), f"python {SCRIPT}")


def measure(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Time every batch that results.jsonl lacks on this device, and append a line per batch."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda" and not arguments.tiny:
        parser.error(
            "this machine has no GPU: run it with --tiny to see that it works, or on a machine with a GPU to measure"
        )
    if kernels.native is None and not arguments.tiny:
        parser.error("the compiled kernels are missing: install with a C compiler, or torch's gather is measured")
    with_memory, plain = build(arguments.tiny, device)
    assert with_memory.memory is not None
    gib = sum(table.nbytes for table in with_memory.memory.tables.values()) / 2**30
    where = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu"
    results = HERE / "results.jsonl"
    done = read_lines(results)
    prompt, steps = (64, 8) if arguments.tiny else (512, 64)
    for batch in (1, 2) if arguments.tiny else BATCHES:
        if any((row["batch"], row["device"]) == (batch, where) for row in done):
            continue
        seconds: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        for round_number in range(arguments.rounds + 2):
            ids = torch.randint(0, VOCAB, (batch, prompt), device=device)
            for name, model in ((True, with_memory), (False, plain)):
                spent = run(model, ids, steps)
                if round_number >= 2:
                    seconds[name].append(spent)
        ours, theirs = np.array(seconds[True]), np.array(seconds[False])
        ratio = np.median(theirs / ours, axis=0)
        row = {
            "device": where,
            "batch": batch,
            "table_gib": round(gib, 2),
            "parameters": plain.dense_parameters(),
            "prefill_tokens_per_second": batch * prompt / float(np.median(ours[:, 0])),
            "decode_tokens_per_second": batch * steps / float(np.median(ours[:, 1])),
            "prefill_ratio": float(ratio[0]),
            "decode_ratio": float(ratio[1]),
        }
        print(json.dumps(row))
        if not arguments.tiny:
            with open(results, "a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
