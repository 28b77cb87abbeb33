# SPDX-License-Identifier: Apache-2.0
"""Whom to probe next, and the probes that are under way (SWIM §3.1, §4.3).

Members are probed in rounds: each exactly once a round, in an order that is new each round, so that the time
until a crashed one is probed is bounded and no two members probe in step. The order is that of the multiples
of a random number without a common divisor with the members' count, which needs no list of its own.

A probe that gets no answer in time asks helpers to try, and goes on trying itself; only when all of that is
silent too does it fail. The paper's probe has one try of its own. Each failure is told to all members, and
refuted to all, so with one try the bytes that a member sends at 10 % loss grow with the members' number;
three tries more make failures so rare that this does not show at 1,000 members.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field


class Rounds:
    """Positions 0 to `count` - 1, each once a round."""

    def __init__(self, rng: random.Random, count: int) -> None:
        self._rng = rng
        self._count = count
        self._left = 0
        self._step = 1
        self._place = 0

    def next(self) -> int:
        """The next position; `count` must not be 0."""
        if not self._left:
            self._left = self._count
            self._place = self._rng.randrange(self._count)
            self._step = self._coprime()
        self._left -= 1
        self._place = (self._place + self._step) % self._count
        return self._place

    def _coprime(self) -> int:
        while True:
            step = self._rng.randrange(self._count) + 1
            if math.gcd(step, self._count) == 1:
                return step


@dataclass(slots=True)
class Probe:
    """A question to `target` whether it is there; `verdict` is when its silence counts, `timeout` the seconds
    from one try to the next.
    """

    target: str
    verdict: float
    timeout: float
    hopeless: bool = False
    """It looks dead anyway: no helpers, and its silence says nothing new."""
    numbers: list[int] = field(default_factory=list)
    helpers: tuple[str, ...] = ()
    nacks: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Relay:
    """A question that this member passes on to `target` for `asker`, who calls it `number`."""

    asker: str
    number: int
    target: str


class Probes:
    """The questions under way, own and passed on, by the number in the ping."""

    def __init__(self) -> None:
        self._last = 0
        self._sent: dict[int, tuple[Probe, float]] = {}
        self._relays: dict[int, Relay] = {}

    def _next(self) -> int:
        self._last = (self._last + 1) & 0xFFFFFFFF
        return self._last

    def sent(self, probe: Probe, now: float) -> int:
        """A ping of this probe leaves now; returns its number."""
        number = self._next()
        probe.numbers.append(number)
        self._sent[number] = (probe, now)
        return number

    def passed_on(self, relay: Relay) -> int:
        """A ping for somebody else leaves now; returns its number."""
        number = self._next()
        self._relays[number] = relay
        return number

    def find(self, number: int) -> tuple[Probe, float] | None:
        """The probe whose ping had this number, and when that was sent."""
        return self._sent.get(number)

    def answered(self, target: str, sent: float) -> None:
        """`target` has answered a ping of `sent`: all probes of it that began until then are over.

        One may last much longer than those after it, if the own health has become better meanwhile; its
        verdict would be of silence that ended long ago.
        """
        for probe in {id(probe): probe for probe, at in self._sent.values() if at <= sent}.values():
            if probe.target == target:
                self.end(probe)

    def end(self, probe: Probe) -> None:
        """The probe is answered or has failed."""
        for number in probe.numbers:
            self._sent.pop(number, None)

    def take_relay(self, number: int) -> Relay | None:
        """The question passed on with this number, once."""
        return self._relays.pop(number, None)

    def relay(self, number: int) -> Relay | None:
        """The question passed on with this number."""
        return self._relays.get(number)

    @property
    def passing_on(self) -> int:
        """How many questions of others are under way."""
        return len(self._relays)

    def drop(self) -> None:
        """Forget all of them, without a verdict."""
        self._sent.clear()
        self._relays.clear()
