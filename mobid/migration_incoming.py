# SPDX-License-Identifier: Apache-2.0
"""The destination's side of a live migration: the machine `Destination` carried out on real processes.

Everything is made before the source freezes: files, disks with empty overlays, ports, a kernel process that
waits, the stream. When the release arrives the guest is told to go at once; the log, the announcement and
whoever wants to know hear of it afterwards.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import structlog

from mobid.guest import LocalGuest
from mobid.helpers import HelperError
from mobid.migration_shell import Shell, Surroundings
from mobid.page_stream import PageStream, regions_of
from proto import entries
from proto import handover_events as ev
from proto.api import OperationError
from proto.handover import Destination

CONNECT_TIMEOUT = 30.0
GO_TIMEOUT = 10.0
SYNC_TIMEOUT = 60.0
LEADER_PATIENCE = 10.0

log = structlog.get_logger()


@dataclass(frozen=True)
class Plan:
    """What the source says of the guest it sends: hash of its kernel, lengths in bytes, the stream's key."""

    kernel: str
    memory: int
    disks: tuple[int, ...]
    key: bytes


class Incoming(Shell):
    """One guest on its way here. `local` is None until it was prepared, or if its processes were lost."""

    side = "destination"
    machine: Destination

    def __init__(
        self,
        around: Surroundings,
        migration: entries.Migration,
        local: LocalGuest | None,
        plan: Plan | None,
    ) -> None:
        guest = around.catalog.state.guests.get(migration.guest)
        self.lease_bound = guest is not None and guest.lease_bound
        super().__init__(around, migration, Destination(migration, self.lease_bound))
        self.local = local
        self.plan = plan
        self._stream: PageStream | None = None
        self._received = False
        self._released_ns: int | None = None

    async def perform(self, effect: ev.Effect) -> None:
        """Carry out an effect of the destination's machine."""
        match effect:
            case ev.Prepare():
                self.soon(self._prepare)
            case ev.ReportReady():
                self.say(ready=True)
            case ev.CancelStream():
                await self._cancel_stream()
            case ev.Start():
                await self._start()
            case ev.Sync():
                self.soon(self._sync)
            case ev.Discard():
                await self._discard()
            case ev.Refuse(reason):
                self.say(refused=reason)
                self.soon(lambda: self._refuse(reason))

    # Getting ready.

    async def _prepare(self) -> None:
        m = self.migration
        try:
            guest = self.around.catalog.state.guests.get(m.guest)
            if guest is None or self.plan is None:
                raise OperationError("not-found", f"there is no guest {m.guest} any more")
            self.say(stage="preparing")
            self.local = await self.around.guests.prepare_incoming(guest, m.id, self.plan.kernel)
            await self.around.moves.expect(m.guest, m.source, m.epoch + 1)
            await self._receive(self.local, self.plan)
        except (OperationError, HelperError) as error:
            self.feed(ev.Abort(error.message))
            return
        self.feed(ev.Prepared())

    async def _receive(self, local: LocalGuest, plan: Plan) -> None:
        """Our end of the stream, until both ends have agreed."""
        regions = await regions_of(local, plan.memory)
        try:
            if tuple(regions.sizes[1:]) != plan.disks:
                raise OperationError("conflict", f"the disks of {self.migration.guest} have other sizes here")
            control = self.around.sockets / f"{self.migration.id[:12]}.in"
            self._stream = await PageStream.start(self.around.helpers, control, self.around.logs)
            with self.around.links.expect(bytes.fromhex(self.migration.id)) as expected:
                self.say(expecting=True)
                connection = await expected.wait(CONNECT_TIMEOUT)
        except BaseException:
            regions.close()
            raise
        self.soon(self._watch_stream)
        await self._stream.connect(
            "receive", connection, migration=self.migration.id, key=plan.key, regions=regions
        )

    async def _watch_stream(self) -> None:
        assert self._stream is not None
        async for event in self._stream.events("released", "broken"):
            if event["event"] == "released":
                self._received = True
                self._released_ns = int(event["released_ns"])
                self.feed(ev.Received(bool(event["match"])))
                if self.lease_bound:
                    self.soon(self._await_lease)
            else:
                self._broken(str(event["message"]))
        self._broken("the process that receives has ended")

    async def _await_lease(self) -> None:
        """Until the guest may run by this peer's lease: not by a new one that came with the news that the
        source has the guest back. The shim decides again at the go-ahead, by the deadline it was told.
        """
        guests, local = self.around.guests, self.local
        if local is None:
            return
        await guests.lease.changed.wait_until(lambda: guests.lease.valid and guests.entitled(local.record))
        with suppress(HelperError):
            await local.extend_lease(guests.lease.deadline_ns)
        self.feed(ev.LeaseValid())

    def _broken(self, reason: str) -> None:
        """A stream that ends after the release has done its work."""
        if not self._received:
            self.feed(ev.StreamBroken(reason))

    async def _cancel_stream(self) -> None:
        if self._stream is None or await self._stream.cancel():
            self._broken("it was closed here")

    # Running.

    async def _start(self) -> None:
        try:
            if self.local is None or self.local.shim is None:
                raise HelperError("gone", "the process made for the guest is gone")
            reply, _ = await self.local.shim.call("go", timeout=GO_TIMEOUT)
        except HelperError as error:
            self.feed(ev.StartFailed(await self._may_have_run(error), error.message))
            return
        self.feed(ev.Started())
        times = {"requested_ns": reply["requested_ns"], "running_ns": reply["running_ns"]}
        self.say(started={"released_ns": self._released_ns, **times})
        self.soon(self._announce)

    async def _may_have_run(self, error: HelperError) -> bool:
        """After a go-ahead that was not answered well: only a kernel that waits still has surely not run."""
        if error.code not in ("gone", "timeout"):
            return False
        if self.local is not None and self.local.shim is not None:
            with suppress(HelperError):
                status, _ = await self.local.shim.call("status")
                return bool(status.get("state") != "waiting")
        return True

    async def _announce(self) -> None:
        with suppress(OperationError, HelperError):
            await self.around.moves.announce(self.migration.guest)

    async def _sync(self) -> None:
        self.feed(ev.Synced(await sync_disks(self.local)))

    async def send(self, peer: str, message: object) -> None:
        """Only the coordinator is told something: that the copy is lost. The source asks for the rest."""
        if not isinstance(message, ev.CopyLost):
            return
        with suppress(OperationError):
            coordinator = peer or await self.around.catalog.wait_leader(LEADER_PATIENCE)
            await self.around.links.call(coordinator, "migration.lost", {"migration": self.migration.id})

    # Not running.

    async def _discard(self) -> None:
        if self.local is not None:
            await self.around.guests.discard_incoming(self.local)
            self.local = None
        self.feed(ev.Discarded())

    async def _refuse(self, reason: str) -> None:
        m = self.migration
        signature = self.around.identity.sign(entries.refusal_text(m.id, m.guest, m.epoch))
        await self._propose(
            entries.Cancel(migration=m.id, by=m.destination, refusal=signature, reason=reason[:500])
        )

    async def finish(self, over: ev.Over) -> None:
        """Make it an ordinary guest of this peer, if it came; else leave nothing of it."""
        if over.outcome == "done" and self.local is not None:
            await self.around.guests.adopt_incoming(self.local)
        elif self.local is not None:
            await self.around.guests.discard_incoming(self.local)
        log.info("migration.incoming.over", id=self.migration.id, outcome=over.outcome, reason=over.reason)

    async def close(self) -> None:
        """End the receiving process."""
        if self._stream is not None:
            await self._stream.close()


async def sync_disks(local: LocalGuest | None) -> bool:
    """Make all disks of a guest durable; False if that is not certain."""
    if local is None:
        return False
    try:
        for disk in local.disks:
            await disk.helper.call("sync", timeout=SYNC_TIMEOUT)
    except HelperError as error:
        log.warning("migration.not.durable", guest=local.record.key, reason=error.message)
        return False
    return True
