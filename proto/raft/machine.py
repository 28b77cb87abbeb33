# SPDX-License-Identifier: Apache-2.0
"""Raft: a few peers keep one log, whoever of them is alive.

The algorithm is that of Ongaro's thesis (*Consensus: bridging theory and practice*, 2014): one leader per
term, elected by a majority of the voters, appends records and sends them to the others; a record is committed
once a majority of the voters has it durably. This file takes events to the part they belong to and knows
when to wake up; the parts, each a file, are

* `replica.py`: the state that all share, and what of it is durable;
* `log.py`: the log in memory;
* `election.py`: asking for votes and giving them, and the promise that leases rely on;
* `following.py`, `assembly.py`: the side that a leader speaks to, and snapshots that come in parts;
* `replication.py`: a leader's term;
* `pace.py`: how much is under way to a peer at a time;
* `membership.py`: changing voters, and handing over;
* `reads.py`: linearizable reads;
* `feeding.py`: members without a vote;
* `recovery.py`: a replica that has forgotten what it promised.

`now` is CLOCK_BOOTTIME, which goes on while the host sleeps. The snapshot in `Stored` is taken as applied:
whoever starts the machine starts the state from it; the records up to `Stored.commit` come as `Commit`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

from proto.machine import Persisted, WakeAt, Woken
from proto.raft.assembly import Assembly
from proto.raft.configuration import Configuration
from proto.raft.election import Election
from proto.raft.events import (
    TIMER,
    Became,
    ChangeVoters,
    Compact,
    Contacts,
    Effect,
    Event,
    Propose,
    Read,
    Received,
    Role,
    Settings,
    Stored,
    TransferTo,
)
from proto.raft.feeding import Feeder, Observer
from proto.raft.following import Following
from proto.raft.membership import Membership
from proto.raft.messages import (
    Append,
    Appended,
    AskRead,
    AskVote,
    Feed,
    Follow,
    Lead,
    Readable,
    SnapshotPart,
    SnapshotTaken,
    Voted,
)
from proto.raft.reads import Reads
from proto.raft.recovery import Recovery
from proto.raft.replica import NEVER, Replica
from proto.raft.replication import Leadership


class Raft:
    """One replica, or observer, of the log. The first `handle(Woken(TIMER), now)` starts it."""

    def __init__(self, own: str, stored: Stored, settings: Settings, rng: random.Random) -> None:
        self._replica = Replica(own, stored, settings, rng)
        assembly = Assembly()
        self._election = Election(self._replica)
        self._following = Following(self._replica, assembly)
        self._feeder = Feeder(self._replica)
        self._observer = Observer(self._replica, assembly)
        self._reads = Reads(self._replica)
        self._recovery = Recovery(self._replica, self._reads)
        self._leadership: Leadership | None = None
        self._membership: Membership | None = None
        self._started = False
        self._became: tuple[Role, int, str] = (self._replica.role, self._replica.term, "")
        self._wake = NEVER
        self._dispatch: dict[type, Callable[[str, Any], None]] = {
            AskVote: self._ask_vote,
            Voted: self._voted,
            Append: self._following.append,
            Appended: self._appended,
            SnapshotPart: self._part,
            SnapshotTaken: self._taken,
            Lead: self._election.lead,
            AskRead: self._ask_read,
            Readable: self._reads.answered,
            Follow: self._feeder.follow,
            Feed: self._observer.feed,
        }

    # What is readable.

    @property
    def role(self) -> Role:
        return self._replica.role

    @property
    def term(self) -> int:
        return self._replica.term

    @property
    def leader(self) -> str:
        """The leader's id, "" if none is known."""
        return self._replica.leader

    @property
    def configuration(self) -> Configuration:
        """The newest one in the log, committed or not."""
        return self._replica.configuration

    @property
    def commit_index(self) -> int:
        return self._replica.commit

    @property
    def applied_index(self) -> int:
        """The last record handed out with `Commit`, or covered by the last `Restore`."""
        return self._replica.applied

    @property
    def first_index(self) -> int:
        """The first record that is in the log."""
        return self._replica.log.first_index

    @property
    def last_index(self) -> int:
        return self._replica.log.last_index

    @property
    def behind(self) -> bool:
        """Whether the next `Woken(TIMER)` brings a `Commit`, however soon it comes."""
        return self._replica.behind

    @property
    def recovering(self) -> bool:
        """Whether this replica has lost promises that it made."""
        return self._replica.recovering

    @property
    def heard(self) -> Mapping[str, float]:
        """When who was last heard: at the leader its replicas, elsewhere the leader."""
        if self._leadership:
            return {peer: progress.heard for peer, progress in self._leadership.progress.items()}
        return {self._replica.leader: self._replica.heard_append} if self._replica.leader else {}

    @property
    def recovering_replicas(self) -> frozenset[str]:
        """At the leader: replicas whose answers do not count (`recovery.py`)."""
        return self._leadership.recovering if self._leadership else frozenset()

    @property
    def current_replicas(self) -> frozenset[str]:
        """At the leader: replicas that live and have all that is committed."""
        leadership = self._leadership
        return frozenset(filter(leadership.caught_up, leadership.progress)) if leadership else frozenset()

    @property
    def lagging(self) -> frozenset[str]:
        """At the leader: peers that were to become voters not long ago and did not catch up."""
        return self._membership.lagging if self._membership else frozenset()

    # What happens.

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take an event in; gives what is to be done, in this order."""
        replica = self._replica
        replica.now = max(now, replica.now)
        out: list[Effect] = []
        replica.out = out
        if not self._started:
            self._start()
        match event:
            case Received(peer, message):
                handler = self._dispatch.get(type(message))
                if handler and peer != replica.own:
                    handler(peer, message)
            case Woken(timer):
                if timer == TIMER:
                    self._wake = NEVER
            case Persisted(key):
                if self._election.persisted(replica.persisted(key)):
                    self._begin_to_lead()
            case Propose(payloads):
                if self._leadership:
                    self._leadership.propose(payloads)
            case Read():
                self._reads.read(event, self._leadership)
            case ChangeVoters(voters):
                if self._membership:
                    self._membership.change_voters(voters)
            case TransferTo(peer):
                if self._membership:
                    self._membership.transfer_to(peer)
            case Compact(index, data, keep):
                replica.compact(index, data, keep)
            case Contacts(peers):
                self._observer.contacts(peers)
        self._settle()
        replica.out = []
        return out

    def _start(self) -> None:
        self._started = True
        self._replica.start()
        self._election.start()
        self._observer.start()

    def _settle(self) -> None:
        """What follows from the event, whatever it was."""
        replica = self._replica
        if self._leadership:
            self._settle_leader(self._leadership)
        else:
            self._election.tick()
        if not self._leadership:
            self._following.settle()
            self._observer.tick()
            self._recovery.settle()
        replica.hand_out()
        self._feeder.settle()
        self._reads.settle(self._leadership)
        replica.flush()
        self._tell_role()
        self._set_timer()

    def _settle_leader(self, leadership: Leadership) -> None:
        replica = self._replica
        if replica.role == "leader":
            due = replica.now >= leadership.next_heartbeat
            committed = leadership.commit()
            if self._membership and (committed or due or self._membership.busy):
                self._membership.step()
            if due and replica.role == "leader":
                self._heartbeat(leadership)
        if replica.role == "leader":
            leadership.replicate()
            return
        replica.heard_leader = max(replica.heard_leader, leadership.agreed_at)
        self._leadership = self._membership = None
        self._reads.step_down()

    def _heartbeat(self, leadership: Leadership) -> None:
        if (leadership.lost_quorum and not leadership.alone) or self._gives_way(leadership):
            self._replica.rest()
        else:
            leadership.begin_round()

    def _gives_way(self, leadership: Leadership) -> bool:
        """Hand over if the own disk fails and another's does not. True: that was in vain, step down."""
        election, lag = self._replica.settings.election, leadership.disk_lag()
        if lag <= election or leadership.blocked or not leadership.heir or not self._membership:
            return False
        if lag > 2 * election:
            return True
        self._membership.transfer_to(leadership.heir)
        return False

    def _begin_to_lead(self) -> None:
        replica = self._replica
        quiet = self._election.quiet
        self._leadership = Leadership(replica)
        self._membership = Membership(replica, self._leadership)
        self._became = (replica.role, replica.term, replica.leader)
        replica.out.append(Became(*self._became, quiet))

    def _tell_role(self) -> None:
        replica = self._replica
        if replica.role in ("follower", "observer"):
            replica.role = "follower" if replica.votes else "observer"
        now = (replica.role, replica.term, replica.leader)
        if now != self._became:
            self._became = now
            replica.out.append(Became(*now))

    def _set_timer(self) -> None:
        """Ask to be woken, unless a wake-up is under way that comes no later than what is due."""
        due = min(self._reads.due, self._feeder.due)
        if self._replica.behind:
            due = self._replica.now
        if self._leadership:
            due = min(due, self._leadership.next_heartbeat)
        else:
            due = min(due, self._election.due, self._observer.due, self._recovery.due)
        due = max(due, self._replica.now)
        if due != float("inf") and (self._wake == NEVER or due < self._wake):
            self._wake = due
            self._replica.out.append(WakeAt(TIMER, due))

    # Messages of which the shape alone does not tell where they belong.

    def _ask_vote(self, peer: str, message: AskVote) -> None:
        heard = self._replica.heard_leader
        if self._leadership:
            heard = self._leadership.agreed_at
        self._election.asked(peer, message, heard)

    def _voted(self, peer: str, message: Voted) -> None:
        if self._election.voted(peer, message):
            self._begin_to_lead()

    def _appended(self, peer: str, message: Appended) -> None:
        if self._leads_for(peer, message.term) and self._leadership:
            self._leadership.appended(peer, message)

    def _part(self, peer: str, message: SnapshotPart) -> None:
        if message.round:
            self._following.part(peer, message)
        else:
            self._observer.part(peer, message)

    def _taken(self, peer: str, message: SnapshotTaken) -> None:
        if not message.round:
            self._feeder.taken(peer, message)
        elif self._leads_for(peer, message.term) and self._leadership:
            self._leadership.taken(peer, message)

    def _leads_for(self, peer: str, term: int) -> bool:
        """Whether a replica's answer is to this leader. A replica in a newer term ends this one."""
        replica = self._replica
        if not self._leadership or peer not in self._leadership.progress:
            return False
        if term > replica.term:
            replica.adopt(term)
        return term == replica.term and replica.role == "leader"

    def _ask_read(self, peer: str, message: AskRead) -> None:
        self._reads.asked(peer, message, self._leadership)
