# SPDX-License-Identifier: Apache-2.0
"""The way into a `Lab`: shapes, then references. Does every name that is used exist, is nothing used twice?

`parse_lab` takes what a YAML or JSON reader produced and gives a `Lab` that is right in itself, or a
`LabError` with *every* problem found; each carries the path to the offending value, so that whoever has
the text can say line and column. Each check looks at one kind of mistake, and names the nearest valid
name where a name is wrong.
"""

from __future__ import annotations

import ipaddress
import json
from collections import Counter
from collections.abc import Iterator, Mapping

from pydantic import ValidationError

from proto.lab import DEFAULT_LAB, INTERFACES, LATER, Impairment, Lab, dump_lab, guest
from proto.labfields import Subnet
from proto.problems import Path, Problem, from_pydantic, suggestion
from proto.scale import scale_problems, scaled
from proto.units import format_rate, shown

RESERVED = frozenset({"localhost"})


class LabError(ValueError):
    """A lab that cannot be accepted; `problems` has all that is wrong with it."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("; ".join(f"{p.where}: {p.message}" for p in problems[:5]))
        self.problems = problems


def parse_lab(data: object) -> Lab:
    """What a YAML or JSON reader made of a lab file → a Lab that is right in itself.

    Raises LabError with all problems: shapes first; references only when the shapes are right.
    """
    if not isinstance(data, Mapping):
        text = f"a lab file is a map with the keys name and topology, not {shown(data)}"
        raise LabError([Problem((), text)])
    try:
        lab = Lab.model_validate(data, by_alias=True, by_name=False)
    except ValidationError as error:
        raise LabError(from_pydantic(error, Lab, later=LATER)) from None
    problems = check(lab)
    if problems:
        raise LabError(problems)
    return lab


def read_lab(text: str) -> Lab:
    """A lab as JSON text, as it travels in `lab.up` and lives in the catalog. Raises LabError."""
    try:
        data = json.loads(text)
        # JSON can say half of a surrogate pair ("\ud800"), which is no text: nobody could be told of it.
        json.dumps(data, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise LabError([Problem((), f"not a lab as JSON text: {error}")]) from None
    return parse_lab(data)


def write_lab(lab: Lab) -> str:
    """The JSON text that `read_lab` reads back to an equal Lab."""
    return json.dumps(dump_lab(lab), ensure_ascii=False, separators=(",", ":"))


def check(lab: Lab) -> list[Problem]:
    """All problems of references in a lab, in the order of the checks; its scales first."""
    problems = list(scale_problems(lab))
    if problems:
        return problems
    whole = scaled(lab)
    checks = (_names, _images, _endpoints, _network_names, _counts, _subnets, _impairments)
    found: dict[object, Problem] = {}
    for one in checks:
        for problem in one(whole.lab):
            told = whole.in_file(problem)
            # What is wrong with a scaled node is wrong with each of its guests, and said of the first.
            found.setdefault((told.path, problem.message if told.path == problem.path else one), told)
    return list(found.values())


def _names(lab: Lab) -> Iterator[Problem]:
    if lab.name == DEFAULT_LAB:
        yield Problem(("name",), f"{lab.name!r} is the lab of guests made by vm run; choose another name")
    for name in lab.topology.nodes:
        if name in RESERVED:
            yield Problem(
                ("topology", "nodes", name), f"{name!r} already means the guest itself", at_key=True
            )


def _images(lab: Lab) -> Iterator[Problem]:
    for name in lab.topology.nodes:
        if not guest(lab, name).image:
            yield Problem(
                ("topology", "nodes", name), f"the guest {name!r} has no image, nor is there a default one"
            )


def attachments(lab: Lab) -> Iterator[tuple[Path, str, str | None]]:
    """Every (path, node, interface) that the lab wires; interface None = to be chosen."""
    for index, link in enumerate(lab.topology.links):
        for end, endpoint in enumerate(link.endpoints):
            yield ("topology", "links", index, "endpoints", end), endpoint.node, endpoint.interface
    for name, network in lab.topology.networks.items():
        for index, member in enumerate(network.members):
            yield ("topology", "networks", name, "members", index), member.node, member.interface


def _endpoints(lab: Lab) -> Iterator[Problem]:
    seen: dict[tuple[str, str], Path] = {}
    for path, node, interface in attachments(lab):
        if node not in lab.topology.nodes:
            hint = suggestion(node, list(lab.topology.nodes), "the nodes")
            yield Problem(path, f"there is no node {node!r}{hint}")
        if interface is None:
            continue
        first = seen.setdefault((node, interface), path)
        if first != path:
            where = Problem(first, "").where.removeprefix("topology.")
            yield Problem(path, f"the endpoint '{node}:{interface}' is used twice, first in {where}")
    for name, network in lab.topology.networks.items():
        counted = Counter(member.node for member in network.members)
        for index, member in enumerate(network.members):
            if counted[member.node] > 1 and member.node in [m.node for m in network.members[:index]]:
                path = ("topology", "networks", name, "members", index)
                yield Problem(path, f"{member.node!r} is a member of the network {name!r} twice")
    for index, link in enumerate(lab.topology.links):
        if len({endpoint.node for endpoint in link.endpoints}) == 1:
            path = ("topology", "links", index, "endpoints")
            yield Problem(path, f"both ends of the link are at {link.endpoints[0].node!r}")


def link_name(lab: Lab, index: int) -> str:
    """A link's own name, or `a-eth1--b-eth1`."""
    link = lab.topology.links[index]
    return link.name or "--".join(f"{e.node}-{e.interface}" for e in link.endpoints)


def _network_names(lab: Lab) -> Iterator[Problem]:
    seen: set[str] = set(lab.topology.networks)
    for index, link in enumerate(lab.topology.links):
        name = link_name(lab, index)
        if name in seen:
            path: Path = ("topology", "links", index)
            yield Problem((*path, "name") if link.name else path, f"the network name {name!r} is taken twice")
        seen.add(name)


def _counts(lab: Lab) -> Iterator[Problem]:
    counted = Counter(node for _, node, _ in attachments(lab))
    for node, count in counted.items():
        if count > INTERFACES and node in lab.topology.nodes:
            text = f"{node!r} has {count} interfaces; a guest can have {INTERFACES}"
            yield Problem(("topology", "nodes", node), text, at_key=True)


def subnets(lab: Lab) -> Iterator[tuple[Path, Subnet, int]]:
    """Every (path, subnet, number of addresses wanted in it)."""
    for index, link in enumerate(lab.topology.links):
        if link.subnet is not None:
            yield ("topology", "links", index, "subnet"), link.subnet, 2
    for name, network in lab.topology.networks.items():
        if network.subnet is not None:
            yield ("topology", "networks", name, "subnet"), network.subnet, len(network.members)


def capacity(subnet: Subnet) -> int:
    """How many guests a subnet has addresses for (RFC 3021: both addresses of a /31 count)."""
    if subnet.prefixlen >= subnet.max_prefixlen - 1:
        return subnet.num_addresses
    return subnet.num_addresses - (2 if isinstance(subnet, ipaddress.IPv4Network) else 1)


def _subnets(lab: Lab) -> Iterator[Problem]:
    seen: list[tuple[Path, Subnet]] = []
    for path, subnet, wanted in subnets(lab):
        if wanted > capacity(subnet):
            text = (
                f"{subnet} is exhausted: it has {capacity(subnet)} addresses for guests, {wanted} are wanted"
            )
            yield Problem(path, text)
        for other_path, other in seen:
            if subnet.version == other.version and subnet.overlaps(other):
                where = Problem(other_path[:-1], "").where.removeprefix("topology.")
                yield Problem(path, f"{subnet} overlaps with {other} of {where}")
                break
        seen.append((path, subnet))


def _impairments(lab: Lab) -> Iterator[Problem]:
    parts: list[tuple[Path, Impairment]] = [
        (("topology", "links", i), link) for i, link in enumerate(lab.topology.links)
    ]
    parts += [(("topology", "networks", name), network) for name, network in lab.topology.networks.items()]
    for path, part in parts:
        if part.delay is not None and part.delay > 60:
            yield Problem((*path, "delay"), "a delay of more than a minute is not a link's")
        if part.jitter is not None and part.jitter > (part.delay or 0):
            yield Problem(
                (*path, "jitter"), "jitter cannot be more than the delay (a frame cannot arrive early)"
            )
        if part.rate is not None and part.rate < 1000:
            text = f"a rate of {format_rate(part.rate)} would not carry one frame per second; at least 8kbit"
            yield Problem((*path, "rate"), text)
