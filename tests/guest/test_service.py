# SPDX-License-Identifier: Apache-2.0
"""A peer as a systemd user service: whatever happens to it, its guests, helpers and connections stay."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.built import missing
from tests.guest.peers import PeerProcess, eventually
from tests.guest.test_runtime import LAB, owner_of, pids
from tests.service import Service, install

pytestmark = [
    pytest.mark.guest,
    pytest.mark.timeout(180),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]

PORT = "5000"
TALK = "while :; do date; sleep 0.1; done"


class ServicePeer(PeerProcess):
    """The peer that the service runs, for its requests only."""

    def __init__(self, service: Service, directory: Path) -> None:
        super().__init__(directory)
        self.service = service

    async def answers(self) -> None:
        async def ready() -> bool:
            try:
                return bool((await self.call("status"))["name"])
            except OSError:
                return False

        with trio.fail_after(60):
            await eventually(ready)


@pytest.fixture
async def peer(tmp_path: Path, helper_binary: Path) -> AsyncIterator[ServicePeer]:
    install(tmp_path, "--name tokyo --listen 127.0.0.1:0")
    cache = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    service = Service(tmp_path, {**os.environ, "MOBI_HELPER": str(helper_binary), "XDG_CACHE_HOME": cache})
    service.start()
    made = ServicePeer(service, tmp_path / ".local" / "state" / "mobitopolo" / "peer")
    await made.answers()
    yield made
    await made.call("stop", {"guests": True})
    service.end(signal.SIGTERM)


async def running(peer: PeerProcess) -> dict[str, Any]:
    """Everything that must outlive the peer: processes by their ids, and the two ends of the connection."""
    found: dict[str, Any] = {vm: await pids(peer, vm) for vm in ("pair/a", "pair/b")}
    found["switch"] = await owner_of(peer.socket.with_name("switch.sock"))
    for vm in ("pair/a", "pair/b"):
        code, out, _ = await peer.execute(vm, "sh", "-c", "cat /proc/sys/kernel/random/boot_id; pidof nc")
        assert code == 0
        found[f"inside {vm}"] = out
    return found


async def arrived(peer: PeerProcess) -> int:
    return int((await peer.execute("pair/b", "sh", "-c", "wc -l < /tmp/got"))[1])


async def test_guests_helpers_and_connections_outlive_the_service(peer: ServicePeer) -> None:
    await peer.call("lab.up", {"lab": json.dumps(LAB)})
    await peer.execute("pair/b", "sh", "-c", f"sleep 1000 | nc -l -p {PORT} >/tmp/got 2>&1 &")
    await peer.execute("pair/a", "sh", "-c", f"({TALK}) 2>&1 | nc b {PORT} >/dev/null 2>&1 &")

    async def more(than: int) -> bool:
        return await arrived(peer) > than

    await eventually(lambda: more(3))
    before = await running(peer)
    first = peer.service.pid
    assert peer.service.end(signal.SIGKILL), "systemd starts it again"
    await peer.answers()
    assert peer.service.pid != first
    assert await running(peer) == before
    seen = await arrived(peer)
    await eventually(lambda: more(seen + 3))

    assert not peer.service.end(signal.SIGTERM), "an end that was asked for"
    peer.service.start()
    await peer.answers()
    assert await running(peer) == before
    seen = await arrived(peer)
    await eventually(lambda: more(seen + 3))
    assert {row["state"] for row in await peer.call("vm.ls")} == {"running"}
