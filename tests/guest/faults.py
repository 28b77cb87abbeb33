# SPDX-License-Identifier: Apache-2.0
"""A migration that is hit by a fault at a chosen step, with real peers, helpers and guests.

A *case* is a step of the handover and something that fails there: a peer's process or a `pages` process is
killed, or the bulk connection is cut. Steps are hit exactly, by holding the peer before the next effect
(`mobid/breakpoints.py`), or, for the two passes, by waiting until one is under way. Afterwards killed peers
are started again in their directories, and what must hold whatever failed is checked: exactly one copy of the
guest runs, at the peer that the rules of `proto/handover.py` name; the guest's own witness finds no memory
page, disk record or byte of its connection wrong, and nothing that it counts has gone back; nothing of the
other copy and of the migration is left.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import sys
import tempfile
import termios
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import trio

from mobid.tasks import background
from proto.api import OperationError
from tests.guest.peers import PeerProcess, eventually
from tests.guest.test_runtime import owner_of
from tests.guest.witness import MOVER, Load, Witnesses, two_peers

LOAD = Load(memory=4, threads=1, rate=20)
BANDWIDTH = 4_000_000
"""Bytes/s of the passes, slow enough to hit one that is under way."""
REACH_TIMEOUT = 30.0
SETTLE_TIMEOUT = 60.0
PIDFD_GETFD = 438

Side = Literal["source", "destination"]
Fault = Literal["source", "destination", "source pages", "destination pages", "connection"]

FAULTS: tuple[Fault, ...] = ("source", "destination", "source pages", "destination pages", "connection")

STEPS: dict[str, tuple[Side, str] | int] = {
    "prepared": ("destination", "ReportReady"),
    "first pass": 1,
    "later pass": 2,
    "before the freeze": ("source", "Freeze"),
    "frozen": ("source", "SendFinal"),
    "releasing": ("source", "SendFinal"),
    "released": ("destination", "Start"),
    "running": ("destination", "Propose"),
    "done": ("destination", "Sync"),
    "durable": ("source", "Discard"),
}
"""Where a case happens: before which effect of which side, or in which pass. In `releasing` the release has
left, and waits at the destination's host for a receiver that is stopped: nobody can say whether it arrives.
"""

AFTER_RELEASE = ("released", "running", "done", "durable")


@dataclass(frozen=True)
class Case:
    """A step and a fault."""

    step: str
    fault: Fault

    def __str__(self) -> str:
        killed = {"source": "mobid at the source", "destination": "mobid at the destination"}
        return f"{self.step}: {killed.get(self.fault, self.fault)}"

    @property
    def ends_at(self) -> Side | None:
        """Where the guest must run in the end: at the source until the release has arrived. A destination
        that dies between the release and the start never ran the guest, and refuses it. None: where it
        depends, and either is right as long as both peers agree.
        """
        if self.step == "releasing":
            return None
        if self.step == "released" and self.fault == "destination":
            return "source"
        return "destination" if self.step in AFTER_RELEASE else "source"


CASES = tuple(Case(step, fault) for step in STEPS for fault in FAULTS)


class Laboratory:
    """Tries one case after the other."""

    def __init__(self, witnesses: Witnesses) -> None:
        self._witnesses = witnesses

    async def try_out(self, case: Case, source: str | None = None) -> None:
        """Migrate from the peer `source` (default: from where the guest is), let the fault happen, and check
        that all is well afterwards. Raises `AssertionError` or `OperationError` if not.
        """
        if source is not None and self._witnesses.at.name != source:
            assert (await self._witnesses.move())["ok"]
            right, other = self._witnesses.at, self._witnesses.elsewhere
            await eventually(lambda: nothing_left(right, other))
        sides: dict[Side, PeerProcess] = {
            "source": self._witnesses.at,
            "destination": self._witnesses.elsewhere,
        }
        assert not await self._witnesses.wrong()
        step = STEPS[case.step]
        passing = trio.Event()
        async with background(lambda: self._migrate(sides, case, passing)):
            with trio.fail_after(REACH_TIMEOUT):
                if isinstance(step, int):
                    await passing.wait()
                    await self._fail(case.fault, sides)
                else:
                    receiver = 0
                    async with held(sides[step[0]], f"{step[0]}.{step[1]}"):
                        if case.step == "releasing":
                            receiver = stopped(await pages_of(sides["destination"], "in"))
                        else:
                            await self._fail(case.fault, sides)
                    if receiver:
                        await under_way(receiver)
                        await self._fail(case.fault, sides)
                        go_on(receiver)
        for peer in sides.values():
            if peer.process is not None and peer.process.poll() is not None:
                await peer.start()
        await self._check(case, sides)

    async def _migrate(self, sides: dict[Side, PeerProcess], case: Case, passing: trio.Event) -> None:
        """Ask for the migration; the answer is of no interest, and may be that there is none."""
        wishes: dict[str, str | int] = {"vm": MOVER, "to": sides["destination"].name}
        if isinstance(STEPS[case.step], int):
            wishes |= {"bandwidth": BANDWIDTH}
        with suppress(OperationError, OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            async with sides["source"].client() as client, client.request("vm.migrate", wishes) as request:
                async for item in request:
                    if "done_bytes" in item and item["pass"] == STEPS[case.step]:
                        passing.set()
        await trio.sleep_forever()

    async def _fail(self, fault: Fault, sides: dict[Side, PeerProcess]) -> None:
        """Let the fault happen; returns when it has."""
        match fault:
            case "source" | "destination":
                sides[fault].kill()
            case "source pages":
                await end_process(await pages_of(sides["source"], "out"))
            case "destination pages":
                await end_process(await pages_of(sides["destination"], "in"))
            case "connection":
                cut(await pages_of(sides["source"], "out"))

    # Checking.

    async def _check(self, case: Case, sides: dict[Side, PeerProcess]) -> None:
        try:
            with trio.fail_after(SETTLE_TIMEOUT):
                end = case.ends_at or await eventually(lambda: agreed(sides))
                right, other = sides[end], sides["source" if end == "destination" else "destination"]
                await eventually(lambda: runs_at(right, right.name))
                await eventually(lambda: nothing_left(right, other))
                self._witnesses.at = right
                await self._witnesses.working()
        except trio.TooSlowError:
            raise AssertionError(f"{case}: {await self._how_it_is(sides)}") from None
        wrong = await self._witnesses.wrong()
        assert not wrong, f"{case}: {'; '.join(wrong)}"

    async def _how_it_is(self, sides: dict[Side, PeerProcess]) -> str:
        """What is not as it should be after the time to settle, for a person."""
        words = []
        for side, peer in sides.items():
            row = await peer.call("vm.show", {"vm": MOVER})
            left = sorted(str(path.relative_to(peer.directory)) for path in remains(peer))
            words.append(f"the {side} ({peer.name}) says {row['state']} at {row['peer']}, and has {left}")
        return "; ".join(words)


@asynccontextmanager
async def laboratory() -> AsyncIterator[Laboratory]:
    """Two peers, and the two witnesses on them."""
    with tempfile.TemporaryDirectory(prefix="mobi-faults-") as base:
        async with two_peers(Path(base)) as peers:
            witnesses = Witnesses(*peers)
            await witnesses.start(LOAD)
            yield Laboratory(witnesses)


async def runs_at(peer: PeerProcess, wanted: str) -> bool:
    row = await peer.call("vm.show", {"vm": MOVER})
    return bool(row["state"] == "running" and row["peer"] == wanted)


async def agreed(sides: dict[Side, PeerProcess]) -> Side | None:
    """The side of which both peers say that the guest runs there."""
    for side, peer in sides.items():
        if all([await runs_at(one, peer.name) for one in sides.values()]):
            return side
    return None


def remains(peer: PeerProcess) -> list[Path]:
    """Directories of the moved guest, and notes of migrations."""
    guests = [path.parent for path in (peer.directory / "guests").glob("*/vdb.overlay")]
    return [*guests, *(peer.directory / "migrations").iterdir()]


async def nothing_left(right: PeerProcess, other: PeerProcess) -> bool:
    """Whether there is one copy of the guest, and nothing of the migration."""
    (id,) = [path.name for path in remains(right) if path.parent.name == "guests"] or [""]
    alive = [peer for peer in (right, other) if id and shims_of(peer, id)]
    return len(remains(right)) == 1 and not remains(other) and alive == [right]


def shims_of(peer: PeerProcess, id: str) -> list[int]:
    """The processes that hold a guest's kernel at a peer."""
    wanted = str(peer.socket.with_name(f"{id}.shim")).encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_bytes().split(b"\0")
            found += [int(path.parent.name)] if wanted in words and b"guest" in words else []
    return found


# Making things fail.


@asynccontextmanager
async def held(peer: PeerProcess, name: str) -> AsyncIterator[None]:
    """Until the peer waits at this breakpoint; it goes on after the block."""
    directory = Path(peer.environment["MOBI_BREAKPOINTS"])
    directory.mkdir(exist_ok=True)
    armed, reached = directory / name, directory / f"{name}.reached"
    armed.touch()
    try:
        while not reached.exists():  # noqa: ASYNC110 - what is awaited is another process
            await trio.sleep(0.01)
        yield
    finally:
        armed.unlink(missing_ok=True)
        reached.unlink(missing_ok=True)


async def pages_of(peer: PeerProcess, end: Literal["out", "in"]) -> int:
    """The `pages` process of the migration at this peer, 0 if it has ended already."""
    for control in peer.socket.parent.glob(f"*.{end}"):
        with suppress(AssertionError, StopIteration, RuntimeError):
            return await owner_of(control)
    return 0


async def end_process(pid: int) -> None:
    """SIGKILL, and wait until the process is gone."""
    if not pid:
        return
    with suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        await trio.lowlevel.wait_readable(pidfd)
        os.close(pidfd)


def connection_of(pid: int) -> socket.socket | None:
    """The TCP connection of a process, shared with it."""
    pidfd = os.pidfd_open(pid)
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        for path in Path(f"/proc/{pid}/fd").iterdir():
            if not os.readlink(path).startswith("socket:"):
                continue
            fd = libc.syscall(PIDFD_GETFD, pidfd, int(path.name), 0)
            assert fd >= 0, f"no descriptor of process {pid} can be had: {os.strerror(ctypes.get_errno())}"
            found = socket.socket(fileno=fd)
            if found.family in (socket.AF_INET, socket.AF_INET6):
                return found
            found.close()
    finally:
        os.close(pidfd)
    return None


def cut(pid: int) -> None:
    """Shut down the TCP connection of a process, as a firewall in between would."""
    connection = connection_of(pid) if pid else None
    if connection is not None:
        with connection:
            connection.shutdown(socket.SHUT_RDWR)


def stopped(pid: int) -> int:
    """Stop a process; returns it."""
    assert pid, "there is no process that receives"
    os.kill(pid, signal.SIGSTOP)
    return pid


def go_on(pid: int) -> None:
    """Let a process that was stopped go on, if it still exists."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


async def under_way(receiver: int) -> None:
    """Until all that is sent to a stopped process has arrived at its host."""
    connection = connection_of(receiver)
    assert connection is not None, "the receiver has no connection"
    before = -1
    with connection:
        while (waiting := waiting_bytes(connection)) == 0 or waiting != before:
            before = waiting
            await trio.sleep(0.1)


def waiting_bytes(connection: socket.socket) -> int:
    """How many bytes nobody has read yet."""
    answer = fcntl.ioctl(connection, termios.FIONREAD, b"\0" * 4)
    return int.from_bytes(answer, sys.byteorder)
