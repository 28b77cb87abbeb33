# SPDX-License-Identifier: Apache-2.0
"""Real guests on a link between real peers: frames, a TCP stream through moves, a switch that is killed."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trio

from proto.api import OperationError
from tests.built import missing
from tests.guest.peers import PeerProcess, eventually

pytestmark = [pytest.mark.guest, pytest.mark.timeout(240)]

REPLY_PATIENCE = 50
"""Tenths of a second."""
LAG = 0.8
"""Seconds; a move of such a small guest takes a third of that, and would wait for 3."""

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
    """Two peers, and the lab: guest a at tokyo, b at virginia."""
    async with AsyncExitStack() as stack:
        yield await begin(stack, tmp_path, helper_binary, ("tokyo", "virginia"), LAB)


@pytest.fixture
async def wide_mesh(tmp_path: Path, helper_binary: Path) -> AsyncIterator[list[PeerProcess]]:
    """Three peers, of which the first coordinates, on one network: a at sydney, b at virginia, c at tokyo."""
    places = {"a": "sydney", "b": "virginia", "c": "tokyo"}
    topology = {
        "defaults": LAB["topology"]["defaults"],
        "nodes": {node: {"place": place} for node, place in places.items()},
        "networks": {"lan": {"members": list(places), "subnet": "10.9.1.0/24"}},
    }
    async with AsyncExitStack() as stack:
        names = ("tokyo", "virginia", "sydney")
        yield await begin(stack, tmp_path, helper_binary, names, {"name": "pair", "topology": topology})


async def begin(
    stack: AsyncExitStack, base: Path, helper_binary: Path, names: tuple[str, ...], lab: dict[str, Any]
) -> list[PeerProcess]:
    if gone := missing():
        pytest.skip(gone)
    environment = {"MOBI_HELPER": str(helper_binary)}
    peers = [PeerProcess(base / name, name, environment) for name in names]
    for peer in peers:
        await peer.start()
        stack.push_async_callback(peer.stop)
    for peer in peers[1:]:
        token = await peers[0].call("peer.token.new", {})
        await peer.call("peer.join", {"token": token["token"]})
    await eventually(lambda: all_see(peers, len(peers)))
    await peers[0].call("lab.up", {"lab": json.dumps(lab)})
    return peers


async def all_see(peers: list[PeerProcess], count: int) -> bool:
    try:
        return all([len(await peer.call("peer.ls")) == count for peer in peers])
    except (OperationError, OSError, trio.BrokenResourceError, trio.ClosedResourceError):
        return False


async def sh(peer: PeerProcess, guest: str, script: str) -> str:
    code, out, err = await peer.execute(f"pair/{guest}", "sh", "-c", script)
    assert code == 0, (script, out, err)
    return str(out.decode())


async def pings(peer: PeerProcess, guest: str, to: str) -> bool:
    try:
        code, _, _ = await peer.execute(f"pair/{guest}", "ping", "-c", "1", "-W", "1", to)
    except OperationError:
        return False  # paused for a moment, while it connects anew
    return bool(code == 0)


async def test_guests_reach_one_another_by_name(mesh: list[PeerProcess]) -> None:
    tokyo, virginia = mesh
    await eventually(lambda: pings(tokyo, "a", "b"))
    assert " 0% packet loss" in await sh(virginia, "b", "ping -c 20 -i 0.02 -s 1300 a")
    shown = await tokyo.call("net.show", {"network": "pair:a-eth1--b-eth1"})
    ports = {row["endpoint"]: row for row in shown["ports"]}
    assert ports["a:eth1"]["peer"] == "tokyo"
    assert ports["b:eth1"]["counters"]["rx_frames"] > 20
    assert ports["a:eth1"]["counters"]["spoofed"] == 0


async def test_impairments_are_felt(mesh: list[PeerProcess]) -> None:
    tokyo, _ = mesh
    await eventually(lambda: pings(tokyo, "a", "b"))
    await tokyo.call("net.impair", {"link": "pair:a-eth1--b-eth1", "delay": 0.03})

    async def slow() -> bool:
        said = await sh(tokyo, "a", "ping -c 3 -i 0.1 b")
        found = re.search(r"min/avg/max = ([0-9.]+)", said)
        assert found, said
        return float(found[1]) >= 60.0

    await eventually(slow)


async def test_a_tcp_stream_goes_through_moves(mesh: list[PeerProcess]) -> None:
    """No byte is wrong, and it is the same connection throughout: nc ends with its only one."""
    tokyo, virginia = mesh
    await eventually(lambda: pings(tokyo, "a", "b"))
    # Its input is a pipe that stays open: at the end of its input this nc would end.
    receive = "mkfifo /root/f; exec 3<>/root/f; nc -l -p 5000 <&3 > /root/got; echo ended > /root/end"
    await sh(virginia, "b", f"({receive}) </dev/null >/dev/null 2>&1 &")
    await sh(tokyo, "a", "dd if=/dev/urandom of=/root/data bs=64k count=160 2>/dev/null")
    piece = "dd bs=16k count=1 skip=$i 2>/dev/null < /root/data; sleep 0.005"
    send = f"for i in $(seq 0 639); do {piece}; done | nc b 5000"
    await sh(tokyo, "a", f"({send}) </dev/null >/dev/null 2>&1 &")
    lost = held = 0
    for source, target in ((virginia, tokyo), (tokyo, virginia)):
        record: dict[str, Any] = await tokyo.call("vm.migrate", {"vm": "pair/b", "to": target.name})
        assert record["ok"], record
        lost += record["frames_lost"]
        held += record["frames_held"]
        assert source is not target

    async def ended() -> bool:
        return "ended" in await sh(tokyo, "b", "cat /root/end 2>/dev/null || true")

    await eventually(ended)
    assert await sh(tokyo, "b", "md5sum < /root/got") == await sh(tokyo, "a", "md5sum < /root/data")
    assert lost == 0
    assert held >= 0


async def echoes(peer: PeerProcess, guest: str) -> tuple[int, int]:
    """The echo requests that the guest's kernel has sent, and the replies that have reached it."""
    said = await sh(peer, guest, "grep ^Icmp: /proc/net/snmp")
    names, values = (line.split()[1:] for line in said.splitlines())
    count = dict(zip(names, map(int, values), strict=True))
    return count["OutEchos"], count["InEchoReps"]


async def test_pings_survive_every_move(mesh: list[PeerProcess]) -> None:
    """Every reply reaches the guest that asked, once and in order.

    Its kernel counts them, since `ping` itself loses some: its socket has room for seven replies, and those
    held during a freeze come all at once.
    """
    tokyo, virginia = mesh
    await eventually(lambda: pings(tokyo, "a", "b"))
    before = await echoes(tokyo, "a")
    await sh(tokyo, "a", "ping -i 0.01 b > /root/pings 2>&1 </dev/null & echo $! > /root/pid")
    for target in (tokyo, virginia, tokyo):
        record: dict[str, Any] = await virginia.call("vm.migrate", {"vm": "pair/b", "to": target.name})
        assert record["ok"], record
        assert record["frames_lost"] == 0
        await trio.sleep(0.3)
    await all_answered(tokyo, before)


async def all_answered(peer: PeerProcess, before: tuple[int, int]) -> None:
    """End the ping in guest a, which began after the counts `before`: every reply came, once and in order."""
    await sh(peer, "a", "kill -INT $(cat /root/pid)")
    for _ in range(REPLY_PATIENCE):  # the last reply may be on its way
        asked, answered = (now - then for now, then in zip(await echoes(peer, "a"), before, strict=True))
        if answered >= asked:
            break
        await trio.sleep(0.1)
    assert answered == asked
    numbers = [int(n) for n in re.findall(r"seq=(\d+)", await sh(peer, "a", "cat /root/pings"))]
    assert len(numbers) > asked / 2
    assert numbers == sorted(set(numbers)), "in order, none twice"


async def test_a_peer_behind_in_the_log_loses_nothing(wide_mesh: list[PeerProcess]) -> None:
    """A move waits for a peer that carries the guest's frames and has not heard of the handover.

    Its switch would take the guest's frames from the new place for somebody else's.
    """
    tokyo, _, sydney = wide_mesh
    await eventually(lambda: pings(tokyo, "a", "b"))
    await eventually(lambda: pings(tokyo, "a", "c"))
    before = await echoes(tokyo, "a")
    await sh(tokyo, "a", "ping -i 0.01 b > /root/pings 2>&1 </dev/null & echo $! > /root/pid")
    assert sydney.process is not None
    async with trio.open_nursery() as nursery:
        sydney.process.send_signal(signal.SIGSTOP)
        nursery.start_soon(tokyo.call, "vm.migrate", {"vm": "pair/b", "to": "tokyo"})
        await trio.sleep(LAG)
        sydney.process.send_signal(signal.SIGCONT)
    assert (await tokyo.call("vm.show", {"vm": "pair/b"}))["peer"] == "tokyo"
    await all_answered(tokyo, before)


async def test_a_killed_switch_comes_back_with_its_guests(mesh: list[PeerProcess]) -> None:
    tokyo, virginia = mesh
    await eventually(lambda: pings(tokyo, "a", "b"))
    kill_switch(tokyo)

    async def again() -> bool:
        return await pings(tokyo, "a", "b") and await pings(virginia, "b", "a")

    await eventually(again)


async def test_a_switch_killed_together_with_its_peer_comes_back_too(mesh: list[PeerProcess]) -> None:
    tokyo, virginia = mesh
    await eventually(lambda: pings(tokyo, "a", "b"))
    virginia.kill()
    kill_switch(virginia)
    await virginia.start()

    async def again() -> bool:
        return await pings(tokyo, "a", "b") and await pings(virginia, "b", "a")

    await eventually(again)


async def test_a_peer_that_does_not_answer_holds_up_no_move(wide_mesh: list[PeerProcess]) -> None:
    tokyo, virginia, sydney = wide_mesh
    await eventually(lambda: pings(tokyo, "a", "c"))
    assert sydney.process is not None
    sydney.process.send_signal(signal.SIGSTOP)
    try:
        assert (await tokyo.call("vm.migrate", {"vm": "pair/b", "to": "tokyo"}))["ok"]
    finally:
        sydney.process.send_signal(signal.SIGCONT)
    lines = (virginia.directory / "events.ndjson").read_text().splitlines()
    (event,) = [found for line in lines if (found := json.loads(line))["kind"] == "migration.unheard"]
    assert event["peers"] == ["sydney"]
    await eventually(lambda: pings(tokyo, "a", "b"))


def kill_switch(peer: PeerProcess) -> None:
    (pid,) = [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdecimal() and is_switch_of(entry, peer)
    ]
    os.kill(pid, signal.SIGKILL)


def is_switch_of(process: Path, peer: PeerProcess) -> bool:
    try:
        arguments = (process / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"switch" in arguments and str(peer.socket.resolve().parent).encode() in b" ".join(arguments)
