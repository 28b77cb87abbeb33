# SPDX-License-Identifier: Apache-2.0
"""Elections: who asks for votes when, and who gets them.

A voter that hears no leader for its timeout first asks whether it *would* be elected (pre-vote), which
changes nothing anywhere; so a peer that was cut off, or removed, does not disturb those who can work. Only
with a majority's yes it enters a new term and asks for real. A vote goes to one candidate per term whose log
is not behind the voter's, and, unless the old leader itself handed over, to nobody as long as a leader was
heard less than `election` ago, nor within `election` of the voter's own start, since before that start it may
have heard one. Leases stand on that rule.

**Slow disks.** A vote counts once it is durable, the candidate's own one too, and writes are in order. So who
still has something to write neither campaigns nor says that it would vote: its ballot would have to wait.
Patience begins when a vote is durable, the own or one given to another. Votes for the own term count however
late they come, also while the candidate already asks whether it would be elected in the next one; that one is
entered only with the yes of a majority who have nothing to write, so whose votes in this one have been sent.
The pause before that question doubles, up to a bound, with each candidacy in a row that brought no leader.

**The promise `quiet`.** Let N be elected, not by a hand-over, at time t, and let L be any leader of an
earlier term that had a quorum answer a round. That quorum and N's have a voter v in common (with joint
configurations too: two configurations that can both decide at a time overlap). v did not answer L after its
vote for N, being in N's term; and when it voted it had not heard L for `election` by its own clock: neither
as a follower, nor in an earlier life (the rule about starts), nor as L itself, since a leader counts as
having heard itself when it began the last round that a quorum answered. So that round was begun at least
`election` of v's clock before v's vote, and the vote was given before t, maybe long before. N's clock may run
slower than v's by `drift`; hence no round begun later than t - election·(1 - drift) by N's clock was ever
answered by a quorum.
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

DOUBLED = 4
"""At most so much longer after campaigns in a row that failed."""


class Election:
    """The votes asked for and given by one replica."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._pre = False
        self._willing: set[str] = set()
        """Who would vote for this replica in the next term, while it asks for that (`_pre`)."""
        self._stood = 0
        """The last term in which this replica was a candidate in this life."""
        self._voters: set[str] = set()
        """Who voted for it then."""
        self._forced = False
        """Whether the leader before that one handed over."""
        self._write = 0
        """The write that makes the newest vote durable, own or given; 0: it is."""
        self._started = self._since = self._stood_at = NEVER
        self._failed = 0
        """Terms in a row, before `_stood`, in which it was a candidate and then heard no leader."""
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
        if not replica.votes or replica.role == "leader" or replica.writing:
            return float("inf")
        election = replica.settings.election
        if replica.role == "candidate":
            longer = 1 if self._pre else min(2**self._failed, DOUBLED)
            again = self._since + election * (RETRY + self._jitter) * longer
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

    def tick(self) -> None:
        """Campaign if it is time to."""
        if self._replica.now < self.due:
            return
        if self._alone:
            self._stand(forced=False)
        else:
            self._ask_whether()

    def lead(self, peer: str, message: Lead) -> None:
        """The leader hands over."""
        replica = self._replica
        handed = message.term == replica.term and replica.role == "follower" and replica.leader == peer
        if handed and replica.votes:
            self._stand(forced=True)

    def persisted(self, number: int) -> bool:
        """A write is durable; if it was the own vote, it counts now, and others are asked. True: elected."""
        replica = self._replica
        if not self._write or number < self._write:
            return False
        self._write = 0
        self._postpone()
        if replica.role != "candidate" or self._stood != replica.term:
            return False
        self._ask(replica.term)
        return self._vote(replica.own)

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
            grant = grant and message.term > replica.term and not replica.writing
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
            self._write = replica.ballot_write
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
        if message.pre and self._pre and message.term == replica.term + 1:
            self._would_vote(peer)
        elif not message.pre and message.term == replica.term == self._stood:
            return self._vote(peer)
        return False

    def _ask_whether(self) -> None:
        """Ask who would vote for this replica in the next term."""
        self._pre = True
        self._willing.clear()
        self._replica.become("candidate", "")
        self._postpone()
        self._ask(self._replica.term + 1)
        self._would_vote(self._replica.own)

    def _would_vote(self, peer: str) -> None:
        self._willing.add(peer)
        if self._replica.configuration.quorum(self._willing):
            self._stand(forced=False)

    def _stand(self, forced: bool) -> None:
        """Be a candidate in the next term; others are asked when the own vote is durable."""
        replica = self._replica
        self._failed = self._failed + 1 if self._stood_at > replica.heard_leader else 0
        replica.adopt(replica.term + 1, replica.own)
        replica.become("candidate", "")
        self._pre, self._forced = False, forced
        self._stood, self._stood_at = replica.term, replica.now
        self._write = replica.ballot_write
        self._voters.clear()

    def _ask(self, term: int) -> None:
        replica, log = self._replica, self._replica.log
        forced = self._forced and not self._pre
        message = AskVote(term, log.last_index, log.last_term, self._pre, forced)
        for peer in sorted(replica.configuration.deciding - {replica.own}):
            replica.send(peer, message)

    def _vote(self, peer: str) -> bool:
        self._voters.add(peer)
        if not self._replica.configuration.quorum(self._voters):
            return False
        self._replica.become("leader", self._replica.own)
        return True

    def _postpone(self) -> None:
        """Wait anew."""
        self._since = self._replica.now
        self._jitter = SPREAD * self._replica.rng.random()
