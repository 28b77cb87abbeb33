# SPDX-License-Identifier: Apache-2.0
"""A leader's term: how its log gets to the replicas, what is committed, and how long nobody else can lead.

For each replica the leader knows how far the logs are equal (`match`) and what to send next. It begins by
*probing*, one append at a time, until the place is found where the logs agree; then it *replicates*: appends
leave without waiting for answers, up to a window, while a refusal (something was lost) goes back to probing.
A replica that needs records which are compacted away gets the *snapshot* in parts first.

Heartbeats go the same way as all that, and in order. Their answers, which wait for no disk, tell two things:
how long what is under way takes, so that on a slow way there is less of it (`pace.py`); and, since a
heartbeat sent after a part is answered after it, that a part is lost which by then is not said to be there.
So nothing is sent twice only because it is slow, and no time must be guessed after which it is.

Every heartbeat begins a *round*, and its number comes back with the answers. The newest round that a quorum
has answered tells since when nobody else can have been elected: check-quorum (no such round for `election`:
step down), the lease for reads, and fresh reads all come from it. It counts from when the round began.

A quorum commits without the leader's own disk, but nothing is applied here before it is durable here too, and
so no read, and no peer's lease, gets on. A leader that has lacked a committed record for `election` therefore
makes room for a voter that has it (`disk_lag`, `heir`): first by a hand-over, for which its disk is not
needed, then by stepping down. A sole voter has no heir.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from proto.log import Record, RecordKind
from proto.raft.configuration import Configuration, encode
from proto.raft.events import Snapshot
from proto.raft.log import RECORD_COST
from proto.raft.messages import Append, Appended, SnapshotPart, SnapshotTaken
from proto.raft.pace import FLOOR, Pace
from proto.raft.replica import NEVER, Replica

PARTS = 4
"""Parts of a snapshot under way to one replica, at most."""

LEAST = 16
"""The smallest window in bytes is the largest append divided by this."""

UNCOMMITTED = 64 << 20
"""Bytes of proposals that wait to be committed; more are not taken."""


@dataclass(slots=True)
class Progress:
    """What the leader knows of one replica."""

    next: int
    pace: Pace
    match: int = 0
    state: Literal["probe", "replicate", "snapshot"] = "probe"
    asked: bool = False
    """While probing: an append is under way, the only one of `inflight`."""
    inflight: deque[tuple[int, int]] = field(default_factory=deque)
    """The last index of each append under way, and its bytes."""
    under_way: int = 0
    """Bytes of all of them."""
    told_commit: int = 0
    round: int = 0
    heard: float = NEVER
    recovering: bool = False
    snapshot: Snapshot | None = None
    taken: int = 0
    """Bytes of the snapshot that the replica has."""
    sent: int = 0
    sent_in: int = 0
    """The round in which the last part was sent."""
    taken_in: int = 0
    """The round in which the part was sent whose answer told `taken`."""

    def forget_inflight(self) -> None:
        """What is under way is lost, or of no use."""
        self.inflight.clear()
        self.under_way = 0


class Leadership:
    """One term at the head of the log."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self.began_at = replica.log.last_index + 1
        """Index of the term's noop."""
        self.progress: dict[str, Progress] = {}
        self.round = 0
        self.agreed_round = 0
        """The newest round that a quorum has answered."""
        self.agreed_at = replica.now
        """When that round began."""
        self.next_heartbeat = replica.now
        self.handed_over = False
        """Another peer was told to campaign at once: the lease is worth nothing any more in this term."""
        self.blocked = False
        """Proposals are not taken: leadership is about to move."""
        self._lacked = 0
        self._lacked_since = replica.now
        """When the record at this index was committed, which was not durable here at the last look."""
        self._rounds: deque[tuple[int, float]] = deque()
        self._uncommitted = 0
        self.append("noop", (b"",))
        self.follow_configuration()

    # What is known.

    @property
    def settled(self) -> bool:
        """Whether the noop is committed: only then all that was ever committed is known to be."""
        return self._replica.commit >= self.began_at

    @property
    def lease_until(self) -> float:
        """Until when (own clock) no other leader can be, so that what is committed here is all there is."""
        replica = self._replica
        if self.handed_over or not self.settled or replica.own not in replica.configuration.voters:
            return NEVER
        if replica.configuration.deciding == {replica.own}:
            return float("inf")
        if not self.agreed_round:
            return NEVER
        return self.agreed_at + replica.settings.election * (1 - replica.settings.drift)

    @property
    def alone(self) -> bool:
        return self._replica.configuration.quorum((self._replica.own,))

    @property
    def lost_quorum(self) -> bool:
        return self._replica.now - self.agreed_at > self._replica.settings.election

    def disk_lag(self) -> float:
        """For how long the own disk has lacked what was committed then; to be asked at every heartbeat."""
        replica = self._replica
        if replica.stable >= self._lacked:
            self._lacked, self._lacked_since = replica.commit, replica.now
        return replica.now - self._lacked_since

    @property
    def heir(self) -> str:
        """The best voter that could lead instead; "" if there is none."""
        voters = sorted(self._replica.configuration.voters & self.progress.keys())
        fit = [peer for peer in voters if self.caught_up(peer)]
        return max(fit, key=lambda peer: self.progress[peer].match, default="")

    @property
    def recovering(self) -> frozenset[str]:
        """Replicas whose answers do not count (`recovery.py`)."""
        return frozenset(peer for peer, found in self.progress.items() if found.recovering)

    def caught_up(self, peer: str) -> bool:
        """Whether this replica has what is committed, and lives."""
        found = self.progress.get(peer)
        if found is None or found.recovering:
            return False
        alive = self._replica.now - found.heard <= self._replica.settings.election
        return alive and found.match >= self._replica.commit

    # The log.

    def propose(self, payloads: tuple[bytes, ...]) -> None:
        """Append commands, unless leadership is about to move or too much waits already."""
        size = sum(map(len, payloads))
        if (
            payloads
            and not self.blocked
            and (not self._uncommitted or self._uncommitted + size <= UNCOMMITTED)
        ):
            self._uncommitted += size
            self.append("command", payloads)

    def change(self, configuration: Configuration) -> None:
        """Append a configuration; it holds at once."""
        self.append("config", (encode(configuration),))
        self.follow_configuration()

    def append(self, kind: RecordKind, payloads: tuple[bytes, ...]) -> None:
        replica = self._replica
        first, term = replica.log.last_index + 1, replica.term
        replica.append(
            tuple(Record(term, index, payload, kind) for index, payload in enumerate(payloads, first))
        )

    def follow_configuration(self) -> None:
        """Know the replicas of the newest configuration; the others are kept until `forget_removed`."""
        replica = self._replica
        for peer in sorted(replica.configuration.replicas - self.progress.keys() - {replica.own}):
            settings = replica.settings
            most = max(settings.inflight * settings.append_bytes, PARTS * settings.part_bytes)
            pace = Pace(max(FLOOR, settings.append_bytes // LEAST), most, settings.election, small=True)
            self.progress[peer] = Progress(replica.log.last_index + 1, pace)
        self._count_rounds()

    def forget_removed(self) -> None:
        """The configuration is committed: peers that it does not name are told so a last time."""
        for peer in sorted(self.progress.keys() - self._replica.configuration.replicas):
            self._replicate(peer, self.progress.pop(peer))

    def commit(self) -> bool:
        """Commit what a quorum has made durable, if it is of this term. True: something is."""
        replica = self._replica
        configuration = replica.configuration
        index = self._majority_has(configuration.voters)
        if configuration.joint:
            index = min(index, self._majority_has(configuration.outgoing))
        if index <= replica.commit or replica.log.term_at(index) != replica.term:
            return False
        if self._uncommitted:
            done = replica.log.slice(max(replica.commit + 1, self.began_at), index)
            self._uncommitted -= sum(len(record.payload) for record in done if record.kind == "command")
        replica.commit_to(index)
        return True

    def _majority_has(self, voters: frozenset[str]) -> int:
        own, stable, progress = self._replica.own, self._replica.stable, self.progress
        matches = sorted((stable if peer == own else progress[peer].match) for peer in voters)
        return matches[(len(matches) - 1) // 2]

    # Rounds.

    def begin_round(self) -> None:
        """A heartbeat to every replica."""
        replica = self._replica
        self.round += 1
        self._rounds.append((self.round, replica.now))
        self.next_heartbeat = replica.now + replica.settings.heartbeat
        for peer, progress in self.progress.items():
            progress.pace.sent(self.round, replica.now)
            self._heartbeat(peer, progress)
        self._count_rounds()

    def _count_rounds(self) -> None:
        replica = self._replica
        configuration = replica.configuration
        agreed = self._majority_answered(configuration.voters)
        if configuration.joint:
            agreed = min(agreed, self._majority_answered(configuration.outgoing))
        self.agreed_round = agreed
        while self._rounds and self._rounds[0][0] <= agreed:
            self.agreed_at = max(self.agreed_at, self._rounds.popleft()[1])

    def _majority_answered(self, voters: frozenset[str]) -> int:
        own, progress = self._replica.own, self.progress
        rounds = sorted((self.round if peer == own else progress[peer].round) for peer in voters)
        return rounds[(len(rounds) - 1) // 2]

    # What replicas answer.

    def appended(self, peer: str, message: Appended) -> None:
        """An answer to an append or heartbeat of this term."""
        progress = self.progress.get(peer)
        last = self._replica.log.last_index
        if progress is None or message.round > self.round or message.index > last:
            return
        progress.heard = self._replica.now
        if message.recovering and not progress.recovering:
            progress.match, progress.round = 0, 0
        progress.recovering = message.recovering
        if not message.recovering and message.round > progress.round:
            progress.round = message.round
            self._count_rounds()
        if message.ok:
            self._matched(progress, message.index)
        elif progress.state != "snapshot":
            self._refused(progress, message)
        progress.pace.answered(message.round, self._replica.now)
        if message.round > progress.sent_in:
            progress.sent = progress.taken  # what is beyond that was lost
        self._replicate(peer, progress)

    def _matched(self, progress: Progress, index: int) -> None:
        if progress.recovering:
            progress.next = max(progress.next, index + 1)
        elif index > progress.match:
            progress.match = index
            progress.next = max(progress.next, index + 1)
        while progress.inflight and progress.inflight[0][0] <= index:
            size = progress.inflight.popleft()[1]
            progress.under_way -= size
            progress.pace.arrived(size)
        if progress.state == "probe" and progress.inflight:
            progress.next = max(progress.next, progress.inflight[-1][0] + 1)
        if progress.state == "probe" or (progress.snapshot and progress.snapshot.index <= index):
            progress.state, progress.snapshot = "replicate", None

    def _refused(self, progress: Progress, message: Appended) -> None:
        log = self._replica.log
        if message.index < progress.match:
            return
        place = log.last_not_after(message.index, message.hint_term)
        if message.index < log.base_index or (place == log.base_index and log.base_term > message.hint_term):
            place = log.base_index - 1  # not in the log any more: the snapshot must do
        place = max(place, progress.match) + 1
        if progress.state == "probe" and progress.asked and place >= progress.next:
            return
        progress.state, progress.asked, progress.next = "probe", False, place
        progress.forget_inflight()
        progress.pace.restart()

    def taken(self, peer: str, message: SnapshotTaken) -> None:
        """A replica has got parts of the snapshot."""
        progress = self.progress.get(peer)
        if progress is None or progress.snapshot is None or progress.snapshot.index != message.index:
            return
        progress.heard = self._replica.now
        size = len(progress.snapshot.data)
        if message.received >= size:
            progress.state, progress.asked = "probe", False
            progress.next = max(progress.next, progress.snapshot.index + 1)
            progress.snapshot = None
        elif message.received != progress.taken:
            self._moved(progress, message)
        self._replicate(peer, progress)

    def _moved(self, progress: Progress, message: SnapshotTaken) -> None:
        """More of the snapshot has arrived, or what had is lost. Only the answer to a later part may say
        that: one that comes late would begin all that follows once more, and so would what follows."""
        received = max(0, message.received)
        if received > progress.taken:
            progress.pace.arrived(received - progress.taken)
            progress.taken, progress.sent = received, max(progress.sent, received)
            progress.taken_in = max(progress.taken_in, message.round)
        elif message.round > progress.taken_in:
            progress.taken = progress.sent = received
            progress.taken_in = message.round

    # Sending.

    def replicate(self) -> None:
        """Send each replica what it lacks, as far as its window allows."""
        for peer, progress in self.progress.items():
            self._replicate(peer, progress)

    def _replicate(self, peer: str, progress: Progress) -> None:
        replica, log = self._replica, self._replica.log
        if progress.state == "snapshot":
            self._send_parts(peer, progress)
            return
        if log.term_at(progress.next - 1) is None:
            self._begin_snapshot(peer, progress)
            return
        if progress.state == "probe":
            if not progress.asked:
                progress.asked = True
                self._send_records(peer, progress)
            return
        while progress.next <= log.last_index and self._has_room(progress):
            progress.next = self._send_records(peer, progress) + 1
        if progress.told_commit < replica.commit and progress.told_commit < progress.next - 1:
            self._send(peer, progress, ())

    def _has_room(self, progress: Progress) -> bool:
        fits = progress.under_way < progress.pace.window
        return fits and len(progress.inflight) < self._replica.settings.inflight

    def _send_records(self, peer: str, progress: Progress) -> int:
        """Send the records from `next` on, as many as one append may have; gives the last one's index."""
        log = self._replica.log
        size = min(self._replica.settings.append_bytes, progress.pace.window - progress.under_way)
        records = log.slice(progress.next, log.last_index, size)
        self._send(peer, progress, records)
        last = progress.next - 1 + len(records)
        if records:
            size = sum(len(record.payload) + RECORD_COST for record in records)
            progress.inflight.append((last, size))
            progress.under_way += size
        return last

    def _heartbeat(self, peer: str, progress: Progress) -> None:
        replica, log = self._replica, self._replica.log
        if log.term_at(progress.next - 1) is None and progress.state != "snapshot":
            self._begin_snapshot(peer, progress)
        if progress.state != "snapshot":
            self._send(peer, progress, ())
            return
        replica.send(peer, Append(replica.term, 0, 0, (), 0, self.round))

    def _send(self, peer: str, progress: Progress, records: tuple[Record, ...]) -> None:
        replica = self._replica
        prev = progress.next - 1
        term = replica.log.term_at(prev) or 0
        replica.send(peer, Append(replica.term, prev, term, records, replica.commit, self.round))
        progress.told_commit = min(replica.commit, prev + len(records))

    def _begin_snapshot(self, peer: str, progress: Progress) -> None:
        progress.state, progress.snapshot = "snapshot", self._replica.snapshot
        progress.forget_inflight()
        progress.pace.restart()
        progress.taken = progress.sent = progress.taken_in = 0
        self._send_parts(peer, progress)

    def _send_parts(self, peer: str, progress: Progress) -> None:
        replica, snapshot = self._replica, progress.snapshot
        if snapshot is None:
            return
        window, size = min(PARTS * replica.settings.part_bytes, progress.pace.window), len(snapshot.data)
        step = max(1, window // PARTS)
        while progress.sent - progress.taken < window and progress.sent < max(size, 1):
            progress.sent_in = self.round
            data = snapshot.data[progress.sent : progress.sent + step]
            part = SnapshotPart(
                replica.term,
                snapshot.index,
                snapshot.term,
                snapshot.configuration,
                size,
                progress.sent,
                data,
                self.round,
            )
            replica.send(peer, part)
            progress.sent += len(data) or 1
