# SPDX-License-Identifier: Apache-2.0
"""A host stands still for so long that its guest is started anew elsewhere; then it goes on, with everything
it has. Nothing that the stale copy says is accepted anywhere, and it is fenced."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from mobid.tasks import background
from proto.api import OperationError
from tests.built import missing
from tests.guest.beats import BEAT, Beats, heard, speak
from tests.guest.faults import held
from tests.guest.freezer import Version, freezer, unfit
from tests.guest.hosts import everything, go_on, guests_processes, stop
from tests.guest.peers import PeerProcess, eventually
from tests.guest.witness import joined

pytestmark = [
    pytest.mark.guest,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]

Row = dict[str, Any]

SPEAKER, HEARER = "pair/a", "pair/b"
PAIR: Row = {
    "name": "pair",
    "topology": {
        "defaults": {"image": "mini", "memory": "64M"},
        "nodes": {
            "a": {"place": "virginia", "on-partition": "freeze", "exec": [BEAT]},
            "b": {"place": "tokyo"},
        },
        "links": [{"endpoints": ["a:eth1", "b:eth1"], "subnet": "10.9.1.0/24"}],
    },
}
MOMENT = 2.0
"""Seconds in which a host that wakes up may not have looked at its lease yet; other builds run meanwhile."""
VERSIONS: tuple[Version, ...] = ("v1", "v2")


@pytest.fixture
async def mesh(tmp_path: Path, helper_binary: Path) -> AsyncIterator[list[PeerProcess]]:
    """Three peers, each a voter, and the lab: guest a at virginia, b at tokyo."""
    peers = [
        PeerProcess(
            tmp_path / name,
            name,
            {"MOBI_HELPER": str(helper_binary), "MOBI_BREAKPOINTS": str(tmp_path / f"{name}.breakpoints")},
        )
        for name in ("tokyo", "virginia", "sydney")
    ]
    async with AsyncExitStack() as stack:
        for peer in peers:
            await peer.start()
            stack.push_async_callback(ended, peer)
        for number, peer in enumerate(peers[1:], 2):
            token = await peers[0].call("peer.token.new", {})
            await peer.call("peer.join", {"token": token["token"]})
            await eventually(partial(joined, peer, number))
        await eventually(lambda: three_voters(peers[0]))
        await peers[0].call("lab.up", {"lab": json.dumps(PAIR)})
        yield peers


async def three_voters(peer: PeerProcess) -> bool:
    return len((await peer.call("leader"))["voters"]) == 3


async def ended(peer: PeerProcess) -> None:
    with trio.CancelScope(shield=True):
        go_on(reversed(everything(peer)))
        await peer.stop()


@pytest.fixture
async def beats(mesh: list[PeerProcess]) -> AsyncIterator[Beats]:
    found = Beats({peer.name: peer.directory for peer in mesh})
    async with background(found.run):
        yield found
    found.close()


async def begin(mesh: list[PeerProcess], beats: Beats) -> None:
    tokyo, virginia, _ = mesh
    await speak(virginia, SPEAKER, tokyo, HEARER)
    await beats.goes_on(SPEAKER)

    async def is_heard() -> bool:
        return len(await heard(tokyo, HEARER)) > 5

    await eventually(is_heard)


async def failed_over(tokyo: PeerProcess) -> Row:
    """Wait until the guest runs elsewhere, in its second epoch."""

    async def elsewhere() -> Row | None:
        with suppress(OperationError):
            row: Row = await tokyo.call("vm.show", {"vm": SPEAKER})
            return row if row["epoch"] == 2 and row["state"] == "running" else None
        return None

    row: Row = await eventually(elsewhere)
    assert row["peer"] in ("tokyo", "sydney")
    return row


async def reached(tokyo: PeerProcess) -> None:
    async def pinged() -> bool:
        return bool((await tokyo.execute(HEARER, "ping", "-c", "1", "-W", "1", "a"))[0] == 0)

    await eventually(pinged)


def events(peer: PeerProcess, kind: str) -> list[Row]:
    lines = (peer.directory / "events.ndjson").read_text().splitlines()
    return [event for line in lines if (event := json.loads(line))["kind"] == kind]


async def fenced(virginia: PeerProcess) -> Row:
    async def said() -> list[Row]:
        return events(virginia, "guest.fenced")

    (event,) = await eventually(said)
    return dict(event)


async def check(mesh: list[PeerProcess], beats: Beats, old: str, last: float) -> None:
    """After the host has come back: the stale copy (with this boot id) was not heard after `last`, and is
    fenced; the new one goes on."""
    tokyo, virginia, _ = mesh
    event = await fenced(virginia)
    assert (event["guest"], event["epoch"]) == (SPEAKER, 1)
    assert event["stood"] > 0
    assert (Path(event["kept"]) / "vda.overlay").exists()
    assert not list((virginia.directory / "guests").iterdir())
    after = await beats.goes_on(SPEAKER)
    assert after[-1].boot != old
    assert not [beat for beat in await heard(tokyo, HEARER) if beat.boot == old and beat.at > last]
    row = await tokyo.call("vm.show", {"vm": SPEAKER})
    assert row["epoch"] == 2
    (new,) = [peer for peer in mesh if peer.name == row["peer"]]
    assert events(new, "guest.failed-over")[0]["epoch"] == 2
    await reached(tokyo)


async def test_a_stopped_host_wakes_up_stale(mesh: list[PeerProcess], beats: Beats) -> None:
    """SIGSTOP of all its processes; its guest wakes up first and speaks, its switch next, mobid last."""
    tokyo, virginia, _ = mesh
    await begin(mesh, beats)
    assert virginia.process is not None
    identity = await identity_of(tokyo)
    all_of_it = everything(virginia)
    stop(all_of_it)
    await failed_over(tokyo)
    assert await identity_of(tokyo) == identity
    old = (await heard(tokyo, HEARER))[-1]
    go_on(guests_processes(virginia))
    await trio.sleep(0.5)
    go_on(pid for pid in all_of_it if pid != virginia.process.pid)
    await trio.sleep(0.5)
    go_on([virginia.process.pid])
    await check(mesh, beats, old.boot, old.at)


async def identity_of(peer: PeerProcess) -> list[Row]:
    row = await peer.call("vm.show", {"vm": SPEAKER})
    return list(row["interfaces"])


@pytest.mark.parametrize(
    "version",
    [pytest.param(v, marks=pytest.mark.skipif(bool(unfit(v)), reason=unfit(v))) for v in VERSIONS],
)
async def test_a_frozen_host_wakes_up_stale(mesh: list[PeerProcess], beats: Beats, version: Version) -> None:
    """All processes of the host in one cgroup, frozen and thawed at once."""
    tokyo, virginia, _ = mesh
    await begin(mesh, beats)
    assert virginia.process is not None
    cold = freezer(version)
    assert cold is not None
    with cold.frozen(f"mobi-{virginia.process.pid}", everything(virginia)):
        await failed_over(tokyo)
        old = (await heard(tokyo, HEARER))[-1]
    await check(mesh, beats, old.boot, old.at)
    assert not beats.twice(SPEAKER, MOMENT)


async def test_a_copy_that_waits_for_a_lost_destination_is_let_go(mesh: list[PeerProcess]) -> None:
    """The destination is lost after the guest ran there, and before that was durable. The guest is started
    anew, perhaps at the source, where the old copy must not be in its way."""
    tokyo, virginia, sydney = mesh
    await eventually(partial(runs_by, tokyo, 1))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(migrate, tokyo)
        async with held(sydney, "destination.Sync"):
            stop(everything(sydney))
            await eventually(partial(runs_by, tokyo, 3))
        nursery.cancel_scope.cancel()
    event = await fenced(virginia)
    assert (event["guest"], event["epoch"]) == (SPEAKER, 1)
    assert (Path(event["kept"]) / "vda.overlay").exists()
    assert not list((virginia.directory / "migrations").iterdir())


async def runs_by(asked: PeerProcess, epoch: int) -> bool:
    with suppress(OperationError):
        row = await asked.call("vm.show", {"vm": SPEAKER})
        return (row["epoch"], row["state"]) == (epoch, "running")
    return False


async def migrate(asked: PeerProcess) -> None:
    with suppress(OperationError):
        await asked.call("vm.migrate", {"vm": SPEAKER, "to": "sydney"})
