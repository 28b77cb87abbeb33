# SPDX-License-Identifier: Apache-2.0
"""Events of a real mesh: followers at all peers print the same order, also while a peer dies."""

from __future__ import annotations

from typing import Any

import trio

from mobid.signal import Changed
from mobid.tasks import background
from tests.mesh.peers import Mesh, PeerProcess

Event = dict[str, Any]


class Follower:
    """Somebody who watches the events at one peer."""

    def __init__(self, peer: PeerProcess, **args: Any) -> None:
        self.peer = peer
        self.args = {"since": 600.0, "follow": True, **args}
        self.changed = Changed()
        self.events: list[Event] = []
        self.remarks: list[str] = []

    async def run(self) -> None:
        async with self.peer.client() as client, client.request("events", self.args) as request:
            async for item in request:
                if "remark" in item:
                    self.remarks.append(item["missing"])
                else:
                    self.events.append(item)
                self.changed.set()

    async def has(self, kind: str, **facts: Any) -> None:
        """Wait until an event with these facts was printed."""
        with trio.fail_after(30):
            await self.changed.wait_until(
                lambda: any(e["kind"] == kind and facts.items() <= e.items() for e in self.events)
            )

    async def misses(self, name: str) -> None:
        """Wait until it was said that this peer is silent."""
        with trio.fail_after(30):
            await self.changed.wait_until(lambda: name in self.remarks)

    def order(self) -> list[tuple[str, int]]:
        return [(event["peer_id"], event["stamp"]) for event in self.events]

    def late(self) -> set[tuple[str, int]]:
        """What came late here; a loaded machine may keep a peer silent for longer than others wait."""
        return {(event["peer_id"], event["stamp"]) for event in self.events if "late" in event}


async def past(peer: PeerProcess, **args: Any) -> list[Event]:
    async with peer.client() as client, client.request("events", args) as request:
        return [item async for item in request]


async def test_every_peer_prints_the_same_order_while_one_dies(mesh: Mesh) -> None:
    peers = await mesh.start("tokyo", "virginia", "amsterdam", "kyoto")
    tokyo, virginia, amsterdam, kyoto = peers
    followers = [Follower(peer) for peer in (tokyo, virginia, amsterdam)]
    async with background(*(follower.run for follower in followers)):
        tokens = []
        for n in range(12):
            made = await peers[n % 3].ask("peer.token.new")
            await peers[(n + 1) % 3].until(
                "peer.token.ls", lambda rows, made=made: any(r["id"] == made["id"] for r in rows)
            )
            await peers[(n + 1) % 3].ask("peer.token.revoke", token=made["id"])
            tokens.append(made["id"])
            if n == 6:
                kyoto.kill()
        for follower in followers:
            await follower.has("token.revoked", token=made["id"])
            await follower.has("peer.turned", peer="amsterdam", name="kyoto")
            await follower.misses("kyoto")
    late = set[tuple[str, int]]().union(*(follower.late() for follower in followers))
    orders = [[id for id in follower.order() if id not in late] for follower in followers]
    common = min(len(order) for order in orders)
    assert orders[0][:common] == orders[1][:common] == orders[2][:common]
    kinds = [(event["kind"], event["token"]) for event in followers[0].events if event.get("token") in tokens]
    if late:
        return
    assert kinds == [(kind, token) for token in tokens for kind in ("token.made", "token.revoked")]


async def test_a_follower_goes_on_at_another_peer_where_it_was(mesh: Mesh) -> None:
    tokyo, virginia = await mesh.start("tokyo", "virginia")
    first = Follower(virginia)
    async with background(first.run):
        before = (await tokyo.ask("peer.token.new"))["id"]
        await first.has("token.made", token=before)
    meanwhile = (await virginia.ask("peer.token.new"))["id"]
    position: dict[str, int] = {}
    for event in first.events:
        position[event["peer_id"]] = max(event["stamp"], position.get(event["peer_id"], 0))
    second = Follower(tokyo, after=position)
    async with background(second.run):
        await second.has("token.made", token=meanwhile)
        after = (await tokyo.ask("peer.token.new"))["id"]
        await second.has("token.made", token=after)
    seen = [event["token"] for event in first.events + second.events if event["kind"] == "token.made"]
    assert seen[-3:] == [before, meanwhile, after]
    ids = [(event["peer_id"], event["stamp"]) for event in first.events + second.events]
    assert len(ids) == len(set(ids))


async def test_the_past_is_told_in_order_and_says_who_is_missing(mesh: Mesh) -> None:
    tokyo, virginia, amsterdam = await mesh.start("tokyo", "virginia", "amsterdam")
    everywhere = [await past(peer) for peer in (tokyo, virginia, amsterdam)]
    assert everywhere[0] == everywhere[1] == everywhere[2]
    assert {event["peer"] for event in everywhere[0]} == {"tokyo", "virginia", "amsterdam"}
    assert [e["stamp"] for e in everywhere[0]] == sorted(e["stamp"] for e in everywhere[0])
    assert await past(virginia, since=0.0) == []
    amsterdam.kill()
    events = await past(tokyo)
    assert [item["missing"] for item in events if "remark" in item] == ["amsterdam"]
    assert {item["peer"] for item in events if "peer" in item} == {"tokyo", "virginia"}
