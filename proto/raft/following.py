# SPDX-License-Identifier: Apache-2.0
"""The side that a leader speaks to: records go into the log, and are acknowledged once they are durable.

An acknowledgement says two things: up to which index the log here is durable and the leader's, and that the
leader's round was heard. The first must wait for the disk, the second must not, or a slow disk would cost
the leader its lease. So a new round is answered at once with what is durable by then, and the progress of the
disk is told when it happens; both may be one message.
"""

from __future__ import annotations

from proto.raft.assembly import Assembly
from proto.raft.messages import Append, Appended, SnapshotPart, SnapshotTaken
from proto.raft.replica import Replica


class Following:
    """What a replica owes the leader of its term."""

    def __init__(self, replica: Replica, assembly: Assembly) -> None:
        self._replica = replica
        self._assembly = assembly
        self._term = 0
        self._round = self._told_round = 0
        self._told = 0

    def append(self, peer: str, message: Append) -> None:
        """Records or a heartbeat of whoever says that it leads."""
        if not self._accept(peer, message.term, message.round):
            return
        replica = self._replica
        taken = replica.take(message.prev_index, message.prev_term, message.records)
        if taken is None:
            return
        if not taken:
            self._refuse(peer, message)
            return
        end = message.prev_index + len(message.records)
        replica.matched = max(replica.matched, end)
        replica.commit_to(min(message.commit, end))
        repeated = bool(message.records) and end <= replica.stable
        if repeated or message.round > self._told_round:
            self._acknowledge(peer)

    def part(self, peer: str, message: SnapshotPart) -> None:
        """A piece of the leader's snapshot."""
        if not self._accept(peer, message.term, message.round):
            return
        replica = self._replica
        received, snapshot = self._assembly.add(peer, message, replica.commit)
        if snapshot is not None:
            replica.install(snapshot)
            replica.matched = max(replica.matched, snapshot.index)
        if received is not None:
            replica.answer(peer, SnapshotTaken(replica.term, message.index, received, message.round))

    def settle(self) -> None:
        """Tell the leader what the disk has done since the last time."""
        replica = self._replica
        if replica.leader and self._term == replica.term and replica.role != "leader":
            durable = min(replica.matched, replica.stable)
            if durable > self._told:
                self._acknowledge(replica.leader)

    def _accept(self, peer: str, term: int, number: int) -> bool:
        """Whether this is the leader of the own term, which then has been heard."""
        replica = self._replica
        if term < replica.term:
            # A leader that does not know of this term would never be followed here again: tell it.
            replica.answer(peer, Appended(replica.term, False, 0, 0, recovering=replica.recovering))
            return False
        if term == replica.term and (replica.role == "leader" or replica.leader not in ("", peer)):
            return False
        if term > replica.term:
            replica.adopt(term)
        if self._term != term:
            self._term, self._round, self._told_round, self._told = term, 0, 0, 0
        replica.rest(peer)
        replica.heard_leader = replica.heard_append = replica.now
        self._round = max(self._round, number)
        return True

    def _refuse(self, peer: str, message: Append) -> None:
        """Say where the logs may still agree: skip, in one step, every term that the leader cannot have."""
        replica = self._replica
        index = replica.log.last_not_after(message.prev_index, message.prev_term)
        hint_term = replica.log.term_at(index) or 0
        self._told_round = max(self._told_round, message.round)
        replica.answer(
            peer, Appended(replica.term, False, index, message.round, hint_term, replica.recovering)
        )

    def _acknowledge(self, peer: str) -> None:
        replica = self._replica
        self._told = min(replica.matched, replica.stable)
        self._told_round = self._round
        replica.answer(
            peer, Appended(replica.term, True, self._told, self._round, recovering=replica.recovering)
        )
