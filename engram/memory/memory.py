"""EngramMemory: addressing + tables + fusion for all layers of one model. The one object a backbone talks to.

recall = self.memory.recall(ids)                 # hash once for all layers; fetching starts now
for i, block in enumerate(self.blocks):
    if i in self.memory:
        x = x + self.memory[i](x, recall)        # waits only if its rows have not arrived
    x = block(x)
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from engram.addressing import NgramHasher, TokenMap
from engram.config import EngramConfig
from engram.fusion import EngramFusion
from engram.memory.build import check_tables, hash_layout, make_tables
from engram.memory.cache import MemoryCache
from engram.memory.encoding import encode_all
from engram.memory.gradients import RowGradients, check_processes
from engram.memory.positions import copy_to_host, locate, unnamed
from engram.memory.recall import Recall, refuse_recording, uncompiled
from engram.memory.row_folder import RowFolder
from engram.memory.saved import load_parts, save_memory
from engram.memory.state import Tables, check_facts, codebooks_of, load_codebooks, pack_facts, row_facts, same_fact
from engram.storage.weak import WeakList
from engram.tables import Table
from engram.tables.arguments import as_ids
from engram.tables.codecs import get_codec


def _finish_load(memory: EngramMemory, incompatible_keys: Any) -> None:
    """Once a state dict is read, the memory's tables included."""
    if memory._replaced:
        memory.mark_finished()
    memory._replaced = False


class EngramMemory(nn.Module):
    """The n-gram memory of one model: a table and a fusion module for each of config.layers.

    The tables stay in host memory whatever device the module moves to, and are not nn.Parameters: train them with
    engram.build_optimizer. state_dict() holds them all the same (as views, not copies), so saving a model the usual way
    saves its memory, and loading refuses rows that were addressed by another layout or token map. Rows learn in train()
    mode; memory.requires_grad_(False) freezes them with the fusion weights, but the same call on a model around the
    memory reaches its weights alone.

    Args:
        config: shape and rules. token_map: of the tokenizer whose ids will come in. hidden_size: d.
        streams: residual streams M of the backbone.
        folder: keep the tables in files layer-<i>.rows of this folder instead of RAM. Rows that are there are gone on
            with, if they belong to the same addresses, token map and initial rows (its rows.json says so). Rows that a
            killed train() left are refused, or, if that run has checkpoints, must not be used before one is loaded.
        tables: {layer: table} to read from instead of new ones, all of them encoded or none. If a hasher is given, they
            may have any number of rows.
        hasher: addresses rows instead of an NgramHasher. It is called like one, and its attribute token_map is
            `token_map`. Such a memory is not saved as a folder.
        fusions: {layer: module} instead of EngramFusion; called like it.

    Raises:
        ValueError: a token map that cannot belong to the config (size, or pad_id outside it); a folder that is a saved
        memory, whose rows would no longer have the digests of its manifest once they were trained in place, or one
        with rows of another memory; tables of another shape than the config's; a hasher of another token map; fusions
        of other layers.
    """

    def __init__(
        self,
        config: EngramConfig,
        token_map: TokenMap,
        hidden_size: int,
        streams: int = 1,
        folder: Any = None,
        tables: Mapping[int, Table] | None = None,
        hasher: Any = None,
        fusions: Mapping[int, nn.Module] | None = None,
    ):
        super().__init__()
        self.config, self.hidden_size, self.streams = config, hidden_size, streams
        if config.compressed_vocab is not None and token_map.size != config.compressed_vocab:
            raise ValueError(
                f"this configuration's rows are addressed with {config.compressed_vocab:,} compressed ids, the token "
                f"map has {token_map.size:,}: it comes from another tokenizer, and every row would be the wrong one"
            )
        if config.pad_id >= len(token_map.table):
            raise ValueError(
                f"pad_id {config.pad_id} is outside the token map's vocabulary of {len(token_map.table):,}"
            )
        if token_map.table[config.pad_id] < 0:
            raise ValueError(
                f"pad_id {config.pad_id} is a dead id of the token map: name one that the tokenizer had at first"
            )
        if folder is not None and (Path(folder) / "manifest.json").exists():
            raise ValueError(
                f"{folder} is a saved memory, which is not trained in place: EngramMemory.load it, with rows_in= where "
                f"the rows should stay in files, and save it again"
            )
        self.layout = hash_layout(config, token_map)
        self.hasher = NgramHasher(self.layout, token_map) if hasher is None else hasher
        if self.hasher.token_map is not token_map:
            raise ValueError("the hasher has another token map than the memory: make it with the same TokenMap object")
        # Ids that the model may be given. Those beyond the token map (embeddings are padded, tokenizers grow) are dead.
        self.vocab_size = len(token_map.table)
        self.tables = Tables(tables or {})
        if fusions is None:
            fusions = {layer: EngramFusion(config, hidden_size, streams) for layer in config.layers}
        if set(fusions) != set(config.layers):
            raise ValueError(f"the fusions are of layers {sorted(fusions)}, the configuration needs {config.layers}")
        self.fusions = nn.ModuleDict({str(layer): fusions[layer] for layer in config.layers})
        self.codec: str | None = None
        self._row_folder = RowFolder()
        if tables is None:
            home = None if folder is None else Path(folder)
            make_tables(config, self.layout, home, self._open_folder, self._begin_folder, self.tables)
        rows = self.layout.rows if hasher is None else {layer: table.rows for layer, table in self.tables.items()}
        self.codec = check_tables(config, rows, self.tables)
        self.gradients = RowGradients(config.layers)
        self._frozen = False
        self.clock = {"hashing": 0.0, "waiting": 0.0, "updating": 0.0}  # seconds since the caller last set them to 0
        self.recalls: WeakList[Recall] = WeakList()  # that live, told of every change of rows
        self.recalls_are_stale = False  # rows have changed, and an interrupt kept patch() from renewing them
        self.attachment: Any = None  # to a model of another library (engram.attach)
        self._replaced = False  # by the load_state_dict under way: all rows
        self.register_load_state_dict_post_hook(_finish_load)

    def _open_folder(self, folder: Path) -> None:
        self._row_folder.open(folder, self._facts(), self._same)

    def _begin_folder(self, folder: Path) -> None:
        self._row_folder.begin(folder, self._facts())

    def claim(self, folder: Path) -> None:
        """Record in rows.json which memory owns the row files in `folder`."""
        self._row_folder.claim(folder, self._facts())

    def mark_unfinished(self, run: str | os.PathLike[str] | None) -> None:
        """Record in rows.json that the rows in files are being changed; see RowFolder."""
        self._row_folder.mark_unfinished(run, self._facts())

    def mark_finished(self) -> None:
        """Record that all rows are those of one checkpoint, or of training that has ended."""
        self._row_folder.mark_finished(self.flush, self._facts())

    def flush(self) -> None:
        """Force rows in files to the disk."""
        for table in self.tables.values():
            table.flush()

    def check_finished(self) -> None:
        """Raise ValueError if the rows in files were left by training that was cut short, and no checkpoint was loaded
        over them since."""
        self._row_folder.check_finished()

    def detach(self) -> nn.Module:
        """Undoes engram.attach: gives back the model as it was, without hooks or memory.

        Raises:
            ValueError: not attached.
        """
        if self.attachment is None:
            raise ValueError("this memory is not attached to a model")
        attachment, self.attachment = self.attachment, None
        attachment.remove()
        self.vocab_size = len(self.hasher.token_map.table)
        return attachment.model

    def extend(self, grown: Any) -> None:
        """Take up tokens that were added to the tokenizer since the rows were addressed; see TokenMap.extend. Rows and
        digests stay; the token map itself changes only if a new token joins the class of an old one.

        Args:
            grown: the tokenizer after tokens were added, or its TokenMap.

        Raises:
            ValueError: another tokenizer, or one that lacks ids of the token map.
        """
        extended = self.hasher.token_map.extend(grown)
        if (extended.table[len(self.hasher.token_map.table) :] >= 0).any():
            if not isinstance(self.hasher, NgramHasher):
                kind = type(self.hasher).__name__
                raise ValueError(
                    f"the rows are addressed by a {kind}, which cannot take up new tokens: build a new memory"
                )
            self.hasher = NgramHasher(self.layout, extended)
        self.vocab_size = max(self.vocab_size, len(extended.table))

    def unnamed(self, ids: Tensor) -> Tensor | None:
        """True at the ids (of the model's vocabulary) that the token map gives no class; None if there are none."""
        return unnamed(ids, self.hasher.token_map, self.vocab_size)

    def __contains__(self, layer: int) -> bool:
        return layer in self.tables

    def __getitem__(self, layer: int) -> Callable[[Tensor, Recall], Tensor]:
        """memory[i](hidden, recall) -> what to add to the hidden state [B, T, d] (or [B, T, M, d]) before block i."""
        if layer not in self.tables:
            raise KeyError(f"layer {layer} has no memory; layers {self.config.layers} have")
        return partial(self._fuse, layer)

    @uncompiled
    def recall(
        self,
        ids: Tensor,
        documents: Tensor | None = None,
        lookback: Tensor | None = None,
        cache: MemoryCache | None = None,
        dead: Tensor | None = None,
    ) -> Recall:
        """Hashes the ids for all layers and starts fetching their rows.

        Args:
            ids: int64 [B, T] token ids; -1 is a DEAD position with boundary="dead", else not allowed.
                An id of the model's vocabulary (vocab_size) that the token map does not name is DEAD too.
            documents: [B, T] document numbers of a packed batch; n-grams and convolution never cross a document.
            lookback: [B, <= N-1] the ids just before `ids`, where the text goes on from an earlier piece. They complete
                n-grams; a convolution sees nothing of that piece, other than with a cache.
            cache: decoding state; replaces `lookback`, and is brought up to date. The first of `ids` goes on from what
                it holds.
            dead: bool [B, T], True at positions that are not text (padding, images), whatever their id. They are never
                hashed, end n-grams and convolution like the start of a document, and get nothing from the memory.

        Raises:
            IndexError: an id outside the vocabulary. ValueError: placeholder ids, shapes that do not match, or a cache
            together with a lookback.
        """
        refuse_recording(ids)
        self.check_finished()
        if self.collects_gradients:
            check_processes()
        if cache is not None and lookback is not None:
            raise ValueError("a decoding cache has its own look-back: give no lookback with it")
        at = locate(ids, documents, lookback, dead, self.config, self.unnamed)
        host, runs, dead, device = at.ids, at.documents, at.dead, ids.device
        if cache is None:
            return self._new_recall(host, at.lookback, runs, device, dead)
        if host.numel() and not 0 <= int(host.min()) <= int(host.max()) < len(self.hasher.token_map.table):
            self.hasher(host)  # raises: a cache must not take up what is refused
        held = host if dead is None else host.masked_fill(dead.cpu(), -1)
        piece = cache.prepare(held, None if runs is None else runs.cpu(), self.config.orders[-1] - 1, self.lag)
        runs = None if piece.runs is None else piece.runs.to(device)
        recall = self._new_recall(host, piece.lookback, runs, device, dead)
        recall.cache, recall.start, recall.number = cache, piece.start, piece.number
        cache.take(piece)  # last: an error or an interruption before leaves the cache as it was
        return recall

    def _new_recall(
        self, host: Tensor, lookback: Tensor | None, runs: Tensor | None, device: torch.device, dead: Tensor | None
    ) -> Recall:
        return Recall(self, host, None if lookback is None else copy_to_host(lookback), runs, device, dead)

    @property
    def lag(self) -> int:
        """Positions that the convolutions reach back."""
        return self.config.dilation * max(0, self.config.conv_kernel - 1)

    def patch(self, layer: int, touched: Tensor) -> int:
        """Tells every recall in flight that rows `touched` (int64) of a layer have changed. Optimisers call this after
        each update, and so must anyone who writes rows between recall() and the forward pass that uses it."""
        touched, recalls = as_ids(touched), self.recalls.living()
        try:
            return sum(recall.patch(layer, touched) for recall in recalls)
        except BaseException:  # interrupted, or a row that cannot be read
            for recall in recalls:
                recall.forget(layer)
            raise

    def renew_recalls(self) -> None:
        """Make recalls in flight fetch their rows again. Call it before all rows change."""
        for recall in self.recalls.living():
            recall.renew()
        self.recalls_are_stale = False

    def _fuse(self, layer: int, hidden: Tensor, recall: Recall) -> Tensor:
        history = recall.inputs_before(layer) if self.config.conv_kernel else None
        given = (recall.rows(layer), recall.documents, recall.dead)  # on the device of the ids, in a model that spans
        rows, documents, dead = (None if x is None else x.to(hidden.device) for x in given)  # several another one
        update, inputs = self.fusions[str(layer)](rows, hidden, documents, history, dead)
        if self.collects_gradients:
            self._look_before_backward(layer, update)
        if inputs is not None:
            recall.keep_inputs(layer, inputs)
        return update

    def table_parameters(self) -> int:
        """Number of values in all tables."""
        return sum(table.rows * table.dim for table in self.tables.values())

    @property
    def trains_tables(self) -> bool:
        """True if rows learn: config.train_tables, until the tables are encoded or the memory is frozen."""
        return self.config.train_tables and self.codec is None and not self._frozen

    @property
    def collects_gradients(self) -> bool:
        """True if a forward pass at this moment takes row gradients in its backward pass."""
        return self.training and torch.is_grad_enabled() and self.trains_tables

    def requires_grad_(self, requires_grad: bool = True) -> EngramMemory:
        """Freezes the fusion weights and the rows (False), or lets both learn."""
        self._frozen = not requires_grad
        return super().requires_grad_(requires_grad)

    def check_writable(self) -> None:
        """Raises PermissionError where a table cannot be trained: no gradient is gathered for rows that cannot."""
        for table in self.tables.values():
            table.check_writable()

    @property
    def has_optimizer(self) -> bool:
        """True if an EngramOptimizer was made for this memory."""
        return self.gradients.has_optimizer

    @has_optimizer.setter
    def has_optimizer(self, value: bool) -> None:
        self.gradients.has_optimizer = value

    def drop_stale_gradients(self, layer: int) -> None:
        """Drop the row gradients of passes whose weight gradients are gone; see RowGradients.drop_stale."""
        self.gradients.drop_stale(layer, self.fusions[str(layer)])

    @uncompiled
    def _look_before_backward(self, layer: int, update: Tensor) -> None:
        self.gradients.look_before_backward(layer, update, self.fusions[str(layer)])

    def encode_tables(self, codec: str, folder: Any = None) -> None:
        """Replaces the tables by encoded ones (engram.tables.codecs), which are smaller and are not trained any more.

        A saved state of encoded tables loads into a memory that was encoded in the same way.

        Args:
            codec: "fp8", "int8", "int4", "pq4" or "pq8". folder: keep them in files layer-<i>.<codec> instead of RAM.

        Raises:
            ValueError: an unknown codec, a head_dim it cannot hold, rows that are not finite, tables already encoded,
            files that are there already. The tables are then as they were.
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

    def save(self, folder: str | os.PathLike[str], overwrite: bool = False) -> Path:
        """Writes the whole memory (addresses, rows, fusion weights; no optimiser state) as one folder, and returns it.

        The folder appears whole or not at all, also after a kill at any moment. Rows never written take no disk space.
        No training step may run meanwhile.

        Args:
            overwrite: replace a saved memory that is there; until the new one is whole, the old one stays. Readers who
                have the old one open keep it.

        Raises:
            FileExistsError: the folder exists, without overwrite=True or as something else than a saved memory.
            ValueError: fusion weights that another library has wrapped (LoRA on all linear layers).
            OSError: the disk is full or the folder cannot be written; nothing half-written stays behind.
        """
        return save_memory(self, folder, overwrite)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        mode: str = "copy",
        token_map: TokenMap | None = None,
        rows_in: str | os.PathLike[str] | None = None,
    ) -> EngramMemory:
        """A memory that `save` wrote.

        Args:
            mode: "copy" reads the rows into tables of this process, after which the folder is no longer needed, and
                checks every digest. "shared" maps the rows read-only: nothing is read before it is used, all processes
                that do so share one copy in the page cache, and tables may be larger than memory. Their rows cannot be
                trained: the memory comes in eval() mode, forward passes in train() mode and optimisers raise
                PermissionError; the fusion weights can be trained in eval() mode. Some blocks of every table are
                checked, all of them by `engram verify`.
            token_map: of the tokenizer in use; one that the rows were not written with is refused, other than the same
                tokenizer with tokens added (see TokenMap.extend). Default: the saved.
            rows_in: with "copy", a folder that keeps the new tables in files instead of RAM, for training
                tables larger than memory.

        Raises:
            FileNotFoundError: no memory there. ValueError: a torn, truncated, swapped, altered or foreign file, by
            name; another token map. BlockingIOError: a row file that is held for writing.
        """
        parts = load_parts(folder, mode, token_map, rows_in)
        try:
            memory = cls(parts.config, parts.token_map, parts.hidden_size, parts.streams, tables=parts.tables)
            for name, fusion in memory.fusions.items():
                fusion.to(parts.weights[f"{name}.value.weight"].dtype)
            memory.fusions.load_state_dict(parts.weights)
            if rows_in is not None and memory.codec is None:
                memory.claim(Path(rows_in))
        except BaseException:
            parts.discard()
            raise
        if token_map is not None:
            memory.extend(token_map)
        return memory.eval() if mode == "shared" else memory

    def close(self) -> None:
        """Lets go of all tables (mapped files are flushed)."""
        for table in self.tables.values():
            table.close()

    # The tables travel in the state dict, with the facts that say which rows they are.

    def _facts(self) -> dict[str, Any]:
        return row_facts(self.config, self.layout, self.hasher.token_map, self.codec)

    def _same(self, name: str, saved: Any, mine: Any) -> bool:
        return same_fact(name, saved, mine, self.hasher.token_map)

    def get_extra_state(self) -> Tensor:
        return pack_facts(self._facts())

    def set_extra_state(self, state: Tensor) -> None:
        check_facts(state, self._facts(), self._same)

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
        targets = {f"{prefix}tables.{layer}": table.stored_shape for layer, table in self.tables.items()}
        targets |= {f"{prefix}codebooks.{layer}": books.shape for layer, books in codebooks_of(self.tables).items()}
        live = self.state_dict()
        own = {key: live[key.removeprefix(prefix)].data_ptr() for key in targets}
        if all(key in state_dict and state_dict[key].data_ptr() != own[key] for key in targets):
            self.mark_unfinished(None)
            self._replaced = all(state_dict[key].shape == shape for key, shape in targets.items())
        load_codebooks(self.tables, state_dict, prefix, missing, unexpected, errors)

    # Copies and pickles.

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, Tables(value) if name == "tables" and isinstance(value, dict) else value)

    def __deepcopy__(self, memo: dict[int, Any]) -> EngramMemory:
        """A memory of its own, with the rows of this moment in memory; rows that were opened read-only stay shared. It
        has no optimiser and no row gradients. A copy of a model with an attached memory gets a copy attached to it.

        Raises:
            MemoryError: the rows do not fit.
        """
        twin = memo[id(self)] = self.__class__.__new__(self.__class__)
        fresh: dict[str, Any] = {
            "gradients": RowGradients(self.config.layers),
            "clock": dict.fromkeys(self.clock, 0.0),
            "attachment": memo.get(id(self.attachment)),
            "_replaced": False,
            "_row_folder": RowFolder(),
        }
        shared = {"config", "layout", "hasher"}  # which nothing changes
        for name, value in self.__dict__.items():
            twin.__dict__[name] = (
                fresh[name] if name in fresh else value if name in shared else copy.deepcopy(value, memo)
            )
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
