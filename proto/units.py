# SPDX-License-Identifier: Apache-2.0
"""Quantities as people write them, and as machines keep them.

Inside the program a size is an `int` of bytes, a rate an `int` of bytes per second, a time a `float` of
seconds, a share a `float` between 0 and 1. In files and on the command line they carry a unit: a rate and a
time always (is `50` milliseconds or seconds? bits or bytes?), a size may go without. This module is the only
border between the two.

Prefixes follow the standards: `64M` and `64MiB` are 64·2²⁰ bytes each, `64MB` is 64·10⁶ bytes, and rates are
decimal (`20mbit` is 20·10⁶ bits per second, as in tc). `mbps` is refused, since half of the world reads it as
bits and tc as bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Annotated, Any, Final

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

SIZE_UNITS: Final[Mapping[str, int]] = {
    "": 1,
    "b": 1,
    **{p: 1 << s for p, s in zip("kmgt", (10, 20, 30, 40), strict=True)},
    **{p + "ib": 1 << s for p, s in zip("kmgt", (10, 20, 30, 40), strict=True)},
    **{p + "b": 10**s for p, s in zip("kmgt", (3, 6, 9, 12), strict=True)},
}
# Bytes per second as a fraction (numerator, denominator): bits are eighths.
RATE_UNITS: Final[Mapping[str, tuple[int, int]]] = {
    "bit": (1, 8),
    **{p + "bit": (10**s, 8) for p, s in zip("kmg", (3, 6, 9), strict=True)},
    "b/s": (1, 1),
    **{p + "b/s": (10**s, 1) for p, s in zip("kmg", (3, 6, 9), strict=True)},
    **{p + "ib/s": (1 << s, 1) for p, s in zip("kmg", (10, 20, 30), strict=True)},
}
TIME_UNITS: Final[Mapping[str, Decimal]] = {
    "ns": Decimal("1e-9"),
    "us": Decimal("1e-6"),
    "µs": Decimal("1e-6"),
    "μs": Decimal("1e-6"),
    "ms": Decimal("1e-3"),
    "s": Decimal(1),
    "m": Decimal(60),
    "min": Decimal(60),
    "h": Decimal(3600),
    "d": Decimal(86400),
}
LARGEST: Final = 1 << 62
_NUMBER: Final = re.compile(
    r"\s*([0-9]{1,18}(?:\.[0-9]{0,9})?|\.[0-9]{1,9})\s*([^\s0-9.]*(?:/s)?)\s*", re.ASCII
)


class UnitError(ValueError):
    """A quantity that cannot be read; the text says what was written, what was expected, and an example."""


def _split(text: object, what: str, example: str) -> tuple[Decimal, str]:
    """Cut `12.5mbit` into its number and its unit, or raise UnitError."""
    if isinstance(text, bool) or not isinstance(text, str | int | float):
        raise UnitError(f"expected {what} such as {example}, not {shown(text)}")
    if isinstance(text, float) and not math.isfinite(text):
        raise UnitError(f"{text!r} is not {what}; write for example {example}")
    match = _NUMBER.fullmatch(str(text))
    if match is None:
        raise UnitError(f"{shown(text)} is not {what}; write for example {example}")
    return Decimal(match[1] if match[1] != "." else "0"), match[2]


def shown(value: object) -> str:
    """A value from outside, quoted and shortened, fit for an error message on a terminal."""
    text = repr(value)
    return text if len(text) <= 60 else text[:56] + "…" + text[-1]


def _whole(value: Decimal, text: object, what: str) -> int:
    if value != value.to_integral_value():
        raise UnitError(f"{shown(text)} is not a whole number of {what}")
    return _bounded(int(value), text)


def _bounded(value: int, text: object) -> int:
    if value > LARGEST:
        raise UnitError(f"{shown(text)} is too large")
    return value


def parse_size(text: object) -> int:
    """`64M`, `1.5GiB`, `100MB` or a bare number of bytes → bytes. Raises UnitError."""
    number, unit = _split(text, "a size", "64M")
    factor = SIZE_UNITS.get(unit.lower())
    if factor is None:
        raise UnitError(f"{shown(text)} has an unknown unit {unit!r}; a size has K, M, G or T, as in 64M")
    return _whole(number * factor, text, "bytes")


def parse_rate(text: object) -> int:
    """`20mbit`, `100MB/s`, `1.5gbit` → bytes per second; the unit is required. Raises UnitError."""
    number, unit = _split(text, "a rate", "20mbit or 100MB/s")
    if not unit:
        raise UnitError(f"{shown(text)} needs a unit; write for example {text}mbit or {text}MB/s")
    lower = unit.lower()
    if lower.endswith("bit/s"):
        lower = lower[:-2]
    if lower not in RATE_UNITS:
        raise UnitError(
            f"{shown(text)} has an unknown unit {unit!r}; "
            "a rate has bit, kbit, mbit, gbit, kB/s, MB/s or GB/s"
        )
    numerator, denominator = RATE_UNITS[lower]
    value = number * numerator / denominator
    if 0 < value < 1:
        raise UnitError(f"{shown(text)} is less than one byte per second")
    return _bounded(int(value), text)


def parse_time(text: object) -> float:
    """`50ms`, `10s`, `1h` → seconds; the unit is required (a bare 0 is fine). Raises UnitError."""
    number, unit = _split(text, "a time", "50ms")
    if not unit and number == 0:
        return 0.0
    if not unit:
        raise UnitError(f"{shown(text)} needs a unit; write for example {text}ms or {text}s")
    factor = TIME_UNITS.get(unit if unit in TIME_UNITS else unit.lower())
    if factor is None:
        raise UnitError(
            f"{shown(text)} has an unknown unit {unit!r}; a time has us, ms, s, m, h or d, as in 50ms"
        )
    return float(number * factor)


def parse_percentage(text: object) -> float:
    """`0.1%` → 0.001; the sign is required, and the share lies between 0% and 100%. Raises UnitError."""
    number, unit = _split(text, "a percentage", "0.1%")
    if not unit and number == 0:
        return 0.0
    if unit != "%":
        raise UnitError(f"{shown(text)} needs a percent sign; write for example 0.1%")
    if number > 100:
        raise UnitError(f"{shown(text)} is more than 100%")
    return float(number / 100)


def _scaled(value: float, steps: tuple[tuple[float, str], ...]) -> str:
    """The value in the largest unit that leaves at least 1, with about three digits."""
    factor, unit = next(((f, u) for f, u in steps if value >= f), steps[-1])
    number = value / factor
    digits = 0 if number >= 100 or number == int(number) else 1 if number >= 10 else 2
    text = f"{number:.{digits}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) + unit


def format_size(value: float) -> str:
    """Bytes → `64M`, `1.5G`, `812` (binary prefixes, as parse_size reads them; rounded for people)."""
    return _scaled(value, ((1 << 40, "T"), (1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K"), (1, "")))


def format_rate(value: float) -> str:
    """Bytes per second → `20mbit`."""
    return _scaled(value * 8, ((1e9, "gbit"), (1e6, "mbit"), (1e3, "kbit"), (1, "bit")))


def format_time(value: float) -> str:
    """Seconds → `50ms`, `1.2s`, `3m20s`, `2h05m`, `4d02h`."""
    if value < 0:
        return "-" + format_time(-value)
    if value < 60:
        return _scaled(value, ((1, "s"), (1e-3, "ms"), (1e-6, "us"))) if value else "0s"
    seconds = int(value)
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02}s"
    minutes = seconds // 60
    return (
        f"{minutes // 60}h{minutes % 60:02}m"
        if minutes < 1440
        else f"{minutes // 1440}d{minutes // 60 % 24:02}h"
    )


def format_percentage(share: float) -> str:
    """0.001 → `0.1%`."""
    return f"{share * 100:.6g}%"


def _field(
    parse: Callable[[object], Any], write: Callable[[Any], str], schema: dict[str, Any]
) -> tuple[Any, ...]:
    """What a pydantic field of a quantity needs: how it is read, written, and described to editors."""
    return BeforeValidator(parse), PlainSerializer(write, when_used="json"), WithJsonSchema(schema)


Size = Annotated[
    int,
    *_field(
        parse_size,
        int,
        {
            "anyOf": [
                {"type": "integer", "minimum": 0},
                {"type": "string", "pattern": r"^[0-9.]+ *([kKmMgGtT]?(i?[bB])?)$"},
            ],
            "description": "a size: bytes, or a number with K, M, G, T",
            "examples": ["64M", "1.5G"],
        },
    ),
]
Rate = Annotated[
    int,
    *_field(
        parse_rate,
        lambda value: f"{value}B/s",
        {
            "type": "string",
            "pattern": r"^[0-9.]+ *([kKmMgG]?bit(/s)?|[kKmMgG]?i?B/s)$",
            "description": "a rate with its unit",
            "examples": ["20mbit", "100MB/s"],
        },
    ),
]
Duration = Annotated[
    float,
    *_field(
        parse_time,
        lambda value: f"{value:.9f}".rstrip("0").rstrip(".") + "s",
        {
            "type": "string",
            "pattern": r"^[0-9.]+ *(ns|us|µs|ms|s|m|min|h|d)$",
            "description": "a time with its unit",
            "examples": ["50ms", "10s"],
        },
    ),
]
Percentage = Annotated[
    float,
    *_field(
        parse_percentage,
        format_percentage,
        {"type": "string", "pattern": r"^[0-9.]+ *%$", "description": "a percentage", "examples": ["0.1%"]},
    ),
]
