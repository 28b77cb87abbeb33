# SPDX-License-Identifier: Apache-2.0
"""Mail between peers in one process: real sockets and TLS, and peers that do not answer."""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from mobid import mail, server, tls
from mobid.bulk import Bulk
from mobid.identity import load_or_create
from mobid.links import connect_tls
from mobid.mail import Mail
from mobid.rpc import ServedRequest
from mobid.server import Server, open_tcp, open_unix
from mobid.signal import Changed
from mobid.tasks import background
from proto import entries
from proto.messages import LIMIT
from proto.state import State


class Node:
    """A peer that only has mail."""

    def __init__(self, directory: Path, name: str, port: int = 0) -> None:
        directory.mkdir(exist_ok=True)
        self.name = name
        self.identity = load_or_create(directory / "identity.pem")
        self.state = State()
        self.changed = Changed()
        self.got: list[tuple[str, bytes]] = []
        self.came = Changed()
        self.mail = Mail(self.identity, self.member_of, self.receive)
        self.tcp = open_tcp(("127.0.0.1", port))
        self.unix = open_unix(directory / "s")
        self.server = Server(
            self.identity, lambda: self.state, self.changed, self.carry_out, Bulk(), mail=self.mail
        )

        self.port = int(self.tcp.socket.getsockname()[1])

    def member_of(self, peer: str) -> entries.Member | None:
        return self.state.members.get(peer)

    async def unconnected(self) -> None:
        """Wait until nobody is connected to it."""
        with trio.fail_after(20):
            while self.server._open:  # noqa: ASYNC110 - nothing tells
                await trio.sleep(0.01)

    @property
    def id(self) -> str:
        return self.identity.id

    @property
    def member(self) -> entries.Member:
        return entries.Member(
            id=self.id,
            name=self.name,
            address=f"127.0.0.1:{self.port}",
            certificate=self.identity.certificate,
        )

    def receive(self, peer: str, data: bytes) -> None:
        self.got.append((peer, data))
        self.came.set()

    async def carry_out(self, _request: ServedRequest, _args: dict[str, Any]) -> Any:
        raise AssertionError("nobody asks anything here")

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self.mail.run)
            nursery.start_soon(self.server.serve, self.tcp, self.unix)

    async def gets(self, count: int) -> list[tuple[str, bytes]]:
        await self.came.wait_until(lambda: len(self.got) >= count)
        return self.got


def introduce(*nodes: Node) -> None:
    members = {node.id: node.member for node in nodes}
    for node in nodes:
        node.state = State(mesh="m", members=members)
        node.changed.set()


@asynccontextmanager
async def nodes(base: Path) -> AsyncGenerator[tuple[Node, Node], None]:
    pair = (Node(base / "a", "tokyo"), Node(base / "b", "virginia"))
    introduce(*pair)
    with trio.fail_after(30):
        async with background(pair[0].run, pair[1].run):
            yield pair


async def test_mail_arrives_in_order_and_says_who_sent_it(socket_dir: Path) -> None:
    async with nodes(socket_dir) as (tokyo, virginia):
        sent = [b"%d" % number * 50 for number in range(500)]
        for data in sent:
            tokyo.mail.send(virginia.id, data)
        virginia.mail.send(tokyo.id, b"")
        assert await virginia.gets(500) == [(tokyo.id, data) for data in sent]
        assert await tokyo.gets(1) == [(virginia.id, b"")]
        large = bytes(LIMIT)
        tokyo.mail.send(virginia.id, large)
        assert (await virginia.gets(501))[-1] == (tokyo.id, large)


async def test_a_receiver_that_comes_back_gets_mail_again(socket_dir: Path) -> None:
    tokyo, virginia = Node(socket_dir / "a", "tokyo"), Node(socket_dir / "b", "virginia")
    introduce(tokyo, virginia)
    with trio.fail_after(30):
        async with background(tokyo.run):
            async with background(virginia.run):
                tokyo.mail.send(virginia.id, b"one")
                await virginia.gets(1)
            again = Node(socket_dir / "b", "virginia", virginia.port)
            introduce(tokyo, again)
            async with background(again.run):
                while not again.got:
                    tokyo.mail.send(again.id, b"two")
                    await trio.sleep(0.02)
                assert set(again.got) == {(tokyo.id, b"two")}


async def test_a_silent_peer_holds_up_nobody_and_its_outbox_is_bounded(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mail, "QUEUE_MESSAGES", 10)
    async with nodes(socket_dir) as (tokyo, virginia):
        with socket.socket() as deaf:
            deaf.bind(("127.0.0.1", 0))
            deaf.listen()
            silent = virginia.member.model_copy(
                update={"id": "5" * 16, "address": f"127.0.0.1:{deaf.getsockname()[1]}"}
            )
            tokyo.state = State(mesh="m", members={**tokyo.state.members, silent.id: silent})
            for _ in range(1000):
                tokyo.mail.send(silent.id, b"x")
            tokyo.mail.send(virginia.id, b"y")
            await virginia.gets(1)
            assert tokyo.mail._outboxes[silent.id].dropped == 990
            tokyo.mail.send("no member", b"x")
            assert set(tokyo.mail._outboxes) == {silent.id, virginia.id}


async def test_an_idle_connection_is_closed_and_made_again(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mail, "IDLE", 0.1)
    async with nodes(socket_dir) as (tokyo, virginia):
        for count in (1, 2):
            tokyo.mail.send(virginia.id, b"x")
            await virginia.gets(count)
            await virginia.unconnected()


async def test_a_removed_member_s_mail_is_taken_only_for_a_moment(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "FAREWELL", 0.1)
    async with nodes(socket_dir) as (tokyo, virginia):
        tokyo.mail.send(virginia.id, b"x")
        await virginia.gets(1)
        virginia.state = State(mesh="m", members={virginia.id: virginia.member})
        virginia.changed.set()
        await virginia.unconnected()
        tokyo.mail.send(virginia.id, b"y")
        await trio.sleep(0.2)
        assert virginia.got == [(tokyo.id, b"x")]


async def test_users_strangers_and_rubbish_are_shut_out(socket_dir: Path) -> None:
    async with nodes(socket_dir) as (tokyo, virginia):
        (socket_dir / "u").mkdir()
        ann = load_or_create(socket_dir / "u" / "ann.pem")
        user = entries.User(id=ann.id, name="ann", role="admin", certificate=ann.certificate)
        virginia.state = State(mesh="m", members=virginia.state.members, users={ann.id: user})
        virginia.changed.set()
        frame = (1).to_bytes(4, "big") + b"x"
        for who, data in ((ann, frame), (None, frame), (tokyo.identity, (2**32 - 1).to_bytes(4, "big"))):
            stream = await connect_tls(
                virginia.member.address,
                tls.client_context(who, mail.PROTOCOL),
                virginia.identity.public_key,
                "virginia",
            )
            await stream.send_all(data)
            with suppress(trio.BrokenResourceError):
                while await stream.receive_some(1000):
                    pass  # a stranger is told what is wrong
            await trio.aclose_forcefully(stream)
        assert virginia.got == []
