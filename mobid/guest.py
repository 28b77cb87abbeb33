# SPDX-License-Identifier: Apache-2.0
"""One guest that lives here: its directory, its processes, its agent.

A guest is a shim with a kernel below it, a disk process per disk, a port of the switch per interface. This
module starts and ends them together, takes them back after a restart of the peer, and notices when one of
them dies; it knows nothing of the catalog and decides nothing (`guests.py` does).

What must survive the peer is in `guest.json` (`Record`): with it and the sockets' names, which follow from
the guest's id, everything is found again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import structlog
import trio

from mobid.agent import Agent
from mobid.config import unwritable, write_durably
from mobid.guest_disk import Disk, DiskPlan
from mobid.guest_record import Record
from mobid.helpers import Helper, HelperError, Helpers
from mobid.images import Image, Kernel
from mobid.lease import Lease
from mobid.signal import Changed
from proto import entries
from proto.api import OperationError
from proto.reconcile import Phase

logger = structlog.get_logger(__name__)

FREEZE_TIMEOUT = 10.0
KILL_TIMEOUT = 10.0
REATTACH_PAUSE = 0.5
ADOPT_TIMEOUT = 10.0
ADOPT_ATTEMPTS = 3
RECONNECT_TIMEOUT = 30.0
LEASE_TIMEOUT = 5.0
REST = ".removed-"
"""A directory with this prefix belongs to no guest any more."""
OVERLAY_RESERVE = 64 << 20
"""Bytes that must be free on the peer's file system before a guest is started."""


class Ports(Protocol):
    """The part of `networks` that a guest needs."""

    async def add_port(
        self, guest: entries.Guest, interface: entries.Interface, *, incoming: bool = False
    ) -> Path:
        """Make the port of this interface; its vhost-user socket exists then. Again: the same port."""
        ...

    async def remove_port(self, guest: str, interface: str) -> None:
        """Remove the port of this interface of the guest LAB/NAME; no error if it is not there."""
        ...


@dataclass(frozen=True, slots=True)
class Exit:
    """Why a guest ended: `reason` is poweroff, reboot, panic, killed or crashed."""

    reason: str
    message: str = ""
    code: int = 0


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every guest of a peer is made with."""

    helpers: Helpers
    ports: Ports
    directory: Path
    sockets: Path
    lease: Lease
    entitled: Callable[[Record], bool]
    """Whether a lease-bound copy has the right to run at this moment."""


def remove_rests(directory: Path) -> None:
    """Remove what is left of guests whose removal was cut short by a crash; `directory` has all guests'."""
    for rest in directory.glob(f"{REST}*"):
        shutil.rmtree(rest, ignore_errors=True)


class LocalGuest:
    """One guest of this peer. Its `run` is the task that watches its processes; other tasks tell it what to
    do.

    `changed` is set, and `notify` called, whenever `phase`, `exit` or `trouble` may have changed.
    """

    def __init__(self, around: Surroundings, record: Record, notify: Callable[[], None]) -> None:
        self.record = record
        self.phase: Phase = "absent"
        self.exit: Exit | None = None
        self.trouble = ""
        """What is wrong although the guest still exists; empty if nothing is."""
        self.stalled = False
        """Whether it waits for a disk that has no space left."""
        self.expired_ns = 0
        """The last deadline at which the shim stopped it, because nobody had extended its lease."""
        self.deadline_ns = 0
        """Until when the shim lets it run (CLOCK_BOOTTIME), as it was last told; 0 for ever."""
        self.shim: Helper | None = None
        self.disks: list[Disk] = []
        self.agent: Agent | None = None
        self.changed = Changed()
        self._around = around
        self._notify = notify
        self._memory_fd = -1
        self._expected_end = False
        self._waiting = False
        self._scope = trio.CancelScope()

    def _tell(self) -> None:
        self.changed.set()
        self._notify()

    # Its directory.

    @property
    def directory(self) -> Path:
        return self._around.directory / self.record.id

    @property
    def console_log(self) -> Path:
        return self.directory / "console.log"

    def save(self, **changes: Any) -> None:
        """Change the record, durably. Raises `OperationError`, as when the disk is full."""
        self.record = replace(self.record, **changes)
        try:
            self.directory.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise unwritable(self.directory, error) from None
        write_durably(self.directory / "guest.json", self.record.dump())

    def remove_files(self) -> None:
        """Forget the guest for good: a crash on the way leaves none of its files under its name."""
        rest = self.directory.with_name(f"{REST}{self.directory.name}")
        shutil.rmtree(rest, ignore_errors=True)
        with contextlib.suppress(OSError):  # there is nothing, or nothing here can be changed
            self.directory.rename(rest)
            shutil.rmtree(rest, ignore_errors=True)

    # Starting.

    async def start(
        self, guest: entries.Guest, image: Image, kernel: Kernel, *, incoming: bool = False
    ) -> None:
        """Make its processes; raises `OperationError` and leaves none.

        `incoming`: the memory is empty and the kernel waits for `go`.
        """
        self._check_room()
        self.exit, self.trouble, self._expected_end = None, "", False
        self.expired_ns = self.deadline_ns = 0
        self.save()
        try:
            await self._start_disks(image)
            await self._add_ports(guest, incoming)
            await self._start_shim(kernel, incoming)
        except BaseException as error:
            with trio.CancelScope(shield=True):
                await self.end(force=True)
            if isinstance(error, HelperError):
                raise OperationError("failed", f"{guest.key} cannot be started: {error.message}") from error
            raise
        self._tell()

    def _check_room(self) -> None:
        stat = os.statvfs(self._around.directory)
        free = stat.f_bavail * stat.f_frsize
        if free < OVERLAY_RESERVE:
            raise OperationError(
                "no-room",
                f"{self._around.directory} has {free >> 20} MiB left; a guest needs {OVERLAY_RESERVE >> 20}",
                "make room there, or start the peer with another --dir",
            )

    async def _start_disks(self, image: Image) -> None:
        for plan in self.record.disks:
            fresh = replace(plan, base=image.root) if plan.name == "vda" else plan
            disk = await Disk.start(
                self._around.helpers, fresh, self._around.sockets, self.record.id, self.directory / "disk.log"
            )
            self.disks.append(disk)
        self.save(disks=tuple(disk.plan for disk in self.disks))

    async def _add_ports(self, guest: entries.Guest, incoming: bool) -> None:
        ports = self._around.ports
        paths = [await ports.add_port(guest, i, incoming=incoming) for i in self.record.interfaces]
        self.save(ports=tuple(str(path) for path in paths))

    async def _start_shim(self, kernel: Kernel, incoming: bool) -> None:
        record = self.record
        arguments: list[str | Path] = ["--kernel", kernel.path, "--memory", str(record.memory)]
        arguments += ["--console", self.console_log, "--cpus", str(record.cpus)]
        for disk in self.disks:
            arguments += ["--device", f"blk:{disk.socket}"]
        for port in record.ports:
            arguments += ["--device", f"net:{port}"]
        arguments += ["--append", f"root=/dev/vda rw init={record.init}"]
        if mode := os.environ.get("MOBI_GUEST_MODE"):
            arguments += ["--mode", mode]
        if incoming:
            arguments += ["--resume"]
        self._control.unlink(missing_ok=True)
        if record.lease_bound:
            arguments += ["--lease", str(self._first_deadline())]
        self.shim = await self._around.helpers.start(
            "guest", arguments, control=self._control, log=self.directory / "shim.log"
        )
        self.phase = "paused" if incoming else "running"
        await self._get_memory()

    def _first_deadline(self) -> int:
        """From its first instruction on: who would tell the shim later may be gone by then.

        Nothing may happen between this and the start of the shim, or the right could go elsewhere first.
        """
        if not self._around.entitled(self.record):
            raise OperationError("conflict", f"{self.record.key} has gone elsewhere meanwhile")
        self.deadline_ns = self._around.lease.deadline_ns
        return self.deadline_ns

    @property
    def _control(self) -> Path:
        return self._around.sockets / f"{self.record.id}.shim"

    # Taking back what an earlier peer started.

    async def adopt(self) -> None:
        """Find the processes again. `phase` tells what there is; a lost disk process is replaced by `run`."""
        try:
            self.shim = await self._adopt_shim()
        except HelperError as error:
            if error.code != "not-found":
                logger.warning("shim cannot be adopted", guest=self.record.key, error=error.message)
            await self._adopt_disks()
            await self.end(force=True)
            if self.record.stage != "made":
                self.phase, self.exit = (
                    "ended",
                    Exit("crashed", "its processes were gone when the peer started"),
                )
            return
        await self._adopt_disks()
        with contextlib.suppress(HelperError):
            await self._get_memory()
        await self.look()

    async def _adopt_shim(self) -> Helper:
        """Only a socket that nobody serves says that the guest is gone; a slow host is given time."""
        for _ in range(ADOPT_ATTEMPTS):
            try:
                return await self._around.helpers.adopt(self._control, role="guest", timeout=ADOPT_TIMEOUT)
            except HelperError as error:
                if error.code == "not-found":
                    raise
                failure = error
        raise failure

    async def _adopt_disks(self) -> None:
        for plan in self.record.disks:
            try:
                disk = await Disk.adopt(self._around.helpers, plan, self._around.sockets, self.record.id)
            except HelperError:
                self.trouble = f"the disk process of /dev/{plan.name} is gone"
                continue
            self.disks.append(disk)

    # Watching.

    async def run(self) -> None:
        """Watch the processes until `end` has been called or the task is cancelled."""
        if self.shim is None:
            return
        self._scope = trio.CancelScope()
        with self._scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_shim, self.shim)
                nursery.start_soon(self._keep_agent)
                for plan in self.record.disks:
                    nursery.start_soon(self._watch_disk, plan)

    async def look(self) -> None:
        """Ask the shim for the guest's state."""
        if self.shim is None:
            return
        try:
            status, _ = await self.shim.call("status")
        except HelperError as error:
            if error.code == "gone":
                self.shim.kill()
                self._ended(Exit("crashed", "its shim ended unexpectedly"))
            else:
                self.trouble = f"its shim does not answer ({error.message})"
                self._tell()
            return
        self.deadline_ns = int(status.get("deadline_ns") or 0)
        if status.get("expired"):
            self.expired_ns = self.deadline_ns
        self._take(str(status.get("state")), status.get("exit"))

    def _take(self, state: str, exit: Any) -> None:
        self._waiting = state == "waiting"
        if state == "exited":
            facts = exit if isinstance(exit, dict) else {}
            self._ended(
                Exit(
                    str(facts.get("reason", "crashed")),
                    str(facts.get("message") or ""),
                    int(facts.get("code") or 0),
                )
            )
        elif state in ("frozen", "waiting"):
            self._set_phase("paused")
        else:
            self._set_phase("running")

    def _set_phase(self, phase: Phase) -> None:
        if self.agent is not None and phase != self.phase:
            if phase == "paused":
                self.agent.suspend()
            elif self.phase == "paused":
                self.agent.unsuspend()
        self.phase = phase
        self._tell()

    def _ended(self, exit: Exit) -> None:
        if self.phase == "ended":
            return
        self.exit = exit
        if self.agent is not None:
            self.agent.close(f"{self.record.key} ended ({exit.reason})")
        self._set_phase("ended")

    async def _watch_shim(self, shim: Helper) -> None:
        async for event in shim.events:
            if event.get("event") == "state":
                self._take(str(event.get("state")), event.get("exit"))
            elif event.get("event") == "expired":
                self.expired_ns = int(event.get("deadline_ns") or 0)
                self._tell()
        await self.look()

    async def _watch_disk(self, plan: DiskPlan) -> None:
        while True:
            disk = next((disk for disk in self.disks if disk.plan.name == plan.name), None)
            if disk is not None:
                await self._look_at_disk(disk)
                async for event in disk.helper.events:
                    self._disk_said(plan, event)
                await disk.helper.exited.wait()
                disk.helper.forget()
                self.disks.remove(disk)
            if self._expected_end or self.phase == "ended":
                return
            await self._replace_disk(plan)

    async def _look_at_disk(self, disk: Disk) -> None:
        with contextlib.suppress(HelperError):
            status, _ = await disk.helper.call("status")
            if status.get("state") != "ok":
                self._disk_said(disk.plan, {**status, "event": "state"})

    def _disk_said(self, plan: DiskPlan, event: dict[str, Any]) -> None:
        if event.get("event") != "state":
            return
        state, message = event.get("state"), event.get("message") or "no reason given"
        self.stalled = state == "no-space"
        self.trouble = "" if state == "ok" else f"/dev/{plan.name}: {message}"
        self._tell()

    async def _replace_disk(self, plan: DiskPlan) -> None:
        """A disk process died: start another on the same files and let the guest go on with it."""
        self.trouble = f"the disk process of /dev/{plan.name} died; the guest waits for another"
        self._tell()
        try:
            disk = await Disk.start(
                self._around.helpers, plan, self._around.sockets, self.record.id, self.directory / "disk.log"
            )
            self.disks.append(disk)
            self.disks.sort(key=lambda disk: disk.plan.name)
            await self._reconnect()
        except HelperError as error:
            self.trouble = f"/dev/{plan.name} was lost and could not be restored: {error.message}"
            await self.kill()
            return
        self.trouble = ""
        self._tell()

    async def _reconnect(self) -> None:
        if len(self.disks) == len(
            self.record.disks
        ):  # else another is being replaced, and will do it for both
            await self.reconnect()

    async def reconnect(self) -> None:
        """Let the guest go on with the devices there are now, after a backend of one was replaced."""
        if self.shim is None:
            raise HelperError("gone", "the guest has no shim")
        devices = [*(str(disk.socket) for disk in self.disks), *self.record.ports]
        await self.shim.call("reconnect", timeout=RECONNECT_TIMEOUT, devices=devices)

    # Its agent.

    async def _keep_agent(self) -> None:
        while self.phase != "ended" and self.shim is not None and self.shim.alive:
            try:
                stream = await self._stream("agent")
            except HelperError as error:
                logger.warning("agent cannot be attached", guest=self.record.key, error=error.message)
            else:
                self.agent = Agent(stream, self.record.key)
                if self.phase == "paused":
                    self.agent.suspend()
                self._tell()
                try:
                    await self.agent.run()
                finally:
                    self.agent = None
            await trio.sleep(REATTACH_PAUSE)

    async def _stream(self, op: str) -> trio.SocketStream:
        if self.shim is None:
            raise HelperError("gone", "the guest does not run")
        _, fds = await self.shim.call(op)
        for fd in fds[1:]:
            os.close(fd)
        if not fds:
            raise HelperError("internal", f"the shim answered {op} without a descriptor")
        return trio.SocketStream(trio.socket.from_stdlib_socket(socket.socket(fileno=fds[0])))

    async def console(self) -> trio.SocketStream:
        """A stream to the console: what it prints from now on, and its keyboard. Raises `OperationError`."""
        try:
            return await self._stream("console")
        except HelperError as error:
            raise OperationError("failed", f"the console of {self.record.key}: {error.message}") from error

    async def ready_agent(self, timeout: float) -> Agent:
        """The agent once it has said hello. Raises `AgentError`, or `OperationError` if the guest does not
        run.
        """
        with trio.move_on_after(timeout):
            await self.changed.wait_until(
                lambda: self.agent is not None or self.phase not in ("running", "paused")
            )
        if self.agent is None:
            if self.phase in ("running", "paused"):
                raise OperationError("timeout", f"the agent of {self.record.key} cannot be reached")
            why = f" ({self.exit.reason})" if self.exit else ""
            raise OperationError("failed", f"{self.record.key} does not run{why}")
        await self.agent.wait_ready(timeout)
        return self.agent

    # Freezing, thawing, ending.

    async def pause(self) -> None:
        """Freeze the guest; raises `OperationError` if that fails, and then it runs."""
        await self._ask("freeze", timeout_ms=int(FREEZE_TIMEOUT * 1000))
        self._set_phase("paused")

    async def resume(self) -> None:
        """Let it go on; raises `OperationError`, as when it is bound to a lease that has run out."""
        await self._ask("go" if self._waiting else "thaw")
        self._waiting = False
        self._set_phase("running")

    async def extend_lease(self, deadline_ns: int) -> None:
        """It may run until then. One that was stopped goes on, one that was frozen waits for `resume`.

        The caller has made sure that this copy has the right to run. Raises `HelperError`.
        """
        if self.shim is None:
            raise HelperError("gone", "the guest has no shim")
        stood, self.deadline_ns = self.stands_still, deadline_ns
        await self.shim.call("lease", timeout=LEASE_TIMEOUT, deadline_ns=deadline_ns)
        if stood:
            self._tell()

    @property
    def stands_still(self) -> bool:
        """Whether it runs only by a lease, and was stopped by the end of the one it had."""
        expired = 0 < self.deadline_ns <= self.expired_ns
        return self.record.lease_bound and expired and self.phase in ("running", "paused")

    async def _ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        if self.shim is None:
            raise OperationError("failed", f"{self.record.key} does not run")
        try:
            reply, _ = await self.shim.call(op, timeout=FREEZE_TIMEOUT + 5, **arguments)
        except HelperError as error:
            raise OperationError("failed", f"{op} of {self.record.key}: {error.message}") from error
        return reply

    async def kill(self) -> None:
        """Kill the guest's processes; its shim stays to tell."""
        if self.shim is not None:
            with contextlib.suppress(HelperError):
                await self.shim.call("kill", timeout=KILL_TIMEOUT)

    async def end(self, *, force: bool) -> None:
        """End all of its processes (a guest that still runs is killed). With `force` its disks are not
        synced.
        """
        self._expected_end = True
        if self.shim is not None:
            await self.shim.quit()
            self.shim.forget()
            self.shim = None
        self._scope.cancel()
        for disk in self.disks:
            await disk.quit(sync=not force)
        self.disks.clear()
        if self._memory_fd >= 0:
            os.close(self._memory_fd)
            self._memory_fd = -1
        self.agent = None
        if self.phase != "ended":
            self.phase = "absent"
        self._tell()

    async def remove_ports(self) -> None:
        """Take its interfaces out of the switch."""
        for interface in self.record.interfaces:
            try:
                await self._around.ports.remove_port(self.record.key, interface.name)
            except (OperationError, HelperError) as error:
                logger.warning("port cannot be removed", guest=self.record.key, error=str(error))

    # Memory.

    async def _get_memory(self) -> None:
        """Keep a descriptor of the guest's memory, to see how much of it is used."""
        if self.shim is None or self._memory_fd >= 0:
            return
        _, fds = await self.shim.call("memory")
        self._memory_fd, *rest = fds
        for fd in rest:
            os.close(fd)

    @property
    def untouched(self) -> int:
        """Bytes of its memory that it has not used yet and may still ask the host for."""
        if self._memory_fd < 0:
            return 0
        return max(0, self.record.memory - os.fstat(self._memory_fd).st_blocks * 512)
