"""Encode all tables of a memory, in memory or in files that appear together."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from engram.memory.state import Tables
from engram.storage.files import NotSynced
from engram.storage.partial import partial_folder
from engram.tables import EncodedTable, encode_table
from engram.tables.encoded import place_table


def encode_all(tables: Tables, codec: str, name: str, folder: Path | None) -> dict[int, EncodedTable]:
    """Return an encoded copy of each table. name: of the codec, as in file names. See EngramMemory.encode_tables."""
    paths = {layer: None if folder is None else folder / f"layer-{layer}.{name}" for layer in tables}
    for path in filter(None, paths.values()):  # before the work
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            raise ValueError(f"{path} exists already: pass another folder, or delete it")
    encoded: dict[int, EncodedTable] = {}
    try:
        with ExitStack() as stack:  # all layers get their names together, once all are complete
            home = None if folder is None else stack.enter_context(partial_folder(folder / f"tables.{name}"))
            for layer, table in tables.items():
                new = None if home is None else home / f"layer-{layer}.{name}"
                encoded[layer] = encode_table(table, codec, new)
            for layer, final in paths.items():
                if final is not None:
                    place_table(encoded[layer], final)
    except BaseException as error:
        for layer, made in encoded.items():  # so that the call can be repeated
            made.close()
            if made.path is not None and made.path == paths[layer]:
                made.path.unlink(missing_ok=True)
                made.codebook_path.unlink(missing_ok=True)
        if isinstance(error, NotSynced):  # its message names a file that has just been removed
            raise OSError(error.errno, f"the disk did not confirm the encoded tables in {folder}") from error
        raise
    return encoded
