# SPDX-License-Identifier: Apache-2.0
"""The catalog of a live peer: the state that the mesh agrees on, as far as this peer knows it.

What is agreed is decided by the machine of `proto/peer.py`, which every peer runs; a `Driver` keeps it going.
This is its face to the other parts: they read the newest state, wait for it to change, and propose entries.
A proposal is made true by the coordinator, whoever that is (`mobid/proposals.py`); who that is, and why there
may be none, says `mobid/quorum.py`. A question that must not be answered from an old copy is a `read`.
"""

from __future__ import annotations

import itertools
import random
import secrets
import time
from bisect import bisect_right
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from functools import partial

import structlog
import trio

from mobid.driver import Driver
from mobid.lease import Lease
from mobid.proposals import Proposals
from mobid.quorum import Leadership, Quorum
from mobid.signal import Changed
from mobid.stamps import HybridClock
from mobid.store import Store
from proto import entries, hlc, versions
from proto.api import OperationError
from proto.lease_events import Deadline, PeerFound, PeerLost
from proto.machine import Woken
from proto.peer import Peer as Machine
from proto.peer import found
from proto.peer_events import (
    Applied,
    Effect,
    Event,
    Fence,
    Readable,
    Restored,
    Settings,
    Sighted,
    Wall,
)
from proto.raft.configuration import Configuration
from proto.raft.events import TIMER, Became, Durable, Read, ReadFailed, Role, TransferTo
from proto.state import State
from proto.swim.packets import Reach

BACKLOG = 4096
"""Applied entries that are kept for those who follow them one by one."""

FULL_PATIENCE = 1.0
"""How long a coordinator with a full disk waits for others to make a proposal true without it."""

LOOK_PAUSE = 0.5
"""Seconds between two looks at whether those who wait for a decision still may."""

READ_PAUSE = 0.1
HAND_OVER_PAUSE = 2.0
WALL_PAUSE = 60.0

log = structlog.get_logger()


@dataclass
class _Reading:
    """Somebody waits for a read; `state` is None if it failed."""

    done: trio.Event = field(default_factory=trio.Event)
    state: State | None = None


class Catalog:
    """The one object through which everything shared is read and changed.

    `bootstrap` is what was known of the mesh before the catalog itself is: enough to find its members.
    """

    def __init__(
        self,
        store: Store,
        own: str,
        send: Callable[[str, bytes], None],
        settings: Settings,
        *,
        bootstrap: State | None = None,
        stamps: HybridClock | None = None,
    ) -> None:
        """Nothing happens before `begin`. `send(peer, data)` posts a message, perhaps in vain."""
        self.lease = Lease()
        self._store = store
        self._own = own
        self._send = send
        self._settings = settings
        self._stamps = stamps or HybridClock()
        self._bootstrap = bootstrap or State()
        self._state = self._bootstrap
        self._machine: Machine | None = None
        self._driver: Driver | None = None
        self._changed = Changed()
        self._leadership = Leadership()
        self._backlog: list[tuple[int, entries.Proposal]] = []
        self._first = 1
        self._fresh = False
        self._proposals = Proposals(own, self._stamps, self.feed, lambda: self._state)
        self.quorum = Quorum(self, own, settings.raft.election)
        self._cookies = itertools.count(1)
        self._reads: dict[int, _Reading] = {}
        self._lost: dict[str, tuple[int, PeerLost]] = {}
        self._loss_numbers = itertools.count(1)
        self._losses = Changed()

    # Beginning.

    @property
    def empty(self) -> bool:
        """Whether this peer has neither a catalog nor a mesh to fetch one from."""
        return self._store.empty and not self._bootstrap.mesh

    def found(self, mesh: str, member: entries.Member) -> None:
        """Write the first log of a mesh with this one member, durably; only into an empty store. Blocks."""
        if not self.empty:
            raise ValueError("the catalog is not empty")
        first = found(self._own, member, mesh, time.time())
        self._store.write([Durable(ballot=first.ballot, records=tuple(first.records))])
        self._store.note_commit(first.commit)
        self._store.close()
        self._store = Store(self._store.directory)

    def begin(self) -> None:
        """Take up what the store holds: from here on `state` is what this peer knew when it ended."""
        rng = random.Random(secrets.randbits(128))
        contacts = [peer for peer in self._bootstrap.members if peer != self._own]
        self._machine = Machine(self._own, self._store.stored, self._settings, rng, contacts)
        self._driver = Driver(self._machine, self._store, self._send, self._deliver)
        if self._machine.state.index:
            self._state = self._machine.state
        self._first = self._state.index + 1
        self.feed(Wall(time.time()))
        self.feed(Woken(TIMER))
        while self._machine.behind:
            self.feed(Woken(TIMER))
        self._proposals.begin(self._store)

    def feed(self, event: Event) -> None:
        """Give the machine an event."""
        if self._driver is not None:
            self._driver.feed(event)

    def receive(self, peer: str, data: bytes) -> None:
        """A message came from a member, whose key the connection proved."""
        self.quorum.heard(peer)
        if self._driver is not None:
            self._driver.receive(peer, data)

    def member(self, peer: str) -> entries.Member | None:
        """Where a message to this peer goes; None if it is no member, as far as is known here.

        One that has just left is still told so.
        """
        found = self._state.members.get(peer) or self._bootstrap.members.get(peer)
        return found if found is not None and self.quorum.is_spoken_to(found) else None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take part in keeping the catalog, as long as the peer lasts."""
        assert self._driver is not None
        async with trio.open_nursery() as nursery:
            await nursery.start(self._driver.run)
            nursery.start_soon(self._tell_wall)
            nursery.start_soon(self._note_commit)
            nursery.start_soon(self._catch_up)
            nursery.start_soon(self._watch_majority)
            nursery.start_soon(self._watch_disk, self._driver)
            task_status.started()

    async def _tell_wall(self) -> None:
        while True:
            await trio.sleep(WALL_PAUSE)
            self.feed(Wall(time.time()))

    async def _catch_up(self) -> None:
        state = await self._read()
        while state is None:
            await trio.sleep(READ_PAUSE)
            state = await self._read()
        self._fresh = True
        self._changed.set()

    async def _note_commit(self) -> None:
        """At once: after a kill -9 the next process must know the guests that it finds running."""
        while True:
            noted = self._state.index
            self._store.note_commit(noted)
            await self._changed.wait_until(lambda: self._state.index != noted)  # noqa: B023

    async def _watch_disk(self, driver: Driver) -> None:
        """A coordinator whose disk is full says so to those who wait, unless the others do without it."""
        while True:
            await driver.filled.wait()
            await trio.sleep(FULL_PATIENCE)
            if driver.full is not None and self.leads:
                self._proposals.fail(driver.full)

    async def _watch_majority(self) -> None:
        """Whoever waits for what nobody can decide is told so when that is known, instead of waiting on."""
        told = False
        while True:
            await trio.sleep(LOOK_PAUSE)
            error = self.quorum.hopeless()
            if error is not None:
                self._proposals.fail(error)
                if not told:
                    self._changed.set()
            told = error is not None

    def close(self) -> None:
        """Close the store; nothing may be proposed any more."""
        if self._state.index:
            self._store.note_commit(self._state.index)
        self._store.close()

    # What the machine says.

    def _deliver(self, effect: Effect) -> None:
        match effect:
            case Applied():
                self._take(effect)
            case Restored(state):
                self._state = state
                self._proposals.skipped()
                self._stamps.witness(hlc.of_time(state.time))
                self._backlog.clear()
                self._first = state.index + 1
                self._changed.set()
            case Became(role, term, leader):
                self._became(role, term, leader)
            case Readable(cookie, state):
                self._answer_read(cookie, state)
            case ReadFailed(cookie):
                self._answer_read(cookie, None)
            case Deadline(at):
                self.lease.extend(at)
            case PeerLost(peer):
                self._lost[peer] = (next(self._loss_numbers), effect)
                self._losses.set()
            case PeerFound(peer):
                self._lost.pop(peer, None)

    def _take(self, applied: Applied) -> None:
        before, self._state = self._state, applied.state
        if self._state.members is not before.members:
            self.quorum.note_who_left(before, self._state)
        proposal = applied.proposal
        if proposal is not None:
            self._stamps.witness(proposal.stamp)
        self._proposals.applied(applied)
        if proposal is not None and applied.refused is None and not applied.repeated:
            self._backlog.append((applied.index, proposal))
            if len(self._backlog) > 2 * BACKLOG:
                del self._backlog[:BACKLOG]
                self._first = self._backlog[0][0]
        self._changed.set()

    def _became(self, role: Role, term: int, leader: str) -> None:
        before = self._leadership
        same = (before.term, before.leader) == (term, leader)
        self._leadership = Leadership(role, term, leader, before.since if same else time.time())
        if role != "leader":
            self._lost.clear()
        if not same:
            log.info("catalog.leader", role=role, term=term, leader=self._state.peer_name(leader))
        self._changed.set()

    # Who decides.

    @property
    def leadership(self) -> Leadership:
        """Role, term and leader, as far as this peer knows; `changed` is set when they change."""
        return self._leadership

    @property
    def leader(self) -> str:
        """The coordinator's id, "" if it is not known."""
        return self._leadership.leader

    @property
    def leads(self) -> bool:
        """Whether this peer is the coordinator."""
        return self._leadership.role == "leader"

    @property
    def fresh(self) -> bool:
        """Whether this peer has known the newest state since it started: nothing that cannot be taken back
        may be done by an old one. `changed` is set when it becomes true."""
        return self._fresh

    @property
    def configuration(self) -> Configuration:
        """The newest configuration known here."""
        return self._machine.configuration if self._machine else Configuration()

    @property
    def voters(self) -> frozenset[str]:
        """The ids of those who vote, by the newest configuration known here."""
        return self.configuration.deciding

    @property
    def changing(self) -> bool:
        """Whether one set of voters is being replaced by another: both must agree until it is."""
        return self.configuration.joint

    @property
    def recovering(self) -> bool:
        """Whether this peer has lost records that it acknowledged: its vote does not count until the others
        have taken it away and it has all that was decided."""
        return self._machine is not None and self._machine.raft.recovering

    async def hand_over(self, timeout: float) -> None:
        """Let another voter coordinate, if this peer does; raises `OperationError(conflict)`."""
        deadline = trio.current_time() + timeout
        for attempt in itertools.count():
            if not self.leads:
                return
            heirs = self.quorum.heirs()
            if trio.current_time() >= deadline:
                raise OperationError("conflict", "no other voter has taken over", "try again in a moment")
            if heirs:
                self.feed(TransferTo(heirs[attempt % len(heirs)]))
            with trio.move_on_after(min(HAND_OVER_PAUSE, timeout)):
                await self._changed.wait_until(lambda: not self.leads)

    async def wait_leader(self, timeout: float) -> str:
        """The coordinator's id; waits for one to be elected, if there can be one.

        Raises `OperationError(no-leader, no-majority)`.
        """
        with trio.move_on_after(timeout):
            await self._changed.wait_until(lambda: bool(self.leader) or self.quorum.hopeless() is not None)
        if self.leader and self.quorum.hopeless() is None:
            return self.leader
        raise self.quorum.no_leader()

    # Reading.

    @property
    def state(self) -> State:
        """What this peer knows by now; a value that never changes under its reader."""
        return self._state

    @property
    def changed(self) -> Changed:
        """Set after every applied record, and when the coordinator changes."""
        return self._changed

    async def wait(self, predicate: Callable[[State], bool], timeout: float | None = None) -> State:
        """The first state, from now on, for which `predicate` holds; raises `OperationError(timeout)`."""
        with trio.move_on_after(float("inf") if timeout is None else timeout):
            await self._changed.wait_until(lambda: predicate(self._state))
            return self._state
        raise OperationError("timeout", f"the catalog did not come to the awaited state within {timeout:g} s")

    async def changes(
        self, after: int | None = None
    ) -> AsyncGenerator[tuple[int, entries.Proposal | None, State], None]:
        """Every entry that became true after record `after` (default: now), for ever, with the newest state.

        The state may be newer than the entry. What a reader has missed because it was too slow, or this peer
        was given a snapshot, is one item without a proposal: only the state tells then.
        """
        position = self._state.index if after is None else after
        while True:
            if position + 1 < self._first:
                position = self._first - 1
                yield position, None, self._state
            start = bisect_right(self._backlog, position, key=lambda item: item[0])
            for index, proposal in self._backlog[start : start + 100]:
                position = index
                yield index, proposal, self._state
            await self._changed.wait_until(partial(self._has_more, position))

    def _has_more(self, position: int) -> bool:
        return position + 1 < self._first or bool(self._backlog and self._backlog[-1][0] > position)

    async def read(self, timeout: float = 10.0) -> State:
        """A state at least as new as everything that was acknowledged anywhere before this call.

        Raises `OperationError(no-leader, no-majority)`.
        """
        with trio.move_on_after(timeout):
            while (error := self.quorum.hopeless()) is None:
                state = await self._read()
                if state is not None:
                    return state
                await trio.sleep(READ_PAUSE)
            raise error
        raise self.quorum.no_leader()

    async def _read(self) -> State | None:
        """The same, asked once; None after a moment without a coordinator (`proto/raft/reads.py`)."""
        cookie, reading = next(self._cookies), _Reading()
        self._reads[cookie] = reading
        try:
            self.feed(Read(cookie))
            await reading.done.wait()
        finally:
            self._reads.pop(cookie, None)
        return reading.state

    def _answer_read(self, cookie: int, state: State | None) -> None:
        reading = self._reads.get(cookie)
        if reading is not None:
            reading.state = state
            reading.done.set()

    # Proposing.

    def applied(self, request: str) -> int | None:
        """The index at which this step of a command was applied, None if it was not (or is forgotten)."""
        return self._state.requests.get(request) if request else None

    async def propose(self, entry: entries.Entry, timeout: float = 10.0, *, request: str = "") -> int:
        """Make `entry` true in the mesh; returns its index once it is durable *and applied here*.

        `request` is the step of a command (`operations.step`): one that was applied before changes nothing.

        Raises `OperationError`: the code of a refusal if it contradicts the state, `too-large`; `no-majority`
        as soon as too many voters are missing, `no-leader` if nobody made it true in time, `no-room` if the
        disk is full. After these it may still become true, unless it was refused at once.
        """
        versions.check_entry(self._state, entry)
        if (error := self.quorum.hopeless()) is not None:
            raise error
        with trio.move_on_after(timeout):
            await self._check_disk()
            return await self._proposals.propose(entry, request)
        raise self._unproposed(timeout)

    async def _check_disk(self) -> None:
        """Nobody but this peer can make it true, and its disk is full: say so soon."""
        assert self._driver is not None
        if self._driver.full is not None and self.leads and self.voters == {self._own}:
            await trio.sleep(FULL_PATIENCE)
            if self._driver.full is not None:
                raise self._driver.full

    def _unproposed(self, timeout: float) -> OperationError:
        if not self.leader:
            return self.quorum.no_leader()
        name = self._state.peer_name(self.leader)
        return OperationError(
            "no-leader",
            f"the coordinator {name} did not make the change true within {timeout:g} s; it may still do so",
            "look again in a moment",
        )

    # Members that come and go.

    def sight(
        self, peer: str, state: Reach, rtt: float | None = None, memory_free: int | None = None
    ) -> None:
        """A hint of how a member looks from here, and what its host has free."""
        self.quorum.sight(peer, state)
        self.feed(Sighted(peer, state, rtt, memory_free))

    async def lost(self) -> AsyncGenerator[PeerLost, None]:
        """At the coordinator: the peers whose lease has run out by every clock, as often as it is noticed."""
        seen = 0
        while True:
            for number, loss in sorted(self._lost.values(), key=lambda item: item[0]):
                if number > seen:
                    seen = number
                    yield loss
            await self._losses.wait_until(partial(self._has_lost, seen))

    def _has_lost(self, seen: int) -> bool:
        return any(number > seen for number, _ in self._lost.values())

    async def fence(self, peer: str, entry: entries.Entry, term: int) -> None:
        """Commit what follows from a lost lease, if it is lost still and this peer coordinates in `term`."""
        self.feed(Fence(peer, entry, term, time.time()))
        await trio.lowlevel.checkpoint()
