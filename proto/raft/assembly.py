# SPDX-License-Identifier: Apache-2.0
"""A snapshot that comes in parts: put together here, one at a time, of one sender.

Parts of two senders are not mixed, since two encodings of one state need not be equal byte by byte. What is
missing is asked for by saying how much is here, so a transfer goes on where it stopped.
"""

from __future__ import annotations

from dataclasses import dataclass

from proto.raft.configuration import Configuration
from proto.raft.events import Snapshot
from proto.raft.messages import SnapshotPart

MAX_SNAPSHOT = 1 << 30
"""Bytes of the largest snapshot that is taken."""


@dataclass(slots=True)
class _Pieces:
    peer: str
    index: int
    term: int
    size: int
    configuration: Configuration
    data: bytearray


class Assembly:
    """The snapshot being received."""

    def __init__(self) -> None:
        self._pieces: _Pieces | None = None

    @property
    def peer(self) -> str:
        """Who sent what is here of a snapshot; "" if there is nothing."""
        return self._pieces.peer if self._pieces else ""

    def received(self, peer: str) -> int:
        """How many bytes of this sender's are here."""
        return len(self._pieces.data) if self._pieces and self._pieces.peer == peer else 0

    def add(self, peer: str, part: SnapshotPart, commit: int) -> tuple[int | None, Snapshot | None]:
        """How many bytes to say are here (None: the part makes no sense), and the snapshot if it is whole.

        A snapshot that is not beyond `commit` is of no use, and said to be here.
        """
        end = part.offset + len(part.data)
        if not 0 <= part.offset <= end <= part.size <= MAX_SNAPSHOT or not part.configuration.voters:
            return None, None
        if part.index <= commit:
            return part.size, None
        pieces = self._pieces
        if pieces is None or (pieces.peer, pieces.index, pieces.term, pieces.size) != (
            peer,
            part.index,
            part.last_term,
            part.size,
        ):
            if part.offset:
                return 0, None
            pieces = _Pieces(peer, part.index, part.last_term, part.size, part.configuration, bytearray())
            self._pieces = pieces
        if part.offset == len(pieces.data):
            pieces.data += part.data
        if len(pieces.data) < pieces.size:
            return len(pieces.data), None
        self._pieces = None
        snapshot = Snapshot(pieces.index, pieces.term, pieces.configuration, bytes(pieces.data))
        return pieces.size, snapshot
