# SPDX-License-Identifier: Apache-2.0
"""Where guests can go: which peers answer now, and how much memory they have."""

from __future__ import annotations

from dataclasses import dataclass

import trio

from mobid.catalog import Catalog
from mobid.links import Links
from proto.api import OperationError
from proto.plan import Host
from proto.state import State
from proto.units import format_size

ASK_TIMEOUT = 5.0


@dataclass(frozen=True, slots=True)
class Hosts:
    """The peers that may get guests, and the names of members that did not answer."""

    hosts: list[Host]
    silent: list[str]


async def hosts(catalog: Catalog, links: Links) -> Hosts:
    """Ask every member how much memory it has left; one that drains gets no guests."""
    found: list[Host] = []
    silent: list[str] = []

    async def ask(peer: str, name: str, site: str) -> None:
        try:
            answer = await links.call(peer, "ping", timeout=ASK_TIMEOUT)
            found.append(Host(name=name, site=site, memory_free=int(answer["memory_free"])))
        except (OperationError, KeyError, TypeError, ValueError):
            silent.append(name)

    async with trio.open_nursery() as nursery:
        for member in catalog.state.members.values():
            if member.status == "member" and not member.draining:
                nursery.start_soon(ask, member.id, member.name, member.site)
    return Hosts(sorted(found, key=lambda host: host.name), sorted(silent))


def place_one(reference: str | None, memory: int, there: Hosts, state: State) -> str:
    """The id of the peer for one guest: the one that `reference` names, else the one with most memory."""
    candidates = there.hosts
    if reference is not None:
        name = state.find_peer(reference).name
        candidates = [host for host in there.hosts if host.name == name]
        if not candidates:
            raise OperationError("unreachable", f"the peer {name} does not answer, or takes no guests")
    best = max(candidates, key=lambda host: host.memory_free, default=None)
    if best is None or best.memory_free < memory:
        free = ", ".join(f"{host.name} {format_size(host.memory_free)}" for host in candidates)
        raise OperationError(
            "no-room",
            f"there is no room for a guest of {format_size(memory)} (free: {free or 'no peer answers'})",
            "give it less memory, or stop another guest",
        )
    return state.find_peer(best.name).id
