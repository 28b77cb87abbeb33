# SPDX-License-Identifier: Apache-2.0
"""Ending the peers of a directory, whatever state they are in.

A peer that answers is asked, and ends its guests first. One that does not is told by signals; one that
was killed has left helpers, which are found by their sockets. No process id is trusted alone: a peer
holds a lock on its pid file, and as long as the lock is held, the number in it is the holder's.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import trio

from mobictl import client, helpers
from mobictl.places import LocalPeer, Manifest, lock_holder
from mobictl.progress import Reporter
from proto.api import OperationError

STOP_TIMEOUT: Final = 120.0
STOP_ATTEMPTS: Final = 3
END_TIMEOUT: Final = 3.0
TERM_TIMEOUT: Final = 5.0
POLL: Final = 0.05


class Holder:
    """The process that holds a pid file, by a pidfd: signals and waiting can never meet another process."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def of(cls, pid_file: Path) -> Holder | None:
        """None if nobody holds it. The lock, still held afterwards, vouches for the number."""
        deadline = time.monotonic() + TERM_TIMEOUT
        while (pid := lock_holder(pid_file)) and time.monotonic() < deadline:
            try:
                fd = os.pidfd_open(pid) if pid > 0 else -1
            except ProcessLookupError:
                fd = -1
            if fd >= 0 and lock_holder(pid_file) == pid:
                return cls(fd)
            if fd >= 0:
                os.close(fd)
            time.sleep(POLL)
        return None

    def signal(self, number: signal.Signals) -> None:
        try:
            signal.pidfd_send_signal(self._fd, number)
        except ProcessLookupError:
            return

    async def ended(self, timeout: float) -> bool:
        """Whether the process has ended within `timeout` seconds."""
        with trio.move_on_after(timeout):
            await trio.lowlevel.wait_readable(self._fd)
            return True
        return False

    async def end(self, ask: Callable[[], Awaitable[None]]) -> bool:
        """Ask it, then tell it by signals; whether it has ended.

        It is asked several times, since a peer that is just joining a mesh starts anew and forgets.
        """
        for _ in range(STOP_ATTEMPTS):
            await ask()
            if await self.ended(END_TIMEOUT):
                return True
        for number in (signal.SIGTERM, signal.SIGKILL):
            self.signal(number)
            if await self.ended(TERM_TIMEOUT):
                return True
        return False

    def close(self) -> None:
        os.close(self._fd)


def take_down(manifest: Manifest, report: Reporter | None = None) -> list[str]:
    """End all peers of a directory with their guests and helpers, whatever state they are in.

    Returns the names of the peers that were running. Raises OperationError for one that cannot be ended.
    """
    running = {
        peer.name: holder for peer in manifest.peers if (holder := Holder.of(peer.directory / "mobid.pid"))
    }
    if running:
        client.run(_end_peers, [peer for peer in manifest.peers if peer.name in running], running, report)
    for peer in manifest.peers:
        count = _end_helpers(peer.directory)
        if count and report is not None:
            report.step(f"{peer.name}: {count} helper{'s' * (count > 1)} without a peer ended")
    if manifest.wan is not None:
        end_nest(manifest)
    return list(running)


async def _end_peers(peers: list[LocalPeer], holders: dict[str, Holder], report: Reporter | None) -> None:
    """All at once, since the guests of each take their time."""

    async def end(peer: LocalPeer) -> None:
        holder = holders[peer.name]
        if not await holder.end(lambda: _ask(peer.target)):
            raise OperationError(
                "failed", f"{peer.name} cannot be ended", f"see {peer.directory / 'mobid.log'}"
            )
        holder.close()
        if report is not None:
            report.step(f"{peer.name}: ended")

    async with trio.open_nursery() as nursery:
        for peer in peers:
            nursery.start_soon(end, peer)


async def _ask(target: str) -> None:
    """The operation `stop`; one that cannot be asked will be told by a signal."""
    try:
        async with client.connect(target) as connection:
            await connection.call("stop", timeout=STOP_TIMEOUT)
    except OperationError:
        return


def _end_helpers(directory: Path) -> int:
    runtime = directory / "run"
    return helpers.end_all(runtime.resolve()) if runtime.is_symlink() else 0


def end_nest(manifest: Manifest) -> None:
    """End the nest of the emulated WAN, if there is one."""
    place = manifest.directory / "wan"
    holder = Holder.of(place / "mobid.pid")
    if holder is not None:
        client.run(holder.end, lambda: _ask(f"unix:{manifest.wan_socket.resolve()}"))
        holder.close()
    _end_helpers(place)
