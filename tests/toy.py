"""A text that small models learn in a few steps."""

from __future__ import annotations

import numpy as np

from engram.lm.tokenizer import Encoded

VOCAB = 64


def corpus(documents: int = 60, length: int = 40, seed: int = 0) -> Encoded:
    """Make documents in which a token pair mostly decides the next token, which a bigram memory can learn."""
    rng = np.random.default_rng(seed)
    rule = np.random.default_rng(99).integers(1, VOCAB, (VOCAB, VOCAB))
    texts = []
    for _ in range(documents):
        ids = [0, int(rng.integers(1, VOCAB))]
        while len(ids) < length:
            ids.append(int(rule[ids[-2], ids[-1]]) if rng.random() < 0.9 else int(rng.integers(1, VOCAB)))
        texts.append(np.array(ids, dtype=np.int32))
    starts = np.concatenate([[0], np.cumsum([len(t) for t in texts])])
    numbers = np.repeat(np.arange(documents, dtype=np.int32), length)
    return Encoded(np.concatenate(texts), numbers, starts, np.full(documents, 3 * length))
