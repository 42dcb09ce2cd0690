"""Tokenizer compression: many token ids that spell the same text share one compressed id.

Only addresses use it; the model still reads and writes raw ids. The size V' of the compressed vocabulary bounds the
hash multipliers, so a map of another tokenizer re-hashes the whole table without any visible error. A map is therefore
saved with its size and digest, and both are checked on the way in.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from functools import cached_property
from typing import Any, overload

import numpy as np
import torch

FORMAT = "engram-token-map-1"


class TokenMap:
    """Surjection of raw token ids [0, V) onto compressed ids [0, V').

    table: int64 [V], read-only; every value of [0, V') occurs. Source: the paper, section 2.1, and the released demo.
    """

    def __init__(self, table: np.ndarray):
        table = np.array(table, dtype=np.int64, order="C")  # own copy: nobody can change it under the digest
        if table.ndim != 1 or table.size == 0:
            raise ValueError(f"a token map is one row of compressed ids, not an array of shape {table.shape}")
        size = int(table.max()) + 1
        if table.min() < 0 or size > table.size or np.bincount(table, minlength=size).min() == 0:
            raise ValueError(
                f"not a token map: compressed ids run from {table.min()} to {size - 1} and must use every number "
                f"from 0 up at least once (table of {table.size} entries)"
            )
        table.setflags(write=False)
        self.table = table
        self.size = size

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the table as little-endian int64."""
        return hashlib.sha256(self.table.astype("<i8").tobytes()).hexdigest()

    @classmethod
    def identity(cls, vocab_size: int) -> TokenMap:
        """No compression: compressed id = raw id."""
        return cls(np.arange(vocab_size, dtype=np.int64))

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> TokenMap:
        """Builds the map of a `tokenizers.Tokenizer` or of a Hugging Face tokenizer, fast or slow.

        Ids whose single-token text is equal after normalisation (compatibility forms, accents, case, runs of white
        space) share a compressed id; a token that is no whole UTF-8 text is known by its raw token string. Compressed
        ids are numbered in order of first appearance.

        Raises:
            ValueError: an empty vocabulary.
        """
        normalise = _normaliser().normalize_str
        numbers: dict[str, int] = {}
        table = []
        for raw, text in _tokens(tokenizer):
            key = raw if "\ufffd" in text else normalise(text) or text
            table.append(numbers.setdefault(key, len(numbers)))
        if not table:
            raise ValueError("the tokenizer has an empty vocabulary")
        return cls(np.array(table, dtype=np.int64))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file; it appears whole or not at all."""
        from safetensors.numpy import save

        metadata = {"format": FORMAT, "size": str(self.size), "digest": self.digest}
        data = save({"table": self.table}, metadata=metadata)
        temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            if os.path.exists(temporary):
                os.unlink(temporary)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TokenMap:
        """Reads what `save` wrote. ValueError where the file is torn, altered or something else."""
        from safetensors import SafetensorError, safe_open

        path = os.fspath(path)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"no token map at {path}: make it with TokenMap.from_tokenizer(...).save(path)")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT or list(file.keys()) != ["table"]:
                    raise ValueError(f"{path} is a safetensors file but no token map ({FORMAT})")
                table = file.get_tensor("table")
        except SafetensorError as error:
            raise ValueError(f"{path} is torn or no token map ({error}); make it again from the tokenizer") from error
        if table.dtype != np.int64:
            raise ValueError(f"{path}: the token map holds {table.dtype}, not int64")
        found = hashlib.sha256(table.astype("<i8").tobytes()).hexdigest()
        if found != metadata.get("digest"):
            raise ValueError(
                f"{path} was altered: its table has digest {found}, its metadata says {metadata.get('digest')}; "
                "make it again from the tokenizer"
            )
        token_map = cls(table)
        if str(token_map.size) != metadata.get("size"):
            raise ValueError(
                f"{path} was altered: its table has {token_map.size} compressed ids, its metadata says "
                f"{metadata.get('size')}; make it again from the tokenizer"
            )
        return token_map

    @overload
    def __call__(self, ids: np.ndarray) -> np.ndarray: ...
    @overload
    def __call__(self, ids: torch.Tensor) -> torch.Tensor: ...
    def __call__(self, ids: Any) -> Any:
        """Compressed ids (int64) of raw integer ids of any shape; torch in, torch out, numpy in, numpy out.

        Negative ids (placeholders, image positions) pass through; an id >= V is an IndexError.
        """
        if isinstance(ids, torch.Tensor):
            if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
                raise TypeError(f"token ids must be integers, not {ids.dtype}")
            ids = ids.to(torch.int64)
            if ids.numel() and int(ids.max()) >= len(self.table):
                self._refuse(ids.cpu().numpy())
            table = torch.from_numpy(self.table.copy()).to(ids.device)
            return torch.where(ids < 0, ids, table[ids.clamp(min=0)])
        if not isinstance(ids, np.ndarray):
            raise TypeError(f"token ids must be a numpy array or a torch tensor, not {type(ids).__name__}")
        if not np.issubdtype(ids.dtype, np.integer):
            raise TypeError(f"token ids must be integers, not {ids.dtype}")
        if ids.size and int(ids.max()) >= len(self.table):
            self._refuse(ids)
        ids = ids.astype(np.int64)
        return np.where(ids < 0, ids, self.table[np.maximum(ids, 0)])

    def _refuse(self, ids: np.ndarray) -> None:
        place = tuple(int(i) for i in np.argwhere(ids >= len(self.table))[0])
        raise IndexError(
            f"token id {ids[place]} at {list(place)} is outside the token map's vocabulary of {len(self.table)}: "
            "was the text encoded by another tokenizer?"
        )

    def __repr__(self) -> str:
        return f"TokenMap({len(self.table)} -> {self.size}, digest {self.digest[:12]})"

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenMap, (np.array(self.table),)  # rebuilt by __init__, so a copy is read-only and checked again


def _normaliser() -> Any:
    from tokenizers import Regex, normalizers

    blank = "\ue000"  # a private-use stand-in keeps a lone space alive through Strip
    return normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), blank),
            normalizers.Strip(),
            normalizers.Replace(blank, " "),
        ]
    )


def _tokens(tokenizer: Any) -> Iterable[tuple[str, str]]:
    """(raw token string, decoded text) of every id in range(len(tokenizer)), added and special tokens included."""
    from tokenizers import Tokenizer

    tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)  # what a fast Hugging Face tokenizer wraps
    if isinstance(tokenizer, Tokenizer):
        ids = range(tokenizer.get_vocab_size(with_added_tokens=True))
        texts = tokenizer.decode_batch([[i] for i in ids], skip_special_tokens=False)
        return ((tokenizer.id_to_token(i) or "", text) for i, text in zip(ids, texts, strict=True))
    if not (hasattr(tokenizer, "decode") and hasattr(tokenizer, "convert_ids_to_tokens")):
        raise TypeError(
            f"cannot read the vocabulary of {type(tokenizer).__name__}: pass a tokenizers.Tokenizer or a Hugging Face "
            "tokenizer"
        )
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return ((tokenizer.convert_ids_to_tokens(i), tokenizer.decode([i], **options)) for i in range(len(tokenizer)))
