"""The tables of a memory as a torch module, so that loaders and savers that walk a model by names find its rows; its
codebooks in a state dict; and the identity of its rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engram.addressing import HashLayout, TokenMap
from engram.config import EngramConfig
from engram.storage.untrusted import parse_json
from engram.tables import EncodedTable, Table
from engram.tables.codecs import PQ


class Tables(nn.Module):
    """{layer: Table}, read like a dict. state_dict() holds the rows of layer i under "i", as views.

    The rows are neither parameters nor buffers: to(), half() and optimizers leave them alone. Still,
    `tables.get_parameter("1")` finds them, and assigning a tensor to the attribute "1" copies it into the table, which
    is how transformers fills a model. Tables made on the meta device are allocated when they are first filled (or by
    to_empty()); rows that are not filled then read as the initial ones.
    """

    def __init__(self, tables: Mapping[int, Table]):
        super().__init__()
        self._tables = dict(tables)
        self.before_rows: Callable[[], None] | None = None  # called once, before tables made on meta are allocated

    def __getitem__(self, layer: int) -> Table:
        return self._tables[layer]

    def __setitem__(self, layer: int, table: Table) -> None:
        self._tables[layer] = table

    def __iter__(self) -> Iterator[int]:
        return iter(self._tables)

    def __len__(self) -> int:
        return len(self._tables)

    def __contains__(self, layer: object) -> bool:
        return layer in self._tables

    def keys(self) -> Any:
        return self._tables.keys()

    def values(self) -> Any:
        return self._tables.values()

    def items(self) -> Any:
        return self._tables.items()

    def __getattr__(self, name: str) -> Any:
        table = self._named(name)
        return super().__getattr__(name) if table is None else nn.Parameter(_rows(table), requires_grad=False)

    def __setattr__(self, name: str, value: Any) -> None:
        table = self._named(name)
        if table is None:
            super().__setattr__(name, value)
            return
        value, filled = value.detach(), not getattr(value, "_is_hf_initialized", not table.on_meta)
        if tuple(value.shape) != tuple(_rows(table).shape):
            raise ValueError(f"rows {tuple(value.shape)} do not fit {table}, which needs {tuple(_rows(table).shape)}")
        if value.is_meta:
            return
        self._make(table)
        if not filled:  # transformers marks what it has read; a key that its files lack is filled with an empty tensor
            _fill(table, value)

    def _named(self, name: str) -> Table | None:
        return self.__dict__.get("_tables", {}).get(int(name)) if name.isdecimal() else None

    def _make(self, table: Table) -> None:
        if not table.on_meta:
            return
        if self.before_rows is not None:
            self.before_rows()
            self.before_rows = None
        table.materialize()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Tables:
        on_meta = [table for table in self.values() if table.on_meta]
        if on_meta and not fn(torch.empty(0, device="meta")).is_meta:  # to_empty()
            for table in on_meta:
                self._make(table)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for layer, table in self.items():
            destination[f"{prefix}{layer}"] = _rows(table)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        for layer, table in self.items():
            key, saved, rows = f"{prefix}{layer}", state_dict.get(f"{prefix}{layer}"), _rows(table)
            if saved is None:
                missing.append(key)
            elif saved.shape != rows.shape:
                errors.append(f"{key} is {tuple(saved.shape)}, the table is {tuple(rows.shape)}")
            elif not saved.is_meta:
                self._make(table)
                _fill(table, saved)
            elif not table.on_meta:
                errors.append(f"{key} is on the meta device and holds no rows")
        known = {f"{prefix}{layer}" for layer in self}
        unexpected.extend(key for key in state_dict if key.startswith(prefix) and key not in known)
        for table in self.values():
            if isinstance(table, EncodedTable) and not table.on_meta:
                table.validate()


def _rows(table: Table) -> Tensor:
    """Return the stored values of a table, no copy; a meta tensor for a table that was made on the meta device."""
    return torch.empty(table.stored_shape, dtype=table.dtype, device="meta") if table.on_meta else table.tensor


def _fill(table: Table, rows: Tensor) -> None:
    if rows.data_ptr() != table.tensor.data_ptr():  # equal if they were read in place
        table.tensor.copy_(rows)


def codebooks_of(tables: Tables) -> dict[int, Tensor]:
    """Return the codebooks of the product-quantised tables."""
    codecs = {layer: table.codec for layer, table in tables.items() if isinstance(table, EncodedTable)}
    return {layer: codec.codebooks for layer, codec in codecs.items() if isinstance(codec, PQ)}


def load_codebooks(
    tables: Tables, state_dict: Any, prefix: str, missing: list[str], unexpected: list[str], errors: list[str]
) -> None:
    """Read the codebooks of a state dict into the tables' codecs; the lists are those of nn.Module."""
    for layer, target in codebooks_of(tables).items():  # the rows are read after them, by Tables
        key = f"{prefix}codebooks.{layer}"
        saved = state_dict.get(key)
        if key in unexpected:
            unexpected.remove(key)
        if saved is None:
            missing.append(key)
        elif saved.shape != target.shape:
            errors.append(f"{key} is {tuple(saved.shape)}, the codebooks are {tuple(target.shape)}")
        else:
            target.copy_(saved)


def replaces_rows(tables: Tables, state_dict: Mapping[str, Tensor], prefix: str) -> tuple[bool, bool]:
    """Return (True if a state dict replaces all rows and codebooks by those of other tensors, True if they also have
    the shapes of the tables). prefix: of the memory's keys."""
    own = {f"{prefix}tables.{layer}": _rows(table) for layer, table in tables.items()}
    own |= {f"{prefix}codebooks.{layer}": books for layer, books in codebooks_of(tables).items()}
    replaced = all(key in state_dict and state_dict[key].data_ptr() != mine.data_ptr() for key, mine in own.items())
    return replaced, replaced and all(state_dict[key].shape == mine.shape for key, mine in own.items())


def row_identity(config: EngramConfig, layout: HashLayout, token_map: TokenMap, codec: str | None) -> dict[str, Any]:
    """Return the identity of a memory's rows: rows of another identity would be read wrongly."""
    identity: dict[str, Any] = {
        "layout": layout.digest,
        "token_map": token_map.digest,
        "init": [config.table_init, config.table_std, config.seed],
        "dtype": config.table_dtype,
    }
    return identity if codec is None else {**identity, "codec": codec}


def same_field(name: str, saved: Any, mine: Any, token_map: TokenMap) -> bool:
    """Return True if a saved field agrees with a memory's, whose token map may have been extended since."""
    return saved == mine or (name == "token_map" and token_map.is_extended_from(str(saved)))


def pack_identity(identity: dict[str, Any]) -> Tensor:
    """Return the identity as canonical JSON in a uint8 tensor, as it lies in a state dict."""
    return torch.tensor(list(json.dumps(identity, sort_keys=True).encode()), dtype=torch.uint8, device="cpu")


def check_identity(state: Tensor, identity: dict[str, Any], same: Callable[[str, Any, Any], bool]) -> None:
    """Raise ValueError if the packed identity of a saved memory is not `identity`."""
    saved, mine = parse_json(bytes(state.tolist())), parse_json(json.dumps(identity))
    names = ("token_map", "token map"), ("layout", "hash layout"), ("init", "init"), ("dtype", "dtype")
    for name, what in (*names, ("codec", "row codec")):
        if not same(name, saved.get(name), mine.get(name)):
            raise ValueError(
                f"the saved memory has another {what} ({saved.get(name)}) than this model ({mine.get(name)}): its "
                f"rows would be read wrongly"
            )
