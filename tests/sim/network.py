# SPDX-License-Identifier: Apache-2.0
"""The network between the simulated hosts: late, lossy, doubling, reordering, and cut in every way.

Hosts stand at sites; a pair's delay is that of a LAN or of a WAN. A pair's messages keep their order, as
those of one connection do, except in seeds in which each rolls its own dice. A cut is of one direction
between two hosts, so that partitions can be partial and asymmetric.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

Deliver = Callable[[str, str, Any], None]


class Network:
    """`at(after, run, *arguments)` is the simulator's; `deliver(to, sender, message)` gets what arrives."""

    def __init__(self, rng: random.Random, at: Callable[..., None], deliver: Deliver) -> None:
        self._rng = rng
        self._at = at
        self._deliver = deliver
        self._sites: dict[str, int] = {}
        self._delays: dict[tuple[int, int], float] = {}
        self._cut: dict[tuple[str, str], int] = {}
        self.loss = 0.0
        self.doubling = 0.0
        self.late = 0.0
        """How probably a message comes up to `longest` seconds late."""
        self.longest = 2.0
        self.wan = rng.choice((0.0, 0.01, 0.04, 0.12))
        """Longest one-way delay between two sites."""
        self.ordered = rng.random() < 0.7
        self._last: dict[tuple[str, str], float] = {}
        self.now = 0.0
        """Real time, kept by the world."""

    def place(self, host: str, site: int) -> None:
        """A host is connected at a site."""
        self._sites[host] = site

    def delay(self, a: str, b: str) -> float:
        """Seconds from `a` to `b` without misfortune."""
        pair = (self._sites[a], self._sites[b])
        base = self._delays.get(pair)
        if base is None:
            longest = 0.0004 if pair[0] == pair[1] else self.wan
            base = self._delays[pair] = self._delays[pair[1], pair[0]] = longest * self._rng.uniform(0.3, 1.0)
        return base + 0.0002 * self._rng.random()

    def send(self, sender: str, to: str, message: Any) -> None:
        """It arrives some time, or twice, or never."""
        if (sender, to) in self._cut:
            return
        roll = self._rng.random
        if self.loss and roll() < self.loss:
            return
        self._at(self._in_order(sender, to), self._arrive, sender, to, message)
        if self.doubling and roll() < self.doubling:
            self._at(self._travel(sender, to) * 3, self._arrive, sender, to, message)

    def _in_order(self, sender: str, to: str) -> float:
        seconds = self._travel(sender, to)
        if not self.ordered:
            return seconds
        arrives = self._last[sender, to] = max(self.now + seconds, self._last.get((sender, to), 0.0) + 1e-7)
        return arrives - self.now

    def _travel(self, sender: str, to: str) -> float:
        if self.late and self._rng.random() < self.late:
            return self.longest * self._rng.random()
        return self.delay(sender, to)

    def _arrive(self, sender: str, to: str, message: Any) -> None:
        if (sender, to) not in self._cut:
            self._deliver(to, sender, message)

    def reaches(self, sender: str, to: str) -> bool:
        """Whether this direction is not cut now."""
        return (sender, to) not in self._cut

    def cut(self, pairs: Iterable[tuple[str, str]], lasting: float) -> None:
        """Nothing passes in these directions for so long; what is on its way is lost too."""
        cut = list(pairs)
        for pair in cut:
            self._cut[pair] = self._cut.get(pair, 0) + 1
        self._at(lasting, self._mend, cut)

    def _mend(self, pairs: list[tuple[str, str]]) -> None:
        for pair in pairs:
            left = self._cut.get(pair, 0) - 1
            if left > 0:
                self._cut[pair] = left
            else:
                self._cut.pop(pair, None)

    def heal(self) -> None:
        """From now on everything arrives, once and soon."""
        self._cut.clear()
        self.loss = self.doubling = self.late = 0.0
