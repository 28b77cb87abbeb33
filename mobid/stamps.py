# SPDX-License-Identifier: Apache-2.0
"""This peer's hybrid logical clock: `proto/hlc.py` over the host's time of day.

Its stamps go with every event and every proposal; it is told of the stamps in the records of the log and in
the streams of events, so that whatever happens after them here has a larger one.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from proto import hlc


class HybridClock:
    """`wall` gives the time of day in seconds since 1970."""

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self.wall = wall
        self._clock = hlc.Clock()

    def now(self) -> int:
        """A new stamp."""
        return self._clock.tick(self.wall())

    def witness(self, stamp: int) -> None:
        """A stamp of another peer, or of an earlier process of this one, was heard."""
        self._clock.witness(stamp, self.wall())

    @property
    def limit(self) -> int:
        """The largest stamp that this clock would follow now."""
        return hlc.of_time(self.wall() + hlc.MAX_AHEAD)
