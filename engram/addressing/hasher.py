"""N-gram hashing: raw token ids -> row ids of every layer, with the boundary rules.

On the host one pass of C (hash.c) computes all layers, orders and heads on every core. On an accelerator, or without
the compiled kernels, torch operations compute them. Both give the same bits.
"""

from __future__ import annotations

import ctypes
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch

from ..tables import kernels
from .layout import LAYER_SEED, HashLayout
from .token_map import TokenMap

Ids = TypeVar("Ids", np.ndarray, torch.Tensor)


class _Plan(ctypes.Structure):
    """The struct engram_hash_plan of hash.c."""

    _fields_ = (
        [("table", ctypes.c_void_p)]
        + [(name, ctypes.c_int64) for name in ("vocab", "pad", "layers", "orders", "heads")]
        + [(name, ctypes.c_int64) for name in ("longest", "xxh64", "large_moduli", "dead", "eos")]
        + [(name, ctypes.c_void_p) for name in ("order", "multipliers", "seeds", "moduli")]
        + [(name, ctypes.c_void_p) for name in ("reciprocals", "inverses", "offsets")]
    )


_kernel: Any = None if kernels.native is None else kernels.native.engram_hash


class NgramHasher:
    """Row ids of every n-gram, for all layers of a layout at once. Deterministic, without state between calls.

    hasher(ids, lookback=None, documents=None, out=None) -> {layer: int64 [B, T, C]}, offsets included, order-major:
    C = orders x heads columns.

    Positions before the start of a text read as the layout's pad_id. Once a step back meets the start, another document
    or what else the layout's boundary rule names, every older position of that window reads as pad_id too. The window
    of a dead position is all pad; its rows must not be used. A dead id of the token map (see TokenMap.extend) counts
    as -1.

    Args:
        ids: [B, T] raw token ids, int32 or int64. With the boundary rule "dead", -1 marks a dead position.
        lookback: [B, <= N-1] the ids just before them (N = the longest order), oldest first, so that a text hashed in
            pieces gives the same rows as in one call. They belong to the document of position 0. A negative id is
            before the start of the text, and so is everything older.
        documents: [B, T] document numbers. A position in another document counts as before the start.
        out: int64 [layers, B, T, C] to fill; the result then consists of views of it. Allocating new memory for the
            rows costs more time than the hashing.

    All are NumPy arrays, or torch tensors on one device; the result is of the same kind, on the same device.

    Raises:
        ValueError: a negative id in ids, wrong shapes, a token map of another size than the layout was built for.
        IndexError: an id outside the token map.
        TypeError: other dtypes or kinds.

    Source:
        the paper, section 2.2, and the released demo; the dialects are listed in paper_notes/dialects.md.

    Example:
        >>> import numpy as np
        >>> import engram
        >>> layout = engram.HashLayout.build(100, layers=(1,), orders=(2, 3), heads=2, rows_per_head=50, pad_id=0)
        >>> hasher = engram.NgramHasher(layout, engram.TokenMap.identity(100))
        >>> rows = hasher(np.array([[5, 6, 7, 5, 6, 7]]))
        >>> rows[1].shape, rows[1].dtype
        ((1, 6, 4), dtype('int64'))
        >>> bool((rows[1][0, 2] == rows[1][0, 5]).all())  # the same trigram and bigram: the same rows
        True
        >>> bool((rows[1][0, 0] == rows[1][0, 3]).all())  # other tokens before it: other rows
        False
    """

    def __init__(self, layout: HashLayout, token_map: TokenMap):
        if token_map.size != layout.compressed_vocab:
            raise ValueError(
                f"the token map has {token_map.size} compressed ids (digest {token_map.digest[:12]}), the layout was "
                f"built for {layout.compressed_vocab}: it belongs to another tokenizer or version, and every row "
                "would be wrong. Pass the token map that the layout was built with"
            )
        self.layout = layout
        self.token_map = token_map
        layers = layout.layers
        self._moduli = np.array([[p for heads in layout.moduli[layer] for p in heads] for layer in layers], np.int64)
        self._offsets = np.array([layout.offsets[layer] for layer in layers], np.int64)
        self._multipliers = np.array([layout.multipliers[layer] for layer in layers], np.int64)
        self._seeds = [(layout.seed + LAYER_SEED * layer) % 2**64 for layer in layers]
        self._constants: dict[torch.device, tuple[torch.Tensor, ...]] = {}  # for the torch path
        self._plan_arrays = {  # the plan stores bare addresses: these references keep the memory alive
            "table": token_map.table,
            "order": np.array(layout.orders, np.int64),
            "multipliers": self._multipliers,
            "seeds": np.array(self._seeds, np.uint64),
            "moduli": self._moduli,
            "reciprocals": np.uint64(2**64 - 1) // self._moduli.astype(np.uint64),
            "inverses": (1.0 / self._moduli) * (1.0 - 2.0**-50),
            "offsets": self._offsets,
        }
        self._plan = _Plan(
            vocab=len(token_map.table),
            pad=layout.pad_id,
            layers=len(layers),
            orders=len(layout.orders),
            heads=layout.heads,
            longest=layout.orders[-1],
            xxh64=layout.family == "xxh64",
            large_moduli=int(self._moduli.min()) >= 2**15,
            dead=layout.boundary == "dead",
            eos=layout.boundary == "eos",
            **{name: array.ctypes.data for name, array in self._plan_arrays.items()},
        )
        # Row ids of a piece, below which one core alone is as fast or faster: half a millisecond of work, most of it
        # memory traffic, against 50 us and more to wake another core (paper_notes/decisions.md).
        self._smallest = max(1, 2**20 // self._moduli.size)

    def __call__(
        self, ids: Ids, lookback: Ids | None = None, documents: Ids | None = None, out: Ids | None = None
    ) -> dict[int, Ids]:
        self.check("ids", ids, ids)
        if lookback is not None:
            self.check("lookback", lookback, ids)
            if lookback.shape[0] != ids.shape[0] or lookback.shape[1] > self.layout.orders[-1] - 1:
                raise ValueError(
                    f"lookback has shape {list(lookback.shape)}: for ids of shape {list(ids.shape)} and n-grams of up "
                    f"to {self.layout.orders[-1]} tokens it must be [{ids.shape[0]}, 0..{self.layout.orders[-1] - 1}]"
                )
        if documents is not None:
            self.check("documents", documents, ids)
            if documents.shape != ids.shape:
                raise ValueError(f"documents has shape {list(documents.shape)}, ids {list(ids.shape)}: must be equal")

        if self.token_map.has_dead:
            ids, lookback = self._mark_dead(ids, lookback)
        shape = (len(self.layout.layers), *ids.shape, self.layout.columns)
        if out is not None:
            self._check_out(out, ids, shape)
        arrays: list[Any] = [ids, lookback, documents]
        rows: Any
        if _kernel is None or (isinstance(ids, torch.Tensor) and ids.device.type != "cpu"):
            if isinstance(ids, np.ndarray):  # copies: torch cannot share read-only memory
                arrays = [a if a is None else torch.from_numpy(a.astype(np.int64)) for a in arrays]
            rows = self._in_torch(*arrays)
            rows = rows.numpy() if isinstance(ids, np.ndarray) else rows
            if out is not None:
                out[...] = rows
        else:
            target = out.numpy() if isinstance(out, torch.Tensor) else out
            if isinstance(ids, torch.Tensor):
                arrays = [a if a is None else a.numpy() for a in arrays]
            if target is None:
                target = np.empty(shape, np.int64)
            rows = self._in_c(arrays[0], arrays[1], arrays[2], target)
            rows = torch.from_numpy(rows) if isinstance(ids, torch.Tensor) else rows
        rows = rows if out is None else out
        return {layer: rows[i] for i, layer in enumerate(self.layout.layers)}

    def _mark_dead(self, ids: Any, lookback: Any) -> tuple[Any, Any]:
        """Write -1 for the ids that the token map calls dead: they are boundaries, as any -1 is."""
        marked = self.token_map.mark_dead(ids)
        if self.layout.boundary != "dead" and bool((marked != ids).any()):
            row, t = torch.as_tensor(marked != ids).nonzero()[0].tolist()
            raise ValueError(
                f"ids[{row}, {t}] is {int(ids[row, t])}, a dead id of the token map (added to the tokenizer after the "
                f"rows were addressed): it cannot be hashed. EngramMemory.recall skips such ids"
            )
        return marked, None if lookback is None else self.token_map.mark_dead(lookback)

    @staticmethod
    def _check_out(out: Any, ids: Any, shape: tuple[int, ...]) -> None:
        """Raise ValueError if the buffer does not fit: rows would be written to wrong positions."""
        fits = type(out) is type(ids) and tuple(out.shape) == shape and str(out.dtype).endswith("int64")
        contiguous = out.is_contiguous() if isinstance(out, torch.Tensor) else fits and out.flags.c_contiguous
        if not fits or not contiguous or (isinstance(out, torch.Tensor) and out.device != ids.device):
            raise ValueError(
                f"out must be a contiguous int64 {type(ids).__name__} {list(shape)} on the device of the ids"
            )

    @staticmethod
    def check(name: str, array: Any, ids: Any) -> None:
        """Raise TypeError or ValueError if an argument is not of the kind of the ids, or not [batch, time] of int32 or
        int64. Shapes and kinds are never adjusted silently."""
        kind: Any = torch.Tensor if isinstance(ids, torch.Tensor) else np.ndarray
        if not isinstance(array, kind):
            raise TypeError(
                f"{name} is {type(array).__name__}: the arguments must be all NumPy arrays, or all torch tensors"
            )
        if array.dtype not in ((torch.int64, torch.int32) if kind is torch.Tensor else (np.int64, np.int32)):
            raise TypeError(f"{name} must be int64 or int32, not {array.dtype}")
        if array.ndim != 2:
            raise ValueError(f"{name} must be [batch, time], not of shape {list(array.shape)}")
        if kind is torch.Tensor and array.device != ids.device:
            raise ValueError(f"{name} is on {array.device}, ids are on {ids.device}")

    def _in_c(
        self, ids: np.ndarray, lookback: np.ndarray | None, documents: np.ndarray | None, out: np.ndarray
    ) -> np.ndarray:
        batch, time = ids.shape
        n = batch * time
        if n == 0:
            return out
        arrays = [a if a is None else np.ascontiguousarray(a, np.int64) for a in (ids, documents, lookback)]
        addresses = [0 if a is None else a.ctypes.data for a in arrays]
        back = 0 if lookback is None else lookback.shape[1]
        plan = ctypes.addressof(self._plan)
        call = kernels.Call("hash", plan, *addresses, back, batch, time, out.ctypes.data)
        if kernels.spread(n, self._smallest, call, arrays, out, self) >= 0:
            self._refuse(ids, lookback)
        return out

    def _in_torch(
        self, ids: torch.Tensor, lookback: torch.Tensor | None, documents: torch.Tensor | None
    ) -> torch.Tensor:
        """Return int64 [layers, B, T, C] by the same steps as the kernel, vectorised over batch and time."""
        layout = self.layout
        batch, time = ids.shape
        if ids.numel() == 0:
            return ids.new_empty((len(layout.layers), batch, time, layout.columns), dtype=torch.int64)
        if lookback is None:
            lookback = ids[:, :0]
        vocab = len(self.token_map.table)
        lowest = -1 if layout.boundary == "dead" else 0
        if bool(((ids < lowest) | (ids >= vocab)).any()) or bool((lookback >= vocab).any()):
            self._refuse(ids.cpu().numpy(), lookback.cpu().numpy())
        if ids.device not in self._constants:
            arrays = (self.token_map.table, self._multipliers, self._moduli, self._offsets)
            self._constants[ids.device] = tuple(torch.from_numpy(a.copy()).to(ids.device) for a in arrays)
        table, multipliers, moduli, offsets = self._constants[ids.device]

        steps = layout.orders[-1] - 1
        missing = ids.new_full((batch, steps - lookback.shape[1]), -1)
        text = torch.cat([missing, lookback, ids], dim=1).to(torch.int64)  # [B, steps + T], -1 before the start
        compressed = table[text.clamp(min=0)]
        if documents is not None:
            documents = torch.cat([documents[:, :1].expand(-1, steps), documents], dim=1)
        alive = ids >= 0
        window = [torch.where(alive, compressed[:, steps:], layout.pad_id)]  # [i] is [B, T], i steps back
        for i in range(1, steps + 1):
            back = slice(steps - i, steps - i + time)
            alive = alive & (text[:, back] >= 0)
            if documents is not None:
                alive = alive & (documents[:, back] == documents[:, steps:])
            if layout.boundary == "eos":
                alive = alive & (compressed[:, back] != layout.pad_id)
            window.append(torch.where(alive, compressed[:, back], layout.pad_id))

        out = ids.new_empty((len(layout.layers), batch, time, layout.columns), dtype=torch.int64)
        for layer in range(len(layout.layers)):
            mix = window[0] * multipliers[layer, 0]
            column = 0
            for n in range(2, steps + 2):
                mix = mix ^ (window[n - 1] * multipliers[layer, n - 1])
                if n not in layout.orders:
                    continue
                columns = slice(column, column + layout.heads)
                p = moduli[layer, columns]
                if layout.family == "xxh64":
                    rest = _unsigned_remainder(_xxh64(window[n - 1 :: -1], self._seeds[layer])[..., None], p)
                else:
                    rest = mix[..., None] % p
                out[layer, ..., columns] = rest + offsets[layer, columns]
                column += layout.heads
        return out

    def _refuse(self, ids: np.ndarray, lookback: np.ndarray | None) -> NoReturn:
        """Raise for the first id that cannot be hashed. Negative ids are legal in lookback only."""
        vocab = len(self.token_map.table)
        dead = self.layout.boundary == "dead"
        name, array, bad = "ids", ids, (ids < (-1 if dead else 0)) | (ids >= vocab)
        if lookback is not None and (lookback >= vocab).any():
            name, array, bad = "lookback", lookback, lookback >= vocab
        row, t = (int(i) for i in np.argwhere(bad)[0])
        if array[row, t] < 0:
            raise ValueError(
                f"{name}[{row}, {t}] is {array[row, t]}: placeholder ids (rejected draft tokens, padding, ignored "
                f"labels) must be removed before hashing{'; only -1 marks a dead position' if dead else ''}"
            )
        raise IndexError(
            f"{name}[{row}, {t}] is {array[row, t]}, outside the token map's vocabulary of {vocab}: "
            "was the text encoded by another tokenizer? (a model's vocabulary can be padded beyond its tokenizer's)"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return NgramHasher, (self.layout, self.token_map)  # the plan stores addresses; a copy must build its own


def _signed(value: int) -> int:
    """Return the int64 with the same 64 bits: torch multiplies and adds int64 modulo 2**64, as XXH64 requires."""
    return (value + 2**63) % 2**64 - 2**63


_P1, _P2, _P3, _P4, _P5 = (
    0x9E3779B185EBCA87,
    0xC2B2AE3D27D4EB4F,
    0x165667B19E3779F9,
    0x85EBCA77C2B2AE63,
    0x27D4EB2F165667C5,
)


def _shift(x: torch.Tensor, by: int) -> torch.Tensor:
    """Return x >> by as if x were unsigned."""
    return (x >> by) & (2 ** (64 - by) - 1)


def _rotate(x: torch.Tensor, by: int) -> torch.Tensor:
    return (x << by) | _shift(x, 64 - by)


def _round(lane: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    return _rotate(lane + word * _signed(_P2), 31) * _signed(_P1)


def _xxh64(words: list[torch.Tensor], seed: int) -> torch.Tensor:
    """Return the bits of XXH64 of 64-bit words, elementwise over equal int64 tensors, first word first."""
    zero = torch.zeros_like(words[0])
    n = len(words)
    hash = zero + _signed(seed + _P5)
    if n >= 4:  # blocks of 32 bytes, one word per lane
        lanes = [zero + _signed(seed + start) for start in (_P1 + _P2, _P2, 0, -_P1)]
        for i in range(n - n % 4):
            lanes[i % 4] = _round(lanes[i % 4], words[i])
        hash = _rotate(lanes[0], 1) + _rotate(lanes[1], 7) + _rotate(lanes[2], 12) + _rotate(lanes[3], 18)
        for lane in lanes:
            hash = (hash ^ _round(zero, lane)) * _signed(_P1) + _signed(_P4)
    hash = hash + 8 * n
    for word in words[n - n % 4 :]:
        hash = _rotate(hash ^ _round(zero, word), 27) * _signed(_P1) + _signed(_P4)
    hash = (hash ^ _shift(hash, 33)) * _signed(_P2)
    hash = (hash ^ _shift(hash, 29)) * _signed(_P3)
    return hash ^ _shift(hash, 32)


def _unsigned_remainder(x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Return x mod p of the unsigned number in the bits of x: x = 2*half + last."""
    return ((_shift(x, 1) % p) * 2 + (x & 1)) % p
