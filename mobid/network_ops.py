# SPDX-License-Identifier: Apache-2.0
"""The operations on networks and links: what there is, what it does to frames, and what passed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import trio

from mobid.networks import Networks
from mobid.operations import Request, operation, step
from mobid.tunnels import Reaching
from proto import api, entries
from proto.api import OperationError
from proto.segments import impairment
from proto.state import State

COUNTERS_TIMEOUT = 5.0
WHAT = ("delay", "jitter", "loss", "rate", "reorder", "duplicate")


class Proposing(Protocol):
    """What these operations need of the catalog."""

    @property
    def state(self) -> State: ...

    async def propose(self, entry: entries.Entry, *, request: str = "") -> int: ...


class NetworkOperations:
    """`net.ls`, `net.show`, `net.impair`, and `net.ports` between peers."""

    def __init__(self, networks: Networks, catalog: Proposing, links: Reaching) -> None:
        self._networks = networks
        self._catalog = catalog
        self._links = links

    @operation("net.ls", role="viewer")
    async def ls(self, request: Request, args: api.Nothing) -> list[dict[str, Any]]:
        """All networks; what they do to frames is the largest of all directions, None where nothing is."""
        state = self._catalog.state
        return [_row(network) for _, network in sorted(state.networks.items())]

    @operation("net.show", role="viewer", args=api.NetArguments)
    async def show(self, request: Request, args: api.NetArguments) -> dict[str, Any]:
        """One network with its ports and what passed through them; counters are None where a peer did not
        answer."""
        state = self._catalog.state
        network = state.find_network(args.network)
        counters = await self._counters(state, network)
        return {**_row(network), "ports": _ports(state, network, counters)}

    async def _counters(self, state: State, network: entries.Network) -> Mapping[str, dict[str, Any]]:
        """The counters of the ports of a network, by MAC."""
        owners = {
            g.owner for g in state.guests.values() if any(i.network == network.key for i in g.interfaces)
        }
        found: dict[str, dict[str, Any]] = {}

        async def ask(peer: str) -> None:
            try:
                rows = await self._links.call(
                    peer, "net.ports", api.NetArguments(network=network.key), timeout=COUNTERS_TIMEOUT
                )
            except OperationError:
                return  # the table says that nothing is known
            found.update({row["mac"]: row for row in rows})

        async with trio.open_nursery() as nursery:
            for owner in owners:
                nursery.start_soon(ask, owner)
        return found

    @operation("net.ports", role="peer", args=api.NetArguments)
    async def local_ports(self, request: Request, args: api.NetArguments) -> list[dict[str, Any]]:
        """The counters of this peer's ports of a network."""
        network = self._catalog.state.find_network(args.network)
        rows = await self._networks.port_counters()
        return [
            {**row, "mac": row["mac"].hex(":")}
            for row in rows
            if row["network"] == network.id and row["state"] != "gone"
        ]

    @operation("net.impair", role="operator", args=api.NetImpair)
    async def impair(self, request: Request, args: api.NetImpair) -> dict[str, Any]:
        """Change what a link does to frames, in both directions or in one."""
        network = self._catalog.state.find_network(args.link)
        change = {name: value for name in WHAT if (value := getattr(args, name)) is not None}
        if not change:
            raise OperationError(
                "bad-argument",
                f"nothing to change about {network.key} was named",
                f"name one of {', '.join(WHAT)}",
            )
        chosen = _endpoints(network, args.endpoint)
        now = [impairment(network, *member) for member in network.members]
        wanted = tuple(
            what.model_copy(update=change) if member in chosen else what
            for member, what in zip(network.members, now, strict=True)
        )
        entry = entries.SetImpairments(network=network.key, impairments=wanted)
        await self._catalog.propose(entry, request=step(request))
        return _row(self._catalog.state.networks.get(network.key, network))


def _endpoint(member: entries.Endpoint) -> str:
    """`GUEST:ethN`, without the lab."""
    return f"{member[0].partition('/')[2]}:{member[1]}"


def _endpoints(network: entries.Network, wanted: str | None) -> set[entries.Endpoint]:
    if wanted is None:
        return set(network.members)
    chosen = {m for m in network.members if wanted in (_endpoint(m), f"{m[0]}:{m[1]}")}
    if not chosen:
        known = ", ".join(_endpoint(member) for member in network.members)
        raise OperationError("not-found", f"{network.key} has no endpoint {wanted!r}", f"it has: {known}")
    return chosen


def _row(network: entries.Network) -> dict[str, Any]:
    each = [impairment(network, *member) for member in network.members]
    largest: Callable[[str], Any] = lambda name: max((getattr(what, name) for what in each), default=0)  # noqa: E731
    return {
        "network": network.key,
        "id": network.id,
        "kind": network.kind,
        "lab": network.lab,
        "subnet": network.subnet,
        "mtu": network.mtu,
        "members": [_endpoint(member) for member in network.members],
        **{name: largest(name) or None for name in WHAT},
    }


def _ports(
    state: State, network: entries.Network, counters: Mapping[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    rows = []
    for guest in state.guests.values():
        for interface in guest.interfaces:
            if interface.network != network.key:
                continue
            what = impairment(network, guest.key, interface.name)
            seen = counters.get(interface.mac.lower())
            rows.append(
                {
                    "endpoint": f"{guest.name}:{interface.name}",
                    "peer": state.peer_name(guest.owner),
                    "mac": interface.mac,
                    "addresses": list(interface.addresses),
                    "epoch": guest.epoch,
                    **{name: getattr(what, name) or None for name in WHAT},
                    "counters": seen
                    and {k: v for k, v in seen.items() if k not in ("mac", "network", "port")},
                }
            )
    return sorted(rows, key=lambda row: str(row["endpoint"]))
