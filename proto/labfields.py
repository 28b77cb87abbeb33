# SPDX-License-Identifier: Apache-2.0
"""The small parts of a lab file: names, endpoints, subnets, places, bounded sizes.

Each is a parser from what a YAML or JSON reader gives to a value that cannot be wrong, with a ValueError
that says in words what was expected; and the pydantic field made of it, with its JSON Schema. Names are
kept narrow (no path, no markup, no capital letters), since they become host names, file names and parts
of other names.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, cast

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    StringConstraints,
    WithJsonSchema,
)

from proto.units import Size, format_size, shown

MEMORY: Final = (16 << 20, 1 << 40)
DISK: Final = (1 << 20, 1 << 44)
MTU: Final = (576, 9000)
PAGE: Final = 4096
NAME: Final = r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?"
NETWORK_NAME: Final = r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?"
INTERFACE: Final = r"[a-z][a-z0-9._-]{0,14}"
IMAGE: Final = r"[a-z0-9][a-z0-9._-]{0,63}(?:@[0-9a-f]{8,64})?"
ENV_NAME: Final = r"[A-Za-z_][A-Za-z0-9_]{0,63}"
PEER_NAME: Final = r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,62}"


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected {what}, not {shown(value)}")
    return value


def _name_of(pattern: str, what: str, rule: str) -> Any:
    """A field for names: anything but `pattern` is refused, with the rule in words."""
    compiled = re.compile(pattern)

    def check(value: object) -> str:
        text = _text(value, what)
        if compiled.fullmatch(text) is None:
            raise ValueError(f"{shown(text)} is not {what}: {rule}")
        return text

    return PlainValidator(check), WithJsonSchema(
        {"type": "string", "pattern": f"^{pattern}$", "description": rule}
    )


_HOST_RULE = "1 to 32 small letters, digits and inner hyphens"
_PEER_RULE = "letters, digits, dots, hyphens and underscores"
LabName = Annotated[str, *_name_of(NAME, "a lab's name", _HOST_RULE)]
GuestName = Annotated[str, *_name_of(NAME, "a guest's name", _HOST_RULE)]
PeerName = Annotated[str, *_name_of(PEER_NAME, "a peer's or site's name", _PEER_RULE)]
NetworkName = Annotated[
    str,
    *_name_of(
        NETWORK_NAME,
        "a network's name",
        "1 to 64 small letters, digits, and inner dots, hyphens, underscores",
    ),
]
ImageName = Annotated[
    str,
    *_name_of(
        IMAGE,
        "an image",
        "small letters, digits, dots, hyphens, and perhaps @ with a hash, as in mini or mini@0123abcd",
    ),
]
EnvName = Annotated[
    str, *_name_of(ENV_NAME, "an environment variable's name", "letters, digits and underscores")
]
EnvValue = Annotated[
    str,
    BeforeValidator(lambda v: str(v) if isinstance(v, int | float) and not isinstance(v, bool) else v),
    StringConstraints(max_length=4096, pattern=r"^[^\x00]*$"),
]
Command = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00]*$")]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One end of a link: `content:eth1` is the interface eth1 of the guest content."""

    node: str
    interface: str

    def __str__(self) -> str:
        return f"{self.node}:{self.interface}"


def parse_endpoint(value: object) -> Endpoint:
    """`content:eth1` → Endpoint. Raises ValueError in words."""
    if isinstance(value, Endpoint):
        return value
    text = _text(value, "an endpoint such as content:eth1")
    node, colon, interface = text.partition(":")
    if not colon:
        raise ValueError(f"{shown(text)} is not an endpoint; write NODE:INTERFACE, as in {text[:32]}:eth1")
    if re.fullmatch(NAME, node) is None:
        raise ValueError(f"{shown(node)} is not a guest's name: {_HOST_RULE}")
    if re.fullmatch(INTERFACE, interface) is None or interface == "lo":
        raise ValueError(
            f"{shown(interface)} is not an interface's name; write eth1, eth2 … (at most 15 characters)"
        )
    return Endpoint(node, interface)


@dataclass(frozen=True, slots=True)
class Member:
    """A guest on a network; interface None means the guest's first free ethN, from eth1 on."""

    node: str
    interface: str | None = None

    def __str__(self) -> str:
        return self.node if self.interface is None else f"{self.node}:{self.interface}"


def parse_member(value: object) -> Member:
    """`a` or `a:eth1` → Member. Raises ValueError in words."""
    if isinstance(value, Member):
        return value
    text = _text(value, "a guest's name")
    if ":" in text:
        endpoint = parse_endpoint(text)
        return Member(endpoint.node, endpoint.interface)
    if re.fullmatch(NAME, text) is None:
        raise ValueError(f"{shown(text)} is not a guest's name: {_HOST_RULE}")
    return Member(text)


Subnet = ipaddress.IPv4Network | ipaddress.IPv6Network


def parse_subnet(value: object) -> Subnet:
    """`10.9.1.0/24` → a network of the standard library. Raises ValueError in words."""
    if isinstance(value, ipaddress.IPv4Network | ipaddress.IPv6Network):
        return value
    text = _text(value, "a subnet such as 10.9.1.0/24")
    if "/" not in text:
        raise ValueError(f"{shown(text)} is not a subnet; write its length too, as in {text[:40]}/24")
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError(f"{shown(text)} is not a subnet; write for example 10.9.1.0/24") from None
    if (
        str(network.network_address) != text.partition("/")[0]
        and ipaddress.ip_interface(text).ip != network[0]
    ):
        raise ValueError(f"{shown(text)} is an address in a subnet; the subnet itself is {network}")
    if network.is_multicast or network.is_loopback or network.is_unspecified:
        raise ValueError(
            f"{shown(text)} cannot be used for guests (it is a multicast, loopback or unspecified range)"
        )
    return network


@dataclass(frozen=True, slots=True)
class Place:
    """Where a guest shall start: on one peer by name, or on any peer of a site."""

    peer: str | None = None
    site: str | None = None

    def __str__(self) -> str:
        return self.peer if self.peer is not None else f"site {self.site}"

    def fits(self, peer: str, site: str) -> bool:
        """Whether a peer of this name, at this site, is there."""
        return self.peer == peer if self.peer is not None else self.site == site


def parse_place(value: object) -> Place:
    """`tokyo` or `{site: japan}` → Place. Raises ValueError in words."""
    if isinstance(value, Place):
        return value
    if isinstance(value, Mapping):
        if list(value) != ["site"]:
            raise ValueError("expected a peer's name or {site: NAME}")
        return Place(site=_place_name(value["site"]))
    return Place(peer=_place_name(value))


def _place_name(value: object) -> str:
    text = _text(value, "a peer's name or {site: NAME}")
    if re.fullmatch(PEER_NAME, text) is None:
        raise ValueError(f"{shown(text)} is not a peer's or site's name: {_PEER_RULE}")
    return text


def _place_out(place: Place) -> str | dict[str, str]:
    return place.peer if place.peer is not None else {"site": cast(str, place.site)}


def _pages(value: int) -> int:
    if value % PAGE:
        raise ValueError(f"{value} bytes is not a whole number of pages; a size is a multiple of 4K")
    return value


def _within(low: int, high: int, what: str, write: Callable[[int], str] = str) -> AfterValidator:
    def check(value: int) -> int:
        if not low <= value <= high:
            raise ValueError(
                f"{write(value)} is outside of what {what} can be ({write(low)} to {write(high)})"
            )
        return value

    return AfterValidator(check)


def _one_cpu(value: int) -> int:
    if value != 1:
        raise ValueError("more than one CPU per guest is not supported yet")
    return value


Memory = Annotated[Size, AfterValidator(_pages), _within(*MEMORY, "the memory of a guest", format_size)]
Disk = Annotated[Size, AfterValidator(_pages), _within(*DISK, "a disk", format_size)]
Cpus = Annotated[int, Field(ge=1, strict=True), AfterValidator(_one_cpu)]
Mtu = Annotated[int, Field(strict=True), _within(*MTU, "an MTU")]
OnPartition = Annotated[
    Literal["run", "freeze"],
    Field(
        description="a guest whose peer is cut off from the majority: `run` goes on and is never restarted "
        "elsewhere; `freeze` stands still, and may be restarted from its image on another peer"
    ),
]
Scale = Annotated[int, Field(ge=1, le=1024, strict=True)]
RestartPolicy = Literal["never", "on-failure", "always"]
_ENDPOINT_SCHEMA = {"type": "string", "pattern": f"^{NAME}:{INTERFACE}$", "examples": ["content:eth1"]}
_MEMBER_SCHEMA = {"type": "string", "pattern": f"^{NAME}(:{INTERFACE})?$", "examples": ["a", "a:eth1"]}
_PLACE_SCHEMA = {
    "anyOf": [
        {"type": "string", "pattern": f"^{PEER_NAME}$"},
        {
            "type": "object",
            "properties": {"site": {"type": "string", "pattern": f"^{PEER_NAME}$"}},
            "required": ["site"],
            "additionalProperties": False,
        },
    ],
    "description": "a peer's name, or {site: NAME}",
}
EndpointField = Annotated[
    Endpoint, PlainValidator(parse_endpoint), PlainSerializer(str), WithJsonSchema(_ENDPOINT_SCHEMA)
]
MemberField = Annotated[
    Member, PlainValidator(parse_member), PlainSerializer(str), WithJsonSchema(_MEMBER_SCHEMA)
]
SubnetField = Annotated[
    Subnet,
    PlainValidator(parse_subnet),
    PlainSerializer(str),
    WithJsonSchema({"type": "string", "examples": ["10.9.1.0/24", "fd00:1::/64"]}),
]
PlaceField = Annotated[
    Place, PlainValidator(parse_place), PlainSerializer(_place_out), WithJsonSchema(_PLACE_SCHEMA)
]
