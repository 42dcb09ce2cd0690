"""EngramConfig: everything that defines a memory, in one frozen value. Bad combinations are refused with a reason."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from typing import Any

from engram.storage.untrusted import parse_json

_CHOICES = {
    "hash": ("multiply_xor", "xxh64", "one_row"),
    "gate": ("signed_sqrt", "plain", "none"),
    "inject": ("residual", "values"),
    "table_init": ("zero", "normal"),
    "table_dtype": ("float32", "bfloat16"),
    "conv_init": ("zero", "uniform"),
    "boundary": ("pad", "dead", "eos"),
    "generator": ("pcg64", "splitmix64"),
}
LONGEST = 16  # tokens in an n-gram; hash.c keeps the window in an array of this length
_MANY = 1 << 16  # numbers in one sequence
_SMALLEST = 2.0**-126  # epsilon of a float32 norm; anything smaller loses digits, or is 0
_WHOLE = ("heads", "head_dim", "pad_id", "seed", "conv_kernel", "row_multiple")


def as_integer(name: str, value: Any) -> int:
    """Return an int, of NumPy too, as a Python int. Raise TypeError with the name of the argument for anything else: a
    float is never rounded."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an int, not {value}")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, not {value!r}") from None


def as_integers(name: str, values: Any) -> tuple[int, ...]:
    """Return several ints, checked by `as_integer`. Raise TypeError or ValueError with the name of the argument."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a sequence of ints, not {values!r}")
    numbers = tuple(as_integer(name, value) for value in islice(values, _MANY + 1))
    if len(numbers) > _MANY:
        raise ValueError(f"{name} must have at most {_MANY:,} numbers")
    return numbers


def real(name: str, value: Any) -> float:
    """Return a finite number, of NumPy too, as a float. Raise TypeError or ValueError with the name of the argument."""
    if isinstance(value, (bool, str, bytes)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not math.isfinite(number := float(value)):
        raise ValueError(f"{name} must be finite, not {number}")
    return number


def check_heads(layers: int, orders: int, heads: int) -> None:
    """Raise ValueError if a model has more hash heads than primes can be searched for in a few seconds."""
    if layers * orders * heads > _MANY:
        raise ValueError(
            f"{layers} layers x {orders} orders x {heads:,} heads are {layers * orders * heads:,} hash heads: one "
            f"model may have at most {_MANY:,}"
        )


@dataclass(frozen=True)
class EngramConfig:
    """Shape and rules of one model's n-gram memory.

    Raises:
        TypeError: a field of the wrong type. ValueError: values that do not fit together, named in the message.

    Example:
        >>> import engram
        >>> config = engram.EngramConfig(layers=(1, 3), orders=(2, 3), heads=4, head_dim=32, rows_per_head=10_000)
        >>> config.columns, config.d_mem  # rows and values that a position reads in one layer
        (8, 256)
        >>> engram.EngramConfig.preset("paper-27b").replace(layers=(1,)).row_counts
        (2262400, 2262400)
        >>> engram.EngramConfig(orders=(3, 2))
        Traceback (most recent call last):
        ValueError: orders must be distinct, ascending and >= 2, not (3, 2)

    Attributes:
        layers: 0-based decoder layers that own a table, ascending.
        orders: n-gram lengths, ascending, each >= 2. (2, 3) are bigrams and trigrams.
        heads: hash heads per order; each reads one row, so a position reads len(orders) * heads rows.
        head_dim: values per row (D). The module sees d_mem = len(orders) * heads * head_dim per position.
        rows_per_head: rows of one head; the true count is the next unused prime at or above it. An int, or one per
            order.
        pad_id: raw token id that stands for positions before the start (mapped through the token map). With
            boundary="eos" the id of the end-of-sequence token.
        boundary: what ends the look-back of a window besides the start and another document: nothing ("pad"), dead
            positions, which have the id -1 and a gate of 0 ("dead", DeepSeek-V4.1), or end-of-sequence tokens ("eos",
            Qwen).
        seed: seed of the hash multipliers, and of a normal table init.
        hash: "multiply_xor" (the paper), "xxh64" (another hash, to test that the hash does not matter) or "one_row"
            (control: every n-gram reads the same row, so only the module is left).
        generator: generator of the multipliers: "pcg64" (the paper, DeepSeek) or "splitmix64" (Qwen).
        row_multiple: the rows of a table are padded to a multiple of this number (Qwen: 128).
        gate: "signed_sqrt" (released code), "plain" (the paper's equation), "none" (gate fixed to 1).
        conv_kernel: taps of the causal depthwise convolution; 0 leaves it out.
        conv_dilation: lag between taps; None means the longest order.
        conv_init: "zero" (paper) or "uniform" (PyTorch's default, as in the released demo).
        bias: biases on the key and value projections (the released demo has them).
        inject: "residual" adds to the hidden state before the block; "values" adds to the block's attention values.
        table_init: "zero", or "normal" rows of standard deviation table_std.
        table_dtype: "float32" or "bfloat16" storage of rows.
        train_tables: False freezes the rows (control: a random table).
        gate_eps: epsilon of the key and query norms (1e-20 in DeepSeek-V4.1-Flash); None means the machine epsilon of
            the dtype. conv_eps: epsilon of the norm before the convolution.
        compressed_vocab: size that the token map must have, if the format fixes it; None accepts any.
    """

    layers: tuple[int, ...] = (1,)
    orders: tuple[int, ...] = (2, 3)
    heads: int = 8
    head_dim: int = 64
    rows_per_head: int | tuple[int, ...] = 65536
    pad_id: int = 0
    seed: int = 0
    hash: str = "multiply_xor"
    gate: str = "signed_sqrt"
    conv_kernel: int = 4
    conv_dilation: int | None = None
    conv_init: str = "zero"
    bias: bool = False
    inject: str = "residual"
    table_init: str = "zero"
    table_std: float = 1.0
    table_dtype: str = "float32"
    train_tables: bool = True
    gate_eps: float | None = 1e-6
    conv_eps: float = 1e-6
    compressed_vocab: int | None = None
    boundary: str = "pad"
    generator: str = "pcg64"
    row_multiple: int = 1

    def __post_init__(self) -> None:
        for name in ("layers", "orders"):
            object.__setattr__(self, name, as_integers(name, getattr(self, name)))
        if isinstance(self.rows_per_head, Iterable):
            object.__setattr__(self, "rows_per_head", as_integers("rows_per_head", self.rows_per_head))
        for name in (*_WHOLE, "rows_per_head", "conv_dilation", "compressed_vocab"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, tuple):
                object.__setattr__(self, name, as_integer(name, value))
        for name in ("bias", "train_tables"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, not {getattr(self, name)!r}")
        for name in ("table_std", "gate_eps", "conv_eps"):
            if getattr(self, name) is not None or name != "gate_eps":
                object.__setattr__(self, name, real(name, getattr(self, name)))
        if self.table_std < 0:
            raise ValueError(f"table_std, a standard deviation, must be at least 0, not {self.table_std}")
        for name in ("gate_eps", "conv_eps"):
            if (value := getattr(self, name)) is not None and value < _SMALLEST:
                raise ValueError(
                    f"{name}, the epsilon of a float32 norm, must be at least {_SMALLEST:.3g}, not {value}"
                )
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise ValueError(f"layers must be distinct, ascending and >= 0, not {self.layers}")
        if not self.orders or list(self.orders) != sorted(set(self.orders)) or self.orders[0] < 2:
            raise ValueError(f"orders must be distinct, ascending and >= 2, not {self.orders}")
        if self.orders[-1] > LONGEST:
            raise ValueError(f"orders must be at most {LONGEST}, not {self.orders[-1]}")
        if self.heads < 1 or self.head_dim < 1:
            raise ValueError(f"heads and head_dim must be >= 1, not {self.heads} and {self.head_dim}")
        check_heads(len(self.layers), len(self.orders), self.heads)
        if isinstance(self.rows_per_head, tuple) and len(self.rows_per_head) != len(self.orders):
            raise ValueError(
                f"rows_per_head has {len(self.rows_per_head)} numbers for {len(self.orders)} orders: give one int, or "
                "one per order"
            )
        if min(self.row_counts) < 1:
            raise ValueError(f"rows_per_head must be >= 1, not {self.rows_per_head}")
        if self.conv_kernel < 0 or (self.conv_dilation is not None and self.conv_dilation < 1):
            raise ValueError(
                f"conv_kernel must be >= 0 and conv_dilation >= 1 or None, not {self.conv_kernel} and "
                f"{self.conv_dilation}"
            )
        if self.table_init == "zero" and not self.train_tables:
            raise ValueError("a frozen table of zeros is not a memory: use table_init='normal' with train_tables=False")
        if self.generator == "splitmix64" and self.hash != "multiply_xor":
            raise ValueError(f"generator='splitmix64' draws multipliers, which hash={self.hash!r} does not use")
        if self.row_multiple < 1:
            raise ValueError(f"row_multiple must be >= 1, not {self.row_multiple}")
        if self.pad_id < 0:
            raise ValueError(f"pad_id, a raw token id, must be >= 0, not {self.pad_id}")

    @property
    def row_counts(self) -> tuple[int, ...]:
        """Rows per head, one number per order."""
        rows = self.rows_per_head
        return rows if isinstance(rows, tuple) else (rows,) * len(self.orders)

    @property
    def columns(self) -> int:
        """Rows read per position and layer: C = orders x heads."""
        return len(self.orders) * self.heads

    @property
    def d_mem(self) -> int:
        """Width of one position's concatenated rows: C x D."""
        return self.columns * self.head_dim

    @property
    def dilation(self) -> int:
        """Lag between the taps of the convolution, in positions."""
        return self.orders[-1] if self.conv_dilation is None else self.conv_dilation

    def replace(self, **changes: Any) -> EngramConfig:
        """Return a copy with some fields changed. All fields are checked again."""
        return replace(self, **changes)

    def to_json(self) -> str:
        """Return all fields as JSON, which `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> EngramConfig:
        """Read what `to_json` wrote. Raise ValueError for an unknown field or a value of another type."""
        values = parse_json(text)
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(
                f"unknown EngramConfig fields: {', '.join(sorted(unknown))}. Remove them, or read the file with the "
                "version that wrote it"
            )
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"EngramConfig: {error}") from error

    @classmethod
    def preset(cls, name: str) -> EngramConfig:
        """Return a published configuration: "demo", "paper-27b", "paper-40b", "deepseek-v4.1-flash" or
        "qwen3.8-flash-next". DeepSeek's rows are released as fp8: EngramMemory.encode_tables("fp8") stores them so.

        Raises:
            ValueError: an unknown name; the message lists the known ones.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
        return PRESETS[name]


_PAPER = EngramConfig(
    layers=(1, 14), heads=8, head_dim=80, rows_per_head=2_262_400, pad_id=2, compressed_vocab=98_627
)  # fmt: skip

PRESETS = {
    # The released single-file demo, DeepSeek-V3 tokenizer.
    "demo": EngramConfig(
        layers=(1, 15),
        heads=8,
        head_dim=64,
        rows_per_head=646_400,
        pad_id=2,
        bias=True,
        table_init="normal",
        conv_init="uniform",
        gate_eps=None,
        conv_eps=1e-5,
        compressed_vocab=98_627,
    ),
    # arXiv 2601.07372: 5.7B and 18.5B table parameters, hidden size 2,560, 4 residual streams.
    "paper-27b": _PAPER,
    "paper-40b": _PAPER.replace(rows_per_head=7_239_680),
    # Hidden size 5,120, 4 streams; 196B table parameters in fp8 (encode_tables("fp8")): 264 bytes per row.
    "deepseek-v4.1-flash": EngramConfig(
        layers=(1, 14),
        orders=(2, 3, 4),
        heads=8,
        head_dim=256,
        rows_per_head=16_000_000,
        pad_id=2,
        conv_kernel=0,
        gate_eps=1e-20,
        boundary="dead",
        table_dtype="bfloat16",
        compressed_vocab=99_092,
    ),
    # Hidden size 2,560, 4 streams; raw ids (TokenMap.identity); its config counts the layer as 2.
    "qwen3.8-flash-next": EngramConfig(
        layers=(1,),
        heads=8,
        head_dim=160,
        rows_per_head=20_000_000,
        pad_id=248_044,
        seed=1234,
        boundary="eos",
        generator="splitmix64",
        row_multiple=128,
        table_dtype="bfloat16",
        compressed_vocab=248_320,
    ),
}
