# SPDX-License-Identifier: Apache-2.0
"""A peer that was away: what people see of its guests meanwhile, what it does alone, and what becomes of what
it left when it is back."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trio

from mobictl.helpers import alive
from proto.api import OperationError
from tests.guest.peers import PeerProcess, eventually
from tests.guest.test_networks import begin
from tests.guest.test_runtime import events, pids

pytestmark = [pytest.mark.guest, pytest.mark.timeout(240)]

LAB: dict[str, Any] = {
    "name": "pair",
    "topology": {
        "defaults": {"image": "mini", "memory": "64M"},
        "nodes": {"a": {"place": "tokyo"}, "b": {"place": "virginia"}},
        "links": [{"endpoints": ["a:eth1", "b:eth1"], "subnet": "10.9.1.0/24"}],
    },
}


@pytest.fixture
async def mesh(tmp_path: Path, helper_binary: Path) -> AsyncIterator[list[PeerProcess]]:
    """Two peers, of which the first coordinates, and the lab: a at tokyo, b at virginia."""
    async with AsyncExitStack() as stack:
        yield await begin(stack, tmp_path, helper_binary, ("tokyo", "virginia"), LAB)


async def row(peer: PeerProcess, vm: str) -> dict[str, Any]:
    found: dict[str, Any] = await peer.call("vm.show", {"vm": vm})
    return found


async def test_a_guest_removed_while_its_peer_was_away_ends_when_that_is_back(
    mesh: list[PeerProcess],
) -> None:
    tokyo, virginia = mesh
    before = await pids(virginia, "pair/b")
    virginia.kill()

    async def silent() -> bool:
        return str((await row(tokyo, "pair/b"))["owner_state"]) != "alive"

    await eventually(silent)
    assert (await row(tokyo, "pair/a"))["owner_state"] == "alive"
    assert [lab["running"] for lab in await tokyo.call("lab.ls")] == [1]
    result = await tokyo.call("lab.down", {"lab": "pair"})
    assert result["unconfirmed"] == ["virginia"]
    assert alive(before["shim"])
    await virginia.start()
    [event] = await eventually(lambda: events(virginia, "guest.discarded"))
    assert (event["guest"], "away" in event["reason"]) == ("pair/b", True)
    assert not alive(before["shim"])
    assert list((virginia.directory / "guests").iterdir()) == []


async def test_a_guest_given_away_while_its_peer_was_away_is_discarded_there(mesh: list[PeerProcess]) -> None:
    tokyo, virginia = mesh
    await tokyo.call("vm.stop", {"vm": "pair/b"})
    virginia.kill()
    result = await tokyo.call("peer.drain", {"peer": "virginia", "discard_stopped": True})
    assert result["left"] == []
    assert (await tokyo.call("vm.start", {"vm": "pair/b"}))["peer"] == "tokyo"
    assert (await row(tokyo, "pair/b"))["epoch"] == 2
    await virginia.start()
    [event] = await eventually(lambda: events(virginia, "guest.discarded"))
    assert (event["guest"], event["reason"]) == ("pair/b", "it was given to tokyo")
    assert list((virginia.directory / "guests").iterdir()) == []
    assert (await row(virginia, "pair/b"))["state"] == "running"


async def test_a_guest_lost_with_an_evicted_peer_begins_anew_elsewhere(mesh: list[PeerProcess]) -> None:
    tokyo, virginia = mesh
    before = await pids(virginia, "pair/b")
    virginia.kill()
    for pid in before.values():
        os.kill(pid, signal.SIGKILL)

    async def dead() -> bool:
        return str((await row(tokyo, "pair/b"))["owner_state"]) == "dead"

    await eventually(dead)
    with pytest.raises(OperationError, match="does not answer") as caught:
        await tokyo.call("vm.start", {"vm": "pair/b"})
    assert "peer evict virginia" in caught.value.hint
    await tokyo.call("peer.evict", {"peer": "virginia"})
    assert (await row(tokyo, "pair/b"))["state"] == "lost"
    started = await tokyo.call("vm.start", {"vm": "pair/b"})
    assert (started["peer"], started["state"], started["epoch"]) == ("tokyo", "running", 2)


async def test_a_peer_that_was_evicted_while_away_ends_its_guests_when_it_is_back(
    mesh: list[PeerProcess],
) -> None:
    tokyo, virginia = mesh
    before = await pids(virginia, "pair/b")
    virginia.kill()
    await tokyo.call("peer.evict", {"peer": "virginia"})
    assert (await tokyo.call("vm.start", {"vm": "pair/b"}))["peer"] == "tokyo"
    assert alive(before["shim"])
    await virginia.start()
    assert virginia.process is not None
    with trio.fail_after(90):
        await trio.to_thread.run_sync(virginia.process.wait)
    assert not [pid for pid in before.values() if alive(pid)]
    lines = (virginia.directory / "events.ndjson").read_text().splitlines()
    assert any('"guest.discarded"' in line and "evicted" in line for line in lines)
    assert (await tokyo.execute("pair/b", "true"))[0] == 0


async def test_a_guest_that_crashes_while_nobody_decides_is_started_again(mesh: list[PeerProcess]) -> None:
    tokyo, virginia = mesh
    before = await pids(virginia, "pair/b")
    tokyo.kill()
    os.kill(before["shim"], signal.SIGKILL)

    async def again() -> bool:
        try:
            return (await virginia.execute("pair/b", "true"))[0] == 0
        except OperationError:
            return False

    await eventually(again)
    assert (await pids(virginia, "pair/b"))["shim"] != before["shim"]
    await tokyo.start()

    async def made_up() -> bool:
        seen = await row(tokyo, "pair/b")
        return (seen["state"], seen["restarts"]) == ("running", 1)

    await eventually(made_up)
    assert (await virginia.execute("pair/b", "true"))[0] == 0
