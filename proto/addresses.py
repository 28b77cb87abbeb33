# SPDX-License-Identifier: Apache-2.0
"""What follows from a lab without a choice: networks, ports, MAC and IP addresses, who knows whom.

Everything here is a pure function of the lab, so that every peer, today and after a restart, comes to the
same result, and adding a guest does not change the addresses of the others. A MAC is a hash of lab, guest
and interface, with the locally administered bit set; should two collide, the later one (in the file's
order) is hashed again. IP addresses are handed out from the subnet's first, in the order of the endpoints
or members. What a running lab has already (`Kept`) stays as it is when its file changes, as far as it fits;
what is new gets what is free.

The 24-bit ids of networks are not here: they must be unique over all labs, so the catalog chooses them.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from proto.lab import Impairment, Lab
from proto.labcheck import link_name
from proto.labfields import Subnet


@dataclass(frozen=True, slots=True)
class Port:
    """A guest's interface on a network. `address` is `10.9.1.1/24`, or None without a subnet."""

    guest: str
    interface: str
    network: str
    mac: str
    address: str | None


@dataclass(frozen=True, slots=True)
class Kept:
    """What an interface has in the running lab; `address` as in `Port`."""

    network: str
    mac: str
    address: str | None


End = tuple[str, str]
"""A guest and its interface."""

NOTHING_KEPT: Mapping[End, Kept] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Quality:
    """What a network does to frames: seconds, a loss of 0 to 1, a rate in bytes/s (0: no limit)."""

    delay: float = 0.0
    jitter: float = 0.0
    loss: float = 0.0
    rate: int = 0


@dataclass(frozen=True, slots=True)
class Segment:
    """A `link` (two ports) or `network` with its ports; the quality is per direction."""

    name: str
    kind: str
    subnet: Subnet | None
    ports: tuple[Port, ...]
    quality: Quality


def mac_address(lab: str, guest: str, interface: str, taken: Collection[str] = ()) -> str:
    """A locally administered unicast MAC that depends only on the three names, and is not in `taken`."""
    for attempt in range(1 << 16):
        text = "\0".join(("mobitopolo mac", lab, guest, interface, str(attempt)))
        raw = bytearray(hashlib.sha256(text.encode()).digest()[:6])
        raw[0] = (raw[0] | 0x02) & 0xFE
        mac = raw.hex(":")
        if mac not in taken:
            return mac
    raise ValueError("no MAC address is left for this guest")


def subnet_addresses(subnet: Subnet) -> Iterator[str]:
    """The addresses for guests with their length, `10.9.1.1/24` first."""
    if subnet.prefixlen >= subnet.max_prefixlen - 1:
        first, count = 0, subnet.num_addresses
    else:
        v4 = isinstance(subnet, ipaddress.IPv4Network)
        first, count = 1, subnet.num_addresses - (2 if v4 else 1)
    for offset in range(first, first + count):
        yield f"{subnet[offset]}/{subnet.prefixlen}"


def segments(lab: Lab, taken: Collection[str] = (), kept: Mapping[End, Kept] = NOTHING_KEPT) -> list[Segment]:
    """All networks of a lab: links in the file's order, then networks.

    `taken` are MACs of other labs, `kept` is what this one has already.
    """
    used = set(taken).union(one.mac for one in kept.values())

    def ports(name: str, subnet: Subnet | None, ends: list[End]) -> tuple[Port, ...]:
        held = _held(name, subnet, ends, kept)
        free = _free(subnet, set(held.values()))
        made = []
        for end in ends:
            mac = kept[end].mac if end in kept else mac_address(lab.name, *end, used)
            used.add(mac)
            address = held[end] if end in held else next(free) if free is not None else None
            made.append(Port(*end, name, mac, address))
        return tuple(made)

    found = []
    for index, link in enumerate(lab.topology.links):
        name = link_name(lab, index)
        ends = [(e.node, e.interface) for e in link.endpoints]
        found.append(Segment(name, "link", link.subnet, ports(name, link.subnet, ends), _quality(link)))
    chosen = _chosen_interfaces(lab, kept)
    for name, network in lab.topology.networks.items():
        ends = [(m.node, m.interface or chosen[m.node, name]) for m in network.members]
        found.append(
            Segment(name, "network", network.subnet, ports(name, network.subnet, ends), _quality(network))
        )
    return found


def _held(network: str, subnet: Subnet | None, ends: list[End], kept: Mapping[End, Kept]) -> dict[End, str]:
    """The addresses that fit the subnet and stay; those of the same network come first."""
    held: dict[End, str] = {}
    if subnet is None:
        return held
    known = [(end, kept[end]) for end in ends if end in kept]
    for end, one in sorted(known, key=lambda item: item[1].network != network):
        if one.address is None or one.address in held.values():
            continue
        place = ipaddress.ip_interface(one.address)
        if place.network == subnet:
            held[end] = one.address
    return held


def _free(subnet: Subnet | None, held: Collection[str]) -> Iterator[str] | None:
    if subnet is None:
        return None
    return (address for address in subnet_addresses(subnet) if address not in held)


def _quality(part: Impairment) -> Quality:
    return Quality(part.delay or 0.0, part.jitter or 0.0, part.loss or 0.0, part.rate or 0)


def _chosen_interfaces(lab: Lab, kept: Mapping[End, Kept]) -> dict[tuple[str, str], str]:
    """(guest, network) → the interface, where the file names none: what the guest has there, else its first
    ethN that is not used."""
    used: dict[str, set[str]] = {node: set() for node in lab.topology.nodes}
    for link in lab.topology.links:
        for endpoint in link.endpoints:
            used[endpoint.node].add(endpoint.interface)
    unnamed: list[tuple[str, str]] = []
    for name, network in lab.topology.networks.items():
        for member in network.members:
            if member.interface is not None:
                used[member.node].add(member.interface)
            else:
                unnamed.append((member.node, name))
    chosen: dict[tuple[str, str], str] = {}
    wanted = set(unnamed)
    for (node, interface), one in kept.items():
        if (node, one.network) in wanted and interface not in used[node]:
            chosen.setdefault((node, one.network), interface)
            used[node].add(interface)
    for node, name in unnamed:
        if (node, name) not in chosen:
            free = next(f"eth{n}" for n in range(1, 1 << 16) if f"eth{n}" not in used[node])
            chosen[node, name] = free
            used[node].add(free)
    return chosen
