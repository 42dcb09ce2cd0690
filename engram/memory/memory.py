"""EngramMemory: addressing + tables + fusion for all layers of one model. The one object a backbone talks to.

recall = self.memory.recall(ids)                 # hash once for all layers; fetching starts now
for i, block in enumerate(self.blocks):
    if i in self.memory:
        x = x + self.memory[i](x, recall)        # waits only if its rows have not arrived
    x = block(x)
"""

from __future__ import annotations

import copy
import json
import os
import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from engram.addressing import HashLayout, NgramHasher, TokenMap
from engram.config import EngramConfig
from engram.fusion import EngramFusion
from engram.memory.cache import MemoryCache
from engram.memory.recall import Recall, refuse_recording, uncompiled
from engram.memory.state import Tables
from engram.storage.files import NotSynced, partial_folder, step_folders, write_whole
from engram.storage.untrusted import parse_json, read_json
from engram.storage.weak import WeakList
from engram.tables import EncodedTable, HostTable, encode_table
from engram.tables.codecs import PQ, get_codec
from engram.tables.encoded import place_table
from engram.tables.table import as_ids


def _copy(ids: Tensor) -> Tensor:
    """On the CPU, in memory of its own."""
    return ids.to("cpu", copy=True)


def build_layout(config: EngramConfig, compressed_vocab: int, pad_id: int) -> HashLayout:
    """Where the rows of this configuration lie. pad_id: compressed id that stands before the start of a text."""
    return HashLayout.build(
        compressed_vocab=compressed_vocab,
        layers=config.layers,
        orders=config.orders,
        heads=config.heads,
        rows_per_head=config.rows_per_head,
        pad_id=pad_id,
        seed=config.seed,
        family=config.hash,
        boundary=config.boundary,
        generator=config.generator,
        row_multiple=config.row_multiple,
    )


def hash_layout(config: EngramConfig, token_map: TokenMap) -> HashLayout:
    """Where the rows of this configuration lie, for the tokenizer of this token map."""
    return build_layout(config, token_map.size, int(token_map.table[config.pad_id]))


def new_table(config: EngramConfig, layer: int, rows: int, path: Any = None, mode: str = "r+") -> HostTable:
    """The table of one layer, float rows as the configuration wants them; in memory, or in the file `path`."""
    dtype, init, std = getattr(torch, config.table_dtype), config.table_init, config.table_std
    return HostTable(rows, config.head_dim, dtype, path, mode=mode, init=init, std=std, seed=table_seed(config, layer))


def table_seed(config: EngramConfig, layer: int) -> int:
    """Of the initial rows of a layer's table."""
    return config.seed * 1_000_003 + layer


def unwritten(dtype: Any, init: Any, std: Any, seed: Any) -> tuple[Any, ...]:
    """What decides how rows that were never written read: zeros are drawn with no std from no seed."""
    return (dtype, init) if init == "zero" else (dtype, init, std, seed)


def check_processes() -> None:
    """Raises RuntimeError where several processes train: row gradients stay in the process that found them, so each
    would get tables of its own beside equal weights."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if several and (processes := torch.distributed.get_world_size()) > 1:
        raise RuntimeError(
            f"{processes} processes train this memory, which is not supported yet: row gradients are not summed over "
            f"processes. Train in one, or with rows that do not learn (train_tables=False, encoded tables, "
            f"memory.requires_grad_(False))"
        )


def _finish_load(memory: EngramMemory, incompatible_keys: Any) -> None:
    """Once a state dict is read, the memory's tables included."""
    if memory._replaced:
        memory.mark_finished()
    memory._replaced = False


class EngramMemory(nn.Module):
    """The n-gram memory of one model: a table and a fusion module for each of config.layers.

    The tables stay in host memory whatever device the module moves to, and are no nn.Parameters: train them with
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
        tables: {layer: table} to read from instead of new ones, all of them encoded or none.

    Raises:
        ValueError: a token map that cannot belong to the config (size, or pad_id outside it); a folder that is a saved
        memory, whose rows would no longer have the digests of its manifest once they were trained in place, or one
        with rows of another memory; tables of another shape than the config's.
    """

    def __init__(
        self,
        config: EngramConfig,
        token_map: TokenMap,
        hidden_size: int,
        streams: int = 1,
        folder: Any = None,
        tables: Mapping[int, HostTable] | None = None,
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
        self.hasher = NgramHasher(self.layout, token_map)
        # Ids that the model may be given. Those beyond the token map (embeddings are padded, tokenizers grow) are dead.
        self.vocab_size = len(token_map.table)
        self.tables = Tables(tables or {})
        self.fusions = nn.ModuleDict({str(i): EngramFusion(config, hidden_size, streams) for i in config.layers})
        self.codec: str | None = None
        self._rows_folder: Path | None = None  # with a rows.json of this memory
        self._marked = False  # rows.json says that rows are unfinished
        self._cut_short: str | None = None  # why the rows that were opened must not be used
        if tables is None:
            self._make_tables(None if folder is None else Path(folder))
        shapes = {layer: (table.rows, table.dim) for layer, table in self.tables.items()}
        wanted = {layer: (self.layout.rows[layer], config.head_dim) for layer in config.layers}
        codecs = {t.codec.name if isinstance(t, EncodedTable) else None for t in self.tables.values()}
        if shapes != wanted or len(codecs) != 1:
            raise ValueError(f"the tables given are {shapes}, stored as {codecs}; the configuration needs {wanted}")
        self.codec = codecs.pop()
        for layer, table in self.tables.items() if self.codec is None else ():
            made = unwritten(config.table_dtype, config.table_init, config.table_std, table_seed(config, layer))
            found = unwritten(str(table.dtype).removeprefix("torch."), table.init, table.std, table.seed)
            if found != made:
                raise ValueError(
                    f"the table of layer {layer} is of (dtype, init, std, seed) {found}, the configuration makes "
                    f"{made}: rows never written would read otherwise once it is saved and loaded"
                )
        # (row ids, gradient) of each backward pass since the optimiser's last step
        self.gradients: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in config.layers}
        self._looked: dict[int, int] = {}  # layer -> the backward pass that last looked for stale ones
        self.has_optimizer = False  # whether an EngramOptimizer was made for it
        self._frozen = False
        self.clock = {"hashing": 0.0, "waiting": 0.0, "updating": 0.0}  # seconds since the caller last set them to 0
        self.recalls: WeakList[Recall] = WeakList()  # that live, told of every change of rows
        self.recalls_are_stale = False  # rows have changed, and an interrupt kept patch() from renewing them
        self.attachment: Any = None  # to a model of another library (engram.attach)
        self._replaced = False  # by the load_state_dict under way: all rows
        self.register_load_state_dict_post_hook(_finish_load)

    def _make_tables(self, folder: Path | None) -> None:
        layers = self.config.layers
        paths = {layer: None if folder is None else folder / f"layer-{layer}.rows" for layer in layers}
        there = [layer for layer, path in paths.items() if path is not None and path.exists()]
        if folder is not None and there:
            self._check_rows_of(folder)
            if missing := sorted({*layers} - {*there}):
                raise ValueError(
                    f"{folder} holds the rows of layers {there} and not those of {missing}: bring them back, or give "
                    f"another folder"
                )
        elif folder is not None and torch.get_default_device().type == "meta":
            self.tables.before_rows = partial(self._begin_folder, folder)
        elif folder is not None:
            self._begin_folder(folder)
        try:
            for layer, path in paths.items():
                self.tables[layer] = new_table(self.config, layer, self.layout.rows[layer], path)
        except BaseException:
            for table in self.tables.values():
                table.close()
                if table.path is not None and not there:  # so that it can be tried again
                    table.path.unlink(missing_ok=True)
            raise

    def _begin_folder(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.claim(folder)

    def claim(self, folder: Path) -> None:
        """Record in rows.json which memory owns the row files in `folder`."""
        write_whole(folder / "rows.json", json.dumps(self._facts()).encode())
        self._rows_folder = folder

    def mark_unfinished(self, run: str | os.PathLike[str] | None) -> None:
        """Record in rows.json that the rows in files are being changed: until mark_finished they are not those of any
        checkpoint, and after a kill they are refused. run: folder of the checkpoints to go on from, if there is one."""
        if self._rows_folder is not None:
            mark = {"run": None if run is None else os.path.abspath(run)}
            write_whole(self._rows_folder / "rows.json", json.dumps({**self._facts(), "unfinished": mark}).encode())
            self._marked = True

    def mark_finished(self) -> None:
        """Record that all rows are those of one checkpoint, or of training that has ended."""
        self._cut_short = None
        if self._rows_folder is not None and self._marked:
            self.flush()
            self.claim(self._rows_folder)
            self._marked = False

    def flush(self) -> None:
        """Force rows in files to the disk."""
        for table in self.tables.values():
            table.flush()

    def check_finished(self) -> None:
        """Raise ValueError if the rows in files were left by training that was cut short, and no checkpoint was loaded
        over them since."""
        if self._cut_short is not None:
            raise ValueError(self._cut_short)

    def _check_mark(self, folder: Path, mark: Any) -> None:
        """Refuse rows that a killed run left, unless a checkpoint of that run can be loaded over them first."""
        run = mark.get("run") if isinstance(mark, dict) else None
        why = f"{folder} holds rows of training that was cut short: they are not those of any step"
        start = f"delete {folder / 'rows.json'} and the *.rows beside it to start again with new rows"
        if not isinstance(run, str) or not any((step / "manifest.json").is_file() for step in step_folders(run)):
            raise ValueError(f"{why}, and there is no checkpoint to go on from: {start}")
        self._cut_short = f"{why}. Load a checkpoint of {run} over them (training in that folder does), or {start}"

    def _check_rows_of(self, folder: Path) -> None:
        facts = folder / "rows.json"
        try:
            found = read_json(facts, "the record of a folder of rows")
            other = [name for name, value in self._facts().items() if not self._same(name, found.get(name), value)]
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{facts} does not say whose rows lie beside it ({type(error).__name__}): give another folder, or "
                f"delete the rows"
            ) from None
        if other:
            raise ValueError(
                f"{folder} holds rows of another memory ({', '.join(other)} differ): they would be read wrongly, or "
                f"training would begin with them. Give another folder, or delete the rows"
            )
        self._rows_folder = folder
        if found.get("unfinished") is not None:
            self._marked = True
            self._check_mark(folder, found["unfinished"])

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
            self.hasher = NgramHasher(self.layout, extended)
        self.vocab_size = max(self.vocab_size, len(extended.table))

    def unnamed(self, ids: Tensor) -> Tensor | None:
        """True at the ids (of the model's vocabulary) that the token map gives no class; None if there are none."""
        token_map, known = self.hasher.token_map, len(self.hasher.token_map.table)
        result = (ids >= known) & (ids < self.vocab_size)
        if token_map.has_dead:
            result |= (token_map.mark_dead(ids) < 0) & (ids >= 0)
        return result if bool(result.any()) else None

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
            dead: bool [B, T], True at positions that are no text (padding, images), whatever their id. They are never
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
        for name, given in (("documents", documents), ("dead", dead)):
            if given is not None and (not isinstance(given, Tensor) or given.shape != ids.shape):
                found = f"{type(given).__name__} {list(getattr(given, 'shape', []))}"
                raise ValueError(f"{name} must be a tensor of the ids' shape {list(ids.shape)}, not {found}")
        NgramHasher.check("ids", ids, ids)
        host, runs = _copy(ids), None  # the caller may fill its buffers anew while they are still hashed
        dead = None if dead is None else dead.to(ids.device, copy=True)
        if documents is not None:
            documents = documents.to(ids.device)
            changes = documents[:, 1:] != documents[:, :-1]
            runs = torch.nn.functional.pad(changes.cumsum(1), (1, 0))[:, : ids.shape[1]]
        if self.config.boundary == "dead" and bool((host == -1).any()):
            placeholders = (host == -1).to(ids.device)
            dead = placeholders if dead is None else dead | placeholders
        if (unnamed := self.unnamed(host)) is not None:
            dead = unnamed.to(ids.device) if dead is None else dead | unnamed.to(ids.device)
        if lookback is not None and (unnamed := self.unnamed(lookback)) is not None:
            lookback = lookback.masked_fill(unnamed, -1)
        if dead is not None:
            begins = dead.cumsum(1)  # each begins a run, of which it is padding
            runs = begins if runs is None else runs + begins
            host = host.masked_fill(dead.cpu(), self.config.pad_id)
            if lookback is not None:  # a dead first position ends the n-grams around it
                lookback = lookback.masked_fill(dead[:, :1].to(lookback.device), -1)
        if cache is None:
            return self._new_recall(host, lookback, runs, ids.device, dead)
        if host.numel() and not 0 <= int(host.min()) <= int(host.max()) < len(self.hasher.token_map.table):
            self.hasher(host)  # raises: a cache must not take up what is refused
        held = host if dead is None else host.masked_fill(dead.cpu(), -1)
        piece = cache.prepare(held, None if runs is None else runs.cpu(), self.config.orders[-1] - 1, self.lag)
        runs = None if piece.runs is None else piece.runs.to(ids.device)
        recall = self._new_recall(host, piece.lookback, runs, ids.device, dead)
        recall.cache, recall.start, recall.number = cache, piece.start, piece.number
        cache.take(piece)  # last: an error or an interruption before leaves the cache as it was
        return recall

    def _new_recall(
        self, host: Tensor, lookback: Tensor | None, runs: Tensor | None, device: torch.device, dead: Tensor | None
    ) -> Recall:
        return Recall(self, host, None if lookback is None else _copy(lookback), runs, device, dead)

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

    def _renew_recalls(self) -> None:
        """Before all rows change: recalls in flight will fetch theirs anew."""
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
        """Whether rows learn: config.train_tables, until the tables are encoded or the memory is frozen."""
        return self.config.train_tables and self.codec is None and not self._frozen

    @property
    def collects_gradients(self) -> bool:
        """Whether a forward pass at this moment takes row gradients in its backward pass."""
        return self.training and torch.is_grad_enabled() and self.trains_tables

    def requires_grad_(self, requires_grad: bool = True) -> EngramMemory:
        """Freezes the fusion weights and the rows (False), or lets both learn."""
        self._frozen = not requires_grad
        return super().requires_grad_(requires_grad)

    def check_writable(self) -> None:
        """Raises PermissionError where a table cannot be trained: no gradient is gathered for rows that cannot."""
        for table in self.tables.values():
            table.check_writable()

    def drop_stale_gradients(self, layer: int) -> None:
        """Forgets the row gradients of passes whose weight gradients are gone (model.zero_grad()): the rows are no
        parameters that it could reach. Warns where gradients wait that no optimiser will ever use."""
        pending = self.gradients[layer]
        if not pending:
            return
        if not self.has_optimizer:
            warnings.warn(
                "backward passes find gradients of table rows, and no optimizer was made that knows rows: they do not "
                "learn. Make it with engram.build_optimizer(model), or freeze the memory: memory.requires_grad_(False)",
                stacklevel=2,
            )
        weights = [weight for weight in self.fusions[str(layer)].parameters() if weight.requires_grad]
        gone = all(weight.grad is None for weight in weights)  # zeros say nothing: rows of zeros give such gradients
        if gone and (weights or not self.has_optimizer):  # frozen weights tell nothing where somebody will use the rows
            pending.clear()

    @uncompiled
    def _look_before_backward(self, layer: int, update: Tensor) -> None:
        """Has drop_stale_gradients looked once in each backward pass, before it leaves gradients of its own: what the
        caller cleared between a forward and a backward pass would look alive again."""
        memory = weakref.ref(self)

        def look(grad: Tensor) -> None:
            found, running = memory(), torch._C._current_graph_task_id()  # another number for every backward pass
            if found is not None and found._looked.get(layer) != running:
                found._looked[layer] = running
                found.drop_stale_gradients(layer)

        if update.requires_grad:
            update.register_hook(look)

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
        paths = {layer: None if folder is None else Path(folder) / f"layer-{layer}.{name}" for layer in self.tables}
        for path in filter(None, paths.values()):  # before the work
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                raise ValueError(f"{path} exists already: give another folder, or delete it")
        encoded: dict[int, EncodedTable] = {}
        try:
            with ExitStack() as stack:  # all layers come to their places together, once all are whole
                home = None if folder is None else stack.enter_context(partial_folder(Path(folder) / f"tables.{name}"))
                for layer, table in self.tables.items():
                    new = None if home is None else home / f"layer-{layer}.{name}"
                    encoded[layer] = encode_table(table, codec, new)
                for layer, final in paths.items():
                    if final is not None:
                        place_table(encoded[layer], final)
        except BaseException as error:
            for layer, made in encoded.items():  # so that it can be tried again
                made.close()
                if made.path is not None and made.path == paths[layer]:
                    made.path.unlink(missing_ok=True)
                    made.codebook_path.unlink(missing_ok=True)
            if isinstance(error, NotSynced):  # it says that a file is in place, which is removed now
                raise OSError(error.errno, f"the disk did not confirm the encoded tables in {folder}") from error
            raise
        self._renew_recalls()
        self.close()
        self.tables, self.codec, self._rows_folder = Tables(encoded), name, None
        for pending in self.gradients.values():
            pending.clear()

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
        from engram.memory.saved import save_memory

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
        from engram.memory.saved import load_memory

        return load_memory(folder, mode, token_map, rows_in)

    def close(self) -> None:
        """Lets go of all tables (mapped files are flushed)."""
        for table in self.tables.values():
            table.close()

    # The tables travel in the state dict, with the facts that say which rows they are.

    def _facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "layout": self.layout.digest,
            "token_map": self.hasher.token_map.digest,
            "init": [self.config.table_init, self.config.table_std, self.config.seed],
            "dtype": self.config.table_dtype,
        }
        return facts if self.codec is None else {**facts, "codec": self.codec}

    def _same(self, name: str, saved: Any, mine: Any) -> bool:
        """Return True if a saved fact agrees with this memory's. A token map may have been extended meanwhile."""
        return saved == mine or (name == "token_map" and self.hasher.token_map.is_extended_from(str(saved)))

    def get_extra_state(self) -> Tensor:
        facts = json.dumps(self._facts(), sort_keys=True)
        return torch.tensor(list(facts.encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        saved, mine = (parse_json(bytes(s.tolist())) for s in (state, self.get_extra_state()))
        names = ("token_map", "token map"), ("layout", "hash layout"), ("init", "init"), ("dtype", "dtype")
        for name, what in (*names, ("codec", "row codec")):
            if not self._same(name, saved.get(name), mine.get(name)):
                raise ValueError(
                    f"the saved memory has another {what} ({saved.get(name)}) than this model ({mine.get(name)}): its "
                    f"rows would be read wrongly"
                )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for layer, books in self._codebooks().items():
            destination[f"{prefix}codebooks.{layer}"] = books

    @property
    def codebooks(self) -> SimpleNamespace:
        """Codebooks of product-quantised tables under the names that state_dict() gives them."""
        return SimpleNamespace(**{str(layer): books for layer, books in self._codebooks().items()})

    def _codebooks(self) -> dict[int, Tensor]:
        codecs = {layer: table.codec for layer, table in self.tables.items() if isinstance(table, EncodedTable)}
        return {layer: codec.codebooks for layer, codec in codecs.items() if isinstance(codec, PQ)}

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        self.check_writable()
        self._renew_recalls()
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        targets = {f"{prefix}tables.{layer}": table.stored_shape for layer, table in self.tables.items()}
        targets |= {f"{prefix}codebooks.{layer}": books.shape for layer, books in self._codebooks().items()}
        live = self.state_dict()
        own = {key: live[key.removeprefix(prefix)].data_ptr() for key in targets}
        if all(key in state_dict and state_dict[key].data_ptr() != own[key] for key in targets):
            self.mark_unfinished(None)
            self._replaced = all(state_dict[key].shape == shape for key, shape in targets.items())
        for layer, target in self._codebooks().items():  # the rows are read after them, by self.tables
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
            "gradients": {layer: [] for layer in self.config.layers},
            "clock": dict.fromkeys(self.clock, 0.0),
            "attachment": memo.get(id(self.attachment)),
            "_replaced": False,
            "_rows_folder": None,
            "_marked": False,
            "_looked": {},
            "has_optimizer": False,
        }
        shared = {"config", "layout", "hasher"}  # which nothing changes
        for name, value in self.__dict__.items():
            twin.__dict__[name] = (
                fresh[name] if name in fresh else value if name in shared else copy.deepcopy(value, memo)
            )
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
