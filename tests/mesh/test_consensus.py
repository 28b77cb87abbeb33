# SPDX-License-Identifier: Apache-2.0
"""A mesh without a centre: real peers of which any may die, leave, or lose what it has on disk."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from mobid.bulk import Bulk
from mobid.catalog import Catalog
from mobid.identity import load_or_create
from mobid.mail import Mail
from mobid.rpc import ServedRequest
from mobid.server import Server, open_tcp, open_unix
from mobid.store import Store
from mobid.tasks import background
from proto import entries
from proto.api import OperationError
from proto.peer_events import Settings
from proto.state import State
from tests.mesh.peers import Mesh, PeerProcess

NAMES = ("tokyo", "virginia", "amsterdam")


async def three(mesh: Mesh) -> list[PeerProcess]:
    """Three peers, all of them voters."""
    peers = await mesh.start(*NAMES)
    for peer in peers:
        await votes(peer, *NAMES)
    return peers


async def votes(peer: PeerProcess, *names: str) -> None:
    """Wait until this peer knows that exactly these vote."""
    await peer.until(
        "leader",
        lambda now: now["leader"] and not now["changing"] and now["voters"] == sorted(names),
    )


async def coordinator(peers: list[PeerProcess]) -> PeerProcess:
    """Who coordinates, by the word of the first of them."""
    name = (await peers[0].until("leader", lambda now: now["leader"]))["leader"]
    return next(peer for peer in peers if peer.name == name)


async def make_token(peer: PeerProcess) -> str:
    return str((await peer.ask("peer.token.new", timeout=60.0))["id"])


async def has_tokens(peer: PeerProcess, *ids: str) -> None:
    await peer.until("peer.token.ls", lambda rows: {row["id"] for row in rows} >= set(ids))


async def test_the_mesh_goes_on_without_its_coordinator_which_then_follows(mesh: Mesh) -> None:
    peers = await three(mesh)
    leader = await coordinator(peers)
    others = [peer for peer in peers if peer is not leader]
    acknowledged = [await make_token(peer) for peer in peers]
    term = (await others[0].ask("leader"))["term"]
    leader.kill()
    acknowledged += [await make_token(peer) for peer in others]
    new = await others[0].until("leader", lambda now: now["leader"] not in (None, leader.name))
    assert new["term"] > term
    for peer in others:
        await has_tokens(peer, *acknowledged)
    await leader.start()
    await has_tokens(leader, *acknowledged)
    await leader.until("leader", lambda now: now["leader"] and now["leader"] == new["leader"])
    for peer in peers:
        peer.kill()
    async with trio.open_nursery() as nursery:
        for peer in peers:
            nursery.start_soon(peer.start)
    for peer in peers:
        await has_tokens(peer, *acknowledged)
    await make_token(peers[2])


async def test_a_minority_refuses_and_says_who_is_missing(mesh: Mesh) -> None:
    tokyo, virginia, amsterdam = await three(mesh)
    before = await make_token(tokyo)
    virginia.kill()
    amsterdam.kill()
    with pytest.raises(OperationError, match="no coordinator") as caught:
        await tokyo.ask("peer.token.new", timeout=60.0)
    assert caught.value.code in ("no-leader", "no-majority")
    shown = await tokyo.until("leader", lambda now: now["leader"] is None and len(now["missing"]) == 2)
    assert set(shown["missing"]) == {"virginia", "amsterdam"}
    with pytest.raises(
        OperationError, match=r"1 of 3 voters answer; missing: amsterdam \(silent for \d+ s\), virginia \("
    ) as caught:
        await tokyo.ask("peer.token.new", timeout=60.0)
    assert caught.value.code == "no-majority"
    assert "start the missing peers" in caught.value.hint
    assert before in [row["id"] for row in await tokyo.ask("peer.token.ls")]
    await amsterdam.start()
    await make_token(tokyo)


async def test_a_peer_that_lost_its_catalog_is_repaired_by_the_others(mesh: Mesh) -> None:
    peers = await three(mesh)
    tokyo, virginia, amsterdam = peers
    acknowledged = [await make_token(tokyo) for _ in range(5)]
    for place, spoil in enumerate((damage, wipe)):
        virginia.kill()
        spoil(virginia.directory / "catalog")
        acknowledged.append(await make_token(amsterdam))
        await virginia.start()
        await has_tokens(virginia, *acknowledged)
        await virginia.until(
            "status", lambda _status: not (virginia.directory / "catalog/recovering").exists()
        )
        await votes(tokyo, *NAMES)
        await votes(amsterdam, *NAMES)
        assert len(list(virginia.directory.glob("catalog.damaged-*"))) == 1, place
    assert "catalog.damaged" in virginia.log()
    # Its vote counts again.
    tokyo.kill()
    acknowledged.append(await make_token(virginia))
    await has_tokens(amsterdam, *acknowledged)


def damage(catalog: Path) -> None:
    data = bytearray((catalog / "log").read_bytes())
    data[len(data) // 2] ^= 1
    (catalog / "log").write_bytes(data)


def wipe(catalog: Path) -> None:
    for path in catalog.iterdir():
        path.unlink()
    catalog.rmdir()


async def test_the_coordinator_leaves_and_the_next_one_is_evicted(mesh: Mesh) -> None:
    peers = await three(mesh)
    first = await coordinator(peers)
    kept = await make_token(first)
    await first.ask("peer.leave", timeout=90.0)
    assert await first.ended() == 0
    peers.remove(first)
    await has_tokens(peers[0], kept)
    second = await coordinator(peers)
    last = next(peer for peer in peers if peer is not second)
    row = await last.ask("peer.evict", timeout=90.0, peer=second.name)
    assert row["state"] == "left"
    assert await second.ended() == 1
    await votes(last, last.name)
    await has_tokens(last, kept, await make_token(last))
    with pytest.raises(OperationError, match="is the only peer of its mesh"):
        await last.ask("peer.leave")


async def test_two_that_leave_at_once_do_not_strand_the_third(mesh: Mesh) -> None:
    peers = await three(mesh)
    kept = await make_token(peers[0])
    first = await coordinator(peers)
    second, last = (peer for peer in peers if peer is not first)

    async def leave(peer: PeerProcess) -> None:
        await peer.ask("peer.leave", timeout=90.0)
        assert await peer.ended() == 0

    async with trio.open_nursery() as nursery:
        nursery.start_soon(leave, first)
        nursery.start_soon(leave, second)
    await votes(last, last.name)
    await has_tokens(last, kept, await make_token(last))


# Compaction, with the catalogs of peers in this process: real disks, sockets and TLS, and small limits.


class Node:
    """A peer that only keeps the catalog."""

    settings = replace(Settings(), compact_records=40, keep_records=5)

    def __init__(self, directory: Path, name: str, bootstrap: State | None = None) -> None:
        directory.mkdir(exist_ok=True)
        self.name = name
        self.identity = load_or_create(directory / "identity.pem")
        self.tcp = open_tcp(("127.0.0.1", 0))
        self.unix = open_unix(directory / "s")
        self.store = Store(directory / "catalog")
        self.catalog = Catalog(self.store, self.identity.id, self.post, self.settings, bootstrap=bootstrap)
        self.mail = Mail(self.identity, self.catalog.member, self.catalog.receive)
        self.server = Server(
            self.identity,
            lambda: self.catalog.state,
            self.catalog.changed,
            self.carry_out,
            Bulk(),
            mail=self.mail,
        )

    def post(self, peer: str, data: bytes) -> None:
        self.mail.send(peer, data)

    @property
    def member(self) -> entries.Member:
        host, port = self.tcp.socket.getsockname()
        return entries.Member(
            id=self.identity.id,
            name=self.name,
            address=f"{host}:{port}",
            certificate=self.identity.certificate,
            token="t",
        )

    async def carry_out(self, _request: ServedRequest, _args: object) -> None:
        raise AssertionError("nobody asks anything here")

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self.mail.run)
            await nursery.start(self.catalog.run)
            nursery.start_soon(self.server.serve, self.tcp, self.unix)


@asynccontextmanager
async def founder(base: Path) -> AsyncGenerator[Node, None]:
    node = Node(base / "a", "tokyo")
    node.catalog.found("m" * 16, node.member)
    node.catalog.begin()
    with trio.fail_after(60):
        async with background(node.run):
            yield node
    node.catalog.close()


def token(id: str, uses: int = 1) -> entries.AddToken:
    return entries.AddToken(token=entries.Token(id=id, secret_hash=b"", role="peer", uses=uses, expires=4e9))


async def test_a_newcomer_gets_a_snapshot_and_follows_from_there(socket_dir: Path) -> None:
    async with founder(socket_dir) as tokyo:
        await tokyo.catalog.propose(token("t"))
        seen = tokyo.catalog.changes(after=0)
        for number in range(100):
            await tokyo.catalog.propose(token(f"x{number}"))
        stored = (socket_dir / "a" / "catalog" / "snapshot").stat()
        assert stored.st_size
        bootstrap = State(mesh="m" * 16, members={tokyo.identity.id: tokyo.member})
        virginia = Node(socket_dir / "b", "virginia", bootstrap)
        await tokyo.catalog.propose(entries.AddPeer(member=virginia.member))
        index = tokyo.catalog.state.index
        virginia.catalog.begin()
        missed = virginia.catalog.changes(after=0)
        async with background(virginia.run):
            state = await virginia.catalog.wait(lambda state: state.index >= index)
            assert state.tokens == tokyo.catalog.state.tokens
            _, proposal, _ = await anext(missed)
            assert proposal is None
            at = await virginia.catalog.propose(token("by-virginia"))
            assert (await tokyo.catalog.read()).index >= at
            assert "by-virginia" in tokyo.catalog.state.tokens
            assert (await virginia.catalog.read()).tokens["by-virginia"].uses == 1
        virginia.catalog.close()
        found = Store(socket_dir / "b" / "catalog")
        assert found.stored.snapshot.index > 40
        found.close()
        count = 0
        async for _, proposal, _ in seen:
            assert proposal is not None
            count += 1
            if count == 103:
                break


async def test_what_is_too_large_or_refused_is_said_and_the_catalog_goes_on(socket_dir: Path) -> None:
    async with founder(socket_dir) as tokyo:
        large = entries.PutLab(lab=entries.Lab(name="lab", model={"x": "y" * (4 << 20)}))
        with pytest.raises(OperationError, match="larger than the") as caught:
            await tokyo.catalog.propose(large)
        assert caught.value.code == "too-large"
        await tokyo.catalog.propose(token("t"), request="k#1")
        with pytest.raises(OperationError, match="there is a token t already"):
            await tokyo.catalog.propose(token("t"))
        before = tokyo.catalog.state.tokens
        await tokyo.catalog.propose(token("u"), request="k#1")
        assert tokyo.catalog.state.tokens == before
