# SPDX-License-Identifier: Apache-2.0
"""A whole mesh in virtual time: real machines of peers, and everything round them that can fail.

One seed is one schedule: every choice comes from `random.Random(seed)`. Most seeds have 3 to 9 peers, some
have dozens, a few hundreds (and then less time). A mesh is founded or found running, clients and operators
use it, faults happen for a while (`faults.py`); then they stop, and within a bounded time all must be well
again: one coordinator, one state everywhere, every wanted guest running once, nothing left half done. What
must never be is watched all the time (`invariants.py`).
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from proto import catalog, entries, state_codec
from proto import peer_events as pe
from proto.log import Record
from proto.peer import Peer, found
from proto.raft import configuration as conf
from proto.raft import events as raft
from proto.raft.configuration import Configuration
from proto.state import State
from tests.sim import convergence, shared_work
from tests.sim.clients import Client, step
from tests.sim.detector import Detector
from tests.sim.disks import Disk
from tests.sim.faults import Faults
from tests.sim.hosts import Host
from tests.sim.invariants import Invariants, Violation
from tests.sim.linearizability import first_contradiction
from tests.sim.members import member
from tests.sim.moves import Stream
from tests.sim.network import Network
from tests.sim.operators import Operator
from tests.sim.process import Process
from tests.sim.trace import Trace

HEALS_WITHIN = 90.0
"""Seconds from the last fault in which all must be well."""
LOOK_EVERY = 0.5
WORLD_BEGAN = 1.7e9
TRACE_LINES = 400


class World:
    """One seed's schedule. `peers` overrides how many there are, `whole_trace` keeps all of what happened."""

    def __init__(self, seed: int, peers: int | None = None, whole_trace: bool = False) -> None:
        shared_work.share()
        shared_work.forget()
        self.seed = seed
        self.rng = random.Random(seed)
        self.now = 0.0
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()
        self._trace = Trace(None if whole_trace else TRACE_LINES)
        self._numbers = itertools.count(1)
        self.hosts: dict[str, Host] = {}
        self.streams: dict[str, Stream] = {}
        self.healing = False
        self.healed_at = 0.0
        self.network = Network(self.rng, self.at, self._deliver)
        self.invariants = Invariants(self)
        size = peers or self._size()
        self.crowd = size > 50
        """Hundreds of peers: what costs much per peer is done more rarely."""
        self.settings = self._settings()
        self.faults = Faults(self)
        self.detector = Detector(self)
        self.clients = [Client(self, number) for number in range(2 if self.crowd else 3)]
        self.operator = Operator(self)
        self._found(size)

    def _size(self) -> int:
        kind = self.rng.random()
        if kind < 0.90:
            return self.rng.randrange(3, 10)
        return self.rng.randrange(10, 51) if kind < 0.99 else self.rng.randrange(100, 251)

    def _settings(self) -> pe.Settings:
        heartbeat = self.rng.choice((0.1, 0.2, 0.2, 0.3)) if not self.crowd else 0.3
        return pe.Settings(
            raft=raft.Settings(
                heartbeat=heartbeat,
                election=self.rng.choice((0.8, 1.0, 1.5)),
                append_bytes=self.rng.choice((1 << 10, 256 << 10)),
                inflight=self.rng.choice((2, 64)),
                # In crumbs over a WAN, the state of hundreds of peers takes longer than the world lasts.
                part_bytes=self.rng.choice((2 << 10, 256 << 10)) if not self.crowd else 256 << 10,
            ),
            compact_records=self.rng.choice((20, 60, 10_000)),
            keep_records=self.rng.choice((0, 10, 30)),
            voter_dead_after=self.rng.choice((3.0, 10.0)),
        )

    # Time.

    def at(self, seconds: float, run: Callable[..., None], *arguments: Any) -> None:
        """Call `run(*arguments)` so many seconds of real time from now."""
        heapq.heappush(self._queue, (self.now + seconds, next(self._order), run, arguments))

    def run(self) -> None:
        """To the end; raises `Violation`."""
        queue = self._queue
        pop = heapq.heappop
        while queue:
            self.now, _, run, arguments = pop(queue)
            self.network.now = self.now
            run(*arguments)
            if self.healed_at:
                break
        history = itertools.chain.from_iterable(client.history for client in self.clients)
        wrong = first_contradiction(history, (None, 0), step)
        if wrong is not None:
            raise Violation(f"the history of {wrong} is not linearizable:\n{self._history_of(wrong)}")

    def _history_of(self, key: Any) -> str:
        operations = [o for client in self.clients for o in client.history if o.key == key]
        operations.sort(key=lambda operation: operation.called)
        return "\n".join(f"  {o.called:9.4f} … {o.returned:9.4f} {o.ask} → {o.answer}" for o in operations)

    def say(self, who: str, *what: Any) -> None:
        """A line of the trace."""
        self._trace.say(self.now, who, *what)

    def trace(self) -> str:
        """What happened, for people."""
        return "\n".join(self._trace.lines({host.id: host.name for host in self.hosts.values()}))

    # Beginning.

    def _found(self, size: int) -> None:
        """Half of the worlds are found running, the others grow from one peer."""
        grown = size > 12 or self.rng.random() < 0.5
        first = [self.new_host() for _ in range(size if grown else 1)]
        records, state = founded(tuple(host.member for host in first))
        snapshot = snapshot_of(records, state) if size > 50 else None
        self.invariants.newest, self.invariants.oldest = state, state.index
        self.faults.bystanders = size - len(first)
        for host in first:
            host.contacts = set(state.members)
            if self.rng.random() < 0.9 or host is first[0] or size < 8:
                found_on(host.disk, records, snapshot)
            self.start(host)
        for number, client in enumerate(self.clients):
            self.at(0.5 + 0.1 * number, client.begin)
        for _ in range(size - len(first)):
            self.at(3.0 * self.rng.random(), self.operator.join)
        self.operator.begin()
        self.faults.begin()
        self.detector.begin()
        self.at(1.0, self._look_on)

    def new_host(self) -> Host:
        """A host that has never been part of the mesh."""
        number = next(self._numbers)
        sites = 1 if self.network.wan == 0.0 else 3
        site = self.rng.randrange(sites)
        made, key = member(f"p{number}", number)
        made = made.model_copy(update={"site": f"s{site}"})
        host = Host(self, made, key, self.settings.drift)
        self.hosts[host.id] = host
        self.network.place(host.id, site)
        return host

    def start(self, host: Host) -> None:
        """A peer starts on this host, from what is on its disk, if it was ever admitted."""
        if host.gone or host.process is not None or not host.contacts:
            return
        self.say(host.name, f"starts with {len(host.disk.records)} records")
        host.process = Process(host)
        host.process.begin()

    def new_machine(self, host: Host, rng: random.Random) -> Peer:
        """The machine of a peer as it starts."""
        return Peer(host.id, host.disk.load(), self.settings, rng, sorted(host.contacts))

    # While it runs.

    def _deliver(self, to: str, sender: str, message: Any) -> None:
        host = self.hosts[to]
        process = host.process
        if process is not None:
            host.after(0.0, process.here, process.receive, sender, message)

    def crash(self, host: Host, restart_after: float | None = None) -> None:
        """The peer on this host dies; it is started again after a while."""
        if host.process is None:
            return
        self.say(host.name, "peer crashes")
        host.process.end()
        seconds = (
            self.rng.choice((0.1, 1.0, 5.0)) * self.rng.random() if restart_after is None else restart_after
        )
        self.at(seconds, self.start_when_awake, host)

    def start_when_awake(self, host: Host) -> None:
        """Start a peer once its host does anything."""
        host.after(0.0, self.start, host)

    def processes(self) -> Iterable[Process]:
        """All peers that run."""
        return (host.process for host in self.hosts.values() if host.process is not None)

    def some_process(self) -> Process | None:
        """A peer of the mesh that a client can connect to."""
        state = self.invariants.newest
        there = [
            process
            for process in self.processes()
            if not (process.host.still or process.stopped)
            and process.host.id in state.members
            and state.members[process.host.id].status == "member"
        ]
        return self.rng.choice(there) if there else None

    def leader(self) -> Process | None:
        """The coordinator, if there is one; of several that think so, the newest."""
        leaders = [process for process in self.processes() if process.role == "leader"]
        return max(leaders, key=lambda process: process.term, default=None)

    def name(self, id: str) -> str:
        """A peer's name."""
        return self.hosts[id].name if id in self.hosts else id

    def _look_on(self) -> None:
        """What is looked at from time to time: late shims, outputs, and at the end whether all is well."""
        self.invariants.look_at_copies()
        self._outputs()
        if self.healing:
            trouble = convergence.trouble(self)
            if not trouble:
                self.healed_at = self.now
            elif self.now > self.faults.until + HEALS_WITHIN:
                raise Violation(f"{HEALS_WITHIN:.0f} s after the last fault: {'; '.join(trouble[:6])}")
        self.at(LOOK_EVERY, self._look_on)

    def _outputs(self) -> None:
        """Each guest that runs sends a frame; the host's switch lets it out if the lease lasts."""
        for host in self.hosts.values():
            if host.still:
                continue
            for copy in host.copies.values():
                if copy.phase == "running" and not (copy.lease_bound and host.now >= copy.deadline):
                    self.invariants.output(host, copy)


@cache
def founded(members: tuple[entries.Member, ...]) -> tuple[tuple[Record, ...], State]:
    """The log of a mesh of these members, up to five of whom vote; and its state."""
    first, *others = members
    records = list(found(first.id, first, "m", WORLD_BEGAN).records)
    token = entries.Token(id="t0", secret_hash=b"", role="peer", uses=len(members), expires=1e12)
    todo: list[entries.AnyEntry] = [entries.AddToken(token=token)]
    todo.extend(entries.AddPeer(member=other.model_copy(update={"token": "t0"})) for other in others)
    for number, entry in enumerate(todo, 1):
        made = entries.Proposal(entry=entry, client=first.id, sequence=number, time=WORLD_BEGAN)
        records.append(Record(1, len(records) + 1, entries.encode(made)))
    if len(members) > 2:
        voters = frozenset(made.id for made in members[: 5 if len(members) > 4 else 3])
        records.append(Record(1, len(records) + 1, conf.encode(Configuration(voters)), "config"))
    state = State()
    for record in records:
        state = (
            catalog.apply(state, record.index, entries.decode(record.payload))
            if record.kind == "command"
            else catalog.skip(state, record.index)
        )
    return tuple(records), state


def snapshot_of(records: tuple[Record, ...], state: State) -> raft.Snapshot:
    """The state after all these records."""
    voters = conf.decode(next(record.payload for record in reversed(records) if record.kind == "config"))
    return raft.Snapshot(records[-1].index, records[-1].term, voters, state_codec.encode(state))


def found_on(disk: Disk, records: tuple[Record, ...], snapshot: raft.Snapshot | None) -> None:
    """As if the disk's peer had been part of the mesh from the beginning; large meshes have compacted."""
    disk.ballot = raft.Ballot(term=1)
    disk.commit = len(records)
    if snapshot is None:
        disk.records = list(records)
    else:
        disk.snapshot, disk.base_index, disk.base_term = snapshot, snapshot.index, snapshot.term
