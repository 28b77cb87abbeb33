# SPDX-License-Identifier: Apache-2.0
"""How far another host's monotonic clock is from ours, by round trips.

Each round trip says: the other's reading lies between our sending and our receiving. The shortest one says
it best; half of it is the uncertainty (Cristian, *Probabilistic clock synchronization*, 1989).
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

ROUNDS = 8


@dataclass(frozen=True)
class Offset:
    """Nanoseconds to add to our monotonic clock to get the other's, give or take `uncertainty`."""

    offset: int
    uncertainty: int

    def to_ours(self, theirs: int) -> int:
        """A reading of the other clock, as ours would have shown it."""
        return theirs - self.offset


async def match_clocks(ask: Callable[[], Awaitable[int]], rounds: int = ROUNDS) -> Offset:
    """`ask` fetches the other's `CLOCK_MONOTONIC` in ns; what it raises comes out."""
    best: Offset | None = None
    for _ in range(rounds):
        before = time.monotonic_ns()
        theirs = await ask()
        after = time.monotonic_ns()
        half = (after - before + 1) // 2
        if best is None or half < best.uncertainty:
            best = Offset(theirs - (before + after) // 2, half)
    if best is None:
        raise ValueError("at least one round trip is needed")
    return best
