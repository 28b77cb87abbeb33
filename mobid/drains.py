# SPDX-License-Identifier: Apache-2.0
"""Emptying peers that drain: carries out `proto/drain.py` as long as this peer coordinates.

`peer drain` only writes into the catalog that a peer drains, and watches. The work is the coordinator's: for
each such peer one task, which moves one guest after the other. A coordinator that takes over begins with what
the catalog says.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import structlog
import trio

from mobid.catalog import Catalog
from mobid.events import Events
from mobid.links import Links
from mobid.moving import move_live
from mobid.operations import Request, operation, step
from mobid.placing import hosts
from mobid.signal import Changed
from proto import api, entries
from proto.api import OperationError
from proto.drain import Drain, Host, Move, destination
from proto.state import State

INTERVAL = 1.0
"""Seconds after which everything is looked at again, whether or not the catalog has changed."""

log = structlog.get_logger()


@dataclass
class _Work:
    """One peer's drain under way, for those who watch."""

    drain: Drain
    moving: dict[str, str] = field(default_factory=dict)
    """Guest → name of the peer where it goes now."""
    looked: bool = False
    """Whether its guests were looked at once."""


class Drains:
    """`peer.drain`, and the coordinator's work for it."""

    def __init__(self, catalog: Catalog, links: Links, events: Events) -> None:
        self._catalog = catalog
        self._links = links
        self._events = events
        self._work: dict[str, _Work] = {}
        self._changed = Changed()

    async def run(self) -> None:
        """Empty the peers that drain, whenever this peer coordinates, until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                for peer in self._draining():
                    if peer not in self._work:
                        self._work[peer] = _Work(Drain(peer))
                        nursery.start_soon(self._empty, peer, self._work[peer])
                await self._pause(self._catalog.state, INTERVAL)

    def _draining(self) -> list[str]:
        """The peers that this peer has to empty."""
        if not self._catalog.leads:
            return []
        return [peer for peer in self._catalog.state.members if self._shall_empty(peer)]

    def _shall_empty(self, peer: str) -> bool:
        state = self._catalog.state
        member = state.members.get(peer)
        drains = member is not None and member.status == "member" and member.draining
        return self._catalog.leads and drains and bool(state.guests_of(peer))

    async def _pause(self, seen: State, longest: float) -> None:
        """Until the catalog has changed, or for so many seconds."""
        with trio.move_on_after(longest):
            await self._catalog.wait(lambda state: state.index > seen.index)

    async def _empty(self, peer: str, work: _Work) -> None:
        try:
            while self._shall_empty(peer):
                state = self._catalog.state
                move = work.drain.next_move(state, await self._hosts(), trio.current_time())
                work.looked = True
                self._changed.set()
                if move is not None:
                    await self._carry_out(work, move)
                else:
                    wake = work.drain.wake_at()
                    rest = INTERVAL if wake is None else wake - trio.current_time()
                    await self._pause(state, min(max(rest, 0.1), INTERVAL))
        finally:
            self._work.pop(peer, None)
            self._changed.set()

    async def _hosts(self) -> dict[str, Host]:
        """The peers that answer, by id."""
        state = self._catalog.state
        there = await hosts(self._catalog, self._links)
        found = (Host(state.find_peer(host.name), host.memory_free) for host in there.hosts)
        return {host.member.id: host for host in found}

    async def _carry_out(self, work: _Work, move: Move) -> None:
        key, name = move.guest.key, self._catalog.state.peer_name(move.to)
        work.moving[key] = name
        self._changed.set()
        try:
            if move.live:
                await move_live(self._links, move.guest, move.to)
            else:
                await self._reassign(move.guest, move.to)
        except OperationError as error:
            log.info("drain.move.failed", guest=key, to=name, reason=error.message)
            self._events.emit("drain.failed", guest=key, to=name, message=error.message)
            work.drain.failed(move, error.message, trio.current_time())
        finally:
            del work.moving[key]
            self._changed.set()

    async def _reassign(self, guest: entries.Guest, to: str) -> None:
        await self._catalog.propose(entries.MoveGuest(guest=guest.key, epoch=guest.epoch, owner=to))

    # Asked by people.

    @operation("peer.drain", role="admin", args=api.PeerDrain, route="coordinator", timeout=None)
    async def drain(self, request: Request, args: api.PeerDrain) -> dict[str, Any]:
        """No new guests come to a peer, and those that are there leave it: items `{guest, state}`.

        The result `{peer, draining, guests, left: [{guest, reason}]}` comes when no guest is left there, or
        none that gets away; then it goes on without a watcher. It also goes on if the caller leaves.
        """
        member = self._catalog.state.find_peer(args.peer)
        entry = entries.DrainPeer(peer=member.id, draining=not args.undo)
        await self._catalog.propose(entry, request=step(request))
        self._events.emit("peer.draining" if not args.undo else "peer.undrained", name=member.name)
        if args.discard_stopped and not args.undo:
            await self._discard_stopped(member.id)
        left = {} if args.undo else await self._watch(request, member.id)
        return {
            "peer": member.name,
            "draining": not args.undo,
            "guests": len(self._catalog.state.guests_of(member.id)),
            "left": [{"guest": key, "reason": reason} for key, reason in left.items()],
        }

    async def _discard_stopped(self, peer: str) -> None:
        """Give the stopped guests of a peer to others, without their disks."""
        found = await self._hosts()
        for guest in self._catalog.state.guests_of(peer):
            if guest.state in ("stopped", "failed"):
                to, _ = destination(self._catalog.state, guest, found)
                if to:
                    await self._reassign(guest, to)

    async def _watch(self, request: Request, peer: str) -> dict[str, str]:
        """Tell what becomes of each guest; those that are left, with the reasons, once no other moves."""
        told: dict[str, str] = {}
        waiting = {guest.key for guest in self._catalog.state.guests_of(peer)}
        while True:
            state = self._catalog.state
            if not self._catalog.leads:
                raise OperationError("no-leader", "another peer coordinates now; it goes on", "ask again")
            here = {guest.key for guest in state.guests_of(peer)}
            work = self._work.get(peer)
            stuck = work.drain.stuck(state) if work is not None else {}
            said = {key: self._left(state, key) for key in waiting - here}
            said |= {key: f"waits: {reason}" for key, reason in stuck.items()}
            if work is not None:
                said |= {key: f"moving to {name}" for key, name in work.moving.items()}
            for key, text in said.items():
                if told.get(key) != text:
                    told[key] = text
                    await request.item({"guest": key, "state": text})
            waiting |= here
            under_way = work is not None and bool(work.moving)
            if (not here and not under_way) or not state.members[peer].draining:
                return {}
            if work is not None and work.looked and not work.moving and here <= set(stuck):
                return stuck
            with trio.move_on_after(INTERVAL):
                await self._changed.wait()

    def _left(self, state: State, key: str) -> str:
        guest = state.guests.get(key)
        return f"at {state.peer_name(guest.owner)}" if guest is not None else "removed"
