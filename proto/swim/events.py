# SPDX-License-Identifier: Apache-2.0
"""What the membership's machine hears and wants, and its times (`proto/swim/machine.py`).

`Woken`, `Send` and `WakeAt` are those of `proto/machine.py`; a message is a `packets.Packet`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from proto.machine import Send, WakeAt, Woken
from proto.swim.packets import META_LIMIT, Packet, Reach

TIMER = "swim"
"""The only timer of the machine."""


@dataclass(frozen=True, slots=True)
class Roster:
    """The members of the mesh, by the catalog; a value that many machines may share. Made by `of`."""

    ids: tuple[str, ...] = ()
    known: frozenset[str] = field(default_factory=frozenset)

    @classmethod
    def of(cls, peers: Iterable[str]) -> Roster:
        known = frozenset(peers)
        return cls(tuple(sorted(known)), known)


# Events. Also `Woken`.


@dataclass(frozen=True, slots=True)
class Members:
    """The catalog says who is a member; the own peer among them or not."""

    roster: Roster


@dataclass(frozen=True, slots=True)
class Received:
    """A packet of `peer` (authenticated as a member's by the envelope)."""

    peer: str
    packet: Packet


@dataclass(frozen=True, slots=True)
class SetMeta:
    """Tell everybody this about the own peer from now on; at most `META_LIMIT` bytes."""

    meta: bytes

    def __post_init__(self) -> None:
        if len(self.meta) > META_LIMIT:
            raise ValueError(f"a member may tell {META_LIMIT} bytes about itself, not {len(self.meta)}")


# Effects. Also `Send` and `WakeAt`.


@dataclass(frozen=True, slots=True)
class Turned:
    """A member looks different since `since` (own clock)."""

    peer: str
    state: Reach
    since: float


@dataclass(frozen=True, slots=True)
class Settings:
    """Times in seconds. A pair of peers further apart gets longer ones, in proportion to its round trip.

    Suspicion lasts `suspicion` × log10(members) × `interval` once enough others suspect too, else up to
    `patience` times that (Dadgar, Phillips and Currey, *Lifeguard*, DSN 2018, §IV-B).
    """

    interval: float = 1.0
    """Between two probes of a healthy member."""
    timeout: float = 0.25
    """Without an answer for so long, or three round trips, a probe asks helpers and goes on trying itself."""
    tries: int = 4
    """Pings of one probe to its member, a timeout apart."""
    longest_timeout: float = 2.5
    helpers: int = 3
    suspicion: float = 3.0
    patience: float = 4.0
    confirmations: int = 3
    """Others that must suspect a member too for the shortest suspicion."""
    gossip: float = 0.2
    """Between two rounds of packets with news, while there is news."""
    fanout: int = 3
    repeats: int = 4
    """Each piece of news is sent `repeats` × log10(members) times by each member."""
    sync: float = 30.0
    """Between two exchanges of everything known with a random member."""
    sync_packets: int = 32
    """Packets with everything known at most at once; the next exchange goes on behind them."""
    dead: float = 5.0
    """Between two probes of members that look dead, so that healed halves find each other."""
    worst_health: int = 7
    """How much a member doubts its own health at most: it then waits eight times as long."""


Event = Members | Received | SetMeta | Woken
Effect = Send | WakeAt | Turned
