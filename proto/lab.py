# SPDX-License-Identifier: Apache-2.0
"""The lab file: which guests there shall be and how they are wired, in containerlab's vocabulary.

This module holds the shapes (`Lab` and its parts, as pydantic models) and what a node is once the
defaults are filled in (`Guest`). `labcheck.parse_lab` is the way in from a file; `addresses` derives what
follows from a lab without a choice (network names, MACs, addresses); `plan` decides what depends on the
surroundings (which peer).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field

from proto.labfields import (
    Command,
    Cpus,
    Disk,
    EndpointField,
    EnvName,
    EnvValue,
    GuestName,
    ImageName,
    LabName,
    MemberField,
    Memory,
    Mtu,
    NetworkName,
    OnPartition,
    Place,
    PlaceField,
    RestartPolicy,
    Scale,
    SubnetField,
)
from proto.units import Duration, Percentage, Rate

NODES: Final = 1024
LINKS: Final = 4096
INTERFACES: Final = 8
DEFAULT_MEMORY: Final = 64 << 20
DEFAULT_MTU: Final = 1400
DEFAULT_LAB: Final = "default"
# Keys that the design names and that no part carries out yet.
LATER: Final = frozenset({"cpu", "ports", "binds", "checkpoint"})


class Shape(BaseModel):
    """What all parts share: unknown keys refused, values fixed, keys written with hyphens as in the file."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        alias_generator=lambda name: name.replace("_", "-"),
        validate_by_name=True,
    )


class Defaults(Shape):
    """What a node has unless it says otherwise."""

    image: ImageName | None = None
    memory: Memory | None = None
    disk: Disk | None = None
    cpus: Cpus | None = None
    mtu: Mtu | None = None
    place: PlaceField | None = None
    env: dict[EnvName, EnvValue] = Field(default_factory=dict, max_length=64)
    on_partition: OnPartition | None = None
    restart_policy: RestartPolicy | None = None


class Node(Defaults):
    """One guest of the file, as it is written there; `guests` gives it with the defaults filled in."""

    scale: Scale | None = Field(
        default=None, description="that many guests, NAME-1 to NAME-N; a network's member NAME means all"
    )
    exec: list[Command] = Field(
        default_factory=list,
        max_length=64,
        description="commands run in the guest, in order, by its shell, once it is up and has its addresses",
    )


class Impairment(Shape):
    """What a link does to frames, in each direction separately."""

    delay: Duration | None = None
    jitter: Duration | None = None
    loss: Percentage | None = None
    rate: Rate | None = None


class Link(Impairment):
    """A network of two ports."""

    endpoints: list[EndpointField] = Field(min_length=2, max_length=2)
    name: NetworkName | None = None
    subnet: SubnetField | None = None


class Network(Impairment):
    """A segment of any number of guests."""

    members: list[MemberField] = Field(min_length=1, max_length=NODES)
    subnet: SubnetField | None = None


class Topology(Shape):
    """Guests and what joins them."""

    defaults: Defaults = Field(default_factory=Defaults)
    nodes: dict[GuestName, Node] = Field(min_length=1, max_length=NODES)
    links: list[Link] = Field(default_factory=list, max_length=LINKS)
    networks: dict[NetworkName, Network] = Field(default_factory=dict, max_length=LINKS)


class Lab(Shape):
    """A whole lab file."""

    name: LabName
    topology: Topology


@dataclass(frozen=True, slots=True)
class Guest:
    """A node with everything decided: what a peer needs to make it. Sizes in bytes."""

    name: str
    image: str
    memory: int
    disk: int | None
    cpus: int
    mtu: int
    place: Place | None
    exec: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    on_partition: str = "run"
    restart_policy: str = "on-failure"


def guest(lab: Lab, name: str) -> Guest:
    """The guest of that name, with the lab's defaults and the built-in ones filled in. Raises KeyError."""
    node, defaults = lab.topology.nodes[name], lab.topology.defaults

    def chosen(key: str, otherwise: Any) -> Any:
        own = getattr(node, key)
        value = own if own is not None else getattr(defaults, key)
        return otherwise if value is None else value

    return Guest(
        name=name,
        image=chosen("image", ""),
        memory=chosen("memory", DEFAULT_MEMORY),
        disk=chosen("disk", None),
        cpus=chosen("cpus", 1),
        mtu=chosen("mtu", DEFAULT_MTU),
        place=chosen("place", None),
        exec=tuple(node.exec),
        env={**defaults.env, **node.env},
        on_partition=chosen("on_partition", "run"),
        restart_policy=chosen("restart_policy", "on-failure"),
    )


def guests(lab: Lab) -> list[Guest]:
    """All guests, in the order of the file."""
    return [guest(lab, name) for name in lab.topology.nodes]


def dump_lab(lab: Lab) -> dict[str, Any]:
    """The lab as plain JSON values, as its file would have it; `parse_lab` reads it back to an equal Lab."""
    return lab.model_dump(mode="json", by_alias=True, exclude_unset=True)


def lab_schema() -> dict[str, Any]:
    """The JSON Schema of lab files, for editors."""
    schema = Lab.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Mobitopolo lab"}
