# SPDX-License-Identifier: Apache-2.0
"""How long a member is suspected before it counts as dead (Lifeguard's dynamic suspicion timeout, §IV-B).

One accuser may be the one that is cut off, so its word alone gets the longest timeout. Each further member
that suspects the same on its own shortens it, on a logarithmic scale, down to the shortest, which is just
long enough for the news to reach the suspected member and its refutation to come back.
"""

from __future__ import annotations

import math


class Suspicion:
    """One member under suspicion. `wanted` is how many further accusers bring the shortest timeout."""

    __slots__ = ("_longest", "_shortest", "_wanted", "accusers", "begun")

    def __init__(self, begun: float, accuser: str, shortest: float, longest: float, wanted: int) -> None:
        self.begun = begun
        self.accusers = {accuser}
        self._shortest = shortest
        self._longest = longest
        self._wanted = wanted

    def confirm(self, accuser: str) -> bool:
        """Another member suspects it too; whether that is news that should be spread."""
        if accuser in self.accusers or len(self.accusers) > self._wanted:
            return False
        self.accusers.add(accuser)
        return True

    @property
    def deadline(self) -> float:
        """When the member counts as dead; comes nearer with each confirmation."""
        if self._wanted < 1:
            return self.begun + self._shortest
        share = math.log(len(self.accusers)) / math.log(self._wanted + 1)
        return self.begun + max(self._shortest, self._longest - share * (self._longest - self._shortest))


def shortest(factor: float, members: int, period: float) -> float:
    """The shortest suspicion in seconds: news needs time in proportion to the logarithm of the members."""
    return factor * max(1.0, math.log10(max(members, 1))) * period
