"""Tokenizer compression: token ids that spell the same text share one compressed id.

Only addresses use it; the model still reads and writes raw ids. The size V' of the compressed vocabulary bounds the
hash multipliers, so a map of another tokenizer changes every address without any visible error. A map is therefore
saved with its size and digest, and both are checked when it is loaded.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from functools import cached_property
from typing import Any, overload

import numpy as np
import torch

from .vocabulary import is_blank, spellings

FORMAT = "engram-token-map-1"
_NOT_TEXT = re.compile("[\ufffd\ud800-\udfff]")  # what decoders give for bytes that are not complete UTF-8
_ALIKE = 32  # tokens that may decode to one text: in the real vocabularies that were tried at most 3 do


class TokenMap:
    """Surjection of raw token ids [0, V) onto compressed ids [0, V').

    A map is called with raw ids and returns compressed ids. Make one with `from_tokenizer`, or with `identity` for no
    compression.

    Attributes:
        table: int64 [V], read-only; every value of [0, V') occurs. -1 is a dead id, which only `extend` gives: it is
            never hashed, ends n-grams, and the memory adds nothing at it.
        size: V', the number of compressed ids.
        has_dead: True if there are dead ids.

    Raises:
        ValueError: a table that is not one row of ids or does not use every compressed id.

    Source:
        the paper, section 2.1, and the released demo.

    Example:
        >>> import engram, tokenizers
        >>> vocab = {"Apple": 0, "apple": 1, " apple": 2, "pear": 3}
        >>> tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="pear"))
        >>> token_map = engram.TokenMap.from_tokenizer(tokenizer)
        >>> token_map.table.tolist(), token_map.size
        ([0, 0, 0, 1], 2)
        >>> engram.TokenMap.identity(4).table.tolist()
        [0, 1, 2, 3]
    """

    def __init__(self, table: np.ndarray):
        table = np.array(table, dtype=np.int64, order="C")  # a copy, so that the digest stays valid
        if table.ndim != 1 or table.size == 0:
            raise ValueError(f"a token map must be one row of compressed ids, not an array of shape {table.shape}")
        size = int(table.max()) + 1
        dead = table < 0
        before = table[: int(dead.argmax())] if dead.any() else table  # the map before it was extended
        if table.min() < -1 or not 0 < size <= before.size or np.bincount(before, minlength=size).min() == 0:
            raise ValueError(
                f"not a token map: compressed ids run from {table.min()} to {size - 1} and must use every number "
                f"from 0 up at least once (table of {table.size} entries), before the first dead id (-1)"
            )
        table.setflags(write=False)
        self.table = table
        self.size = size
        self.has_dead = before is not table

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the table as little-endian int64."""
        return hashlib.sha256(self.table.astype("<i8").tobytes()).hexdigest()

    @classmethod
    def identity(cls, vocab_size: int) -> TokenMap:
        """Return the map without compression: compressed id = raw id."""
        return cls(np.arange(vocab_size, dtype=np.int64))

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> TokenMap:
        """Build the map of a tokenizer. One vocabulary has one map, whichever library has loaded it.

        Ids whose single-token text is equal after normalisation (compatibility forms, accents, case, runs of white
        space) share a compressed id. A token that decodes to nothing or to incomplete UTF-8 is identified by its raw
        token string, and an id without a token has a class of its own. Compressed ids are numbered in order of first
        appearance.

        Args:
            tokenizer: a tokenizer of `tokenizers`, Hugging Face (fast, slow, or a processor around one), tiktoken,
                sentencepiece or mistral-common.

        Raises:
            TypeError: not a tokenizer.
            ValueError: an empty vocabulary; a token that cannot be decoded; a decode() that gives many tokens the same
                text, so that they would read each other's rows.
        """
        normalise = _normaliser().normalize_str
        numbers: dict[str | int, int] = {}
        alike: Counter[str] = Counter()
        table = []
        for i, (raw, text) in enumerate(spellings(tokenizer)):
            key: str | int
            if raw is not None and (text or is_blank(raw)) and not _NOT_TEXT.search(text):
                key = normalise(text) or text
                alike[text] += 1
            elif raw and not _NOT_TEXT.search(raw):
                key = raw
                alike[raw] += 1
            else:
                key = i
            table.append(numbers.setdefault(key, len(numbers)))
        if not table:
            raise ValueError("the tokenizer has an empty vocabulary")
        text, count = alike.most_common(1)[0] if alike else ("", 0)
        if count > _ALIKE:
            raise ValueError(
                f"{type(tokenizer).__name__} decodes {count:,} of its {len(table):,} tokens to {text!r}: they would "
                f"read each other's rows. Pass another class of this tokenizer (such as tokenizers.Tokenizer), or "
                f"TokenMap.identity({len(table)}), which merges nothing"
            )
        return cls(np.array(table, dtype=np.int64))

    def extend(self, grown: Any) -> TokenMap:
        """Return this map with the ids that were added to its tokenizer since. No n-gram changes its address.

        The size V' bounds the hash multipliers, so a new class would move every row: a new id joins the class of its
        normalised text in this map, and is dead (-1) if this map has no such class. A dead id ends n-grams, like
        padding, and the memory adds nothing at it.

        Args:
            grown: the tokenizer after tokens were added, or its TokenMap.

        Raises:
            ValueError: `grown` lacks ids of this map, or gives some of them another class: it is not this tokenizer.
        """
        other = grown if isinstance(grown, TokenMap) else TokenMap.from_tokenizer(grown)
        table = np.where(other.table < self.size, other.table, -1)
        changed = np.flatnonzero(table[: len(self.table)] != self.table[: len(table)])
        missing = len(self.table) - len(table)
        if len(changed) or missing > 0:
            first = int(changed[0]) if len(changed) else len(table)
            raise ValueError(
                f"the token map {self.digest[:12]} ({len(self.table):,} ids in {self.size:,} classes) and the other "
                f"one {other.digest[:12]} ({len(other.table):,} ids in {other.size:,} classes) differ in "
                f"{len(changed) + max(0, missing):,} of the {len(self.table):,} ids, first in id {first}"
                f"{'' if len(changed) else ', which the other one lacks'}: another tokenizer or version, every row "
                f"would be wrong. Only ids added at the end keep the rows"
            )
        return self if missing == 0 else TokenMap(table)

    def is_extended_from(self, digest: str) -> bool:
        """Return True if `digest` is that of this map or of a map that this one was extended from."""
        if digest == self.digest:
            return True
        classes, where = np.unique(self.table, return_index=True)
        first = int(where[classes >= 0].max())  # the shortest map has every class
        data, sha = self.table.astype("<i8").tobytes(), hashlib.sha256()
        sha.update(data[: 8 * first])
        for end in range(8 * first + 8, len(data), 8):
            sha.update(data[end - 8 : end])
            if sha.hexdigest() == digest:
                return True
        return False

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, completely or not at all."""
        from safetensors.numpy import save

        from engram.storage.files import write_whole

        metadata = {"format": FORMAT, "size": str(self.size), "digest": self.digest}
        data = save({"table": self.table}, metadata=metadata)
        write_whole(path, data)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TokenMap:
        """Read what `save` wrote. Raise ValueError if the file is incomplete, altered or not a token map."""
        from safetensors import SafetensorError, safe_open

        path = os.fspath(path)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"no token map at {path}: write one with TokenMap.from_tokenizer(...).save(path)")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT or list(file.keys()) != ["table"]:
                    raise ValueError(f"{path} is a safetensors file but not a token map ({FORMAT})")
                table = file.get_tensor("table")
        except SafetensorError as error:
            raise ValueError(
                f"{path} is incomplete or not a token map ({error}); make it again from the tokenizer"
            ) from error
        if table.dtype != np.int64:
            raise ValueError(f"{path}: the token map holds {table.dtype}, not int64")
        digest = hashlib.sha256(table.astype("<i8").tobytes()).hexdigest()
        if digest != metadata.get("digest"):
            raise ValueError(
                f"{path} was altered: its table has digest {digest}, its metadata has {metadata.get('digest')}; "
                "make it again from the tokenizer"
            )
        token_map = cls(table)
        if str(token_map.size) != metadata.get("size"):
            raise ValueError(
                f"{path} was altered: its table has {token_map.size} compressed ids, its metadata has "
                f"{metadata.get('size')}; make it again from the tokenizer"
            )
        return token_map

    @overload
    def __call__(self, ids: np.ndarray) -> np.ndarray: ...
    @overload
    def __call__(self, ids: torch.Tensor) -> torch.Tensor: ...
    def __call__(self, ids: Any) -> Any:
        """Return the compressed ids (int64) of raw integer ids of any shape; torch in, torch out, numpy in, numpy out.

        Negative ids (placeholders, image positions) pass through, dead ids give -1, and an id >= V raises IndexError.
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

    @overload
    def mark_dead(self, ids: np.ndarray) -> np.ndarray: ...
    @overload
    def mark_dead(self, ids: torch.Tensor) -> torch.Tensor: ...
    def mark_dead(self, ids: Any) -> Any:
        """Return the raw ids with -1 instead of dead ones. All others are unchanged, also those outside the map."""
        last = len(self.table) - 1
        if isinstance(ids, torch.Tensor):
            dead = (ids <= last) & (self(ids.clamp(max=last)) == -1)
            return ids.masked_fill(dead, -1)
        return np.where((ids <= last) & (self(np.minimum(ids, last)) == -1), -1, ids)

    def _refuse(self, ids: np.ndarray) -> None:
        index = tuple(int(i) for i in np.argwhere(ids >= len(self.table))[0])
        raise IndexError(
            f"token id {ids[index]} at {list(index)} is outside the token map's vocabulary of {len(self.table)}: "
            "was the text encoded by another tokenizer?"
        )

    def __repr__(self) -> str:
        return f"TokenMap({len(self.table)} -> {self.size}, digest {self.digest[:12]})"

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenMap, (np.array(self.table),)  # rebuilt by __init__, so a copy is read-only and checked again


def _normaliser() -> Any:
    from tokenizers import Regex, normalizers

    blank = "\ue000"  # a private-use character replaces a lone space, which Strip would remove
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
