# SPDX-License-Identifier: Apache-2.0
"""The log of the catalog as a file: read once at the start, then appended to, shortened, or begun anew.

Nothing counts before `sync`: what was written since the last one is taken back when the disk is full, and
the log goes on once there is room. When fsync itself fails nobody knows what is on the disk any more (the
kernel may have dropped the pages), so the log refuses everything until the peer is started again and reads
what is really there. A log is made, and begun anew with a later base, beside its place and then renamed, so
that its header is always whole.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mobid.config import replace_file, unwritable
from proto import log
from proto.api import OperationError

_COPY = 1 << 20


class LogFile:
    """Owns the open file; every method blocks. Raises `OperationError` (`no-room`, `failed`)."""

    def __init__(self, path: Path, durable: int = 0) -> None:
        """Open a log that is there and cut its torn tail; raises `log.DamagedError`, also if that would cut
        off record `durable`, which is known to have been synced."""
        self.path = path
        self._failed: OperationError | None = None
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            scan = log.scan(path.read_bytes(), str(path), durable)
            self.records = scan.records
            """What was read; not kept in step with what is written later."""
            self.base_index, self.base_term = scan.base_index, scan.base_term
            self._terms = [record.term for record in scan.records]
            self._offsets = scan.offsets
            self._end = scan.end
            self.torn = os.fstat(self._fd).st_size - scan.end
            if self.torn:
                os.ftruncate(self._fd, self._end)
            # Whoever wrote it may have been killed before fsync, and what is here counts from now on.
            os.fsync(self._fd)
        except BaseException:
            os.close(self._fd)
            raise
        self._synced = len(self._offsets)

    @classmethod
    def create(cls, path: Path, base_index: int = 0, base_term: int = 0) -> LogFile:
        """A new empty log at `path`, in place of whatever is there."""
        try:
            replace_file(path, [log.header(base_index, base_term)], 0o600)
        except OSError as error:
            raise unwritable(path, error) from None
        return cls(path)

    @property
    def last_index(self) -> int:
        return self.base_index + len(self._offsets)

    def term(self, index: int) -> int | None:
        """The term of a record, or of the base; None for any other."""
        if index == self.base_index:
            return self.base_term
        place = index - self.base_index - 1
        return self._terms[place] if 0 <= place < len(self._terms) else None

    # Changing.

    def append(self, records: Sequence[log.Record]) -> None:
        """Write records at the end, without making them durable; those that are there already, or went into
        the base, are left out.

        Raises `ValueError` if they do not follow. After any error nothing is there that was not synced.
        """
        self._check()
        later = (record for record in records if record.index > self.base_index)
        fresh = [record for record in later if self.term(record.index) != record.term]
        if not fresh:
            return
        if fresh[0].index != self.last_index + 1:
            raise ValueError(f"record {fresh[0].index} does not follow record {self.last_index} of the log")
        parts = log.encode_all(fresh)
        try:
            _write_at(self._fd, b"".join(parts), self._end)
        except OSError as error:
            self.undo()
            raise unwritable(self.path, error) from None
        for record, part in zip(fresh, parts, strict=True):
            self._terms.append(record.term)
            self._offsets.append(self._end)
            self._end += len(part)

    def undo(self) -> None:
        """Take back what was appended since the last `sync`."""
        if len(self._offsets) > self._synced:
            self._end = self._offsets[self._synced]
            del self._offsets[self._synced :], self._terms[self._synced :]
        try:
            os.ftruncate(self._fd, self._end)
        except OSError as error:
            raise self._fail(f"could not be shortened after a failed write: {error.strerror}") from None

    def sync(self) -> None:
        """Make everything durable that was appended."""
        self._check()
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise self._fail(f"could not be made durable: {error.strerror}") from None
        self._synced = len(self._offsets)

    def truncate(self, index: int) -> None:
        """Take the records from `index` on away, durably; those of the base cannot go (`ValueError`)."""
        self._check()
        if index > self.last_index:
            return
        place = index - self.base_index - 1
        if place < 0:
            raise ValueError(
                f"record {index} is not in the log any more, which begins after {self.base_index}"
            )
        self._end = self._offsets[place]
        del self._offsets[place:], self._terms[place:]
        self._synced = min(self._synced, place)
        try:
            os.ftruncate(self._fd, self._end)
        except OSError as error:
            raise self._fail(f"could not be shortened: {error.strerror}") from None
        self.sync()

    def begin_after(self, index: int, term: int) -> None:
        """Forget everything up to record `index`, of `term`: it is the base now.

        Records behind it stay if the log holds that record, else none do.
        """
        self._check()
        if index == self.base_index and term == self.base_term:
            return
        keeps = self.term(index) == term
        place = index - self.base_index if keeps else len(self._offsets)
        start = self._offsets[place] if place < len(self._offsets) else self._end
        try:
            replace_file(self.path, [log.header(index, term), *self._read(start)], 0o600)
            fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise unwritable(self.path, error) from None
        os.close(self._fd)
        self._fd = fd
        moved = start - log.HEADER_SIZE
        self.base_index, self.base_term = index, term
        self._offsets = [offset - moved for offset in self._offsets[place:]]
        self._terms = self._terms[place:]
        self._end -= moved
        self._synced = len(self._offsets)

    def _read(self, start: int) -> list[bytes]:
        return [os.pread(self._fd, min(_COPY, self._end - at), at) for at in range(start, self._end, _COPY)]

    def _check(self) -> None:
        if self._failed is not None:
            raise self._failed

    def _fail(self, what: str) -> OperationError:
        self._failed = OperationError(
            "failed", f"{self.path} {what}", "start the peer again once its disk works"
        )
        return self._failed

    def close(self) -> None:
        os.close(self._fd)


def _write_at(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
