# SPDX-License-Identifier: Apache-2.0
"""The clocks of a simulated host.

Real time is the simulator's own and nobody in the mesh can read it. CLOCK_BOOTTIME runs at a rate of its own
within the drift that the settings allow, from a zero of its own, and begins again when the host does; it goes
on while the host stands still. CLOCK_MONOTONIC, by which a program's timers run, does not if the host was
suspended (`Clock.lost`). The wall clock is BOOTTIME plus an offset that somebody may set to anything.
"""

from __future__ import annotations

import random


class Clock:
    """One host's clocks; every argument `now` is real time in seconds."""

    __slots__ = ("_began", "_zero", "lost", "rate", "wall_offset")

    def __init__(self, rng: random.Random, drift: float) -> None:
        self.rate = 1.0 + rng.uniform(-0.49, 0.49) * drift
        self.wall_offset = 1.7e9 + rng.uniform(-5.0, 5.0)
        self.lost = 0.0
        """Seconds for which CLOCK_MONOTONIC has stood still."""
        self._began = 0.0
        self._zero = rng.uniform(1.0, 1e5)

    def boot(self, now: float) -> float:
        """CLOCK_BOOTTIME."""
        return self._zero + (now - self._began) * self.rate

    def real(self, boot: float) -> float:
        """The real time at which CLOCK_BOOTTIME shows `boot`, never before it does."""
        return self._began + (boot - self._zero) / self.rate + 1e-9

    def wall(self, now: float) -> float:
        """CLOCK_REALTIME."""
        return self.wall_offset + now * self.rate

    def restart(self, now: float) -> None:
        """The host boots: BOOTTIME begins anew."""
        self._began, self._zero, self.lost = now, 1.0, 0.0
