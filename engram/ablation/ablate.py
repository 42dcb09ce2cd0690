"""The main job: train one small transformer without memory, with a one-row memory and with Engram, from the same seeds
on the same batches, and compare the arms.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engram._version import installed_version
from engram.ablation.ngram_counts import seen_counts, seen_losses
from engram.ablation.statistics import paired_interval
from engram.device import device_of
from engram.lm.evaluate import Evaluation, evaluate
from engram.lm.run import ARMS, Data, Setting, build_model, prepare
from engram.lm.tokenizer import Encoded
from engram.lm.train import Batches, memory_traffic, train
from engram.storage.files import write_whole

DEFAULT_ARMS = ("plain", "one-row", "engram")
Progress = Callable[[str, int, int, int, float], Any]  # arm, seed, step, steps, loss


def ablate(
    setting: Setting | None = None,
    arms: Sequence[str] = DEFAULT_ARMS,
    seeds: Sequence[int] = (0,),
    *,
    held_out: str = "validation",
    device: str = "cpu",
    command: str = "engram.ablate()",
    on_step: Progress | None = None,
    on_evaluate: Callable[[str, int, int, int], Any] | None = None,
    on_data: Callable[[Data], Any] | None = None,
    on_report: Callable[[dict[str, Any]], Any] | None = None,
) -> dict[str, Any]:
    """Train every arm with every seed and compare the arms on the held-out documents.

    Args:
        setting: model, memory, text and budget; the default is the one of the README.
        arms: names out of engram.lm.run.ARMS.
        seeds: each arm runs once per seed.
        held_out: "validation" to report, "tune" to choose learning rates.
        device: device of the dense weights; tables stay in host memory.
        command: the command that makes the report again, written into it.
        on_step: called after each training step with arm, seed, step, steps and loss (nats per token).
        on_evaluate: called during evaluations with arm, seed, tokens scored so far and tokens to score.
        on_data: called once with the prepared corpus.
        on_report: called after each run with the report so far: of the seeds whose arms have all run, or of the first
            seed's arms.

    Returns:
        The report, ready for JSON: see engram.ablation.tables for its keys. Losses are nats per token, "bpb" is bits
        per byte, intervals are 95 %.

    Raises:
        ValueError: unknown or repeated arms, no seeds, a corpus that is empty or shorter than a batch, a device that
            this machine does not have.

    Example:
        >>> import engram, pathlib, tempfile
        >>> from engram.lm.run import Setting
        >>> from engram.lm.train import TrainConfig
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> for i in range(60):
        ...     _ = (folder / f"{i}.txt").write_text(f"document {i}: " + f"one and {i} and " * 20)
        >>> shape = engram.TransformerConfig(300, hidden_size=16, layers=2, heads=2, max_length=32)
        >>> config = engram.EngramConfig(layers=(1,), orders=(2,), heads=1, head_dim=8, rows_per_head=64)
        >>> budget = TrainConfig(tokens=512, batch_size=4, context=32)
        >>> report = engram.ablate(Setting(str(folder), vocab_size=300, model=shape, memory=config, train=budget))
        >>> [arm["arm"] for arm in report["summary"]]
        ['plain', 'one-row', 'engram']
        >>> sorted(report["summary"][2]["difference"])
        ['high', 'low', 'mean']
    """
    setting, torch_device = setting or Setting(), device_of(device)
    _check_names(arms, seeds)
    data = prepare(setting, held_out)
    Batches(data.train, setting.train.context, setting.train.batch_size)  # raises before any work on a text too short
    if len(data.validation.starts) < 3:
        raise ValueError(
            f"{setting.corpus!r} has {len(data.validation.starts) - 1} held-out documents; an interval needs two: give "
            "more documents"
        )
    if on_data is not None:
        on_data(data)
    report = _header(setting, data, held_out, device, command)
    runs: list[dict[str, Any]] = []
    results: dict[tuple[str, int], Evaluation] = {}
    for seed in seeds:
        seeded = setting.seeded(seed)
        counts = seen_counts(data, seeded.train)
        for arm in arms:
            progress = None if on_step is None else _step_reporter(on_step, arm, seed, seeded.train.steps)
            scored = None if on_evaluate is None else partial(on_evaluate, arm, seed)
            run, result = _run(seeded, arm, data, counts, torch_device, progress, scored)
            runs.append(run)
            results[arm, seed] = result
            arms_run, seeds_run = arms[: len(runs)], seeds[: max(1, len(runs) // len(arms))]
            summary = [_summary(name, arms_run, seeds_run, results, data.validation) for name in arms_run]
            date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
            report = report | {"date": date, "runs": runs[: len(seeds_run) * len(arms)], "summary": summary}
            if on_report is not None:
                on_report(report)
    return report


def _check_names(arms: Sequence[str], seeds: Sequence[int]) -> None:
    """Raise ValueError for unknown or repeated arms, and for no or repeated seeds."""
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown or not arms or len(set(arms)) != len(arms):
        raise ValueError(f"arms must be distinct names out of {', '.join(ARMS)}, not {', '.join(arms) or 'none'}")
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds must be distinct and at least one, not {list(seeds)}")


def _header(setting: Setting, data: Data, held_out: str, device: str, command: str) -> dict[str, Any]:
    """Return the part of the report that is known before the first run."""
    return {
        "command": command,
        "version": installed_version(),
        "settings": _flat(asdict(setting)),
        "machine": {
            "cpu": _processor(),
            "device": device,
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "corpus": {
            "name": setting.corpus,
            "digest": data.digest,
            "train_tokens": len(data.train.ids),
            "train_documents": len(data.train.starts) - 1,
            "held_out": held_out,
            "validation_tokens": len(data.validation.ids),
            "validation_documents": len(data.validation.starts) - 1,
            "validation_bytes": int(data.validation.bytes.sum()),
            "overlap_13gram": float(data.overlap),
        },
    }


def _run(
    setting: Setting,
    arm: str,
    data: Data,
    counts: dict[str, np.ndarray],
    device: torch.device,
    on_step: Callable[[int, float], Any] | None,
    on_tokens: Callable[[int, int], Any] | None,
) -> tuple[dict[str, Any], Evaluation]:
    began = time.perf_counter()
    model = build_model(setting, arm, data.token_map).to(device)
    sample = _some_documents(data.validation, 20_000)
    log = train(
        model,
        data.train,
        setting.train,
        evaluate=lambda: evaluate(model, sample, on_tokens=on_tokens).loss,
        evaluate_every=max(1, setting.train.steps // 8),
        on_step=on_step,
    )
    result = evaluate(model, data.validation, on_tokens=on_tokens)
    memory = model.memory
    dense_state = sum(p.nbytes for p in model.parameters()) * 2  # AdamW has two moments
    traffic = memory_traffic(log, memory) if memory else None
    run = {
        "arm": arm,
        "seed": setting.train.seed,
        "parameters": {"dense": model.dense_parameters(), "table": memory.table_parameters() if memory else 0},
        "bytes": {
            "dense": sum(p.nbytes for p in model.parameters()),
            "table": sum(table.nbytes for table in memory.tables.values()) if memory else 0,
            "optimizer": dense_state + (traffic["state_bytes"] if traffic else 0),
        },
        "tokens": log.tokens,
        "seconds": log.seconds,
        "total_seconds": time.perf_counter() - began,
        "tokens_per_second": log.tokens / log.seconds,
        "memory": traffic,
        "train_curve": _thin(log.curve, 200),
        "validation_curve": log.validation,
        "loss": result.loss,
        "bpb": result.bits_per_byte,
        "seen": seen_losses(result, counts),
    }
    if memory is not None:
        memory.close()
    return run, result


def _summary(
    arm: str,
    arms: Sequence[str],
    seeds: Sequence[int],
    results: dict[tuple[str, int], Evaluation],
    held_out: Encoded,
) -> dict[str, Any]:
    of_arm = [results[arm, seed] for seed in seeds]
    summary: dict[str, Any] = {
        "arm": arm,
        "seeds": len(seeds),
        "loss": float(np.mean([r.loss for r in of_arm])),
        "bpb": float(np.mean([r.bits_per_byte for r in of_arm])),
        "difference": None,
        "difference_bpb": None,
    }
    if "plain" in arms and arm != "plain":
        nats = np.stack([r.document_nats for r in of_arm])
        plain_nats = np.stack([results["plain", seed].document_nats for seed in seeds])
        for key, weights, unit in (
            ("difference", of_arm[0].document_tokens, 1.0),
            ("difference_bpb", held_out.bytes, np.log(2)),
        ):
            interval = paired_interval(nats / unit, plain_nats / unit, weights)
            summary[key] = dict(zip(("mean", "low", "high"), map(float, interval), strict=True))
    return summary


def _some_documents(data: Encoded, tokens: int) -> Encoded:
    """Return every n-th document of an encoded text, about `tokens` tokens in all: enough for a curve."""
    every = max(1, len(data.ids) // tokens)
    chosen = range(0, len(data.starts) - 1, every)
    pieces = [slice(data.starts[d], data.starts[d + 1]) for d in chosen]
    lengths = [piece.stop - piece.start for piece in pieces]
    return Encoded(
        np.concatenate([data.ids[piece] for piece in pieces]),
        np.repeat(np.arange(len(pieces), dtype=np.int32), lengths),
        np.concatenate([[0], np.cumsum(lengths)]),
        data.bytes[::every],
    )


def _thin(curve: list[list[float]], points: int) -> list[list[float]]:
    """Return at most `points` means of consecutive steps, so that the report is small and its curve smooth."""
    if not curve:
        return []
    return [
        np.asarray(part).mean(axis=0).tolist() for part in np.array_split(np.asarray(curve), min(points, len(curve)))
    ]


def _step_reporter(on_step: Progress, arm: str, seed: int, steps: int) -> Callable[[int, float], Any]:
    return lambda step, loss: on_step(arm, seed, step, steps, loss)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def write_report(report: dict[str, Any], folder: str | os.PathLike[str]) -> None:
    """Write report.json, curves.png and report.html into a folder, each completely or not at all."""
    from engram.ablation.figure import draw_curves
    from engram.ablation.html_report import write_html

    home = Path(folder)
    home.mkdir(parents=True, exist_ok=True)
    write_whole(home / "report.json", json.dumps(report, indent=1).encode())
    draw_curves(report, home / "curves.png")
    write_html(report, home / "report.html")
