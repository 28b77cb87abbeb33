# SPDX-License-Identifier: Apache-2.0
"""A rolling upgrade: the peers of a mesh are restarted with a newer version, one after the other, while
commands go on; a guest of theirs never stops.
"""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio

from mobid.tasks import background
from proto.api import OperationError
from tests.built import missing
from tests.guest.peers import PeerProcess, eventually
from tests.guest.test_runtime import pids
from tests.guest.witness import ended

pytestmark = [
    pytest.mark.guest,
    pytest.mark.timeout(240),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]

NAMES = ("tokyo", "virginia", "amsterdam")
NEWER = "99.0"
NEWER_PACKAGE = f"""
import importlib.metadata
importlib.metadata.version = lambda name: {NEWER!r}
"""


@pytest.fixture
async def mesh(tmp_path: Path, helper_binary: Path) -> AsyncIterator[list[PeerProcess]]:
    environment = {"MOBI_HELPER": str(helper_binary)}
    peers = [PeerProcess(tmp_path / name, name, environment) for name in NAMES]
    async with AsyncExitStack() as stack:
        token = ""
        for peer in peers:
            stack.push_async_callback(ended, peer)
            await peer.start(join=token)
            token = (await peers[0].call("peer.token.new", {"uses": 2}))["token"]
        yield peers


async def upgraded(peer: PeerProcess, versions: Path) -> None:
    """End the peer as a package manager would, and start what is installed now."""
    assert peer.process is not None
    peer.process.send_signal(signal.SIGTERM)
    assert await trio.to_thread.run_sync(peer.process.wait, 30) == 0
    path = peer.environment.get("PYTHONPATH", "")
    peer.environment["PYTHONPATH"] = f"{versions}:{path}".rstrip(":")
    await peer.start()


async def test_a_guest_runs_on_while_its_mesh_is_upgraded(mesh: list[PeerProcess], tmp_path: Path) -> None:
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer" / "sitecustomize.py").write_text(NEWER_PACKAGE)
    tokyo, virginia, amsterdam = mesh
    await tokyo.call("vm.run", {"image": "mini", "name": "one", "place": "virginia"})
    before = await pids(virginia, "one")
    boot = await virginia.execute("one", "cat", "/proc/sys/kernel/random/boot_id")
    answered: list[str] = []

    async def ask() -> None:
        """Somebody who makes a token again and again, at whichever peer answers."""
        while True:
            for peer in mesh:
                try:
                    answered.append((await peer.call("peer.token.new", timeout=30))["id"])
                except (OperationError, OSError):
                    continue
            await trio.sleep(0.1)

    async with background(ask):
        for peer in (amsterdam, virginia, tokyo):
            count = len(answered)
            await upgraded(peer, tmp_path / "newer")

            async def seen(peer: PeerProcess = peer) -> bool:
                rows = await peer.call("peer.ls")
                new = {row["name"] for row in rows if row["version"] == NEWER}
                return peer.name in new and all(row["state"] == "alive" for row in rows)

            await eventually(seen)
            await eventually(lambda count=count: _more(answered, count))  # type: ignore[misc]
            assert await pids(virginia, "one") == before
            assert await virginia.execute("one", "cat", "/proc/sys/kernel/random/boot_id") == boot
    for peer in mesh:
        assert {row["version"] for row in await peer.call("peer.ls")} == {NEWER}
        known = {row["id"] for row in await peer.call("peer.token.ls")}
        assert known >= set(answered), "every answered command is known everywhere"
    row = await virginia.call("vm.show", {"vm": "one"})
    assert (row["state"], row["epoch"], row["restarts"]) == ("running", 1, 0)


async def _more(answered: list[str], count: int) -> bool:
    return len(answered) > count + 2
