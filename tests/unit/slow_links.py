# SPDX-License-Identifier: Apache-2.0
"""Raft machines of which one, `o`, is behind a slow link: a queue each way, as long as it must be.

All others are next to each other. A message takes as long as its bytes on the link, then the delay; the
order stays, and nothing is lost but what `lose` says (sender, receiver, message; True: lost).
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from typing import Any

from proto.log import Record
from proto.machine import Persisted, Send, WakeAt, Woken
from proto.raft import events as ev
from proto.raft.configuration import Configuration, encode
from proto.raft.machine import Raft
from proto.raft.messages import Append, Feed, SnapshotPart

SETTINGS = ev.Settings()
MEGABIT = 125_000
SLOW = [(3 * MEGABIT, 0.02), (MEGABIT, 0.02), (MEGABIT / 4, 0.1), (100 * MEGABIT, 0.35), (100 * MEGABIT, 0.8)]
"""Bytes per second, and seconds one way."""


def founded(voters: str, *, snapshot: int = 0, records: int = 0) -> ev.Stored:
    """A log with all that `o` lacks: a snapshot of so many bytes, or so many bytes of records."""
    configuration = Configuration(frozenset(voters))
    if snapshot:
        state = ev.Snapshot(100, 1, configuration, bytes(snapshot))
        return ev.Stored(ev.Ballot(1), state, 100, 1, commit=100)
    payloads = [bytes(1000)] * (records // 1000)
    log = [Record(1, 1, encode(configuration), "config")]
    log += [Record(1, index, payload) for index, payload in enumerate(payloads, 2)]
    return ev.Stored(ev.Ballot(1), records=log, commit=len(log))


class Links:
    """The peers of `names` begin with `stored`, `o` with `behind`; the link has `rate` bytes per second."""

    def __init__(self, names: str, stored: ev.Stored, behind: ev.Stored, rate: float, delay: float) -> None:
        self.rate, self.delay = rate, delay
        self.now = 0.0
        self.sent: list[tuple[float, str, Send]] = []
        self.carried = 0
        """Bytes that were sent to `o`."""
        self.lose: Callable[[str, str, Any], bool] = lambda _sender, _to, _message: False
        self.roles: list[tuple[str, ev.Became]] = []
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._free = {True: 0.0, False: 0.0}
        self._wakes: dict[str, int] = {}
        self.machines = {
            name: Raft(name, behind if name == "o" else stored, SETTINGS, random.Random(ord(name)))
            for name in names + "o"
        }
        for name in self.machines:
            self._at(0.0, lambda name=name: self.feed(name, Woken(ev.TIMER)))
        self._at(0.01, lambda: self.feed("o", ev.Contacts(tuple(names))))

    def run(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Let that much time pass, or less: then True."""
        end = self.now + seconds
        while self._queue and self._queue[0][0] <= end:
            self.now, _, do = heapq.heappop(self._queue)
            do()
            if until():
                return True
        self.now = end
        return False

    def follows(self) -> bool:
        """Whether `o` has applied what the others had at the beginning."""
        return self.machines["o"].applied_index >= 100

    def feed(self, name: str, event: ev.Event) -> None:
        for effect in self.machines[name].handle(event, self.now):
            match effect:
                case Send():
                    self._send(name, effect)
                case WakeAt(timer, at):
                    number = self._wakes[name] = next(self._order)
                    self._at(max(0.0, at - self.now) + 1e-6, lambda n=number, t=timer: self._wake(name, n, t))
                case ev.Persist(key):
                    self._at(0.002, lambda key=key: self.feed(name, Persisted(key)))
                case ev.Became():
                    self.roles.append((name, effect))

    def _at(self, seconds: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now + seconds, next(self._order), do))

    def _wake(self, name: str, number: int, timer: str) -> None:
        if self._wakes[name] == number:
            self.feed(name, Woken(timer))

    def _send(self, sender: str, send: Send) -> None:
        self.sent.append((self.now, sender, send))
        if send.peer not in self.machines:
            return
        seconds = 0.001
        if "o" in (sender, send.peer):
            down = send.peer == "o"
            size = _size(send.message)
            self.carried += size if down else 0
            free = self._free[down] = max(self.now, self._free[down]) + size / self.rate
            seconds = free - self.now + self.delay
        if not self.lose(sender, send.peer, send.message):
            self._at(seconds, lambda: self.feed(send.peer, ev.Received(sender, send.message)))


def _size(message: Any) -> int:
    if isinstance(message, SnapshotPart):
        return 100 + len(message.data)
    if isinstance(message, Append | Feed):
        return 100 + sum(40 + len(record.payload) for record in message.records)
    return 60
