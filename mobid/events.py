# SPDX-License-Identifier: Apache-2.0
"""The event log of a peer: what happened, one JSON object a line, kept within bounds.

Events are for people and reports ("guest crashed", "migration ended"); nothing is decided by them, so they
are written without fsync. The file is rotated once (`events.ndjson`, `events.ndjson.1`), which bounds what
is kept. Each event has a stamp of the peer's hybrid logical clock, larger than those before: with the peer's
id it names the event, and it says where the event stands among those of other peers.

What happened before this peer came to its present mesh stays in the file, and is told to nobody: it belongs
to another mesh.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import structlog

from mobid.signal import Changed
from mobid.stamps import HybridClock
from proto.jsontext import parse_json

LIMIT = 4 << 20
"""Bytes in one file before it is rotated; two are kept."""

BACKLOG = 1000
"""Events kept in memory for those who follow; one who is further behind reads the file."""

COMING = ("mesh.founded", "mesh.joined")
"""The events with which a peer comes to a mesh, their `mesh`."""

log = structlog.get_logger()
_encode = json.JSONEncoder(default=str, separators=(",", ":")).encode


class Events:
    """Where every part reports what a person may want to know.

    `id` is this peer's, `peer` its name. An event is `{time, peer, kind, peer_id, stamp, …}`.
    """

    def __init__(self, path: Path, id: str, peer: str, clock: HybridClock) -> None:
        self.id = id
        self.peer = peer
        self.changed = Changed()
        """Set after every event."""
        self._path = path
        self._clock = clock
        self._recent: list[dict[str, Any]] = []
        self._newest = 0
        self._mesh: str | None = None
        self._before = -1
        """No event up to this stamp is of the present mesh."""
        for event in self.since(None):
            self._note(event)
        self._forgotten = self._newest
        """The stamp of the newest event that is only on disk."""
        clock.witness(self._newest)
        self._file = path.open("ab", buffering=0)
        self._writable = True

    def _note(self, event: dict[str, Any]) -> None:
        if event.get("kind") in COMING and event.get("mesh") != self._mesh:
            self._mesh, self._before = event.get("mesh"), event["stamp"] - 1
        self._newest = max(self._newest, event["stamp"])

    def emit(self, kind: str, **facts: Any) -> None:
        """Record that something happened now. `kind` is `noun.verb`, like `guest.exited`.

        No secrets in `facts`.
        """
        stamp = self._clock.now()
        time = self._clock.wall()
        event = {"time": time, "peer": self.peer, "kind": kind, "peer_id": self.id, "stamp": stamp}
        event |= facts
        self._note(event)
        line = _encode(event).encode() + b"\n"
        self._recent.append(event)
        if len(self._recent) > BACKLOG:
            self._forgotten = self._recent.pop(0)["stamp"]
        self.changed.set()
        try:
            self._write(line)
            self._writable = True
        except OSError as error:
            # A full disk must not stop the peer; followers still get the event from memory.
            if self._writable:
                log.warning("events.not.written", file=str(self._path), reason=str(error))
            self._writable = False

    def _write(self, line: bytes) -> None:
        if self._file.tell() + len(line) > LIMIT:
            with suppress(FileNotFoundError):  # it was renamed, and then the new one could not be opened
                os.replace(self._path, self._path.with_name(self._path.name + ".1"))
            full, self._file = self._file, self._path.open("ab", buffering=0)
            full.close()
        self._file.write(line)

    def since(self, seconds: float | None, after: int = 0) -> Iterator[dict[str, Any]]:
        """The present mesh's events on disk that are not older than this (None: all) and have stamps above
        `after`, oldest first. Broken lines are left out.
        """
        after = max(after, self._before)
        earliest = 0.0 if seconds is None else self._clock.wall() - seconds
        for path in (self._path.with_name(self._path.name + ".1"), self._path):
            if not path.exists():
                continue
            with path.open("rb") as file:
                for line in file:
                    try:
                        event = parse_json(line)
                        if event["time"] >= earliest and event["stamp"] > after:
                            yield event
                    except (ValueError, KeyError, TypeError):
                        continue

    def newer(self, after: int) -> tuple[list[dict[str, Any]], int]:
        """The events with stamps above `after`, and a stamp below which there will be no others."""
        after = max(after, self._before)
        if after >= self._forgotten:
            found = [event for event in self._recent if event["stamp"] > after]
        else:
            found = list(self.since(None, after))
        return found, self._clock.now()

    async def wait_newer(self, after: int) -> None:
        """Until there is an event with a stamp above `after`."""
        await self.changed.wait_until(lambda: self._newest > after)

    @property
    def newest(self) -> int:
        """The stamp of the newest event."""
        return self._newest

    def close(self) -> None:
        self._file.close()
