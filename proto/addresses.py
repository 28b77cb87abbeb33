# SPDX-License-Identifier: Apache-2.0
"""What follows from a lab without a choice: networks, ports, MAC and IP addresses, who knows whom.

Everything here is a pure function of the lab, so that every peer, today and after a restart, comes to the
same result, and adding a guest does not change the addresses of the others. A MAC is a hash of lab, guest
and interface, with the locally administered bit set; should two collide, the later one (in the file's
order) is hashed again. IP addresses are handed out from the subnet's first, in the order of the endpoints
or members.

The 24-bit ids of networks are not here: they must be unique over all labs, so the catalog chooses them.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Collection, Iterator
from dataclasses import dataclass

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


def segments(lab: Lab, taken: Collection[str] = ()) -> list[Segment]:
    """All networks of a lab: links in the file's order, then networks. `taken` are MACs of other labs."""
    used = set(taken)
    free = _interfaces(lab)

    def ports(name: str, subnet: Subnet | None, ends: list[tuple[str, str]]) -> tuple[Port, ...]:
        addresses = subnet_addresses(subnet) if subnet is not None else None
        made = []
        for node, interface in ends:
            mac = mac_address(lab.name, node, interface, used)
            used.add(mac)
            made.append(Port(node, interface, name, mac, next(addresses) if addresses else None))
        return tuple(made)

    found = []
    for index, link in enumerate(lab.topology.links):
        name = link_name(lab, index)
        ends = [(e.node, e.interface) for e in link.endpoints]
        found.append(Segment(name, "link", link.subnet, ports(name, link.subnet, ends), _quality(link)))
    for name, network in lab.topology.networks.items():
        ends = [(m.node, m.interface or next(free[m.node])) for m in network.members]
        found.append(
            Segment(name, "network", network.subnet, ports(name, network.subnet, ends), _quality(network))
        )
    return found


def _quality(part: Impairment) -> Quality:
    return Quality(part.delay or 0.0, part.jitter or 0.0, part.loss or 0.0, part.rate or 0)


def _interfaces(lab: Lab) -> dict[str, Iterator[str]]:
    """For every guest the names ethN that the file does not use, in order."""
    used: dict[str, set[str]] = {node: set() for node in lab.topology.nodes}
    for link in lab.topology.links:
        for endpoint in link.endpoints:
            used[endpoint.node].add(endpoint.interface)
    for network in lab.topology.networks.values():
        for member in network.members:
            if member.interface is not None:
                used[member.node].add(member.interface)

    def unused(names: set[str]) -> Iterator[str]:
        return (f"eth{n}" for n in range(1, 1 << 16) if f"eth{n}" not in names)

    return {node: unused(names) for node, names in used.items()}
