"""What a row codec costs a trained model: train once, then evaluate with the rows stored by each codec in turn.

    python experiments/codecs/run.py

Trains the main job's engram model (checkpoints in runs/, a killed run goes on), measures its validation loss, converts
a copy of the trained rows per codec and measures again. Every result is a line of results.jsonl; what is there already
is not measured again. The table in README.md is written from it.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that the lab is found where this is run as a script

from engram.lm.evaluate import evaluate
from engram.lm.run import Setting, build_model, prepare
from engram.lm.statistics import paired_bootstrap
from engram.lm.train import train
from engram.tables import HostTable, encode_table, report
from experiments.report import write_between_marks
from experiments.runner import append

HERE = Path(__file__).parent
RESULTS, README = HERE / "results.jsonl", HERE / "README.md"

# How rows are stored; float32 first, because the others are compared with it.
configs = ["float32", "bfloat16", "fp8", "int8", "int4", "pq4", "pq8"]


def convert(table: HostTable, codec: str) -> HostTable:
    """A copy of the table in another codec, or in bfloat16."""
    if codec != "bfloat16":
        return encode_table(table, codec)
    copy = HostTable(table.rows, table.dim, torch.bfloat16)
    copy.write(torch.arange(table.rows), table.gather(torch.arange(table.rows)))
    return copy


def measure(table: HostTable, stored: HostTable) -> dict[str, float]:
    """Size and error of the converted rows, over the rows that training touched."""
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


def load_results(tokens: int) -> dict[str, dict[str, Any]]:
    if not RESULTS.exists():
        return {}
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    return {line["codec"]: line for line in lines if line["tokens"] == tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_100_000, help="training budget")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder for the checkpoints")
    arguments = parser.parse_args()
    done = load_results(arguments.tokens)
    if set(configs) - set(done):
        run(arguments.tokens, arguments.runs / f"codecs-{arguments.tokens}", done)
    text = table(arguments.tokens, list(load_results(arguments.tokens).values()))
    write_between_marks(README, text)
    print(text)


def run(tokens: int, folder: Path, done: dict[str, dict[str, Any]]) -> None:
    setting = Setting()
    setting = replace(setting, train=replace(setting.train, tokens=tokens))
    data = prepare(setting)
    model = build_model(setting, "engram", data.token_map)
    assert model.memory is not None
    train(model, data.train, setting.train, folder=folder, checkpoint_every=200, on_step=progress(setting.train.steps))
    originals = model.memory.tables
    base = evaluate(model, data.validation)
    for codec in configs:
        if codec in done:
            continue
        result: dict[str, Any] = {"codec": codec}
        if codec == "float32":
            stored, scored = originals, base
        else:
            stored = {layer: convert(table, codec) for layer, table in originals.items()}
            model.memory.tables = stored
            scored = evaluate(model, data.validation)
            model.memory.tables = originals
        facts = [measure(originals[layer], stored[layer]) for layer in originals]  # one layer in this setting
        difference = paired_bootstrap(scored.document_nats, base.document_nats, base.document_tokens)
        result |= {
            "row_bytes": facts[0]["row_bytes"],
            "ratio": round(facts[0]["ratio"], 6),
            "loss": scored.loss,
            "difference": scored.loss - base.loss,
            "interval": [difference.low, difference.high],
            "rms_error": facts[0]["rms_error"],
            "max_error": facts[0]["max_error"],
            "rms": facts[0]["rms"],
            "tokens": tokens,
            "seed": setting.train.seed,
            "corpus": data.digest,
            "validation_tokens": int(base.document_tokens.sum()),
            "memory": asdict(setting.memory),
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        }
        append(RESULTS, result)
        print(f"{codec:9} loss {scored.loss:.5f}  difference {result['difference']:+.5f}", flush=True)


def progress(steps: int):
    def on_step(step: int, loss: float) -> None:
        if step % 50 == 0 or step == steps:
            print(f"step {step} of {steps}, loss {loss:.3f}", flush=True)

    return on_step


def table(tokens: int, results: list[dict[str, Any]]) -> str:
    """Markdown: one row per codec, as they were measured."""
    lines = [
        "| rows | bytes a row | of float32 | validation loss | difference in nats | 95 % interval | rms error / rms |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        interval = f"{r['interval'][0]:+.5f} .. {r['interval'][1]:+.5f}"
        lines.append(
            f"| {r['codec']} | {r['row_bytes']} | {r['ratio']:.4f} | {r['loss']:.5f} | {r['difference']:+.5f} | "
            f"{interval} | {r['rms_error'] / r['rms']:.5f} |"
        )
    return "\n".join([*lines, "", f"{tokens:,} training tokens."])


if __name__ == "__main__":
    main()
