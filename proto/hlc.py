# SPDX-License-Identifier: Apache-2.0
"""Hybrid logical clocks: stamps that respect causes and stay close to the time of day.

Clocks of different hosts disagree, so the time of day alone can put an effect before its cause. A logical
clock (Lamport 1978) never does, but says nothing to people. The hybrid one (Kulkarni, Demirbas, Madappa,
Avva and Leone, *Logical Physical Clocks*, OPODIS 2014) is the largest time of day that this peer has seen or
heard of, with a counter for what happens while that stands still.

A stamp is one integer, 48 bits of milliseconds since 1970 and 16 bits of counter, so that stamps compare as
the pairs do and a full counter carries into the milliseconds. Each stamp of one clock is larger than those
before, so a peer's id and a stamp name one event for ever.
"""

from __future__ import annotations

from typing import Final

COUNTER_BITS: Final = 16

MAX_AHEAD: Final = 600.0
"""Seconds that a stamp may be ahead of the own time of day. One further ahead comes from a clock that is
simply wrong, and would draw every other clock along for ever: it is not followed."""


def of_time(seconds: float) -> int:
    """The first stamp of a moment, seconds since 1970."""
    return max(0, int(seconds * 1000)) << COUNTER_BITS


def time_of(stamp: int) -> float:
    """Seconds since 1970, to the millisecond."""
    return (stamp >> COUNTER_BITS) / 1000


def believable(stamp: int, wall: float) -> bool:
    """Whether a clock that shows `wall` follows this stamp."""
    return stamp <= of_time(wall + MAX_AHEAD)


class Clock:
    """One peer's clock. `wall` is its time of day in seconds since 1970; it may jump in any direction."""

    def __init__(self, latest: int = 0) -> None:
        """`latest` is the largest stamp that an earlier process of this peer gave."""
        self._latest = latest

    def tick(self, wall: float) -> int:
        """A new stamp, for something that happens here or is sent."""
        self._latest = max(self._latest + 1, of_time(wall))
        return self._latest

    def witness(self, stamp: int, wall: float) -> None:
        """A stamp was heard: what happens here from now on is later."""
        if believable(stamp, wall):
            self._latest = max(self._latest, stamp)
