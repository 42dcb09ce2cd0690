"""The hash layout: the multipliers, prime moduli and offsets that turn n-grams into rows of each layer's table.

All of it follows from the parameters, so a layout read from a file is recomputed and compared before it is used: a
multiplier that was rounded to a JSON double, or a modulus of another version, would silently change every address.
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

from engram.config import LONGEST, as_integer, as_integers, check_heads

FORMAT = "engram-hash-layout-1"
HASHES = ("multiply_xor", "xxh64", "one_row")
BOUNDARIES = ("pad", "dead", "eos")
GENERATORS = ("pcg64", "splitmix64")
LAYER_SEED = 10007  # the released code's step between the seeds of two layers
PARAMETERS = ("family", "compressed_vocab", "layers", "orders", "heads", "rows_per_head", "pad_id", "seed")
# Written only if they differ from these, so that the digests of layouts without them stay the same.
DIALECT = {"boundary": "pad", "generator": "pcg64", "row_multiple": 1}
DERIVED = ("multipliers", "moduli", "offsets", "rows")


@dataclass(frozen=True)
class HashLayout:
    """All parameters and constants of the addresses, which do not depend on the text. Make one with `HashLayout.build`.

    C = orders x heads columns per layer, order-major: all heads of the first order, then those of the next.

    Attributes:
        compressed_vocab: V', the size of the token map.
        layers: layer numbers that own a table, in the order in which they take their primes.
        orders: n-gram lengths that have columns, ascending, each in [2, 16].
        heads: K, hash heads per order.
        rows_per_head: one int per order; each head's modulus is a prime at or above it.
        pad_id: compressed id that positions before the start of a text read as.
        seed: seed of the multipliers, and of XXH64.
        family: the hash. "multiply_xor" is the paper's; "xxh64" is XXH64 of the n compressed ids as little-endian int64
            in text order with seed + 10007*layer and the same moduli; "one_row" is a control: every modulus is 1.
        boundary: what ends a window. "pad": the start of the text. "dead" (DeepSeek-V4.1): also dead positions, which
            have the id -1 (images). "eos" (Qwen): also the compressed id `pad_id` itself, so that a text restarts
            behind every end-of-sequence token. The position that ends the window and all older ones read as pad_id.
        generator: generator of the multipliers: "pcg64" seeded with seed + 10007*layer, or "splitmix64" (Qwen) seeded
            with seed + 10007*(index of the layer in `layers`).
        row_multiple: each table is padded to a multiple of this number of rows; the rows at the end have no address.
        multipliers: {layer: max(orders) ints}, derived; [i] multiplies the token i steps back. Not used by xxh64.
        moduli: {layer: one tuple per order of one prime per head}, derived; no two are equal in the whole model.
        offsets: {layer: C ints}, derived: first row of each column in the layer's one flat table.
        rows: {layer: int}, derived: rows of that table, the sum of its moduli, padded.

    Raises:
        ValueError: a parameter out of its range, or parameters that do not fit together; the message names them.

    Source:
        the paper, section 2.2, and the released demo (primes, multipliers).

    Example:
        >>> import engram
        >>> layout = engram.HashLayout.build(100, layers=(1,), orders=(2, 3), heads=2, rows_per_head=50, pad_id=0)
        >>> layout.moduli[1]  # a prime per head, at or above 50, no two equal
        ((53, 59), (61, 67))
        >>> layout.offsets[1], layout.rows[1]
        ((0, 53, 112, 173), 240)
        >>> engram.HashLayout.from_json(layout.to_json()) == layout
        True
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
        """Build the layout of these parameters, which the class describes.

        Args:
            rows_per_head: one int for all orders, or one int per order.

        Raises:
            TypeError: a number that is not an int. ValueError: a number or name out of its range.
        """
        layers, orders = as_integers("layers", layers), as_integers("orders", orders)
        if isinstance(rows_per_head, Iterable):
            rows_per_head = as_integers("rows_per_head", rows_per_head)
        else:
            rows_per_head = (as_integer("rows_per_head", rows_per_head),) * len(orders)
        return cls(
            as_integer("compressed_vocab", compressed_vocab),
            layers,
            orders,
            as_integer("heads", heads),
            rows_per_head,
            as_integer("pad_id", pad_id),
            as_integer("seed", seed),
            family,
            boundary,
            generator,
            as_integer("row_multiple", row_multiple),
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
        if self.family not in HASHES:
            raise ValueError(f"family (the hash) must be one of {', '.join(HASHES)}, not {self.family!r}")
        if self.boundary not in BOUNDARIES:
            raise ValueError(f"boundary must be one of {', '.join(BOUNDARIES)}, not {self.boundary!r}")
        if self.generator not in GENERATORS:
            raise ValueError(f"generator must be one of {', '.join(GENERATORS)}, not {self.generator!r}")
        if self.generator != "pcg64" and self.family != "multiply_xor":
            raise ValueError(
                f"generator {self.generator!r} draws multipliers, which the hash {self.family!r} does not use: "
                "leave it at 'pcg64'"
            )
        if not 1 <= self.row_multiple <= 2**20:
            raise ValueError(f"row_multiple must be in [1, 2**20], not {self.row_multiple}")
        if not 1 <= self.compressed_vocab < 2**31:
            raise ValueError(f"compressed_vocab must be in [1, 2**31), not {self.compressed_vocab}")
        if not self.layers:
            raise ValueError("layers is empty: give at least one layer that gets a table")
        if min(self.layers) < 0 or len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers must be different numbers >= 0, not {self.layers}")
        if not self.orders:
            raise ValueError("orders is empty: give at least one n-gram length, such as 2")
        if self.orders[0] < 2 or any(a >= b for a, b in pairwise(self.orders)):
            raise ValueError(f"orders must ascend without repeats and start at 2 or above, not {self.orders}")
        if self.orders[-1] > LONGEST:
            raise ValueError(f"orders must be at most {LONGEST}, not {self.orders[-1]}")
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
        """Draw odd numbers small enough that compressed id x multiplier stays below 2**63."""
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
        """Return a prime per head: the next one that no other head of the whole model has."""
        seen: set[int] = set()
        reached: dict[int, int] = {}  # all primes from the key up to the value are taken: a search resumes at the value

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
        """Return canonical JSON. Multipliers and seed are strings: above 2**53 a JSON double loses digits."""
        fields: dict[str, Any] = {"format": FORMAT}
        fields.update({name: getattr(self, name) for name in PARAMETERS + DERIVED})
        fields.update({name: getattr(self, name) for name, usual in DIALECT.items() if getattr(self, name) != usual})
        fields["seed"] = str(self.seed)
        fields["multipliers"] = {layer: [str(m) for m in self.multipliers[layer]] for layer in self.layers}
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> HashLayout:
        """Read what `to_json` wrote. All values are recomputed; if one differs, raise ValueError with its name."""
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"a hash layout must be JSON text; this is not: {error}") from error
        required = {"format", *PARAMETERS, *DERIVED}
        if not isinstance(fields, dict) or fields.get("format") != FORMAT:
            raise ValueError(f'not a hash layout: "format" must be {FORMAT!r}')
        if set(fields) - set(DIALECT) != required:
            raise ValueError(
                f"hash layout: missing or unknown fields {sorted(required ^ (set(fields) - set(DIALECT)))}"
            )
        if not isinstance(fields["seed"], str):
            raise ValueError('hash layout: "seed" must be a string, since a JSON number may have been rounded')
        parameters = {name: fields[name] for name in (*PARAMETERS, *DIALECT) if name in fields}
        try:
            parameters["seed"] = int(fields["seed"])
            # Check the claimed number of heads against the list in the file first, so that a tiny file cannot start a
            # huge prime search.
            claimed = as_integer("heads", fields["heads"]) * len(fields["orders"]) * len(fields["layers"])
            listed = sum(len(heads) for orders in fields["moduli"].values() for heads in orders)
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"hash layout: {error}") from error
        if claimed != listed:
            raise ValueError(f'hash layout: "moduli" lists {listed} heads, the parameters give {claimed}')
        try:
            layout = cls.build(**parameters)
        except TypeError as error:
            raise ValueError(f"hash layout: {error}") from error
        expected = json.loads(layout.to_json())
        for name in sorted({*fields, *expected}):
            if fields.get(name) != expected.get(name):
                raise ValueError(
                    f'hash layout: "{name}" is not what the parameters give '
                    f"({_difference(fields.get(name), expected.get(name))}); the file was altered, rounded or written "
                    "for another hash"
                )
        return layout


def _difference(read: Any, expected: Any) -> str:
    """Describe the first difference between two JSON values."""
    if isinstance(read, dict) and isinstance(expected, dict) and set(read) == set(expected):
        key = next(k for k in expected if read[k] != expected[k])
        return f"layer {key}: {_difference(read[key], expected[key])}"
    if isinstance(read, list) and isinstance(expected, list) and len(read) == len(expected):
        index = next(i for i in range(len(expected)) if read[i] != expected[i])
        return f"index {index}: {_difference(read[index], expected[index])}"
    return f"{json.dumps(read)[:80]} instead of {json.dumps(expected)[:80]}"


_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, splitmix64's step


def _splitmix64(state: int) -> int:
    """Return the output of splitmix64 for a state, modulo 2**64."""
    z = (state + _GOLDEN) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


_FACTOR = 97  # the largest prime that divides _PRIMORIAL, the product of all primes up to it
_PRIMORIAL = math.prod(p for p in range(2, _FACTOR + 1) if all(p % q for q in range(2, p)))


def _next_prime(n: int) -> int:
    """Return the smallest prime above n."""
    n += 1
    while not _is_prime(n):
        n += 1
        while n > _FACTOR and math.gcd(n, _PRIMORIAL) > 1:  # most composites, at a fraction of the test's cost
            n += 1
    return n


def _is_prime(n: int) -> bool:
    """Return True if n is prime (Miller-Rabin; the first six bases decide every n below 3.4e12, all of them every n
    below 3.3e24)."""
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
