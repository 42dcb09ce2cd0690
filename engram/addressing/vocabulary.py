"""The text of every id of a tokenizer, the same for one vocabulary whichever library has loaded it.

decode() of a single id is not enough: for a part of a character it gives U+FFFD, nothing, or (byte fallback without its
decoder) the token's name, and some libraries lose the token's own string too. If a tokenizer has bytes or SentencePiece
pieces, they are read instead and turned into what the `tokenizers` library gives for the same vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

_UNNAMED = 2**20  # with more ids without a token, a tokenizer is damaged rather than padded
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # byte fallback, as SentencePiece writes it
_BLANK = "\u2581"  # SentencePiece's visible space
_SPACES = re.compile(f"[ {_BLANK}\u0120]*|<0x20>")  # token strings that spell spaces, which decode() may strip

# The letters that byte-level BPE writes for bytes: the printable ones of Latin-1, and 256 and on for the others.
_OTHERS = [b for b in range(256) if not (33 <= b < 127 or 161 <= b < 173 or 174 <= b)]
_LETTERS = {b: 256 + i for i, b in enumerate(_OTHERS)}
_BYTES = {ord(chr(b).translate(_LETTERS)): b for b in range(256)}

Spelling = tuple[str | None, str]
"""(token string, text) of an id; the string is None at an id that has no token."""


def spellings(tokenizer: Any) -> list[Spelling]:
    """Return (token string, text) of every id from 0 to the highest, added and special tokens included.

    Args:
        tokenizer: tokenizers.Tokenizer, a Hugging Face tokenizer (fast or slow) or processor, tiktoken.Encoding,
            sentencepiece.SentencePieceProcessor, or a tokenizer of mistral-common.

    Raises:
        TypeError: an object of another kind. ValueError: a token that cannot be decoded, or implausibly high ids.
    """
    from tokenizers import Tokenizer

    tokenizer = _innermost(tokenizer)
    if isinstance(tokenizer, Tokenizer):
        return _of_tokenizers(tokenizer)
    if hasattr(tokenizer, "decode_single_token_bytes"):  # tiktoken
        return _of_tiktoken(tokenizer)
    if hasattr(tokenizer, "id_to_byte_piece"):  # mistral-common's Tekkenizer
        return _of_tekken(tokenizer)
    if hasattr(tokenizer, "id_to_piece"):  # sentencepiece, and mistral-common's wrapper of it
        size = tokenizer.n_words if hasattr(tokenizer, "n_words") else tokenizer.get_piece_size()
        return _of_pieces([tokenizer.id_to_piece(i) for i in range(size)], _adds_a_space(tokenizer))
    if not (hasattr(tokenizer, "decode") and hasattr(tokenizer, "convert_ids_to_tokens")):
        raise TypeError(
            f"cannot read the vocabulary of {type(tokenizer).__name__}: pass a tokenizers.Tokenizer, a Hugging Face "
            "tokenizer, a tiktoken.Encoding, a SentencePieceProcessor or a tokenizer of mistral-common"
        )
    return _of_slow(tokenizer)


def is_blank(raw: str) -> bool:
    """Return True if a token string spells only spaces or nothing, so that an empty text loses nothing of it."""
    return _SPACES.fullmatch(raw) is not None


def _innermost(tokenizer: Any) -> Any:
    """Return the object that holds the vocabulary, out of its wrappers."""
    for _ in range(4):
        inner = getattr(tokenizer, "backend_tokenizer", None)  # a fast Hugging Face tokenizer
        if inner is None and hasattr(tokenizer, "instruct_tokenizer"):  # mistral_common.MistralTokenizer
            inner = tokenizer.instruct_tokenizer
        if inner is None and hasattr(getattr(tokenizer, "tokenizer", None), "instruct_tokenizer"):  # of transformers
            inner = tokenizer.tokenizer
        if inner is None and not hasattr(tokenizer, "convert_ids_to_tokens"):  # a processor; tokenizers' own wrappers
            inner = next(
                (i for n in ("tokenizer", "_tokenizer") if (i := getattr(tokenizer, n, None)) is not None), None
            )
        if inner is None or inner is tokenizer:
            return tokenizer
        tokenizer = inner
    return tokenizer


def _size(kind: str, count: int, highest: int) -> int:
    """Return the number of ids, from the number of tokens and the highest id."""
    size = max(count, highest + 1)
    if size - count > _UNNAMED:
        raise ValueError(
            f"this {kind} names {count:,} tokens and its highest id is {highest:,}: {size - count:,} ids without a "
            "token are not plausible. Is tokenizer.json damaged, or an added token's id wrong?"
        )
    return size


def _of_tokenizers(tokenizer: Any) -> list[Spelling]:
    named = sorted(set(tokenizer.get_vocab(with_added_tokens=True).values()))
    count = tokenizer.get_vocab_size(with_added_tokens=True)
    result: list[Spelling] = [(None, "")] * _size("tokenizer", count, named[-1] if named else -1)
    texts = tokenizer.decode_batch([[i] for i in named], skip_special_tokens=False)
    for i, text in zip(named, texts, strict=True):
        result[i] = (tokenizer.id_to_token(i), text)
    return result


def _of_tiktoken(encoding: Any) -> list[Spelling]:
    result: list[Spelling] = []
    for i in range(encoding.n_vocab):
        try:
            data = encoding.decode_single_token_bytes(i)
        except KeyError:  # between the ranks and the special tokens
            result.append((None, ""))
            continue
        result.append((data.decode(), data.decode()) if encoding.is_special_token(i) else _of_bytes(data))
    return result


def _of_tekken(tokenizer: Any) -> list[Spelling]:
    result: list[Spelling] = []
    for i in range(tokenizer.n_words):
        if tokenizer.is_special(i):
            result.append((tokenizer.id_to_piece(i), tokenizer.id_to_piece(i)))
        else:
            result.append(_of_bytes(tokenizer.id_to_byte_piece(i)))
    return result


def _of_bytes(data: bytes) -> Spelling:
    return data.decode("latin-1").translate(_LETTERS), data.decode("utf-8", "replace")


def _adds_a_space(model: Any) -> bool:
    """Return True if a SentencePiece model puts a space before a text. Its decoder removes one from the first piece."""
    try:
        first = model.encode("a", False, False)[0]  # mistral-common: no begin and end of sequence
    except TypeError:
        first = model.encode("a")[0]
    return (first if isinstance(first, str) else model.id_to_piece(int(first))).startswith(_BLANK)


def _of_pieces(pieces: list[str | None], adds_a_space: bool) -> list[Spelling]:
    named = _with_bytes([(piece, piece or "") for piece in pieces])
    texts = [text.replace(_BLANK, " ") for _, text in named]
    stripped = (text[1:] if adds_a_space and text.startswith(" ") else text for text in texts)
    return list(zip(pieces, stripped, strict=True))


def _with_bytes(named: list[Spelling]) -> list[Spelling]:
    """Decode byte-fallback tokens that a library gives as their names, if the vocabulary has one for each byte."""
    names = {raw for raw, text in named if raw is not None and raw == text and _BYTE.fullmatch(raw)}
    if len(names) != 256:
        return named
    return [
        (raw, bytes([int(raw[3:5], 16)]).decode("utf-8", "replace")) if raw in names else (raw, text)
        for raw, text in named
    ]


def _of_slow(tokenizer: Any) -> list[Spelling]:
    """Read a slow Hugging Face tokenizer, or a similar class from a model's own code."""
    vocab = set(tokenizer.get_vocab().values()) if hasattr(tokenizer, "get_vocab") else set()
    size = _size(type(tokenizer).__name__, len(tokenizer), max(vocab, default=-1))
    unknown = getattr(tokenizer, "unk_token", None)
    sentencepiece = getattr(tokenizer, "sp_model", None)
    read: Callable[[int], str] = _decoder(tokenizer) if sentencepiece is None else lambda i: ""
    result: list[Spelling] = []
    for i in range(size):
        try:
            raw = tokenizer.convert_ids_to_tokens(i)
            text = read(i)
        except Exception as error:  # tokenizer classes raise errors of many kinds at an id without a token
            if i in vocab or (not vocab and i < len(tokenizer)):
                raise ValueError(
                    f"{type(tokenizer).__name__} cannot decode its token {i} ({type(error).__name__}: {error}): pass "
                    "its fast version, or repair the tokenizer"
                ) from error
            raw, text = None, ""
        if vocab and i not in vocab and raw == unknown:
            raw, text = None, ""
        if isinstance(raw, bytes):  # Qwen's first tokenizer
            raw, text = _of_bytes(raw)
        elif raw is not None and _lost_bytes(raw, text):
            text = "\ufffd"
        result.append((raw, text))
    if sentencepiece is None:
        return _with_bytes(result)
    adds_a_space = getattr(tokenizer, "legacy", True) is False or _adds_a_space(sentencepiece)
    return _of_pieces([raw for raw, _ in result], adds_a_space)


def _lost_bytes(raw: str, text: str) -> bool:
    """Return True if a byte-level token is not complete UTF-8 and its text is what decode(errors="ignore") leaves."""
    if not all(ord(letter) in _BYTES for letter in raw):
        return False
    data = bytes(_BYTES[ord(letter)] for letter in raw)
    return "\ufffd" in data.decode("utf-8", "replace") and data.decode("utf-8", "ignore") == text


def _decoder(tokenizer: Any) -> Callable[[int], str]:
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return lambda i: tokenizer.decode([i], **options)
