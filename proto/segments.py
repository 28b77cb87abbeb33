# SPDX-License-Identifier: Apache-2.0
"""What one peer's switch has to know of the networks, computed from the catalog.

A network's frames go between the peers that have a guest on it, so a switch only cares for the networks of
the guests that are here or on their way here or away: its *segments*. For each it needs the other peers, and
where every address is: the guest's owner with the owner's epoch, and, while a handover is open, the peer that
may take it over. All of it follows from the catalog's state; nothing is decided here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from proto.entries import Guest, Impairment, Migration, Network
from proto.state import State


@dataclass(frozen=True, slots=True)
class Place:
    """Where the MAC address of a guest (its id) is: at `peer` (id) by right of `epoch`. With `next_epoch` > 0
    a handover to `next_peer` is open. `failover`: it did not come there by a handover, so nothing of its old
    place is to be believed."""

    guest: str
    peer: str
    epoch: int
    failover: bool = False
    next_peer: str = ""
    next_epoch: int = 0


@dataclass(frozen=True, slots=True)
class Segment:
    """One network as one switch sees it. `peers` are the ids of the others that have guests on it."""

    id: int
    key: str
    peers: frozenset[str]
    places: Mapping[bytes, Place] = field(default_factory=dict)


def mac_bytes(text: str) -> bytes:
    """`02:00:…` as six bytes."""
    return bytes.fromhex(text.replace(":", ""))


def segments(state: State, own: str) -> dict[int, Segment]:
    """The segments of peer `own`, by network id."""
    open_migrations = {m.guest: m for m in state.migrations.values() if m.state == "open"}
    arrived = {(m.guest, m.epoch + 1) for m in state.migrations.values() if m.state == "done"}
    places: dict[str, dict[bytes, Place]] = {}
    involved: dict[str, set[str]] = {}
    for guest in state.guests.values():
        migration = open_migrations.get(guest.key)
        for interface in guest.interfaces:
            peers = involved.setdefault(interface.network, set())
            peers.add(guest.owner)
            if migration:
                peers |= {migration.source, migration.destination}
            place = _place(guest, migration, (guest.key, guest.epoch) not in arrived)
            places.setdefault(interface.network, {})[mac_bytes(interface.mac)] = place
    return {
        network.id: Segment(network.id, key, frozenset(involved[key] - {own}), places[key])
        for key, network in state.networks.items()
        if own in involved.get(key, ())
    }


def concerned(state: State, guest: str) -> frozenset[str]:
    """The peers whose switches carry frames of this guest (LAB/NAME), its own and its next one included."""
    found = state.guests.get(guest)
    if found is None:
        return frozenset()
    networks = {interface.network for interface in found.interfaces}
    near = [s.peers for s in segments(state, found.owner).values() if s.key in networks]
    return frozenset({found.owner}.union(*near)) if near else frozenset()


def _place(guest: Guest, migration: Migration | None, failover: bool) -> Place:
    if migration is None:
        return Place(guest.id, guest.owner, guest.epoch, failover)
    return Place(guest.id, guest.owner, guest.epoch, failover, migration.destination, migration.epoch + 1)


def impairment(network: Network, guest: str, interface: str) -> Impairment:
    """What the link does to frames that this interface sends."""
    if (guest, interface) in network.members and network.impairments:
        return network.impairments[network.members.index((guest, interface))]
    return Impairment()
