# SPDX-License-Identifier: Apache-2.0
"""The disk of a simulated peer: what it was given, what of that is durable, and what a crash leaves.

Writes become durable in order, each after a while. A crash loses those that wait, except that the first of
them may have come through, whole or in part: a write of several records may leave some (the torn tail that
the log cuts off). A peer with a damaged log moves what is left aside, and comes back *recovering*, with
nothing but its ballot (`mobid/recovery.py`).
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from proto import handover_events as ev
from proto.log import Record
from proto.raft.configuration import Configuration, decode
from proto.raft.events import Ballot, Durable, Snapshot, Stored


class Disk:
    """What is durable of one peer, and the queue of what is not yet."""

    def __init__(self, rng: random.Random, at: Callable[..., None]) -> None:
        self._rng = rng
        self._at = at
        self._waiting: deque[tuple[Durable, Callable[[], None]]] = deque()
        self._life = 0
        self.slowness = 0.0005
        """Longest time of a write, in seconds."""
        self.ballot = Ballot()
        self.snapshot = Snapshot()
        self.base_index = 0
        self.base_term = 0
        self.records: list[Record] = []
        self.recovering = False
        self.commit = 0
        """Written without fsync."""
        self.notes: dict[str, ev.Note] = {}
        """The durable notes of handovers, by migration."""
        self.writes_to_failure: int | None = None
        """So many writes succeed before one fails."""

    def write(self, data: Durable, done: Callable[[], None]) -> bool:
        """Make `data` durable, then call `done`. False if the disk fails: its peer must not go on."""
        if self.writes_to_failure is not None:
            self.writes_to_failure -= 1
            if self.writes_to_failure < 0:
                self.writes_to_failure = None
                return False
        self._waiting.append((data, done))
        if len(self._waiting) == 1:
            self._at(self._rng.random() * self.slowness, self._complete, self._life)
        return True

    def _complete(self, life: int) -> None:
        """All that waits by now shares one fsync."""
        if life != self._life or not self._waiting:
            return
        ready = list(self._waiting)
        self._waiting.clear()
        for data, _ in ready:
            self._apply(data, None)
        for _, done in ready:
            done()
        if self._waiting:
            self._at(self._rng.random() * self.slowness, self._complete, life)

    def _apply(self, data: Durable, parts: int | None) -> None:
        """`parts`: how many of its parts came through before the crash; None for all."""
        steps: list[Callable[[], None]] = []
        if data.ballot is not None:
            steps.append(lambda ballot=data.ballot: setattr(self, "ballot", ballot))  # type: ignore[misc]
        if data.snapshot is not None:
            steps.append(lambda: self._take_snapshot(data))
        if data.truncate is not None:
            steps.append(lambda first=data.truncate: self._truncate(first))  # type: ignore[misc]
        steps.extend(lambda record=record: self._append(record) for record in data.records)  # type: ignore[misc]
        for step in steps if parts is None else steps[:parts]:
            step()
        if data.recovered and parts is None:
            self.recovering = False

    def _take_snapshot(self, data: Durable) -> None:
        assert data.snapshot is not None
        self.snapshot = data.snapshot
        end = self.base_index + len(self.records) + 1
        keep = data.keep if data.keep is not None else end
        if keep > end:
            self.base_index, self.base_term, self.records = data.snapshot.index, data.snapshot.term, []
        elif keep > self.base_index + 1:
            self.base_term = self.records[keep - self.base_index - 2].term
            self.records = self.records[keep - self.base_index - 1 :]
            self.base_index = keep - 1
        elif not self.records:
            self.base_index, self.base_term = data.snapshot.index, data.snapshot.term

    def _append(self, record: Record) -> None:
        place = record.index - self.base_index - 1
        if 0 <= place < len(self.records) and self.records[place].term == record.term:
            return
        assert place == len(self.records), (
            f"{record.index} is written after {self.base_index + len(self.records)}"
        )
        self.records.append(record)

    def _truncate(self, first: int) -> None:
        del self.records[max(0, first - self.base_index - 1) :]

    def crash(self) -> None:
        """What was not durable is gone, but for a beginning of it."""
        self._life += 1
        waiting = list(self._waiting)
        self._waiting.clear()
        self.commit -= self._rng.choice((0, 0, 1, 5)) if self.commit > 5 else 0
        through = self._rng.randrange(len(waiting) + 1) if waiting and self._rng.random() < 0.5 else 0
        for data, _ in waiting[:through]:
            self._apply(data, None)
        if through < len(waiting) and self._rng.random() < 0.5:
            torn = waiting[through][0]
            self._apply(torn, self._rng.randrange(3 + len(torn.records)))

    def damage(self) -> bool:
        """Something in the middle of the log cannot be read any more. False if the log is too short."""
        if len(self.records) < 3:
            return False
        self.snapshot, self.records = Snapshot(), []
        self.base_index = self.base_term = self.commit = 0
        self.recovering = True
        return True

    def configuration(self) -> Configuration:
        """Who votes, by what is durable here."""
        for record in reversed(self.records):
            if record.kind == "config":
                return decode(record.payload)
        return self.snapshot.configuration

    def load(self) -> Stored:
        """What a starting peer finds. A store that does not reach its commit index counts as damaged."""
        last = max(self.base_index + len(self.records), self.snapshot.index)
        assert self.commit <= last, f"{self.commit} is noted as committed, but the log ends at {last}"
        return Stored(
            ballot=self.ballot,
            snapshot=replace(self.snapshot),
            base_index=self.base_index,
            base_term=self.base_term,
            records=list(self.records),
            recovering=self.recovering,
            commit=self.commit,
        )
