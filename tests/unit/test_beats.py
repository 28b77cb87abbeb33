# SPDX-License-Identifier: Apache-2.0
"""The witness against running twice is itself right."""

from __future__ import annotations

from tests.guest.beats import Beat, overlaps, parse, stretches

BOOT = "0" * 8 + "-0000-0000-0000-" + "0" * 12


def beats(copy: str, first: float, last: float, step: float = 0.07) -> list[Beat]:
    count = int((last - first) / step) + 1
    return [Beat(first + n * step, copy, BOOT, n) for n in range(count)]


def test_whole_lines_are_beats() -> None:
    line = f"beat {BOOT} 7 1700000000 250000\r\n"
    assert parse(f"noise\n{line}beat {BOOT} 8 17".encode()) == [Beat(1700000000.25, "", BOOT, 7)]


def test_a_copy_that_stood_still_has_two_stretches() -> None:
    found = stretches(beats("a", 0, 1) + beats("a", 5, 6))
    assert [(copy, round(first), round(last)) for copy, first, last in found] == [("a", 0, 1), ("a", 5, 6)]


def test_one_copy_after_the_other_is_well() -> None:
    assert not overlaps(beats("a", 0, 1) + beats("b", 1, 2) + beats("a", 2, 3))
    assert not overlaps(beats("a", 0, 1) + beats("b", 1.5, 1.9) + beats("a", 3, 4))


def test_two_copies_at_once_are_found() -> None:
    assert len(overlaps(beats("a", 0, 3) + beats("b", 1, 2))) == 1
    assert len(overlaps(beats("a", 0, 1.1) + beats("b", 1, 2))) == 1
    assert len(overlaps(beats("a", 0, 3) + beats("b", 1, 1))) == 1
    assert not overlaps(beats("a", 0, 3) + beats("b", 1, 1.2), moment=0.5)
    assert len(overlaps(beats("a", 0, 9) + beats("b", 1, 2) + beats("c", 8, 10))) == 2
