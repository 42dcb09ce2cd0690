"""EngramMemory: addressing + tables + fusion for all layers of one model. A backbone uses only this object.

recall = self.memory.recall(ids)                 # hash once for all layers; fetching starts now
for i, block in enumerate(self.blocks):
    if i in self.memory:
        x = x + self.memory[i](x, recall)        # waits only if its rows have not arrived
    x = block(x)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, is_grad_enabled, nn, no_grad, zeros_like

from engram.addressing import NgramHasher, TokenMap
from engram.config import EngramConfig
from engram.memory.build import check_arguments, extended_hasher, hash_layout, make_fusions
from engram.memory.cache import MemoryCache
from engram.memory.compilation import refuse_recording, uncompiled
from engram.memory.gradients import check_processes
from engram.memory.positions import after_cache, locate, unnamed
from engram.memory.recall import Recall
from engram.memory.row_state import RowState
from engram.memory.saved import load_parts, save_memory
from engram.memory.switches import make_switch, switched
from engram.tables import Table


class EngramMemory(RowState):
    """The n-gram memory of one model: a table and a fusion module for each of config.layers.

    The tables stay in host memory on whatever device the module is, and are not nn.Parameters: train them with
    engram.build_optimizer. state_dict() holds them nevertheless (as views, not copies), so saving a model the usual way
    saves its memory, and loading refuses rows that were addressed by another layout or token map. Rows learn in train()
    mode; memory.requires_grad_(False) freezes them with the fusion weights, but the same call on a model around the
    memory freezes its weights alone.

    Args:
        config: shape and rules. token_map: of the tokenizer whose ids are looked up. hidden_size: d.
        streams: residual streams M of the backbone.
        folder: keep the tables in files layer-<i>.rows of this folder instead of RAM. Existing rows are used if their
            rows.json names the same addresses, token map and initial rows. Rows that a killed train() left are
            refused, or, if that run has checkpoints, must not be used before one is loaded.
        tables: {layer: table} to read from instead of new ones, all of them encoded or none. With a hasher, they may
            have any number of rows.
        hasher: addresses rows instead of an NgramHasher. It is called like one, and its attribute token_map is
            `token_map`. Such a memory is not saved as a folder.
        fusions: {layer: module} instead of EngramFusion; called like it.

    Raises:
        ValueError: a token map that cannot belong to the config (size, or pad_id outside it); a folder that is a saved
        memory, whose rows would no longer have the digests of its manifest once they were trained in place, or one
        with rows of another memory; tables of another shape than the config's; a hasher of another token map; fusions
        of other layers.

    Example:
        >>> import torch
        >>> from engram import EngramConfig, EngramMemory, TokenMap
        >>> config = EngramConfig(layers=(1,), orders=(2, 3), heads=2, head_dim=8, rows_per_head=500)
        >>> memory = EngramMemory(config, TokenMap.identity(100), hidden_size=16)
        >>> ids, hidden = torch.tensor([[5, 7, 5, 7]]), torch.randn(1, 4, 16)
        >>> (hidden + memory[1](hidden, memory.recall(ids))).shape
        torch.Size([1, 4, 16])
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
        check_arguments(config, token_map, folder)
        layout = hash_layout(config, token_map)
        any_rows, hasher = hasher is not None, NgramHasher(layout, token_map) if hasher is None else hasher
        if hasher.token_map is not token_map:
            raise ValueError("the hasher has another token map than the memory: make it with the same TokenMap object")
        modules = make_fusions(config, hidden_size, streams, fusions)
        super().__init__(config, layout, hasher, tables, folder, any_rows)
        self.hidden_size, self.streams = hidden_size, streams
        self.fusions = nn.ModuleDict({str(layer): modules[layer] for layer in config.layers})
        # Ids that the model may be given. Those beyond the token map (embeddings are padded, tokenizers grow) are dead.
        self.vocab_size = len(token_map.table)
        self.clock = {"hashing": 0.0, "waiting": 0.0, "updating": 0.0}  # seconds since the caller last set them to 0
        self.attachment: Any = None  # to a model of another library (engram.attach)
        self._frozen = False

    def detach(self) -> nn.Module:
        """Undo engram.attach: return the model as it was, without hooks or memory.

        Raises:
            ValueError: the memory is not attached.
        """
        if self.attachment is None:
            raise ValueError("this memory is not attached to a model")
        attachment, self.attachment = self.attachment, None
        attachment.remove()
        self.vocab_size = len(self.hasher.token_map.table)
        return attachment.model

    def extend(self, grown: Any) -> None:
        """Accept tokens that were added to the tokenizer since the rows were addressed; see TokenMap.extend. Rows and
        digests stay; the token map itself changes only if a new token joins the class of an old one.

        Args:
            grown: the tokenizer after tokens were added, or its TokenMap.

        Raises:
            ValueError: another tokenizer, or one that lacks ids of the token map.
        """
        self.hasher, size = extended_hasher(self.hasher, self.layout, grown)
        self.vocab_size = max(self.vocab_size, size)

    def unnamed(self, ids: Tensor) -> Tensor | None:
        """Return True at ids of the model's vocabulary that have no class in the token map; None if there are none."""
        return unnamed(ids, self.hasher.token_map, self.vocab_size)

    def __contains__(self, layer: int) -> bool:
        return layer in self.tables

    def __getitem__(self, layer: int) -> Callable[[Tensor, Recall], Tensor]:
        """Return the fusion of a layer: memory[i](hidden, recall) is the update to add to the hidden state [B, T, d]
        (or [B, T, M, d]) before block i."""
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
        """Hash the ids for all layers and start to fetch their rows.

        Args:
            ids: int64 [B, T] token ids; -1 is a dead position with boundary="dead", else not allowed.
                An id of the model's vocabulary (vocab_size) that has no class in the token map is dead too.
            documents: [B, T] document numbers of a packed batch; n-grams and convolution never cross a document.
            lookback: [B, <= N-1] the ids just before `ids`, if the text continues an earlier piece. They complete
                n-grams; a convolution reaches back to that piece only with a cache.
            cache: decoding state, which replaces `lookback` and is updated. `ids` continue its text.
            dead: bool [B, T], True at positions that are not text (padding, images), whatever their id. They are never
                hashed, end n-grams and convolution like the start of a document, and get nothing from the memory.

        Raises:
            IndexError: an id outside the vocabulary. ValueError: placeholder ids, shapes that do not match, or a cache
            together with a lookback.

        Example:
            >>> import torch
            >>> from engram import EngramConfig, EngramMemory, TokenMap
            >>> config = EngramConfig(layers=(1, 3), orders=(2, 3), heads=2, head_dim=8, rows_per_head=500)
            >>> memory = EngramMemory(config, TokenMap.identity(100), hidden_size=16)
            >>> recall = memory.recall(torch.tensor([[5, 7, 5, 7]]))
            >>> recall.row_ids[3].shape, recall.rows(3).shape  # 4 positions, 2 orders x 2 heads, rows of 8 values
            (torch.Size([1, 4, 4]), torch.Size([1, 4, 32]))
            >>> bool((recall.row_ids[3][0, 1, :2] == recall.row_ids[3][0, 3, :2]).all())  # the same bigram
            True
        """
        refuse_recording(ids)
        self.check_finished()
        if self.collects_gradients:
            check_processes()
        if cache is not None and lookback is not None:
            raise ValueError("a decoding cache has its own look-back: leave lookback out")
        at = locate(ids, documents, lookback, dead, self.config, self.unnamed)
        if cache is None:
            return Recall(self, at.ids, at.lookback, at.documents, ids.device, at.dead)
        at, piece = after_cache(at, cache, self.config, self.hasher, self.lag, ids.device)
        recall = Recall(self, at.ids, at.lookback, at.documents, ids.device, at.dead)
        recall.cache, recall.start, recall.number = cache, piece.start, piece.number
        cache.take(piece)  # last: an error or an interruption before leaves the cache as it was
        return recall

    def off(
        self,
        layers: int | Iterable[int] | None = None,
        orders: int | Iterable[int] | None = None,
        ngrams: Iterable[Sequence[int]] | None = None,
        positions: int | Iterable[int] | None = None,
    ) -> AbstractContextManager[None]:
        """Turn off, within a `with` block, the parts of the memory that all arguments select; by default everything.

        With orders or ngrams, the rows that they select read as zeros. Without, the update is zero: the model computes
        what it would without a memory there. Convolutions still run, so decoding may continue in or outside the block.
        Blocks nest, and each adds to what is off. A block acts on forward passes of its own thread (or asyncio task),
        and also on a pass whose recall was made in it. Rows that are off in a training pass get gradients of zero, none
        if their whole layer is off.

        If the memory was attached to a model that had adapters of PEFT already, it is off too wherever they are
        disabled (`with model.disable_adapter():`). Both ways give the reference model of preference training.

        Args:
            layers: layers of the memory. orders: n-gram lengths.
            ngrams: n-grams as sequences of token ids, each as long as an order. N-grams that read the same rows in all
                heads are off with them.
            positions: positions in each sequence of ids, counted from the start of the text when decoding with a cache.

        Raises:
            ValueError: layers or orders that the memory does not have, n-grams of another length or with ids that are
            not text, negative positions. TypeError: something else than integers. IndexError: an id outside the
            vocabulary.

        Example:
            >>> import engram, torch
            >>> config = engram.EngramConfig(layers=(0, 1), orders=(2, 3), heads=2, head_dim=4, rows_per_head=50)
            >>> memory = engram.EngramMemory(config.replace(table_init="normal"), engram.TokenMap.identity(20), 8)
            >>> model = engram.Transformer(engram.TransformerConfig(20, hidden_size=8, layers=2, heads=2), memory)
            >>> ids = torch.tensor([[3, 4, 5, 3, 4]])
            >>> with torch.no_grad():
            ...     on = model(ids)
            ...     with memory.off(ngrams=[(3, 4)]):
            ...         off = model(ids)
            >>> (on != off).any(-1).tolist()  # the bigram ends at positions 1 and 4; attention carries it on
            [[False, True, True, True, True]]
        """
        return switched(self, make_switch(self.config, self._row_ids, layers, orders, ngrams, positions))

    def _row_ids(self, ids: Tensor) -> Mapping[int, Tensor]:
        """Return the row ids of an n-gram [1, n] that is a text of its own."""
        if bool((ids < 0).any()) or self.unnamed(ids) is not None:
            raise ValueError(f"the n-gram {ids[0].tolist()} has ids that are not text: no row is read for it")
        return self.hasher(ids)

    @property
    def lag(self) -> int:
        """Number of positions that the convolutions reach back."""
        return self.config.dilation * max(0, self.config.conv_kernel - 1)

    def _fuse(self, layer: int, hidden: Tensor, recall: Recall) -> Tensor:
        history = recall.inputs_before(layer) if self.config.conv_kernel else None
        switched_rows, off = recall.switched_rows(layer)
        on_device_of_ids = (switched_rows, recall.documents, recall.dead)  # hidden may lie on another one
        rows, documents, dead = (None if x is None else x.to(hidden.device) for x in on_device_of_ids)
        fusion = self.fusions[str(layer)]
        if off is True:  # computed nevertheless: the convolution of later positions needs the inputs
            with no_grad():
                update, inputs = fusion(rows, hidden, documents, history, dead)
            update = zeros_like(update)
        else:
            update, inputs = fusion(rows, hidden, documents, history, dead)
            if isinstance(off, Tensor):
                update = update.masked_fill(off.to(update.device).view(*off.shape, *[1] * (update.dim() - 2)), 0)
        if self.collects_gradients:
            self.gradients.look_before_backward(layer, update, fusion)
        if inputs is not None:
            recall.keep_inputs(layer, inputs)
        return update

    @property
    def trains_tables(self) -> bool:
        """Return True if rows are trained: config.train_tables, until the tables are encoded or the memory frozen."""
        return self.config.train_tables and self.codec is None and not self._frozen

    @property
    def collects_gradients(self) -> bool:
        """Return True if a forward pass now collects row gradients in its backward pass."""
        return self.training and is_grad_enabled() and self.trains_tables

    def requires_grad_(self, requires_grad: bool = True) -> EngramMemory:
        """Freeze the fusion weights and the rows (False), or train both (True)."""
        self._frozen = not requires_grad
        return super().requires_grad_(requires_grad)

    def save(self, folder: str | os.PathLike[str], overwrite: bool = False) -> Path:
        """Write the memory (addresses, rows, fusion weights; no optimizer state) as one folder. Return the folder.

        The folder appears complete or not at all, also after a kill at any moment. Rows never written take no disk
        space. No training step may run meanwhile.

        Args:
            overwrite: replace an existing saved memory, which stays until the new one is complete. Readers that have
                opened it keep it.

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
        """Load a memory that `save` wrote.

        Args:
            mode: "copy" reads the rows into tables of this process, after which the folder is no longer needed, and
                checks every digest. "shared" maps the rows read-only: rows are read on first use, all processes that
                map them share one copy in the page cache, and tables may be larger than memory. Such rows cannot be
                trained: the memory is in eval() mode, forward passes in train() mode and optimizers raise
                PermissionError; the fusion weights can be trained in eval() mode. Some blocks of every table are
                checked, all of them by `engram verify`.
            token_map: of the tokenizer in use. It must be the one that the rows were written with, or the same
                tokenizer with tokens added (see TokenMap.extend). Default: the saved token map.
            rows_in: with "copy", a folder that keeps the new tables in files instead of RAM, for training
                tables larger than memory.

        Raises:
            FileNotFoundError: the folder has no saved memory. ValueError: a torn, truncated, swapped, altered or
            foreign file, by name; another token map. BlockingIOError: a row file is locked for writing.
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

    def __deepcopy__(self, memo: dict[int, Any]) -> EngramMemory:
        """Return an independent copy, with the present rows in memory; rows that were opened read-only stay shared.
        It has no optimizer and no row gradients. A copy of a model with an attached memory gets a copy attached
        to it.

        Raises:
            MemoryError: the rows do not fit.
        """
        attachment = memo.get(id(self.attachment))
        return self._copy(memo, clock=dict.fromkeys(self.clock, 0.0), attachment=attachment)
