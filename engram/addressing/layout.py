"""The hash layout: which multipliers, prime moduli and offsets turn n-grams into rows of each layer's table.

Everything follows from eight numbers and names, so a layout read from a file is recomputed and compared before it is
believed: a multiplier that went through a JSON double, or a modulus of another version, would silently re-hash the
whole table.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from engram.config import LONGEST, check_heads, whole, whole_numbers

FORMAT = "engram-hash-layout-1"
FAMILIES = ("multiply_xor", "xxh64", "one_row")
BOUNDARIES = ("pad", "dead", "eos")
GENERATORS = ("pcg64", "splitmix64")
LAYER_SEED = 10007  # the released code's step between the seeds of two layers
PARAMETERS = ("family", "compressed_vocab", "layers", "orders", "heads", "rows_per_head", "pad_id", "seed")
# Written only where they differ, so that the digests of layouts without them stay what they were.
DIALECT = {"boundary": "pad", "generator": "pcg64", "row_multiple": 1}
DERIVED = ("multipliers", "moduli", "offsets", "rows")


@dataclass(frozen=True)
class HashLayout:
    """Everything about addresses that does not depend on the text. Make it with `HashLayout.build`.

    compressed_vocab: V', the size of the token map.
    layers:           layer numbers that own a table, in the order in which they take their primes.
    orders:           n-gram lengths that emit columns, ascending, each in [2, 16].
    heads:            K, hash heads per order.
    rows_per_head:    one int per order; each head's modulus is a prime at or above it.
    pad_id:           compressed id that stands before the start of a text.
    seed:             of the multipliers (and of XXH64).
    family:           "multiply_xor", the paper's hash; "xxh64", XXH64 of the n compressed ids as little-endian int64
                      in text order with seed + 10007*layer, the same moduli; "one_row", a control: every modulus is 1.
    boundary:         what ends a window. "pad": the start of the text. "dead" (DeepSeek-V4.1): also DEAD positions,
                      which have the id -1 (images). "eos" (Qwen): also the compressed id `pad_id` itself: a text
                      restarts behind every end-of-sequence token. What was met and all that is older reads as pad_id.
    generator:        where the multipliers come from: "pcg64" seeded with seed + 10007*layer, or "splitmix64" (Qwen)
                      with seed + 10007*(index of the layer in `layers`).
    row_multiple:     each table is padded to a multiple of so many rows; those at the end are never addressed.

    Derived, per layer (C = orders x heads columns, order-major):
    multipliers[layer]  max(orders) ints; [i] multiplies the token i steps back. Not used by xxh64.
    moduli[layer]       per order, per head; primes, no two equal in the whole model.
    offsets[layer]      C ints: first row of each column in the layer's one flat table.
    rows[layer]         rows of that table: the sum of its moduli, padded.
    Source: the paper, section 2.2, and the released demo (primes, multipliers).
    """

    compressed_vocab: int
    layers: tuple[int, ...]
    orders: tuple[int, ...]
    heads: int
    rows_per_head: tuple[int, ...]
    pad_id: int
    seed: int = 0
    family: str = "multiply_xor"
    boundary: str = "pad"
    generator: str = "pcg64"
    row_multiple: int = 1
    multipliers: dict[int, tuple[int, ...]] = field(init=False, repr=False, compare=False)
    moduli: dict[int, tuple[tuple[int, ...], ...]] = field(init=False, repr=False, compare=False)
    offsets: dict[int, tuple[int, ...]] = field(init=False, repr=False, compare=False)
    rows: dict[int, int] = field(init=False, repr=False, compare=False)

    @classmethod
    def build(
        cls,
        compressed_vocab: int,
        layers: Iterable[int],
        orders: Iterable[int],
        heads: int,
        rows_per_head: int | Iterable[int],
        pad_id: int,
        seed: int = 0,
        family: str = "multiply_xor",
        boundary: str = "pad",
        generator: str = "pcg64",
        row_multiple: int = 1,
    ) -> HashLayout:
        """rows_per_head: one int for all orders, or one int per order. ValueError where an argument makes no sense."""
        layers, orders = whole_numbers("layers", layers), whole_numbers("orders", orders)
        if isinstance(rows_per_head, Iterable):
            rows_per_head = whole_numbers("rows_per_head", rows_per_head)
        else:
            rows_per_head = (whole("rows_per_head", rows_per_head),) * len(orders)
        return cls(
            whole("compressed_vocab", compressed_vocab),
            layers,
            orders,
            whole("heads", heads),
            rows_per_head,
            whole("pad_id", pad_id),
            whole("seed", seed),
            family,
            boundary,
            generator,
            whole("row_multiple", row_multiple),
        )

    def __post_init__(self) -> None:
        self._check()
        moduli = self._one_row() if self.family == "one_row" else self._primes()
        flat = {layer: [p for heads in moduli[layer] for p in heads] for layer in self.layers}
        derived = {
            "multipliers": {layer: self._multipliers(layer) for layer in self.layers},
            "moduli": moduli,
            "offsets": {layer: tuple(accumulate(flat[layer][:-1], initial=0)) for layer in self.layers},
            "rows": {layer: -(-sum(flat[layer]) // self.row_multiple) * self.row_multiple for layer in self.layers},
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen

    def _check(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"unknown hash family {self.family!r}: choose one of {', '.join(FAMILIES)}")
        if self.boundary not in BOUNDARIES:
            raise ValueError(f"unknown boundary rule {self.boundary!r}: choose one of {', '.join(BOUNDARIES)}")
        if self.generator not in GENERATORS:
            raise ValueError(f"unknown generator {self.generator!r}: choose one of {', '.join(GENERATORS)}")
        if self.generator != "pcg64" and self.family != "multiply_xor":
            raise ValueError(f"generator {self.generator!r} draws multipliers, which family {self.family!r} has not")
        if not 1 <= self.row_multiple <= 2**20:
            raise ValueError(f"row_multiple must be in [1, 2**20], not {self.row_multiple}")
        if not 1 <= self.compressed_vocab < 2**31:
            raise ValueError(f"compressed_vocab must be in [1, 2**31), not {self.compressed_vocab}")
        if not self.layers:
            raise ValueError("layers is empty: name at least one layer that gets a table")
        if min(self.layers) < 0 or len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers must be different numbers >= 0, not {self.layers}")
        if not self.orders:
            raise ValueError("orders is empty: name at least one n-gram length, such as 2")
        if self.orders[0] < 2 or any(a >= b for a, b in pairwise(self.orders)):
            raise ValueError(f"orders must ascend without repeats and start at 2 or above, not {self.orders}")
        if self.orders[-1] > LONGEST:
            raise ValueError(f"orders may go up to {LONGEST}, not {self.orders[-1]}")
        if not 1 <= self.heads <= 2**16:
            raise ValueError(f"heads must be in [1, 65536], not {self.heads}")
        check_heads(len(self.layers), len(self.orders), self.heads)
        if len(self.rows_per_head) != len(self.orders):
            raise ValueError(
                f"rows_per_head has {len(self.rows_per_head)} numbers for {len(self.orders)} orders: "
                "give one int, or one per order"
            )
        if not all(1 <= rows <= 2**40 for rows in self.rows_per_head):
            raise ValueError(f"rows_per_head must be in [1, 2**40], not {self.rows_per_head}")
        if not 0 <= self.pad_id < self.compressed_vocab:
            raise ValueError(
                f"pad_id {self.pad_id} is outside the compressed vocabulary of {self.compressed_vocab}: "
                "it must already be mapped, token_map.table[raw_pad_id]"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2**63), not {self.seed}")

    def _multipliers(self, layer: int) -> tuple[int, ...]:
        """Odd numbers small enough that compressed id x multiplier stays below 2**63."""
        half = max(1, ((2**63 - 1) // self.compressed_vocab) // 2)
        if self.generator == "splitmix64":
            state = self.seed + LAYER_SEED * self.layers.index(layer)
            return tuple(2 * (_splitmix64(state + _GOLDEN * (i + 1)) % half) + 1 for i in range(self.orders[-1]))
        generator = np.random.default_rng(self.seed + LAYER_SEED * layer)
        drawn = generator.integers(0, half, size=self.orders[-1], dtype=np.int64)
        return tuple(2 * int(r) + 1 for r in drawn)

    def _one_row(self) -> dict[int, tuple[tuple[int, ...], ...]]:
        return {layer: ((1,) * self.heads,) * len(self.orders) for layer in self.layers}

    def _primes(self) -> dict[int, tuple[tuple[int, ...], ...]]:
        """Each head takes the next prime that no head of the whole model has yet."""
        seen: set[int] = set()
        reached: dict[int, int] = {}  # every prime from the key up to the value is taken, so a search resumes there

        def take(rows: int) -> int:
            prime = _next_prime(reached.get(rows, rows - 1))
            while prime in seen:
                prime = _next_prime(prime)
            seen.add(prime)
            reached[rows] = prime
            return prime

        return {
            layer: tuple(tuple(take(rows) for _ in range(self.heads)) for rows in self.rows_per_head)
            for layer in self.layers
        }

    @property
    def columns(self) -> int:
        """C = orders x heads: rows that one token reads in one layer."""
        return len(self.orders) * self.heads

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of `to_json()`."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Canonical JSON. Multipliers and seed are strings: they can exceed 2**53, where JSON doubles lose digits."""
        fields: dict[str, Any] = {"format": FORMAT}
        fields.update({name: getattr(self, name) for name in PARAMETERS + DERIVED})
        fields.update({name: getattr(self, name) for name, usual in DIALECT.items() if getattr(self, name) != usual})
        fields["seed"] = str(self.seed)
        fields["multipliers"] = {layer: [str(m) for m in self.multipliers[layer]] for layer in self.layers}
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> HashLayout:
        """Reads `to_json`. Everything is recomputed; a value that differs is a ValueError with the field's name."""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"a hash layout is JSON text; this is not: {error}") from error
        wanted = {"format", *PARAMETERS, *DERIVED}
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f'not a hash layout: "format" must be {FORMAT!r}')
        if set(found) - set(DIALECT) != wanted:
            raise ValueError(f"hash layout: missing or unknown fields {sorted(wanted ^ (set(found) - set(DIALECT)))}")
        if not isinstance(found["seed"], str):
            raise ValueError('hash layout: "seed" must be a string, since a JSON number may have been rounded')
        parameters = {name: found[name] for name in (*PARAMETERS, *DIALECT) if name in found}
        try:
            parameters["seed"] = int(found["seed"])
            # A claimed size must be paid for in the file before primes are searched for it.
            claimed = whole("heads", found["heads"]) * len(found["orders"]) * len(found["layers"])
            listed = sum(len(heads) for orders in found["moduli"].values() for heads in orders)
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"hash layout: {error}") from error
        if claimed != listed:
            raise ValueError(f'hash layout: "moduli" lists {listed} heads, the parameters say {claimed}')
        try:
            layout = cls.build(**parameters)
        except TypeError as error:
            raise ValueError(f"hash layout: {error}") from error
        expected = json.loads(layout.to_json())
        for name in sorted({*found, *expected}):
            if found.get(name) != expected.get(name):
                raise ValueError(
                    f'hash layout: "{name}" is not what the parameters give '
                    f"({_difference(found.get(name), expected.get(name))}); the file was altered, rounded or written "
                    "for another hash"
                )
        return layout


def _difference(found: Any, expected: Any) -> str:
    """The first place where two JSON values part, in words."""
    if isinstance(found, dict) and isinstance(expected, dict) and set(found) == set(expected):
        key = next(k for k in expected if found[k] != expected[k])
        return f"layer {key}: {_difference(found[key], expected[key])}"
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        place = next(i for i in range(len(expected)) if found[i] != expected[i])
        return f"place {place}: {_difference(found[place], expected[place])}"
    return f"{json.dumps(found)[:80]} instead of {json.dumps(expected)[:80]}"


_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, splitmix64's step


def _splitmix64(state: int) -> int:
    """The output of splitmix64 for a state, modulo 2**64."""
    z = (state + _GOLDEN) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


_FACTOR = 97  # the largest prime that divides _PRIMORIAL, the product of all primes up to it
_PRIMORIAL = math.prod(p for p in range(2, _FACTOR + 1) if all(p % q for q in range(2, p)))


def _next_prime(n: int) -> int:
    """The smallest prime above n."""
    n += 1
    while not _is_prime(n):
        n += 1
        while n > _FACTOR and math.gcd(n, _PRIMORIAL) > 1:  # most composites, at a fraction of the test's cost
            n += 1
    return n


def _is_prime(n: int) -> bool:
    """Miller-Rabin; the bases decide every n below 3.4e12 (the first six) and below 3.3e24 (all)."""
    bases = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)
    if n < 2 or any(n % p == 0 for p in bases):
        return n in bases
    odd = n - 1
    twos = (odd & -odd).bit_length() - 1
    odd >>= twos
    for base in bases[:6] if n < 3_400_000_000_000 else bases:
        x = pow(base, odd, n)
        if x in (1, n - 1):
            continue
        for _ in range(twos - 1):
            x = x * x % n
            if x == n - 1:
                break
        else:
            return False
    return True
