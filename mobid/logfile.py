# SPDX-License-Identifier: Apache-2.0
"""The catalog's log as a file: read once at the start, then only appended to.

`append` returns after fsync, so what it was given survives a power cut. When the disk is full nothing of
the batch stays behind and the log goes on later; when fsync itself fails nobody knows what is on the disk
any more (the kernel may have dropped the pages), so the log refuses everything until the peer is started
again and reads what is really there.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from mobid.config import sync_directory
from proto import log
from proto.api import OperationError


class LogFile:
    """Owns the open file. All methods block; call `append` from a thread."""

    def __init__(self, path: Path) -> None:
        """Open or make the log; cuts a torn tail. Raises `OperationError` if it is damaged."""
        self.path = path
        self._failed = ""
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            scan = log.scan(path.read_bytes(), str(path))
            self.records = scan.records
            self._end = scan.end
            self.torn = os.fstat(self._fd).st_size - scan.end
            os.ftruncate(self._fd, self._end)
            if self._end == 0:
                os.pwrite(self._fd, log.MAGIC, 0)
                self._end = len(log.MAGIC)
            os.fsync(self._fd)
            sync_directory(path.parent)
        except BaseException:
            os.close(self._fd)
            raise

    def append(self, records: Sequence[log.Record]) -> None:
        """Make the records durable, all or none; raises `OperationError` (`no-room`, `failed`)."""
        if self._failed:
            raise OperationError("failed", self._failed, "start the peer again once its disk works")
        data = b"".join(log.encode(record) for record in records)
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(self._fd, data[written:], self._end + written)
        except OSError as error:
            self._undo()
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise OperationError(
                "no-room" if full else "failed",
                f"{self.path} cannot be written: {error.strerror}",
                "make room on the disk" if full else "",
            ) from None
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            self._failed = f"{self.path} could not be made durable: {error.strerror}"
            raise OperationError("failed", self._failed, "start the peer again once its disk works") from None
        self._end += len(data)

    def _undo(self) -> None:
        try:
            os.ftruncate(self._fd, self._end)
        except OSError as error:
            self._failed = f"{self.path} could not be shortened after a failed write: {error.strerror}"

    def close(self) -> None:
        os.close(self._fd)
