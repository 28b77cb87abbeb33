# SPDX-License-Identifier: Apache-2.0
"""How members without a vote get the log: they ask a replica for what is committed.

The *observer* asks with the end of its own log; the *feeder* sends the committed records after that, at once
if there are any, else when there are, and else after a while an empty answer as a sign of life. One question,
one answer; so the feeder remembers at most one open question per peer, and an observer that is slow or gone
costs nothing. Only committed records are fed, so taking them is safe for anybody, whatever the own term:
a voter that was cut off while it was removed learns so in this way too, and may lose an uncommitted tail.

In a small mesh observers ask the leader; in a large one each stays with some voter, so that the load is
spread, and goes on to another peer when that one is silent or follows nobody.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from proto.raft.assembly import Assembly
from proto.raft.events import Snapshot
from proto.raft.messages import Feed, Follow, SnapshotPart, SnapshotTaken
from proto.raft.replica import NEVER, Replica

FEW = 16
"""In a mesh of more members observers do not all ask the leader; nor get signs of life at every heartbeat."""

FOLLOWERS = 4096
"""Peers whose questions are kept open."""

TRANSFERS = 64
"""Peers that get a snapshot at a time."""


@dataclass(slots=True)
class _Question:
    after: int
    term: int
    due: float


@dataclass(slots=True)
class _Transfer:
    snapshot: Snapshot
    used: float


class Feeder:
    """Answers those who follow."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._open: dict[str, _Question] = {}
        self._transfers: dict[str, _Transfer] = {}
        self._served = 0

    @property
    def due(self) -> float:
        """When the oldest question must get a sign of life (questions are in the order of coming)."""
        return next(iter(self._open.values())).due if self._open else float("inf")

    def follow(self, peer: str, message: Follow) -> None:
        """Somebody asks for the committed records after its last one."""
        replica = self._replica
        self._open.pop(peer, None)
        question = _Question(message.after, message.after_term, replica.now + self._hold())
        if message.after < replica.log.base_index:
            self._send_part(peer, 0)
        elif message.after < replica.commit or replica.role == "observer":
            self._feed(peer, question)
        elif len(self._open) < FOLLOWERS:
            self._open[peer] = question

    def taken(self, peer: str, message: SnapshotTaken) -> None:
        """Somebody has got a part of a snapshot."""
        transfer = self._transfers.get(peer)
        if transfer is None or transfer.snapshot.index != message.index:
            return
        if 0 <= message.received < len(transfer.snapshot.data):
            self._send_part(peer, message.received)
        else:
            del self._transfers[peer]

    def settle(self) -> None:
        """Answer whom there is something for, or who has waited long enough."""
        replica = self._replica
        if self._open and self._served < replica.commit:
            ready = [peer for peer, question in self._open.items() if question.after < replica.commit]
            for peer in ready:
                self._feed(peer, self._open.pop(peer))
        self._served = replica.commit
        while self.due <= replica.now:
            peer = next(iter(self._open))
            self._feed(peer, self._open.pop(peer))

    def _hold(self) -> float:
        """A sign of life is due after this long: less often if many ask."""
        settings = self._replica.settings
        return min(settings.heartbeat * max(1.0, len(self._open) / FEW), 0.4 * settings.election)

    def _feed(self, peer: str, question: _Question) -> None:
        replica, log = self._replica, self._replica.log
        place = min(question.after, replica.commit)
        if log.term_at(place) != question.term and place == question.after:
            place = log.last_not_after(place, question.term)
        place = max(place, log.base_index)
        records = log.slice(place + 1, replica.commit, replica.settings.append_bytes)
        term = log.term_at(place) or 0
        feed = Feed(replica.term, replica.leader, replica.configuration, place, term, records, replica.commit)
        replica.send(peer, feed)

    def _send_part(self, peer: str, offset: int) -> None:
        replica = self._replica
        transfer = self._transfers.get(peer)
        if transfer is None or (offset == 0 and transfer.snapshot.index < replica.log.base_index):
            if len(self._transfers) >= TRANSFERS:
                self._forget_idle()
            if len(self._transfers) >= TRANSFERS or not replica.snapshot.index:
                return
            transfer = self._transfers[peer] = _Transfer(replica.snapshot, replica.now)
        transfer.used = replica.now
        snapshot = transfer.snapshot
        data = snapshot.data[offset : offset + replica.settings.part_bytes]
        part = SnapshotPart(
            replica.term,
            snapshot.index,
            snapshot.term,
            snapshot.configuration,
            len(snapshot.data),
            offset,
            data,
        )
        replica.send(peer, part)

    def _forget_idle(self) -> None:
        long_ago = self._replica.now - 10 * self._replica.settings.election
        for peer in [peer for peer, transfer in self._transfers.items() if transfer.used < long_ago]:
            del self._transfers[peer]


class Observer:
    """Asks for what is committed while no leader sends it."""

    def __init__(self, replica: Replica, assembly: Assembly) -> None:
        self._replica = replica
        self._assembly = assembly
        self._contacts: tuple[str, ...] = ()
        self._known = replica.configuration
        self._target = ""
        self._asked_at = self._ask_at = NEVER
        self._named = ("", 0)
        """The leader that an answer has named last, and the term of the answer."""
        self._from_commit = False
        """The own tail is not the others': ask from what is committed."""
        self._turn = 0
        self._place = replica.rng.randrange(1 << 16)
        """Which voter to begin with in a large mesh."""

    @property
    def due(self) -> float:
        """When to ask next: not as long as a leader sends, or soon may."""
        replica = self._replica
        if replica.role == "leader":
            return float("inf")
        return max(self._ask_at, self._left_alone)

    @property
    def _left_alone(self) -> float:
        """From when on no leader sends, unless it is heard again."""
        replica = self._replica
        patience = 2 * replica.settings.election if replica.votes else 3 * replica.settings.heartbeat
        return replica.heard_append + patience

    def start(self) -> None:
        """A voter hears of a leader soon, most likely."""
        if self._replica.votes:
            self._ask_at = self._replica.now + 2 * self._replica.settings.election

    def contacts(self, peers: Iterable[str]) -> None:
        """Whom else to ask."""
        self._contacts = tuple(peer for peer in peers if peer != self._replica.own)
        if not self._target and not self._replica.votes:
            self._ask_at = NEVER

    def tick(self) -> None:
        """Ask, if it is time to; the next one, if the last one asked did not answer."""
        replica = self._replica
        if replica.now < self.due:
            return
        if self._target and self._ask_at > self._asked_at:
            if replica.leader == self._target and not replica.votes:
                replica.rest()
            self._choose(self._turn + 1)
        elif not self._target:
            self._choose(0)
        self._ask()

    def feed(self, peer: str, message: Feed) -> None:
        """Committed records, or a sign of life."""
        replica = self._replica
        end = message.prev_index + len(message.records)
        if replica.role == "leader" or end > message.commit:
            return
        learned = self._learn(message)
        self._hear_of_leader(peer, message)
        before = replica.commit
        sensible = self._take(message, end)
        if peer != self._target:
            return
        pause = 0.0 if replica.commit > before else replica.settings.heartbeat / 2
        replicates = peer in self._known.replicas
        if learned and not replicates:
            self._choose(0)
        elif not (replicates and sensible and message.leader) or message.commit < before:
            # Who knows no more than this peer must not be asked for ever: another one may.
            self._choose(self._turn + 1)
        self._ask_at = self._asked_at = max(self._asked_at + pause, replica.now)
        self.tick()

    def part(self, peer: str, message: SnapshotPart) -> None:
        """A part of a snapshot from the peer that was asked.

        Not while a leader sends: it brings its own snapshot, and each of two transfers would throw away
        what the other one has brought (`assembly.py`).
        """
        replica = self._replica
        if replica.role == "leader" or peer != self._target or replica.now < self._left_alone:
            return
        received, snapshot = self._assembly.add(peer, message, replica.commit)
        if received is None:
            return
        self._wait()
        replica.send(peer, SnapshotTaken(replica.term, message.index, received))
        if snapshot is not None:
            if replica.role == "candidate":
                replica.rest()
            replica.install(snapshot)
            self._ask()

    def _learn(self, message: Feed) -> bool:
        """Who the voters are, unless the answer is older than what is here; True if that is new."""
        known, configuration = self._known, message.configuration
        old = bool(known.voters) and message.commit < self._replica.commit
        if old or not configuration.voters or configuration == known:
            return False
        self._known = configuration
        return True

    def _take(self, message: Feed, end: int) -> bool:
        """Take the records; False if the answer makes no sense."""
        replica = self._replica
        if message.records:
            newest = message.records[-1].term
            if newest > replica.term:
                replica.adopt(newest)
            elif replica.role == "candidate":
                replica.rest()
        taken = replica.take(message.prev_index, message.prev_term, message.records)
        if taken:
            replica.commit_to(end)
        self._from_commit = not taken
        return taken is not None

    def _hear_of_leader(self, peer: str, message: Feed) -> None:
        replica = self._replica
        if message.leader == replica.own or (message.term < replica.term and replica.votes):
            return  # whether it leads itself it knows best
        if replica.leader and message.term < self._led_since:
            return
        if message.leader:
            if message.term > replica.term:
                replica.adopt(message.term)
            replica.rest(message.leader)
            self._named = (message.leader, message.term)
        elif peer == self._target and not replica.votes:
            replica.rest()

    @property
    def _led_since(self) -> int:
        """The term in which the leader was named. The own one may be later: then records told of it, or this
        peer has campaigned while it was cut off, and a late answer named who led before."""
        leader, term = self._named
        return term if leader == self._replica.leader else self._replica.term

    def _ask(self) -> None:
        replica = self._replica
        self._wait()
        if self._target:
            after = replica.commit if self._from_commit else replica.log.last_index
            replica.send(self._target, Follow(after, replica.log.term_at(after) or 0))

    def _wait(self) -> None:
        settings = self._replica.settings
        self._asked_at = self._replica.now
        self._ask_at = self._asked_at + max(3 * settings.heartbeat, 0.6 * settings.election)

    def _choose(self, turn: int) -> None:
        replica = self._replica
        voters = sorted(self._known.deciding)
        others = list(self._contacts)
        if len(voters) + len(others) > FEW and voters:
            place = self._place % len(voters)
            voters = voters[place:] + voters[:place]
        elif replica.leader:
            voters.insert(0, replica.leader)
        order = [peer for peer in dict.fromkeys(voters + others) if peer != replica.own]
        self._turn = turn % len(order) if order else 0
        self._target = order[self._turn] if order else ""
