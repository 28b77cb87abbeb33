# SPDX-License-Identifier: Apache-2.0
"""How members without a vote get the log: they ask a replica for what is committed.

The *observer* asks with the end of its own log; the *feeder* sends the committed records after that, at once
if there are any, else when there are, and else after a while an empty answer as a sign of life. One question,
one answer; so the feeder remembers at most one open question per peer, and an observer that is slow or gone
costs nothing. Only committed records are fed, so taking them is safe for anybody, whatever the own term:
a voter that was cut off while it was removed learns so in this way too, and may lose an uncommitted tail.

In a small mesh observers ask the leader; in a large one each stays with some voter, so that the load is
spread, and goes on to another peer when that one is silent or follows nobody.

A peer behind a slow way must not be taken for silent, or the answers of all who are asked in its stead fill
that way. So the feeder begins with small answers and sends larger ones to whom they get quickly (`pace.py`);
the observer waits longer if the last answer took long, or if nobody of all it knows has answered; and it
stays with whoever has sent a part of a snapshot, even if that came late, until nothing more comes from there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from proto.raft.assembly import Assembly
from proto.raft.events import Snapshot
from proto.raft.messages import Feed, Follow, SnapshotPart, SnapshotTaken
from proto.raft.pace import FLOOR, Pace
from proto.raft.replica import NEVER, Replica

FEW = 16
"""In a mesh of more members observers do not all ask the leader; nor get signs of life at every heartbeat."""

FOLLOWERS = 4096
"""Peers whose questions are kept open, and whose pace is remembered."""

TRANSFERS = 64
"""Peers that get a snapshot at a time."""

LEAST = 8
"""The smallest answer in bytes is the largest one divided by this."""

ROUNDS = 2
"""So often the patience of an observer doubles, each time that all were asked and nobody has answered."""

LONGEST = 4
"""An observer's patience in `election`s, however long answers took."""


@dataclass(slots=True)
class _Question:
    after: int
    term: int
    due: float


@dataclass(slots=True)
class _Transfer:
    snapshot: Snapshot
    used: float
    taken: int = 0
    """Bytes of it that the peer has."""


class Feeder:
    """Answers those who follow."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._open: dict[str, _Question] = {}
        self._transfers: dict[str, _Transfer] = {}
        self._paces: dict[str, Pace] = {}
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
            self._begin_or_go_on(peer)
            return
        pace = self._pace(peer)
        if not pace.answered(message.after, replica.now):
            pace.asked_again()
        if message.after < replica.commit or replica.role == "observer":
            self._feed(peer, question)
        elif len(self._open) < FOLLOWERS:
            self._open[peer] = question

    def taken(self, peer: str, message: SnapshotTaken) -> None:
        """Somebody has got a part of a snapshot."""
        transfer = self._transfers.get(peer)
        if transfer is None or transfer.snapshot.index != message.index:
            return
        if not 0 <= message.received < len(transfer.snapshot.data):
            del self._transfers[peer]
        elif message.received != transfer.taken:
            # What is said twice must not be answered twice, or so would be all that follows.
            self._pace(peer).answered(message.received, self._replica.now)
            transfer.taken = message.received
            self._send_part(peer, transfer)

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
        pace = self._pace(peer)
        size = min(replica.settings.append_bytes, pace.window)
        records = log.slice(place + 1, replica.commit, size)
        if place + len(records) < replica.commit:
            pace.sent(place + len(records), replica.now)
        term = log.term_at(place) or 0
        feed = Feed(replica.term, self._leader, replica.configuration, place, term, records, replica.commit)
        replica.send(peer, feed)

    @property
    def _leader(self) -> str:
        """Who leads, if this replica hears it itself. What it only was told it does not pass on: two that ask
        one another would believe for ever that they are in touch."""
        replica = self._replica
        hears = replica.now - replica.heard_append <= 2 * replica.settings.election
        return replica.leader if hears or replica.role == "leader" else ""

    def _pace(self, peer: str) -> Pace:
        settings = self._replica.settings
        pace = self._paces.pop(peer, None)
        if pace is None:
            most = max(settings.append_bytes, settings.part_bytes)
            pace = Pace(max(FLOOR, most // LEAST), most, settings.election)
            if len(self._paces) >= FOLLOWERS:
                del self._paces[next(iter(self._paces))]
        self._paces[peer] = pace
        return pace

    def _begin_or_go_on(self, peer: str) -> None:
        replica = self._replica
        transfer = self._transfers.get(peer)
        if transfer is None or transfer.snapshot.index < replica.log.base_index:
            if len(self._transfers) >= TRANSFERS:
                self._forget_idle()
            if len(self._transfers) >= TRANSFERS or not replica.snapshot.index:
                return
            transfer = self._transfers[peer] = _Transfer(replica.snapshot, replica.now)
        else:
            self._pace(peer).asked_again()
        self._send_part(peer, transfer)

    def _send_part(self, peer: str, transfer: _Transfer) -> None:
        replica, snapshot, offset = self._replica, transfer.snapshot, transfer.taken
        transfer.used = replica.now
        pace = self._pace(peer)
        data = snapshot.data[offset : offset + min(replica.settings.part_bytes, pace.window)]
        pace.sent(offset + len(data), replica.now)
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
        self._known_peers = 1
        """How many there are to ask in turn."""
        self._asked: dict[str, float] = {}
        """Who was asked since the last answer, and when first."""
        self._silent = 0
        """Questions since then that were not answered in time."""
        self._took = 0.0
        """Seconds until the last answer, at most: it may be that to the first of several questions."""
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
        brings = replica.votes or (replica.leader and replica.leader == self._assembly.peer)
        patience = 2 * replica.settings.election if brings else 3 * replica.settings.heartbeat
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
        """Ask, if it is time to; the next one, if the last one asked did not answer.

        Who is sending a snapshot is asked once more: it goes on where it stopped, another would begin anew.
        """
        replica = self._replica
        if replica.now < self.due:
            return
        if self._target and self._ask_at > self._asked_at:
            self._silent += 1
            if self._silent > 1 or self._assembly.peer != self._target:
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
        if (message.records and end <= before) or not self._answered(peer):
            return  # records that are here already were asked for twice: the newest question still waits
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
        """A part of a snapshot from the peer that was asked, or was before and is late.

        Not while a leader sends, nor from a second one while those of the first still come: it brings its own
        snapshot, and each of two transfers would throw away what the other one has brought (`assembly.py`).
        """
        replica = self._replica
        if replica.role == "leader" or replica.now < self._left_alone:
            return
        if peer != self._target and self._assembly.peer not in ("", peer):
            return
        here = self._assembly.received(peer)
        received, snapshot = self._assembly.add(peer, message, replica.commit)
        if received is None:
            return
        # A part that was here already may be of an earlier question.
        if message.index > replica.commit and message.offset + len(message.data) > here:
            self._answered(peer)
            self._target = peer
            self._wait()
        replica.send(peer, SnapshotTaken(replica.term, message.index, received))
        if snapshot is not None:
            if replica.role == "candidate":
                replica.rest()
            replica.install(snapshot)
            self._ask()

    def _answered(self, peer: str) -> bool:
        """If this peer was asked: it is the one to go on with, even if others were asked in its stead."""
        asked_at = self._asked.get(peer)
        if asked_at is None:
            return False
        self._took = self._replica.now - asked_at
        self._silent = 0
        self._asked.clear()
        self._target = peer
        return True

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
        patience = max(3 * settings.heartbeat, 0.6 * settings.election, 1.5 * self._took)
        patience = min(patience, LONGEST * settings.election)
        patience *= 2 ** min(self._silent // self._known_peers, ROUNDS)
        self._asked_at = self._replica.now
        self._ask_at = self._asked_at + patience
        self._asked.setdefault(self._target, self._asked_at)

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
        self._known_peers = max(1, len(order))
        self._turn = turn % self._known_peers
        self._target = order[self._turn] if order else ""
