# SPDX-License-Identifier: Apache-2.0
"""A changed file is applied to a running lab of real guests: what is not named in the plan goes on."""

from __future__ import annotations

import copy
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trio

from proto.api import OperationError
from tests.guest.peers import PeerProcess, eventually
from tests.guest.test_networks import begin

pytestmark = [pytest.mark.guest, pytest.mark.timeout(240)]

LAB: dict[str, Any] = {
    "name": "pair",
    "topology": {
        "defaults": {"image": "mini", "memory": "64M"},
        "nodes": {"a": {"place": "tokyo"}, "b": {"place": "virginia"}, "c": {"place": "tokyo"}},
        "networks": {"lan": {"members": ["a", "b", "c"], "subnet": "10.9.1.0/24"}},
    },
}


@pytest.fixture
async def mesh(tmp_path: Path, helper_binary: Path) -> AsyncIterator[list[PeerProcess]]:
    """Two peers, and the lab: a and c at tokyo, b at virginia."""
    async with AsyncExitStack() as stack:
        yield await begin(stack, tmp_path, helper_binary, ("tokyo", "virginia"), LAB)


def changed(**nodes: dict[str, Any] | None) -> dict[str, Any]:
    """The lab with these nodes put in place of, or beside, its own; None takes one away."""
    lab = copy.deepcopy(LAB)
    for name, node in nodes.items():
        lab["topology"]["nodes"].pop(name, None)
        if node is not None:
            lab["topology"]["nodes"][name] = node
    lab["topology"]["networks"]["lan"]["members"] = list(lab["topology"]["nodes"])
    return lab


async def call(peer: PeerProcess, op: str, lab: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = await peer.call(op, {"lab": json.dumps(lab), "source": "pair.yaml"})
    return result


def costs(result: dict[str, Any]) -> dict[str, str]:
    return {change["name"]: change["how"] for change in result["changes"]}


async def boot_id(peer: PeerProcess, guest: str) -> bytes:
    code, out, _ = await peer.execute(f"pair/{guest}", "cat", "/proc/sys/kernel/random/boot_id")
    assert code == 0
    return out


async def connected(tokyo: PeerProcess, virginia: PeerProcess) -> None:
    """Begin a TCP connection from a to b that writes a line every tenth of a second."""
    receive = "mkfifo /root/f; exec 3<>/root/f; nc -l -p 5000 <&3 > /root/got; echo ended > /root/end"
    await virginia.execute("pair/b", "sh", "-c", f"({receive}) </dev/null >/dev/null 2>&1 &")
    send = "while true; do echo line; sleep 0.1; done | nc b 5000"
    await tokyo.execute("pair/a", "sh", "-c", f"({send}) </dev/null >/dev/null 2>&1 &")
    await eventually(lambda: received(virginia))


async def received(virginia: PeerProcess) -> int:
    _, out, _ = await virginia.execute("pair/b", "sh", "-c", "wc -l < /root/got; test ! -e /root/end")
    return int(out or b"0")


async def test_untouched_guests_keep_processes_and_connections(mesh: list[PeerProcess]) -> None:
    tokyo, virginia = mesh
    await eventually(lambda: pings(tokyo, "a", "b"))
    await connected(tokyo, virginia)
    before = {name: await boot_id(tokyo, name) for name in "abc"}
    wanted = changed(
        c={"place": "tokyo", "memory": "48M"}, d={"scale": 2}, a={"place": "tokyo", "env": {"X": "y"}}
    )
    expected = {"a": "live", "c": "restart", "d-1": "add", "d-2": "add", "lan": "live"}
    assert costs(await call(tokyo, "lab.plan", wanted)) == expected
    await tokyo.execute("pair/c", "sh", "-c", "echo kept > /root/kept; sync")

    done = await call(virginia, "lab.apply", wanted)
    assert costs(done) == expected
    assert (done["untouched"], {row["state"] for row in done["guests"]}) == (1, {"running"})

    assert {name: await boot_id(tokyo, name) for name in "ab"} == {name: before[name] for name in "ab"}
    assert await boot_id(tokyo, "c") != before["c"]
    assert await tokyo.execute("pair/c", "cat", "/root/kept") == (0, b"kept\n", b"")
    lines = await received(virginia)
    assert lines

    async def more() -> bool:
        return await received(virginia) > lines

    await eventually(more)
    for name in ("c", "d-1", "d-2"):
        await eventually(lambda name=name: pings(tokyo, "a", name))
        await eventually(lambda name=name: pings(tokyo, name, "b"))
    assert (await tokyo.execute("pair/a", "sh", "-c", "echo $X"))[1] == b"y\n"

    again = await call(tokyo, "lab.apply", wanted)
    assert (again["changes"], again["untouched"]) == ([], 5)
    done = await call(tokyo, "lab.apply", LAB)
    assert costs(done) == {"a": "live", "c": "restart", "d-1": "remove", "d-2": "remove", "lan": "live"}
    assert done["unconfirmed"] == []
    assert sorted(row["vm"] for row in await tokyo.call("vm.ls")) == ["a", "b", "c"]
    assert await received(virginia) > lines


async def pings(peer: PeerProcess, guest: str, to: str) -> bool:
    code, _, _ = await peer.execute(f"pair/{guest}", "ping", "-c", "1", "-W", "1", to)
    return bool(code == 0)


async def test_a_guest_made_anew_takes_the_old_one_s_place(mesh: list[PeerProcess]) -> None:
    tokyo, _ = mesh
    await tokyo.execute("pair/c", "sh", "-c", "echo old > /root/old; sync")
    before = await tokyo.call("vm.show", {"vm": "pair/c"})
    assert costs(await call(tokyo, "lab.apply", changed(c={"disk": "16M"}))) == {"c": "anew"}
    after = await tokyo.call("vm.show", {"vm": "pair/c"})
    assert (after["interfaces"], after["peer"]) == (before["interfaces"], before["peer"])
    assert (await tokyo.execute("pair/c", "test", "-e", "/root/old"))[0] == 1
    await eventually(lambda: pings(tokyo, "a", "c"))
    assert len(list((tokyo.directory / "guests").iterdir())) == 2


async def test_a_changed_place_moves_the_guest_live(mesh: list[PeerProcess]) -> None:
    tokyo, virginia = mesh
    before = await boot_id(tokyo, "c")
    assert costs(await call(tokyo, "lab.apply", changed(c={"place": "virginia"}))) == {"c": "move"}
    assert (await tokyo.call("vm.show", {"vm": "pair/c"}))["peer"] == "virginia"
    assert await boot_id(virginia, "c") == before


async def test_a_new_guest_that_fails_is_named_and_the_rest_runs(mesh: list[PeerProcess]) -> None:
    tokyo, _ = mesh
    broken = changed(d={"exec": ["echo it broke >&2; exit 3"]}, e={})
    with pytest.raises(OperationError, match=r"pair/d is failed.*it broke") as caught:
        await call(tokyo, "lab.apply", broken)
    assert "lab apply again" in caught.value.hint
    states = {row["vm"]: row["state"] for row in await tokyo.call("vm.ls")}
    assert states == {"a": "running", "b": "running", "c": "running", "d": "failed", "e": "running"}
    mended = await call(tokyo, "lab.apply", changed(d={}, e={}))
    assert costs(mended) == {"d": "start"}
    assert {row["state"] for row in mended["guests"]} == {"running"}


async def test_a_file_that_cannot_be_changes_nothing(mesh: list[PeerProcess]) -> None:
    tokyo, _ = mesh
    before = await tokyo.call("lab.show", {"lab": "pair"})
    for nodes, words in (
        ({"d": {"memory": "512G"}}, "no room"),
        ({"c": {"memory": "512G"}}, "no room"),
        ({"d": {"image": "minny"}}, "minny"),
        ({"d": {"place": "atlantis"}}, "atlantis"),
    ):
        with pytest.raises(OperationError, match=words) as caught:
            await call(tokyo, "lab.apply", changed(**nodes))
        assert "pair.yaml" in caught.value.message
    after = await tokyo.call("lab.show", {"lab": "pair"})
    assert after["model"] == before["model"]
    assert [row["epoch"] for row in after["guests"]] == [1, 1, 1]


async def test_a_link_s_quality_changes_while_it_carries(mesh: list[PeerProcess]) -> None:
    tokyo, virginia = mesh
    await eventually(lambda: pings(tokyo, "a", "b"))
    slow = copy.deepcopy(LAB)
    slow["topology"]["networks"]["lan"]["delay"] = "30ms"
    assert costs(await call(virginia, "lab.apply", slow)) == {"lan": "live"}

    async def felt() -> bool:
        begun = trio.current_time()
        _, out, _ = await tokyo.execute("pair/a", "ping", "-c", "2", "-i", "0.1", "b")
        assert trio.current_time() > begun
        return float(out.decode().rsplit("=", 1)[1].split("/")[0]) >= 60.0

    await eventually(felt)
