# SPDX-License-Identifier: Apache-2.0
"""Links between two peers in one process: real sockets and TLS, catalogs without disk in the way."""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from mobid.bulk import preamble
from mobid.gossip import Liveness
from mobid.identity import load_or_create
from mobid.links import Links
from mobid.operations import Operations, Request, operation
from mobid.rpc import ServedRequest
from mobid.server import Server, open_tcp, open_unix
from mobid.signal import Changed
from mobid.tasks import background
from proto import api, entries
from proto.api import OperationError
from proto.state import State

GUEST = entries.Guest(key="lab/vm", id="x", image="mini", memory=1, owner="")


class Unseen:
    """Peers of which nothing was heard."""

    def liveness(self, _peer: str) -> Liveness:
        return Liveness("alive", None)

    def last_answer(self, _peer: str) -> dict[str, Any]:
        return {}


class Node:
    """The part of a peer that has to do with others."""

    def __init__(self, directory: Path, name: str) -> None:
        directory.mkdir()
        self.name = name
        self.deaf: trio.Event | None = None
        self.identity = load_or_create(directory / "identity.pem")
        self.state = State()
        self.changed = Changed()
        self.links = Links(self.identity, lambda: self.state, self.carry_out, Unseen())
        self.operations = Operations(
            self.identity.id, lambda: self.state, self.links, self.leader, trio.lowlevel.checkpoint
        )
        self.operations.add(self)
        self.tcp = open_tcp(("127.0.0.1", 0))
        self.unix = open_unix(directory / "s")
        self.server = Server(
            self.identity, lambda: self.state, self.changed, self.carry_out, self.links.incoming_bulk
        )

    async def carry_out(self, request: ServedRequest, args: dict[str, Any]) -> Any:
        return await self.operations.run(request, args)

    async def leader(self, _timeout: float) -> str:
        raise OperationError("no-leader", "there is none here")

    @property
    def member(self) -> entries.Member:
        host, port = self.tcp.socket.getsockname()
        return entries.Member(
            id=self.identity.id,
            name=self.name,
            address=f"{host}:{port}",
            certificate=self.identity.certificate,
        )

    @operation("ping", role="viewer")
    async def ping(self, request: Request, _args: api.Nothing) -> dict[str, Any]:
        if self.deaf is not None:
            await self.deaf.wait()
        return {"by": request.caller.name}

    @operation("vm.exec", role="operator", args=api.VmExec, route="guest", timeout=None)
    async def exec(self, request: Request, args: api.VmExec) -> dict[str, Any]:
        await request.item({"vm": args.vm, "at": self.name})
        while (value := await request.input())["data"]:
            await request.item({"channel": 1, "data": value["data"]})
        return {"code": 0, "hops": request.hops}

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self.links.run)
            nursery.start_soon(self.server.serve, self.tcp, self.unix)
            await trio.sleep_forever()


@asynccontextmanager
async def nodes(base: Path, owner: int = 1) -> AsyncGenerator[tuple[Node, Node], None]:
    """Two members that know each other, and a guest that lives at the one or the other."""
    pair = (Node(base / "a", "tokyo"), Node(base / "b", "virginia"))
    members = {node.identity.id: node.member for node in pair}
    guest = GUEST.model_copy(update={"owner": pair[owner].identity.id})
    for node in pair:
        node.state = State(mesh="m", members=members, guests={"lab/vm": guest})
    with trio.fail_after(30):
        async with background(pair[0].run, pair[1].run):
            yield pair


async def test_calls_and_pings(socket_dir: Path) -> None:
    async with nodes(socket_dir) as (tokyo, virginia):
        there = virginia.identity.id
        assert await tokyo.links.call(there, "ping") == {"by": "tokyo"}
        assert await tokyo.links.call(tokyo.identity.id, "ping") == {"by": "tokyo"}
        assert await tokyo.links.ping(there) > 0
        with pytest.raises(OperationError, match="there is no operation"):
            await tokyo.links.call(there, "no.such")
        with pytest.raises(OperationError, match="is no member of this mesh"):
            await tokyo.links.call("0" * 16, "ping")


async def test_a_connection_without_answers_is_given_up_and_made_anew(socket_dir: Path) -> None:
    async with nodes(socket_dir) as (tokyo, virginia):
        there = virginia.identity.id
        assert await tokyo.links.call(there, "ping") == {"by": "tokyo"}
        shared = tokyo.links._links[there].client
        virginia.deaf = trio.Event()
        for _ in range(2):
            assert tokyo.links._links[there].client is shared
            with pytest.raises(OperationError) as caught:
                await tokyo.links.call(there, "ping", timeout=0.2)
            assert caught.value.code == "timeout"
        assert tokyo.links._links[there].client is None
        virginia.deaf = None
        assert await tokyo.links.call(there, "ping") == {"by": "tokyo"}
        tokyo.links.drop(there)
        assert await tokyo.links.ping(there) > 0


async def test_a_request_about_a_guest_is_passed_on_with_items_and_inputs(socket_dir: Path) -> None:
    async with nodes(socket_dir) as (tokyo, _):
        args = api.VmExec(vm="vm", argv=["cat"])
        async with tokyo.links.stream(tokyo.identity.id, "vm.exec", args) as stream:
            items = aiter(stream)
            assert await anext(items) == {"vm": "lab/vm", "at": "virginia"}
            for data in (b"one", b"two"):
                await stream.send({"channel": 0, "data": data})
                assert await anext(items) == {"channel": 1, "data": data}
            await stream.send({"channel": 0, "data": b""})
            assert await stream.result() == {"code": 0, "hops": 1}


async def test_a_request_that_never_finds_its_place_ends(socket_dir: Path) -> None:
    async with nodes(socket_dir) as (tokyo, virginia):
        lost = GUEST.model_copy(update={"owner": tokyo.identity.id})
        virginia.state = State(**{**vars(virginia.state), "guests": {"lab/vm": lost}})
        with pytest.raises(OperationError, match="passed on 3 times") as caught:
            await tokyo.links.call(virginia.identity.id, "vm.exec", api.VmExec(vm="vm", argv=["x"]))
        assert caught.value.code == "conflict"


async def test_a_removed_member_loses_its_connections(socket_dir: Path) -> None:
    async with nodes(socket_dir) as (tokyo, virginia):
        args = api.VmExec(vm="vm", argv=["cat"])
        async with tokyo.links.stream(virginia.identity.id, "vm.exec", args) as stream:
            assert (await anext(aiter(stream)))["at"] == "virginia"
            only = {virginia.identity.id: virginia.member}
            virginia.state = State(**{**vars(virginia.state), "members": only})
            virginia.changed.set()
            with pytest.raises(OperationError) as caught:
                await stream.result()
            assert caught.value.code == "unreachable"
        with pytest.raises(OperationError):
            await tokyo.links.call(virginia.identity.id, "ping")


async def test_an_expected_bulk_connection_is_handed_over(socket_dir: Path) -> None:
    async with nodes(socket_dir) as (tokyo, virginia):
        id = bytes(range(16))
        with virginia.links.expect(id, 3) as expected:
            ours = await tokyo.links.bulk(virginia.identity.id, preamble(id, 3))
            theirs = await expected.wait(10)
        with ours, theirs:
            assert ours.getblocking()
            assert theirs.getblocking()
            ours.sendall(b"after the preamble")
            assert await trio.to_thread.run_sync(theirs.recv, 100) == b"after the preamble"


@pytest.mark.parametrize(
    "opening",
    [preamble(b"y" * 16), preamble(b"x" * 16, 1), preamble(b"x" * 16)[:40] + b"12345678", b"M" * 48],
)
async def test_an_unexpected_bulk_connection_is_closed(socket_dir: Path, opening: bytes) -> None:
    async with nodes(socket_dir) as (tokyo, virginia):
        with virginia.links.expect(b"x" * 16) as expected:
            sock = await tokyo.links.bulk(virginia.identity.id, opening)
            with sock:
                assert await trio.to_thread.run_sync(sock.recv, 1) == b""
            with pytest.raises(OperationError, match="no bulk connection came"):
                await expected.wait(0)


async def test_a_bulk_connection_nobody_takes_is_closed(socket_dir: Path) -> None:
    async with nodes(socket_dir) as (tokyo, virginia):
        with virginia.links.expect(b"x" * 16):
            sock = await tokyo.links.bulk(virginia.identity.id, preamble(b"x" * 16))
            await trio.sleep(0.1)
        with sock:
            assert await trio.to_thread.run_sync(sock.recv, 1) == b""


async def test_the_other_user_s_socket_stays_shut(socket_dir: Path) -> None:
    async with nodes(socket_dir):
        assert (socket_dir / "a" / "s").stat().st_mode & 0o777 == 0o600


async def test_a_port_is_taken_once() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(OperationError, match="is in use"):
            open_tcp(("127.0.0.1", other.getsockname()[1]))
    with pytest.raises(OperationError, match="cannot listen"):
        open_tcp(("192.0.2.1", 0))
