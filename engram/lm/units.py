"""Format counts with a prefix of powers of 1000, and bytes with one of powers of 1024."""

from __future__ import annotations

from collections.abc import Sequence


def format_count(number: float) -> str:
    """1_234_567 -> "1.23M": three significant digits and k, M, G or T (powers of 1000)."""
    return _scaled(number, 1000, ("", "k", "M", "G", "T"))


def format_bytes(number: float) -> str:
    """67_108_864 -> "64.0 MiB": three significant digits and a binary unit (powers of 1024)."""
    return _scaled(number, 1024, (" B", " KiB", " MiB", " GiB", " TiB"))


def _scaled(number: float, base: int, units: Sequence[str]) -> str:
    power = 0
    while abs(number) >= 999.5 and power < len(units) - 1:
        number, power = number / base, power + 1
    digits = 0 if power == 0 or abs(number) >= 99.95 else 1 if abs(number) >= 9.995 else 2
    return f"{number:.{digits}f}{units[power]}"
