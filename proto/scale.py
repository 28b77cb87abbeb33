# SPDX-License-Identifier: Apache-2.0
"""Nodes that stand for many guests: `scale: 3` for the node `web` makes the guests web-1, web-2 and web-3.

The file names the node once; everything that is decided and carried out knows guests only. So a lab is
written down as its file has it, and `scaled` gives the lab of single guests that it stands for. On a network
the node's name means all of its guests; a link joins two, so there one of them must be named (`web-2:eth1`).
A smaller scale takes the guests with the highest numbers away, so the others keep name, address and disk.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from proto.lab import NODES, Lab, Network, Node
from proto.labfields import NAME, Member, Place, parse_place
from proto.problems import Path, Problem


@dataclass(frozen=True, slots=True)
class Scaled:
    """A lab of single guests, and where its parts come from in the file."""

    lab: Lab
    nodes: Mapping[str, str]
    """Guest → the node that stands for it, of scaled nodes."""
    members: Mapping[str, tuple[int, ...]]
    """Network → for each member its index in the file."""

    def in_file(self, problem: Problem) -> Problem:
        """A problem of the scaled lab with the path that its file has."""
        return Problem(self._path(problem.path), problem.message, problem.at_key)

    def _path(self, path: Path) -> Path:
        match path:
            case ("topology", "nodes", str(name), *rest):
                return ("topology", "nodes", self.nodes.get(name, name), *rest)
            case ("topology", "networks", str(name), "members", int(index), *rest):
                return ("topology", "networks", name, "members", self.members[name][index], *rest)
        return path


def names(node: str, scale: int) -> list[str]:
    """The guests for which a scaled node stands."""
    return [f"{node}-{number}" for number in range(1, scale + 1)]


def scaled(lab: Lab) -> Scaled:
    """The lab of single guests; right only for a lab without `scale_problems`."""
    topology = lab.topology
    nodes: dict[str, Node] = {}
    origin: dict[str, str] = {}
    for name, node in topology.nodes.items():
        if node.scale is None:
            nodes[name] = node
            continue
        for guest in names(name, node.scale):
            nodes[guest] = node.model_copy(update={"scale": None})
            origin[guest] = name
    networks: dict[str, Network] = {}
    members: dict[str, tuple[int, ...]] = {}
    for name, network in topology.networks.items():
        found = list(_members(topology.nodes, network))
        members[name] = tuple(index for index, _ in found)
        networks[name] = network.model_copy(update={"members": [member for _, member in found]})
    whole = topology.model_copy(update={"nodes": nodes, "networks": networks})
    return Scaled(lab.model_copy(update={"topology": whole}), origin, members)


def _members(nodes: Mapping[str, Node], network: Network) -> Iterator[tuple[int, Member]]:
    for index, member in enumerate(network.members):
        node = nodes.get(member.node)
        if node is None or node.scale is None:
            yield index, member
            continue
        for guest in names(member.node, node.scale):
            yield index, Member(guest, member.interface)


def place_in_model(model: Mapping[str, Any], guest: str) -> Place | None:
    """Where a lab as the catalog keeps it (`dump_lab`) wants a guest; None if it does not say."""
    try:
        topology = model["topology"]
        nodes = topology["nodes"]
        node = nodes.get(guest) or nodes.get(guest.rpartition("-")[0]) or {}
        place = node.get("place") or topology.get("defaults", {}).get("place")
        return None if place is None else parse_place(place)
    except (KeyError, TypeError, AttributeError, ValueError):
        return None


def scale_problems(lab: Lab) -> Iterator[Problem]:
    """What is wrong with the scales of a lab and with what refers to scaled nodes."""
    nodes = lab.topology.nodes
    for name, node in nodes.items():
        if node.scale is None:
            continue
        path = ("topology", "nodes", name, "scale")
        last = f"{name}-{node.scale}"
        if re.fullmatch(NAME, last) is None:
            yield Problem(path, f"{last!r} would be longer than the 32 letters of a guest's name")
        for guest in names(name, node.scale):
            if guest in nodes:
                yield Problem(path, f"{name!r} stands for {guest!r} too, which is a node of its own")
    count = sum(node.scale or 1 for node in nodes.values())
    if count > NODES:
        yield Problem(("topology", "nodes"), f"{count} guests; a lab can have {NODES}")
    for index, link in enumerate(lab.topology.links):
        for end, endpoint in enumerate(link.endpoints):
            scale = nodes[endpoint.node].scale if endpoint.node in nodes else None
            if scale is not None:
                text = (
                    f"{endpoint.node!r} has the scale {scale}, and a link joins two guests; name one of them,"
                    f" as {endpoint.node}-1:{endpoint.interface}, or put {endpoint.node} on a network"
                )
                yield Problem(("topology", "links", index, "endpoints", end), text)
