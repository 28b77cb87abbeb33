# SPDX-License-Identifier: Apache-2.0
"""The leader's changes: of the voters, and of who leads.

A change of voters is a walk through configurations, each committed before the next is appended: the newcomers
as learners, until they have caught up (a voter that is behind can only delay); the joint configuration; the
new one. Whoever leads while a joint configuration is committed takes the last step, so a change that got so
far is finished even if the leader that began it dies. A leader that is not in the new configuration hands
over when that is committed.

A transfer stops taking proposals once the chosen voter has all that is committed, waits until it has the
whole log, and tells it to campaign at once. From that message on the leader's lease is void, since the voters
will not wait for silence.
"""

from __future__ import annotations

from dataclasses import dataclass

from proto.raft.configuration import Configuration
from proto.raft.messages import Lead
from proto.raft.replica import Replica
from proto.raft.replication import Leadership

PATIENCE = 10
"""A newcomer that has not caught up after so many `election`s is given up."""

REST = 60
"""For so many `election`s it is better not tried again."""


@dataclass(slots=True)
class _Change:
    target: frozenset[str]
    until: float


@dataclass(slots=True)
class _Transfer:
    target: str
    until: float
    told: float | None = None


class Membership:
    """The changes under way in one leader's term."""

    def __init__(self, replica: Replica, leadership: Leadership) -> None:
        self._replica = replica
        self._leadership = leadership
        self._change: _Change | None = None
        self._transfer: _Transfer | None = None
        self._given_up: dict[str, float] = {}

    @property
    def lagging(self) -> frozenset[str]:
        """Newcomers that did not catch up when they were tried not long ago."""
        return frozenset(peer for peer, until in self._given_up.items() if self._replica.now < until)

    @property
    def busy(self) -> bool:
        return self._change is not None or self._transfer is not None

    def change_voters(self, voters: frozenset[str]) -> None:
        """Make these the voters; a change to others is given up for it unless it is joint already.

        The present voters are a target too: then nobody is waited for any more.
        """
        if not voters or self._replica.configuration.joint:
            return
        if self._change is None or self._change.target != voters:
            self._change = _Change(voters, self._replica.now + PATIENCE * self._replica.settings.election)

    def transfer_to(self, peer: str) -> None:
        """Hand over to this voter; a transfer to another one is given up for it."""
        replica = self._replica
        if peer in replica.configuration.voters and peer != replica.own:
            self._transfer = _Transfer(peer, replica.now + replica.settings.election)
            self._leadership.blocked = False

    def step(self) -> None:
        """Take the next step, if it is time to."""
        if self._transfer:
            self._step_transfer(self._transfer)
        replica, leadership = self._replica, self._leadership
        if replica.log.configuration_index > replica.commit or not leadership.settled:
            return
        if len(leadership.progress) >= len(replica.configuration.replicas):
            leadership.forget_removed()
        configuration = replica.configuration
        if configuration.joint:
            leadership.change(Configuration(voters=configuration.voters))
        elif replica.own not in configuration.voters:
            self._leave()
        elif self._change:
            self._step_change(self._change, configuration)

    def _step_change(self, change: _Change, now: Configuration) -> None:
        newcomers = change.target - now.voters
        # A newcomer that has lost its log recovers as a learner; a voter cannot, and must go first.
        lost = not self._leadership.recovering.isdisjoint(change.target & now.voters)
        if self._replica.now > change.until or lost:
            self._change = None
            late = (peer for peer in newcomers if not self._leadership.caught_up(peer))
            again = self._replica.now + REST * self._replica.settings.election
            self._given_up |= dict.fromkeys(late, again)
            if now.learners:
                self._leadership.change(Configuration(voters=now.voters))
        elif now.learners != newcomers:
            self._leadership.change(Configuration(voters=now.voters, learners=newcomers))
        elif all(self._leadership.caught_up(peer) for peer in newcomers):
            self._change = None
            if change.target != now.voters:
                self._leadership.change(Configuration(voters=change.target, outgoing=now.voters))

    def _leave(self) -> None:
        """Not a voter any more: the best of those who are shall lead."""
        replica, leadership = self._replica, self._leadership
        voters = replica.configuration.voters & leadership.progress.keys()
        best = max(sorted(voters), key=lambda peer: leadership.progress[peer].match)
        leadership.handed_over = True
        replica.send(best, Lead(replica.term))
        replica.rest()

    def _step_transfer(self, transfer: _Transfer) -> None:
        replica, leadership = self._replica, self._leadership
        progress = leadership.progress.get(transfer.target)
        if replica.now > transfer.until or progress is None or progress.recovering:
            self._transfer, leadership.blocked = None, False
            return
        # Proposals wait only for one that keeps up.
        leadership.blocked |= leadership.caught_up(transfer.target)
        again = transfer.told is None or replica.now - transfer.told >= replica.settings.heartbeat
        if progress.match == replica.log.last_index and again:
            transfer.told = replica.now
            leadership.handed_over = True
            replica.send(transfer.target, Lead(replica.term))
