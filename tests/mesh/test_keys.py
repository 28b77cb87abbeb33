# SPDX-License-Identifier: Apache-2.0
"""Keys that are taken back: connections that are open end too, at every peer."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from mobid import rpc, tls
from mobid.identity import Identity, load_or_create
from mobid.links import connect_tls
from mobid.tasks import background
from proto import tokens
from proto.api import OperationError
from tests.mesh.peers import Mesh, PeerProcess


async def connected(peer: PeerProcess, identity: Identity | None) -> rpc.Client:
    key = load_or_create(peer.directory / "identity.pem").public_key
    stream = await connect_tls(await peer.address(), tls.client_context(identity), key, peer.name)
    return rpc.Client(stream, peer.name)


async def closed(client: rpc.Client) -> None:
    with trio.fail_after(20):
        while not client.closed:  # noqa: ASYNC110 - what is awaited is another process
            await trio.sleep(0.02)


async def test_an_evicted_peer_s_open_connections_end_everywhere(mesh: Mesh) -> None:
    tokyo, virginia, amsterdam = await mesh.start("tokyo", "virginia", "amsterdam")
    identity = load_or_create(amsterdam.directory / "identity.pem")
    clients = [await connected(peer, identity) for peer in (tokyo, virginia)]
    async with background(*(client.run for client in clients)):
        for client in clients:
            await client.call("peer.ls")
        await virginia.ask("peer.evict", peer="amsterdam")
        for client in clients:
            await closed(client)
    assert await amsterdam.ended() == 1
    for peer in (tokyo, virginia):
        again = await connected(peer, identity)
        async with background(again.run):
            with pytest.raises(OperationError):
                await again.call("peer.ls")


async def test_a_user_s_key_can_be_taken_back(mesh: Mesh, tmp_path: Path) -> None:
    tokyo, virginia = await mesh.start("tokyo", "virginia")
    ann = load_or_create(tmp_path / "ann.pem")
    token = tokens.decode(await tokyo.token(role="operator"))
    login = {"token": token.id, "secret": token.secret, "certificate": ann.certificate, "name": "ann"}
    stranger = await connected(virginia, None)
    async with background(stranger.run):
        await stranger.call("mesh.login", login)
    user = await connected(virginia, ann)
    async with background(user.run):
        assert len((await user.call("mesh.doors"))["members"]) == 2
        with pytest.raises(OperationError, match="needs role admin"):
            await user.call("user.ls")
        (row,) = await tokyo.ask("user.ls")
        assert (row["name"], row["role"], row["user"]) == ("ann", "operator", ann.id)
        assert (await tokyo.ask("user.rm", user="ann"))["user"] == ann.id
        await closed(user)
    again = await connected(virginia, None)
    async with background(again.run):
        with pytest.raises(OperationError, match="is spent"):
            await again.call("mesh.login", login)
    with pytest.raises(OperationError) as caught:
        await tokyo.ask("user.rm", user="ann")
    assert (caught.value.code, caught.value.hint) == ("not-found", "nobody has logged in yet")
