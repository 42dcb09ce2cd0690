"""knn-lm: plain, mixed at the output with the next tokens of its nearest training contexts (kNN-LM, arXiv 1911.00172).

After training, the input of the last feed-forward layer (the paper's best key) is stored for every training position
that the run has seen, with the token that followed. At a query the k nearest keys vote with weights exp(-distance /
temperature). Temperature and weight are fitted on the start of the tune slice.

index   "exact" compares with every key; "ivf" with those of the `probes` nearest of about sqrt(keys) cells; "ivfpq"
        also stores keys as codes of d / 4 bytes. limit: tokens of the datastore (windows evenly spaced); None: all.
Matched: nothing; `tables` reports the bytes of index and tokens, extra_facts the seconds of a query.
k is that of the source, whose datastores have a hundred times the tokens: fewer neighbours do worse here too.
"""

from __future__ import annotations

import time
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor

from engram.lm.run import Data, Setting
from engram.lm.transformer import Transformer
from experiments.arms.host import plain, vocabulary
from experiments.arms.mixture import Mixture, fit_weight, scored, seen_windows, tune_windows

INDEXES = ("exact", "ivf", "ivfpq")
TUNE_QUERIES = 8_192  # of the tune slice


class Neighbours:
    """A function (ids, documents) -> probabilities [B, T, V], for the hidden states of the model's forward pass just
    before.

    Args:
        keys: float32 [N, d], values: int64 [N], the token after each. vocab: V. index, k, probes: as above.
    """

    def __init__(self, keys: np.ndarray, values: np.ndarray, vocab: int, index: str, k: int, probes: int):
        self.values, self.vocab, self.k, self.temperature = values.astype(np.int32), vocab, min(k, len(keys)), 1.0
        self.index = make_index(keys, index, probes)
        self.queries: Tensor | None = None
        self.seconds, self.asked = 0.0, 0

    @property
    def nbytes(self) -> int:
        return faiss.serialize_index(self.index).nbytes + self.values.nbytes

    def search(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (squared distances float32 [n, k], next tokens int32 [n, k]); an index that returns fewer fills up
        with inf."""
        began = time.perf_counter()
        distance, place = self.index.search(np.ascontiguousarray(queries, np.float32), self.k)
        self.seconds, self.asked = self.seconds + time.perf_counter() - began, self.asked + len(queries)
        return np.where(place < 0, np.inf, distance), self.values[place]

    def votes(self, distance: np.ndarray) -> np.ndarray:
        """Return weights [n, k] of the neighbours, which sum to 1."""
        nearest = np.where(np.isfinite(distance[:, :1]), distance[:, :1], 0)
        vote = np.exp(-(distance - nearest) / self.temperature) + 1e-30 * (np.arange(self.k) == 0)
        return vote / vote.sum(1, keepdims=True)

    def __call__(self, ids: Tensor, documents: Tensor | None = None) -> Tensor:
        assert self.queries is not None
        distance, token = self.search(self.queries.flatten(0, 1).float().cpu().numpy())
        p = torch.zeros(len(token), self.vocab)
        p.scatter_add_(1, torch.from_numpy(token).long(), torch.from_numpy(self.votes(distance)).float())
        return p.view(*ids.shape, self.vocab)


def make_index(keys: np.ndarray, index: str, probes: int) -> Any:
    """Return a trained faiss index of squared distances that holds `keys`.

    Raises:
        ValueError: an unknown index.
    """
    n, d = keys.shape
    cells = max(1, min(int(n**0.5), n // 39))  # faiss needs 39 points per cell to train it
    if index == "exact":
        made = faiss.IndexFlatL2(d)
    elif index == "ivf":
        made = faiss.IndexIVFFlat(faiss.IndexFlatL2(d), d, cells)
    elif index == "ivfpq":
        made = faiss.IndexIVFPQ(faiss.IndexFlatL2(d), d, cells, d // 4 if d % 4 == 0 else d // 2, 8)
    else:
        raise ValueError(f"index is one of {', '.join(INDEXES)}, not {index!r}")
    if index != "exact":
        made.nprobe = probes
    made.train(keys)
    made.add(keys)
    return made


def collect(model: Transformer, windows: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (keys float32 [N, d], next tokens int64 [N], the model's probability of them [N]) of all positions of
    windows."""
    inputs: list[Tensor] = []
    hook = model.blocks[-1].ffn.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    keys, tokens, probabilities = [], [], []
    for _, _, targets, p, inside in scored(model, windows):
        keys.append(inputs.pop()[inside].float().cpu().numpy())
        tokens.append(targets.cpu().numpy())
        probabilities.append(p.cpu().numpy().astype(np.float64))
    hook.remove()
    return np.concatenate(keys), np.concatenate(tokens), np.concatenate(probabilities)


def finish(
    model: Transformer,
    setting: Setting,
    data: Data,
    *,
    index: str = "ivf",
    k: int = 1024,
    probes: int = 16,
    limit: int | None = None,
) -> Mixture:
    if index not in INDEXES:
        raise ValueError(f"index is one of {', '.join(INDEXES)}, not {index!r}")
    windows = seen_windows(setting, data)
    if limit is not None:
        most = max(1, min(len(windows[0]), limit // setting.train.context))
        chosen = np.linspace(0, len(windows[0]) - 1, most).astype(int)
        windows = windows[0][chosen], windows[1][chosen]
    keys, tokens, _ = collect(model, windows)
    near = Neighbours(keys, tokens, vocabulary(data), index, k, probes)
    queries, targets, p_lm = (part[:TUNE_QUERIES] for part in collect(model, tune_windows(setting, data)))
    distance, token = near.search(queries)
    scale = float(np.mean(distance[np.isfinite(distance)]))  # temperatures are tried around the typical distance
    best = (-np.inf, 1.0, 0.0)
    for temperature in (scale * 2.0**power for power in range(-8, 3)):
        near.temperature = temperature
        p_near = (near.votes(distance) * (token == targets[:, None])).sum(1)
        weight = fit_weight(p_lm, p_near)
        with np.errstate(divide="ignore"):
            best = max(best, (float(np.log((1 - weight) * p_lm + weight * p_near).mean()), temperature, weight))
    near.temperature, weight = best[1], best[2]

    def keep(_: Any, given: tuple[Tensor, ...]) -> None:
        near.queries = given[0].detach()

    model.blocks[-1].ffn.register_forward_pre_hook(keep)
    facts = {
        "index": index,
        "k": near.k,
        "keys": len(keys),
        "index_bytes": near.nbytes,
        "temperature": near.temperature,
        "query_seconds": near.seconds / max(1, near.asked),
        "tune_loss_lm": float(-np.log(p_lm).mean()),
        "tune_loss": -best[0],
    }
    return Mixture(model, near, weight, {"parameters": keys.size, "bytes": facts["index_bytes"]}, facts)


ARMS = {"knn-lm": plain}
FINISH = {"knn-lm": finish}
