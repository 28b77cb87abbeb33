# SPDX-License-Identifier: Apache-2.0
"""What members say to one another about who is alive.

Every packet may carry *claims* about members besides its own purpose: that is how news spreads, without
packets of its own. A claim holds of one *incarnation* of a member, a number that only the member itself
raises; a newer incarnation makes older claims void, and within one, dead outweighs suspect and suspect
outweighs alive (Das, Gupta and Motivala, *SWIM*, DSN 2002, §4.2).

A packet may be lost, doubled, late or out of order. It says who sent it by its envelope
(`proto/gossip_wire.py`), and `LIMIT` bounds its bytes, so that it passes any path in one piece.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from proto.vivaldi import Coordinate

Reach = Literal["alive", "suspect", "dead"]

DATAGRAM = 1200
"""Bytes of a datagram at most: what every path carries unfragmented."""

ENVELOPE = 42
"""Bytes that the envelope adds."""

LIMIT = DATAGRAM - ENVELOPE
"""Bytes of a packet at most."""

META_LIMIT = 64
"""Bytes that a member may tell about itself."""

CLAIM_BASE = 17
"""Bytes of a claim: member, state, incarnation; then who claims it, or what it tells about itself."""

CLAIM_MOST = CLAIM_BASE + 1 + META_LIMIT
PING_BASE = 15
ACK_BASE = 6 + 4 * 6
PING_FOR_BASE = 16
NACK_BASE = 6
GOSSIP_BASE = 2
SYNC_BASE = 4
PLACED_SIZE = 10 + 4 * 6
MOST_CLAIMS = 255
MOST_AGE = 0xFFFF


class Claim(NamedTuple):
    """That `peer`, in its `incarnation`, is in this state; `by` is who suspects it or declared it dead,
    `meta` what an alive member tells about itself."""

    peer: str
    state: Reach
    incarnation: int
    by: str = ""
    meta: bytes = b""


class Placed(NamedTuple):
    """That `peer` is at `place` in the space of network coordinates, by its own word `age` seconds ago."""

    peer: str
    age: int
    place: Coordinate


def claim_size(claim: Claim) -> int:
    """Bytes that the claim takes in a packet."""
    return CLAIM_BASE + (1 + len(claim.meta) if claim.state == "alive" else 8)


@dataclass(frozen=True, slots=True)
class Ping:
    """Are you there? Answer with `Ack(number)`.

    `state` and `incarnation` are what the sender believes of the receiver: one that is believed suspect or
    dead hears it at once and can refute it (Lifeguard's buddy system), and one whose newest incarnation is
    not known tells it.
    """

    number: int
    state: Reach
    incarnation: int
    claims: tuple[Claim, ...] = ()


@dataclass(frozen=True, slots=True)
class Ack:
    """I am here, and there in the space of network coordinates; or, from a helper: it answered me."""

    number: int
    place: Coordinate
    claims: tuple[Claim, ...] = ()


@dataclass(frozen=True, slots=True)
class PingFor:
    """Please ping `target` for me; `Ack(number)` if it answers, `Nack(number)` if not within `wait` ms."""

    number: int
    target: str
    wait: int
    claims: tuple[Claim, ...] = ()


@dataclass(frozen=True, slots=True)
class Nack:
    """I am here and tried, but the target did not answer me in time."""

    number: int
    claims: tuple[Claim, ...] = ()


@dataclass(frozen=True, slots=True)
class Gossip:
    """Nothing but news."""

    claims: tuple[Claim, ...]


@dataclass(frozen=True, slots=True)
class Sync:
    """A part of everything the sender knows, with the places of those who are alive; `ask`: tell me what you
    know too."""

    ask: bool
    claims: tuple[Claim, ...] = ()
    places: tuple[Placed, ...] = ()


Packet = Ping | Ack | PingFor | Nack | Gossip | Sync

BASES: dict[type[Packet], int] = {
    Ping: PING_BASE,
    Ack: ACK_BASE,
    PingFor: PING_FOR_BASE,
    Nack: NACK_BASE,
    Gossip: GOSSIP_BASE,
    Sync: SYNC_BASE,
}


def packet_size(packet: Packet) -> int:
    """Bytes of the packet without its envelope, as `codec.encode` makes them."""
    claims = packet.claims
    size = BASES[type(packet)] + (sum(map(claim_size, claims)) if claims else 0)
    return size + PLACED_SIZE * len(packet.places) if isinstance(packet, Sync) else size
