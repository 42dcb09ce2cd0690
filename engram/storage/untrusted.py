"""Files and text that others wrote: opened only if they are regular files, parsed within bounds, and printed without
characters that control a terminal. If a file is wrong, a ValueError or an OSError names it.
"""

from __future__ import annotations

import json
import math
import os
import stat
import unicodedata
from collections.abc import Callable
from io import BufferedReader
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

LONGEST_JSON = 64 << 20  # bytes; the manifest of a table of 1 TiB takes 3 MiB
_LONGEST_TOKENIZER = 256 << 20
_JOINERS = "\u200c\u200d"  # parts of Persian words and of emoji


def check_regular(path: str | os.PathLike[str], what: str = "a file") -> int:
    """Return the size of a regular file in bytes. what: the expected file in words, for the error.

    Raises:
        FileNotFoundError: the file does not exist. OSError: it is a folder, pipe, socket or device; reading it could
        block forever.
    """
    return _regular(path, os.stat(path), what)


def open_regular(path: str | os.PathLike[str], what: str = "a file") -> BufferedReader:
    """Open a regular file for reading, without waiting if it is a pipe. Raise as check_regular does."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _regular(path, os.fstat(handle), what)
    except OSError:
        os.close(handle)
        raise
    return open(handle, "rb")


def _regular(path: str | os.PathLike[str], status: os.stat_result, what: str) -> int:
    """Return the size of a file by its status. Raise OSError if it is not a regular file."""
    if not stat.S_ISREG(status.st_mode):
        kind = "folder" if stat.S_ISDIR(status.st_mode) else "pipe, socket or device"
        raise OSError(f"{os.fspath(path)} is a {kind}: expected {what}, as a regular file")
    return status.st_size


def read_json(path: str | os.PathLike[str], what: str, longest: int = LONGEST_JSON) -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        path: the file. what: the file in words, such as "a checkpoint's manifest", for the error.
        longest: the largest accepted size in bytes.

    Raises:
        OSError: the file does not exist, or is not a regular one. ValueError: it is too long, not UTF-8, not JSON, not
        an object or nested too deeply, or it has a number that is not finite.
    """
    with open_regular(path, what) as file:
        content = file.read(longest + 1)
    if len(content) > longest:
        raise ValueError(f"{os.fspath(path)} is longer than {longest:,} bytes: it is not {what}")
    try:
        return parse_json(content)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)} is damaged, or is not {what}: {error}") from error


def parse_json(text: str | bytes) -> dict[str, Any]:
    """Return the object in a JSON text. Raise ValueError for any other text, and for NaN and infinite numbers."""
    try:
        value = json.loads(text, parse_float=_finite, parse_constant=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, not {repr(value)[:80]}")
    return value


def _finite(text: str) -> float:
    """Parse a number. Raise ValueError if it is NaN or infinite."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is not a finite number")
    return value


def read_tensors(path: str | os.PathLike[str], what: str) -> dict[str, Tensor]:
    """Return all tensors of a small safetensors file, on the CPU. Raise OSError and ValueError as read_json does."""
    import safetensors.torch

    check_regular(path, what)
    try:
        return safetensors.torch.load_file(path, device="cpu")
    except (safetensors.SafetensorError, KeyError, RuntimeError) as error:  # KeyError: a dtype that torch lacks
        raise ValueError(f"{os.fspath(path)} is damaged, or is not {what}: {error}") from error


def read_tokenizer(path: str | os.PathLike[str]) -> Any:
    """Return the tokenizers.Tokenizer of a tokenizer.json. Raise OSError and ValueError as read_json does."""
    from tokenizers import Tokenizer

    if check_regular(path, "a tokenizer.json") > _LONGEST_TOKENIZER:
        raise ValueError(f"{os.fspath(path)} is longer than {_LONGEST_TOKENIZER:,} bytes: it is not a tokenizer.json")
    name = os.fspath(path)
    return of_library(lambda: Tokenizer.from_file(name), f"{name} is damaged, or is not a tokenizer.json")


def of_library(call: Callable[[], Any], message: str) -> Any:
    """Call a library that raises bare exceptions, or panics, on bad input; raise ValueError with `message` instead."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, MemoryError, OSError):
        raise
    except BaseException as error:  # a panic of Rust code is not an Exception
        raise ValueError(f"{message}: {error}") from error


def printable(text: str) -> str:
    """Return a text that is safe on a terminal: characters that control it, or reorder nearby text, become "�".

    Ends of lines and tabs stay. Replaced are control characters (ESC begins commands), format characters (among them
    those of writing direction), separators of lines and paragraphs, and halves of surrogate pairs.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" or _harmless(c) else "�" for c in text)


def _harmless(character: str) -> bool:
    """Return True for spaces, joiners, private use and unassigned characters, which str.isprintable excludes."""
    return unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp") or character in _JOINERS
