"""RowState: the rows of a memory as a torch module, with their state dict, row files, recalls and copies."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

from torch import Tensor, nn

from engram.addressing import HashLayout
from engram.config import EngramConfig
from engram.memory.build import check_tables, make_tables
from engram.memory.encoding import encode_all
from engram.memory.gradients import RowGradients
from engram.memory.recall import Recall
from engram.memory.row_folder import RowFolder
from engram.memory.state import (
    Tables,
    check_identity,
    codebooks_of,
    load_codebooks,
    pack_identity,
    replaces_rows,
    row_identity,
    same_field,
)
from engram.storage.weak import WeakList
from engram.tables import Table
from engram.tables.arguments import as_ids
from engram.tables.codecs import get_codec


def _finish_load(state: RowState, incompatible_keys: Any) -> None:
    """Record, once a state dict is read, that all rows are those of a checkpoint if it had all of them."""
    if state._replaced:
        state.mark_finished()
    state._replaced = False


class RowState(nn.Module):
    """The tables of one model's layers, with all state that depends on their rows.

    The state dict has the rows as views, with their identity (layout, token map, initial rows). Rows in files are
    marked in rows.json while they are changed. Recalls in flight fetch changed rows again.

    Args:
        config, layout, hasher: what addresses the rows.
        tables: {layer: table}; None makes them, in the files of `folder` unless it is None.
        any_rows: True if the tables may have other numbers of rows than the layout.
    """

    def __init__(
        self,
        config: EngramConfig,
        layout: HashLayout,
        hasher: Any,
        tables: Mapping[int, Table] | None,
        folder: str | os.PathLike[str] | None,
        any_rows: bool,
    ):
        super().__init__()
        self.config, self.layout, self.hasher = config, layout, hasher
        self.tables = Tables(tables or {})
        self.codec: str | None = None
        self._row_folder = RowFolder()
        if tables is None:
            home = None if folder is None else Path(folder)
            make_tables(config, layout, home, self._open_folder, self._begin_folder, self.tables)
        rows = {layer: table.rows for layer, table in self.tables.items()} if any_rows else layout.rows
        self.codec = check_tables(config, rows, self.tables)
        self.gradients = RowGradients(config.layers)
        self.recalls: WeakList[Recall] = WeakList()  # those in use; each is renewed when rows change
        self.recalls_are_stale = False  # rows have changed, and an interrupt kept patch() from renewing them
        self._replaced = False  # True if the running load_state_dict replaces all rows
        self.register_load_state_dict_post_hook(_finish_load)

    # Rows that change.

    def patch(self, layer: int, touched: Tensor) -> int:
        """Fetch changed rows again in every recall in flight. Call it after rows are written between recall() and the
        forward pass that uses it; optimizers do. touched: int64 row ids of the layer.

        Returns:
            Rows fetched again.
        """
        touched, recalls = as_ids(touched), self.recalls.living()
        try:
            return sum(recall.patch(layer, touched) for recall in recalls)
        except BaseException:  # interrupted, or a row that cannot be read
            for recall in recalls:
                recall.drop(layer)
            raise

    def renew_recalls(self) -> None:
        """Make recalls in flight fetch their rows again. Call it before all rows change."""
        for recall in self.recalls.living():
            recall.renew()
        self.recalls_are_stale = False

    def check_writable(self) -> None:
        """Raise PermissionError if a table cannot be trained, so that no gradient is collected for its rows."""
        for table in self.tables.values():
            table.check_writable()

    def encode_tables(self, codec: str, folder: str | os.PathLike[str] | None = None) -> None:
        """Replace the tables by encoded ones (engram.tables.codecs), which are smaller and cannot be trained.

        A saved state of encoded tables loads into a memory that was encoded in the same way.

        Args:
            codec: "fp8", "int8", "int4", "pq4" or "pq8". folder: keep them in files layer-<i>.<codec> instead of RAM.

        Raises:
            ValueError: an unknown codec, a head_dim it cannot hold, rows that are not finite, tables already encoded,
            files that exist already. The tables are then as they were.
        """
        if self.codec is not None:
            raise ValueError(f"the tables are {self.codec} already: encoding twice would lose precision twice")
        self.check_finished()
        name = get_codec(codec, self.config.head_dim).name
        encoded = encode_all(self.tables, codec, name, None if folder is None else Path(folder))
        self.renew_recalls()
        self.close()
        self.tables, self.codec, self._row_folder.folder = Tables(encoded), name, None
        self.gradients.drop()

    def table_parameters(self) -> int:
        """Return the number of values in all tables."""
        return sum(table.rows * table.dim for table in self.tables.values())

    def close(self) -> None:
        """Release all tables (mapped files are flushed first)."""
        for table in self.tables.values():
            table.close()

    # Row files.

    def _open_folder(self, folder: Path) -> None:
        self._row_folder.open(folder, self._identity(), self._same)

    def _begin_folder(self, folder: Path) -> None:
        self._row_folder.begin(folder, self._identity())

    def claim(self, folder: Path) -> None:
        """Record in rows.json which memory owns the row files in `folder`."""
        self._row_folder.claim(folder, self._identity())

    def mark_unfinished(self, run: str | os.PathLike[str] | None) -> None:
        """Record in rows.json that the rows in files are being changed; see RowFolder."""
        self._row_folder.mark_unfinished(run, self._identity())

    def mark_finished(self) -> None:
        """Record that all rows are those of one checkpoint, or of training that has ended."""
        self._row_folder.mark_finished(self.flush, self._identity())

    def flush(self) -> None:
        """Force rows in files to the disk."""
        for table in self.tables.values():
            table.flush()

    def check_finished(self) -> None:
        """Raise ValueError if the rows in files were left by training that was cut short, and no checkpoint was loaded
        over them since."""
        self._row_folder.check_finished()

    # The tables in the state dict, with the identity of their rows.

    def _identity(self) -> dict[str, Any]:
        return row_identity(self.config, self.layout, self.hasher.token_map, self.codec)

    def _same(self, name: str, saved: Any, mine: Any) -> bool:
        return same_field(name, saved, mine, self.hasher.token_map)

    def get_extra_state(self) -> Tensor:
        return pack_identity(self._identity())

    def set_extra_state(self, state: Tensor) -> None:
        check_identity(state, self._identity(), self._same)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for layer, books in codebooks_of(self.tables).items():
            destination[f"{prefix}codebooks.{layer}"] = books

    @property
    def codebooks(self) -> SimpleNamespace:
        """Codebooks of product-quantised tables under the names that state_dict() gives them."""
        return SimpleNamespace(**{str(layer): books for layer, books in codebooks_of(self.tables).items()})

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        self.check_writable()
        self.renew_recalls()
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        replaced, all_fit = replaces_rows(self.tables, state_dict, prefix)
        if replaced:
            self.mark_unfinished(None)
            self._replaced = all_fit
        load_codebooks(self.tables, state_dict, prefix, missing, unexpected, errors)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, Tables(value) if name == "tables" and isinstance(value, dict) else value)

    # Copies and pickles.

    def _copy(self, memo: dict[int, Any], **own: Any) -> Self:
        """Return a deep copy that has no optimizer and no row gradients. own: fields that the copy gets as they are."""
        twin = memo[id(self)] = self.__class__.__new__(self.__class__)
        own |= {name: getattr(self, name) for name in ("config", "layout", "hasher")}  # which nothing changes
        own |= {"gradients": RowGradients(self.config.layers), "_replaced": False, "_row_folder": RowFolder()}
        for name, value in self.__dict__.items():
            twin.__dict__[name] = own[name] if name in own else copy.deepcopy(value, memo)
        twin._row_folder.cut_short = self._row_folder.cut_short
        return twin

    def __getstate__(self) -> Any:
        raise TypeError(
            "an EngramMemory is not pickled: its tables may be larger than memory. Save it with memory.save(folder), "
            "or its values with torch.save(model.state_dict()); copy.deepcopy copies it"
        )

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError(
            "torch.nn.DataParallel runs copies of a model, which lose row gradients: use one device per process"
        )
