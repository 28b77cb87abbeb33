# SPDX-License-Identifier: Apache-2.0
"""What a lab becomes: its entries in the catalog, and what each guest is told about itself.

A lab file names guests and links. Deploying it turns the file, the chosen places and the hashes of the images
into *one* batch of catalog entries that becomes true as a whole or not at all; taking it down is the batch
that removes them. From then on everything a guest needs to know (its addresses, its neighbours' names)
follows from the catalog, so any peer can tell it again at any time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from proto import addresses, entries
from proto.lab import DEFAULT_LAB, Guest, Lab, dump_lab, guests
from proto.scale import scaled
from proto.state import State


@dataclass(frozen=True, slots=True)
class Choices:
    """What a lab file leaves open. Keys are guests' names; `images` are by the file's image reference."""

    owners: Mapping[str, str]
    """Guest → id of the peer that shall run it."""
    images: Mapping[str, tuple[str, str]]
    """Image as in the file → (name, SHA-256 of its root)."""
    ids: Mapping[str, str]
    """Guest → an id that was never used before."""


def lab_entries(lab: Lab, source: str, choices: Choices, taken_macs: frozenset[str]) -> entries.Batch:
    """All that makes this lab wanted, as one entry. `taken_macs` are those of other labs."""
    parts: list[entries.AnyEntry] = [
        entries.PutLab(lab=entries.Lab(name=lab.name, model=dump_lab(lab), source=source))
    ]
    lab = scaled(lab).lab
    segments = addresses.segments(lab, taken_macs)
    interfaces = interfaces_of(lab, segments)
    parts += [entries.PutNetwork(network=network) for network in networks_of(lab, segments)]
    for guest in guests(lab):
        made = guest_of(
            lab.name,
            guest,
            interfaces[guest.name],
            image=choices.images[guest.image],
            id=choices.ids[guest.name],
            owner=choices.owners[guest.name],
        )
        parts.append(entries.AddGuest(guest=made))
    return entries.Batch(entries=tuple(parts))


def networks_of(lab: Lab, segments: Sequence[addresses.Segment]) -> list[entries.Network]:
    """The networks of a lab for the catalog, their ids still open."""
    mtu = {guest.name: guest.mtu for guest in guests(lab)}
    return [_network(lab.name, segment, mtu) for segment in segments]


def interfaces_of(
    lab: Lab, segments: Sequence[addresses.Segment]
) -> dict[str, tuple[entries.Interface, ...]]:
    """Guest → its interfaces, eth1 before eth10."""
    everyone = guests(lab)
    ports: dict[str, list[addresses.Port]] = {guest.name: [] for guest in everyone}
    for segment in segments:
        for port in segment.ports:
            ports[port.guest].append(port)
    return {
        guest.name: tuple(
            _interface(lab.name, port, guest.mtu)
            for port in sorted(ports[guest.name], key=lambda port: (len(port.interface), port.interface))
        )
        for guest in everyone
    }


def guest_of(
    lab: str,
    guest: Guest,
    interfaces: tuple[entries.Interface, ...],
    *,
    image: tuple[str, str],
    id: str,
    owner: str,
) -> entries.Guest:
    """A new guest for the catalog; `image` is its name and the SHA-256 of its root."""
    return entries.Guest(
        key=f"{lab}/{guest.name}",
        id=id,
        image=image[0],
        image_hash=image[1],
        memory=guest.memory,
        disk=guest.disk or 0,
        cpus=guest.cpus,
        interfaces=interfaces,
        exec=guest.exec,
        env=dict(guest.env),
        owner=owner,
        on_partition=cast(Literal["run", "freeze"], guest.on_partition),
        restart_policy=cast(entries.RestartPolicy, guest.restart_policy),
    )


def removal_entries(state: State, lab: str) -> entries.Batch:
    """All that makes a lab and everything in it gone, as one entry; nothing of it need be there."""
    parts: list[entries.AnyEntry] = [
        entries.RemoveGuest(guest=guest.key) for guest in state.guests.values() if guest.lab == lab
    ]
    parts += [
        entries.RemoveNetwork(network=network.key)
        for network in state.networks.values()
        if network.lab == lab
    ]
    if lab in state.labs:
        parts.append(entries.RemoveLab(lab=lab))
    return entries.Batch(entries=tuple(parts))


def taken_macs(state: State, but: str = "") -> frozenset[str]:
    """Every MAC address of the mesh, but for those of one lab."""
    others = (guest for guest in state.guests.values() if guest.lab != but)
    return frozenset(interface.mac for guest in others for interface in guest.interfaces)


def settings(guest: entries.Guest, state: State) -> dict[str, Any]:
    """What the agent's `configure` needs: `{hostname, interfaces, hosts, env}` (`kernel/README.md` §9)."""
    return {
        "hostname": guest.name,
        "interfaces": [
            {"mac": i.mac, "name": i.name, "addresses": list(i.addresses), "mtu": i.mtu}
            for i in guest.interfaces
        ],
        "hosts": _hosts(guest, state),
        "env": dict(guest.env),
    }


def settings_while_running(guest: entries.Guest, state: State) -> dict[str, Any]:
    """What of `settings` is told to a guest that runs when it changes: its interfaces stay as they are."""
    told = settings(guest, state)
    return {name: told[name] for name in ("hostname", "hosts", "env")}


def same_neighbours(one: entries.Guest | None, other: entries.Guest | None) -> bool:
    """Whether the lab's other guests are told the same of both."""
    return one is not None and other is not None and one.interfaces == other.interfaces


def _hosts(guest: entries.Guest, state: State) -> dict[str, list[str]]:
    """Every guest of the lab by name → its addresses, those on a network shared with `guest` first."""
    if guest.lab == DEFAULT_LAB:
        return {}
    mine = {interface.network for interface in guest.interfaces}
    found: dict[str, list[str]] = {}
    for other in sorted(state.guests.values(), key=lambda other: other.key):
        if other.lab != guest.lab:
            continue
        for interface in sorted(other.interfaces, key=lambda i: i.network not in mine):
            plain = [address.partition("/")[0] for address in interface.addresses]
            if plain:
                found.setdefault(other.name, []).extend(plain)
    return found


def row(guest: entries.Guest, state: State, now: float, owner_state: str = "alive") -> dict[str, Any]:
    """A guest as in `vm ls`. `now` is the time of day, as the catalog's; `owner_state` is how its owner looks
    from the peer that was asked (alive, suspect, dead): of a silent one the state is only the last known.
    """
    alive = guest.state in ("running", "paused", "migrating", "frozen")
    return {
        "vm": guest.name,
        "lab": guest.lab,
        "peer": state.peer_name(guest.owner),
        "epoch": guest.epoch,
        "state": guest.state,
        "memory": guest.memory,
        "addresses": [address for interface in guest.interfaces for address in interface.addresses],
        "networks": [interface.network.partition(":")[2] for interface in guest.interfaces],
        "cpu_features": list(guest.cpu_features),
        "uptime": max(0.0, now - guest.started) if alive and guest.started else None,
        "owner_state": owner_state,
    }


def details(guest: entries.Guest, state: State, now: float, owner_state: str = "alive") -> dict[str, Any]:
    """A guest as in `vm show`: the row and everything else a person may ask."""
    return {
        **row(guest, state, now, owner_state),
        "id": guest.id,
        "image": f"{guest.image}@{guest.image_hash[:16]}" if guest.image_hash else guest.image,
        "disk": guest.disk,
        "cpus": guest.cpus,
        "wanted": guest.wanted,
        "exit_reason": guest.exit_reason or None,
        "message": guest.message or None,
        "restarts": guest.restarts,
        "restart_policy": guest.restart_policy,
        "on_partition": guest.on_partition,
        "interfaces": [
            {
                "name": i.name,
                "mac": i.mac,
                "network": i.network.partition(":")[2],
                "addresses": list(i.addresses),
                "mtu": i.mtu,
            }
            for i in guest.interfaces
        ],
        "exec": list(guest.exec),
        "created": guest.created,
        "started": guest.started or None,
    }


def graph(lab: str, state: State) -> dict[str, Any]:
    """A lab as nodes and edges, for pictures: `{lab, nodes: […], networks: […]}`."""
    return {
        "lab": lab,
        "nodes": [
            {"name": g.name, "peer": state.peer_name(g.owner), "state": g.state, "image": g.image}
            for g in state.guests.values()
            if g.lab == lab
        ],
        "networks": [
            {
                "name": n.key.partition(":")[2],
                "kind": n.kind,
                "subnet": n.subnet or None,
                "members": [f"{key.partition('/')[2]}:{interface}" for key, interface in n.members],
            }
            for n in state.networks.values()
            if n.lab == lab
        ],
    }


def _network(lab: str, segment: addresses.Segment, mtu: Mapping[str, int]) -> entries.Network:
    quality = segment.quality
    impairment = entries.Impairment(
        delay=quality.delay, jitter=quality.jitter, loss=quality.loss, rate=quality.rate
    )
    plain = impairment == entries.Impairment()
    return entries.Network(
        key=f"{lab}:{segment.name}",
        lab=lab,
        kind="link" if segment.kind == "link" else "network",
        members=tuple((f"{lab}/{port.guest}", port.interface) for port in segment.ports),
        impairments=() if plain else (impairment,) * len(segment.ports),
        subnet=str(segment.subnet) if segment.subnet is not None else "",
        mtu=min(mtu[port.guest] for port in segment.ports),
    )


def _interface(lab: str, port: addresses.Port, mtu: int) -> entries.Interface:
    return entries.Interface(
        name=port.interface,
        mac=port.mac,
        network=f"{lab}:{port.network}",
        addresses=(port.address,) if port.address else (),
        mtu=mtu,
    )
