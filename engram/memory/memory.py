"""EngramMemory: addressing + tables + fusion for all layers of one model. The one object a backbone talks to.

recall = self.memory.recall(ids)                 # hash once for all layers; fetching starts now
for i, block in enumerate(self.blocks):
    if i in self.memory:
        x = x + self.memory[i](x, recall)        # waits only if its rows have not arrived
    x = block(x)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, is_grad_enabled, nn

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
from engram.tables import Table


class EngramMemory(RowState):
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
        self.hasher, size = extended_hasher(self.hasher, self.layout, grown)
        self.vocab_size = max(self.vocab_size, size)

    def unnamed(self, ids: Tensor) -> Tensor | None:
        """Return True at ids of the model's vocabulary that have no class in the token map; None if there are none."""
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
        if cache is None:
            return Recall(self, at.ids, at.lookback, at.documents, ids.device, at.dead)
        at, piece = after_cache(at, cache, self.config, self.hasher, self.lag, ids.device)
        recall = Recall(self, at.ids, at.lookback, at.documents, ids.device, at.dead)
        recall.cache, recall.start, recall.number = cache, piece.start, piece.number
        cache.take(piece)  # last: an error or an interruption before leaves the cache as it was
        return recall

    @property
    def lag(self) -> int:
        """Positions that the convolutions reach back."""
        return self.config.dilation * max(0, self.config.conv_kernel - 1)

    def _fuse(self, layer: int, hidden: Tensor, recall: Recall) -> Tensor:
        history = recall.inputs_before(layer) if self.config.conv_kernel else None
        on_device_of_ids = (recall.rows(layer), recall.documents, recall.dead)  # hidden may lie on another one
        rows, documents, dead = (None if x is None else x.to(hidden.device) for x in on_device_of_ids)
        fusion = self.fusions[str(layer)]
        update, inputs = fusion(rows, hidden, documents, history, dead)
        if self.collects_gradients:
            self.gradients.look_before_backward(layer, update, fusion)
        if inputs is not None:
            recall.keep_inputs(layer, inputs)
        return update

    @property
    def trains_tables(self) -> bool:
        """True if rows learn: config.train_tables, until the tables are encoded or the memory is frozen."""
        return self.config.train_tables and self.codec is None and not self._frozen

    @property
    def collects_gradients(self) -> bool:
        """True if a forward pass at this moment takes row gradients in its backward pass."""
        return self.training and is_grad_enabled() and self.trains_tables

    def requires_grad_(self, requires_grad: bool = True) -> EngramMemory:
        """Freezes the fusion weights and the rows (False), or lets both learn."""
        self._frozen = not requires_grad
        return super().requires_grad_(requires_grad)

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

    def __deepcopy__(self, memo: dict[int, Any]) -> EngramMemory:
        """Return a memory of its own, with the rows of this moment in memory; rows that were opened read-only stay
        shared. It has no optimizer and no row gradients. A copy of a model with an attached memory gets a copy attached
        to it.

        Raises:
            MemoryError: the rows do not fit.
        """
        attachment = memo.get(id(self.attachment))
        return self._copy(memo, clock=dict.fromkeys(self.clock, 0.0), attachment=attachment)
