# SPDX-License-Identifier: Apache-2.0
"""How many bytes may be under way to one peer, so that what comes after them need not wait long.

Nobody says how fast the way to a peer is, so it is measured: one message at a time is timed from leaving to
its answer. If that was quick, twice as much may be under way, if it was slow, half as much. It begins with
little, as TCP does: on a fast way that is over after a few answers, and a slow one is not filled for seconds.

If the timed messages are small, the quickest answer tells how long the way is, and only what an answer takes
beyond that counts: it has waited. Else a long way and a narrow one look alike, and are treated so.
"""

from __future__ import annotations

IDLE = 0.02
"""In `election`s: an answer so quick has waited for nothing."""
QUICK = 0.25
SLOW = 0.5
"""A heartbeat or question that waits behind what is under way must not be taken for lost."""

FLOOR = 4096
"""No window should be smaller, in bytes: what is cut into crumbs costs more in messages than it saves."""


class Pace:
    """It begins with `least` bytes, and never has less. `small`: the timed messages are."""

    __slots__ = ("_election", "_idle", "_least", "_most", "_quickest", "_small", "_timed", "window")

    def __init__(self, least: int, most: int, election: float, small: bool = False) -> None:
        self._election = election
        self._small = small
        self._quickest = float("inf")
        self._most = most
        self._least = min(max(1, least), most)
        self._idle = False
        self._timed: tuple[int, float, int] | None = None
        self.window = self._least
        """So many bytes may be under way."""

    def restart(self) -> None:
        """What was known of the way may be true no more."""
        self.window = self._least

    def sent(self, number: int, now: float) -> None:
        """A message leaves; answers have its number or a higher one. With a lower number all begins anew."""
        if self._timed is None or number < self._timed[0]:
            self._timed = (number, now, self.window)

    def asked_again(self) -> None:
        """What was sent has been asked for again: it was lost, or is still under way."""
        self.window = max(self._least, self.window // 2)

    def answered(self, number: int, now: float) -> bool:
        """An answer is here; False if that to the timed message is still to come."""
        if self._timed is None:
            return True
        if number < self._timed[0]:
            return False
        _, sent_at, window = self._timed
        took = now - sent_at
        self._timed = None
        if self._small:
            self._quickest = min(self._quickest, took)
            took -= self._quickest
        self._idle = took <= IDLE * self._election
        if took <= QUICK * self._election:
            self.window = min(self._most, max(self.window, 2 * window))
        elif took > SLOW * self._election:
            self.window = max(self._least, min(self.window, window // 2))
        return True

    def arrived(self, size: int) -> None:
        """So many bytes are known to have arrived: as many more may follow, if nothing waits on the way."""
        if self._idle:
            self.window = min(self._most, self.window + size)
