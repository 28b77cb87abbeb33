# SPDX-License-Identifier: Apache-2.0
"""Elections: who asks for votes when, and who gets them.

A voter that hears no leader for its timeout first asks whether it *would* be elected (pre-vote), which
changes nothing anywhere; so a peer that was cut off, or removed, does not disturb those who can work. Only
with a majority's yes it enters a new term and asks for real. A vote goes to one candidate per term whose log
is not behind the voter's, and, unless the old leader itself handed over, to nobody as long as a leader was
heard less than `election` ago, nor within `election` of the voter's own start, since before that start it may
have heard one. Leases stand on that rule.

**The promise `quiet`.** Let N be elected, not by a hand-over, at time t, and let L be any leader of an
earlier term that had a quorum answer a round. That quorum and N's have a voter v in common (with joint
configurations too: two configurations that can both decide at a time overlap). v did not answer L after its
vote for N, being in N's term; and when it voted it had not heard L for `election` by its own clock: neither
as a follower, nor in an earlier life (the rule about starts), nor as L itself, since a leader counts as
having heard itself when it began the last round that a quorum answered. So that round was begun at least
`election` of v's clock before v's vote, and the vote was given before t. N's clock may run slower than v's by
`drift`; hence no round begun later than t - election·(1 - drift) by N's clock was ever answered by a quorum.
After a hand-over the voters need not have been silent, so the promise is 0 (the old leader stops using its
own lease before it hands over); so it is for a sole voter, which elects itself at once after a start.
"""

from __future__ import annotations

from proto.raft.messages import AskVote, Lead, Voted
from proto.raft.replica import NEVER, Replica

SPREAD = 0.3
"""The timeout is spread over this part of `election`, so that not all campaign at once."""

RETRY = 0.5
"""A candidate tries again after this part of `election`, and some of the spread."""


class Election:
    """The votes asked for and given by one replica."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._granted: set[str] = set()
        self._pre = False
        self._forced = False
        self._write = 0
        self._started = self._since = NEVER
        self._jitter = 0.0

    @property
    def quiet(self) -> float:
        """The promise above, of the election just won."""
        replica = self._replica
        if self._forced or self._alone:
            return 0.0
        return replica.settings.election * (1 - replica.settings.drift)

    @property
    def due(self) -> float:
        """When to campaign, if nothing happens before."""
        replica = self._replica
        if not replica.votes or replica.role == "leader":
            return float("inf")
        election = replica.settings.election
        if replica.role == "candidate":
            again = self._since + election * (RETRY + self._jitter)
            return max(again, max(replica.heard_leader, self._started) + election)
        if self._alone:
            return replica.heard_leader + election
        return max(self._since, replica.heard_leader) + election * (1 + self._jitter)

    @property
    def _alone(self) -> bool:
        return self._replica.configuration.deciding == {self._replica.own}

    def start(self) -> None:
        self._started = self._replica.now
        self._postpone()

    def tick(self) -> bool:
        """Campaign if it is time to. True: elected."""
        return self._replica.now >= self.due and self._campaign(pre=not self._alone, forced=False)

    def lead(self, peer: str, message: Lead) -> bool:
        """The leader hands over. True: elected."""
        replica = self._replica
        if message.term != replica.term or replica.role != "follower" or replica.leader != peer:
            return False
        return replica.votes and self._campaign(pre=False, forced=True)

    def persisted(self, number: int) -> bool:
        """A write is durable; if it was the own vote, it counts now, and others are asked. True: elected."""
        if self._replica.role != "candidate" or self._pre or not self._write or number < self._write:
            return False
        self._write = 0
        return self._ask()

    def asked(self, peer: str, message: AskVote, heard: float) -> None:
        """A candidate asks; `heard` is when a leader was last heard, or led here with a quorum."""
        replica = self._replica
        patience = replica.settings.election
        sticky = replica.now < max(heard, self._started) + patience
        if replica.recovering or message.term < replica.term or (sticky and not message.forced):
            replica.answer(peer, Voted(replica.term, False, message.pre))
            return
        log = replica.log
        grant = (message.last_term, message.last_index) >= (log.last_term, log.last_index)
        if message.pre:
            grant = grant and message.term > replica.term
            replica.answer(peer, Voted(message.term if grant else replica.term, grant, True))
            return
        if message.term > replica.term:
            if not grant and peer not in replica.configuration.deciding:
                return
            replica.adopt(message.term, peer if grant else "")
        elif replica.ballot.voted != peer:
            grant = grant and not replica.ballot.voted and not replica.leader
            if grant:
                replica.adopt(message.term, peer)
        if grant:
            self._postpone()
        replica.answer(peer, Voted(replica.term, grant))

    def voted(self, peer: str, message: Voted) -> bool:
        """An answer. True: elected."""
        replica = self._replica
        if replica.role != "candidate" or peer not in replica.configuration.deciding:
            return False
        if not message.granted:
            if message.term > replica.term:
                replica.adopt(message.term)
            return False
        asked = replica.term + 1 if self._pre else replica.term
        if message.pre != self._pre or message.term != asked or self._write:
            return False
        self._granted.add(peer)
        return self._count()

    def _campaign(self, pre: bool, forced: bool) -> bool:
        replica = self._replica
        self._pre, self._forced = pre, forced
        self._granted.clear()
        self._write = 0
        if not pre:
            self._write = replica.adopt(replica.term + 1, replica.own)
        replica.become("candidate", "")
        self._postpone()
        return pre and self._ask()

    def _ask(self) -> bool:
        replica, log = self._replica, self._replica.log
        term = replica.term + 1 if self._pre else replica.term
        message = AskVote(term, log.last_index, log.last_term, self._pre, self._forced)
        for peer in sorted(replica.configuration.deciding - {replica.own}):
            replica.send(peer, message)
        self._granted.add(replica.own)
        return self._count()

    def _count(self) -> bool:
        replica = self._replica
        if not replica.configuration.quorum(self._granted):
            return False
        if self._pre:
            return self._campaign(pre=False, forced=False)
        replica.become("leader", replica.own)
        return True

    def _postpone(self) -> None:
        """Wait anew."""
        self._since = self._replica.now
        self._jitter = SPREAD * self._replica.rng.random()
