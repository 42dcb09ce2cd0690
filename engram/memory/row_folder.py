"""RowFolder: a folder of row files that are trained in place, and its rows.json, which names their memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engram.storage.files import write_whole
from engram.storage.manifest import step_folders
from engram.storage.untrusted import read_json

Identity = dict[str, Any]


class RowFolder:
    """The record rows.json beside a memory's row files; without a folder, nothing is recorded.

    identity: what decides the values of the rows (engram.memory.state.row_identity).
    """

    def __init__(self) -> None:
        self.folder: Path | None = None  # the folder with a rows.json of this memory
        self.marked = False  # True while rows.json marks the rows as unfinished
        self.cut_short: str | None = None  # the reason why the opened rows must not be used

    def begin(self, folder: Path, identity: Identity) -> None:
        """Make the folder, and record the memory in it."""
        folder.mkdir(parents=True, exist_ok=True)
        self.claim(folder, identity)

    def claim(self, folder: Path, identity: Identity) -> None:
        """Record in rows.json which memory owns the row files in `folder`."""
        write_whole(folder / "rows.json", json.dumps(identity).encode())
        self.folder = folder

    def mark_unfinished(self, run: str | os.PathLike[str] | None, identity: Identity) -> None:
        """Record in rows.json that the rows in files are being changed: until mark_finished they are not those of any
        checkpoint, and after a kill they are refused. run: folder with the checkpoints of this training, or None."""
        if self.folder is not None:
            mark = {"run": None if run is None else os.path.abspath(run)}
            write_whole(self.folder / "rows.json", json.dumps({**identity, "unfinished": mark}).encode())
            self.marked = True

    def mark_finished(self, flush: Callable[[], None], identity: Identity) -> None:
        """Record that all rows are those of one checkpoint, or of training that has ended."""
        self.cut_short = None
        if self.folder is not None and self.marked:
            flush()
            self.claim(self.folder, identity)
            self.marked = False

    def check_finished(self) -> None:
        """Raise ValueError if the rows in files were left by training that was cut short, and no checkpoint was loaded
        over them since."""
        if self.cut_short is not None:
            raise ValueError(self.cut_short)

    def _check_mark(self, folder: Path, mark: Any) -> None:
        """Refuse rows that a killed run left, unless a checkpoint of that run can be loaded over them first."""
        run = mark.get("run") if isinstance(mark, dict) else None
        why = f"{folder} holds rows of training that was cut short: they are not those of any step"
        start = f"delete {folder / 'rows.json'} and the *.rows beside it to start again with new rows"
        if not isinstance(run, str) or not any((step / "manifest.json").is_file() for step in step_folders(run)):
            raise ValueError(f"{why}, and there is no checkpoint to resume from: {start}")
        self.cut_short = f"{why}. Load a checkpoint of {run} over them (training in that folder does), or {start}"

    def open(self, folder: Path, identity: Identity, same: Callable[[str, Any, Any], bool]) -> None:
        """Use the rows in `folder`. Raise ValueError if they belong to another memory, or if training left them
        unfinished and there is no checkpoint of it."""
        path = folder / "rows.json"
        try:
            record = read_json(path, "the record of a folder of rows")
            other = [name for name, value in identity.items() if not same(name, record.get(name), value)]
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path} does not name the memory of the rows beside it ({type(error).__name__}): use another folder, "
                f"or delete the rows"
            ) from None
        if other:
            raise ValueError(
                f"{folder} holds rows of another memory ({', '.join(other)} differ): they would be read wrongly, or "
                f"training would begin with them. Use another folder, or delete the rows"
            )
        self.folder = folder
        if record.get("unfinished") is not None:
            self.marked = True
            self._check_mark(folder, record["unfinished"])
