# SPDX-License-Identifier: Apache-2.0
"""What every part of a replica shares: its log, ballot and role, and what of them is durable.

Nothing here waits for the disk. A change is made in memory and handed to the shell as a numbered write; when
the shell says that the write is durable, what depended on it goes on:

* A message that promises something (a vote, an acknowledgement) leaves only once the newest ballot is
  durable; until then it is held back (`answer`).
* `stable` is the last index up to which the log *as it is now* is durable. A write says how far it would
  bring that; when the tail is cut off, all writes under way are told that they bring less. So when a record
  is written, cut off and another one takes its index, the late word about the first write proves nothing
  about the second one (the ABA problem of asynchronous storage).

Committed records are handed out once they are durable here too; a leader whose disk does not get on with that
makes room for another one (`replication.py`). A shell may so keep the index of what was applied
(`Stored.commit`) beside the log: were it ahead of the log, a crash could leave older records under that index
which were never committed.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass
from typing import Any

from proto.api import OperationError
from proto.log import Record
from proto.machine import Send
from proto.raft.configuration import Configuration, decode
from proto.raft.events import (
    Ballot,
    Commit,
    Durable,
    Effect,
    Persist,
    Restore,
    Role,
    Settings,
    Snapshot,
    Stored,
)
from proto.raft.log import Log

NEVER = float("-inf")

AT_ONCE = 256
"""Records given to the state at once: each makes a state of its own, and all of a long log would be many."""


@dataclass(slots=True)
class Write:
    """A write under way: `last` is how far it makes the log durable."""

    number: int
    last: int
    ballot: bool
    snapshot: Snapshot | None
    recovered: bool


class Replica:
    """The shared state. `now` is the time of the event being handled, `out` its effects so far."""

    def __init__(self, own: str, stored: Stored, settings: Settings, rng: random.Random) -> None:
        self.own, self.settings, self.rng = own, settings, rng
        self.now = NEVER
        self.out: list[Effect] = []
        self.ballot = stored.ballot
        self.snapshot = stored.snapshot
        self.recovering = stored.recovering
        self.commit = self.applied = stored.snapshot.index
        log = Log.stored(stored)
        if log:
            self.commit = max(self.commit, min(stored.commit, log.last_index))
        self.log = log or Log(self.snapshot.index, self.snapshot.term, self.snapshot)
        self.stable = self.log.last_index
        self.role: Role = "observer"
        self.leader = ""
        self.heard_leader = NEVER
        self.heard_append = NEVER
        """When records or a heartbeat last came from a leader; for votes `heard_leader` counts."""
        self.matched = 0
        """Up to here the log is the current leader's (meaningful while another peer leads)."""
        self._writes: deque[Write] = deque()
        self._number = 0
        self._ballot: Ballot | None = None
        self._truncate: int | None = None
        self._records: list[Record] = []
        self._ballot_number = 0
        self._held: deque[tuple[int, Send]] = deque()
        self._restoring: Snapshot | None = None
        self._reset = log is None

    @property
    def term(self) -> int:
        return self.ballot.term

    @property
    def configuration(self) -> Configuration:
        return self.log.configuration

    @property
    def votes(self) -> bool:
        """Whether this replica is a voter in its right mind.

        One that is removed by a configuration not yet committed still is one: nobody else may have a log
        that can win (Ongaro's thesis, 4.2.2).
        """
        if self.recovering:
            return False
        log = self.log
        if self.own in log.configuration.deciding:
            return True
        last = log.configuration_index
        return last > self.commit and self.own in log.configuration_at(last - 1).deciding

    @property
    def writing(self) -> bool:
        """Whether something is not durable yet. Writes are in order: a ballot would have to wait for it."""
        return bool(self._writes) or self._changed

    @property
    def ballot_write(self) -> int:
        """The number of the write that makes the newest ballot durable; 0: it is."""
        if self._ballot is not None:
            return self._number + 1
        return self._ballot_number if self._writes and self._ballot_number >= self._writes[0].number else 0

    @property
    def _changed(self) -> bool:
        return self._ballot is not None or self._truncate is not None or bool(self._records)

    def start(self) -> None:
        """The first event is here: what was found on disk is put right, if it must be."""
        if self._reset:
            end = self.snapshot.index + 1
            self._start_write(Durable(snapshot=self.snapshot, keep=end, truncate=end), self.stable)
        self.rest()

    # Messages.

    def send(self, peer: str, message: Any) -> None:
        """A message that promises nothing that a crash could take back."""
        self.out.append(Send(peer, message))

    def answer(self, peer: str, message: Any) -> None:
        """A message that leaves once the newest ballot is durable."""
        if self.ballot_write:
            self._held.append((self.ballot_write, Send(peer, message)))
        else:
            self.out.append(Send(peer, message))

    # Role and term.

    def become(self, role: Role, leader: str) -> None:
        self.role, self.leader = role, leader

    def rest(self, leader: str = "") -> None:
        """Be a follower, or an observer without a vote."""
        self.become("follower" if self.votes else "observer", leader)

    def adopt(self, term: int, voted: str = "") -> None:
        """Enter a term (or vote in it) as a follower."""
        self.ballot = self._ballot = Ballot(term, voted)
        self.matched = 0
        self.rest()

    # The log and the disk.

    def append(self, records: tuple[Record, ...]) -> None:
        """Add records that follow on the last one; raises `OperationError` at a bad configuration."""
        self.log.append(records)
        self._records.extend(records)

    def truncate(self, index: int) -> None:
        """Cut off the records from `index` on, which is not committed."""
        self.flush()
        self._truncate = index
        self.log.truncate(index)
        self.matched = min(self.matched, index - 1)
        self._not_beyond(index - 1)

    def install(self, snapshot: Snapshot) -> None:
        """Replace the log up to a received snapshot; `Restore` follows when it is durable."""
        self.flush()
        if snapshot.term > self.term:
            self.adopt(snapshot.term)
            self.flush()
        end, truncate = snapshot.index + 1, None
        if self.log.term_at(snapshot.index) == snapshot.term:
            self.log.compact(snapshot, end)
        else:
            truncate = end
            self.log = Log(snapshot.index, snapshot.term, snapshot)
            self._not_beyond(snapshot.index)
        self.snapshot = self._restoring = snapshot
        self.commit = max(self.commit, snapshot.index)
        durable = Durable(snapshot=snapshot, keep=end, truncate=truncate)
        self._start_write(durable, snapshot.index, snapshot)

    def compact(self, index: int, data: bytes, keep: int) -> None:
        """Take the state after an applied record as the snapshot; ignored if it is not newer."""
        term = self.log.term_at(index)
        if not self.snapshot.index < index <= self.applied or term is None or self._restoring:
            return
        self.flush()
        self.snapshot = Snapshot(index, term, self.log.configuration_at(index), data)
        keep = max(self.log.first_index, min(keep, index + 1))
        self.log.compact(self.snapshot, keep)
        self._start_write(Durable(snapshot=self.snapshot, keep=keep), 0)

    def end_recovery(self) -> None:
        """Make it durable that this replica may be believed again; from then on it is."""
        self.flush()
        self._start_write(Durable(recovered=True), 0, recovered=True)

    def flush(self) -> None:
        """Hand the changes so far to the shell as one write."""
        if not self._changed:
            return
        records = tuple(self._records)
        durable = Durable(ballot=self._ballot, truncate=self._truncate, records=records)
        self._records.clear()
        has_ballot = self._ballot is not None
        self._ballot = self._truncate = None
        self._start_write(durable, records[-1].index if records else 0, ballot=has_ballot)

    def _start_write(
        self,
        durable: Durable,
        last: int,
        snapshot: Snapshot | None = None,
        ballot: bool = False,
        recovered: bool = False,
    ) -> None:
        self._number += 1
        self._writes.append(Write(self._number, last, ballot, snapshot, recovered))
        if ballot:
            self._ballot_number = self._number
        self.out.append(Persist(str(self._number), durable))

    def _not_beyond(self, last: int) -> None:
        self.stable = min(self.stable, last)
        for write in self._writes:
            write.last = min(write.last, last)

    def persisted(self, key: str) -> int:
        """A write, and all before it, are durable; gives the number of the newest one that is."""
        number = int(key) if key.isdecimal() and len(key) < 20 else 0
        if number > self._number:
            return 0
        while self._writes and self._writes[0].number <= number:
            write = self._writes.popleft()
            self.stable = max(self.stable, write.last)
            if write.snapshot is not None and write.snapshot is self._restoring:
                self._restoring = None
                self.applied = write.snapshot.index
                self.out.append(Restore(write.snapshot))
            if write.recovered:
                self.recovering = False
        while self._held and self._held[0][0] <= number:
            self.out.append(self._held.popleft()[1])
        return number

    # Commit.

    def commit_to(self, index: int) -> None:
        self.commit = max(self.commit, min(index, self.log.last_index))

    @property
    def behind(self) -> bool:
        """Whether something that is committed, and durable here, can be given to the state now."""
        return self.applied < min(self.commit, self.stable) and self._restoring is None

    def hand_out(self) -> None:
        """Give the next records of that to the state."""
        if self.behind:
            end = min(self.commit, self.stable, self.applied + AT_ONCE)
            self.out.append(Commit(self.log.slice(self.applied + 1, end)))
            self.applied = end

    def take(self, prev_index: int, prev_term: int, records: tuple[Record, ...]) -> bool | None:
        """Make the log contain these records after the one before them.

        True: it does. False: the record before them is not here. None: they make no sense (a gap, falling
        terms, a contradiction to what is committed), and nothing was changed.
        """
        if not _sensible(prev_index, prev_term, records):
            return None
        if prev_index < self.commit:
            skip = self.commit - prev_index
            if len(records) >= skip and records[skip - 1].term != self.log.term_at(self.commit):
                return None
            records = records[skip:]
        elif self.log.term_at(prev_index) != prev_term:
            return False if prev_index > self.commit else None
        for position, record in enumerate(records):
            term = self.log.term_at(record.index)
            if term != record.term:
                if term is not None:
                    self.truncate(record.index)
                self.append(records[position:])
                break
        return True


def _sensible(prev_index: int, prev_term: int, records: tuple[Record, ...]) -> bool:
    index, term = prev_index, prev_term
    if index < 0 or term < 0:
        return False
    for record in records:
        index += 1
        if record.index != index or record.term < term:
            return False
        term = record.term
        if record.kind == "config" and not _readable(record.payload):
            return False
    return True


def _readable(payload: bytes) -> bool:
    try:
        return bool(decode(payload).voters)
    except OperationError:
        return False
