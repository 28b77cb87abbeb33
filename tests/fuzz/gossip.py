# SPDX-License-Identifier: Apache-2.0
"""Targets: datagrams of the membership, sealed and opened, and the machine that hears them."""

from __future__ import annotations

import random
from collections.abc import Iterator

from proto.gossip_wire import NONCE, Unacceptable
from proto.swim import codec
from proto.swim.packets import DATAGRAM, ENVELOPE, Packet, packet_size
from proto.vivaldi import Vivaldi
from proto.wire import WireError
from tests.fuzz.target import same, target
from tests.unit.test_gossip_wire import PACKETS, A, B, envelopes, key


def _bytes() -> Iterator[bytes]:
    return map(codec.encode, PACKETS)


def _placed(packet: Packet) -> None:
    """Wherever members say they are, the own coordinate stays one that can be used."""
    own = Vivaldi(random.Random(1))
    for place in [getattr(packet, "place", None), *(p.place for p in getattr(packet, "places", ()))]:
        if place is not None:
            own.observe("peer", place, 0.1)
            own.hear("peer", place, 1.0)
            assert own.coordinate.sound


@target(_bytes, WireError, longest=1500)
def gossip_packets(data: bytes) -> None:
    """A packet out of an envelope; its size is what the sender counts with."""
    packet = codec.decode(data)
    assert packet_size(packet) == len(data)
    same(codec.decode(codec.encode(packet)), packet)
    _placed(packet)


SEALED = b"\x01"


def _datagrams() -> Iterator[bytes]:
    for packet in PACKETS:
        datagram = envelopes(B, key(1)).seal(A, packet, bytes(NONCE), 0.0)
        assert datagram is not None
        yield b"\0" + datagram
        yield SEALED + datagram[: ENVELOPE - 16] + codec.encode(packet)


@target(_datagrams, Unacceptable, longest=1500)
def gossip_envelopes(data: bytes) -> None:
    """A datagram as it is, or (first byte `SEALED`) a header and a packet that a member seals."""
    form, datagram = data[:1], data[1:]
    if form == SEALED:
        header, packet = datagram[: ENVELOPE - 16], datagram[ENVELOPE - 16 :]
        nonce = header[-NONCE:].ljust(NONCE, b"\0")
        cipher = envelopes(B, key(1))._cipher(key(1), B)
        datagram = header + cipher.encrypt(nonce, packet, header)
    opened = envelopes(A, key(1)).open(datagram, {A, B}, 0.0)
    assert ENVELOPE < len(datagram) <= DATAGRAM
    assert opened.sender == B
