# SPDX-License-Identifier: Apache-2.0
"""Quantities with units: what is read, what is refused in which words; written ones read back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from proto import units


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("64M", 64 << 20),
        ("64MiB", 64 << 20),
        ("64MB", 64_000_000),
        ("1.5g", 3 << 29),
        ("0", 0),
        (4096, 4096),
        ("512 K", 512 << 10),
    ],
)
def test_size(text: object, expected: int) -> None:
    assert units.parse_size(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("20mbit", 2_500_000),
        ("20Mbit/s", 2_500_000),
        ("100MB/s", 100_000_000),
        ("1gbit", 125_000_000),
        ("8bit", 1),
        ("1MiB/s", 1 << 20),
        ("0mbit", 0),
    ],
)
def test_rate(text: object, expected: int) -> None:
    assert units.parse_rate(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("50ms", 0.05), ("1.5s", 1.5), ("1h", 3600.0), ("250us", 250e-6), ("2m", 120.0), (0, 0.0), ("0", 0.0)],
)
def test_time(text: object, expected: float) -> None:
    assert units.parse_time(text) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("text", "expected"), [("0.1%", 0.001), ("100%", 1.0), ("0", 0.0), ("2 %", 0.02)])
def test_percentage(text: object, expected: float) -> None:
    assert units.parse_percentage(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (units.parse_size, "64X", "'64X' has an unknown unit 'X'; a size has K, M, G or T, as in 64M"),
        (units.parse_size, "", "'' is not a size; write for example 64M"),
        (units.parse_size, "-5M", "'-5M' is not a size; write for example 64M"),
        (units.parse_size, True, "expected a size such as 64M, not True"),
        (units.parse_size, None, "expected a size such as 64M, not None"),
        (units.parse_size, float("nan"), "nan is not a size; write for example 64M"),
        (units.parse_size, "0.3", "'0.3' is not a whole number of bytes"),
        (units.parse_size, "999999999T", "'999999999T' is too large"),
        (units.parse_rate, "20", "'20' needs a unit; write for example 20mbit or 20MB/s"),
        (
            units.parse_rate,
            "20mbps",
            "'20mbps' has an unknown unit 'mbps'; a rate has bit, kbit, mbit, gbit, kB/s, MB/s or GB/s",
        ),
        (units.parse_rate, "1bit", "'1bit' is less than one byte per second"),
        (units.parse_time, 50, "50 needs a unit; write for example 50ms or 50s"),
        (
            units.parse_time,
            "5 fortnights",
            "'5 fortnights' has an unknown unit 'fortnights'; a time has us, ms, s, m, h or d, as in 50ms",
        ),
        (units.parse_percentage, "0.1", "'0.1' needs a percent sign; write for example 0.1%"),
        (units.parse_percentage, "101%", "'101%' is more than 100%"),
    ],
)
def test_refused(parse: object, text: object, message: str) -> None:
    assert callable(parse)
    with pytest.raises(units.UnitError) as error:
        parse(text)
    assert str(error.value) == message


@given(st.text(max_size=30) | st.floats() | st.integers() | st.binary(max_size=8))
def test_anything_is_read_or_refused_in_words(text: object) -> None:
    for parse in (units.parse_size, units.parse_rate, units.parse_time, units.parse_percentage):
        value: float | None = None
        message = ""
        try:
            value = parse(text)
        except units.UnitError as error:
            message = str(error)
        assert message.isprintable()
        assert bool(message) != (value is not None and 0 <= value <= 10**24)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (units.format_size(64 << 20), "64M"),
        (units.format_size(812), "812"),
        (units.format_size(1_600_000_000), "1.49G"),
        (units.format_rate(2_500_000), "20mbit"),
        (units.format_time(0.05), "50ms"),
        (units.format_time(0.00123), "1.23ms"),
        (units.format_time(200), "3m20s"),
        (units.format_time(7500), "2h05m"),
        (units.format_time(0), "0s"),
        (units.format_percentage(0.001), "0.1%"),
    ],
)
def test_format(text: str, expected: str) -> None:
    assert text == expected


class Quantities(BaseModel):
    size: units.Size
    rate: units.Rate
    delay: units.Duration
    loss: units.Percentage


@given(st.integers(0, 1 << 50), st.integers(0, 1 << 40), st.integers(0, 10**9), st.integers(0, 10**6))
def test_a_field_written_as_json_reads_back(size: int, rate: int, delay_ns: int, loss_ppm: int) -> None:
    before = Quantities.model_construct(size=size, rate=rate, delay=delay_ns / 1e9, loss=loss_ppm / 1e6)
    after = Quantities.model_validate_json(before.model_dump_json())
    assert (after.size, after.rate) == (size, rate)
    assert after.delay == pytest.approx(delay_ns / 1e9, abs=1e-9)
    assert after.loss == pytest.approx(loss_ppm / 1e6, abs=1e-8)
