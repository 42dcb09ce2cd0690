"""MemoryCache: decoding state of a text. Its size and the cost of a step do not depend on the length of the text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

REWIND = 256  # default number of positions that a cache can take back
_IN_FLIGHT = 64  # recalls beyond those of the margin whose position in the text is kept


@contextmanager
def _ordinary_tensors() -> Iterator[None]:
    """Leave inference mode: its tensors cannot be written outside it, and decoding may leave it between two pieces."""
    grad = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        yield


class _Tail(NamedTuple):
    """The last positions of a text. A value: `extended` and `cut` return new tails, which share the buffer and write
    only to columns that no other tail uses. So an interrupted step leaves the old value unchanged.

    Attributes:
        buffer: [B, columns, ...]. stop: columns in use. end: the text's position after the last of them.
        spare: True if the columns after `stop` may be written.
    """

    buffer: Tensor
    stop: int
    end: int
    spare: bool = False

    @property
    def first(self) -> int:
        """The oldest position in the buffer."""
        return self.end - self.stop

    @classmethod
    def of(cls, x: Tensor, end: int, keep: int) -> _Tail:
        """Return a tail with x [B, T, ...], of which the last `keep` positions are needed."""
        if x.shape[1] > 2 * keep:
            x = x[:, x.shape[1] - keep :].clone()
        return cls(x, x.shape[1], end)

    def extended(self, x: Tensor, keep: int) -> _Tail:
        """Return a tail with x [B, T, ...] appended, which has at least the last `keep` positions. The buffer is twice
        that size and is replaced only when it is full, so a step costs O(T)."""
        stop, end = self.stop + x.shape[1], self.end + x.shape[1]
        same = (x.dtype, x.device) == (self.buffer.dtype, self.buffer.device)
        differentiable = x.requires_grad or self.buffer.requires_grad
        if self.spare and same and not differentiable and stop <= self.buffer.shape[1]:
            self.buffer[:, self.stop : stop] = x
            return _Tail(self.buffer, stop, end, True)
        kept = self.buffer[:, max(0, min(self.stop, stop - keep)) : self.stop]
        x = x[:, max(0, x.shape[1] - keep) :]
        if differentiable:
            return _Tail(torch.cat([kept.to(x.device), x], dim=1), kept.shape[1] + x.shape[1], end)
        stop = kept.shape[1] + x.shape[1]
        with _ordinary_tensors():
            shape = (x.shape[0], stop + keep, *x.shape[2:])
            buffer = torch.empty(shape, dtype=torch.promote_types(x.dtype, kept.dtype), device=x.device)
        buffer[:, : kept.shape[1]] = kept
        buffer[:, kept.shape[1] : stop] = x
        return _Tail(buffer, stop, end, True)

    def cut(self, end: int) -> _Tail:
        """Return a tail without the positions `end` and later."""
        return self if end >= self.end else self._replace(stop=self.stop - (self.end - end), end=end)

    def selected(self, sequences: Tensor) -> _Tail:
        """Return a tail of these sequences of the batch."""
        with _ordinary_tensors():
            return self._replace(buffer=self.buffer[sequences.to(self.buffer.device)])

    def copied(self) -> _Tail:
        with _ordinary_tensors():
            return self._replace(buffer=self.buffer.clone())

    def last(self, count: int) -> Tensor:
        """Return a view of the last `count` positions, or of all if there are fewer."""
        return self.buffer[:, max(0, self.stop - count) : self.stop]

    def between(self, start: int, end: int) -> Tensor:
        """Return a view of the positions start .. end - 1 of the text."""
        return self.buffer[:, start - self.first : end - self.first]


class _Piece(NamedTuple):
    """Positions start .. stop - 1 of the text, which the recall with this number added."""

    number: int
    start: int
    stop: int


class _State(NamedTuple):
    """The fields of a cache, replaced in one assignment: an interruption leaves the old state or the new one."""

    ids: _Tail | None  # [B, ...], -1 at dead positions
    documents: _Tail | None  # document numbers; None while there is one document
    conv: dict[int, _Tail]  # layer -> inputs of its convolution; never changed in place
    pieces: tuple[_Piece, ...]  # the latest ones
    number: int  # of the next recall
    floor: int  # the lowest position, other than 0, that can be rewound to


class Extension(NamedTuple):
    """A piece of text that a cache can add with `take`.

    Attributes:
        lookback: the ids before the piece [B, <= N-1]; None at the start of the text.
        documents: document numbers of the piece and of the `lag` positions before it; None while there is one document.
        start: positions before the piece. number: of its recall.
    """

    lookback: Tensor | None
    documents: Tensor | None
    start: int
    number: int
    state: _State


class MemoryCache:
    """Decoding state: the last token ids, document numbers and convolution inputs of a text.

    It keeps what the next piece of text needs, and as much more as a rewind can uncover. A fork is a copy.copy or
    copy.deepcopy of it.

    Args:
        rewind: number of positions that `rewind` can remove.

    Raises:
        ValueError: rewind is negative.
    """

    def __init__(self, rewind: int = REWIND) -> None:
        if rewind < 0:
            raise ValueError(f"rewind is a number of positions, 0 or more, not {rewind}")
        self.margin = rewind
        self._state = _State(None, None, {}, (), 0, 0)

    @property
    def length(self) -> int:
        """Positions decoded so far."""
        return 0 if self._state.ids is None else self._state.ids.end

    @property
    def ids(self) -> Tensor | None:
        """The kept ids, [B, <= length] on the CPU, -1 at dead positions; None before the first."""
        tail = self._state.ids
        return None if tail is None else tail.last(tail.stop)

    @property
    def documents(self) -> Tensor | None:
        """The kept document numbers, [B, <= length] on the CPU; None while there is one document."""
        tail = self._state.documents
        return None if tail is None else tail.last(tail.stop)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        state = self._state
        tails = [tail for tail in (state.ids, state.documents, *state.conv.values()) if tail is not None]
        return sum(tail.buffer.untyped_storage().nbytes() for tail in tails)

    def prepare(self, ids: Tensor, documents: Tensor | None, lookback: int, lag: int) -> Extension:
        """Return the context of the ids [B, T] (-1 at dead positions). The cache changes only when `take` gets it.

        Args:
            documents: their document numbers; 0 is the last document of the cache. lookback: number of ids that
            complete their n-grams. lag: positions that a convolution reaches back.

        Raises:
            ValueError: another number of sequences than the cache holds.
        """
        state, start, keep = self._state, self.length, max(lookback, lag) + self.margin
        kept = state.ids
        before: Tensor | None = None
        around, tail = documents, state.documents
        if kept is None or not start:
            kept = _Tail.of(ids, ids.shape[1], keep)
            tail = None if documents is None else _Tail.of(documents, documents.shape[1], keep)
        else:
            if len(ids) != len(kept.buffer):
                raise ValueError(f"the decoding cache holds {len(kept.buffer)} sequences, these are {len(ids)}")
            before = kept.last(lookback).clone()
            if documents is not None or tail is not None:
                if tail is None:
                    tail = _Tail(torch.zeros_like(kept.last(kept.stop)), kept.stop, kept.end)
                documents = tail.last(1) + (torch.zeros_like(ids) if documents is None else documents)
                if documents.shape[1]:
                    before = before.masked_fill(tail.last(lookback) != documents[:, :1], -1)
                around = torch.cat([tail.last(min(lag, start)), documents], dim=1)
                tail = tail.extended(documents, keep)
            kept = kept.extended(ids, keep)
        piece = _Piece(state.number, start, kept.end)
        changed = state._replace(
            ids=kept,
            documents=tail,
            pieces=(*state.pieces[-(self.margin + _IN_FLIGHT) :], piece),
            number=state.number + 1,
            floor=max(state.floor, kept.end - self.margin),
        )
        return Extension(before, around, start, piece.number, changed)

    def take(self, extension: Extension) -> None:
        """Add a piece of text, in one step that cannot be interrupted."""
        self._state = extension.state

    def _piece(self, number: int) -> _Piece | None:
        return next((piece for piece in reversed(self._state.pieces) if piece.number == number), None)

    def inputs_before(self, layer: int, number: int, start: int, lag: int, again: Tensor | None) -> Tensor | None:
        """Return the inputs of a layer's convolution at the last `lag` positions before the piece of recall `number`.

        Args:
            again: the result of this call when the recall was used before, in case later positions have replaced it.

        Raises:
            RuntimeError: not all of them went through the layer; the piece was removed since, or too many others
            followed it.
        """
        tail = self._state.conv.get(layer)
        computed = 0 if tail is None else tail.end
        if computed < start:
            raise RuntimeError(
                f"layer {layer} has computed {computed} of the {start} positions before this piece, which its "
                f"convolution needs: put the recall of every piece through every layer, in the order of the text"
            )
        if self._piece(number) is None:
            raise RuntimeError(
                f"the piece of this recall, which began at position {start}, does not belong to the text of the cache "
                f"any more (rewind, select), or lies too far back: recall its ids again"
            )
        count = min(start, lag)
        if not count:
            return None
        if tail is not None and tail.first <= start - count:
            return tail.between(start - count, start).clone()
        if again is None:
            raise RuntimeError(
                f"layer {layer} needs {count} positions before {start}, and the cache has dropped some of them "
                f"(it keeps what a rewind of {self.margin} positions needs): put the recalls of a text through every "
                f"layer in its order"
            )
        return again

    def keep_inputs(self, layer: int, number: int, inputs: Tensor, history: Tensor | None, lag: int) -> None:
        """Keep the inputs of a layer's convolution at the piece of recall `number`.

        Args:
            inputs: [B, T, M*d]. history: the result of `inputs_before` for this piece.
        """
        piece, tail = self._piece(number), self._state.conv.get(layer)
        if piece is None:
            raise RuntimeError("the piece of this recall was removed while the layer ran: recall its ids again")
        keep, back = lag + self.margin, 0 if history is None else history.shape[1]
        inputs = inputs[:, : piece.stop - piece.start]  # the rest was removed by a rewind
        if tail is not None and tail.first <= piece.start - back and piece.start:
            if piece.start < tail.end:  # used again: the present state stays valid until it is replaced
                tail = tail.cut(piece.start)._replace(spare=False)
            tail = tail.extended(inputs, keep)
        elif history is not None:  # used again, after later positions have replaced those before it
            tail = _Tail.of(history, piece.start, keep).extended(inputs, keep)
        else:
            tail = _Tail.of(inputs, piece.start + inputs.shape[1], keep)
        self._state = self._state._replace(conv={**self._state.conv, layer: tail})

    def select(self, sequences: Tensor) -> None:
        """Keep these sequences of the batch (int64 [n], repeats allowed) in this order, as beam search does."""
        state = self._state
        self._state = state._replace(
            ids=None if state.ids is None else state.ids.selected(sequences),
            documents=None if state.documents is None else state.documents.selected(sequences),
            conv={layer: tail.selected(sequences) for layer, tail in state.conv.items()},
            pieces=(),
        )

    @property
    def rewindable(self) -> int:
        """Number of positions that `rewind` can remove now, other than all of them."""
        return self.length - max(0, self._state.floor)

    def rewind(self, positions: int) -> None:
        """Remove the last `positions` tokens, as if they had never been added.

        Raises:
            ValueError: more positions than the text has, or more than the cache was made for (all of them is possible).
        """
        state, left = self._state, self.length - positions
        if positions < 0 or left < 0:
            raise ValueError(f"cannot rewind {positions} positions of {self.length}")
        if left and positions > self.rewindable:
            raise ValueError(
                f"cannot rewind {positions} positions: this cache keeps what a rewind of {self.rewindable} needs. Make "
                f"it with a larger margin, MemoryCache(rewind={self.margin - self.rewindable + positions})"
            )
        if not left:
            self._state = _State(None, None, {}, (), state.number, 0)
        elif positions:
            assert state.ids is not None
            self._state = state._replace(
                ids=state.ids.cut(left),
                documents=None if state.documents is None else state.documents.cut(left),
                conv={layer: tail.cut(left) for layer, tail in state.conv.items()},
                pieces=tuple(p._replace(stop=min(p.stop, left)) for p in state.pieces if p.start < left),
            )

    def __copy__(self) -> MemoryCache:
        other, state = MemoryCache(self.margin), self._state
        other._state = state._replace(
            ids=None if state.ids is None else state.ids.copied(),
            documents=None if state.documents is None else state.documents.copied(),
            conv={layer: tail.copied() for layer, tail in state.conv.items()},
        )
        return other
