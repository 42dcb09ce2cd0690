"""Count how often a bounded cache of rows is hit under real text. Write results.jsonl and tables.md.

    python experiments/scripts/hot_rows/run.py

It takes a few minutes on two cores. The script is a runner of its own because nothing is trained: it counts addresses.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[3]))  # so that the lab is found where this is run as a script

from engram import HashLayout, HostTable, NgramHasher, TokenMap
from engram.lm.corpus import DEFAULT_CORPUS, corpus_digest, load_corpus, split
from engram.lm.tokenizer import encode, train_tokenizer
from experiments.lab.report import write_tables
from experiments.lab.results import read_lines
from experiments.scripts.hot_rows.hot_rows import HotRows

HOME = Path(__file__).parent
ROWS_PER_HEAD, HEADS, ORDERS, VOCAB = 646_400, 2, (2, 3), 4096
ROW_BYTES = 256  # bytes per row for the sizes: 64 values of float32, sixteen rows per page
PAGE = 4096
SHARES = (1 / 256, 1 / 64, 1 / 16, 1 / 4)  # of the table's bytes


def stream(tokens: int, seed: int, documents: Any, tokenizer: Any) -> np.ndarray:
    """Return documents in a random order, as a server would see them, int64 [tokens]."""
    order = np.random.default_rng(seed).permutation(len(documents))
    share = min(1.0, 1.3 * tokens / 5_000_000 + 0.02)
    encoded = encode(tokenizer, [documents[i] for i in order[: max(int(share * len(order)), 1)]])
    if len(encoded.ids) < tokens:
        encoded = encode(tokenizer, [documents[i] for i in order])
    return encoded.ids[:tokens].astype(np.int64)


def hit_rate(ids: np.ndarray, keys: int, entry_bytes: int, nbytes: int, chunk: int) -> tuple[float, float]:
    """Return (hit rate over the second half of ids, microseconds per key) of a HotRows of nbytes with entries of the
    real size.

    Values are 4 wide to keep the run small; the number of entries is what fits of the real size.
    """
    entries = nbytes // (entry_bytes + 16)
    cache = HotRows(HostTable(keys, 4), entries * (16 + 16))
    half, out, spent = len(ids) // 2 // chunk * chunk, torch.empty(chunk, 4), 0.0
    for start in range(0, len(ids) // chunk * chunk, chunk):
        if start == half:
            cache.hits = cache.lookups = 0
            spent = time.perf_counter()
        cache.gather(ids[start : start + chunk], out)
    return cache.hit_rate, (time.perf_counter() - spent) / max(cache.lookups, 1) * 1e6


def static_hit_rate(ids: np.ndarray, rows: int, nbytes: int) -> float:
    """Return the hit rate of a set that never changes: the rows read most often in the first half, tried on
    the second."""
    first, second = np.split(ids, [len(ids) // 2])
    counts = np.bincount(first, minlength=rows)
    best = np.argpartition(counts, -(nbytes // ROW_BYTES))[-(nbytes // ROW_BYTES) :]
    inside = np.zeros(rows, bool)
    inside[best[counts[best] > 0]] = True
    return float(inside[second].mean())


def unbounded_hit_rate(ids: np.ndarray) -> float:
    """Return the share of the second half's reads that are of rows read before: no cache can do better."""
    flat = ids.reshape(-1)
    _, first = np.unique(flat, return_index=True)
    return 1 - float((first >= len(flat) // 2).sum()) / (len(flat) - len(flat) // 2)


def measure(tokens: int, seeds: list[int], chunk_tokens: int) -> list[dict[str, Any]]:
    documents = load_corpus(DEFAULT_CORPUS)
    tokenizer = train_tokenizer([d.text for d in split(documents, 0.05, 0.03).train], VOCAB)
    token_map = TokenMap.from_tokenizer(tokenizer)
    pad = int(token_map.table[0])
    layout = HashLayout.build(token_map.size, (1,), ORDERS, HEADS, ROWS_PER_HEAD, pad)
    hasher, rows = NgramHasher(layout, token_map), layout.rows[1]
    results = []
    for seed in seeds:
        text = stream(tokens, seed, documents, tokenizer)
        addressed = hasher(text[None])[1][0]  # [T, C]
        ids = np.ascontiguousarray(addressed).reshape(-1)
        ever = [unbounded_hit_rate(addressed[:, n * HEADS : (n + 1) * HEADS]) for n in range(len(ORDERS))]
        for share in SHARES:
            nbytes, chunk = int(share * rows * ROW_BYTES), chunk_tokens * layout.columns
            pages = ids * ROW_BYTES // PAGE
            rate, micros = hit_rate(ids, rows, ROW_BYTES, nbytes, chunk)
            result = {
                "corpus": corpus_digest(documents)[:12],
                "tokens": len(text),
                "seed": seed,
                "rows": rows,
                "chunk_tokens": chunk_tokens,
                "share": share,
                "hot_rows": rate,
                "static": static_hit_rate(ids, rows, nbytes),
                "pages": hit_rate(pages, rows * ROW_BYTES // PAGE + 1, PAGE, nbytes, chunk)[0],
                "unbounded_bigram": ever[0],
                "unbounded_trigram": ever[1],
                "us_per_row": micros,
            }
            print(json.dumps(result), flush=True)
            results.append(result)
    return results


def tables(results: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""

    def cell(share: float, name: str) -> str:
        values = [r[name] for r in results if r["share"] == share]
        return f"{np.mean(values):.3f} ± {np.ptp(values) / 2:.3f}"

    one = results[0]
    lines = [
        "| cache, share of the table's bytes | cache, MB | HotRows | best fixed set | whole pages of 4 KiB |",
        "|---|---|---|---|---|",
    ]
    for share in SHARES:
        megabytes = share * one["rows"] * ROW_BYTES / 1e6
        cells = " | ".join(cell(share, name) for name in ("hot_rows", "static", "pages"))
        lines.append(f"| 1/{round(1 / share)} | {megabytes:,.1f} | {cells} |")
    ever = [np.mean([r[f"unbounded_{order}"] for r in results]) for order in ("bigram", "trigram")]
    seeds = len({r["seed"] for r in results})
    lines += [
        "",
        f"{seeds} orders of the documents (mean ± half the range), {one['tokens']:,} tokens each, corpus "
        f"{one['corpus']}, {one['rows']:,} rows, {one['chunk_tokens']} tokens per gather. An unbounded cache would hit "
        f"{ever[0]:.3f} of the bigram and {ever[1]:.3f} of the trigram reads. "
        f"HotRows took {np.median([r['us_per_row'] for r in results]):.1f} us per row (rows in memory behind it).",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=600_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=512, help="tokens per gather")
    parser.add_argument("--tables-only", action="store_true", help="write tables.md again from results.jsonl")
    arguments = parser.parse_args()
    file = HOME / "results.jsonl"
    if not arguments.tables_only:
        results = measure(arguments.tokens, list(range(arguments.seeds)), arguments.chunk)
        file.write_text("".join(json.dumps(result) + "\n" for result in results))
    write_tables(HOME, "hot_rows", tables(read_lines(file)), "python experiments/scripts/hot_rows/run.py")


if __name__ == "__main__":
    main()
