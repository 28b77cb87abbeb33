# SPDX-License-Identifier: Apache-2.0
"""The event log of a peer: what happened, one JSON object a line, kept within bounds.

Events are for people and reports ("guest crashed", "migration ended"); nothing is decided by them, so they
are written without fsync. The file is rotated once (`events.ndjson`, `events.ndjson.1`), which bounds what
is kept.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

from mobid.signal import Changed

LIMIT = 4 << 20
"""Bytes in one file before it is rotated; two are kept."""

BACKLOG = 1000
"""Events kept for those who follow; a follower further behind misses the ones between."""


class Events:
    """Where every part reports what a person may want to know. `peer` is this peer's name."""

    def __init__(self, path: Path, peer: str, clock: Callable[[], float] = time.time) -> None:
        self.peer = peer
        self._path = path
        self._clock = clock
        self._recent: list[dict[str, Any]] = []
        self._count = 0
        self._changed = Changed()
        self._file = path.open("ab", buffering=0)

    def emit(self, kind: str, **facts: Any) -> None:
        """Record that something happened now. `kind` is `noun.verb`, like `guest.exited`.

        No secrets in `facts`.
        """
        event = {"time": self._clock(), "peer": self.peer, "kind": kind, **facts}
        line = json.dumps(event, default=str, separators=(",", ":")).encode() + b"\n"
        self._recent.append(event)
        del self._recent[:-BACKLOG]
        self._count += 1
        self._changed.set()
        try:
            self._write(line)
        except OSError:
            # A full disk must not stop the peer; followers still get the event from memory.
            return

    def _write(self, line: bytes) -> None:
        if self._file.tell() + len(line) > LIMIT:
            self._file.close()
            os.replace(self._path, self._path.with_name(self._path.name + ".1"))
            self._file = self._path.open("ab", buffering=0)
        self._file.write(line)

    def since(self, seconds: float | None) -> Iterator[dict[str, Any]]:
        """The events on disk that are not older than this (None: all), oldest first.

        Broken lines are left out.
        """
        earliest = 0.0 if seconds is None else self._clock() - seconds
        for path in (self._path.with_name(self._path.name + ".1"), self._path):
            if not path.exists():
                continue
            with path.open("rb") as file:
                for line in file:
                    try:
                        event = json.loads(line)
                    except ValueError:
                        continue
                    if isinstance(event, dict) and event.get("time", 0.0) >= earliest:
                        yield event

    async def follow(self) -> AsyncIterator[dict[str, Any]]:
        """Every event from now on, for ever."""
        seen = self._count
        while True:
            while self._count == seen:
                await self._changed.wait()
            missing = min(self._count - seen, len(self._recent))
            seen = self._count
            for event in self._recent[len(self._recent) - missing :]:
                yield event

    def close(self) -> None:
        self._file.close()
