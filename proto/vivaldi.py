# SPDX-License-Identifier: Apache-2.0
"""Network coordinates: how far apart two peers are, without every pair having measured it.

Each peer has a point in a small Euclidean space and a *height*, the part of its delay that every path to it
shares (its access link). The estimated round trip between two peers is the distance of their points plus
both heights. Whenever a peer has measured a round trip to another one whose coordinate it was told, it moves
as if a spring of that length joined them, the further the less certain it is of its own place and the more
certain the other is of its. This is Vivaldi (Dabek, Cox, Kaashoek and Morris, *Vivaldi: a decentralized
network coordinate system*, SIGCOMM 2004, figure 3 and §5.4), with an adaptive timestep.

One sample may be an outlier (a busy host, a lost packet): the median of a peer's last three is what moves the
coordinate (Ledlie, Gardner and Seltzer, *Network coordinates in the wild*, NSDI 2007).

Places spread beyond those who measured them, so that a peer can estimate its distance to one it never spoke
to. A place is only as good as the measurements behind it; each peer keeps an account of its own error, and an
estimate counts once both errors are small.
"""

from __future__ import annotations

import math
import random
from typing import NamedTuple

DIMENSIONS = 4
"""Two and a height suffice in the paper; two more keep springs from getting tangled at the start."""

LEAST_HEIGHT = 10e-6
MOST_ERROR = 1.5
ERROR_WEIGHT = 0.25
"""The paper's c_e: how fast the own error follows the samples'."""

MOVE_WEIGHT = 0.25
"""The paper's c_c: which part of the way a sample moves the coordinate at most."""

LONGEST = 10.0
"""Seconds; a longer round trip is a stopped process, not a distance."""

SAMPLES = 3

SETTLED = 0.2
"""A place whose expected relative error is at most this may be used for an estimate."""


class Coordinate(NamedTuple):
    """A place: `vector` and `height` in seconds, `error` the expected relative error of an estimate."""

    vector: tuple[float, ...] = (0.0,) * DIMENSIONS
    height: float = LEAST_HEIGHT
    error: float = MOST_ERROR

    @property
    def sound(self) -> bool:
        """Whether it may be used: it came from another peer."""
        numbers = (*self.vector, self.height, self.error)
        within = all(math.isfinite(number) and abs(number) <= LONGEST for number in numbers)
        return within and len(self.vector) == DIMENSIONS and self.height > 0 and self.error > 0


def estimate(a: Coordinate, b: Coordinate) -> float:
    """The estimated round trip between two places, in seconds."""
    return math.dist(a.vector, b.vector) + a.height + b.height


class Vivaldi:
    """A peer's own coordinate, and what it has measured."""

    def __init__(self, rng: random.Random) -> None:
        self.coordinate = Coordinate()
        self._rng = rng
        self._places: dict[str, tuple[Coordinate, float]] = {}
        self._samples: dict[str, tuple[float, ...]] = {}

    def observe(self, peer: str, place: Coordinate, rtt: float) -> None:
        """A round trip to `peer`, which says it is at `place`, took `rtt` seconds."""
        if not place.sound or not 0.0 < rtt <= LONGEST:
            return
        samples = (*self._samples.get(peer, ()), rtt)[-SAMPLES:]
        self._samples[peer] = samples
        self._move(place, sorted(samples)[len(samples) // 2])

    def _move(self, place: Coordinate, rtt: float) -> None:
        own = self.coordinate
        expected = estimate(own, place)
        weight = own.error / (own.error + place.error)
        wrong = abs(expected - rtt) / rtt
        error = min(MOST_ERROR, wrong * ERROR_WEIGHT * weight + own.error * (1 - ERROR_WEIGHT * weight))
        force = MOVE_WEIGHT * weight * (rtt - expected)
        away = [mine - other for mine, other in zip(own.vector, place.vector, strict=True)]
        length = math.hypot(*away)
        if length < LEAST_HEIGHT:
            away = [self._rng.gauss(0.0, 1.0) for _ in own.vector]
            unit = [part / math.hypot(*away) for part in away]
        else:
            unit = [part / length for part in away]
        vector = tuple(mine + force * part for mine, part in zip(own.vector, unit, strict=True))
        height = own.height + force * (own.height + place.height) / max(expected, LEAST_HEIGHT)
        moved = Coordinate(vector, max(LEAST_HEIGHT, height), max(error, 1e-3))
        # A peer that was told rubbish until it is far outside begins again in the middle.
        self.coordinate = moved if moved.sound else Coordinate()

    def hear(self, peer: str, place: Coordinate, at: float) -> None:
        """At `at` (own clock) `peer` said that it is at `place`, perhaps to somebody else."""
        known = self._places.get(peer)
        if place.sound and (known is None or known[1] < at):
            self._places[peer] = place, at

    def place(self, peer: str) -> tuple[Coordinate, float] | None:
        """Where `peer` last said it is, and when; None if that was never heard."""
        return self._places.get(peer)

    def measured(self, peer: str) -> float | None:
        """The median of the last round trips to `peer` in seconds; None before the first."""
        samples = self._samples.get(peer)
        return sorted(samples)[len(samples) // 2] if samples else None

    def rtt(self, peer: str) -> float | None:
        """What a round trip to `peer` takes: measured, else estimated from places that are settled; None if
        neither can be had."""
        measured = self.measured(peer)
        if measured is not None or peer not in self._places:
            return measured
        place, _ = self._places[peer]
        if max(place.error, self.coordinate.error) > SETTLED:
            return None
        return estimate(self.coordinate, place)

    def forget(self, peer: str) -> None:
        """`peer` is no member any more."""
        self._places.pop(peer, None)
        self._samples.pop(peer, None)
