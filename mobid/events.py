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
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import structlog
import trio

from mobid.operations import Request, operation
from mobid.signal import Changed
from mobid.tasks import background
from proto import api
from proto.api import OperationError

LIMIT = 4 << 20
"""Bytes in one file before it is rotated; two are kept."""

MERGE_TIMEOUT = 10.0
RETRY_PAUSE = 2.0

BACKLOG = 1000
"""Events kept for those who follow; a follower further behind misses the ones between."""

log = structlog.get_logger()


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

    def follow(self) -> AsyncIterator[dict[str, Any]]:
        """Every event from this call on, for ever."""
        return self._follow(self._count)

    async def _follow(self, seen: int) -> AsyncIterator[dict[str, Any]]:
        while True:
            while self._count == seen:
                await self._changed.wait()
            missing = min(self._count - seen, len(self._recent))
            seen = self._count
            for event in self._recent[len(self._recent) - missing :]:
                yield event

    def close(self) -> None:
        self._file.close()


class Streaming(Protocol):
    """What the operation needs of the links."""

    def stream(self, peer: str, op: str, args: api.Arguments) -> Any: ...


class EventService:
    """The operation `events`: this peer's events, or those of the whole mesh merged."""

    def __init__(self, events: Events, links: Streaming, members: Callable[[], dict[str, str]]) -> None:
        """`members()` gives the mesh's peers, id to name."""
        self._events = events
        self._links = links
        self._members = members

    @operation("events", role="viewer", args=api.Events, timeout=None)
    async def events(self, request: Request, args: api.Events) -> None:
        """Past events in the order of their time, then, with `follow`, new ones as they come."""
        if args.local:
            await self._local(request, args)
        else:
            await self._merged(request, args)

    async def _local(self, request: Request, args: api.Events) -> None:
        following = self._events.follow() if args.follow else None
        for event in self._events.since(args.since):
            await request.item(event)
        if following is not None:
            async for event in following:
                await request.item(event)

    async def _merged(self, request: Request, args: api.Events) -> None:
        past: list[dict[str, Any]] = []
        async with trio.open_nursery() as nursery:
            for peer in self._members():
                nursery.start_soon(self._collect, peer, args.since, past)
        for event in sorted(past, key=lambda event: float(event.get("time", 0.0))):
            await request.item(event)
        if args.follow:
            pumps = [self._pump(peer, request) for peer in self._members()]
            async with background(*pumps):
                await trio.sleep_forever()

    async def _collect(self, peer: str, since: float | None, past: list[dict[str, Any]]) -> None:
        with trio.move_on_after(MERGE_TIMEOUT):
            try:
                asked = api.Events(since=since, local=True)
                async with self._links.stream(peer, "events", asked) as stream:
                    async for event in stream:
                        past.append(event)
            except OperationError as error:
                log.info("events.incomplete", peer=peer, reason=error.message)

    def _pump(self, peer: str, request: Request) -> Callable[[], Awaitable[None]]:
        async def pump() -> None:
            asked = api.Events(since=0.0, follow=True, local=True)
            while True:
                try:
                    async with self._links.stream(peer, "events", asked) as stream:
                        async for event in stream:
                            await request.item(event)
                except OperationError as error:
                    log.info("events.incomplete", peer=peer, reason=error.message)
                await trio.sleep(RETRY_PAUSE)

        return pump
