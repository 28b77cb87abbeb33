# SPDX-License-Identifier: Apache-2.0
"""Live migrations of this peer's guests: the operations, and who carries out which handover.

`Outgoing` and `Incoming` do the work, one of them per migration and side; this part starts them, lets peers
talk to them, and after a restart takes up what an earlier process left: held guests, durable notes, and open
handovers of the log. The peer that coordinates also sees to it that a handover which nobody ends is ended.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Annotated, Any, Literal

import structlog
import trio
from pydantic import Field, StringConstraints

from mobid.catalog import Catalog
from mobid.guest import LocalGuest
from mobid.helpers import HelperError
from mobid.links import Links
from mobid.migration_incoming import Incoming, Plan, sync_disks
from mobid.migration_outgoing import Outgoing, Wishes
from mobid.migration_record import Records, of_log
from mobid.migration_shell import Shell, Surroundings
from mobid.operations import Request, made_id, operation, step
from proto import admission, api, entries
from proto import handover_events as ev
from proto.agent import AgentError
from proto.api import Arguments, OperationError
from proto.handover import Coordinator
from proto.lease_events import PeerLost
from proto.machine import Send, WakeAt, Woken
from proto.state import State

HANDOVER_SLACK = 120.0
"""Seconds beyond the wanted deadline after which the coordinator ends a handover."""
LOG_TIMEOUT = 10.0
DURABLE_TIMEOUT = 120.0
PROBE_TIMEOUT = 15.0
SETTLE_TIMEOUT = 5.0
END_TIMEOUT = 15.0

log = structlog.get_logger()

MigrationId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Bytes = Annotated[int, Field(gt=0, lt=2**44)]


class MigrationArguments(Arguments):
    """`migration.opened`, `.settle`, `.durable`, `.probe`, `.lost`, `.watch`."""

    migration: MigrationId


class Prepare(Arguments):
    """`migration.prepare`: the source asks the destination; items tell what happens there.

    `kernel` is a hash, `memory` and `disks` are lengths in bytes, `key` is the stream's.
    """

    migration: MigrationId
    kernel: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    key: Annotated[bytes, Field(min_length=32, max_length=32)]
    memory: Bytes
    disks: Annotated[list[Bytes], Field(max_length=3)]


class Migrations:
    """The migrations of one peer, `vm.migrate` and `migration.…`."""

    def __init__(self, around: Surroundings) -> None:
        self._around = around
        self._me = around.identity.id
        self._catalog: Catalog = around.catalog
        self._links: Links = around.links
        self._shells: dict[str, Shell] = {}
        self._watched: set[str] = set()
        self._beginning: dict[str, trio.Event] = {}
        self._records = Records()
        self._nursery: trio.Nursery | None = None

    async def run(self) -> None:
        """Take up what an earlier process left, and carry out migrations until the task is cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                await self._take_up()
                nursery.start_soon(self._coordinate)
                nursery.start_soon(self._follow_losses)
                await self._follow()
            finally:
                self._nursery = None

    async def end_all(self) -> None:
        """Give up what can be given up and see the rest through, because the peer ends with its guests."""
        with trio.move_on_after(END_TIMEOUT):
            for shell in list(self._shells.values()):
                shell.feed(ev.Abort("the peer is stopping"))
            for shell in list(self._shells.values()):
                await shell.finished.wait()

    # Asked by people.

    @operation("vm.migrate", role="operator", args=api.VmMigrate, route="guest", timeout=None)
    async def migrate(self, request: Request, args: api.VmMigrate) -> dict[str, Any]:
        """Move a running guest live; items are progress, the result is the record (`proto/README.md`).

        The migration goes on if the caller does not wait for it, and who asks again sees the same one.
        """
        _check_mode(args)
        id = made_id(request, "migration", 32)
        if id in self._beginning:
            await self._beginning[id].wait()
        if id not in self._catalog.state.migrations:
            self._beginning[id] = trio.Event()
            try:
                with trio.CancelScope(shield=True):
                    await self._begin(id, args)
            finally:
                self._beginning.pop(id).set()
        return await self._watch_source(request, id)

    async def _begin(self, id: str, args: api.VmMigrate) -> None:
        state = self._catalog.state
        guest, to = state.find_guest(args.vm), state.find_peer(args.to)
        entry = admission.open_handover(state, guest, to, id, args.deadline + HANDOVER_SLACK)
        local = await self._around.guests.hold(guest.key, id)
        outgoing: Outgoing | None = None
        try:
            await self._catalog.propose(entry)
            outgoing = self._begin_outgoing(id, local, args)
        finally:
            if outgoing is None:
                await self._give_back(id, local)
        self._around.events.emit("migration.started", id=id, guest=guest.key, to=to.name)

    async def _watch_source(self, request: Request, id: str) -> dict[str, Any]:
        """Pass on what the source of a migration tells; if it is gone, what the log says at the end."""
        source = self._catalog.state.migrations[id].source
        if source == self._me:
            return await self.watch(request, MigrationArguments(migration=id))
        args = MigrationArguments(migration=id)
        with suppress(OperationError):
            async with self._links.stream(source, "migration.watch", args) as stream:
                async for item in stream:
                    await request.item(item)
                return dict(await stream.result())
        return await self._told_by_log(id)

    @operation("migration.watch", role="peer", args=MigrationArguments, timeout=None)
    async def watch(self, request: Request, args: MigrationArguments) -> dict[str, Any]:
        """At the source: every item of a migration from its first on, and its record."""
        shell = self._shells.get(args.migration)
        if isinstance(shell, Outgoing):
            async for item in shell.watch():
                await request.item(item)
            return shell.record()
        return self._records.get(args.migration) or await self._told_by_log(args.migration)

    async def _told_by_log(self, id: str) -> dict[str, Any]:
        state = await self._catalog.wait(lambda s: id not in s.migrations or s.migrations[id].state != "open")
        if id not in state.migrations:
            raise OperationError("not-found", "this move is so long ago that nothing is known of it")
        return of_log(state.migrations[id], state)

    def _begin_outgoing(self, id: str, local: LocalGuest, args: api.VmMigrate) -> Outgoing:
        wishes = Wishes(
            downtime=args.downtime,
            bandwidth=args.bandwidth,
            deadline=args.deadline,
            cold=args.mode == "cold",
            on_stall="abort" if args.on_stall == "abort" else "accept",
        )
        outgoing = Outgoing(self._around, self._catalog.state.migrations[id], local, wishes)
        self._start(outgoing, ev.Begin())
        return outgoing

    async def _give_back(self, id: str, local: LocalGuest) -> None:
        """The handover was not opened; if that is uncertain, `_follow` finds it when it is."""
        if id not in self._catalog.state.migrations:
            await self._around.guests.unhold(local)

    @operation("vm.adopt", role="admin", args=api.VmArguments, route="coordinator")
    async def adopt(self, request: Request, args: api.VmArguments) -> dict[str, Any]:
        """An operator's word that a destination which is out of reach will never run the guest: the frozen
        copy at the source goes on.
        """
        state = self._catalog.state
        guest = state.find_guest(args.vm)
        migration = state.open_migration(guest.key)
        if migration is None and self._catalog.applied(step(request)) is not None:
            return {"vm": guest.name, "lab": guest.lab, "peer": state.peer_name(guest.owner)}
        if migration is None:
            raise OperationError("conflict", f"{guest.key} is not being migrated")
        await fail_over(self._around, migration, ev.Adopt(), step(request))
        return {"vm": guest.name, "lab": guest.lab, "peer": state.peer_name(migration.source)}

    # Asked by peers.

    @operation("migration.prepare", role="peer", args=Prepare, timeout=None)
    async def prepare(self, request: Request, args: Prepare) -> dict[str, Any]:
        """Make everything for a guest that comes here; lasts until the migration is over here."""
        migration = await self._known(args.migration)
        if migration.destination != self._me or migration.source != request.caller.id:
            raise OperationError("forbidden", f"migration {migration.id} is not from that peer to this one")
        if migration.state != "open" or migration.id in self._shells:
            raise OperationError("conflict", f"migration {migration.id} was prepared before, or is over")
        plan = Plan(args.kernel, args.memory, tuple(args.disks), args.key)
        incoming = Incoming(self._around, migration, None, plan)
        self._start(incoming, ev.Begin())
        async for item in incoming.watch():
            await request.item(item)
        if incoming.over is None or incoming.over.outcome != "done":
            reason = incoming.over.reason if incoming.over else ""
            raise OperationError("failed", reason or "the destination did not take the guest")
        return {}

    @operation("migration.clock", role="peer")
    async def clock(self, _request: Request, _args: api.Nothing) -> dict[str, int]:
        """This host's monotonic clock now."""
        return {"monotonic_ns": time.monotonic_ns()}

    @operation("migration.opened", role="peer", args=MigrationArguments)
    async def opened(self, _request: Request, args: MigrationArguments) -> dict[str, Any]:
        """Answer when this peer's switch knows of the handover, and takes the guest's frames from there."""
        known = await self._catalog.wait(lambda s: args.migration in s.migrations)
        await self._around.moves.opened(known.migrations[args.migration])
        return {}

    @operation("migration.settle", role="peer", args=MigrationArguments)
    async def settle(self, _request: Request, args: MigrationArguments) -> dict[str, Any]:
        """End a migration: run the guest if the release came, else never."""
        migration = await self._known(args.migration)
        shell = self._shells.get(migration.id)
        if shell is not None:
            shell.feed(ev.Settle(migration.id))
        elif migration.state == "open":
            await self._adopt(migration)
        return {}

    @operation("migration.durable", role="peer", args=MigrationArguments, timeout=DURABLE_TIMEOUT)
    async def durable(self, _request: Request, args: MigrationArguments) -> dict[str, Any]:
        """Answer when the guest that came here is on this host's disk."""
        id = args.migration
        known = await self._catalog.wait(lambda s: id in s.migrations and s.migrations[id].state != "open")
        migration = known.migrations[id]
        shell = self._shells.get(id)
        if shell is not None:
            await shell.finished.wait()
        guest = self._catalog.state.guests.get(migration.guest)
        if guest is None or guest.owner != self._me or guest.epoch > migration.epoch + 1:
            return {}  # removed, or moved on with what came here: the old copy has no claim left
        if not await sync_disks(self._around.guests.local(migration.guest)):
            raise OperationError("failed", f"the copy of {migration.guest} here is not durable")
        return {}

    @operation("migration.probe", role="peer", args=MigrationArguments, timeout=2 * PROBE_TIMEOUT)
    async def probe(self, _request: Request, args: MigrationArguments) -> dict[str, Any]:
        """What the guest's own clock saw since its last reset: `{largest_gap_ns, samples}`."""
        migration = await self._known(args.migration)
        local = self._around.guests.local(migration.guest)
        try:
            agent = await local.ready_agent(PROBE_TIMEOUT)
            seen = await agent.probe(samples=True)
            return {"largest_gap_ns": seen["largest_gap_ns"], "samples": seen.get("samples")}
        except (AgentError, KeyError) as error:
            raise OperationError("failed", f"the agent of {migration.guest} did not tell: {error}") from None

    async def _known(self, id: str) -> entries.Migration:
        """The migration, once this peer has heard of it."""
        state = await self._catalog.wait(lambda state: id in state.migrations, LOG_TIMEOUT)
        return state.migrations[id]

    # Carrying out.

    def _start(self, shell: Shell, first: ev.Event) -> None:
        assert self._nursery is not None
        self._shells[shell.migration.id] = shell
        self._nursery.start_soon(self._carry_out, shell, first)

    async def _carry_out(self, shell: Shell, first: ev.Event) -> None:
        id = shell.migration.id
        try:
            await shell.run(first)
            if isinstance(shell, Outgoing):
                self._records.put(id, shell.record())
        except Exception as error:
            # Notes and hold stay: the guest is as it is, and the next process takes it up.
            log.exception("migration.broken", id=id)
            self._around.events.emit("migration.trouble", id=id, message=f"internal error: {error}")
        finally:
            self._shells.pop(id, None)

    # After a restart.

    async def _take_up(self) -> None:
        """Find the migrations that an earlier process of this peer had to do with."""
        await self._around.guests.adopted.wait()
        held = {local.record.migration: local for local in self._around.guests.held()}
        state = self._catalog.state
        ids = held.keys() | self._around.notes.all().keys()
        ids |= {m.id for m in state.migrations.values() if m.state == "open" and self._concerns(m)}
        for id in sorted(ids):
            migration = state.migrations.get(id)
            if migration is not None:
                await self._adopt(migration)
            elif id in self._around.notes.all():
                # This log is behind; with a note nothing may be touched until it has caught up.
                assert self._nursery is not None
                self._nursery.start_soon(self._adopt_when_known, id)
            else:
                assert self._nursery is not None
                self._nursery.start_soon(self._unhold_if_unknown, id, held[id])

    async def _unhold_if_unknown(self, id: str, local: LocalGuest) -> None:
        """Give a guest back that was held for a handover which never became true."""
        state = await self._catalog.wait(lambda _state: self._catalog.fresh)
        if id in state.migrations:
            await self._adopt(state.migrations[id])
        else:
            await self._around.guests.unhold(local)

    async def _adopt_when_known(self, id: str) -> None:
        state = await self._catalog.wait(lambda state: id in state.migrations)
        await self._adopt(state.migrations[id])

    def _concerns(self, migration: entries.Migration) -> bool:
        return self._me in (migration.source, migration.destination)

    async def _adopt(self, migration: entries.Migration) -> None:
        """Go on with a migration from what is on disk and what runs."""
        await self._around.guests.adopted.wait()
        local = next(
            (one for one in self._around.guests.held() if one.record.migration == migration.id), None
        )
        found = ev.Adopted(self._around.notes.all().get(migration.id), await _copy_of(local))
        if migration.id in self._shells:
            return
        log.info("migration.adopted", id=migration.id, note=found.note, copy=found.copy)
        if migration.source == self._me:
            self._start(Outgoing(self._around, migration, local, Wishes()), found)
        else:
            self._start(Incoming(self._around, migration, local, None), found)

    async def _follow(self) -> None:
        """Take up handovers of ours that became true after their proposal was given up."""
        async for _, proposal, state in self._catalog.changes():
            if proposal is None:  # some were missed
                ids = {m.id for m in state.migrations.values() if m.source == self._me}
            elif isinstance(proposal.entry, entries.Handover) and proposal.entry.source == self._me:
                ids = {proposal.entry.migration}
            else:
                continue
            await trio.sleep(SETTLE_TIMEOUT)
            for migration in [m for m in self._catalog.state.migrations.values() if m.id in ids]:
                if migration.state == "open" and migration.id not in self._shells:
                    await self._adopt(migration)

    # At the coordinator.

    async def _coordinate(self) -> None:
        """Watch every open handover as long as this peer coordinates."""
        while True:
            state = await self._catalog.wait(self._has_unwatched)
            for migration in state.migrations.values():
                if migration.state == "open" and migration.id not in self._watched:
                    self._watched.add(migration.id)
                    assert self._nursery is not None
                    self._nursery.start_soon(self._watch, migration)

    def _has_unwatched(self, state: State) -> bool:
        return self._catalog.leads and any(
            m.state == "open" and m.id not in self._watched for m in state.migrations.values()
        )

    async def _watch(self, migration: entries.Migration) -> None:
        watch = _Watch(self._around, migration)
        try:
            await watch.run()
        finally:
            self._watched.discard(migration.id)

    async def _follow_losses(self) -> None:
        """Open handovers of which one side's lease has run out by every clock."""
        async for loss in self._catalog.lost():
            for migration in list(self._catalog.state.migrations.values()):
                if migration.state != "open":
                    continue
                if loss.peer == migration.destination:
                    await self._destination_lost(migration, loss)
                elif loss.peer == migration.source:
                    # What it released runs at the destination; else that must never run it, so that the
                    # guest can be started anew.
                    assert self._nursery is not None
                    self._nursery.start_soon(settle, self._around, migration.id, migration.destination)

    async def _destination_lost(self, migration: entries.Migration, loss: PeerLost) -> None:
        """It does not run there if its processes are held to the lease: the source's copy goes on."""
        guest = self._catalog.state.guests.get(migration.guest)
        bound = guest is not None and guest.ends_with_lease
        for effect in Coordinator(migration, failover=bound).handle(ev.PeerLost(), trio.current_time()):
            if isinstance(effect, ev.Propose):
                await self._catalog.fence(loss.peer, effect.entry, loss.term)

    @operation("migration.lost", role="peer", args=MigrationArguments)
    async def lost(self, request: Request, args: MigrationArguments) -> dict[str, Any]:
        """At the coordinator: the destination says that its copy is gone for good."""
        migration = await self._known(args.migration)
        if request.caller.id != migration.destination:
            raise OperationError("forbidden", "only the destination can say that its copy is lost")
        if migration.state == "open":
            await fail_over(self._around, migration, ev.CopyLost(migration.id))
        return {}


class _Watch:
    """`Coordinator` of one migration, carried out: asks both sides to settle once the time is over."""

    def __init__(self, around: Surroundings, migration: entries.Migration) -> None:
        self._around = around
        self._migration = migration
        self._machine = Coordinator(migration, failover=False)

    async def run(self) -> None:
        """Until the log closes the migration, or another peer coordinates."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._remind)
            await self._around.catalog.wait(self._closed)
            nursery.cancel_scope.cancel()

    def _closed(self, state: State) -> bool:
        migration = state.migrations.get(self._migration.id)
        return migration is None or migration.state != "open" or not self._around.catalog.leads

    async def _remind(self) -> None:
        effects = self._machine.handle(ev.Begin(), trio.current_time())
        while True:
            at = max((e.at for e in effects if isinstance(e, WakeAt)), default=trio.current_time())
            for effect in effects:
                if isinstance(effect, Send):
                    await settle(self._around, self._migration.id, effect.peer)
            await trio.sleep_until(max(trio.current_time() + 1.0, at))
            effects = self._machine.handle(Woken(self._migration.id), trio.current_time())


async def settle(around: Surroundings, migration: str, peer: str) -> None:
    """Ask one side to bring a migration (id) to its end; it may not hear it."""
    try:
        args = {"migration": migration}
        await around.links.call(peer, "migration.settle", args, timeout=SETTLE_TIMEOUT)
    except OperationError as error:
        log.info("migration.not.settled", id=migration, peer=peer, reason=error.message)


async def fail_over(
    around: Surroundings, migration: entries.Migration, why: ev.CopyLost | ev.Adopt, request: str = ""
) -> None:
    """Commit what the coordinator's machine says to this; raises `OperationError`."""
    for effect in Coordinator(migration, failover=False).handle(why, trio.current_time()):
        if isinstance(effect, ev.Propose):
            await around.catalog.propose(effect.entry, request=request)


def _check_mode(args: api.VmMigrate) -> None:
    if args.mode == "postcopy" or args.on_stall in ("postcopy", "throttle"):
        wrong = f"--mode {args.mode}" if args.mode == "postcopy" else f"--on-stall {args.on_stall}"
        raise OperationError(
            "unsupported",
            f"{wrong} is not there yet",
            "use --mode auto, precopy or cold, and --on-stall accept or abort",
        )


async def _copy_of(local: LocalGuest | None) -> Literal["running", "frozen", "waiting", "none"]:
    """What there is of a guest, by its shim's own word."""
    if local is None or local.shim is None:
        return "none"
    try:
        status, _ = await local.shim.call("status")
    except HelperError:
        return "none"
    match status.get("state"):
        case "waiting":
            return "waiting"
        case "frozen":
            return "frozen"
        case "running" | "starting":
            return "running"
    return "none"
