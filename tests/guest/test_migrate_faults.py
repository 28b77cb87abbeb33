# SPDX-License-Identifier: Apache-2.0
"""Migrations of real guests in which processes die: in the end exactly one copy runs, the right one.

A peer that is stopped (SIGSTOP) at the right moment makes a window of microseconds as wide as needed; what
the processes below it do goes on. Every case ends the same way: the guest answers at the peer that the
catalog names, its work went on, the handover is closed, and nothing is left at the other peer.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from proto.api import OperationError
from tests.guest.peers import PeerProcess, eventually
from tests.guest.test_migrate import COUNTER, Row, counter, mesh, nothing_left, where

__all__ = ["mesh"]
pytestmark = [pytest.mark.guest, pytest.mark.timeout(240)]

SLOW = 2_000_000
"""Bytes/s at which the first pass takes a few seconds."""


def pages_process(peer: PeerProcess) -> int:
    """The pid of the `pages` process that this peer has started."""
    assert peer.process is not None
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == peer.process.pid and words[1:2] == [b"pages"]:
            return int(entry.name)
    raise AssertionError("no pages process")


class Moving:
    """A migration under way from tokyo to virginia, its first pass begun and slow."""

    def __init__(self, mesh: list[PeerProcess], nursery: trio.Nursery) -> None:
        self.source, self.target = mesh
        self.nursery = nursery
        self.record: Row | None = None
        self.error: BaseException | None = None
        self.copying = trio.Event()
        self.ended = trio.Event()

    async def begin(self) -> None:
        await self.source.call("vm.run", {"image": "mini", "name": "one", "place": "tokyo"})
        await self.source.execute("one", "sh", "-c", f"({COUNTER}) </dev/null >/dev/null 2>&1 & echo on")
        self.nursery.start_soon(self._migrate)
        with trio.fail_after(60):
            await self.copying.wait()
        assert not self.ended.is_set(), self.error or self.record

    async def _migrate(self) -> None:
        arguments = {"vm": "one", "to": self.target.name, "bandwidth": SLOW}
        try:
            async with self.source.client() as client, client.request("vm.migrate", arguments) as request:
                async for item in request:
                    if "done_bytes" in item:
                        self.copying.set()
                self.record = await request.result()
        except (OperationError, OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self.error = error
        finally:
            self.copying.set()
            self.ended.set()

    async def reached(self, peer: PeerProcess, state: str) -> None:
        """Until the peer's log says that its side of the handover is in `state`."""

        async def said() -> bool:
            log = (peer.directory / "mobid.log").read_text(errors="replace")
            return any("migration.step" in line and f'"now": "{state}"' in line for line in log.splitlines())

        with trio.fail_after(60):
            await eventually(said)

    async def runs_at(self, peer: PeerProcess, epoch: int) -> None:
        """Exactly there, and only there."""
        other = self.source if peer is self.target else self.target
        with trio.fail_after(90):
            await eventually(lambda: self._settled(peer, epoch))
            before = await counter(peer, "one")
            await eventually(lambda: self._counts_beyond(peer, before))
            await eventually(lambda: nothing_left(other))

    async def _settled(self, peer: PeerProcess, epoch: int) -> bool:
        return await where(peer, "one") == (peer.name, "running", epoch)

    async def _counts_beyond(self, peer: PeerProcess, before: int) -> bool:
        return await counter(peer, "one") > before


@pytest.fixture
async def moving(mesh: list[PeerProcess], nursery: trio.Nursery) -> AsyncIterator[Moving]:
    made = Moving(mesh, nursery)
    await made.begin()
    yield made
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("side", ["source", "target"])
async def test_pages_dies_while_copying(moving: Moving, side: str) -> None:
    os.kill(pages_process(getattr(moving, side)), signal.SIGKILL)
    await moving.ended.wait()
    assert moving.record is not None, moving.error
    assert not moving.record["ok"]
    assert moving.record["rolled_back"]
    assert moving.record["reason"]
    await moving.runs_at(moving.source, 1)


@pytest.mark.parametrize("side", ["source", "target"])
async def test_a_peer_dies_while_copying(moving: Moving, side: str) -> None:
    peer: PeerProcess = getattr(moving, side)
    peer.kill()
    await moving.ended.wait() if side == "target" else None
    await peer.start()
    await moving.runs_at(moving.source, 1)


async def test_the_destination_dies_with_the_release_unread(moving: Moving) -> None:
    """The release reached its host and nobody looked: it refuses when it is back, and the source goes on."""
    os.kill(pid(moving.target), signal.SIGSTOP)
    await moving.reached(moving.source, "released")
    moving.target.kill()
    await moving.target.start()
    await moving.ended.wait()
    assert moving.record is not None, moving.error
    assert moving.record["rolled_back"]
    await moving.runs_at(moving.source, 1)


async def test_a_slow_destination_still_gets_it(moving: Moving) -> None:
    os.kill(pid(moving.target), signal.SIGSTOP)
    await moving.reached(moving.source, "released")
    os.kill(pid(moving.target), signal.SIGCONT)
    await moving.ended.wait()
    assert moving.record is not None, moving.error
    assert moving.record["ok"]
    assert moving.record["verified"] == "ok"
    await moving.runs_at(moving.target, 2)


async def test_the_source_dies_after_the_release(moving: Moving) -> None:
    """It comes back with a frozen guest and its note, and learns from the log that it lives elsewhere."""
    os.kill(pid(moving.target), signal.SIGSTOP)
    await moving.reached(moving.source, "released")
    moving.source.kill()
    os.kill(pid(moving.target), signal.SIGCONT)
    await moving.source.start()
    await moving.runs_at(moving.target, 2)


async def test_both_die_after_the_release(moving: Moving) -> None:
    os.kill(pid(moving.target), signal.SIGSTOP)
    await moving.reached(moving.source, "released")
    moving.source.kill()
    moving.target.kill()
    await moving.source.start()
    await moving.target.start()
    await moving.runs_at(moving.source, 1)


async def test_the_receiving_process_dies_during_the_switch(moving: Moving) -> None:
    """The source may not know whether the release was read: then it stays frozen until the log says so."""
    receiver = pages_process(moving.target)
    await moving.reached(moving.source, "freezing")
    with suppress(ProcessLookupError):
        os.kill(receiver, signal.SIGKILL)
    await moving.ended.wait()
    assert moving.record is not None, moving.error
    assert moving.record["rolled_back"] is not moving.record["ok"]
    await one_of_both(moving)


@pytest.mark.parametrize("state", ["noting", "freezing", "sending", "released", "kept"])
async def test_the_source_dies_at_each_step(moving: Moving, state: str) -> None:
    await moving.reached(moving.source, state)
    moving.source.kill()
    await moving.source.start()
    await one_of_both(moving)


@pytest.mark.parametrize("state", ["starting", "running", "syncing"])
async def test_the_destination_dies_at_each_step(moving: Moving, state: str) -> None:
    await moving.reached(moving.target, state)
    moving.target.kill()
    await moving.target.start()
    await one_of_both(moving)


async def one_of_both(moving: Moving) -> None:
    """The log decides where; there it runs, and nowhere else."""

    async def closed() -> tuple[str, str, int] | None:
        try:
            found = await where(moving.source, "one")
        except (OSError, OperationError, trio.BrokenResourceError):
            return None
        return found if found[1] == "running" else None

    with trio.fail_after(90):
        name, _, epoch = await eventually(closed)
    peer = moving.source if name == moving.source.name else moving.target
    await moving.runs_at(peer, epoch)


def pid(peer: PeerProcess) -> int:
    assert peer.process is not None
    return peer.process.pid


async def test_a_target_that_cannot_take_it_is_an_error_before_anything_moves(
    mesh: list[PeerProcess],
) -> None:
    tokyo, virginia = mesh
    await tokyo.call("vm.run", {"image": "mini", "name": "one", "place": "tokyo"})
    for args, code in (
        ({"vm": "one", "to": "tokyo"}, "conflict"),
        ({"vm": "one", "to": "nowhere"}, "not-found"),
        ({"vm": "none", "to": "virginia"}, "not-found"),
        ({"vm": "one", "to": "virginia", "mode": "postcopy"}, "unsupported"),
    ):
        with pytest.raises(OperationError) as refused:
            await tokyo.call("vm.migrate", args)
        assert refused.value.code == code
        assert refused.value.hint or refused.value.message
    kept: dict[str, Any] = await tokyo.call("vm.show", {"vm": "one"})
    assert kept["state"] == "running"
    assert await nothing_left(virginia)


async def test_a_destination_that_is_stopped_gives_up_first(moving: Moving) -> None:
    await moving.target.stop()
    await moving.ended.wait()
    assert moving.record is not None, moving.error
    assert moving.record["rolled_back"]
    await moving.target.start()
    await moving.runs_at(moving.source, 1)
