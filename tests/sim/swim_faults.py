# SPDX-License-Identifier: Apache-2.0
"""The membership's simulation: members crash, come back, stand still, are cut off, lose packets; then calm.

What must hold all the time: nobody's incarnation falls, nor what anybody believes of it; who turns, turns
to another state; packets stay within their size. And within bounded time after the last fault everybody sees
everybody as they are: those that run alive, those that do not dead.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from proto.swim.events import SetMeta, Turned
from tests.sim.swim_world import Host, Violation, World

FAULTS_UNTIL = 60.0
SETTLED_WITHIN = 150.0
"""Seconds after the last fault until everybody must see everybody as they are."""

STEP = 5.0
LONGEST_STANDSTILL = 20.0


class Trial(World):
    """One seed's members, on a LAN or spread over sites, and what happens to them."""

    def __init__(self, seed: int) -> None:
        self.trace: list[str] = []
        self._believed: dict[tuple[str, str], int] = {}
        self._own: dict[str, int] = {}
        fate = random.Random(seed)
        count = _count(fate)
        super().__init__(seed, count, loss=fate.choice((0.0, 0.0, 0.02, 0.1, 0.25)))
        self.doubled = fate.choice((0.0, 0.05))
        self._fate = fate
        if fate.random() < 0.5:
            sites = [(fate.random() / 5, fate.random() / 5) for _ in range(fate.randint(2, 4))]
            self._site = {host: fate.choice(sites) for host in self.hosts}
            self.delay = self._wan
        for _ in range(fate.randint(1, 8)):
            self.at(fate.random() * FAULTS_UNTIL, self._fault)
        self.at(FAULTS_UNTIL, self._calm)

    def _wan(self, a: Host, b: Host) -> float:
        (ax, ay), (bx, by) = self._site[a.id], self._site[b.id]
        return 0.0005 + (abs(ax - bx) + abs(ay - by)) / 2 + 0.002 * self.rng.random()

    # Faults.

    def _fault(self) -> None:
        faults: list[Callable[[], None]] = [
            self._crash,
            self._crash,
            self._still,
            self._split,
            self._deafen,
            self._tell,
        ]
        self._fate.choice(faults)()

    def note(self, text: str) -> None:
        """A line of the trace."""
        self.trace.append(f"{self.now:8.3f} {text}")

    def _some(self) -> Host:
        return self._fate.choice(list(self.hosts.values()))

    def _crash(self) -> None:
        host = self._some()
        if host.machine is None:
            return
        self.note(f"{host.id} crashes")
        self.crash(host)
        self._own.pop(host.id, None)
        for about in [about for about in self._believed if about[0] == host.id]:
            del self._believed[about]
        if self._fate.random() < 0.7:
            back = self.now + self._fate.random() * 30
            self.at(min(back, FAULTS_UNTIL), partial(self._restart, host))

    def _restart(self, host: Host) -> None:
        if host.machine is None:
            incarnation = self._fate.choice((0, 1, int(1000 + self.now)))
            self.note(f"{host.id} restarts in incarnation {incarnation}")
            self.boot(host, incarnation)

    def _still(self) -> None:
        host = self._some()
        host.still = self.now + self._fate.random() * LONGEST_STANDSTILL
        self.note(f"{host.id} stands still until {host.still:.3f}")

    def _split(self) -> None:
        self.note("the network splits")
        for host in self.hosts.values():
            host.group = self._fate.randrange(2)
        self.at(min(FAULTS_UNTIL, self.now + self._fate.random() * 40), self._join)

    def _join(self) -> None:
        self.note("the network is whole")
        for host in self.hosts.values():
            host.group = 0
            host.deaf_to = frozenset()

    def _deafen(self) -> None:
        host = self._some()
        others = [peer for peer in self.hosts if peer != host.id]
        host.deaf_to = frozenset(self._fate.sample(others, self._fate.randint(1, len(others))))
        self.note(f"{host.id} does not hear {len(host.deaf_to)} others")

    def _tell(self) -> None:
        host = self._some()
        if host.machine is not None and host.still <= self.now:
            self.tell(host, SetMeta(self._fate.randbytes(8)))

    def _calm(self) -> None:
        self.note("calm")
        self._join()
        self.loss = self.doubled = 0.0

    # What must hold.

    def saw(self, host: Host, turned: Turned) -> None:
        super().saw(host, turned)
        self.note(f"{host.id}: {turned.peer} {turned.state}")
        assert host.machine is not None
        sight = host.machine.sight(turned.peer)
        self._rises((host.id, turned.peer), sight.incarnation)
        if host.machine.incarnation < self._own.get(host.id, 0):
            raise Violation(f"the incarnation of {host.id} falls to {host.machine.incarnation}")
        self._own[host.id] = host.machine.incarnation
        if turned.peer == host.id:
            raise Violation(f"{host.id} doubts itself")

    def _rises(self, about: tuple[str, str], incarnation: int) -> None:
        if incarnation < self._believed.get(about, 0):
            raise Violation(f"{about[0]} goes back to incarnation {incarnation} of {about[1]}")
        self._believed[about] = incarnation

    def settle(self) -> None:
        """Run the faults, and on until all see what is; raises `Violation` if that never comes."""
        self.run(FAULTS_UNTIL + LONGEST_STANDSTILL)
        deadline = self.now + SETTLED_WITHIN
        while wrong := self._wrong():
            if self.now > deadline:
                raise Violation(f"{len(wrong)} views are wrong {SETTLED_WITHIN:g} s after: {wrong[:3]}")
            self.run(self.now + STEP)
        seen = len(self.turned)
        self.run(self.now + 4 * STEP)
        if len(self.turned) > seen or self._wrong():
            raise Violation(f"views turn in a quiet mesh: {self.turned[seen:][:3]}")

    def _wrong(self) -> list[str]:
        wrong = []
        for host in self.up:
            assert host.machine is not None
            for peer in self.roster.ids:
                state = host.machine.sight(peer).state
                wanted = "dead" if self.hosts[peer].machine is None else "alive"
                if peer != host.id and state != wanted:
                    wrong.append(f"{host.id} sees {peer} {state}, which is {wanted}")
        return wrong


def _count(fate: random.Random) -> int:
    draw = fate.random()
    if draw < 0.9:
        return fate.randint(2, 9)
    return fate.randint(10, 50) if draw < 0.99 else fate.randint(100, 200)
