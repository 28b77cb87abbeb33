# SPDX-License-Identifier: Apache-2.0
"""Packets of the membership as bytes (version 1 of the protocol).

A kind, the kind's own fields, the number of claims, the claims, and in a `Sync` the number of places and the
places; all numbers big-endian. The formats are fixed, so that the size of a packet is known before it is made
(`packets.packet_size`). Whoever sends is a member, but perhaps one with a mistake: every byte is checked, and
nothing may follow the last claim or place.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from proto.swim.packets import (
    META_LIMIT,
    Ack,
    Claim,
    Gossip,
    Nack,
    Packet,
    Ping,
    PingFor,
    Placed,
    Reach,
    Sync,
)
from proto.vivaldi import DIMENSIONS, Coordinate
from proto.wire import WireError

STATES: tuple[Reach, ...] = ("alive", "suspect", "dead")

_PING = struct.Struct("!IBQ")
_ACK = struct.Struct(f"!I{DIMENSIONS + 2}f")
_PING_FOR = struct.Struct("!I8sH")
_NACK = struct.Struct("!I")
_SYNC = struct.Struct("!B")
_NOTHING = struct.Struct("")
_CLAIM = struct.Struct("!8sBQ")
_PLACED = struct.Struct(f"!8sH{DIMENSIONS + 2}f")

_BODIES = {1: _PING, 2: _ACK, 3: _PING_FOR, 4: _NACK, 5: _NOTHING, 6: _SYNC}


def encode(packet: Packet) -> bytes:
    """The bytes of a packet."""
    claims = b"".join(map(_encode_claim, packet.claims))
    data = _head(packet) + bytes((len(packet.claims),)) + claims
    if isinstance(packet, Sync):
        return data + bytes((len(packet.places),)) + b"".join(map(_encode_placed, packet.places))
    return data


def _head(packet: Packet) -> bytes:
    match packet:
        case Ping(number, state, incarnation):
            return b"\x01" + _PING.pack(number, STATES.index(state), incarnation)
        case Ack(number, place):
            return b"\x02" + _ACK.pack(number, *place.vector, place.height, place.error)
        case PingFor(number, target, wait):
            return b"\x03" + _PING_FOR.pack(number, bytes.fromhex(target), wait)
        case Nack(number):
            return b"\x04" + _NACK.pack(number)
        case Gossip():
            return b"\x05"
        case Sync(ask):
            return b"\x06" + _SYNC.pack(ask)


def _encode_claim(claim: Claim) -> bytes:
    head = _CLAIM.pack(bytes.fromhex(claim.peer), STATES.index(claim.state), claim.incarnation)
    if claim.state == "alive":
        return head + bytes((len(claim.meta),)) + claim.meta
    return head + bytes.fromhex(claim.by)


def _encode_placed(placed: Placed) -> bytes:
    place = placed.place
    return _PLACED.pack(bytes.fromhex(placed.peer), placed.age, *place.vector, place.height, place.error)


def decode(data: bytes) -> Packet:
    """The packet in `data`; raises `WireError`."""
    body = _BODIES.get(data[0]) if data else None
    if body is None:
        raise WireError("gossip of an unknown kind")
    try:
        fields = body.unpack_from(data, 1)
        claims, end = _claims(data, 1 + body.size)
        places, end = _places(data, end) if body is _SYNC else ((), end)
        if end != len(data):
            raise WireError("gossip with rubbish behind it")
        return _packet(data[0], fields, claims, places)
    except (struct.error, IndexError, OverflowError):
        raise WireError("gossip that is cut off") from None


def _packet(
    kind: int,
    fields: tuple[int | float | bytes, ...],
    claims: tuple[Claim, ...],
    places: tuple[Placed, ...],
) -> Packet:
    match kind, fields:
        case 1, (int(number), int(state), int(incarnation)):
            return Ping(number, _state(state), incarnation, claims)
        case 2, (int(number), *place):
            return Ack(number, _coordinate(place), claims)
        case 3, (int(number), bytes(target), int(wait)):
            return PingFor(number, target.hex(), wait, claims)
        case 4, (int(number),):
            return Nack(number, claims)
        case 5, ():
            return Gossip(claims)
        case 6, (int(ask),):
            return Sync(bool(ask), claims, places)
    raise WireError("gossip of an unknown kind")


def _state(number: int) -> Reach:
    if number >= len(STATES):
        raise WireError(f"gossip about a state {number} that does not exist")
    return STATES[number]


def _coordinate(fields: Iterable[int | float | bytes]) -> Coordinate:
    *vector, height, error = (float(part) for part in fields)
    return Coordinate(tuple(vector), height, error)


def _claims(data: bytes, place: int) -> tuple[tuple[Claim, ...], int]:
    """The claims that begin at `place`, and where they end."""
    count = data[place]
    place += 1
    claims = []
    for _ in range(count):
        peer, number, incarnation = _CLAIM.unpack_from(data, place)
        place += _CLAIM.size
        state = _state(number)
        size = 1 + data[place] if state == "alive" else 8
        rest = data[place : place + size]
        if len(rest) != size or size > 1 + META_LIMIT:
            raise WireError("gossip with a claim of a wrong length")
        place += size
        if state == "alive":
            claims.append(Claim(peer.hex(), state, incarnation, meta=rest[1:]))
        else:
            claims.append(Claim(peer.hex(), state, incarnation, rest.hex()))
    return tuple(claims), place


def _places(data: bytes, place: int) -> tuple[tuple[Placed, ...], int]:
    """The places that begin at `place`, and where they end."""
    end = place + 1 + data[place] * _PLACED.size
    if end > len(data):
        raise WireError("gossip that is cut off")
    found = _PLACED.iter_unpack(data[place + 1 : end])
    return tuple(Placed(peer.hex(), age, _coordinate(fields)) for peer, age, *fields in found), end
