"""CountMemory: how often each token followed each context of a text, exactly.

Tokens are the model's own ids, not classes of a token map: the n-gram of a context and its target is then the context
of the next position, so that a position costs one probe per length.
"""

from __future__ import annotations

import os
import threading
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engram.config import as_integer, as_integers
from engram.counts import saved
from engram.counts.leave_out import leave_out_document, leave_out_position
from engram.counts.level import MOST, Level, bytes_of, most_nodes
from engram.counts.reference import COUNT, DISTINCT, ONCE, TOTAL
from engram.counts.text import chained, digest, rows
from engram.tables.kernels import shielded

_CHUNK = 1 << 14  # positions: their parents' nodes are still in the cache when the next length changes them


class Reading(NamedTuple):
    """Counts of a count memory at each position and order; every array is int64 [B, T, orders].

    Attributes:
        total: occurrences of the context with a next token. distinct: its different next tokens. once: those of them
        that were seen once. hits: occurrences of the target after it. All are 0 if the context was never seen.
    """

    total: np.ndarray
    distinct: np.ndarray
    once: np.ndarray
    hits: np.ndarray


class CountMemory:
    """Counts of n-grams, stored exactly: 16 bytes per n-gram of the highest order, 32 per shorter one, and 5 to 11 more
    for the hash table. observe() makes room as if all n-grams of the text were new; prune(counts.nbytes) gives back
    what they did not need.

    Args:
        vocab_size: number of token ids. orders: lengths of the n-grams, target included, ascending, 2 to 16.

    Raises:
        ValueError: a size below 1, or orders out of their range.

    Example:
        >>> import engram
        >>> counts = engram.CountMemory(vocab_size=100, orders=(2, 3))
        >>> counts.observe([[5, 6, 7, 5, 6, 8]])
        6
        >>> [array.tolist() for array in counts.successors([5, 6])]
        [[7, 8], [1, 1]]
        >>> counts.lookup([[5, 6]], [[6, 7]]).hits.tolist()  # of 6 after 5; of 7 after 6, and after 5 6
        [[[2, 0], [1, 1]]]
    """

    def __init__(self, vocab_size: int, orders: tuple[int, ...] = (2, 3, 4)):
        self.vocab_size, self.orders = as_integer("vocab_size", vocab_size), as_integers("orders", orders)
        if not 1 <= self.vocab_size <= MOST:
            raise ValueError(f"vocab_size is 1 to {MOST:,}, not {self.vocab_size:,}")
        if not self.orders or list(self.orders) != sorted({*self.orders}) or not 2 <= self.orders[0]:
            raise ValueError(f"orders are different, ascending and 2 or more, such as (2, 3, 4), not {self.orders}")
        if self.orders[-1] > 16:
            raise ValueError(f"orders are at most 16, not {self.orders[-1]}")
        self.levels = [Level(8) for _ in range(self.orders[-1] - 1)] + [Level(4)]
        self.positions = 0
        self.pruned = False
        self.texts: list[str] = []  # digest of each text observed
        self._lock = threading.RLock()

    @property
    def nbytes(self) -> int:
        """Bytes of all n-grams and hash tables."""
        return sum(level.nbytes for level in self.levels)

    def __repr__(self) -> str:
        return (
            f"CountMemory({self.vocab_size}, orders={self.orders}: {self.positions:,} tokens observed, "
            f"{self.nbytes / 2**20:.1f} MiB{', pruned' if self.pruned else ''})"
        )

    def observe(self, ids: Any, documents: Any = None) -> int:
        """Count the n-grams of a text, in one pass. They cross neither rows nor documents.

        Args:
            ids: integers [B, T] or [T]; a negative id is a dead position, which ends n-grams.
            documents: of the shape of ids, numbers that change where a document begins; None: a row is one document.

        Returns:
            The number of tokens counted.

        Raises:
            IndexError: an id outside the vocabulary. ValueError: shapes that do not match, or counts that would not
            fit into 32 bits. Nothing was counted then.
        """
        tokens, linked, alive = self._flat(ids, documents)
        count = int(alive.sum())
        with self._lock:
            if self.positions + count > MOST:
                raise ValueError(
                    f"{self.positions:,} tokens were observed, and {count:,} more could overflow a count of 32 bits: a "
                    f"count memory takes {MOST:,} tokens; begin another one"
                )
            mark = digest(tokens, linked, alive)
            if mark in self.texts:
                warnings.warn(
                    f"text {mark[:12]} ({count:,} tokens) was observed before, so its n-grams count "
                    f"{self.texts.count(mark) + 1} times; forget(ids) takes it back",
                    stacklevel=2,
                )
            for level in self.levels:
                level.reserve(len(tokens))
            self.texts.append(mark)
            shielded(lambda: self._add(tokens, linked, alive, 1))
        return count

    def forget(self, ids: Any, documents: Any = None) -> int:
        """Take back the counts of a text that was observed. Arguments and result are those of observe().

        Raises:
            ValueError: an n-gram of the text was counted less often than the text has it, because the text was not
            observed with these documents, or was pruned. Nothing was changed then.
        """
        tokens, linked, alive = self._flat(ids, documents)
        count = int(alive.sum())
        with self._lock:
            for length, nodes in enumerate(self._walk(tokens, linked, alive, len(self.levels)), 1):
                expected = chained(linked, alive, length)
                node, often = np.unique(nodes[expected], return_counts=True)
                lacking = self.levels[length - 1].nodes[node, COUNT] < often
                if lacking.any() or 0 in node:
                    at = int(np.flatnonzero(expected & np.isin(nodes, [0, *node[lacking]]))[0])
                    gram = tokens[at - length + 1 : at + 1].tolist()
                    raise ValueError(
                        f"the text has the n-gram {gram} more often than it was counted: forget() takes a text that "
                        f"was observed with the same documents" + (" and not pruned" if self.pruned else "")
                    )
            if (mark := digest(tokens, linked, alive)) in self.texts:
                self.texts.remove(mark)
            shielded(lambda: self._add(tokens, linked, alive, -1))
        return count

    def lookup(
        self, ids: Any, targets: Any, documents: Any = None, lookback: Any = None, leave_out: str | None = None
    ) -> Reading:
        """Read the counts of the contexts that end at each position, and of the targets after them.

        Args:
            ids: integers [B, T] or [T]. targets: of the same shape, the token after each; negative: none.
            documents: as in observe(). lookback: [B, L], the tokens before ids, -1 where an n-gram ends; these belong
            to the document of the row's first token.
            leave_out: "position" subtracts the position's own occurrence, "document" all occurrences in the row that
            have the position's document number. For a text that was observed: a target that belongs to the next
            document was not counted, and is not subtracted.

        Raises:
            IndexError: an id outside the vocabulary. ValueError: shapes that do not match, another leave_out.
        """
        if leave_out not in (None, "position", "document"):
            raise ValueError(f'leave_out is None, "position" or "document", not {leave_out!r}')
        ids, documents = rows("ids", ids), None if documents is None else rows("documents", documents)
        targets, before = rows("targets", targets), 0
        if targets.shape != ids.shape:
            raise ValueError(f"targets {list(targets.shape)} must have the shape of ids {list(ids.shape)}")
        shape, numbers = ids.shape, documents
        if lookback is not None:
            past = rows("lookback", lookback)
            if len(past) != len(ids):
                raise ValueError(f"lookback has {len(past)} rows, ids have {len(ids)}")
            before = past.shape[1]
            ids = np.concatenate([past, ids], axis=1)
            if documents is not None and before:
                documents = np.concatenate([np.repeat(documents[:, :1], before, axis=1), documents], axis=1)
        tokens, linked, alive = self._flat(ids, documents)
        wanted = self._checked("targets", targets).reshape(-1)
        mine = np.arange(len(tokens)).reshape(ids.shape)[:, before:].reshape(-1)
        with self._lock:
            walked = self._walk(tokens, linked, alive, self.orders[-1] - 1)
            contexts = [np.ascontiguousarray(walked[n - 2][mine]) for n in self.orders]
            result = np.stack([self._read(n, c, wanted) for n, c in zip(self.orders, contexts, strict=True)], axis=1)
        live = (wanted >= 0) & alive[mine]
        if leave_out is not None:
            after = np.ones(shape, dtype=bool)
            if numbers is not None:
                after[:, :-1] = numbers[:, 1:] == numbers[:, :-1]
            live &= after.reshape(-1)
            row = np.repeat(np.arange(shape[0]), shape[1])
            key = (
                row
                if numbers is None
                else np.unique(np.stack([row, numbers.reshape(-1)]), axis=1, return_inverse=True)[1]
            )
            for i, context in enumerate(contexts):
                reading = result[:, i]
                if leave_out == "position":
                    leave_out_position(reading, live & (context > 0))
                else:
                    leave_out_document(reading, live & (context > 0), key.reshape(-1), context, wanted)
        return Reading(*(result[..., k].reshape(*shape, len(self.orders)) for k in range(4)))

    def successors(self, context: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens that followed a context, ascending, and how often each did.

        Args:
            context: the last tokens [length], as many as an n-gram has before its target.
        """
        ids = rows("context", context)
        if ids.shape[0] != 1 or not 1 <= ids.shape[1] < len(self.levels):
            raise ValueError(f"a context is 1 to {len(self.levels) - 1} tokens, not {list(ids.shape)}")
        tokens, linked, alive = self._flat(ids, None)
        with self._lock:
            node = np.ascontiguousarray(self._walk(tokens, linked, alive, len(tokens))[-1][-1:])
            _, found, counts = self.levels[len(tokens)].successors(node, self.levels[len(tokens) - 1])
        order = np.argsort(found)
        return found[order], counts[order].astype(np.int64)

    def prune(self, nbytes: int) -> int:
        """Drop n-grams until the memory takes at most `nbytes`: the longest first, of these the rarest, of these the
        newest. Totals and successors of the contexts are then those of what remains.

        Returns:
            The number of n-grams dropped; those that forget() has left without a count are not among them.

        Raises:
            ValueError: the single tokens alone take more. Nothing was changed then.
        """
        with self._lock:
            keep = [np.flatnonzero(level.nodes[1 : level.used, COUNT]) + 1 for level in self.levels]
            sizes, dropped = [len(k) for k in keep], 0
            for at in range(len(keep) - 1, -1, -1):
                others = sum(bytes_of(s, self.levels[i].words) for i, s in enumerate(sizes) if i != at)
                room = most_nodes(nbytes - others, sizes[at], self.levels[at].words) if at else sizes[0]
                dropped += sizes[at] - room
                if room < sizes[at]:
                    rarest_last = np.argsort(-self.levels[at].nodes[keep[at], COUNT].astype(np.int64), kind="stable")
                    keep[at], sizes[at] = np.sort(keep[at][rarest_last[:room]]), room
            if (least := sum(bytes_of(s, self.levels[i].words) for i, s in enumerate(sizes))) > nbytes:
                raise ValueError(f"single tokens alone take {least:,} bytes: prune to that at least, not {nbytes:,}")
            levels, above = list[Level](), None
            for level, kept in zip(self.levels, keep, strict=True):
                above = level.rebuilt(above, kept)
                levels.append(above[0])
            self.levels, self.pruned = levels, self.pruned or dropped > 0
        return dropped

    def save(self, folder: str | os.PathLike[str], overwrite: bool = False) -> Path:
        """Write the counts to a new folder, completely or not at all; `engram verify` checks it.

        Raises:
            FileExistsError: the folder exists, and overwrite is False.
        """
        with self._lock:
            facts = {"vocab_size": self.vocab_size, "orders": list(self.orders), "positions": self.positions}
            return saved.save(
                Path(folder), self.levels, facts | {"pruned": self.pruned, "texts": self.texts}, overwrite
            )

    @classmethod
    def load(cls, folder: str | os.PathLike[str], vocab_size: int | None = None) -> CountMemory:
        """Read saved counts into memory, and check every digest.

        Args:
            vocab_size: the vocabulary that the counts are meant for, if they must have it.

        Raises:
            FileNotFoundError: the folder holds none. ValueError: it is damaged, or has another vocabulary.
        """
        facts, levels = saved.load(Path(folder))
        counts = cls(facts["vocab_size"], tuple(facts["orders"]))
        if vocab_size not in (None, counts.vocab_size):
            raise ValueError(
                f"{folder} counts ids of a vocabulary of {counts.vocab_size:,}, not {vocab_size:,}: the ids of another "
                f"tokenizer mean other tokens; count the text again"
            )
        counts.levels, counts.positions = levels, facts["positions"]
        counts.pruned, counts.texts = facts["pruned"], facts["texts"]
        return counts

    def _checked(self, name: str, ids: np.ndarray) -> np.ndarray:
        if ids.size and int(ids.max()) >= self.vocab_size:
            raise IndexError(f"{name} have {int(ids.max()):,}, outside the vocabulary of {self.vocab_size:,} ids")
        return ids

    def _flat(self, ids: Any, documents: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (tokens uint32, True where n-grams continue from the position before, True where alive), [B * T]."""
        ids = self._checked("ids", rows("ids", ids))
        alive, linked = ids >= 0, np.zeros(ids.shape, dtype=bool)
        linked[:, 1:] = alive[:, 1:] & alive[:, :-1]
        if documents is not None:
            numbers = rows("documents", documents)
            if numbers.shape != ids.shape:
                raise ValueError(f"documents {list(numbers.shape)} must have the shape of ids {list(ids.shape)}")
            linked[:, 1:] &= numbers[:, 1:] == numbers[:, :-1]
        return np.where(alive, ids, 0).astype(np.uint32).reshape(-1), linked.reshape(-1), alive.reshape(-1)

    def _add(self, tokens: np.ndarray, linked: np.ndarray, alive: np.ndarray, amount: int) -> None:
        carry = np.zeros(len(self.levels) + 1, dtype=np.uint32)  # nodes of the last position of the piece before
        for lo in range(0, len(tokens), _CHUNK):
            piece, on = tokens[lo : lo + _CHUNK], linked[lo : lo + _CHUNK]
            parents = alive[lo : lo + _CHUNK].astype(np.uint32)
            for n, level in enumerate(self.levels):
                found = level.add(self.levels[n - 1] if n else None, parents, piece, amount)
                parents = np.empty_like(found)
                parents[1:], parents[0], carry[n] = found[:-1], carry[n], found[-1]
                parents *= on
        self.positions += amount * int(alive.sum())

    def _walk(self, tokens: np.ndarray, linked: np.ndarray, alive: np.ndarray, lengths: int) -> list[np.ndarray]:
        """Return the nodes uint32 of the n-grams that end at each position, for n = 1 to `lengths`."""
        nodes, parents = list[np.ndarray](), alive.astype(np.uint32)
        for level in self.levels[:lengths]:
            nodes.append(level.find(parents, tokens))
            parents = np.zeros_like(nodes[-1])
            parents[1:] = nodes[-1][:-1] * linked[1:]
        return nodes

    def _read(self, order: int, contexts: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Return int64 [positions, (total, distinct, once, count)] of one order."""
        level, above = self.levels[order - 1], self.levels[order - 2]
        child = level.find(contexts * (targets >= 0).astype(np.uint32), np.maximum(targets, 0).astype(np.uint32))
        result = np.empty((len(contexts), 4), dtype=np.int64)
        result[:, :3] = above.nodes[contexts][:, [TOTAL, DISTINCT, ONCE]]
        result[:, 3] = level.nodes[child, COUNT]
        result[contexts == 0, :3], result[child == 0, 3] = 0, 0
        return result
