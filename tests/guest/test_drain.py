# SPDX-License-Identifier: Apache-2.0
"""A peer is emptied of its real guests, which run on elsewhere; a lab moves as a whole."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from proto.api import OperationError
from tests.guest.peers import PeerProcess, eventually
from tests.guest.test_networks import begin

pytestmark = [pytest.mark.guest, pytest.mark.timeout(240)]

LAB: dict[str, Any] = {
    "name": "pair",
    "topology": {
        "defaults": {"image": "mini", "memory": "64M", "place": "virginia"},
        "nodes": {"a": {}, "b": {}, "c": {"place": "tokyo"}},
        "networks": {"lan": {"members": ["a", "b", "c"], "subnet": "10.9.1.0/24"}},
    },
}


@pytest.fixture
async def mesh(tmp_path: Path, helper_binary: Path) -> AsyncIterator[list[PeerProcess]]:
    """Two peers, and the lab: c at tokyo, which coordinates, the others at virginia."""
    async with AsyncExitStack() as stack:
        yield await begin(stack, tmp_path, helper_binary, ("tokyo", "virginia"), LAB)


async def boot_id(peer: PeerProcess, guest: str) -> bytes:
    code, out, _ = await peer.execute(f"pair/{guest}", "cat", "/proc/sys/kernel/random/boot_id")
    assert code == 0
    return out


async def where(peer: PeerProcess) -> dict[str, str]:
    return {row["vm"]: row["peer"] for row in await peer.call("vm.ls")}


async def test_a_drained_peer_has_no_guests_gets_none_and_can_leave(mesh: list[PeerProcess]) -> None:
    tokyo, virginia = mesh
    before = {name: await boot_id(tokyo, name) for name in "abc"}
    with pytest.raises(OperationError, match="still has guests") as caught:
        await virginia.call("peer.leave")
    assert "mobictl peer drain virginia" in caught.value.hint

    said: list[str] = []
    async with virginia.client() as client, client.request("peer.drain", {"peer": "virginia"}) as request:
        async for item in request:
            said.append(f"{item['guest']}: {item['state']}")
        result = await request.result()
    assert (result["guests"], result["left"]) == (0, [])
    for name in "ab":
        assert said.index(f"pair/{name}: moving to tokyo") < said.index(f"pair/{name}: at tokyo")
    assert await where(tokyo) == dict.fromkeys("abc", "tokyo")
    assert {name: await boot_id(tokyo, name) for name in "abc"} == before

    with pytest.raises(OperationError, match="drain"):
        await tokyo.call("vm.migrate", {"vm": "pair/a", "to": "virginia"})
    await tokyo.call("vm.run", {"image": "mini", "name": "one"})
    assert (await where(tokyo))["one"] == "tokyo"
    await tokyo.call("peer.drain", {"peer": "virginia", "undo": True})
    assert (await tokyo.call("vm.migrate", {"vm": "pair/a", "to": "virginia"}))["ok"]
    await virginia.call("peer.drain", {"peer": "virginia"})
    assert (await virginia.call("peer.leave"))["name"] == "virginia"


async def test_what_cannot_leave_is_named_and_goes_when_it_can(mesh: list[PeerProcess]) -> None:
    tokyo, virginia = mesh
    await tokyo.call("vm.stop", {"vm": "pair/a"})
    await tokyo.call("vm.pause", {"vm": "pair/b"})
    result = await tokyo.call("peer.drain", {"peer": "virginia"})
    reasons = {one["guest"]: one["reason"] for one in result["left"]}
    assert "its disk is at virginia only" in reasons["pair/a"]
    assert "vm resume pair/b" in reasons["pair/b"]

    await tokyo.call("vm.resume", {"vm": "pair/b"})

    async def moved() -> bool:
        return (await where(virginia))["b"] == "tokyo"

    await eventually(moved)
    assert (await where(tokyo))["a"] == "virginia"
    result = await tokyo.call("peer.drain", {"peer": "virginia", "discard_stopped": True})
    assert (result["guests"], result["left"]) == (0, [])
    assert await where(tokyo) == dict.fromkeys("abc", "tokyo")
    assert (await tokyo.call("vm.start", {"vm": "pair/a"}))["state"] == "running"


async def test_a_lab_moves_as_a_whole(mesh: list[PeerProcess]) -> None:
    tokyo, virginia = mesh
    before = {name: await boot_id(tokyo, name) for name in "abc"}
    result = await virginia.call("lab.move", {"lab": "pair", "to": "tokyo"})
    assert (result["moved"], result["stayed"]) == (["a", "b"], [])
    assert await where(virginia) == dict.fromkeys("abc", "tokyo")
    assert {name: await boot_id(tokyo, name) for name in "abc"} == before
    assert (await tokyo.call("lab.move", {"lab": "pair", "to": "tokyo"}))["moved"] == []
