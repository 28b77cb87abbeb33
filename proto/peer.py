# SPDX-License-Identifier: Apache-2.0
"""The one machine of a peer: the log, the catalog that it makes, leases, and what follows from them.

Everything that a mesh must agree on goes through here. `Peer` puts together the parts, each of which can be
read alone: Raft keeps the log (`proto/raft/machine.py`), the catalog is what its records mean
(`proto/catalog.py`), the outbox brings this peer's own proposals to whoever coordinates (`proto/outbox.py`),
the holder keeps this peer's lease (`proto/leases.py`), and while this peer leads there is a `Coordinator`
(`proto/coordinator.py`). What one part wants of another is carried here and nowhere else; messages of this
peer to itself never leave it. Events and effects are those of `proto/peer_events.py`.

An effect that follows from a record comes after the `Applied` of that record. A shell carries effects out in
order, and begins with `Wall`, and `Woken(raft.TIMER)` until nothing is `behind`.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable
from typing import Any

from proto import entries, peer_events, state_codec
from proto.api import OperationError
from proto.catalog import Refused, applied_index, apply, refusal, skip
from proto.coordinator import TIMER as COORDINATOR_TIMER
from proto.coordinator import Coordinator, View, Want
from proto.entries import Proposal
from proto.lease_events import Deadline, Granted, NotGranted, Renew
from proto.leases import GRANTOR_TIMER, HOLDER_TIMER, AskFresh, Holder
from proto.log import Record
from proto.machine import Persisted, Send, WakeAt, Woken
from proto.outbox import Outbox
from proto.peer_events import Applied, Effect, Event, Fence, Forward, Proposed, Restored, Sighted
from proto.raft import configuration as configurations
from proto.raft import events as raft
from proto.raft.configuration import Configuration
from proto.raft.machine import Raft
from proto.state import State
from proto.voters import Look

RESEND_TIMER = "resend"

CONTACTS = 8
"""Members that may be asked for the log."""


def found(own: str, member: entries.Member, mesh: str, wall: float) -> raft.Stored:
    """The log of a new mesh, whose only voter is `own`; to be written before the peer starts with it."""
    first = Proposal(entry=entries.Found(mesh=mesh, member=member), time=wall)
    voters = Configuration(voters=frozenset({own}))
    records = [
        Record(1, 1, configurations.encode(voters), "config"),
        Record(1, 2, entries.encode(first), "command"),
    ]
    return raft.Stored(ballot=raft.Ballot(1, own), records=records, commit=2)


class Peer:
    """The machine. `contacts` are the ids of the last members it knew, in case its state knows less."""

    def __init__(
        self,
        own: str,
        stored: raft.Stored,
        settings: peer_events.Settings,
        rng: random.Random,
        contacts: Iterable[str] = (),
    ) -> None:
        """Raises `OperationError` if the stored snapshot cannot be read."""
        self.own = own
        self.settings = settings
        self.state = State()
        if stored.snapshot.index:
            self.state = state_codec.decode(stored.snapshot.data)
        self.leader = ""
        """The coordinator's id, "" if unknown."""
        self.raft = Raft(own, stored, settings.raft, rng)
        self.coordinator: Coordinator | None = None
        """What this peer does as the coordinator; None if it is not."""
        self._holder = Holder(settings.lease, rng)
        self._outbox = Outbox(settings.resend)
        self._looks: dict[str, Look] = {}
        self._first_contacts = tuple(contacts)
        self._contacts: tuple[str, ...] = ()
        self._cookie = rng.getrandbits(62)
        self._reads: dict[int, tuple[str, int]] = {}
        self._wall: tuple[float, float] | None = None
        self._uncompacted = len(stored.records)
        self._uncompacted_bytes = sum(len(record.payload) for record in stored.records)
        self._inbox: deque[raft.Event] = deque()
        self._out: list[Effect] = []
        self._now = 0.0
        self._changed = True

    @property
    def lease_deadline(self) -> float:
        """Until when this peer's lease holds, on its own clock; 0 if there was never one."""
        return self._holder.deadline

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take one event; return the effects in order. Raises `OperationError` if a committed record cannot
        be read: this version is too old to go on."""
        self._now, self._out = now, []
        self._members_changed()
        self._take(event)
        while self._inbox:
            self._drive(self._inbox.popleft())
            self._members_changed()
        return self._out

    def _drive(self, event: raft.Event) -> None:
        end = self.raft.last_index
        effects = self.raft.handle(event, self._now)
        if isinstance(event, raft.Propose) and self.raft.last_index == end and self.coordinator:
            self.coordinator.dropped(event.payloads)
        for effect in effects:
            self._took(effect)

    @property
    def behind(self) -> bool:
        """Whether `state` is not all that is known to be committed; `Woken(raft.TIMER)` brings more."""
        return self.raft.behind

    @property
    def configuration(self) -> Configuration:
        """The newest voters and learners in this peer's log, committed or not."""
        return self.raft.configuration

    # Events.

    def _take(self, event: Event) -> None:
        match event:
            case raft.Received(peer, message):
                self._received(peer, message)
            case Woken(timer):
                self._woken(timer)
            case Persisted() | raft.TransferTo():
                self._inbox.append(event)
            case raft.Read(cookie, fresh):
                self._read("shell", cookie, fresh)
            case Proposed(proposal, wall):
                self._wall = (wall, self._now)
                self._proposed(proposal)
            case peer_events.GivenUp(sequence):
                self._outbox.drop(sequence)
            case peer_events.Wall(wall):
                self._wall = (wall, self._now)
            case Fence(peer, entry, term, wall):
                self._wall = (wall, self._now)
                if self.coordinator and self.coordinator.term == term:
                    self._perform(self.coordinator.fence(peer, entry, self._view()))
            case Sighted():
                self._sighted(event)

    def _received(self, peer: str, message: Any) -> None:
        match message:
            case Renew() if self.coordinator:
                self._perform(self.coordinator.renew(peer, message))
            case Renew(number):
                self._perform([Send(peer, NotGranted(number, "another peer coordinates, or none"))])
            case Granted():
                self._perform(self._holder.granted(peer, message, self.state.index))
            case NotGranted():
                self._holder.refused(peer, message)
            case Forward(proposals):
                self._forwarded(peer, proposals)
            case _:
                self._inbox.append(raft.Received(peer, message))

    def _woken(self, timer: str) -> None:
        coordinator = self.coordinator
        if timer == raft.TIMER:
            self._inbox.append(Woken(timer))
        elif timer == HOLDER_TIMER:
            self._perform(self._holder.renew(self._now))
        elif timer == RESEND_TIMER:
            self._send_proposals()
        elif timer == GRANTOR_TIMER and coordinator:
            self._perform(coordinator.woken(self._view()))
        elif timer == COORDINATOR_TIMER and coordinator:
            self._perform(coordinator.look(self._view(), timer=True))

    def _sighted(self, event: Sighted) -> None:
        old = self._looks.get(event.peer)
        turned = old is None or old.state != event.state
        since = self._now if old is None or turned else old.since
        rtt = event.rtt if event.rtt is not None or old is None else old.rtt
        free = event.memory_free if event.memory_free is not None or old is None else old.memory_free
        self._looks[event.peer] = Look(event.state, since, rtt, free)
        if turned:
            self._tell_contacts()
        if self.coordinator:
            self._perform(self.coordinator.look(self._view()))

    # Proposals.

    def _proposed(self, proposal: Proposal) -> None:
        if not proposal.client:
            if self.coordinator:
                self._perform(self.coordinator.decide(proposal.entry, self._view())[1])
            return
        error = self._outbox.add(proposal)
        if error is not None:
            self._out.append(Applied(self.state.index, proposal, error, self.state))
            return
        self._send_proposals()

    def _send_proposals(self) -> None:
        """Bring what is due to the coordinator."""
        if self.coordinator:
            self._perform(self.coordinator.append(self._outbox.due(self._now), self._view()))
        elif self.leader:
            for portion in self._outbox.packed(self._outbox.due(self._now)):
                self._out.append(Send(self.leader, Forward(portion)))
        else:
            return
        wake = self._outbox.wake_at()
        if wake is not None:
            self._out.append(WakeAt(RESEND_TIMER, wake))

    def _forwarded(self, peer: str, encoded: Iterable[bytes]) -> None:
        """Proposals of a member, in its own name; what is wrong with them is the sender's to find out."""
        member = self.state.members.get(peer)
        if not self.coordinator or member is None or member.status != "member":
            return
        proposals: list[Proposal] = []
        for data in encoded:
            try:
                proposal = entries.decode(data)
            except OperationError:
                continue
            if proposal.client == peer:
                proposals.append(proposal)
        self._perform(self.coordinator.append(proposals, self._view()))

    # What Raft wants.

    def _took(self, effect: raft.Effect) -> None:
        match effect:
            case raft.Commit(records):
                for record in records:
                    self._apply(record)
                self._compact()
            case raft.Restore(snapshot):
                self._restore(snapshot)
            case raft.Became():
                self._out.append(effect)
                self._became(effect)
            case raft.ReadReady(cookie):
                self._readable(cookie, True)
            case raft.ReadFailed(cookie):
                self._readable(cookie, False)
            case _:
                self._out.append(effect)

    def _became(self, became: raft.Became) -> None:
        changed = became.leader != self.leader
        self.leader = became.leader
        if became.role != "leader":
            self.coordinator = None
        elif self.coordinator is None or self.coordinator.term != became.term:
            changed = True
            self.coordinator = Coordinator(self.own, became.term, became.quiet, self.settings, self._now)
            self._perform(self.coordinator.members_changed(self._view()))
            self._perform(self.coordinator.look(self._view(), timer=True))
        if changed:
            self._outbox.again()
            self._send_proposals()
            self._perform(self._holder.follow(self.leader, self._now))

    def _apply(self, record: Record) -> None:
        before = self.state
        proposal, error, repeated = None, None, False
        if record.kind == "command":
            proposal = self.coordinator.intake.proposal_of(record.payload) if self.coordinator else None
            proposal = proposal or entries.decode(record.payload)
            self.state, error, repeated = _decided(before, record.index, proposal)
            if proposal.client == self.own:
                self._outbox.settle(proposal)
        else:
            self.state = skip(before, record.index)
            self._changed |= record.kind == "config"
        self._uncompacted += 1
        self._uncompacted_bytes += len(record.payload)
        self._out.append(Applied(record.index, proposal, error, self.state, repeated))
        self._changed |= before.members is not self.state.members
        self._changed |= before.migrations is not self.state.migrations
        if self.coordinator:
            self._perform(self.coordinator.applied(record.term, proposal, self._view))
        self._perform(self._holder.applied(self.state.index))

    def _restore(self, snapshot: raft.Snapshot) -> None:
        self.state = state_codec.decode(snapshot.data)
        self._changed = True
        self._uncompacted = self._uncompacted_bytes = 0
        self._out.append(Restored(self.state))
        for index, proposal, error in self._outbox.decided(self.state):
            self._out.append(Applied(index, proposal, error, self.state, repeated=True))
        self._perform(self._holder.applied(self.state.index))

    def _compact(self) -> None:
        settings = self.settings
        if self._uncompacted < settings.compact_records and self._uncompacted_bytes < settings.compact_bytes:
            return
        self._uncompacted = self._uncompacted_bytes = 0
        index = self.state.index
        keep = max(1, index + 1 - settings.keep_records)
        self._inbox.append(raft.Compact(index, state_codec.encode(self.state), keep))

    # Reads.

    def _read(self, whose: str, cookie: int, fresh: bool) -> None:
        """Cookies on their way to others begin at random: a late answer to an earlier start fits none."""
        self._cookie += 1
        self._reads[self._cookie] = (whose, cookie)
        self._inbox.append(raft.Read(self._cookie, fresh))

    def _readable(self, cookie: int, ready: bool) -> None:
        whose, asked = self._reads.pop(cookie, ("", 0))
        if whose == "shell" and ready:
            self._out.append(peer_events.Readable(asked, self.state))
        elif whose == "shell":
            self._out.append(raft.ReadFailed(asked))
        elif whose == "grantor" and self.coordinator and self.coordinator.term == asked:
            index = self.state.index if ready else None
            self._perform(self.coordinator.grantor.read(index, self._now))

    # Between the parts.

    def _perform(self, wants: Iterable[Want | Deadline]) -> None:
        for want in wants:
            match want:
                case Send(peer, message) if peer == self.own:
                    self._received(peer, message)
                case AskFresh():
                    assert self.coordinator
                    self._read("grantor", self.coordinator.term, fresh=True)
                case raft.Propose() | raft.ChangeVoters() | raft.TransferTo():
                    self._inbox.append(want)
                case _:
                    self._out.append(want)

    def _view(self) -> View:
        return View(
            state=self.state,
            looks=self._looks,
            configuration=self.raft.configuration,
            recovering=self.raft.recovering_replicas,
            current=self.raft.current_replicas,
            lagging=self.raft.lagging,
            now=self._now,
            wall=self._wall_now(),
        )

    def _wall_now(self) -> float:
        if self._wall is None:
            return self.state.time
        wall, at = self._wall
        return wall + self._now - at

    def _members_changed(self) -> None:
        """If members, voters, leases or handovers may be others now, tell whom it concerns."""
        if not self._changed:
            return
        self._changed = False
        self._tell_contacts()
        if self.coordinator:
            self._perform(self.coordinator.members_changed(self._view()))
            self._perform(self.coordinator.look(self._view()))
        own = self.state.members.get(self.own)
        duration = (own.lease if own else 0.0) or self.settings.lease
        first = own is not None and own.lease > 0.0 and not self._holder.deadline
        if first or duration != self._holder.duration:
            self._holder.duration = duration
            self._perform(self._holder.renew(self._now))

    def _tell_contacts(self) -> None:
        """Replicas first, those that look alive first, the nearest first; then those that this state does not
        know: they were members when this peer last ran, and the state may be older than that."""
        replicas = self.raft.configuration.replicas

        def order(peer: str) -> tuple[bool, bool, float, str]:
            look = self._looks.get(peer)
            rtt = look.rtt if look and look.rtt is not None else float("inf")
            return look is not None and look.state == "dead", peer not in replicas, rtt, peer

        members = self.state.members
        others = (m.id for m in members.values() if m.status == "member" and m.id != self.own)
        unknown = (peer for peer in self._first_contacts if peer not in members)
        contacts = (*sorted(others, key=order)[:CONTACTS], *unknown)
        if contacts != self._contacts:
            self._contacts = contacts
            self._inbox.append(raft.Contacts(contacts))


def _decided(state: State, index: int, proposal: Proposal) -> tuple[State, OperationError | None, bool]:
    """The state after the record, why it was refused (now or before), and whether it is a repetition."""
    try:
        known = applied_index(state, proposal.client, proposal.boot, proposal.sequence)
        repeated = known is not None or proposal.request in state.requests
        error = refusal(state, proposal.client, proposal.sequence) if known is not None else None
        return apply(state, index, proposal), error, repeated
    except Refused as error:
        return skip(state, index, proposal, error), error, False
