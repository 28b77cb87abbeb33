# SPDX-License-Identifier: Apache-2.0
"""The task that looks after one guest: wanted against actual, one step at a time.

A keeper never decides by what it did before, only by what the catalog wants and what the processes are; so it
can be cancelled at any point and another one, in the next peer process, goes on from there. What it saw
(`Seen`) it reports to the catalog, again and again until the catalog has it.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import structlog
import trio

from mobid.agent import Agent
from mobid.catalog import Catalog
from mobid.events import Events
from mobid.guest import Exit, LocalGuest, Surroundings
from mobid.guest_disk import DiskPlan, begin_afresh
from mobid.guest_record import Record, told_digest
from mobid.images import Image, Images, Kernel
from mobid.lease import Lease
from mobid.signal import Changed
from mobid.stale_guests import keep_aside, stood_for
from proto import deploy, entries
from proto.agent import AgentError
from proto.api import UNDECIDED, OperationError
from proto.handover import right_after_failover
from proto.reconcile import Actual, Host, Step, Verdict, after_end, is_failure, next_step

logger = structlog.get_logger(__name__)

BOOT_TIMEOUT = 90.0
STOP_TIMEOUT = 30.0
TELL_TIMEOUT = 10.0
REPORT_TIMEOUT = 5.0
REPORT_AGAIN = 1.0
OUTPUT_TAIL = 600
"""Bytes of a failed command's output that are kept for the message."""


class Keeping(Protocol):
    """What all keepers of a peer share; `Guests` is it."""

    me: str
    catalog: Catalog
    events: Events
    images: Images
    around: Surroundings
    lease: Lease
    processor: Host

    def clock(self) -> float:
        """Time of day, as in the catalog."""
        ...

    def watch(self, local: LocalGuest) -> None:
        """Run the local guest's task for as long as it has processes."""
        ...

    async def predecessor_gone(self, guest: entries.Guest) -> None:
        """Wait until nothing is left here of another guest of the same name, whose place this one takes."""
        ...

    async def admit(self, guest: entries.Guest, start: Callable[[], Awaitable[None]]) -> None:
        """Check that there is memory for the guest, and call `start` before anybody else is admitted."""
        ...


@dataclass(frozen=True)
class Seen:
    """What the catalog shall know of a guest; None leaves a field as it is."""

    state: entries.GuestState
    exit_reason: str = ""
    message: str = ""
    started: float | None = None
    cpu_features: tuple[str, ...] | None = None
    xsave_size: int | None = None
    held_to: Literal["run", "freeze"] | None = None
    give_up: entries.WantedState | None = None
    """What was wanted and cannot be had: it is wanted no more."""

    def is_known(self, guest: entries.Guest) -> bool:
        """Whether the catalog says this."""
        same = (guest.state, guest.exit_reason, guest.message) == (self.state, self.exit_reason, self.message)
        return same and self.started in (None, guest.started) and self.give_up != guest.wanted


class Keeper:
    """Looks after the guest with this id; `local` is what this peer has of it, if anything."""

    def __init__(self, keeping: Keeping, id: str, local: LocalGuest | None) -> None:
        self.id = id
        self.local = local
        self.left_over = False
        """Whether the guest was removed, or given to another peer, while this one was away."""
        self.force = False
        """Do not ask the guest when it is stopped next."""
        self.busy = trio.Lock()
        """Held while a step is taken; a migration takes it to be sure that none is."""
        self._k = keeping
        self._seen: Seen | None = None
        self._failures = 0
        self._retry_at: float | None = None
        self._automatic = False
        self._restarts = 0
        """Restarts that were not reported yet."""
        self._unheard = False
        """Whether the last report did not reach those who decide."""
        self._ran_by: tuple[str, int] | None = None
        """The right (owner, epoch) by which it was last seen running here."""
        self._stood_ns = 0
        """The end of a lease at which the guest was stopped, and of which that was said."""
        self._untold = True
        """Whether the guest may have to be told anew who its neighbours are."""
        self._pulse = 0
        self._changed = Changed()
        self._leaving = False
        self.seen = trio.Event()
        """Set once the catalog says of the guest what this process sees of it."""
        self.left = trio.Event()
        """Set when nobody looks after the guest any more."""

    def neighbours_changed(self) -> None:
        """Something in the guest's lab, or what is asked of the guest, has changed."""
        self._untold = True

    def wake(self) -> None:
        """Something may have changed; look again."""
        self._pulse += 1
        self._changed.set()

    async def shut_down(self) -> None:
        """End the guest in order, because the peer ends; the catalog goes on wanting it."""
        self._leaving = True
        self.wake()
        await self.left.wait()

    @property
    def wanted(self) -> entries.Guest | None:
        """The guest as the catalog knows it."""
        for guest in self._k.catalog.state.guests.values():
            if guest.id == self.id:
                return guest
        return None

    @property
    def held(self) -> bool:
        """Whether a migration has its hand on the guest."""
        return self.local is not None and bool(self.local.record.migration)

    async def run(self) -> None:
        """Look after the guest until this peer has nothing to do with it any more."""
        while not self._leaving:
            pulse, fresh = self._pulse, self._k.catalog.fresh
            async with self.busy:
                self._take_back()
                await self._take_notice()
                reported = await self._report()
                step = self._next_step() if reported or self._goes_on_alone() else Step.NOTHING
                await self._take(step if reported or step is Step.START else Step.NOTHING)
            if fresh:
                self.seen.set()
            if self.local is None and not self._ours():
                return
            if step in (Step.NOTHING, Step.WAIT):
                await self._sleep(pulse, reported)
        if self.local is not None and not self.held:
            if self.local.phase in ("running", "paused"):
                await self._end_guest(self.local)
            await self._put_away(self.local)

    def _ours(self) -> bool:
        wanted = self.wanted
        return wanted is not None and wanted.owner == self._k.me

    def _next_step(self) -> Step:
        if not self._k.catalog.fresh:
            return Step.NOTHING  # an old catalog may name an owner of long ago
        local, wanted = self.local, self.wanted
        actual = Actual(
            phase=local.phase if local else "absent",
            files=local is not None,
            held=self.held,
            retry_at=self._retry_at,
            may_run=wanted is None or not wanted.lease_bound or self._k.lease.valid,
            stale=wanted is not None and self._is_stale(wanted),
            outdated=local is not None and _outdated(local.record, wanted),
        )
        return next_step(wanted, self._k.me, actual, trio.current_time())

    def _take_back(self) -> None:
        """A handover of which this peer may never have known has failed over: the copy here is the guest."""
        if self.local is None or self.held:
            return
        record = self.local.record
        epoch = right_after_failover(self._k.catalog.state, self._k.me, record.id, record.epoch)
        if epoch != record.epoch:
            self.local.save(epoch=epoch)

    def _is_stale(self, guest: entries.Guest) -> bool:
        """Whether what is here was made by an earlier right than the catalog gives now: whatever became of
        it says nothing of the guest."""
        return self.local is not None and self.local.record.epoch < guest.epoch

    async def _sleep(self, pulse: int, reported: bool) -> None:
        """Until something changed, it is time to start the guest again, or to report again."""
        until = self._retry_at if reported and self._retry_at is not None else math.inf
        if not reported:
            until = trio.current_time() + REPORT_AGAIN
        with trio.move_on_at(until):
            await self._until(lambda: self._pulse != pulse)

    # Reporting.

    async def _report(self) -> bool:
        """Make the catalog know what was seen. False if it could not be told; then no step may be taken."""
        guest, seen = self.wanted, self._seen
        if guest is None or seen is None or guest.owner != self._k.me or self.held or self._is_stale(guest):
            return True
        if seen.is_known(guest) and not self._restarts:
            return True
        report = entries.Report(
            guest=guest.key,
            owner=self._k.me,
            epoch=guest.epoch,
            state=seen.state,
            exit_reason=seen.exit_reason,
            message=seen.message[:1000],
            started=seen.started,
            restarts=guest.restarts + self._restarts if self._restarts else None,
            cpu_features=seen.cpu_features,
            xsave_size=seen.xsave_size,
            held_to=seen.held_to,
        )
        entry: entries.Entry = report
        if seen.give_up == guest.wanted:
            instead: entries.WantedState = "running" if seen.give_up == "paused" else "stopped"
            give_up = entries.SetWanted(guest=guest.key, wanted=instead)
            entry = entries.Batch(entries=(report, give_up))
        try:
            await self._k.catalog.propose(entry, timeout=REPORT_TIMEOUT)
        except OperationError as error:
            self._unheard = error.code in (*UNDECIDED, "timeout", "unreachable")
            logger.warning("guest cannot be reported", guest=guest.key, code=error.code, error=error.message)
            return False
        self._unheard, self._restarts = False, 0
        # Said once: who wants it again later shall be heard.
        self._seen = replace(seen, give_up=None)
        return True

    def _goes_on_alone(self) -> bool:
        """Whether a guest that crashed may be started again although nobody can be told.

        It ran here by the right that this peer's own catalog still names, and goes on by it; that cannot give
        it a second copy that it would not have had anyway. A lease-bound one needs the lease besides. A guest
        that was not seen running here is not started: this peer may have missed that it went elsewhere.
        """
        guest = self.wanted
        right = (guest.owner, guest.epoch) if guest is not None else None
        return self._unheard and self._automatic and right is not None and right == self._ran_by

    async def _see(self, seen: Seen) -> bool:
        self._seen = replace(seen, message=seen.message[:1000])
        reported = await self._report()
        if reported and self._k.catalog.fresh:
            self.seen.set()
        return reported

    async def _take_notice(self) -> None:
        """Turn what happened to the processes into what is reported."""
        local, guest = self.local, self.wanted
        if local is None or guest is None or guest.owner != self._k.me or self.held or self._is_stale(guest):
            return
        if local.phase == "ended":
            await self._after_end(local, guest)
        elif self._stands_still(local, guest):
            self._seen = None  # until it goes on, only this peer can know
        elif local.phase in ("running", "paused") and local.record.stage == "ready":
            self._ran_by = (guest.owner, guest.epoch)
            state: entries.GuestState = "paused" if local.phase == "paused" or local.stalled else "running"
            if self._seen is None or (self._seen.state, self._seen.message) != (state, local.trouble):
                self._seen = Seen(state, message=local.trouble)
                if local.trouble:
                    self._k.events.emit("guest.trouble", guest=guest.key, message=local.trouble)

    def _stands_still(self, local: LocalGuest, guest: entries.Guest) -> bool:
        """Whether the end of the lease has stopped it; said once."""
        if local.expired_ns > self._stood_ns:
            self._stood_ns = local.expired_ns
            self._k.events.emit("guest.frozen", guest=guest.key, reason="lease", epoch=local.record.epoch)
        frozen = local.phase == "paused" and guest.wanted == "running" and local.record.stage == "ready"
        return local.stands_still or (local.record.lease_bound and frozen)

    async def _after_end(self, local: LocalGuest, guest: entries.Guest) -> None:
        exit = local.exit or Exit("crashed")
        asked = guest.wanted == "stopped"
        ran_for = max(0.0, self._k.clock() - local.record.started) if local.record.started else 0.0
        await self._put_away(local)
        self._k.events.emit("guest.exited", guest=guest.key, reason=exit.reason, message=exit.message)
        verdict = after_end(guest.restart_policy, exit.reason, ran_for, self._failures)
        message = exit.message or (local.trouble if is_failure(exit.reason) else "")
        if asked:
            self._seen = Seen("stopped", exit.reason, message)
        else:
            self._judge(guest, verdict, exit.reason, message)

    def _judge(self, guest: entries.Guest, verdict: Verdict, reason: str, message: str) -> None:
        self._failures = verdict.failures
        if verdict.restart:
            self._automatic = True
            self._retry_at = trio.current_time() + verdict.delay
            self._restarts += 1
            self._seen = Seen("starting", reason, message)
        else:
            self._retry_at = None
            self._seen = Seen(verdict.state, reason, message, give_up="running")
            if verdict.state == "failed":
                self._k.events.emit("guest.failed", guest=guest.key, reason=reason, message=message)

    async def _put_away(self, local: LocalGuest) -> None:
        """Take away what a guest that has ended leaves: its shim, disk processes, ports. Its files stay."""
        await local.end(force=False)
        try:
            local.save(stage="made", started=0.0)
        except OperationError as error:
            # The next process sees that its processes are gone, also without this.
            logger.warning("guest's record cannot be saved", guest=local.record.key, error=error.message)
        await local.remove_ports()
        local.phase = "absent"

    # Steps.

    async def _take(self, step: Step) -> None:
        guest, local = self.wanted, self.local
        match step:
            case Step.DISCARD if local is not None:
                await self._discard(local)
            case Step.START if guest is not None:
                await self._start(guest)
            case Step.STOP if guest is not None:
                await self._stop(guest)
            case Step.RESTART if guest is not None and local is not None:
                await self._end_for_change(local)
            case Step.PAUSE if guest is not None and local is not None:
                await self._pause(guest, local)
            case Step.RESUME if guest is not None and local is not None:
                await self._resume(guest, local)
            case Step.NOTHING if guest is not None and local is not None and self._half_booted(local):
                await self._attempt(guest, lambda: self._finish_boot(guest, local))
            case Step.NOTHING if guest is not None and local is not None and self._untold:
                await self._tell_anew(guest, local)

    def _half_booted(self, local: LocalGuest) -> bool:
        """Whether an earlier peer process started this guest and did not come to its end."""
        return self._ours() and not self.held and local.phase == "running" and local.record.stage != "ready"

    async def _tell_anew(self, guest: entries.Guest, local: LocalGuest) -> None:
        """Tell a guest that runs what has changed of its environment and of its neighbours' names."""
        if not self._ours() or self.held or local.phase != "running" or local.record.stage != "ready":
            return
        settings = deploy.settings_while_running(guest, self._k.catalog.state)
        digest = told_digest(settings)
        if digest != local.record.told:
            try:
                agent = await local.ready_agent(TELL_TIMEOUT)
                await agent.configure(settings)
                local.save(told=digest)
            except (AgentError, OperationError) as error:
                # The next change of its lab, or its next start, tells it.
                logger.warning("guest cannot be told", guest=guest.key, error=str(error))
        self._untold = False

    async def _discard(self, local: LocalGuest) -> None:
        """It was removed or stopped before it went elsewhere, or it is stale: what it did here since may be
        wanted by somebody, so its files are kept for a while."""
        wanted, record = self.wanted, local.record
        fenced = wanted is not None and local.phase != "absent"
        stood = stood_for(local)
        await local.end(force=True)
        await local.remove_ports()
        self.local, self._seen = None, None
        if fenced:
            kept = keep_aside(local.directory, record)
            self._k.events.emit(
                "guest.fenced", guest=record.key, epoch=record.epoch, stood=stood, kept=str(kept or "")
            )
            return
        local.remove_files()
        if wanted is None and not self.left_over:
            self._k.events.emit("guest.removed", guest=record.key)
            return
        there = self._k.catalog.state.peer_name(wanted.owner) if wanted is not None else ""
        reason = f"it was given to {there}" if there else "it was removed while this peer was away"
        self._k.events.emit("guest.discarded", guest=record.key, epoch=record.epoch, reason=reason)

    async def _pause(self, guest: entries.Guest, local: LocalGuest) -> None:
        try:
            await local.pause()
        except OperationError as error:
            local.trouble = error.message
            await self._see(Seen("running", message=error.message, give_up="paused"))
            return
        local.trouble = ""
        self._k.events.emit("guest.paused", guest=guest.key)
        await self._see(Seen("paused"))

    async def _resume(self, guest: entries.Guest, local: LocalGuest) -> None:
        try:
            await local.resume()
        except OperationError as error:
            if not guest.lease_bound:
                await self._see(Seen("paused", message=error.message))
            await trio.sleep(REPORT_AGAIN)
            return
        self._k.events.emit("guest.resumed", guest=guest.key)
        await self._see(Seen("running"))

    async def _stop(self, guest: entries.Guest) -> None:
        local = self.local
        reason = guest.exit_reason
        if local is not None and local.phase in ("running", "paused"):
            await self._end_guest(local)
            reason = local.exit.reason if local.exit else "killed"
            self._k.events.emit("guest.stopped", guest=guest.key, reason=reason)
        if local is not None:
            await self._put_away(local)
        self.force, self._failures, self._retry_at = False, 0, None
        await self._see(Seen("stopped", reason))

    async def _end_for_change(self, local: LocalGuest) -> None:
        await self._end_guest(local)
        await self._put_away(local)
        self._failures, self._retry_at, self._automatic = 0, None, False
        self._k.events.emit("guest.changed", guest=local.record.key)

    async def _end_guest(self, local: LocalGuest) -> None:
        """Ask the guest to power off; kill it if it does not, or if `force` says so, also meanwhile."""
        with trio.move_on_after(STOP_TIMEOUT):
            try:
                if local.phase == "paused" and not self.force:
                    await local.resume()
                while not self.force and local.phase != "ended":
                    agent = await local.ready_agent(STOP_TIMEOUT)
                    await agent.poweroff()
                    await self._until(lambda: self.force or local.phase == "ended")
            except (AgentError, OperationError) as error:
                logger.info("guest cannot be asked to stop", guest=local.record.key, error=str(error))
        if local.phase != "ended":
            await local.kill()
            with trio.move_on_after(STOP_TIMEOUT):
                await local.look()
                await self._until(lambda: local.phase == "ended")

    async def _until(self, predicate: Callable[[], bool]) -> None:
        await self._changed.wait_until(predicate)

    # Starting.

    async def _start(self, guest: entries.Guest) -> None:
        heard = await self._see(Seen("starting", guest.exit_reason if self._automatic else ""))
        if not heard and not self._goes_on_alone():
            await trio.sleep(REPORT_AGAIN)
            return
        await self._attempt(guest, lambda: self._bring_up(guest))

    async def _attempt(self, guest: entries.Guest, work: Callable[[], Awaitable[None]]) -> None:
        """Do `work`, unless the guest is not wanted any more while that goes on; if it fails, nothing is
        left.
        """
        failure: OperationError | None = None
        finished = False
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._cancel_when_unwanted, nursery.cancel_scope)
            try:
                await work()
                finished = True
            except OperationError as error:
                failure = error
            except AgentError as error:
                failure = OperationError("failed", str(error))
            finally:
                if not finished:
                    with trio.CancelScope(shield=True):
                        await self._after_failed_start(guest, failure)
            nursery.cancel_scope.cancel()

    async def _cancel_when_unwanted(self, scope: trio.CancelScope) -> None:
        await self._until(lambda: not self._ours() or self._leaving or self._wants("stopped"))
        scope.cancel()

    def _wants(self, wanted: entries.WantedState) -> bool:
        guest = self.wanted
        return guest is not None and guest.wanted == wanted

    async def _after_failed_start(self, guest: entries.Guest, failure: OperationError | None) -> None:
        local = self.local
        reason, message = "start-failed", failure.message if failure else ""
        if local is not None:
            if local.phase == "ended" and local.exit is not None:
                reason, message = local.exit.reason, local.exit.message or message
            await local.end(force=True)
            await self._put_away(local)
        if failure is None:
            self._seen = None
            return
        logger.warning("guest cannot be started", guest=guest.key, error=message)
        policy = guest.restart_policy if self._automatic else "never"
        hint = f" ({failure.hint})" if failure.hint else ""
        self._judge(guest, after_end(policy, reason, 0.0, self._failures), reason, message + hint)

    async def _bring_up(self, guest: entries.Guest) -> None:
        image, kernel = await self._material(guest)
        local = self.local = self._prepared(guest, image, kernel)
        await self._k.predecessor_gone(guest)
        await self._k.admit(guest, lambda: local.start(guest, image, kernel))
        self._k.watch(local)
        await self._finish_boot(guest, local)

    async def _finish_boot(self, guest: entries.Guest, local: LocalGuest) -> None:
        """Tell a guest that boots who it is, and run its commands. Raises `OperationError`, `AgentError`."""
        agent = await local.ready_agent(BOOT_TIMEOUT)
        local.save(stage="booted", started=local.record.started or self._k.clock())
        state = self._k.catalog.state
        await agent.configure(deploy.settings(guest, state))
        told = told_digest(deploy.settings_while_running(guest, state))
        for command in guest.exec:
            await run_command(agent, command)
        local.save(stage="ready", told=told)
        self._retry_at, self._automatic = None, False
        self._k.events.emit("guest.started", guest=guest.key, image=guest.image)
        processor = self._k.processor
        await self._see(
            Seen(
                "running",
                started=local.record.started,
                cpu_features=tuple(sorted(processor.features)),
                xsave_size=processor.xsave_size,
                held_to="freeze" if local.record.lease_bound else "run",
            )
        )

    async def _material(self, guest: entries.Guest) -> tuple[Image, Kernel]:
        if guest.image_hash:
            image = await self._k.images.ensure(guest.image, guest.image_hash)
        else:
            image = self._k.images.find(guest.image)
        return image, await self._k.images.current_kernel()

    def _prepared(self, guest: entries.Guest, image: Image, kernel: Kernel) -> LocalGuest:
        """The local guest with a record that fits what is wanted now; its disks keep what they hold."""
        record = record_of(self._k.around, guest, image, kernel)
        if self.local is not None:
            self.local.record = record
            return self.local
        begin_afresh(record.disks)
        return LocalGuest(self._k.around, record, self.wake)


def record_of(around: Surroundings, guest: entries.Guest, image: Image, kernel: Kernel) -> Record:
    """The record of a guest that is about to be made."""
    directory = around.directory / guest.id
    disks = [DiskPlan("vda", directory / "vda.overlay", image.root)]
    if guest.disk:
        disks.append(DiskPlan("vdb", directory / "vdb.overlay", None, guest.disk))
    return Record(
        key=guest.key,
        id=guest.id,
        epoch=guest.epoch,
        image=image.name,
        image_hash=image.sha256,
        kernel=kernel.sha256,
        init=image.init,
        memory=guest.memory,
        cpus=guest.cpus,
        disks=tuple(disks),
        interfaces=guest.interfaces,
        lease_bound=guest.lease_bound,
    )


def _outdated(record: Record, wanted: entries.Guest | None) -> bool:
    """Whether the processes must be made anew for what is asked of the guest now."""
    if wanted is None:
        return False
    made = (record.memory, record.cpus, record.interfaces, record.lease_bound)
    return made != (wanted.memory, wanted.cpus, wanted.interfaces, wanted.lease_bound)


async def run_command(agent: Agent, command: str) -> None:
    """Run one command of the lab file; raises `OperationError` with the end of its output if it fails."""
    tail = bytearray()
    async with agent.exec(["/bin/sh", "-c", command]) as session:
        await session.close_input()
        while (piece := await session.read()) is not None:
            tail += piece[1]
            del tail[:-OUTPUT_TAIL]
        code = session.result.get("code") if session.result else None
    if code != 0:
        said = bytes(tail).decode(errors="replace").strip().replace("\n", " | ")
        raise OperationError(
            "failed",
            f"the command {command!r} failed in {agent.guest} with code {code}"
            + (f": {said}" if said else ""),
        )
