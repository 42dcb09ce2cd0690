"""The library's own byte-level BPE: trained once, cached, and documents packed into one stream of ids."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
import torch
import xxhash

from engram.lm.corpus import END_OF_TEXT, Document
from engram.storage.files import write_whole

END_OF_TEXT_ID = 0
SMALLEST_VOCAB = 257  # the special token and the 256 bytes; at this size the tokenizer is a plain byte tokenizer


class Encoded(NamedTuple):
    """Documents packed into one stream; each begins with <|endoftext|>, which is its first context and the separator.

    ids: int32 [tokens]
    documents: int32 [tokens], the number of the document a token is of
    starts: int64 [documents + 1], document d is ids[starts[d]:starts[d + 1]]
    bytes: int64 [documents], utf-8 length of the text, for bits per byte (<|endoftext|> counts no bytes)
    """

    ids: np.ndarray
    documents: np.ndarray
    starts: np.ndarray
    bytes: np.ndarray


def train_tokenizer(texts: Sequence[str], vocab_size: int, cache: str | Path | None = None) -> tokenizers.Tokenizer:
    """A byte-level BPE with `vocab_size` entries: id 0 is <|endoftext|>, 1..256 the bytes, the rest merges.

    Deterministic; any utf-8 text survives encode and decode unchanged, also one that spells out <|endoftext|>.
    vocab_size 257 is a plain byte tokenizer. Where the text holds fewer pairs than asked for, the tokenizer is smaller
    and a UserWarning states its size: build models with tokenizer.get_vocab_size().
    cache: a folder (default $ENGRAM_CACHE, else ~/.cache/engram). A damaged file there is trained anew; a folder that
    cannot be written costs a UserWarning, not the tokenizer. Raises ValueError if vocab_size < 257.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise ValueError(
            f"vocab_size {vocab_size} is too small: {END_OF_TEXT} and the 256 bytes alone are {SMALLEST_VOCAB} entries"
        )
    file = _cache_file(texts, vocab_size, cache)
    tokenizer = _read(file)
    if tokenizer is None:
        tokenizer = _train(texts, vocab_size, file)
    # Not part of a saved tokenizer: without it a document spelling out <|endoftext|> would be cut in two.
    tokenizer.encode_special_tokens = True
    size = tokenizer.get_vocab_size()
    if size < vocab_size:
        warnings.warn(f"the text supports a vocabulary of {size} entries, not {vocab_size}; using {size}", stacklevel=2)
    return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, documents: Sequence[Document]) -> Encoded:
    """All documents, in order, as one stream. Raises ValueError if there are none or ids do not fit the layout."""
    if not documents:
        raise ValueError("no documents to encode")
    if tokenizer.token_to_id(END_OF_TEXT) != END_OF_TEXT_ID:
        raise ValueError(f"the tokenizer must have {END_OF_TEXT} as id {END_OF_TEXT_ID}; make it with train_tokenizer")
    pieces: list[np.ndarray] = []
    lengths: list[int] = []
    for first in range(0, len(documents), 512):  # in batches: an Encoding takes far more memory than its ids
        batch = [document.text for document in documents[first : first + 512]]
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            pieces.append(np.array([END_OF_TEXT_ID, *encoding.ids], dtype=np.int32))
            lengths.append(len(pieces[-1]))
    return Encoded(
        ids=np.concatenate(pieces),
        documents=np.repeat(np.arange(len(documents), dtype=np.int32), lengths),
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        bytes=np.array([len(document.text.encode()) for document in documents], dtype=np.int64),
    )


def token_ids(given: Any) -> torch.Tensor:
    """Return int64 ids [batch, time] of whatever holds them.

    Args:
        given: ids [time] or [batch, time] as lists, NumPy array or tensor of any integer type, or what a tokenizer or
            its chat template returns: a mapping with "input_ids" (BatchEncoding), a tokenizers.Encoding.

    Raises:
        TypeError: no integers. ValueError: sequences of different lengths, or another number of dimensions.
    """
    if isinstance(given, Mapping):
        if "input_ids" not in given:
            raise ValueError(f"these are not token ids: a mapping of {', '.join(map(str, given))} without input_ids")
        given = given["input_ids"]
    given = getattr(given, "ids", given)  # tokenizers.Encoding
    if not isinstance(given, torch.Tensor):
        try:
            array = np.asarray(given)
        except ValueError as error:  # ragged
            raise ValueError("token ids must be [time] or [batch, time], all sequences of one length") from error
        if array.size and not np.issubdtype(array.dtype, np.integer):
            raise TypeError(f"token ids must be integers, not {array.dtype} ({type(given).__name__})")
        given = torch.from_numpy(array.astype(np.int64))
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise TypeError(f"token ids must be integers, not {given.dtype}")
    ids = given.to(torch.int64)
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2:
        raise ValueError(f"token ids must be [time] or [batch, time], not of shape {list(ids.shape)}")
    return ids


def _cache_file(texts: Sequence[str], vocab_size: int, cache: str | Path | None) -> Path:
    digest = xxhash.xxh3_128(f"{tokenizers.__version__} {vocab_size}".encode())
    for text in texts:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    folder = Path(cache or os.environ.get("ENGRAM_CACHE") or Path.home() / ".cache" / "engram")
    return folder.expanduser() / f"bpe-{vocab_size}-{digest.hexdigest()}.json"


def _read(file: Path) -> tokenizers.Tokenizer | None:
    """The cached tokenizer, or None where there is none or the file is not, byte for byte, what was written."""
    try:
        checksum, _, body = file.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    if checksum != xxhash.xxh3_128_hexdigest(body.encode()):
        return None
    return tokenizers.Tokenizer.from_str(body)


def _train(texts: Sequence[str], vocab_size: int, file: Path) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    body = tokenizer.to_str()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, f"{xxhash.xxh3_128_hexdigest(body.encode())}\n{body}".encode())
    except OSError as error:
        warnings.warn(f"the tokenizer was not cached in {file.parent}: {error}", stacklevel=3)
    return tokenizer
