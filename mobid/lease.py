# SPDX-License-Identifier: Apache-2.0
"""This peer's right to let lease-bound guests run, as far as it reaches at this moment.

A lease ends by itself, on a clock that no pause of a process or of the whole host stops (CLOCK_BOOTTIME). So
whoever acts by it compares with the clock at the moment of the act, and hands the deadline, never a "yes", to
whoever acts later: the shim stops its guest at the deadline and the switch drops its frames, whether or not
this process is still there to say so. Who grants it, and when, is decided in `proto/leases.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from mobid.signal import Changed

GUARD = 0.02
"""Seconds before the deadline from which nothing is begun any more: what is begun by it takes a moment."""


def boottime() -> float:
    """Seconds of CLOCK_BOOTTIME."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Lease:
    """The lease of one peer; there is none until it is extended for the first time."""

    def __init__(self, clock: Callable[[], float] = boottime) -> None:
        self.changed = Changed()
        """Set at every renewal, not when the lease runs out."""
        self.gained = Changed()
        """Set by a renewal before which there was no valid lease."""
        self._clock = clock
        self._deadline = 0.0

    @property
    def deadline(self) -> float:
        """Seconds of CLOCK_BOOTTIME; 0 if there was never a lease."""
        return self._deadline

    @property
    def deadline_ns(self) -> int:
        """The deadline as helpers take it, rounded down; 1, long past, if there was never a lease.

        A helper's 0 means that no lease is needed.
        """
        return max(1, int(self._deadline * 1e9))

    @property
    def valid(self) -> bool:
        """Whether a guest may begin to run by it now."""
        return self._clock() < self._deadline - GUARD

    def extend(self, at: float) -> None:
        """It holds until `at`, seconds of CLOCK_BOOTTIME; an earlier end than before changes nothing."""
        if at <= self._deadline:
            return
        held = self.valid
        self._deadline = at
        self.changed.set()
        if not held and self.valid:
            self.gained.set()
