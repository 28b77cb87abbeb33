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
from pathlib import Path
from typing import Final

import trio

from mobictl import client, helpers
from mobictl.nest import nest_call
from mobictl.places import LocalPeer, Manifest, lock_holder
from mobictl.progress import Reporter
from proto.api import OperationError

STOP_TIMEOUT: Final = 120.0
STOP_ATTEMPTS: Final = 3
END_TIMEOUT: Final = 3.0
TERM_TIMEOUT: Final = 5.0
POLL: Final = 0.05


def take_down(manifest: Manifest, report: Reporter | None = None) -> list[str]:
    """End all peers of a directory with their guests and helpers, whatever state they are in.

    Returns the names of the peers that were running.
    """
    running = manifest.running()
    if running:
        client.run(_stop_all, running)
    for peer in running:
        _wait_for_end(peer.directory / "mobid.pid")
        if report is not None:
            report.step(f"{peer.name}: ended")
    for peer in manifest.peers:
        count = _end_helpers(peer.directory)
        if count and report is not None:
            report.step(f"{peer.name}: {count} helper{'s' * (count > 1)} without a peer ended")
    if manifest.wan is not None:
        end_nest(manifest)
    return [peer.name for peer in running]


async def _stop_all(peers: list[LocalPeer]) -> None:
    """The orderly end of all at once, since the guests of each take their time."""
    async with trio.open_nursery() as nursery:
        for peer in peers:
            nursery.start_soon(_ask_to_stop, peer)


async def _ask_to_stop(peer: LocalPeer) -> None:
    """Ask until it ends; one that is just joining a mesh starts anew and has to be told again."""
    for _ in range(STOP_ATTEMPTS):
        try:
            async with client.connect(peer.target) as connection:
                await connection.call("stop", timeout=STOP_TIMEOUT)
        except OperationError as error:
            if error.code not in ("unreachable", "failed"):
                return
        with trio.move_on_after(END_TIMEOUT):
            while peer.running():  # noqa: ASYNC110 - the lock of another process has no event
                await trio.sleep(POLL)
            return


def _signal(pid_file: Path, number: signal.Signals) -> None:
    pid = lock_holder(pid_file)
    if pid > 0:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return


def _wait_for_end(pid_file: Path) -> None:
    """Wait until nobody holds the lock; a process that was asked in vain is told by signals."""
    for number, patience in (
        (None, END_TIMEOUT),
        (signal.SIGTERM, TERM_TIMEOUT),
        (signal.SIGKILL, TERM_TIMEOUT),
    ):
        if number is not None:
            _signal(pid_file, number)
        deadline = time.monotonic() + patience
        while lock_holder(pid_file) and time.monotonic() < deadline:
            time.sleep(POLL)
        if not lock_holder(pid_file):
            return
    raise OperationError("failed", f"the process that holds {pid_file} does not end", "see its log beside it")


def _end_helpers(directory: Path) -> int:
    runtime = directory / "run"
    return helpers.end_all(runtime.resolve()) if runtime.is_symlink() else 0


def end_nest(manifest: Manifest) -> None:
    place = manifest.directory / "wan"
    pid_file = place / "mobid.pid"
    if lock_holder(pid_file):
        try:
            nest_call(manifest, "stop")
        except OperationError:
            _signal(pid_file, signal.SIGTERM)
        _wait_for_end(pid_file)
    _end_helpers(place)
