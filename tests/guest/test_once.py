# SPDX-License-Identifier: Apache-2.0
"""Commands on real guests whose peer is lost before it answers: asked again elsewhere, they are done once."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio

from proto.api import OperationError
from tests.built import missing
from tests.guest.peers import PeerProcess, eventually
from tests.guest.test_runtime import LAB
from tests.guest.witness import two_peers

pytestmark = [
    pytest.mark.guest,
    pytest.mark.timeout(240),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]

KEYS = ("00000000000000a1", "00000000000000b2", "00000000000000c3")


@pytest.fixture
async def mesh(tmp_path: Path, helper_binary: Path) -> AsyncIterator[list[PeerProcess]]:
    async with two_peers(tmp_path, {"MOBI_HELPER": str(helper_binary)}) as peers:
        yield list(peers)


async def lost(peer: PeerProcess, op: str, args: dict[str, Any], key: str) -> None:
    """An attempt whose connection is lost once the work has begun."""
    async with peer.client() as client, client.request(op, args, key=key) as request:
        async for _ in request:
            break
        request.abandoned = True


async def again(peer: PeerProcess, op: str, args: dict[str, Any], key: str) -> Any:
    async with peer.client() as client:
        return await client.call(op, args, 60.0, key=key)


async def test_a_guest_asked_for_twice_is_one_guest(mesh: list[PeerProcess]) -> None:
    tokyo, virginia = mesh
    args = {"image": "mini", "place": "tokyo"}
    await lost(virginia, "vm.run", args, KEYS[0])
    made = await again(tokyo, "vm.run", args, KEYS[0])
    assert (made["state"], made["peer"]) == ("running", "tokyo")
    assert [row["vm"] for row in await tokyo.call("vm.ls")] == [made["vm"]]
    boot = (await tokyo.execute(made["vm"], "cat", "/proc/sys/kernel/random/boot_id"))[1]

    restart = {"vm": made["vm"]}
    await again(virginia, "vm.restart", restart, KEYS[1])
    second = (await tokyo.execute(made["vm"], "cat", "/proc/sys/kernel/random/boot_id"))[1]
    assert (await again(tokyo, "vm.restart", restart, KEYS[1]))["state"] == "running"
    assert (await tokyo.execute(made["vm"], "cat", "/proc/sys/kernel/random/boot_id"))[1] == second != boot

    remove = {"vm": made["vm"], "force": True}
    assert await again(virginia, "vm.rm", remove, KEYS[2]) == await again(tokyo, "vm.rm", remove, KEYS[2])
    with pytest.raises(OperationError, match="there is no guest"):
        await tokyo.call("vm.rm", remove)


async def test_a_command_that_is_taken_back_is_undone(mesh: list[PeerProcess]) -> None:
    tokyo, virginia = mesh
    async with virginia.client() as client, client.request("vm.run", {"image": "mini"}, key=KEYS[0]) as run:
        async for _ in run:
            break

    async def nothing() -> bool:
        return not await tokyo.call("vm.ls")

    await eventually(nothing)


async def test_a_lab_survives_the_death_of_the_peer_that_was_asked(mesh: list[PeerProcess]) -> None:
    tokyo, virginia = mesh
    args = {"lab": json.dumps(LAB)}

    async def ask_until_it_dies() -> None:
        async with virginia.client() as client, client.request("lab.up", args, key=KEYS[0]) as request:
            async for item in request:
                if item["stage"] == "starting":
                    virginia.kill()

    with pytest.raises(OperationError) as caught:
        await ask_until_it_dies()
    assert caught.value.code == "unreachable"
    await virginia.start()
    made = await again(tokyo, "lab.up", args, KEYS[0])
    assert {row["state"] for row in made["guests"]} == {"running"}
    down = {"lab": "pair"}
    assert (await again(tokyo, "lab.down", down, KEYS[1]))["unconfirmed"] == []
    assert (await again(virginia, "lab.down", down, KEYS[1]))["guests"] == 0
    with pytest.raises(OperationError, match="there is no lab"):
        await tokyo.call("lab.down", down)


async def test_a_move_asked_for_again_is_the_move_that_began(mesh: list[PeerProcess]) -> None:
    tokyo, virginia = mesh
    await tokyo.call("vm.run", {"image": "mini", "name": "one", "place": "tokyo"})
    args = {"vm": "one", "to": "virginia", "bandwidth": 20_000_000}
    await lost(virginia, "vm.migrate", args, KEYS[0])
    with trio.fail_after(60):
        record = await again(tokyo, "vm.migrate", args, KEYS[0])
    assert (record["ok"], record["to"], record["epoch"]) == (True, "virginia", 2)
    assert record["passes"]
    later = await again(virginia, "vm.migrate", args, KEYS[0])
    assert (later["ok"], later["epoch"], later["started"]) == (True, 2, record["started"])
    row = await tokyo.call("vm.show", {"vm": "one"})
    assert (row["peer"], row["epoch"]) == ("virginia", 2)
