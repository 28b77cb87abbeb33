# SPDX-License-Identifier: Apache-2.0
"""The catalog of a live peer: the state that the mesh agrees on, as far as this peer knows it.

What is agreed is decided by the machine of `proto/peer.py`, which every peer runs; a `Driver` keeps it going.
This is its face to the other parts: they read the newest state, wait for it to change, and propose entries.
A proposal is made true by the coordinator, whoever that is; this peer learns what became of it from its own
copy of the log, so no answer can get lost and nothing is done twice. A question that must not be answered
from an old copy is a `read`.

Proposals are numbered within one start of the peer, and starts by a number that grows, the *boot*: those of
an earlier start mean nothing once a later one is known. A peer that has lost its catalog and whose clock was
put back may begin with too low a number. It notices when the log brings a proposal of its own that it never
made, takes a higher one, and proposes again what is under way, which cannot become true any more as it is.
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
from mobid.lease import Lease, boottime
from mobid.mail import FAREWELL
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
    GivenUp,
    Proposed,
    Readable,
    Restored,
    Settings,
    Sighted,
    Wall,
)
from proto.raft.configuration import Configuration
from proto.raft.events import TIMER, Became, Durable, Read, ReadFailed, Role, TransferTo
from proto.state import SESSION_WINDOW, State
from proto.swim.packets import Reach

QUEUE = SESSION_WINDOW // 2
"""Proposals of this peer that are under way at once; few enough that none is forgotten too early."""

BACKLOG = 4096
"""Applied entries that are kept for those who follow them one by one."""

SILENT_AFTER = 3.0
"""A voter not heard for so long, and three election times, does not answer."""

FULL_PATIENCE = 1.0
"""How long a coordinator with a full disk waits for others to make a proposal true without it."""

LOOK_PAUSE = 0.5
"""Seconds between two looks at whether those who wait for a decision still may."""

READ_PAUSE = 0.1
HAND_OVER_PAUSE = 2.0
WALL_PAUSE = 60.0

log = structlog.get_logger()


@dataclass
class _Pending:
    """Somebody waits for an answer of the machine."""

    done: trio.Event = field(default_factory=trio.Event)
    index: int = 0
    state: State | None = None
    error: OperationError | None = None
    outdated: bool = False
    """It was proposed with a boot that means nothing any more, and has not become true."""

    def answer(self, error: OperationError | None) -> None:
        if not self.done.is_set():
            self.error = error
            self.done.set()

    def outdate(self) -> None:
        if not self.done.is_set():
            self.outdated = True
            self.done.set()


@dataclass(frozen=True)
class Leadership:
    """Who coordinates, as far as this peer knows. `since` is seconds since 1970."""

    role: Role = "observer"
    term: int = 0
    leader: str = ""
    since: float = 0.0


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
        self._boot = 0
        self._sequence = 0
        self._slots = trio.CapacityLimiter(QUEUE)
        self._proposals: dict[int, _Pending] = {}
        self._cookies = itertools.count(1)
        self._reads: dict[int, _Pending] = {}
        self._lost: dict[str, tuple[int, PeerLost]] = {}
        self._loss_numbers = itertools.count(1)
        self._losses = Changed()
        self._heard: dict[str, float] = {}
        self._looks: dict[str, Reach] = {}
        self._left: dict[str, float] = {}
        self._begun = boottime()

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
        self._take_boot()

    def _take_boot(self) -> None:
        """Number this start, later than every one that is known of."""
        session = self._state.sessions.get(self._own)
        self._boot = self._store.next_boot(max(time.time_ns(), session.boot + 1 if session else 0))

    def _outdated(self) -> bool:
        """Whether the log has proposals of this peer that were not made in this start, nor before it."""
        session = self._state.sessions.get(self._own)
        return session is not None and (session.boot, session.newest) > (self._boot, self._sequence)

    def feed(self, event: Event) -> None:
        """Give the machine an event."""
        if self._driver is not None:
            self._driver.feed(event)

    def receive(self, peer: str, data: bytes) -> None:
        """A message came from a member, whose key the connection proved."""
        self._heard[peer] = boottime()
        if self._driver is not None:
            self._driver.receive(peer, data)

    def member(self, peer: str) -> entries.Member | None:
        """Where a message to this peer goes; None if it is no member, as far as is known here.

        One that has just left is still told so.
        """
        found = self._state.members.get(peer) or self._bootstrap.members.get(peer)
        if found is None or (found.status == "left" and boottime() > self._left.get(peer, 0.0) + FAREWELL):
            return None
        return found

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
                for pending in list(self._proposals.values()):
                    pending.answer(driver.full)

    async def _watch_majority(self) -> None:
        """Whoever waits for what nobody can decide is told so when that is known, instead of waiting on."""
        told = False
        while True:
            await trio.sleep(LOOK_PAUSE)
            error = self._hopeless()
            if error is not None:
                for pending in list(self._proposals.values()):
                    pending.answer(error)
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
                self._skipped()
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
            self._note_who_left(before)
        proposal = applied.proposal
        if proposal is not None:
            self._stamps.witness(proposal.stamp)
        if proposal is not None and (proposal.client, proposal.boot) == (self._own, self._boot):
            pending = self._proposals.get(proposal.sequence)
            if pending is not None:
                pending.index = applied.index
                pending.answer(applied.refused)
        if self._outdated():
            for pending in self._proposals.values():
                pending.outdate()
        if proposal is not None and applied.refused is None and not applied.repeated:
            self._backlog.append((applied.index, proposal))
            if len(self._backlog) > 2 * BACKLOG:
                del self._backlog[:BACKLOG]
                self._first = self._backlog[0][0]
        self._changed.set()

    def _skipped(self) -> None:
        """Records were not seen one by one. If the boot is outdated by them, what is under way may have
        become true before it was."""
        if self._outdated():
            for pending in self._proposals.values():
                pending.answer(
                    OperationError(
                        "no-leader",
                        "this peer has just been given a newer state, which does not tell whether the change "
                        "has become true",
                        "look again in a moment",
                    )
                )

    def _note_who_left(self, before: State) -> None:
        for peer, member in self._state.members.items():
            known = before.members.get(peer)
            if member.status == "left" and known is not None and known.status == "member":
                self._left[peer] = boottime()

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

    def missing(self) -> dict[str, float]:
        """The voters that do not answer, and for how many seconds they have been silent. One that has left
        the mesh will not answer any more, whenever it was last heard."""
        now = boottime()
        patience = SILENT_AFTER + 3 * self._settings.raft.election
        found = {}
        for peer in self.voters - {self._own}:
            silence = now - self._heard.get(peer, self._begun)
            member = self._state.members.get(peer)
            left = member is not None and member.status == "left"
            if left or (self._looks.get(peer) != "alive" and silence > patience):
                found[peer] = silence
        return found

    def dispensable(self, peer: str) -> bool:
        """Whether the mesh could decide without this peer, if it were gone now."""
        settled = self.configuration
        return settled.quorum(settled.deciding - self.missing().keys() - {peer})

    async def hand_over(self, timeout: float) -> None:
        """Let another voter coordinate, if this peer does; raises `OperationError(conflict)`."""
        deadline = trio.current_time() + timeout
        for attempt in itertools.count():
            if not self.leads:
                return
            heirs = sorted(self.voters - self.missing().keys() - {self._own}, key=self._drains)
            if trio.current_time() >= deadline:
                raise OperationError("conflict", "no other voter has taken over", "try again in a moment")
            if heirs:
                self.feed(TransferTo(heirs[attempt % len(heirs)]))
            with trio.move_on_after(min(HAND_OVER_PAUSE, timeout)):
                await self._changed.wait_until(lambda: not self.leads)

    def _drains(self, peer: str) -> bool:
        member = self._state.members.get(peer)
        return member is not None and member.draining

    def no_leader(self) -> OperationError:
        """Why there is no coordinator, in words; `no-leader` while there may soon be one."""
        if not self.voters:
            return OperationError(
                "no-leader",
                "no coordinator: this peer has no catalog yet and none of the members it knows has answered",
                "start the peers of the mesh, or mend the network between them",
            )
        return self._no_majority() or OperationError(
            "no-leader", "no coordinator right now: one is being elected", "try again"
        )

    def _no_majority(self) -> OperationError | None:
        """That too many voters are missing for a decision, if it is so as far as this peer sees."""
        voters, missing = self.voters, self.missing()
        lost = voters & {self._own} if self.recovering else frozenset[str]()
        there = voters - missing.keys() - lost
        if self._machine is None or self.configuration.quorum(there):
            return None
        why = {peer: f"silent for {silence:.0f} s" for peer, silence in missing.items()}
        why |= dict.fromkeys(lost, "this peer, which has lost its log and must not vote as it is")
        names = ", ".join(sorted(f"{self._state.peer_name(peer)} ({reason})" for peer, reason in why.items()))
        hint = "start the missing peers again, or mend the network to them; what is there goes on as it is"
        if lost and not self.configuration.quorum(voters - lost):
            hint = (
                "the others cannot decide without this peer: restore its catalog from a copy, or found a new "
                "mesh in an empty --dir"
            )
        message = f"no coordinator: {len(there)} of {len(voters)} voters answer; missing: {names}"
        return OperationError("no-majority", message, hint)

    def _hopeless(self) -> OperationError | None:
        """Why there is no use in waiting for a decision; None if there may be.

        A coordinator that answers is hope enough: it may hear voters that this peer does not.
        """
        if self.leads or not self.voters or (self.leader and self.leader not in self.missing()):
            return None
        return self._no_majority()

    async def wait_leader(self, timeout: float) -> str:
        """The coordinator's id; waits for one to be elected, if there can be one.

        Raises `OperationError(no-leader, no-majority)`.
        """
        with trio.move_on_after(timeout):
            await self._changed.wait_until(lambda: bool(self.leader) or self._hopeless() is not None)
        if self.leader and self._hopeless() is None:
            return self.leader
        raise self.no_leader()

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
            while (error := self._hopeless()) is None:
                state = await self._read()
                if state is not None:
                    return state
                await trio.sleep(READ_PAUSE)
            raise error
        raise self.no_leader()

    async def _read(self) -> State | None:
        """The same, asked once; None after a moment without a coordinator (`proto/raft/reads.py`)."""
        cookie, pending = next(self._cookies), _Pending()
        self._reads[cookie] = pending
        try:
            self.feed(Read(cookie))
            await pending.done.wait()
        finally:
            self._reads.pop(cookie, None)
        return pending.state

    def _answer_read(self, cookie: int, state: State | None) -> None:
        pending = self._reads.get(cookie)
        if pending is not None:
            pending.state = state
            pending.done.set()

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
        if (error := self._hopeless()) is not None:
            raise error
        with trio.move_on_after(timeout):
            async with self._slots:
                return await self._propose(entry, request)
        raise self._unproposed(timeout)

    async def _propose(self, entry: entries.Entry, request: str) -> int:
        assert self._driver is not None
        if self._driver.full is not None and self.leads and self.voters == {self._own}:
            await trio.sleep(FULL_PATIENCE)
            if self._driver.full is not None:
                raise self._driver.full
        while True:
            pending = await self._propose_once(entry, request)
            if pending.error is not None:
                raise pending.error
            if not pending.outdated:
                return pending.index

    async def _propose_once(self, entry: entries.Entry, request: str) -> _Pending:
        if self._outdated():
            self._take_boot()
        self._sequence += 1
        sequence, pending = self._sequence, _Pending()
        proposal = entries.Proposal(
            entry=entry,
            client=self._own,
            boot=self._boot,
            sequence=sequence,
            request=request,
            stamp=self._stamps.now(),
        )
        self._proposals[sequence] = pending
        try:
            self.feed(Proposed(proposal, time.time()))
            await pending.done.wait()
        finally:
            if self._proposals.pop(sequence, None) is not None:
                self.feed(GivenUp(sequence))
        return pending

    def _unproposed(self, timeout: float) -> OperationError:
        if not self.leader:
            return self.no_leader()
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
        self._looks[peer] = state
        if state == "alive":
            self._heard[peer] = boottime()
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
