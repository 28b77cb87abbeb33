# SPDX-License-Identifier: Apache-2.0
"""The log in memory: the records after a base, and the configurations that they bring.

Records up to the *base* are only in the snapshot; of the base itself the term is still known, since every
append names the record before it. Terms never fall along the log, so a term is found by bisection. A
configuration holds from its record's append and goes again with it when the record is cut off.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

from proto.log import Record
from proto.raft.configuration import Configuration, decode
from proto.raft.events import Snapshot, Stored

RECORD_COST = 64
"""Bytes that a record costs in a message beside its payload, about."""


class Log:
    """The records `first_index`…`last_index`, contiguous; nothing here is checked twice."""

    __slots__ = ("_configurations", "_records", "base_index", "base_term", "last_index")

    def __init__(self, base_index: int, base_term: int, snapshot: Snapshot) -> None:
        self.base_index, self.base_term = base_index, base_term
        self.last_index = base_index
        self._records: list[Record] = []
        self._configurations = [(snapshot.index, snapshot.configuration)]

    @classmethod
    def stored(cls, stored: Stored) -> Log | None:
        """The log that was found on disk, or None if it does not reach its snapshot, which then is all."""
        log = cls(stored.base_index, stored.base_term, stored.snapshot)
        log.append(stored.records)
        return log if log.term_at(stored.snapshot.index) == stored.snapshot.term else None

    @property
    def first_index(self) -> int:
        return self.base_index + 1

    @property
    def last_term(self) -> int:
        return self._records[-1].term if self._records else self.base_term

    @property
    def configuration(self) -> Configuration:
        return self._configurations[-1][1]

    @property
    def configuration_index(self) -> int:
        """Index of the record that brought the configuration."""
        return self._configurations[-1][0]

    def configuration_at(self, index: int) -> Configuration:
        """The configuration after record `index`, which is not before the snapshot."""
        return next(found for at, found in reversed(self._configurations) if at <= index)

    def term_at(self, index: int) -> int | None:
        """The term of record `index`; None if it is neither here nor the base."""
        if self.base_index < index <= self.last_index:
            return self._records[index - self.base_index - 1].term
        return self.base_term if index == self.base_index else None

    def last_not_after(self, index: int, term: int) -> int:
        """The last record up to `index` whose term is at most `term`; the base's index if there is none."""
        end = max(0, min(index, self.last_index) - self.base_index)
        return self.base_index + bisect_right(self._records, term, 0, end, key=lambda record: record.term)

    def slice(self, first: int, last: int, max_bytes: int | None = None) -> tuple[Record, ...]:
        """The records from `first` (not before the base) to `last`, at least one, up to `max_bytes`."""
        found = self._records[first - self.base_index - 1 : last - self.base_index]
        if max_bytes is None:
            return tuple(found)
        size = 0
        for count, record in enumerate(found):
            size += len(record.payload) + RECORD_COST
            if size > max_bytes and count:
                return tuple(found[:count])
        return tuple(found)

    def append(self, records: Iterable[Record]) -> None:
        """Add records that follow on the last; raises `OperationError(bad-argument)` at a bad configuration,
        before which what `check_configurations` takes is safe."""
        for record in records:
            if record.kind == "config" and record.index > self._configurations[0][0]:
                self._configurations.append((record.index, decode(record.payload)))
            self._records.append(record)
        self.last_index = self.base_index + len(self._records)

    def truncate(self, index: int) -> None:
        """Forget the records from `index` (after the base) on."""
        del self._records[index - self.base_index - 1 :]
        self.last_index = self.base_index + len(self._records)
        while len(self._configurations) > 1 and self._configurations[-1][0] >= index:
            self._configurations.pop()

    def compact(self, snapshot: Snapshot, keep: int) -> None:
        """Forget the records before `keep`, which is at most the snapshot's index + 1."""
        term = self.term_at(keep - 1)
        later = [pair for pair in self._configurations if pair[0] > snapshot.index]
        self._configurations = [(snapshot.index, snapshot.configuration), *later]
        if term is not None and keep > self.first_index:
            del self._records[: keep - self.first_index]
            self.base_index, self.base_term = keep - 1, term
