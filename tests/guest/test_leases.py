# SPDX-License-Identifier: Apache-2.0
"""Lease-bound guests on real peers: they stand still by themselves, go on when they may, and are not heard
in between, whichever processes of their host are stopped or gone."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trio

from mobid.tasks import background
from proto.api import OperationError
from tests.built import missing
from tests.guest.beats import BEAT, Beats, heard, speak
from tests.guest.faults import held
from tests.guest.hosts import everything, go_on, guests_processes, helpers_of, stop
from tests.guest.peers import PeerProcess, eventually
from tests.guest.witness import joined

pytestmark = [
    pytest.mark.guest,
    pytest.mark.timeout(240),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]

Row = dict[str, Any]

SPEAKER, HEARER = "pair/a", "pair/b"
PAIR: Row = {
    "name": "pair",
    "topology": {
        "defaults": {"image": "mini", "memory": "64M"},
        "nodes": {
            "a": {"place": "tokyo", "on-partition": "freeze"},
            "b": {"place": "virginia"},
        },
        "links": [{"endpoints": ["a:eth1", "b:eth1"], "subnet": "10.9.1.0/24"}],
    },
}


@pytest.fixture
async def mesh(tmp_path: Path, helper_binary: Path) -> AsyncIterator[list[PeerProcess]]:
    """Two peers. Tokyo is the only voter, so nobody decides anything while it stands still."""
    peers = [
        PeerProcess(tmp_path / name, name, {"MOBI_HELPER": str(helper_binary)})
        for name in ("tokyo", "virginia")
    ]
    async with AsyncExitStack() as stack:
        for peer in peers:
            await peer.start()
            stack.push_async_callback(ended, peer)
        token = await peers[0].call("peer.token.new", {})
        await peers[1].call("peer.join", {"token": token["token"]})
        await eventually(lambda: joined(peers[1], 2))
        yield peers


async def ended(peer: PeerProcess) -> None:
    """Stop a peer, whatever a failed test left of it."""
    with trio.CancelScope(shield=True):
        if peer.process is not None and peer.process.poll() is not None:
            await peer.start()
        go_on(reversed(everything(peer)))
        await peer.stop()


@pytest.fixture
async def beats(mesh: list[PeerProcess]) -> AsyncIterator[Beats]:
    found = Beats({peer.name: peer.directory for peer in mesh})
    async with background(found.run):
        yield found
    found.close()


async def one(peer: PeerProcess, beats: Beats) -> str:
    """A lease-bound guest that beats at this peer; its key."""
    await peer.call("vm.run", {"image": "mini", "name": "one", "place": peer.name, "on_partition": "freeze"})
    await peer.execute("one", "sh", "-c", BEAT)
    await beats.goes_on("default/one")
    return "default/one"


async def state_of(peer: PeerProcess, guest: str) -> str:
    row: Row = await peer.call("vm.show", {"vm": guest})
    return str(row["state"])


def events(peer: PeerProcess, kind: str) -> list[Row]:
    lines = (peer.directory / "events.ndjson").read_text().splitlines()
    return [event for line in lines if (event := json.loads(line))["kind"] == kind]


async def test_a_guest_stands_still_while_its_peer_is_stopped(mesh: list[PeerProcess], beats: Beats) -> None:
    """Nobody renews; the shim needs nobody to see it."""
    tokyo, _ = mesh
    guest = await one(tokyo, beats)
    assert tokyo.process is not None
    stop([tokyo.process.pid])
    last = await beats.stands(guest)
    go_on([tokyo.process.pid])
    after = await beats.goes_on(guest)
    assert after[-1].boot == last.boot
    assert after[-1].number > last.number
    assert await state_of(tokyo, guest) == "running"
    (event,) = events(tokyo, "guest.frozen")
    assert (event["guest"], event["reason"], event["epoch"]) == (guest, "lease", 1)


async def test_a_guest_stands_still_while_its_peer_is_gone(mesh: list[PeerProcess], beats: Beats) -> None:
    """After kill -9 of mobid; the next one takes it back and lets it go on."""
    tokyo, _ = mesh
    guest = await one(tokyo, beats)
    tokyo.kill()
    last = await beats.stands(guest)
    await tokyo.start()
    after = await beats.goes_on(guest)
    assert after[-1].boot == last.boot
    assert events(tokyo, "guest.adopted")
    assert events(tokyo, "guest.frozen")
    assert await state_of(tokyo, guest) == "running"
    assert not beats.twice(guest)


async def test_a_guest_that_needs_no_lease_goes_on(mesh: list[PeerProcess], beats: Beats) -> None:
    _, virginia = mesh
    await virginia.call("vm.run", {"image": "mini", "name": "free", "place": "virginia"})
    assert (await virginia.call("vm.show", {"vm": "free"}))["on_partition"] == "run"
    assert virginia.process is not None
    await virginia.execute("free", "sh", "-c", BEAT)
    await beats.goes_on("default/free")
    stop([virginia.process.pid])
    try:
        await beats.goes_on("default/free", more=60)
    finally:
        go_on([virginia.process.pid])
    assert not events(virginia, "guest.frozen")


async def test_a_peer_without_a_majority_shows_its_guest_frozen(
    mesh: list[PeerProcess], beats: Beats
) -> None:
    """Its mobid is there, the only voter is not. When that is back, the guest goes on here or starts anew
    there, as the coordinator decides, and never both."""
    tokyo, virginia = mesh
    guest = await one(virginia, beats)
    assert tokyo.process is not None
    stop([tokyo.process.pid])
    try:
        await eventually(lambda: shown_as(virginia, guest, "frozen"))
        (row,) = [row for row in await virginia.call("vm.ls") if row["vm"] == "one"]
        assert row["state"] == "frozen"
        with pytest.raises(OperationError, match="has no lease") as caught:
            await virginia.execute("one", "true")
        assert caught.value.code == "conflict"
        assert "goes on by itself" in caught.value.hint
        await beats.stands(guest)
    finally:
        go_on([tokyo.process.pid])
    await eventually(lambda: shown_as(virginia, guest, "running"))
    assert not beats.twice(guest)


async def shown_as(peer: PeerProcess, guest: str, state: str) -> bool:
    return await state_of(peer, guest) == state


async def begin_pair(mesh: list[PeerProcess], beats: Beats) -> None:
    tokyo, virginia = mesh
    await virginia.call("lab.up", {"lab": json.dumps(PAIR)})
    await speak(tokyo, SPEAKER, virginia, HEARER)
    await beats.goes_on(SPEAKER)

    async def is_heard() -> bool:
        return len(await heard(virginia, HEARER)) > 5

    await eventually(is_heard)


async def heard_again(virginia: PeerProcess, since: float) -> None:
    async def again() -> bool:
        return any(beat.at > since for beat in await heard(virginia, HEARER))

    await eventually(again)


async def fenced_frames(peer: PeerProcess) -> int:
    shown = await peer.call("net.show", {"network": "pair:a-eth1--b-eth1"})
    (port,) = [row for row in shown["ports"] if row["endpoint"] == "a:eth1"]
    return int(port["counters"]["tx_fenced"])


async def test_what_runs_beyond_its_lease_is_not_heard(mesh: list[PeerProcess], beats: Beats) -> None:
    """Its shim is stopped too, so that nobody freezes the guest: its own switch drops what it says."""
    tokyo, virginia = mesh
    await begin_pair(mesh, beats)
    assert tokyo.process is not None
    deaf = [tokyo.process.pid, *helpers_of(tokyo, "guest")]
    stop(deaf)
    try:
        await quiet(virginia)
    finally:
        go_on(reversed(deaf))
    after = await beats.goes_on(SPEAKER)
    await heard_again(virginia, after[-1].at)
    numbers = {beat.number for beat in await heard(virginia, HEARER)}
    said = {beat.number for beat in beats.of(SPEAKER)}
    assert len(said - numbers) > 5, "it ran beyond its lease, and that was not heard"
    assert await fenced_frames(tokyo) > 5


async def quiet(virginia: PeerProcess) -> float:
    """Wait until nothing has been heard for a second; the time of the last beat that was."""
    while True:
        before = len(await heard(virginia, HEARER))
        await trio.sleep(1.0)
        now = await heard(virginia, HEARER)
        if len(now) == before:
            return now[-1].at


async def test_a_host_that_was_stopped_says_nothing_by_its_old_lease(
    mesh: list[PeerProcess], beats: Beats
) -> None:
    """Every process of the host stands still for longer than its lease; then the guest wakes up first.

    What it leaves in its queue then may be sent once it has a lease again: nobody else had its place.
    """
    tokyo, virginia = mesh
    await begin_pair(mesh, beats)
    assert tokyo.process is not None
    all_of_it = everything(tokyo)
    stop(all_of_it)
    last = await quiet(virginia)
    await trio.sleep(2.0)
    try:
        go_on(guests_processes(tokyo))
        await trio.sleep(0.5)
        go_on(pid for pid in all_of_it if pid != tokyo.process.pid)
        stale = await beats.stands(SPEAKER)
        assert stale.at > last, "it did run after it woke up, before anybody could look at the lease"
        assert (await heard(virginia, HEARER))[-1].at == last
    finally:
        go_on([tokyo.process.pid])
    after = await beats.goes_on(SPEAKER)
    await heard_again(virginia, after[-1].at)
    assert last < stale.at < after[-1].at


async def test_a_lease_bound_guest_moves(mesh: list[PeerProcess], beats: Beats) -> None:
    """There and back; then it stands still without the peer where it is now."""
    tokyo, virginia = mesh
    await begin_pair(mesh, beats)
    for source, target in ((tokyo, virginia), (virginia, tokyo)):
        record = await source.call("vm.migrate", {"vm": SPEAKER, "to": target.name})
        assert record["ok"], record
        assert record["verified"] == "ok"
        after = await beats.goes_on(SPEAKER)
        await heard_again(virginia, after[-1].at)
    assert not beats.twice(SPEAKER)
    assert len({beat.boot for beat in beats.of(SPEAKER)}) == 1
    assert tokyo.process is not None
    stop([tokyo.process.pid])
    last = await beats.stands(SPEAKER)
    go_on([tokyo.process.pid])
    assert (await beats.goes_on(SPEAKER))[-1].number > last.number
    assert not beats.twice(SPEAKER)


async def test_a_move_ends_when_the_lease_does(mesh: list[PeerProcess], beats: Beats) -> None:
    """Its pre-copy is slow; the source's peer stands still meanwhile. The guest stays, and goes on."""
    tokyo, _ = mesh
    guest = await one(tokyo, beats)
    assert tokyo.process is not None
    pid = tokyo.process.pid
    wishes = {"vm": guest, "to": "virginia", "bandwidth": 2_000_000}
    async with tokyo.client() as client, client.request("vm.migrate", wishes) as request:
        async for item in request:
            if "done_bytes" in item:
                stop([pid])
                await beats.stands(guest)
                go_on([pid])
                break
        async for _ in request:
            pass
        record = await request.result()
    assert not record["ok"]
    assert record["rolled_back"]
    await beats.goes_on(guest)
    assert await state_of(tokyo, guest) == "running"
    assert (await tokyo.call("vm.show", {"vm": guest}))["peer"] == "tokyo"


async def test_a_destination_that_stands_still_before_it_runs(tmp_path: Path, helper_binary: Path) -> None:
    """It has everything and the release, and is stopped. Its lease runs out, and the source's copy goes on;
    the destination wakes up with the go-ahead next in its hands, and never runs the guest."""
    names = ("tokyo", "virginia")
    tokyo, virginia = (
        PeerProcess(
            tmp_path / name,
            name,
            {"MOBI_HELPER": str(helper_binary), "MOBI_BREAKPOINTS": str(tmp_path / f"{name}.breakpoints")},
        )
        for name in names
    )
    async with AsyncExitStack() as stack:
        for peer in (tokyo, virginia):
            await peer.start()
            stack.push_async_callback(ended, peer)
        token = await tokyo.call("peer.token.new", {})
        await virginia.call("peer.join", {"token": token["token"]})
        await eventually(lambda: joined(virginia, 2))
        beats = Beats({peer.name: peer.directory for peer in (tokyo, virginia)})
        stack.callback(beats.close)
        await stack.enter_async_context(background(beats.run))
        guest = await one(tokyo, beats)
        async with trio.open_nursery() as nursery:
            records: list[Row] = []

            async def move() -> None:
                records.append(await tokyo.call("vm.migrate", {"vm": guest, "to": "virginia"}))

            nursery.start_soon(move)
            async with held(virginia, "destination.Start"):
                host = everything(virginia)
                stop(host)
                await eventually(lambda: in_epoch(tokyo, guest, 3))
                await beats.goes_on(guest)
            go_on(reversed(host))
        assert not records[0]["ok"], records
        await eventually(lambda: nothing_of_it(virginia))
        await beats.goes_on(guest)
        assert await state_of(tokyo, guest) == "running"
        assert {beat.copy.partition(":")[0] for beat in beats.of(guest)} == {"tokyo"}
        assert len({beat.boot for beat in beats.of(guest)}) == 1


async def in_epoch(peer: PeerProcess, guest: str, epoch: int) -> bool:
    return bool((await peer.call("vm.show", {"vm": guest}))["epoch"] == epoch)


async def nothing_of_it(peer: PeerProcess) -> bool:
    return not any((peer.directory / "guests").iterdir()) and not helpers_of(peer, "guest")
