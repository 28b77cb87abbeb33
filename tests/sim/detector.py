# SPDX-License-Identifier: Apache-2.0
"""A model of what membership tells a peer of the others: mostly right, a while late, and sometimes wrong.

Nothing may depend on it but how soon things happen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from proto.peer_events import Sighted
from proto.swim.packets import Reach

if TYPE_CHECKING:
    from tests.sim.mesh_world import World
    from tests.sim.process import Process

EVERY = 1.0
SAMPLE = 12
"""How many others a peer hears of at once in a large mesh."""


class Detector:
    """Tells every running peer how the others look."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.wrong = world.rng.choice((0.0, 0.0, 0.01, 0.1))
        """How probably a peer that lives looks suspect or dead."""
        self._told: dict[tuple[str, int, str], tuple[Reach, float]] = {}

    def begin(self) -> None:
        """Look from now on."""
        self.world.at(0.3, self._look)

    def _look(self) -> None:
        wrong = 0.0 if self.world.healing else self.wrong
        ids = list(self.world.hosts)
        for process in list(self.world.processes()):
            others = ids if len(ids) <= 2 * SAMPLE else self.world.rng.sample(ids, SAMPLE)
            for other in others:
                if other != process.host.id:
                    self._compare(process, other, wrong)
        self.world.at(EVERY, self._look)

    def _compare(self, process: Process, other: str, wrong: float) -> None:
        key = (process.host.id, process.life, other)
        before, since = self._told.get(key, (None, 0.0))
        state = self._truth(process.host.id, other)
        if wrong and state == "alive" and self.world.rng.random() < wrong:
            state = self.world.rng.choice(("suspect", "dead"))
        if state == "dead" and before in ("alive", None):
            state = "suspect"
        if state == "dead" and before == "suspect" and self.world.now - since < 2.0:
            return
        if state != before:
            self._told[key] = (state, self.world.now)
            rtt = 2 * self.world.network.delay(process.host.id, other)
            process.host.after(0.0, process.feed, Sighted(other, state, rtt, 1 << 30))

    def _truth(self, own: str, other: str) -> Reach:
        host, network = self.world.hosts[other], self.world.network
        lives = host.process is not None and not (host.still or host.process.stopped)
        return "alive" if lives and network.reaches(own, other) and network.reaches(other, own) else "dead"
