# SPDX-License-Identifier: Apache-2.0
"""What both ends of a live migration share: the loop that feeds a handover machine and does what it wants.

Events come from many sides (helpers, the log, the other peer, timers); one task takes them one by one, so the
machine is never entered twice. Effects are carried out in the order given. Those that take long and have an
event for an answer run as tasks of their own; those that must be true before the next effect (a note on disk,
a thaw) are waited for.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import structlog
import trio

from mobid.breakpoints import Breakpoints
from mobid.catalog import Catalog
from mobid.events import Events
from mobid.guests import Guests
from mobid.helpers import Helpers
from mobid.identity import Identity
from mobid.links import Links
from mobid.migration_notes import Notes
from mobid.signal import Changed
from proto import entries
from proto import handover_events as ev
from proto.api import OperationError
from proto.handover import Destination, Source
from proto.machine import Persist, Persisted, Send, WakeAt, Woken
from proto.state import State

QUEUE = 256
MOST_FIGURES = 2000
PROPOSE_TIMEOUT = 5.0

log = structlog.get_logger()


@dataclass(frozen=True)
class Frames:
    """Frames for a guest that were kept while it was frozen, and those for which there was no room."""

    held: int
    lost: int


class Moves(Protocol):
    """The part of `networks` that a move needs. `guest` is LAB/NAME, with all of its interfaces.

    None of these is undone by the guest's keeper; errors are `OperationError` or `HelperError`.
    """

    async def opened(self, migration: entries.Migration) -> None:
        """Any peer: return when the switch here takes the guest's frames from the destination too."""
        ...

    async def hold(self, guest: str) -> None:
        """Source, before the freeze: keep frames for this guest."""
        ...

    async def unhold(self, guest: str) -> None:
        """Source, after a thaw: deliver what was kept."""
        ...

    async def redirect(self, guest: str, peer: str, epoch: int) -> None:
        """Source: the guest runs at `peer` (an id) now; what was kept and still comes goes there."""
        ...

    async def expect(self, guest: str, source: str, epoch: int) -> None:
        """Destination, before the resume: take what `source` redirects, keep the order."""
        ...

    async def announce(self, guest: str) -> None:
        """Destination: the guest runs here."""
        ...

    async def frames(self, guest: str) -> Frames:
        """What was kept and lost at this peer since `hold`."""
        ...


@dataclass(frozen=True)
class Surroundings:
    """What migrations are carried out with."""

    identity: Identity
    catalog: Catalog
    links: Links
    events: Events
    helpers: Helpers
    guests: Guests
    moves: Moves
    notes: Notes
    sockets: Path
    logs: Path
    breakpoints: Breakpoints = field(default_factory=Breakpoints)


class Shell(ABC):
    """Carries out one machine. `run` lasts until the machine is over.

    Before every effect there is a breakpoint, `SIDE.EFFECT`.
    """

    side: Literal["source", "destination"]

    def __init__(
        self, around: Surroundings, migration: entries.Migration, machine: Source | Destination
    ) -> None:
        self.around = around
        self.migration = migration
        self.machine = machine
        self.changed = Changed()
        """Set after every event."""
        self.over: ev.Over | None = None
        self.finished = trio.Event()
        self.items: list[dict[str, Any]] = []
        """What happened, for whoever watches."""
        self._inbox_in, self._inbox = trio.open_memory_channel[ev.Event](QUEUE)
        self._nursery: trio.Nursery | None = None
        self._wake = trio.CancelScope()

    def feed(self, event: ev.Event) -> None:
        """Tell the machine; never blocks. What does not fit into the queue is repeated by whoever cares."""
        try:
            self._inbox_in.send_nowait(event)
        except trio.WouldBlock:
            log.error("migration.queue.full", migration=self.migration.id, of=str(event))

    async def run(self, first: ev.Event) -> None:
        """From `first` (`Begin` or `Adopted`) to the end."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self.follow_log)
                await self._take(first)
                async for event in self._inbox:
                    await self._take(event)
                    if self.over is not None:
                        break
                nursery.cancel_scope.cancel()
            if self.over is not None:
                await self.finish(self.over)
        finally:
            with trio.CancelScope(shield=True):
                await self.close()
            self.finished.set()
            self.changed.set()

    @abstractmethod
    async def finish(self, over: ev.Over) -> None:
        """Hand the guest back to where it belongs."""

    @abstractmethod
    async def close(self) -> None:
        """End the processes of this migration, also after a cancellation."""

    @abstractmethod
    async def perform(self, effect: ev.Effect) -> None:
        """Carry out an effect that is not common to both ends."""

    async def _take(self, event: ev.Event) -> None:
        before = self.machine.state
        effects = self.machine.handle(event, trio.current_time())
        now = self.machine.state
        self.changed.set()
        for effect in effects:
            await self.around.breakpoints.reached(f"{self.side}.{type(effect).__name__}")
            await self._perform_common(effect)
        if before != now:  # told afterwards: a guest may be standing still
            log.info("migration.step", id=self.migration.id, was=str(before), now=str(now))

    async def _perform_common(self, effect: ev.Effect) -> None:
        match effect:
            case Persist(_, note):
                await trio.to_thread.run_sync(self.around.notes.put, self.migration.id, note)
                self.feed(Persisted(self.migration.id))
            case WakeAt(timer, at):
                self._wake.cancel()
                self._wake = trio.CancelScope()
                self.soon(lambda: self._wake_at(timer, at, self._wake))
            case ev.Propose(entry):
                self.soon(lambda: self._propose(entry))
            case ev.Over():
                self.over = effect
            case Send(peer, message):
                self.soon(lambda: self.send(peer, message))
            case _:
                await self.perform(effect)

    def soon(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run `work` as a task of this migration."""
        assert self._nursery is not None
        self._nursery.start_soon(work)

    async def _wake_at(self, timer: str, at: float, scope: trio.CancelScope) -> None:
        with scope:
            await trio.sleep_until(at)
            self.feed(Woken(timer))

    async def _propose(self, entry: entries.Entry) -> None:
        try:
            await self.around.catalog.propose(entry, timeout=PROPOSE_TIMEOUT)
        except OperationError as error:
            # Whether it became true is heard from the log; until then the machine asks again.
            log.info("migration.not.proposed", id=self.migration.id, entry=entry, reason=error.message)

    @abstractmethod
    async def send(self, peer: str, message: object) -> None:
        """Send a message of the handover; it may be lost."""

    async def follow_log(self) -> None:
        """Tell the machine when the log closes the migration."""

        def closed(state: State) -> bool:
            known = state.migrations.get(self.migration.id)
            return known is not None and known.state != "open"

        state = await self.around.catalog.wait(closed, timeout=None)
        self.feed(ev.Logged(state.migrations[self.migration.id].state))

    def say(self, **item: Any) -> None:
        """Tell whoever watches; figures of a pass under way are left out when there are very many."""
        if "done_bytes" not in item or len(self.items) < MOST_FIGURES:
            self.items.append(item)
            self.changed.set()

    async def watch(self) -> AsyncGenerator[dict[str, Any], None]:
        """Every item from the first on, until the migration is over here."""
        position = 0
        while True:
            while position < len(self.items):
                position += 1
                yield self.items[position - 1]
            if self.finished.is_set():
                return
            await self.changed.wait()

    async def until(self, predicate: Callable[[], bool], timeout: float = math.inf) -> bool:
        """Wait until `predicate` holds, looking after every event; False after `timeout` seconds."""
        with trio.move_on_after(timeout):
            await self.changed.wait_until(predicate)
            return True
        return False
