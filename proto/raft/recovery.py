# SPDX-License-Identifier: Apache-2.0
"""A replica that has forgotten what it promised, and how it comes to be believed again.

A voter whose log was damaged or lost may have acknowledged records and given votes of which it knows nothing
any more. Until this is mended it never votes nor campaigns, and says `recovering` in its answers, so that the
leader counts it for nothing. It is *demoted* by a change of voters, catches up, and is then believed again.

It may believe itself once it has applied all that was committed before a question which it asked *after* its
loss (a linearizable read, answered by a quorum), and the configuration committed by then gives it no vote.
Why that is enough: a record that was committed with the help of a lost acknowledgement is with the others of
that quorum, and any quorum without this replica has one of them; since it does not vote, every leader after
the loss has the record. If the configuration at the answer was committed after the loss, it took a quorum
without this replica, whose members refuse older terms from then on; a lost vote counts for nobody whose log
has that configuration, and nobody else can be elected. If it was committed before the loss, then whatever
was promised belonged to a joint configuration not committed by then, in which the outgoing voters, without
this replica, must agree to everything, and the same argument holds for their part of the quorum.
A stale message cannot stand in for the answer, since the question's cookie is drawn anew in every life.
"""

from __future__ import annotations

from proto.raft.reads import Reads
from proto.raft.replica import NEVER, Replica


class Recovery:
    """Watches for the moment when this replica may be believed again."""

    def __init__(self, replica: Replica, reads: Reads) -> None:
        self._replica = replica
        self._reads = reads
        self._asked_at = NEVER
        self._over = False

    @property
    def due(self) -> float:
        """When to ask again."""
        if not self._replica.recovering or self._over or self._reads.recovery is False:
            return float("inf")
        return self._asked_at + self._replica.settings.election if self._can_ask() else float("inf")

    def settle(self) -> None:
        """Ask if it is time to; end the recovery if the answer is applied."""
        replica = self._replica
        if not replica.recovering or self._over:
            return
        if self._reads.recovery:
            self._reads.recovery = None
            if not self._has_vote():
                self._over = True
                replica.end_recovery()
                return
        if self._reads.recovery is None and replica.now >= self.due:
            self._asked_at = replica.now
            self._reads.ask_for_recovery()

    def _can_ask(self) -> bool:
        replica = self._replica
        return bool(replica.leader and replica.configuration.voters) and not self._has_vote()

    def _has_vote(self) -> bool:
        """By the configuration that is committed, or by the newest one."""
        log = self._replica.log
        deciding = log.configuration_at(self._replica.commit).deciding | log.configuration.deciding
        return self._replica.own in deciding
