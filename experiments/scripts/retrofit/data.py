"""The text of the retrofit: excerpts of web services' documentation, with facts taught among them.

Training text and in-domain text are of different services. Facts are lines "TITLE is DESCRIPTION" of Wikipedia
articles. The training text has neither the facts that are never taught nor the articles that are read as other text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

from engram.lm.corpus import Document, load_corpus
from experiments.sensitivity.facts import Fact, load_facts

START = "<|endoftext|>"  # the separator between the documents that the model was pretrained on
EXCERPT = 1000  # characters of a service or an article
LONGEST = 13  # tokens of a fact


@dataclass(frozen=True)
class Size:
    """How much text: services to train on, services and articles to read, facts of each kind, copies of a
    taught fact."""

    services: int
    inside: int
    outside: int
    facts: int
    copies: int = 8


REPORTED = Size(services=48, inside=32, outside=20, facts=32)
TUNING = Size(services=36, inside=12, outside=2, facts=32)
# Where a side begins, in the order of the hash: the services and facts of the report come first.
TUNE_SERVICES, TRAIN_SERVICES, TUNE_FACTS = 48, 60, 128


class Text(NamedTuple):
    """The text of a run.

    Attributes:
        train: documents, the copies of the taught facts among them. inside, outside: held-out documents of services and
            of Wikipedia. taught, untaught: facts that are asked for.
    """

    train: list[Document]
    inside: list[Document]
    outside: list[Document]
    taught: list[Fact]
    untaught: list[Fact]


def load_text(tokenizer: Any, held_out: str = "validation") -> Text:
    """Return the reported text or, with held_out="tune", other services to read and other facts to teach for choosing
    rates.

    Raises:
        FileNotFoundError: a data package is not installed. ValueError: fewer documents or facts than the sizes need.
    """
    services = [Document("botocore", d.name, cut) for d in load_corpus("botocore") if (cut := middle(d.text))]
    articles = [d for d in load_corpus("wiki") if len(d.text) > EXCERPT]
    pool = short(tokenizer, [fact for side in load_facts({d.name for d in load_corpus("wiki")}) for fact in side])
    return choose(services, articles, pool, held_out)


def choose(services: list[Document], articles: list[Document], pool: list[Fact], held_out: str) -> Text:
    """Choose the sides by a hash of the name, so that what is read does not depend on the other documents."""
    services = sorted(services, key=lambda d: xxhash.xxh64_intdigest(d.name.encode()))
    most_services, most_facts = TRAIN_SERVICES + REPORTED.services, TUNE_FACTS + 2 * TUNING.facts
    if len(services) < most_services or len(pool) < most_facts:
        raise ValueError(
            f"{len(services)} services and {len(pool)} facts: the experiment needs {most_services} and {most_facts}. "
            "Install the versions that requirements-data.txt names"
        )
    size, read, asked = (TUNING, TUNE_SERVICES, TUNE_FACTS) if held_out == "tune" else (REPORTED, 0, 0)
    inside, facts = services[read : read + size.inside], pool[asked : asked + 2 * size.facts]
    taught, untaught = facts[: size.facts], facts[size.facts :]
    titles = {fact.title for fact in pool[:most_facts]}
    others = [d for d in articles if d.name not in titles]
    others.sort(key=lambda d: xxhash.xxh64_intdigest(d.name.encode()))
    outside = [Document(d.source, d.name, until_space(d.text)) for d in others[: size.outside]]
    train = services[TRAIN_SERVICES : TRAIN_SERVICES + size.services]
    train += [Document("facts", f"{fact.title} #{copy}", fact.text) for copy in range(size.copies) for fact in taught]
    return Text(train, inside, outside, taught, untaught)


def middle(text: str) -> str:
    """Return an excerpt from the paragraph after the middle on; "" if the text is too short for one."""
    start = text.find("\n\n", len(text) // 2) + 2
    return until_space(text[start:]) if start > 1 and len(text) - start > EXCERPT else ""


def until_space(text: str) -> str:
    """Return the first EXCERPT characters, without the word that they would cut."""
    return text[:EXCERPT].rsplit(maxsplit=1)[0]


def short(tokenizer: Any, facts: Sequence[Fact]) -> list[Fact]:
    """Return facts of at most LONGEST tokens; of those with the same description, the first."""
    kept: dict[str, Fact] = {}
    for fact in facts:
        if fact.answer not in kept and len(encode(tokenizer, fact.text)) <= LONGEST:
            kept[fact.answer] = fact
    return list(kept.values())


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of the text alone, without what a chat model puts around it."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


class Batches(NamedTuple):
    """The training text of one seed, packed: ids, positions int64 [steps, batch, context + 1]. Every document begins
    with START at position 0, which tells model and memory that nothing before it belongs to it."""

    ids: Tensor
    positions: Tensor

    @property
    def digest(self) -> str:
        """XXH3-64 (hex) of the batches: arms of one seed were trained on the same batches if it is equal."""
        return xxhash.xxh3_64_hexdigest(self.ids.numpy().tobytes() + self.positions.numpy().tobytes())


def pack(tokenizer: Any, documents: Sequence[Document], seed: int, batch: int = 2, context: int = 256) -> Batches:
    """Pack every document once, in an order drawn with the seed; tokens that do not fill a last batch are left out.

    Raises:
        ValueError: less text than one batch.
    """
    start = tokenizer.convert_tokens_to_ids(START)
    order = np.random.default_rng(seed).permutation(len(documents))
    pieces = [[start, *encode(tokenizer, documents[i].text)] for i in order]
    ids = np.concatenate([np.array(piece, np.int64) for piece in pieces])
    positions = np.concatenate([np.arange(len(piece)) for piece in pieces])
    steps = (len(ids) - 1) // (batch * context)
    if steps < 1:
        raise ValueError(f"{len(ids)} tokens do not fill a batch of {batch} x {context}: give more text")

    def windows(stream: np.ndarray) -> Tensor:
        rows = np.lib.stride_tricks.sliding_window_view(stream, context + 1)[::context][: steps * batch]
        return torch.from_numpy(rows.copy()).view(steps, batch, context + 1)

    return Batches(windows(ids), windows(positions))
