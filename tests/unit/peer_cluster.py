# SPDX-License-Identifier: Apache-2.0
"""A handful of peers' machines in one loop with virtual time, for scenarios of a few lines.

Messages take a millisecond, the disk takes two; who is cut off hears nothing and is not heard. Every peer has
a clock of its own. (`tests/sim` does all of this at random and at length.)
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from proto import entries as e
from proto.lease_events import Deadline, PeerFound, PeerLost
from proto.log import Record
from proto.machine import Persisted, Send, WakeAt, Woken
from proto.peer import Peer, found
from proto.peer_events import Applied, Proposed, Readable, Settings, Sighted, Wall
from proto.raft import events as raft
from proto.state import State
from tests.unit.identities import known

NETWORK, DISK = 0.001, 0.002
EPOCH = 1e9
"""Wall time when a cluster begins."""


def ident(name: str) -> str:
    return known(name).id


@dataclass
class Disk:
    """What `Persist` has written."""

    stored: raft.Stored = field(default_factory=raft.Stored)

    def write(self, data: raft.Durable) -> None:
        old = self.stored
        records, base, base_term = list(old.records), old.base_index, old.base_term
        if data.truncate is not None:
            records = [record for record in records if record.index < data.truncate]
        snapshot = data.snapshot or old.snapshot
        if data.snapshot is not None and data.keep is not None:
            gone = [record for record in records if record.index < data.keep]
            records = [record for record in records if record.index >= data.keep]
            if records and gone:
                base, base_term = gone[-1].index, gone[-1].term
            elif not records:
                base, base_term = snapshot.index, snapshot.term
        records += data.records
        ballot = data.ballot or old.ballot
        self.stored = replace(
            old, ballot=ballot, snapshot=snapshot, records=records, base_index=base, base_term=base_term
        )


@dataclass
class Host:
    """One peer: its machine, disk and clock, and all that its machine has said."""

    name: str
    machine: Peer
    disk: Disk
    rate: float = 1.0
    up: bool = True
    paused_until: float = 0.0
    life: int = 0
    sequence: int = 0
    applied: list[Applied] = field(default_factory=list)
    outcomes: dict[tuple[int, int], Applied] = field(default_factory=dict)
    """By boot and sequence of the own proposals."""
    lost: list[PeerLost] = field(default_factory=list)
    found: list[PeerFound] = field(default_factory=list)
    readable: list[Readable] = field(default_factory=list)
    failed: list[raft.ReadFailed] = field(default_factory=list)
    deadline: float = 0.0
    timers: dict[str, int] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return ident(self.name)

    @property
    def state(self) -> State:
        return self.machine.state

    def clock(self, now: float) -> float:
        return now * self.rate


class Cluster:
    """Peers by one-letter name; `a` founds the mesh."""

    def __init__(self, settings: Settings | None = None, rates: dict[str, float] | None = None) -> None:
        self.settings = settings or Settings()
        self.rates = rates or {}
        self.now = 0.0
        self.hosts: dict[str, Host] = {}
        self.cut: set[frozenset[str]] = set()
        self.drop: Callable[[Host, Host, Any], bool] = lambda _source, _target, _message: False
        self.stuck: dict[str, list[tuple[str, raft.Durable]]] = {}
        """Peers whose disks stand still, and what waits to be written there."""
        self.rng = random.Random(1)
        self.sent: list[tuple[str, str, Any]] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        member = known("a").member("peer-a")
        self._start("a", found(ident("a"), member, "m" * 16, EPOCH))

    # Peers.

    def _start(self, name: str, stored: raft.Stored, contacts: Iterable[str] = ()) -> Host:
        rng = random.Random(self.rng.getrandbits(32))
        machine = Peer(ident(name), stored, self.settings, rng, contacts)
        old = self.hosts.get(name)
        rate = self.rates.get(name, 1.0)
        host = Host(name, machine, Disk(stored), rate, life=old.life + 1 if old else 0)
        self.hosts[name] = host
        self.feed(host, Wall(EPOCH + self.now))
        self.feed(host, Woken(raft.TIMER))
        return host

    def crash(self, name: str) -> None:
        self.hosts[name].up = False

    def restart(self, name: str, contacts: str = "") -> Host:
        return self._start(name, self.hosts[name].disk.stored, map(ident, contacts))

    def join(self, *names: str) -> None:
        """Let peers in, one after the other, and wait until all know them and they know all."""
        id = f"for-{names[0]}"
        token = e.Token(id=id, secret_hash=b"", role="peer", uses=99, expires=2e9)
        self.commit("a", e.AddToken(token=token))
        for name in names:
            self.commit("a", e.AddPeer(member=known(name).member(f"peer-{name}", id)))
            self._start(name, raft.Stored(), [ident("a")])
            for other in self.hosts.values():
                self.see(other.name, name)
                self.see(name, other.name)
                self.see(other.name, other.name)
        self.until(lambda: all(len(host.state.members) == len(self.hosts) for host in self.hosts.values()))

    def see(
        self, who: str, whom: str, state: Any = "alive", rtt: float | None = None, free: int = 1 << 30
    ) -> None:
        """A hint; unless said otherwise a is nearest to everybody, then b, and so on."""
        rtt = (ord(whom) - ord("a") + 1) / 1000 if rtt is None else rtt
        self.feed(self.hosts[who], Sighted(ident(whom), state, rtt, free))

    def see_dead(self, *names: str) -> None:
        """All others see these dead."""
        for host in self.hosts.values():
            for name in names:
                if host.name not in names:
                    self.see(host.name, name, "dead")

    def split(self, *sides: str) -> None:
        """Only peers of the same side hear one another."""
        side = {name: place for place, names in enumerate(sides) for name in names}
        pairs = (frozenset((a, b)) for a in side for b in side if side[a] != side[b])
        self.cut = set(pairs)

    # Time.

    def feed(self, host: Host, event: Any) -> None:
        for effect in host.machine.handle(event, host.clock(self.now)):
            self._perform(host, effect)

    def at(self, when: float, do: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, do))

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.next_at() <= end:
            self.step()
        self.now = end

    def until(self, condition: Callable[[], Any], limit: float = 60.0) -> None:
        end = self.now + limit
        while not condition():
            assert self.next_at() <= end, f"it has not come true after {limit} s"
            self.step()

    def next_at(self) -> float:
        """When something happens next."""
        return self._events[0][0] if self._events else float("inf")

    def step(self) -> None:
        """Let the next thing happen."""
        when, _, do = heapq.heappop(self._events)
        self.now = max(self.now, when)
        do()

    def pause(self, name: str, seconds: float) -> None:
        """The peer stands still, as after SIGSTOP; its clock and everybody else go on."""
        self.hosts[name].paused_until = self.now + seconds

    def _wake(self, host: Host, timer: str, at: float) -> None:
        """A later `WakeAt` replaces this one. It never comes early, which rounding could make it."""
        self._count += 1
        number = host.timers[timer] = self._count

        def due() -> None:
            if host.timers.get(timer) == number:
                self._later(host, self.now, Woken(timer))

        self.at(max(self.now, at / host.rate + 1e-6), due)

    def _later(self, host: Host, when: float, event: Any) -> None:
        """Feed an event, unless the peer has died by then; one that is paused gets it when it goes on."""

        def happen() -> None:
            if not host.up:
                return
            if self.now < host.paused_until:
                self.at(host.paused_until, happen)
            else:
                self.feed(host, event)

        self.at(when, happen)

    # Effects.

    def _perform(self, host: Host, effect: Any) -> None:
        match effect:
            case Send(peer, message):
                self._send(host, peer, message)
            case WakeAt(timer, at):
                self._wake(host, timer, at)
            case raft.Persist(key, data):
                self._write(host, key, data)
            case Applied():
                host.applied.append(effect)
                if effect.proposal and effect.proposal.client == host.id:
                    host.outcomes.setdefault((effect.proposal.boot, effect.proposal.sequence), effect)
            case PeerLost():
                host.lost.append(effect)
            case PeerFound():
                host.found.append(effect)
            case Readable():
                host.readable.append(effect)
            case raft.ReadFailed():
                host.failed.append(effect)
            case Deadline(at):
                assert at > host.deadline
                host.deadline = at

    def _send(self, host: Host, peer: str, message: Any) -> None:
        target = next((other for other in self.hosts.values() if other.id == peer), None)
        assert target is not host, message
        if target is None or self.drop(host, target, message):
            return
        self.sent.append((host.name, target.name, message))

        if frozenset((host.name, target.name)) not in self.cut:
            self._later(target, self.now + NETWORK, raft.Received(host.id, message))

    def disk_goes_on(self, name: str) -> None:
        for key, data in self.stuck.pop(name):
            self._write(self.hosts[name], key, data)

    def _write(self, host: Host, key: str, data: raft.Durable) -> None:
        if host.name in self.stuck:
            self.stuck[host.name].append((key, data))
            return

        def written() -> None:
            if host.up:
                host.disk.write(data)

        self.at(self.now + DISK, written)
        self._later(host, self.now + DISK, Persisted(key))

    # Shorthands.

    def proposal(self, name: str, entry: Any, **more: Any) -> e.Proposal:
        host = self.hosts[name]
        host.sequence += 1
        return e.Proposal(entry=entry, client=host.id, boot=host.life + 1, sequence=host.sequence, **more)

    def propose(self, name: str, entry: Any, **more: Any) -> Callable[[], Applied | None]:
        """Propose; the function says what became of it."""
        host = self.hosts[name]
        proposal = self.proposal(name, entry, **more)
        self.feed(host, Proposed(proposal, EPOCH + self.now))

        return lambda: host.outcomes.get((proposal.boot, proposal.sequence))

    def commit(self, name: str, entry: Any, limit: float = 60.0) -> Applied:
        outcome = self.propose(name, entry)
        self.until(outcome, limit)
        applied = outcome()
        assert applied is not None
        assert applied.refused is None, applied.refused
        return applied

    def leads(self, names: str) -> bool:
        """Whether one of these is the only one who leads."""
        leading = [host.name for host in self.hosts.values() if host.up and host.machine.coordinator]
        return len(leading) == 1 and leading[0] in names

    @property
    def leader(self) -> Host:
        """The peer that leads in the newest term."""
        leading = [host for host in self.hosts.values() if host.up and host.machine.coordinator]
        return max(leading, key=lambda host: host.machine.raft.term)

    def voters(self) -> str:
        """The voters' names, by the leader's log."""
        voters = self.leader.machine.configuration
        assert not voters.joint
        return "".join(sorted(name for name in self.hosts if ident(name) in voters.voters))

    def settle_voters(self, names: str) -> None:
        """Wait for these voters."""
        self.until(lambda: not self.leader.machine.configuration.joint and self.voters() == names)

    def records(self, name: str) -> list[Record]:
        return self.hosts[name].disk.stored.records
