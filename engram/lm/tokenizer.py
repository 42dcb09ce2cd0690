"""Train and cache the library's own byte-level BPE, and pack documents into one stream of ids."""

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
    documents: int32 [tokens], the document number of each token
    starts: int64 [documents + 1], document d is ids[starts[d]:starts[d + 1]]
    bytes: int64 [documents], utf-8 length of the text, for bits per byte (<|endoftext|> counts no bytes)
    """

    ids: np.ndarray
    documents: np.ndarray
    starts: np.ndarray
    bytes: np.ndarray


def train_tokenizer(texts: Sequence[str], vocab_size: int, cache: str | Path | None = None) -> tokenizers.Tokenizer:
    """Return a byte-level BPE with `vocab_size` entries: id 0 is <|endoftext|>, 1..256 the bytes, the rest merges.

    Training is deterministic. Encoding and decoding return any UTF-8 text unchanged, also one that contains the
    characters <|endoftext|>. vocab_size 257 is a plain byte tokenizer. If the text has too few pairs for vocab_size,
    the tokenizer is smaller, with a UserWarning that gives its size: build models with tokenizer.get_vocab_size().

    Args:
        cache: a folder (default $ENGRAM_CACHE, else ~/.cache/engram). If a file there is damaged, the tokenizer is
            trained again; if the folder cannot be written, a UserWarning names it and the tokenizer is returned.

    Raises:
        ValueError: vocab_size below 257.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise ValueError(
            f"vocab_size {vocab_size} is too small: {END_OF_TEXT} and the 256 bytes alone are {SMALLEST_VOCAB} entries"
        )
    file = _cache_file(texts, vocab_size, cache)
    tokenizer = _read(file)
    if tokenizer is None:
        tokenizer = _train(texts, vocab_size, file)
    # Not stored in the file. Without it, a document that contains <|endoftext|> as text would be cut in two.
    tokenizer.encode_special_tokens = True
    size = tokenizer.get_vocab_size()
    if size < vocab_size:
        warnings.warn(f"the text supports a vocabulary of {size} entries, not {vocab_size}; using {size}", stacklevel=2)
    return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, documents: Sequence[Document]) -> Encoded:
    """Return all documents, in order, as one stream. If there are none, or id 0 is not <|endoftext|>, raise."""
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


def token_ids(source: Any) -> torch.Tensor:
    """Return token ids as int64 [batch, time].

    Args:
        source: ids [time] or [batch, time] as lists, NumPy array or tensor of any integer type, or what a tokenizer or
            its chat template returns: a mapping with "input_ids" (BatchEncoding), a tokenizers.Encoding.

    Raises:
        TypeError: no integers. ValueError: sequences of different lengths, or another number of dimensions.
    """
    if isinstance(source, Mapping):
        if "input_ids" not in source:
            raise ValueError(f"expected token ids or a mapping with input_ids, not with {', '.join(map(str, source))}")
        source = source["input_ids"]
    source = getattr(source, "ids", source)  # tokenizers.Encoding
    if not isinstance(source, torch.Tensor):
        try:
            array = np.asarray(source)
        except ValueError as error:  # ragged
            raise ValueError("token ids must be [time] or [batch, time], all sequences of one length") from error
        if array.size and not np.issubdtype(array.dtype, np.integer):
            raise TypeError(f"token ids must be integers, not {array.dtype} ({type(source).__name__})")
        source = torch.from_numpy(array.astype(np.int64))
    if source.is_floating_point() or source.is_complex() or source.dtype == torch.bool:
        raise TypeError(f"token ids must be integers, not {source.dtype}")
    ids = source.to(torch.int64)
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
    """Return the cached tokenizer; None if the file does not exist, or is not byte for byte what was written."""
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
