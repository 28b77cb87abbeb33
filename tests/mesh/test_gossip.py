# SPDX-License-Identifier: Apache-2.0
"""Gossip between real peers: crashes are seen, keys rotate, and bad datagrams do nothing."""

from __future__ import annotations

import secrets
import signal
import socket
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from mobid.gossip import Gossip
from mobid.signal import Changed
from mobid.tasks import background
from proto import entries
from proto.entries import GossipKey
from proto.gossip_keys import DAY, Keyring
from proto.gossip_wire import NONCE, Envelopes
from proto.state import State
from proto.swim.events import Settings
from proto.swim.packets import Claim, Ping
from proto.swim.packets import Gossip as News
from tests.mesh.peers import Mesh, PeerProcess

FAST = Settings(interval=0.1, timeout=0.05, gossip=0.02, dead=0.3, sync=5.0)
PATIENCE = 30.0


# Whole peers.


async def states(peer: PeerProcess, wanted: dict[str, str]) -> None:
    """Wait until this peer sees the others so."""
    await peer.until("peer.ls", lambda rows: wanted.items() <= {r["name"]: r["state"] for r in rows}.items())


async def test_a_killed_peer_is_dead_to_all_and_alive_again_when_it_is_back(mesh: Mesh) -> None:
    tokyo, virginia, amsterdam = await mesh.start("tokyo", "virginia", "amsterdam")
    for peer in (tokyo, virginia):
        rows = await peer.until(
            "peer.ls",
            lambda rows: all(row["memory_free"] and row["rtt_ms"] is not None for row in rows),
        )
        assert all(row["rtt_ms"] < 1000 for row in rows)
    amsterdam.kill()
    for peer in (tokyo, virginia):
        await states(peer, {"amsterdam": "dead"})
    await amsterdam.start()
    for peer in (tokyo, virginia, amsterdam):
        await peer.knows(3)
    status = await tokyo.ask("status")
    assert status["gossip"]["packets_in"] > 0
    assert status["gossip"]["bytes_out"] > 0


async def test_a_peer_that_stood_still_accuses_nobody_and_is_alive_again(mesh: Mesh) -> None:
    tokyo, virginia, _ = await mesh.start("tokyo", "virginia", "amsterdam")
    assert virginia.process is not None
    virginia.process.send_signal(signal.SIGSTOP)
    try:
        await states(tokyo, {"virginia": "dead"})
    finally:
        virginia.process.send_signal(signal.SIGCONT)
    await tokyo.knows(3)
    async with virginia.client() as client, client.request("events", {"local": True}) as request:
        seen = [item async for item in request]
    assert [item for item in seen if item["kind"] == "peer.turned" and item.get("state") == "dead"] == []


async def test_an_eviction_rotates_the_key_and_nobody_is_suspected_for_it(mesh: Mesh) -> None:
    tokyo, virginia, amsterdam = await mesh.start("tokyo", "virginia", "amsterdam")
    await tokyo.ask("peer.evict", peer="amsterdam")
    assert await amsterdam.ended() == 1
    before = (await virginia.ask("status"))["gossip"]["packets_in"]
    await virginia.until("status", lambda status: status["gossip"]["packets_in"] > before + 20)
    for peer in (tokyo, virginia):
        text = peer.log()
        assert "gossip.version" not in text
        async with peer.client() as client, client.request("events", {"local": True}) as request:
            seen = [item async for item in request if item["kind"] == "peer.turned"]
        assert [item for item in seen if item["name"] != "amsterdam"] == []


async def test_rubbish_on_the_socket_is_counted_and_dropped(mesh: Mesh) -> None:
    tokyo, virginia = await mesh.start("tokyo", "virginia")
    host, port = (await tokyo.ask("peer.show", peer="tokyo"))["gossip"].rsplit(":", 1)
    sent = [b"", b"x", b"\x11" * 42, b"\x11" * 400, secrets.token_bytes(1200), b"\0" * 9000]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as rude:
        for datagram in sent:
            rude.sendto(datagram, (host, int(port)))
        await tokyo.until("status", lambda status: status["gossip"]["bad"] >= len(sent))
        rude.setblocking(False)
        with pytest.raises(BlockingIOError):
            rude.recv(100)
    await virginia.knows(2)
    assert "Traceback" not in tokyo.log()


# Parts of peers, with quick times and keys of the test's own.


class Book:
    """A catalog that the test writes."""

    def __init__(self) -> None:
        self.state = State()
        self.changed = Changed()
        self.leads = False

    def write(self, **change: Any) -> None:
        self.state = State(**{**vars(self.state), **change})
        self.changed.set()

    async def propose(self, entry: entries.Entry, timeout: float = 10.0) -> int:
        assert isinstance(entry, entries.RotateGossipKey)
        key = GossipKey(generation=entry.generation, key=entry.key, since=time.time())
        self.write(gossip_keys=(*self.state.gossip_keys, key)[-2:])
        return 1


class Members:
    """`names` gossip with one another, each with its socket, on one book."""

    def __init__(self, count: int) -> None:
        self.book = Book()
        self.ids = [f"{number:016x}" for number in range(1, count + 1)]
        self.turned: list[tuple[str, str, str]] = []
        self.gossips = {id: self._make(id) for id in self.ids}
        self.ports = {id: gossip.open("127.0.0.1", 1 << 16, "") for id, gossip in self.gossips.items()}
        self.book.write(members={id: self.member(id) for id in self.ids})

    def _make(self, id: str) -> Gossip:
        def turned(peer: str, state: str) -> None:
            self.turned.append((id, peer, state))

        return Gossip(id, lambda: self.book.state, turned, settings=FAST)

    def member(self, id: str) -> entries.Member:
        return entries.Member(
            id=id, name=f"p{id}", address="127.0.0.1:1", certificate=b"", gossip=f"127.0.0.1:{self.ports[id]}"
        )

    async def until(self, condition: Any) -> None:
        with trio.fail_after(PATIENCE):
            while not condition():  # noqa: ASYNC110 - nothing tells of a counter that has changed
                await trio.sleep(0.02)

    def sees(self, id: str, peer: str, state: str) -> bool:
        return self.gossips[id].liveness(peer).state == state

    def heard_all(self) -> bool:
        """Whether everybody has measured everybody, after a key came."""
        return all(
            gossip.liveness(peer).rtt is not None for gossip in self.gossips.values() for peer in self.ids
        )


@asynccontextmanager
async def members(count: int) -> AsyncGenerator[Members, None]:
    made = Members(count)
    try:
        runs = [lambda g=gossip: g.run(made.book, lambda: 1 << 30) for gossip in made.gossips.values()]
        async with background(*runs):
            yield made
    finally:
        for gossip in made.gossips.values():
            gossip.close()


async def test_without_a_key_nobody_sends_and_the_coordinator_makes_one() -> None:
    async with members(3) as made:
        await trio.sleep(0.5)
        assert all(gossip.figures()["packets_out"] == 0 for gossip in made.gossips.values())
        made.book.leads = True
        made.book.changed.set()
        made.book.write(index=1)
        await made.until(made.heard_all)
        assert [key.generation for key in made.book.state.gossip_keys] == [1]
        await made.until(lambda: made.gossips[made.ids[0]].last_answer(made.ids[1]))
        assert made.gossips[made.ids[0]].last_answer(made.ids[1]) == {"memory_free": 1 << 30}


async def test_keys_rotate_without_a_suspicion() -> None:
    async with members(3) as made:
        made.book.leads = True
        made.book.write(index=1)
        await made.until(made.heard_all)
        old = made.book.state.gossip_keys[-1]
        made.book.write(gossip_keys=(old.model_copy(update={"since": time.time() - DAY}),))
        await made.until(lambda: made.book.state.gossip_keys[-1].generation == 2)
        made.book.leads = False
        before = [gossip.figures()["packets_in"] for gossip in made.gossips.values()]
        await made.until(
            lambda: all(
                gossip.figures()["packets_in"] > count + 100
                for gossip, count in zip(made.gossips.values(), before, strict=True)
            )
        )
        assert made.turned == []
        assert all(gossip.figures()["bad"] == 0 for gossip in made.gossips.values())


async def test_what_an_evicted_member_sends_is_refused_also_in_another_s_name() -> None:
    async with members(3) as made:
        key = GossipKey(generation=1, key=secrets.token_bytes(32))
        made.book.write(gossip_keys=(key,))
        await made.until(made.heard_all)
        first, second, third = made.ids
        stale = key.model_copy(update={"stale": True})
        newer = GossipKey(generation=2, key=secrets.token_bytes(32))
        newest = GossipKey(generation=3, key=secrets.token_bytes(32))
        rest = {id: made.member(id) for id in (first, second)}
        made.book.write(members=rest, gossip_keys=(stale, newer))
        made.book.write(gossip_keys=(newer, newest))
        await made.until(lambda: made.gossips[first].liveness(third).state == "dead")
        bad = made.gossips[first].figures()["bad"]
        ring = Keyring()
        ring.learn((key,), 0.0)
        lie = News((Claim(first, "dead", 1 << 40, second), Claim(second, "dead", 1 << 40, second)))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as evicted:
            for name in (second, third):
                for packet in (lie, Ping(1, "alive", 0)):
                    datagram = Envelopes(name, ring).seal(first, packet, secrets.token_bytes(NONCE), 0.0)
                    assert datagram is not None
                    evicted.sendto(datagram, ("127.0.0.1", made.ports[first]))
        await made.until(lambda: made.gossips[first].figures()["bad"] >= bad + 4)
        assert made.sees(first, second, "alive")
        assert (first, second, "dead") not in made.turned


async def test_a_flood_does_not_stop_gossip() -> None:
    async with members(2) as made:
        made.book.write(gossip_keys=(GossipKey(generation=1, key=secrets.token_bytes(32)),))
        await made.until(made.heard_all)
        first, second = made.ids
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as rude:
            rude.setblocking(False)
            for _ in range(100):
                for _ in range(60):
                    rude.sendto(b"\x11" * 300, ("127.0.0.1", made.ports[first]))
                await trio.sleep(0.005)
        before = made.gossips[first].figures()
        assert before["bad"] > 0
        await made.until(lambda: made.sees(second, first, "alive") and made.sees(first, second, "alive"))
        assert (second, first, "dead") not in made.turned


async def test_peers_without_a_version_in_common_are_reported_once(capsys: Any) -> None:
    async with members(2) as made:
        _, second = made.ids
        made.gossips[second]._envelopes = Envelopes(second, made.gossips[second]._keys, (2, 3))
        made.book.write(gossip_keys=(GossipKey(generation=1, key=secrets.token_bytes(32)),))
        await made.until(
            lambda: all(gossip.figures().get("bad_version", 0) >= 2 for gossip in made.gossips.values())
        )
    assert capsys.readouterr().out.count("gossip.version") == 2, "once at each"
