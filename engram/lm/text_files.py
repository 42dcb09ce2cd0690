"""Documents from files as people have them: plain text, JSON lines, JSON and Parquet, also gzipped, in nested folders.

Each file is read, refused by an error that names it, or counted in Reading.summary.
"""

from __future__ import annotations

import gzip
import json
import os
import stat
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

KINDS = ".txt, .md, .jsonl, .ndjson, .json or .parquet, the first five also as .gz"
_BOM = b"\xef\xbb\xbf"
_Identity = tuple[int, int]  # device and inode


class Text(NamedTuple):
    """One document of a file. name: the file's, with #<number> if the file holds several documents."""

    name: str
    text: str


@dataclass
class Reading:
    """Counts of what was read and skipped. skipped: {reason: count}. fields: of the first record without text."""

    files: int = 0
    documents: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    fields: str = ""

    def summary(self) -> str:
        """Return one line, without the part after the semicolon if nothing was skipped."""
        read = f"{self.documents:,} documents read from {self.files:,} files"
        left = ", ".join(f"{count:,} {reason}" for reason, count in self.skipped.most_common(8))
        rest = sum(count for _, count in self.skipped.most_common()[8:])
        return read + (f"; skipped: {left}{f' and {rest:,} others' if rest else ''}{self.fields}" if left else "")


def read_texts(path: str | os.PathLike[str], end_of_text: str, reading: Reading) -> Iterator[Text]:
    """Yield the documents of a file, or of all files of a known kind under a folder, sorted by name.

    A text file (.txt, .md; any name if `path` is the file) is one document, or several between end_of_text marks. Each
    line of a .jsonl or .ndjson file, each element of the list in a .json file and each row of a .parquet file is one:
    a string, or an object with a string "text". Links are followed; a file or folder that is reached twice is read
    once. Hidden files are read like others.

    Args:
        reading: counts what was read and what was skipped.

    Raises:
        OSError: a file that cannot be read. ValueError: a file that is not UTF-8, is incomplete, or is not of the kind
        of its suffix; a .parquet file without pyarrow. The message names the file.
    """
    root = Path(path)
    inside = root.is_dir()
    for file in _files(root, reading.skipped) if inside else [root]:
        name = file.relative_to(root).as_posix() if inside else file.name
        name = os.fsencode(name).decode("utf-8", "backslashreplace")
        kind, zipped = _kind(file)
        if kind is None and inside:
            reading.skipped[f"{file.suffix} files" if file.suffix else "files without suffix"] += 1
            continue
        count = 0
        for number, text in _texts(file, kind, zipped, end_of_text, reading, inside):
            count += bool(text.strip())
            yield Text(name if number is None else f"{name}#{number}", text)
        reading.files += count > 0
        reading.documents += count


def _kind(file: Path) -> tuple[str | None, bool]:
    """Return ("text", "lines", "json", "parquet" or None, is it gzipped), by the file's name."""
    name = file.name.lower()
    zipped = name.endswith(".gz")
    kinds = {".txt": "text", ".md": "text", ".jsonl": "lines", ".ndjson": "lines", ".json": "json"}
    if not zipped:
        kinds[".parquet"] = "parquet"
    return kinds.get(Path(name.removesuffix(".gz")).suffix), zipped


def _files(root: Path, skipped: Counter[str]) -> list[Path]:
    """Return the regular files under a folder, sorted by name, each once. Linked folders are walked after the others,
    so that a folder that is reached both ways keeps its own name. A link to a folder above the root is not followed."""
    above = {_identity(os.stat(folder)) for folder in root.resolve().parents}
    seen: set[_Identity] = set()
    files: list[Path] = []

    def unreadable(error: OSError) -> None:
        skipped["unreadable folders"] += 1

    waiting = [root]
    for home in waiting:
        if _identity(os.stat(home)) in above:
            skipped["links to a folder that holds this one"] += 1
            continue
        for folder, folders, names in os.walk(home, onerror=unreadable):
            identity = _identity(os.stat(folder))
            if identity in seen:
                folders.clear()
                continue
            seen.add(identity)
            folders.sort()
            waiting += [Path(folder, name) for name in folders if os.path.islink(os.path.join(folder, name))]
            files += [Path(folder, name) for name in names]
    files.sort(key=lambda file: file.relative_to(root).as_posix())
    regular = []
    for file in files:
        try:
            status = os.stat(file)
        except OSError:
            skipped["broken links"] += 1
            continue
        if not stat.S_ISREG(status.st_mode):
            skipped["pipes, sockets or devices"] += 1
        elif _identity(status) not in seen:
            seen.add(_identity(status))
            regular.append(file)
    return regular


def _identity(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino


def _texts(
    file: Path, kind: str | None, zipped: bool, end_of_text: str, reading: Reading, inside: bool
) -> Iterator[tuple[int | None, str]]:
    """Yield (number, text) of each document of a file; number is None if the file is one document. inside: the file is
    one of a folder, where it may have another purpose."""
    if kind in (None, "text"):
        text = _decode(file, _content(file, zipped))
        pieces = text.split(end_of_text)
        if not any(piece.strip() for piece in pieces):
            reading.skipped["empty files"] += 1
        yield from [(None, text)] if len(pieces) == 1 else enumerate(pieces)
        return
    with_text = without = records = 0
    try:
        for record in _records(file, kind, zipped):
            value = record.get("text") if isinstance(record, dict) else record
            if isinstance(value, str):
                _check_text(file, records, value)
                with_text += bool(value.strip())
                yield records, value
            else:
                without += 1
                if isinstance(record, dict) and not reading.fields:
                    reading.fields = f" (the first has {', '.join(map(repr, list(record)[:5])) or 'no fields'})"
            records += 1
    except _NotJSON as error:
        if not inside:
            raise ValueError(str(error)) from None
        reading.skipped[f"{file.suffix} files that are not JSON"] += 1
        return
    if with_text:
        skipped = {'records without a string "text"': without, "empty records": records - without - with_text}
        reading.skipped.update({reason: count for reason, count in skipped.items() if count})
    elif records:
        what = 'files without a string "text"' if without else "files of empty texts"
        reading.skipped[f"{file.suffix} {what}"] += 1
    else:
        reading.skipped["empty files"] += 1


class _NotJSON(Exception):
    """Error of a .json file without JSON: configuration with comments has the same suffix."""


def _records(file: Path, kind: str | None, zipped: bool) -> Iterator[Any]:
    """Yield lines of JSON, elements of a JSON list, or rows of Parquet (only the column "text")."""
    if kind == "parquet":
        yield from _parquet(file)
    elif kind == "json":
        text = _decode(file, _content(file, zipped))
        try:
            value = json.loads(text) if text.strip() else []
        except (ValueError, RecursionError) as error:
            raise _NotJSON(f"{file} is not JSON: {_reason(error)}") from None
        yield from value if isinstance(value, list) else [value]
    else:
        for number, line in enumerate(_lines(file, zipped), 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line.decode("utf-8").removeprefix("\ufeff"))
            except UnicodeDecodeError:
                raise ValueError(f"{file}, line {number}, is not UTF-8: convert the file, or remove it") from None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file}, line {number}, is not JSON: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _parquet(file: Path) -> Iterator[Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise ValueError(f"{file} is read with pyarrow, which is not installed: pip install pyarrow") from None
    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if "text" not in names:
                yield from [dict.fromkeys(names)] * min(table.metadata.num_rows, 1)
                return
            for batch in table.iter_batches(columns=["text"]):
                yield from ({"text": value} for value in batch.column(0).to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} is damaged, or is not Parquet: {error}") from error


def _open(file: Path, zipped: bool) -> BinaryIO:
    return gzip.open(file) if zipped else open(file, "rb")  # type: ignore[return-value]


def _content(file: Path, zipped: bool) -> bytes:
    return b"".join(_lines(file, zipped))


def _lines(file: Path, zipped: bool) -> Iterator[bytes]:
    try:
        with _open(file, zipped) as stream:
            yield from stream
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file} is damaged, or is not gzip: {error}") from error


def _decode(file: Path, content: bytes) -> str:
    if 10 * content.count(0) > len(content):  # ASCII in UTF-16 is valid UTF-8, with NUL as every other character
        raise ValueError(f"{file} is not UTF-8 text: it is binary or UTF-16; convert it, or remove it")
    try:
        return content.removeprefix(_BOM).decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text (byte {error.start}): convert it, or remove it") from error


def _check_text(file: Path, number: int, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{file}: the text of record {number} holds half a surrogate pair: remove the record"
        ) from None
