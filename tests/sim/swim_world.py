# SPDX-License-Identifier: Apache-2.0
"""A world for the membership's machines: any number of members, a network that loses, delays and splits.

One seed is one schedule; time is simulated. The members' machines are the real ones; a packet is handed over
as the object it is, and only its size is counted. All machines share one roster and keep only what differs
from it, so that ten thousand members fit. The faults and what must hold are in `swim_faults.py`;
`tests/bench/membership.py` measures in the same world.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

from proto.machine import Send, WakeAt, Woken
from proto.swim.events import TIMER, Event, Members, Received, Roster, Settings, Turned
from proto.swim.machine import Swim
from proto.swim.packets import DATAGRAM, ENVELOPE, packet_size

HEADERS = 28
"""Bytes of IP and UDP before each datagram."""


class Violation(AssertionError):
    """What must never be, at this seed."""


@dataclass(slots=True)
class Host:
    """A member: its machine (None while it is crashed), its timer, and until when it stands still.

    What members of another `group`, or those in `deaf_to`, send does not reach it.
    """

    id: str
    machine: Swim | None = None
    wake: float = -1.0
    still: float = 0.0
    group: int = 0
    deaf_to: frozenset[str] = frozenset()
    bytes_out: int = 0
    packets_out: int = 0


class World:
    """`count` members that know one another from the start, in incarnation 0."""

    def __init__(self, seed: int, count: int, settings: Settings | None = None, loss: float = 0.0) -> None:
        self.rng = random.Random(seed)
        self.settings = settings or Settings()
        self.loss = loss
        self.doubled = 0.0
        self.now = 0.0
        self.turned: list[tuple[float, str, str, str]] = []
        """(time, who sees, whom, state)"""
        self.delay: Callable[[Host, Host], float] = self._lan
        self.roster = Roster.of(f"{number:016x}" for number in range(1, count + 1))
        self.hosts = {id: Host(id) for id in self.roster.ids}
        self._order = itertools.count()
        self._queue: list[tuple[float, int, Host, Event | Callable[[], None]]] = []
        for host in self.hosts.values():
            self.boot(host)

    def _lan(self, _a: Host, _b: Host) -> float:
        return 0.0002 + 0.0003 * self.rng.random()

    def boot(self, host: Host, incarnation: int = 0) -> None:
        """Start a member's machine."""
        host.machine = Swim(host.id, self.settings, random.Random(self.rng.getrandbits(48)), incarnation)
        host.still = 0.0
        self._feed(host, Members(self.roster))

    def crash(self, host: Host) -> None:
        """The member is gone without a word."""
        host.machine = None
        host.wake = -1.0

    def at(self, time: float, what: Callable[[], None]) -> None:
        """Let something happen at this time."""
        heapq.heappush(self._queue, (time, next(self._order), next(iter(self.hosts.values())), what))

    def tell(self, host: Host, event: Event) -> None:
        """Feed an event to a member now."""
        self._feed(host, event)

    def run(self, until: float) -> None:
        """Let everything happen up to this time."""
        queue = self._queue
        while queue and queue[0][0] <= until:
            at, _, host, event = heapq.heappop(queue)
            self.now = at
            if not isinstance(event, Received | Woken):
                assert callable(event)
                event()
            elif host.machine is not None:
                if host.still > at:
                    if isinstance(event, Woken):
                        host.wake = host.still
                    heapq.heappush(queue, (host.still, next(self._order), host, event))
                elif isinstance(event, Received) or host.wake == at:
                    self._feed(host, event)
        self.now = until

    def _feed(self, host: Host, event: Event) -> None:
        assert host.machine is not None
        for effect in host.machine.handle(event, self.now):
            if isinstance(effect, Send):
                self._carry(host, self.hosts[effect.peer], effect)
            elif isinstance(effect, WakeAt):
                host.wake = max(effect.at, self.now)
                heapq.heappush(self._queue, (host.wake, next(self._order), host, Woken(TIMER)))
            else:
                self.saw(host, effect)

    def _carry(self, sender: Host, receiver: Host, send: Send) -> None:
        size = packet_size(send.message) + ENVELOPE
        if size > DATAGRAM:
            raise Violation(f"{sender.id} sends {size} bytes: {send.message}")
        sender.bytes_out += size + HEADERS
        sender.packets_out += 1
        if receiver.machine is None or sender.group != receiver.group or sender.id in receiver.deaf_to:
            return
        if self.loss and self.rng.random() < self.loss:
            return
        event = Received(sender.id, send.message)
        copies = 2 if self.doubled and self.rng.random() < self.doubled else 1
        for _ in range(copies):
            at = self.now + self.delay(sender, receiver)
            heapq.heappush(self._queue, (at, next(self._order), receiver, event))

    def saw(self, host: Host, turned: Turned) -> None:
        """A member's view of another one has turned."""
        self.turned.append((self.now, host.id, turned.peer, turned.state))

    @property
    def up(self) -> list[Host]:
        """The members that run."""
        return [host for host in self.hosts.values() if host.machine is not None]
