# SPDX-License-Identifier: Apache-2.0
"""A command that is asked again, at another peer, because nobody heard its answer: it is done once."""

from __future__ import annotations

from typing import Any

import pytest

from proto.api import OperationError
from tests.mesh.peers import Mesh, PeerProcess

KEY = "00112233445566ff"
OTHER = "ffeeddccbbaa9988"


async def attempt(at: PeerProcess, op: str, key: str = KEY, **args: Any) -> Any:
    async with at.client() as client:
        return await client.call(op, args, 30.0, key=key)


async def test_a_token_asked_for_twice_is_one_token(mesh: Mesh) -> None:
    tokyo, virginia = await mesh.start("tokyo", "virginia")
    before = len(await tokyo.ask("peer.token.ls"))
    lost = await attempt(virginia, "peer.token.new", uses=1)
    heard = await attempt(tokyo, "peer.token.new", uses=1)
    assert (lost["id"], lost["expires"]) == (heard["id"], heard["expires"])
    assert len(await tokyo.ask("peer.token.ls")) == before + 1
    await mesh.peer("amsterdam").start(token=heard["token"])
    assert "is spent" in mesh.peer("kyoto").fails(token=lost["token"])
    another = await attempt(tokyo, "peer.token.new", OTHER)
    assert another["id"] != heard["id"]
    assert KEY.encode() not in (tokyo.directory / "catalog" / "log").read_bytes(), (
        "the secret follows from it"
    )


async def test_an_eviction_asked_for_twice_is_one(mesh: Mesh) -> None:
    tokyo, virginia, _ = await mesh.start("tokyo", "virginia", "amsterdam")
    first = await attempt(virginia, "peer.evict", peer="amsterdam")
    again = await attempt(tokyo, "peer.evict", peer="amsterdam")
    assert first["state"] == again["state"] == "left"
    assert first["peer"] == again["peer"]
    with pytest.raises(OperationError) as caught:
        await attempt(tokyo, "peer.evict", OTHER, peer="amsterdam")
    assert caught.value.code == "not-found"


async def test_a_restarted_peer_remembers_what_was_done(mesh: Mesh) -> None:
    (tokyo,) = await mesh.start("tokyo")
    first = await attempt(tokyo, "peer.token.new")
    tokyo.kill()
    await tokyo.start()
    again = await attempt(tokyo, "peer.token.new")
    assert again["id"] == first["id"]
    assert len(await tokyo.ask("peer.token.ls")) == 1
