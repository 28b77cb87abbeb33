# SPDX-License-Identifier: Apache-2.0
"""What a replica must not forget, as a directory: its log, its snapshot and its ballot.

    catalog/log         records after a base (`proto/log.py`)
    catalog/snapshot    the state at one record, sealed; it covers everything up to the log's base
    catalog/ballot      the newest term seen and the vote given in it, sealed
    catalog/commit      an index known to be committed, and durable here; written without fsync
    catalog/boot        a number that grows with each start
    catalog/recovering  there while acknowledged records are missing here
    catalog/reserve     room for a ballot on a full disk: a voter that cannot vote would hold up the others

`Store.write` makes any number of `Durable`s true in their order with as few fsyncs as it can. Each step may
be the last one before a crash: a ballot is written before records (a term that is too new harms nobody), a
snapshot before the log that it makes shorter, and a truncation is durable before anything is appended.
The commit index is noted last, when all up to it is durable: a log and a snapshot that do not reach it have
lost what this peer has acknowledged, however much their end looks like a torn tail.
Writing again what is there already changes nothing, so a write that failed for want of room is simply tried
again.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mobid.config import replace_file, sync_directory, unwritable
from mobid.logfile import LogFile
from proto import log, wire
from proto.api import OperationError
from proto.raft import configuration
from proto.raft.events import Ballot, Durable, Snapshot, Stored

BALLOT_MAGIC = b"MOBITOPO VOTE2\n\0"
SNAPSHOT_MAGIC = b"MOBITOPO SNAP2\n\0"
COMMIT_MAGIC = b"MOBITOPO DONE2\n\0"
BOOT_MAGIC = b"MOBITOPO BOOT2\n\0"

RESERVE = 16 << 10
"""Bytes kept for a ballot when the disk is full."""


class Store:
    """Owns the directory. Every method blocks and raises `OperationError` (`no-room`, `failed`)."""

    def __init__(self, directory: Path) -> None:
        """Open the store, or make an empty one; raises `log.DamagedError` naming file and byte."""
        self.directory = directory
        self._failed: OperationError | None = None
        made = not directory.exists()
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
            if made:
                sync_directory(directory.parent)
            sync_directory(directory)  # a process that was killed may have renamed a file and no more
        except OSError as error:
            raise unwritable(directory, error) from None
        self._snapshot = _read_snapshot(directory / "snapshot")
        self._commit = _read_commit(directory / "commit")
        self._ballot = self._first_ballot()
        self._log = self._open_log()
        self.torn = self._log.torn
        self._reserve()
        try:
            self._drop_what_the_snapshot_replaced()
            self._commit_fd = _open_commit(directory / "commit")
        except BaseException:
            self._log.close()
            raise

    def _first_ballot(self) -> Ballot:
        """The ballot; a store has one before it has a log, so that a lost one is noticed."""
        path = self.directory / "ballot"
        if path.exists():
            return _read_ballot(path)
        if (self.directory / "log").exists() or self._snapshot.index:
            raise _missing(path)
        self._write_ballot(Ballot())
        return Ballot()

    def _open_log(self) -> LogFile:
        path = self.directory / "log"
        if path.exists():
            return LogFile(path, self._commit if self._commit > self._snapshot.index else 0)
        if self._ballot.term or self._snapshot.index or self._commit:
            raise _missing(path)
        return LogFile.create(path)

    def _drop_what_the_snapshot_replaced(self) -> None:
        """A crash may have come between a snapshot and the log that belongs to it."""
        snapshot = self._snapshot
        if snapshot.index > self._log.base_index and self._log.term(snapshot.index) != snapshot.term:
            self._log.begin_after(snapshot.index, snapshot.term)
            self._log.records = []
        if snapshot.index < self._log.base_index:
            raise log.DamagedError(
                "failed",
                f"{self.directory / 'snapshot'} is damaged at byte 0: it ends with record {snapshot.index}, "
                f"but the log begins after record {self._log.base_index}",
                "restore the whole directory from one copy, or let this peer join anew from an empty one",
            )

    @property
    def empty(self) -> bool:
        """Whether no record was ever kept here; a ballot may be, of a founding that was cut short."""
        return self._log.last_index == 0

    @property
    def stored(self) -> Stored:
        """What was durable when the store was opened."""
        return Stored(
            ballot=self._ballot,
            snapshot=self._snapshot,
            base_index=self._log.base_index,
            base_term=self._log.base_term,
            records=self._log.records,
            recovering=(self.directory / "recovering").exists(),
            commit=self._commit,
        )

    # Writing.

    def write(self, batch: Sequence[Durable]) -> None:
        """Make all of it durable; after `no-room` none of the records is there, and it may be tried again.

        Once fsync has failed everything is refused (`failed`).
        """
        if self._failed is not None:
            raise self._failed
        try:
            self._write(batch)
        except OperationError as error:
            if error.code == "no-room":
                self._log.undo()
            else:
                self._failed = error
            raise

    def _write(self, batch: Sequence[Durable]) -> None:
        ballots = [durable.ballot for durable in batch if durable.ballot is not None]
        if ballots and ballots[-1] != self._ballot:
            self._write_ballot(ballots[-1])
        for durable, records in zip(batch, _lasting(batch), strict=True):
            if durable.snapshot is not None:
                self._write_snapshot(durable.snapshot, durable.keep)
            if durable.truncate is not None and durable.truncate > self._log.base_index:
                self._log.sync()
                self._log.truncate(durable.truncate)
            self._log.append(records)
        self._log.sync()
        if any(durable.recovered for durable in batch):
            (self.directory / "recovering").unlink(missing_ok=True)
            sync_directory(self.directory)

    def _write_ballot(self, ballot: Ballot) -> None:
        path = self.directory / "ballot"
        content = log.seal(BALLOT_MAGIC, wire.pack([ballot.term, ballot.voted]))
        try:
            replace_file(path, [content], 0o600)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise unwritable(path, error) from None
            (self.directory / "reserve").unlink(missing_ok=True)
            try:
                replace_file(path, [content], 0o600)
            except OSError as again:
                raise unwritable(path, again) from None
        self._ballot = ballot
        self._reserve()

    def _reserve(self) -> None:
        """Keep room for a ballot, if there is any."""
        path = self.directory / "reserve"
        if path.exists():
            return
        with suppress(OSError):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, RESERVE)
            except OSError:
                path.unlink()
            finally:
                os.close(fd)

    def _write_snapshot(self, snapshot: Snapshot, keep: int | None) -> None:
        """The snapshot first, whole; then the log without what it replaces, by rename. One that a later one
        has replaced already, before the disk was full, is left out."""
        path = self.directory / "snapshot"
        if snapshot.index < self._snapshot.index:
            return
        self._log.sync()
        if snapshot != self._snapshot:
            try:
                replace_file(path, [log.seal(SNAPSHOT_MAGIC, _encode_snapshot(snapshot))], 0o600)
            except OSError as error:
                raise unwritable(path, error) from None
            self._snapshot = snapshot
        base = snapshot.index if keep is None or keep > self._log.last_index else keep - 1
        term = self._log.term(base)
        if base == snapshot.index:
            term = snapshot.term
        if term is not None and base >= self._log.base_index:
            self._log.begin_after(base, term)

    def mark_recovering(self, ballot: Ballot) -> None:
        """Of an empty store: it replaces one whose acknowledged records are lost, with its ballot."""
        try:
            replace_file(self.directory / "recovering", [b""], 0o600)
        except OSError as error:
            raise unwritable(self.directory / "recovering", error) from None
        self._write_ballot(ballot)

    def note_commit(self, index: int) -> None:
        """Keep that everything up to `index`, which is durable here, is committed; forgotten by a power cut
        at worst."""
        with suppress(OSError):
            os.pwrite(self._commit_fd, log.seal(COMMIT_MAGIC, index.to_bytes(8, "little")), 0)

    def next_boot(self, least: int) -> int:
        """A number larger than those of all earlier calls, and not less than `least`; durable.

        The wall clock alone would not do: it may have been put back.
        """
        path = self.directory / "boot"
        last = (
            int.from_bytes(log.unseal(BOOT_MAGIC, _bytes(path), str(path)), "little") if path.exists() else 0
        )
        boot = max(least, last + 1)
        try:
            replace_file(path, [log.seal(BOOT_MAGIC, boot.to_bytes(8, "little"))], 0o600)
        except OSError as error:
            raise unwritable(path, error) from None
        return boot

    def close(self) -> None:
        os.close(self._commit_fd)
        self._log.close()


def _lasting(batch: Sequence[Durable]) -> list[tuple[log.Record, ...]]:
    """The records of each part, without those that a later part cuts off: when a full disk has stopped the
    batch half-way, their places may be taken already."""
    end = math.inf
    lasting: list[tuple[log.Record, ...]] = []
    for durable in reversed(batch):
        lasting.append(tuple(record for record in durable.records if record.index < end))
        if durable.truncate is not None:
            end = min(end, durable.truncate)
    return lasting[::-1]


# Reading.


def surviving_ballot(directory: Path) -> Ballot:
    """The ballot of a damaged store, if that at least can be read."""
    try:
        return _read_ballot(directory / "ballot")
    except OperationError:
        return Ballot()


def _read_ballot(path: Path) -> Ballot:
    content = log.unseal(BALLOT_MAGIC, _bytes(path), str(path))
    match _unpacked(content, path):
        case [int(term), str(voted)]:
            return Ballot(term, voted)
    raise _malformed(path)


def _encode_snapshot(snapshot: Snapshot) -> bytes:
    settled = configuration.encode(snapshot.configuration)
    return wire.pack([snapshot.index, snapshot.term, settled, snapshot.data])


def _read_snapshot(path: Path) -> Snapshot:
    if not path.exists():
        return Snapshot()
    content = log.unseal(SNAPSHOT_MAGIC, _bytes(path), str(path))
    match _unpacked(content, path):
        case [int(index), int(term), bytes(settled), bytes(data)]:
            return Snapshot(index, term, configuration.decode(settled), data)
    raise _malformed(path)


def _open_commit(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise unwritable(path, error) from None


def _read_commit(path: Path) -> int:
    try:
        return int.from_bytes(log.unseal(COMMIT_MAGIC, path.read_bytes(), str(path)), "little")
    except (OSError, OperationError):
        return 0


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise log.DamagedError(
            "failed",
            f"{path} cannot be read: {(error.strerror or str(error)).lower()}",
            "mend its permissions or its disk",
        ) from None


def _unpacked(content: bytes, path: Path) -> object:
    try:
        return wire.unpack(content)
    except wire.WireError:
        raise _malformed(path) from None


def _missing(path: Path) -> log.DamagedError:
    return log.DamagedError(
        "failed",
        f"{path} is damaged at byte 0: the file is missing",
        "restore the directory it is in from a copy, or let this peer join anew from an empty directory",
    )


def _malformed(path: Path) -> log.DamagedError:
    return log.DamagedError(
        "failed",
        f"{path} is damaged at byte {len(BALLOT_MAGIC)}: its content is not what this version writes",
        "restore the directory it is in from a copy, or let this peer join anew from an empty directory",
    )
