# SPDX-License-Identifier: Apache-2.0
"""All guests that live at this peer, and the loops that make them what the catalog wants.

Each guest has a *keeper*, one task that compares wanted with actual (`proto.reconcile`), takes one step,
reports what came of it to the catalog, and waits until something changed. No command acts on a guest
directly: `vm stop` changes what is wanted, and the keeper sees it. So a command, a crash and a restarted peer
all take the same path, and never two tasks work on one guest. A migration takes a guest out of its keeper's
hands with `hold`.

Before a guest is started its owner reports `starting` to the catalog, which refuses that of anybody who has
not the right to run it; a peer that was away and missed a move therefore cannot start a second copy.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog
import trio

from mobid import host
from mobid.catalog import Catalog
from mobid.config import Config
from mobid.events import Events
from mobid.guest import LocalGuest, Ports, Surroundings, remove_rests
from mobid.guest_keeper import Keeper, record_of
from mobid.guest_lease import Renewals, entitled
from mobid.guest_record import Record, told_digest
from mobid.helpers import Helpers
from mobid.images import Images
from mobid.lease import Lease
from mobid.signal import Changed
from mobid.stale_guests import keep_aside, stood_for
from proto import deploy, entries
from proto.api import OperationError
from proto.handover import right_after_failover
from proto.reconcile import missing_features
from proto.state import State
from proto.units import format_size

logger = structlog.get_logger(__name__)

END_TIMEOUT = 60.0
KEEPER_PAUSE = 3.0


class Guests:
    """The guests of this peer. `me` is its id."""

    def __init__(
        self,
        *,
        config: Config,
        me: str,
        catalog: Catalog,
        events: Events,
        helpers: Helpers,
        images: Images,
        ports: Ports,
        lease: Lease,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.me = me
        self.catalog = catalog
        self.events = events
        self.images = images
        self.lease = lease
        self.around = Surroundings(helpers, ports, config.guests, config.runtime, lease, self.entitled)
        self.processor = host.processor()
        self.clock = clock
        self.adopted = trio.Event()
        """Set once the guests of an earlier process were taken back."""
        self._begun = clock()
        self._keepers: dict[str, Keeper] = {}
        self._nursery: trio.Nursery | None = None
        self._admission = trio.Lock()
        self._departed = Changed()

    async def run(self) -> None:
        """Take back the guests that are here, and look after all until the task is cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await self._adopt_all()
            self.adopted.set()
            nursery.start_soon(Renewals(self.lease, self._entitled).run)
            nursery.start_soon(self._wake_with_lease)
            nursery.start_soon(self._wake_when_fresh)
            state = self.catalog.state
            self._look(state, State())
            async for _, proposal, new in self.catalog.changes(after=state.index):
                if proposal is not None:
                    self._tell_failover(proposal.entry)
                missed = proposal is None or proposal.time < self._begun
                self._look(new, state, missed=missed)
                state = new

    async def close(self) -> None:
        """Let go of the guests; they go on, and the next peer in this directory takes them back."""
        for keeper in self._keepers.values():
            if keeper.local is not None and keeper.local.shim is not None:
                keeper.local.shim.forget()

    async def end_all(self) -> None:
        """End all guests in order, because the peer ends; the next peer in its place starts them again."""
        with trio.move_on_after(END_TIMEOUT):
            async with trio.open_nursery() as nursery:
                for keeper in list(self._keepers.values()):
                    nursery.start_soon(keeper.shut_down)

    # Leases.

    def entitled(self, record: Record) -> bool:
        """Whether this copy may run as long as the lease holds, by what the catalog says at this moment."""
        return entitled(record, self.catalog.state, self.me)

    def _entitled(self) -> list[LocalGuest]:
        """The lease-bound guests here that may run as long as the lease holds.

        A stale copy is none of them: it gets no further lease, so its shim lets it run no more.
        """
        found = (keeper.local for keeper in self._keepers.values())
        return [local for local in found if local is not None and self.entitled(local.record)]

    async def _wake_with_lease(self) -> None:
        """Guests that stand still, or wait to start, go on when there is a lease again."""
        while True:
            await self.lease.gained.wait()
            for keeper in self._keepers.values():
                keeper.wake()

    async def _wake_when_fresh(self) -> None:
        """Steps are taken only once the catalog is known to be new."""
        await self.catalog.wait(lambda _state: self.catalog.fresh)
        for keeper in self._keepers.values():
            keeper.wake()

    async def settled(self) -> None:
        """Wait until the catalog says what there is of the guests here, after a start."""
        await self.adopted.wait()
        await self.catalog.wait(lambda _state: self.catalog.fresh)
        for keeper in list(self._keepers.values()):
            await keeper.seen.wait()

    def _tell_failover(self, entry: entries.Entry) -> None:
        """Say that a guest comes here because the peer that had it was lost."""
        if isinstance(entry, entries.FailOverGuest) and entry.owner == self.me:
            epoch = entry.epoch + 1
            self.events.emit("guest.failed-over", guest=entry.guest, epoch=epoch, reason=entry.reason)

    # Looking up.

    def local(self, key: str) -> LocalGuest:
        """The guest LAB/NAME that lives here. Raises `OperationError(not-found)`."""
        for keeper in self._keepers.values():
            if keeper.local is not None and keeper.local.record.key == key:
                return keeper.local
        raise OperationError("not-found", f"{key} does not run at this peer")

    def keeper(self, key: str) -> Keeper | None:
        """The keeper of the guest LAB/NAME, if it lives here."""
        guest = self.catalog.state.guests.get(key)
        return self._keepers.get(guest.id) if guest is not None else None

    def stands_still(self, guest: entries.Guest) -> bool:
        """Whether this guest is here and was stopped because this peer's lease ran out."""
        keeper = self._keepers.get(guest.id)
        return keeper is not None and keeper.local is not None and keeper.local.stands_still

    async def wait_gone(self, id: str) -> None:
        """Wait until nothing of the guest with this id is here."""
        await self._departed.wait_until(lambda: id not in self._keepers)

    def here(self) -> list[str]:
        """The guests (LAB/NAME) that have files or processes here."""
        return sorted(keeper.local.record.key for keeper in self._keepers.values() if keeper.local)

    def held(self) -> list[LocalGuest]:
        """The guests that a migration had its hand on, also one of an earlier peer process."""
        return [keeper.local for keeper in self._keepers.values() if keeper.held and keeper.local]

    def memory_free(self) -> int:
        """Bytes that further guests may have: what the host has, less what guests may still ask for."""
        promised = sum(keeper.local.untouched for keeper in self._keepers.values() if keeper.local)
        return max(0, host.memory_available() - promised)

    # What keepers ask for.

    def watch(self, local: LocalGuest) -> None:
        """Run the local guest's task."""
        if self._nursery is None:
            raise RuntimeError("guests are watched only while Guests.run lasts")
        self._nursery.start_soon(self._watch, local)

    async def _watch(self, local: LocalGuest) -> None:
        # One guest's trouble must not end the others, here and in _keep.
        try:
            await local.run()
        except Exception as error:
            logger.exception("guest cannot be watched any more", guest=local.record.key)
            local.trouble = f"internal error: {error}"

    async def predecessor_gone(self, guest: entries.Guest) -> None:
        """Wait until nothing is left here of another guest of the same name, whose place this one takes."""

        def alone() -> bool:
            others = (k.local for id, k in self._keepers.items() if id != guest.id)
            return not any(local is not None and local.record.key == guest.key for local in others)

        await self._departed.wait_until(alone)

    async def admit(self, guest: entries.Guest, start: Callable[[], Awaitable[None]]) -> None:
        """Start a guest if there is memory for it; one at a time, so that no two count on the same bytes."""
        async with self._admission:
            free = self.memory_free()
            if guest.memory > free:
                here = self.catalog.state.peer_name(self.me)
                raise OperationError(
                    "no-room",
                    f"{guest.key} wants {format_size(guest.memory)} of memory; "
                    f"{here} has {format_size(free)} free",
                    "give it less memory, place it elsewhere, or stop another guest",
                )
            await start()

    # For migrations.

    async def hold(self, key: str, migration: str) -> LocalGuest:
        """Take a running guest out of its keeper's hands, durably. Raises `OperationError(conflict)`."""
        keeper = self.keeper(key)
        if keeper is None or keeper.local is None:
            raise OperationError("not-found", f"{key} does not run at this peer")
        async with keeper.busy:
            local = keeper.local
            if local is None or local.phase != "running" or local.record.stage != "ready":
                raise OperationError("conflict", f"{key} does not run at this peer")
            if local.record.migration not in ("", migration):
                raise OperationError("conflict", f"{key} is being moved already")
            local.save(migration=migration)
            return local

    async def unhold(self, local: LocalGuest) -> None:
        """Give a guest back to its keeper: it stays here, as it is now."""
        await local.look()
        record = local.record
        epoch = right_after_failover(self.catalog.state, self.me, record.id, record.epoch)
        local.save(migration="", epoch=epoch)
        self._wake(local.record.id)

    async def prepare_incoming(self, guest: entries.Guest, migration: str, kernel: str) -> LocalGuest:
        """Make everything for a guest that comes here: files, disks with empty overlays, ports, a shim that
        waits.

        `guest` is as the catalog knows it, `kernel` the hash of the source's kernel. Raises `OperationError`
        and leaves nothing. `disks[n].share()` and the shim's `memory` are what `pages` fills.
        """
        if guest.id in self._keepers:
            raise OperationError("conflict", f"something of {guest.key} is at this peer already")
        lacking = missing_features(frozenset(guest.cpu_features), guest.xsave_size, self.processor)
        if lacking:
            raise OperationError(
                "unsupported",
                f"{guest.key} uses what the processors of {self.catalog.state.peer_name(self.me)} lack: "
                + ", ".join(lacking[:8]),
                "move it to a peer whose processors have all of that",
            )
        image = await self.images.ensure(guest.image, guest.image_hash)
        material = await self.images.ensure_kernel(kernel)
        keeper = Keeper(self, guest.id, None)
        record = record_of(self.around, guest, image, material)
        local = LocalGuest(self.around, record, keeper.wake)
        told = told_digest(deploy.settings_while_running(guest, self.catalog.state))
        try:
            local.save(migration=migration, epoch=guest.epoch + 1, told=told)
            await self.admit(guest, lambda: local.start(guest, image, material, incoming=True))
        except BaseException:
            with trio.CancelScope(shield=True):
                await local.remove_ports()
                local.remove_files()
            raise
        keeper.local = local
        self._begin(keeper)
        self.watch(local)
        return local

    async def adopt_incoming(self, local: LocalGuest) -> None:
        """The guest runs here now and the catalog says so: it is an ordinary guest of this peer."""
        await local.look()
        local.save(migration="", stage="ready", started=self.clock())
        self._wake(local.record.id)

    async def release_outgoing(self, local: LocalGuest, aside: bool) -> None:
        """The guest lives elsewhere for good: end the frozen copy, remove its disks and files.

        `aside`: keep the files for a while, as those of every stale copy; what the guest was there since may
        be lost.
        """
        record, stood = local.record, stood_for(local)
        kept = await self._remove(local, aside)
        if aside:
            self.events.emit(
                "guest.fenced", guest=record.key, epoch=record.epoch, stood=stood, kept=str(kept or "")
            )

    async def discard_incoming(self, local: LocalGuest) -> None:
        """The guest does not come: remove what was prepared."""
        await self._remove(local)

    async def _remove(self, local: LocalGuest, aside: bool = False) -> Path | None:
        """Returns where the files are now, if they are kept."""
        keeper = self._keepers.get(local.record.id)
        if keeper is None:
            return None
        kept: Path | None = None
        async with keeper.busy:
            await local.end(force=True)
            await local.remove_ports()
            if aside:
                kept = keep_aside(local.directory, local.record)
            else:
                local.remove_files()
            keeper.local = None
        keeper.wake()
        return kept

    # Its keepers.

    async def _adopt_all(self) -> None:
        remove_rests(self.around.directory)
        for path in sorted(self.around.directory.glob("*/guest.json")):
            try:
                record = Record.load(path.parent)
            except OperationError as error:
                logger.error("a guest's directory cannot be used", path=str(path.parent), error=error.message)
                continue
            keeper = Keeper(self, record.id, None)
            keeper.local = LocalGuest(self.around, record, keeper.wake)
            await keeper.local.adopt()
            if keeper.local.shim is not None:
                self.watch(keeper.local)
                self.events.emit("guest.adopted", guest=record.key, state=keeper.local.phase)
            keeper.left_over = keeper.wanted is None or keeper.wanted.owner != self.me
            self._begin(keeper)

    def _look(self, state: State, before: State, *, missed: bool = True) -> None:
        """Wake the keepers of guests that changed, and make those that are missing.

        `missed`: it was decided while this peer was away.
        """
        changed: set[str] = set()
        labs: set[str] = set()
        for key in state.guests.keys() | before.guests.keys():
            new, old = state.guests.get(key), before.guests.get(key)
            if new is old:
                continue
            changed |= {guest.id for guest in (new, old) if guest is not None}
            if old is not None and missed and (new is None or (new.id, new.owner) != (old.id, self.me)):
                self._mark_left_over(old.id)
            if not deploy.same_neighbours(new, old):
                labs.add(key.partition("/")[0])
            if new is not None and new.owner == self.me and new.id not in self._keepers:
                self._begin(Keeper(self, new.id, None))
        for id, keeper in self._keepers.items():
            lab = keeper.local.record.key.partition("/")[0] if keeper.local else ""
            if id in changed or lab in labs:
                keeper.neighbours_changed()
                changed.add(id)
        for id in changed:
            self._wake(id)

    def _mark_left_over(self, id: str) -> None:
        if id in self._keepers:
            self._keepers[id].left_over = True

    def _wake(self, id: str) -> None:
        if id in self._keepers:
            self._keepers[id].wake()

    def _begin(self, keeper: Keeper) -> None:
        if self._nursery is None:
            raise RuntimeError("guests are kept only while Guests.run lasts")
        self._keepers[keeper.id] = keeper
        self._nursery.start_soon(self._keep, keeper)

    async def _keep(self, keeper: Keeper) -> None:
        try:
            while True:
                try:
                    await keeper.run()
                    return
                except Exception as error:
                    logger.exception("keeper failed", guest=keeper.id)
                    self.events.emit("guest.trouble", guest=keeper.id, message=f"internal error: {error}")
                await trio.sleep(KEEPER_PAUSE)
        finally:
            keeper.left.set()
            keeper.seen.set()
            if self._keepers.get(keeper.id) is keeper:
                del self._keepers[keeper.id]
                self._departed.set()
