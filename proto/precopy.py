# SPDX-License-Identifier: Apache-2.0
"""When to stop copying and switch over: the arithmetic of pre-copy.

Each pass sends what changed since the one before, while the guest goes on changing things. What would be
left if the guest stopped now, the *residue*, is what it changes during one pass: the rate at which it
changes things times the time the last pass took. Sending that, at the bandwidth seen so far, plus what a
switch costs anyway (freeze, comparison, resume), is the downtime to expect. When that is within the target
it is time to switch, though never before the second pass: the first sends everything and says nothing about
the rate.

If the guest changes things faster than they can be sent, passes do not shrink. Then the policy decides: take
the downtime as it is, or give up. See Clark et al., *Live Migration of Virtual Machines*, NSDI 2005,
section 3.2, on the writable working set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LEAST_PASSES = 2
MOST_PASSES = 30
STALLED_PASSES = 3
SHRINKING = 0.9
"""A pass counts as progress if its residue is below this share of the least residue before."""

Stall = Literal["accept", "abort"]


@dataclass(frozen=True)
class Policy:
    """What is wanted. Seconds; `bandwidth` in bytes/s is a ceiling, 0 for none.

    `fixed_cost` is what the switch takes if nothing is left to send; `deadline` is when, on the clock of
    `now`, the migration must have switched or been given up.
    """

    target: float
    fixed_cost: float
    deadline: float
    on_stall: Stall = "accept"
    bandwidth: float = 0.0


@dataclass(frozen=True)
class Pass:
    """What a pass did. `content` is the bytes of changed pages and blocks, `sent` those on the wire."""

    content: int
    sent: int
    duration: float


@dataclass(frozen=True)
class Forecast:
    """What a switch now would mean: bytes on the wire and seconds; the rates are bytes/s."""

    residue: int
    downtime: float
    dirty_rate: float
    bandwidth: float


@dataclass(frozen=True)
class Again:
    """Another pass."""

    forecast: Forecast | None


@dataclass(frozen=True)
class SwitchOver:
    """Freeze now. `stalled`: the target will be missed, and the policy accepts that."""

    forecast: Forecast
    stalled: bool = False


@dataclass(frozen=True)
class GiveUp:
    """Abort the migration."""

    reason: str


Decision = Again | SwitchOver | GiveUp


class Precopy:
    """Keeps the passes of one migration and decides after each."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.passes: list[Pass] = []
        self._least_residue: float | None = None
        self._stalled = 0

    def decide(self, done: Pass, now: float) -> Decision:
        """What to do after this pass."""
        self.passes.append(done)
        if len(self.passes) < LEAST_PASSES:
            return Again(None)
        forecast = self._forecast()
        if forecast.downtime <= self.policy.target:
            return SwitchOver(forecast)
        self._watch(forecast)
        if now >= self.policy.deadline:
            return self._end(forecast, f"the deadline passed after {len(self.passes)} passes")
        if len(self.passes) >= MOST_PASSES:
            return self._end(forecast, f"{len(self.passes)} passes were not enough")
        if self._stalled >= STALLED_PASSES:
            return self._end(forecast, "the guest changes its memory faster than it can be sent")
        return Again(forecast)

    def _forecast(self) -> Forecast:
        last, before = self.passes[-1], self.passes[-2]
        # What the last pass found was changed while the pass before it ran.
        dirty_rate = last.content / max(before.duration, 1e-6)
        squeezed = last.sent / last.content if last.content else 0.0
        bandwidth = max(done.sent / max(done.duration, 1e-6) for done in self.passes)
        if self.policy.bandwidth:
            bandwidth = min(bandwidth, self.policy.bandwidth)
        residue = dirty_rate * last.duration * squeezed
        downtime = self.policy.fixed_cost + residue / max(bandwidth, 1.0)
        return Forecast(int(residue), downtime, dirty_rate, bandwidth)

    def _watch(self, forecast: Forecast) -> None:
        if self._least_residue is None or forecast.residue < self._least_residue * SHRINKING:
            self._stalled = 0
            self._least_residue = forecast.residue
        else:
            self._stalled += 1

    def _end(self, forecast: Forecast, reason: str) -> Decision:
        if self.policy.on_stall == "abort":
            expected = f"{forecast.downtime * 1000:.0f} ms of downtime would be needed"
            return GiveUp(f"{reason}: {expected}, {self.policy.target * 1000:.0f} ms were allowed")
        return SwitchOver(forecast, stalled=True)
