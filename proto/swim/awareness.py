# SPDX-License-Identifier: Apache-2.0
"""A member's doubt about its own health (Lifeguard's local health multiplier, §IV-A).

A member that does not get answers may itself be the one that is slow: it then hears late and judges others by
what it missed. Each sign of that (a failed probe, a helper that sent no nack, having to refute that one is
suspected) raises the score, each probe that went well lowers it. Whoever doubts itself probes less often and
waits longer before it accuses.
"""

from __future__ import annotations


class Awareness:
    """The score, from 0 (healthy) to `worst`."""

    def __init__(self, worst: int) -> None:
        self._worst = worst
        self.score = 0

    def note(self, change: int) -> None:
        """Signs of bad (positive) or good (negative) health."""
        self.score = min(self._worst, max(0, self.score + change))

    @property
    def factor(self) -> int:
        """By how much intervals and timeouts are longer now."""
        return 1 + self.score
