"""Measure what a row codec costs a trained model: train, then evaluate with the rows stored by each codec in turn.

    python experiments/scripts/codecs/run.py

Train the main job's engram model with each seed (checkpoints in runs/, a killed run goes on), measure its validation
loss, convert a copy of the trained rows per codec and measure again. Every result is a line of results.jsonl, and
documents.npz has each model's losses by document; a seed that is in both is skipped. tables.md is written from both.
The script is a runner of its own because one training is evaluated once per codec.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[3]))  # so that the lab is found where this is run as a script

from engram.lm.evaluate import evaluate
from engram.lm.run import Setting, build_model, prepare
from engram.lm.train import train, tune_allocator
from engram.tables import HostTable, encode_table, report
from experiments.lab.cell import change
from experiments.lab.report import write_tables
from experiments.lab.results import append, document_keys, write_documents
from experiments.scripts.codecs.summary import documents_key, summary

HERE = Path(__file__).parent
RESULTS = HERE / "results.jsonl"

# How rows are stored.
CODECS = ["float32", "bfloat16", "fp8", "int8", "int4", "pq4", "pq8"]


def convert(table: HostTable, codec: str) -> HostTable:
    """Return a copy of the table in another codec, or in bfloat16."""
    if codec != "bfloat16":
        return encode_table(table, codec)
    copy = HostTable(table.rows, table.dim, torch.bfloat16)
    copy.write(torch.arange(table.rows), table.gather(torch.arange(table.rows)))
    return copy


def measure(table: HostTable, stored: HostTable) -> dict[str, float]:
    """Return size and error of the converted rows, over the rows that training touched."""
    if stored.dtype == torch.uint8:
        return report(table, stored)  # type: ignore[arg-type]
    ids = table.tensor.any(1).nonzero().flatten()
    error = stored.gather(ids).float() - table.gather(ids)
    return {
        "row_bytes": stored.nbytes // stored.rows,
        "ratio": stored.nbytes / (4 * table.rows * table.dim),
        "rms_error": float(error.double().square().mean().sqrt()),
        "max_error": float(error.abs().max()),
        "rms": float(table.gather(ids).double().square().mean().sqrt()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_100_000, help="training budget")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a model is trained with each")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder for the checkpoints")
    arguments = parser.parse_args()
    tune_allocator()
    for seed in arguments.seeds:
        if documents_key(arguments.tokens, seed) not in document_keys(HERE):
            run(arguments.tokens, seed, arguments.runs / f"codecs-{arguments.tokens}-{seed}")
    text = summary(HERE, arguments.tokens)
    write_tables(HERE, "codecs", text, "python experiments/scripts/codecs/run.py")
    print(text)


def run(tokens: int, seed: int, folder: Path) -> None:
    """Train one model and measure it with every codec. Its lines and documents are written together at the end."""
    setting = change(Setting(), train={"tokens": tokens}).seeded(seed)
    data = prepare(setting)
    model = build_model(setting, "engram", data.token_map)
    assert model.memory is not None
    train(model, data.train, setting.train, folder=folder, checkpoint_every=200, on_step=progress(setting.train.steps))
    originals = model.memory.tables
    lines, documents = [], {}
    for codec in CODECS:
        stored = originals
        if codec != "float32":
            stored = {layer: convert(table, codec) for layer, table in originals.items()}
        model.memory.tables = stored
        scored = evaluate(model, data.validation)
        (facts,) = (measure(originals[layer], stored[layer]) for layer in originals)  # one layer in this setting
        documents |= {codec: scored.document_nats, "tokens": scored.document_tokens}
        line = {
            "codec": codec,
            **{name: facts[name] for name in ("row_bytes", "ratio", "rms_error", "max_error", "rms")},
            "loss": scored.loss,
            "tokens": tokens,
            "seed": seed,
            "corpus": data.digest,
            "validation_tokens": int(scored.document_tokens.sum()),
            "memory": asdict(setting.memory),
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        }
        lines.append(line)
        print(f"{codec:9} loss {scored.loss:.5f}", flush=True)
    for line in lines:
        append(RESULTS, line)
    write_documents(HERE, documents_key(tokens, seed), documents)


def progress(steps: int):
    def on_step(step: int, loss: float) -> None:
        if step % 50 == 0 or step == steps:
            print(f"step {step} of {steps}, loss {loss:.3f}", flush=True)

    return on_step


if __name__ == "__main__":
    main()
