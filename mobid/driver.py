# SPDX-License-Identifier: Apache-2.0
"""The driver of a peer's machine: gives it events in order and carries out what it wants.

An event is handled where it arises, at once and without waiting, so that events have one order. Messages go
to the mail, timers wait for CLOCK_BOOTTIME, and writes go to one task that makes all durable that has come
up while the disk was busy, with one fsync, and then says so to the machine. On a full disk that task tries
again until there is room; whatever else is wrong with the disk ends the peer, and its guests go on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import structlog
import trio

from mobid.lease import boottime
from mobid.signal import Changed
from mobid.store import Store
from proto import messages
from proto.api import OperationError
from proto.machine import Persisted, Send, WakeAt, Woken
from proto.peer_events import Effect, Event
from proto.raft.coalesce import coalesce
from proto.raft.events import Persist, Received

LONGEST_SLEEP = 1.0
"""Seconds between two looks at the clock: trio's clock stops while a host sleeps, CLOCK_BOOTTIME does not."""

ROOM_PAUSE = 0.5

log = structlog.get_logger()


class Machine(Protocol):
    """What is driven (`proto.peer.Peer`)."""

    def handle(self, event: Any, now: float) -> Any: ...


class Driver:
    """Owns a machine and its store while `run` runs."""

    def __init__(
        self,
        machine: Machine,
        store: Store,
        send: Callable[[str, bytes], None],
        deliver: Callable[[Effect], None],
    ) -> None:
        """`send(peer, data)` posts a message; `deliver` takes every effect that is not carried out here."""
        self._machine = machine
        self._store = store
        self._send = send
        self._deliver = deliver
        self._events: deque[Event] = deque()
        self._handling = False
        self._timers: dict[str, float] = {}
        self._sleeping_until = 0.0
        self._rescheduled = trio.Event()
        self._writes: deque[Persist] = deque()
        self._asked = Changed()
        self._outgoing: dict[str, list[Any]] = {}
        self._posting = Changed()
        self._broken = trio.Event()
        self._error: Exception | None = None
        self._one = trio.CapacityLimiter(1)
        self.full: OperationError | None = None
        """What is wrong while the disk is full."""
        self.filled = Changed()
        """Set when the disk is found to be full, again and again as long as it is."""

    # Events and effects.

    def feed(self, event: Event) -> None:
        """Let the machine handle an event, and carry out what it answers; never waits."""
        self._events.append(event)
        if self._handling:
            return
        self._handling = True
        try:
            while self._events and self._error is None:
                self._handle(self._events.popleft())
        finally:
            self._handling = False

    def receive(self, peer: str, data: bytes) -> None:
        """A message came from a member; what cannot be understood is dropped."""
        try:
            message = messages.decode(data)
        except messages.MessageError as error:
            log.warning("message.dropped", peer=peer, reason=str(error))
            return
        self.feed(Received(peer, message))

    def _handle(self, event: Event) -> None:
        try:
            effects = self._machine.handle(event, boottime())
            for effect in effects:
                self._carry_out(effect)
        except Exception as error:
            # A mistake in the machine: what it knows cannot be trusted any more.
            log.exception("machine.broken", of=_shown(event))
            self._error = error
            self._broken.set()

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Send(peer, message):
                self._outgoing.setdefault(peer, []).append(message)
                self._posting.set()
            case WakeAt(timer, at):
                self._timers[timer] = at
                if at < self._sleeping_until:
                    self._rescheduled.set()
            case Persist():
                self._writes.append(effect)
                self._asked.set()
            case _:
                self._deliver(effect)

    # Tasks.

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Drive the machine; raises what it raised, or `OperationError` if the disk fails."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_time)
            nursery.start_soon(self._write)
            nursery.start_soon(self._post)
            task_status.started()
            await self._broken.wait()
            assert self._error is not None
            raise self._error

    async def _keep_time(self) -> None:
        while True:
            now = boottime()
            for timer, at in sorted(self._timers.items(), key=lambda item: item[1]):
                if at <= now and self._timers.get(timer) == at:
                    del self._timers[timer]
                    self.feed(Woken(timer))
            now = boottime()
            self._sleeping_until = min(
                min(self._timers.values(), default=now + LONGEST_SLEEP), now + LONGEST_SLEEP
            )
            self._rescheduled = trio.Event()
            with trio.move_on_after(max(0.0, self._sleeping_until - now)):
                await self._rescheduled.wait()

    async def _post(self) -> None:
        """Send what has come up since this task last ran: what one moment brings, goes together."""
        while True:
            await self._posting.wait_until(lambda: bool(self._outgoing))
            outgoing, self._outgoing = self._outgoing, {}
            for peer, waiting in outgoing.items():
                for message in coalesce(waiting):
                    try:
                        self._send(peer, messages.encode(message))
                    except OperationError as error:
                        log.error("message.not.sent", peer=peer, reason=error.message)

    async def _write(self) -> None:
        while True:
            await self._asked.wait_until(lambda: bool(self._writes))
            batch = list(self._writes)
            try:
                await trio.to_thread.run_sync(
                    self._store.write, [write.data for write in batch], limiter=self._one
                )
            except OperationError as error:
                if error.code != "no-room":
                    raise
                if self.full is None:
                    log.error("disk.full", reason=error.message)
                self.full = error
                self.filled.set()
                await trio.sleep(ROOM_PAUSE)
                continue
            self.full = None
            for write in batch:
                self._writes.popleft()
                self.feed(Persisted(write.key))


def _shown(event: Event) -> str:
    """An event for the log. Messages carry records and parts of the state, and these hold keys."""
    if isinstance(event, Received):
        return f"{type(event.message).__name__} from {event.peer}"
    return repr(event)[:4000]
