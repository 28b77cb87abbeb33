# SPDX-License-Identifier: Apache-2.0
"""What a peer does beyond its own affairs while it coordinates: leases, voters, and the loss of peers.

There is one `Coordinator` for each term that this peer leads, and it dies with it; all that must outlive it
is in the log. It decides nothing before it has applied a record of its own term, for only then does its
state hold everything that earlier coordinators may have decided.

It is a part of `proto/peer.py`, which carries the log; what it gives back are effects, and events for Raft.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from proto import entries, failover, voters
from proto.entries import Entry, FailOverGuest, MarkGuest, Member, Proposal, SetLease
from proto.intake import Intake
from proto.lease_events import PeerLost, Renew
from proto.leases import Grantor, GrantorEffect
from proto.machine import WakeAt
from proto.peer_events import Settings
from proto.raft import events as raft
from proto.raft.configuration import Configuration
from proto.state import State
from proto.voters import Look

TIMER = "coordinator"

PACE = 1.0
"""Seconds between two looks at voters and leases."""

FAR_FOR = 10.0
"""A peer must have been far away for so many seconds before it gets the long lease: it never falls again."""

Want = GrantorEffect | raft.Propose | raft.ChangeVoters | raft.TransferTo


@dataclass(frozen=True, slots=True)
class View:
    """What the coordinator's peer knows at the moment; `now` and `wall` in seconds."""

    state: State
    looks: Mapping[str, Look]
    configuration: Configuration
    recovering: Collection[str]
    current: Collection[str]
    lagging: Collection[str]
    now: float
    wall: float


class Coordinator:
    """The duties of one term."""

    def __init__(self, own: str, term: int, quiet: float, settings: Settings, now: float) -> None:
        self.term = term
        self.settled = False
        self.intake = Intake(term)
        self.grantor = Grantor(term, quiet, settings.drift, settings.margin, now)
        self._own = own
        self._settings = settings
        self._far: dict[str, float] = {}
        self._setting: dict[int, str] = {}
        self._looked = float("-inf")

    # The log.

    def append(self, proposals: Iterable[Proposal], view: View) -> list[Want]:
        """Take proposals of members into the log."""
        timely = (proposal for proposal in proposals if not self._too_early(proposal, view))
        payloads = self.intake.take(timely, view.state, view.wall)
        if not payloads:
            return []
        if self.intake.leaving():
            # Who leaves may be about to become a voter: no change of voters outlives this.
            return [raft.ChangeVoters(view.configuration.voters), raft.Propose(payloads)]
        return [raft.Propose(payloads)]

    def _too_early(self, proposal: Proposal, view: View) -> bool:
        """Whether a peer would leave while those that stay are no majority of the voters without it.

        Its proposer sends the proposal again, and by then the voters have been changed. So whatever set of
        voters is in the log, those that have not left can decide: two that leave at once strand nobody.
        """
        leaving = entries.removed_peers(proposal.entry)
        if not leaving:
            return False
        gone = _left(view.state) | self.intake.leaving() | leaving
        deciding = view.configuration.deciding
        return not self.settled or not view.configuration.quorum(deciding - gone)

    def decide(self, entry: Entry, view: View) -> tuple[int, list[Want]]:
        """Take a decision of this coordinator into the log."""
        number, payload = self.intake.decide(entry, view.state, view.wall)
        return number, [raft.Propose((payload,))]

    def applied(self, term: int, proposal: Proposal | None, look: Callable[[], View]) -> list[Want]:
        """A record was applied, whether it changed anything or not; `look()` gives the view after it."""
        number = self.intake.own_number(proposal) if proposal else None
        if number is not None:
            self.grantor.lift(number)
            self._setting.pop(number, None)
        decided = proposal.entry if proposal and number is not None else None
        if self.settled and isinstance(decided, FailOverGuest | MarkGuest):
            return self.members_changed(look())
        if self.settled or term != self.term:
            return []
        view = look()
        wants = self.members_changed(view)
        self.settled = True
        return [*wants, *self.grantor.settle(view.now), *self.look(view)]

    def dropped(self, payloads: Iterable[bytes]) -> None:
        """Raft has not appended these: leadership is about to move, or too much is under way."""
        for payload in payloads:
            proposal = self.intake.proposal_of(payload)
            number = self.intake.own_number(proposal) if proposal else None
            if number is not None:
                self.grantor.lift(number)
                self._setting.pop(number, None)

    def members_changed(self, view: View) -> list[Want]:
        """Members, their longest leases or open handovers are others now.

        A peer that has left gets no lease any more, but as long as a handover or a guest hangs on it, its
        last one must be waited for.
        """
        state = view.state
        hung = {
            peer
            for migration in state.migrations.values()
            if migration.state == "open"
            for peer in (migration.source, migration.destination)
        }
        left = _left(state)
        if left:
            owned = (guest for guest in state.guests.values() if guest.owner in left)
            hung |= {guest.owner for guest in owned if failover.concerns(state, guest)}
        leases = {
            member.id: member.lease
            for member in state.members.values()
            if member.id not in left or member.id in hung
        }
        gone = left & hung
        return [*self.grantor.members(leases, gone, view.now)]

    # Leases.

    def renew(self, peer: str, request: Renew) -> list[GrantorEffect]:
        return self.grantor.renew(peer, request)

    def woken(self, view: View) -> list[Want]:
        """The grantor's timer: who is lost, and what becomes of its guests."""
        wants: list[Want] = []
        for effect in self.grantor.woken(view.now):
            wants.append(effect)
            if isinstance(effect, PeerLost) and not self.grantor.barred(effect.peer):
                for entry in failover.fail_over(view.state, effect.peer, self._hosts(view)):
                    wants += self.fence(effect.peer, entry, view)
        return wants

    def fence(self, peer: str, entry: Entry, view: View) -> list[Want]:
        """Commit `entry` if the lease of `peer` is out now; until it is applied `peer` gets none."""
        if not self.grantor.out(peer, view.now):
            return []
        number, wants = self.decide(entry, view)
        self.grantor.bar(peer, number)
        return wants

    def _hosts(self, view: View) -> dict[str, failover.Host]:
        return {
            member.id: failover.Host(
                member, look.memory_free if (look := view.looks.get(member.id)) else None
            )
            for member in view.state.members.values()
            if self.grantor.holds(member.id, view.now)
        }

    # What is looked at every now and then.

    def look(self, view: View, timer: bool = False) -> list[Want]:
        """See to voters and leases; at most once per `PACE`. `timer`: the timer came, so set it again."""
        again: list[Want] = [WakeAt(TIMER, view.now + PACE)]
        if not self.settled:
            return again if timer else []
        if view.now < self._looked + PACE:
            return [WakeAt(TIMER, self._looked + PACE)] if timer else []
        self._looked = view.now
        return [*again, *self._set_leases(view), *self._see_to_voters(view)]

    def _see_to_voters(self, view: View) -> list[Want]:
        electorate = voters.Electorate(
            members=view.state.members,
            looks=view.looks,
            configuration=view.configuration,
            recovering=view.recovering,
            current=view.current,
            lagging=view.lagging,
            own=self._own,
            now=view.now,
            dead_after=self._settings.voter_dead_after,
        )
        step = None if self.intake.leaving() else voters.step(electorate)
        return [step] if step else []

    def _set_leases(self, view: View) -> list[Want]:
        """Allow every member the lease that fits its distance."""
        wants: list[Want] = []
        under_way = set(self._setting.values())
        for member in view.state.members.values():
            duration = self._wanted_lease(member, view)
            if member.status == "member" and member.lease < duration and member.id not in under_way:
                number, proposed = self.decide(SetLease(peer=member.id, duration=duration), view)
                self._setting[number] = member.id
                wants += proposed
        return wants

    def _wanted_lease(self, member: Member, view: View) -> float:
        look = view.looks.get(member.id)
        rtt = look.rtt if look and member.id != self._own else None
        if rtt is None or rtt <= self._settings.near:
            self._far.pop(member.id, None)
            return self._settings.lease
        since = self._far.setdefault(member.id, view.now)
        return self._settings.long_lease if view.now >= since + FAR_FOR else self._settings.lease


def _left(state: State) -> set[str]:
    """Who is no member any more."""
    return {member.id for member in state.members.values() if member.status != "member"}
