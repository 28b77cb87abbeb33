# SPDX-License-Identifier: Apache-2.0
"""The source's side of a live migration: the machine `Source` carried out on a real guest.

Before the handover is opened nothing of the guest is touched. Then the destination is asked to prepare, over
a request that lasts as long as the migration and brings back what happens there; passes run until
`proto/precopy.py` says that it is time; the guest is frozen, and the last difference goes out with the
release behind it. From then on the log decides. The frozen copy is hashed in full, compared with what was
sent, and removed once the destination's copy is durable.
"""

from __future__ import annotations

import secrets
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import structlog
import trio

from mobid import bulk
from mobid.clocks import Offset, match_clocks
from mobid.guest import LocalGuest
from mobid.helpers import HelperError
from mobid.migration_shell import Frames, Shell, Surroundings
from mobid.page_stream import PageStream, changed_bytes, pass_record, regions_of
from proto import entries
from proto import handover_events as ev
from proto.agent import AgentError
from proto.api import OperationError
from proto.handover import Source, SourceState, is_superseded
from proto.precopy import GiveUp, Pass, Policy, Precopy, Stall, SwitchOver
from proto.segments import concerned
from proto.state import State

PREPARE_TIMEOUT = 600.0
"""Seconds for the destination to prepare; it may have to fetch an image."""
FREEZE_TIMEOUT = 10.0
PROBE_TIMEOUT = 2.0
DURABLE_TIMEOUT = 120.0
CLOCK_TIMEOUT = 5.0
OPENED_TIMEOUT = 3.0
"""Seconds for the other peers to say that their switches know of the handover."""
SETTLED_WAIT = 30.0
"""Seconds that `finish` waits for measurements of a guest that runs already."""
VERIFY_PATIENCE = 10.0
SWITCH_COST = 0.004
"""Seconds that a switch takes with nothing left to send: freeze, resume, devices."""
COMPARE_RATE = 8e9
"""Bytes/s at which a frozen memory is compared, with two processors."""

log = structlog.get_logger()


@dataclass(frozen=True)
class Wishes:
    """What `vm migrate` was asked for. Seconds, bytes/s."""

    downtime: float = 0.05
    bandwidth: int = 0
    deadline: float = 60.0
    cold: bool = False
    on_stall: Stall = "accept"


@dataclass
class Measured:
    """What is known of a migration so far. Times are of this host's monotonic clock; `started` is UTC."""

    began: float = field(default_factory=time.monotonic)
    started: float = field(default_factory=time.time)
    passes: list[dict[str, Any]] = field(default_factory=list)
    times: dict[str, int] = field(default_factory=dict)
    """Moments of the switch (see `PARTS`)."""
    clock: Offset | None = None
    guest_gap_ns: int | None = None
    guest_clock: list[Any] | None = None
    probed: bool = False
    final: dict[str, Any] | None = None
    frames: Frames = field(default_factory=lambda: Frames(0, 0))
    verified: str = "pending"
    total: float | None = None


class Outgoing(Shell):
    """One guest on its way from here. `local` is None if its processes were lost."""

    side = "source"
    machine: Source

    def __init__(
        self,
        around: Surroundings,
        migration: entries.Migration,
        local: LocalGuest | None,
        wishes: Wishes,
    ) -> None:
        super().__init__(around, migration, Source(migration))
        self.local = local
        self.wishes = wishes
        self.measured = Measured()
        self._stream: PageStream | None = None
        self._key = secrets.token_bytes(32)
        self._verified = trio.Event()
        self._redirecting = trio.Lock()
        self._redirected = False
        self._opened = trio.Event()
        self._durable_there = False

    async def perform(self, effect: ev.Effect) -> None:
        """Carry out an effect of the source's machine."""
        match effect:
            case ev.Prepare():
                self.soon(self._open_everywhere)
                self.soon(self._converse)
                self.soon(self._watch_lease)
            case ev.Freeze():
                self.soon(self._freeze)
            case ev.SendFinal():
                self.soon(self._send_final)
            case ev.Thaw():
                await self._thaw()
            case ev.CancelStream():
                if self._stream is not None:
                    await self._stream.cancel()
            case ev.Discard():
                await self._discard()

    # Everything that needs no freeze.

    async def _open_everywhere(self) -> None:
        """Wait, not for ever, until every switch on the guest's networks knows of the handover.

        A peer hears of it when it comes to that place in the log. Its switch drops what the guest sends from
        its new place before that.
        """
        m = self.migration
        silent: list[str] = []

        async def ask(peer: str) -> None:
            try:
                arguments = {"migration": m.id}
                await self.around.links.call(peer, "migration.opened", arguments, timeout=OPENED_TIMEOUT)
            except OperationError as error:
                log.info("migration.not.opened", id=m.id, peer=peer, reason=error.message)
                silent.append(self.around.catalog.state.peer_name(peer))

        async with trio.open_nursery() as nursery:
            for peer in concerned(self.around.catalog.state, m.guest):
                nursery.start_soon(ask, peer)
        self._opened.set()
        if silent:
            self.around.events.emit("migration.unheard", id=m.id, guest=m.guest, peers=sorted(silent))

    async def _watch_lease(self) -> None:
        """A guest that its shim has frozen, before the switch, stays here until it may run again."""
        local = self.local
        if local is None:
            return
        await local.changed.wait_until(lambda: local.stands_still)
        if self.machine.state in (SourceState.PREPARING, SourceState.PRECOPY):
            self.feed(ev.Abort("the lease of this peer has run out"))

    async def _converse(self) -> None:
        """The request that lasts as long as the migration; what goes wrong in it is told to the machine."""
        to, source = self.migration.destination, self.migration.source
        try:
            await self._report_migrating()
            arguments = await self._preparation()
            async with self.around.links.stream(to, "migration.prepare", arguments) as stream:
                with trio.move_on_after(PREPARE_TIMEOUT) as patience:
                    async for item in stream:
                        if "ready" in item:
                            patience.deadline = float("inf")
                        await self._heard(item)
                if patience.cancelled_caught:
                    raise OperationError("timeout", "the destination was not ready in time")
                await stream.result()
        except (OperationError, HelperError) as error:
            log.info("migration.conversation.ended", id=self.migration.id, reason=error.message, peer=source)
            self.feed(ev.Abort(error.message))

    async def _report_migrating(self) -> None:
        """For people only: the guest's state in lists."""
        m = self.migration
        with suppress(OperationError):
            await self.around.catalog.propose(
                entries.Report(guest=m.guest, owner=m.source, epoch=m.epoch, state="migrating")
            )

    async def _preparation(self) -> dict[str, Any]:
        local = self._present()
        regions = await regions_of(local)
        sizes = regions.sizes
        regions.close()
        return {
            "migration": self.migration.id,
            "kernel": local.record.kernel,
            "key": self._key,
            "memory": sizes[0],
            "disks": sizes[1:],
        }

    def _present(self) -> LocalGuest:
        if self.local is None or self.local.shim is None:
            raise OperationError("failed", f"{self.migration.guest} has no processes any more")
        return self.local

    async def _heard(self, item: dict[str, Any]) -> None:
        """Something happened at the destination."""
        if "expecting" in item:
            self.say(stage="connecting")
            self.soon(self._connect)
        elif "ready" in item:
            self.feed(ev.Prepared())
            self.soon(self._copy)
        elif "started" in item:
            self._take_started(item["started"])
        elif "stage" in item:
            self.say(stage=str(item["stage"]))

    async def _connect(self) -> None:
        """Our end of the stream."""
        try:
            local = self._present()
            control = self.around.sockets / f"{self.migration.id[:12]}.out"
            self._stream = await PageStream.start(self.around.helpers, control, self.around.logs)
            regions = await regions_of(local)
            opening = bulk.preamble(bytes.fromhex(self.migration.id))
            connection = await self.around.links.bulk(self.migration.destination, opening)
            self.soon(self._watch_stream)
            await self._stream.connect(
                "send",
                connection,
                migration=self.migration.id,
                key=self._key,
                regions=regions,
                bandwidth=self.wishes.bandwidth,
            )
        except (OperationError, HelperError) as error:
            self.feed(ev.StreamBroken(error.message))

    async def _watch_stream(self) -> None:
        assert self._stream is not None
        async for event in self._stream.events("broken", "progress"):
            if event["event"] == "progress":
                self.say(**{k: event[k] for k in ("pass", "done_bytes", "total_bytes")})
            else:
                self.feed(ev.StreamBroken(str(event["message"])))
        self.feed(ev.StreamBroken("the process that sends has ended"))

    # Passes.

    async def _copy(self) -> None:
        """Pre-copy until it is time to switch."""
        try:
            await self._match_clocks()
            await self._opened.wait()
            for disk in self._present().disks:
                await disk.track(True)
            if self.wishes.cold:
                await self._reset_probe()
            elif reason := await self._passes():
                self.feed(ev.Abort(reason))
                return
        except (OperationError, HelperError) as error:
            self.feed(ev.StreamBroken(error.message))
            return
        self.say(stage="switching")
        self.feed(ev.Switch())

    async def _passes(self) -> str | None:
        """Passes until the switch is due; a reason if it never will be."""
        assert self._stream is not None
        memory = self._present().record.memory
        precopy = Precopy(
            Policy(
                target=self.wishes.downtime,
                fixed_cost=SWITCH_COST + memory / COMPARE_RATE,
                deadline=self.measured.began + self.wishes.deadline,
                on_stall=self.wishes.on_stall,
                bandwidth=float(self.wishes.bandwidth),
            )
        )
        while True:
            if precopy.passes:
                # Before the pass that may be the last: nothing may stand between that and the freeze.
                await self._reset_probe()
            done = await self._stream.run_pass()
            made = Pass(changed_bytes(done), int(done["sent_bytes"]), float(done["duration"]))
            decision = precopy.decide(made, time.monotonic())
            seen = max(p.sent / max(p.duration, 1e-6) for p in precopy.passes)
            record = pass_record(done, self.measured.passes, seen)
            record["start_s"] = time.monotonic() - self.measured.began - record["duration"]
            self.measured.passes.append(record)
            self.say(**{"pass": len(precopy.passes), **record})
            if isinstance(decision, SwitchOver):
                return None
            if isinstance(decision, GiveUp):
                return decision.reason

    async def _match_clocks(self) -> None:
        async def ask() -> int:
            reading = await self.around.links.call(
                self.migration.destination, "migration.clock", timeout=CLOCK_TIMEOUT
            )
            return int(reading["monotonic_ns"])

        with suppress(OperationError):
            self.measured.clock = await match_clocks(ask)

    async def _reset_probe(self) -> None:
        """Let the guest forget the largest hole in its clock so far, if its agent answers."""
        agent = self._present().agent
        if agent is None or not agent.is_ready:
            return
        with suppress(AgentError):
            await agent.probe(timeout=PROBE_TIMEOUT, reset=True)
            self.measured.probed = True

    # The switch.

    async def _freeze(self) -> None:
        guest = self.migration.guest
        try:
            local = self._present()
            assert local.shim is not None
            await self.around.moves.hold(guest)
            reply, _ = await local.shim.call(
                "freeze", timeout=FREEZE_TIMEOUT + 5, timeout_ms=int(FREEZE_TIMEOUT * 1000)
            )
        except (OperationError, HelperError) as error:
            await self._thaw()
            self.feed(ev.FreezeFailed(error.message))
            return
        self.measured.times |= {"begun": int(reply["begun_ns"]), "frozen": int(reply["frozen_ns"])}
        self.feed(ev.Frozen())

    async def _send_final(self) -> None:
        assert self._stream is not None
        try:
            reply = await self._stream.final()
        except HelperError as error:
            log.warning("migration.final.failed", id=self.migration.id, reason=error.message)
            self.feed(ev.Sent("maybe" if error.code in ("gone", "timeout") else "no"))
            return
        self.measured.final = reply
        times = {"comparing": int(reply["began_ns"]), "compared": int(reply["compared_ns"])}
        self.measured.times |= times
        self.feed(ev.Sent(reply["released"]))
        if reply["released"] != "no" and reply["match"] is not False:
            self.soon(self._verify)

    async def _redirect(self) -> None:
        """Send the frames after the guest, once it runs there. Not before: the destination may still refuse
        it, and what was redirected cannot be had back.
        """
        m = self.migration
        async with self._redirecting:
            if self._redirected:
                return
            try:
                await self.around.moves.redirect(m.guest, m.destination, m.epoch + 1)
                self.measured.frames = await self.around.moves.frames(m.guest)
                self._redirected = True
            except (OperationError, HelperError) as error:
                log.warning("migration.frames.stay", id=m.id, reason=error.message)

    async def _verify(self) -> None:
        """Hash the frozen copy in full; it must be what was sent. Not while the other side starts."""
        assert self._stream is not None
        await self.until(self._has_moved, VERIFY_PATIENCE)
        try:
            self.measured.verified = "ok" if await self._stream.verify() else "mismatch"
        except HelperError as error:
            log.warning("migration.not.verified", id=self.migration.id, reason=error.message)
        if self.measured.verified == "mismatch":
            self.around.events.emit("migration.mismatch", id=self.migration.id, guest=self.migration.guest)
        self._verified.set()

    def _has_moved(self) -> bool:
        return self.measured.total is not None or self.machine.state == SourceState.KEPT

    async def _thaw(self) -> None:
        """The guest goes on here; one that never stopped takes no notice."""
        local = self.local
        if local is not None and local.shim is not None:
            status: dict[str, Any] = {}
            with suppress(HelperError):
                status, _ = await local.shim.call("status")
            if status.get("state") == "frozen":
                try:
                    await local.shim.call("thaw", timeout=FREEZE_TIMEOUT)
                except HelperError as error:
                    # Its keeper tries again as soon as it has the guest back.
                    log.error("migration.thaw.failed", id=self.migration.id, reason=error.message)
        with suppress(OperationError, HelperError):
            await self.around.moves.unhold(self.migration.guest)

    # After the release.

    def _take_started(self, started: dict[str, Any]) -> None:
        """The destination tells when the guest ran, by its own clock."""
        self.measured.total = time.monotonic() - self.measured.began
        self.changed.set()
        self.soon(self._redirect)
        clock = self.measured.clock
        for moment in ("released", "requested", "running"):
            if clock is not None and started.get(f"{moment}_ns") is not None:
                self.measured.times[moment] = clock.to_ours(int(started[f"{moment}_ns"]))

    async def send(self, peer: str, message: object) -> None:
        """Settle, or ask whether the copy is durable."""
        args = {"migration": self.migration.id}
        try:
            if isinstance(message, ev.AskDurable):
                await self._redirect()  # unless that was heard from the destination before
                await self.around.links.call(peer, "migration.durable", args, timeout=DURABLE_TIMEOUT)
                self._durable_there = True
                self.feed(ev.Durable(self.migration.id))
            elif isinstance(message, ev.Settle):
                await self.around.links.call(peer, "migration.settle", args)
        except OperationError as error:
            log.info("migration.message.lost", id=self.migration.id, reason=error.message)

    async def follow_log(self) -> None:
        """Tell the machine when the log closes the migration, and when the guest has moved on since."""
        await super().follow_log()
        catalog = self.around.catalog
        await catalog.wait(self._is_superseded, timeout=None)
        self.feed(ev.Superseded())

    def _is_superseded(self, state: State) -> bool:
        return is_superseded(self.migration, state.guests.get(self.migration.guest))

    async def _discard(self) -> None:
        """The destination's copy is durable; ours may go, once it has been verified and measured.

        If the guest was failed over before that, ours is perhaps the last with what the guest was: its files
        are kept aside.
        """
        if not self._durable_there:
            if self.local is not None:
                wanted = self.migration.guest in self.around.catalog.state.guests
                await self.around.guests.release_outgoing(self.local, aside=wanted)
            return
        with trio.move_on_after(SETTLED_WAIT):
            if self.measured.final is not None:
                await self._verified.wait()
        with trio.move_on_after(SETTLED_WAIT):
            await self._probe()
        if self.local is not None:
            await self.around.guests.release_outgoing(self.local, aside=False)

    async def _probe(self) -> None:
        """The largest hole in the guest's clock, as the guest itself saw it."""
        if not self.measured.probed:
            return
        try:
            probe = await self.around.links.call(
                self.migration.destination, "migration.probe", {"migration": self.migration.id}, timeout=20.0
            )
        except OperationError as error:
            log.info("migration.not.probed", id=self.migration.id, reason=error.message)
            return
        self.measured.guest_gap_ns = int(probe["largest_gap_ns"])
        self.measured.guest_clock = probe.get("samples")

    async def finish(self, over: ev.Over) -> None:
        """Give the guest back to its keeper unless it is gone."""
        if over.outcome != "done" and self.local is not None:
            await self.around.guests.unhold(self.local)
        self.around.events.emit(
            "migration.ended",
            id=self.migration.id,
            guest=self.migration.guest,
            to=self.migration.destination,
            outcome=over.outcome,
            reason=over.reason,
        )

    async def close(self) -> None:
        """End the sending process."""
        if self._stream is not None:
            await self._stream.close()

    # The record.

    def record(self) -> dict[str, Any]:
        """As `vm migrate --json` prints it; what was not measured is None."""
        state, m, measured = self.around.catalog.state, self.migration, self.measured
        done = self.over is not None and self.over.outcome == "done"
        sent = sum(p["sent_bytes"] for p in measured.passes)
        final = measured.final or {}
        return {
            "vm": m.guest.partition("/")[2],
            "from": state.peer_name(m.source),
            "to": state.peer_name(m.destination),
            "mode": "cold" if self.wishes.cold else "precopy",
            "ok": done,
            "passes": measured.passes,
            "started": measured.started,
            "total_s": measured.total or time.monotonic() - measured.began,
            "frozen_s": measured.times["begun"] / 1e9 - measured.began if "begun" in measured.times else None,
            "downtime_ms": self._downtime() if done else dict.fromkeys(DOWNTIMES),
            "parts_ms": parts(measured.times) if done else dict.fromkeys(PARTS),
            "sent_bytes": sent + int(final.get("sent_bytes", 0)),
            "residue_bytes": changed_bytes(final) if final else None,
            "frames_held": measured.frames.held,
            "frames_lost": measured.frames.lost,
            "verified": measured.verified,
            "epoch": state.guests[m.guest].epoch if m.guest in state.guests else m.epoch,
            "rolled_back": not done,
            "reason": self.over.reason if self.over and not done else None,
            "guest_clock": measured.guest_clock,
        }

    def _downtime(self) -> dict[str, float | None]:
        measured = self.measured
        host = _between(measured.times, "begun", "running")
        gap = measured.guest_gap_ns
        uncertainty = measured.clock.uncertainty / 1e6 if measured.clock else None
        figures = (host, gap / 1e6 if gap is not None else None, None, uncertainty)
        return dict(zip(DOWNTIMES, figures, strict=True))


DOWNTIMES = ("host", "guest", "network", "uncertainty")
PARTS = {
    "freeze": ("begun", "frozen"),
    "handing_over": ("frozen", "comparing"),
    "difference": ("comparing", "compared"),
    "send": ("compared", "released"),
    "going": ("released", "requested"),
    "resume": ("requested", "running"),
}
"""What the downtime is made of. The two that have no other name are this program's own: from the frozen guest
to the last pass, and from the release to the go-ahead.
"""


def _between(times: dict[str, int], first: str, last: str) -> float | None:
    """Milliseconds from one moment to another, if both are known."""
    return (times[last] - times[first]) / 1e6 if first in times and last in times else None


def parts(times: dict[str, int]) -> dict[str, float | None]:
    """The parts of a downtime; one that crosses hosts is as uncertain as the clocks."""
    return {name: _between(times, first, last) for name, (first, last) in PARTS.items()}
