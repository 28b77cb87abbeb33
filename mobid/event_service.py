# SPDX-License-Identifier: Apache-2.0
"""The operation `events`: this peer's events, or those of the whole mesh in one order (`proto.event_order`).

Who follows the mesh has a stream from every member, itself included. Such a stream carries the member's
events and, between them, heartbeats with its clock; the follower sends its own clock back, so that a host
whose time is behind does not hold up the others. A stream that breaks is made again from where it was.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, suppress
from typing import Any, Protocol

import structlog
import trio

from mobid.events import Events
from mobid.operations import Request, operation
from mobid.signal import Changed
from mobid.stamps import HybridClock
from mobid.tasks import background
from proto import api
from proto.api import OperationError
from proto.event_order import Merge

HEARTBEAT = 0.25
HOLD = 2.0
"""Seconds for which a silent member holds up the others' events to a follower."""
PAST_HOLD = 10.0
"""The same for who only wants the past: it may be long."""
CONNECT_TIMEOUT = 2.0
FIRST_PAUSE = 0.2
LONGEST_PAUSE = 2.0

log = structlog.get_logger()


class Streaming(Protocol):
    """A request under way at another peer."""

    def __aiter__(self) -> AsyncIterator[dict[str, Any]]: ...

    async def send(self, value: dict[str, Any]) -> None: ...


class Links(Protocol):
    """What the operation needs of the links."""

    def stream(
        self, peer: str, op: str, args: api.Arguments, timeout: float
    ) -> AbstractAsyncContextManager[Streaming]: ...


class EventService:
    """`events` at this peer. `members()` gives the mesh's peers, id to name."""

    def __init__(
        self, events: Events, clock: HybridClock, links: Links, members: Callable[[], dict[str, str]]
    ) -> None:
        self._events = events
        self._clock = clock
        self._links = links
        self._members = members

    @operation("events", role="viewer", args=api.Events, timeout=None)
    async def events(self, request: Request, args: api.Events) -> None:
        """Past events in their order, then, with `follow`, new ones as they come."""
        if args.local:
            await self._local(request, args)
        else:
            await _Merged(self._events, self._clock, self._links, self._members).answer(request, args)

    async def _local(self, request: Request, args: api.Events) -> None:
        """Events and heartbeats of this peer; inputs are `{stamp}`, the follower's clock."""
        position, before = args.after.get(self._events.id, 0), self._events.newest
        for event in self._events.since(args.since, position):
            position = event["stamp"]
            await request.item(event)
        if not args.follow:
            return
        position = max(position, before)
        async with background(lambda: self._witness(request)):
            while True:
                newer, stamp = self._events.newer(position)
                for event in newer:
                    position = event["stamp"]
                    await request.item(event)
                await request.item({"heartbeat": stamp})
                with trio.move_on_after(HEARTBEAT):
                    await self._events.wait_newer(position)

    async def _witness(self, request: Request) -> None:
        while True:
            stamp = (await request.input()).get("stamp")
            if isinstance(stamp, int):
                self._clock.witness(stamp)


class _Merged:
    """One follower of the whole mesh."""

    def __init__(
        self, events: Events, clock: HybridClock, links: Links, members: Callable[[], dict[str, str]]
    ) -> None:
        self._events = events
        self._clock = clock
        self._links = links
        self._members = members
        self._heard = Changed()
        self._news = True
        self._lost: list[str] = []
        self._begun = trio.current_time()
        self._followed: dict[str, trio.CancelScope] = {}

    async def answer(self, request: Request, args: api.Events) -> None:
        """Until the past is told, or for ever."""
        self._merge = Merge(HOLD if args.follow else PAST_HOLD)
        async with background() as nursery:
            while True:
                self._news = False
                self._follow_members(nursery, args)
                await self._tell(request)
                if self._merge.ended and not args.follow:
                    return
                with trio.move_on_after(HEARTBEAT):
                    await self._heard.wait_until(lambda: self._news)

    def _follow_members(self, nursery: trio.Nursery, args: api.Events) -> None:
        members = self._members()
        for peer in members.keys() - self._followed.keys():
            self._followed[peer] = trio.CancelScope()
            self._merge.expect(peer, trio.current_time(), args.after.get(peer, 0))
            nursery.start_soon(self._keep_stream, peer, args)
        for peer in self._followed.keys() - members.keys():
            self._followed.pop(peer).cancel()
            self._merge.end(peer)

    async def _tell(self, request: Request) -> None:
        """Send what is due, and name the members that are silent."""
        now = trio.current_time()
        missing, self._lost = self._merge.silent(now) + self._lost, []
        for event, late in self._merge.release(now, self._clock.limit):
            await request.item({**event, "late": True} if late else event)
        for peer in missing:
            name = self._members().get(peer, peer)
            await request.item({"remark": f"{name} is silent: events of it may be missing", "missing": name})

    async def _keep_stream(self, peer: str, args: api.Events) -> None:
        pause = FIRST_PAUSE
        with self._followed[peer]:
            while True:
                position = self._merge.position(peer)
                try:
                    await self._stream(peer, args, position)
                except OperationError as error:
                    log.info("events.incomplete", peer=peer, reason=error.message)
                    if not args.follow:
                        self._lost.append(peer)
                if not args.follow:
                    self._merge.end(peer)
                    self._wake()
                    return
                pause = (
                    FIRST_PAUSE if self._merge.position(peer) > position else min(2 * pause, LONGEST_PAUSE)
                )
                await trio.sleep(pause)

    async def _stream(self, peer: str, args: api.Events, position: int) -> None:
        since = None if args.since is None else args.since + trio.current_time() - self._begun
        asked = api.Events(since=since, follow=args.follow, local=True, after={peer: position})
        async with (
            self._links.stream(peer, "events", asked, timeout=CONNECT_TIMEOUT) as stream,
            background(*([lambda: self._send_clock(stream)] if args.follow else [])),
        ):
            async for item in stream:
                self._take(peer, item)

    def _take(self, peer: str, item: dict[str, Any]) -> None:
        now = trio.current_time()
        stamp = item.get("heartbeat", item.get("stamp"))
        if not isinstance(stamp, int):
            return
        self._clock.witness(stamp)
        if "heartbeat" in item:
            self._merge.heartbeat(peer, stamp, now)
        else:
            self._merge.event(peer, stamp, item, now)
        self._wake()

    def _wake(self) -> None:
        self._news = True
        self._heard.set()

    async def _send_clock(self, stream: Streaming) -> None:
        with suppress(OperationError):
            while True:
                await stream.send({"stamp": self._clock.now()})
                await trio.sleep(HEARTBEAT)
