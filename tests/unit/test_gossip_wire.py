# SPDX-License-Identifier: Apache-2.0
"""Gossip's bytes: what is sealed comes out again, and nothing else does."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto import entries, gossip_keys
from proto.catalog import apply
from proto.entries import GossipKey
from proto.gossip_keys import DAY, GRACE, SETTLE, STALE_GRACE, Keyring, next_generation
from proto.gossip_wire import NONCE, Envelopes, Fault, Unacceptable
from proto.state import Refused, State
from proto.swim import codec
from proto.swim.packets import (
    DATAGRAM,
    ENVELOPE,
    LIMIT,
    META_LIMIT,
    Ack,
    Claim,
    Gossip,
    Nack,
    Packet,
    Ping,
    PingFor,
    Placed,
    Sync,
    packet_size,
)
from proto.vivaldi import Coordinate
from proto.wire import WireError
from tests.sim.members import member

A, B, C = "a" * 16, "b" * 16, "c" * 16
CLAIMS = (
    Claim(A, "alive", 2**40, meta=b"free"),
    Claim(B, "suspect", 3, A),
    Claim(C, "dead", 0, B),
    Claim(C, "alive", 1),
)
THERE = Coordinate((0.5, -0.25, 0.0, 9.0), 0.125, 1.5)
PACKETS: list[Packet] = [
    Ping(1, "suspect", 2**63, CLAIMS),
    Ack(2**32 - 1, Coordinate((0.5, -0.25, 0.0, 1.0), 0.125, 1.5), CLAIMS),
    PingFor(3, B, 65535, CLAIMS),
    Nack(4),
    Gossip(CLAIMS),
    Sync(ask=True, claims=CLAIMS, places=(Placed(A, 0, THERE), Placed(B, 65535, THERE))),
    Sync(ask=False),
]


@pytest.mark.parametrize("packet", PACKETS, ids=lambda packet: type(packet).__name__)
def test_packets_come_back_and_have_the_size_that_was_counted(packet: Packet) -> None:
    data = codec.encode(packet)
    assert codec.decode(data) == packet
    assert len(data) == packet_size(packet)


@pytest.mark.parametrize("packet", PACKETS, ids=lambda packet: type(packet).__name__)
def test_a_packet_cut_anywhere_or_followed_by_something_is_refused(packet: Packet) -> None:
    data = codec.encode(packet)
    for length in range(len(data)):
        with pytest.raises(WireError):
            codec.decode(data[:length])
    with pytest.raises(WireError):
        codec.decode(data + b"\0")


@given(st.binary(max_size=200))
def test_any_bytes_are_a_packet_or_refused(data: bytes) -> None:
    try:
        packet = codec.decode(data)
    except WireError:
        return
    assert len(data) == packet_size(packet)


@given(st.integers(0, 400), st.integers(0, 255))
def test_a_flipped_byte_is_a_packet_or_refused(place: int, value: int) -> None:
    data = bytearray(codec.encode(PACKETS[place % len(PACKETS)]))
    data[place % len(data)] = value
    try:
        codec.decode(bytes(data))
    except WireError:
        return


def test_meta_that_is_too_long_is_refused() -> None:
    long = Claim(A, "alive", 1, meta=b"x" * (META_LIMIT + 1))
    with pytest.raises(WireError):
        codec.decode(codec.encode(Gossip((long,))))


# Sealing.


def key(generation: int, *, stale: bool = False) -> GossipKey:
    return GossipKey(generation=generation, key=random.Random(generation).randbytes(32), stale=stale)


def envelopes(own: str, *keys: GossipKey, versions: tuple[int, int] = (1, 1)) -> Envelopes:
    ring = Keyring()
    ring.learn(keys, 0.0)
    return Envelopes(own, ring, versions)


def fault(opener: Envelopes, datagram: bytes, now: float = 0.0) -> Fault:
    with pytest.raises(Unacceptable) as caught:
        opener.open(datagram, {A, B}, now)
    return caught.value.fault


def sealed(sender: Envelopes, packet: Packet | None = None) -> bytes:
    datagram = sender.seal(B, packet or PACKETS[0], b"n" * NONCE, 0.0)
    assert datagram is not None
    return datagram


@pytest.mark.parametrize("packet", PACKETS, ids=lambda packet: type(packet).__name__)
def test_what_a_member_seals_a_member_opens(packet: Packet) -> None:
    datagram = sealed(envelopes(A, key(1)), packet)
    assert len(datagram) == packet_size(packet) + ENVELOPE
    opened = envelopes(B, key(1)).open(datagram, {A, B}, 0.0)
    assert (opened.sender, opened.packet) == (A, packet)


def test_an_altered_byte_anywhere_is_noticed() -> None:
    datagram = sealed(envelopes(A, key(1)))
    opener = envelopes(B, key(1))
    for place in range(len(datagram)):
        altered = bytearray(datagram)
        altered[place] ^= 1
        assert fault(opener, bytes(altered)) in ("stranger", "key", "seal")


def test_what_is_not_from_a_member_with_the_key_is_refused() -> None:
    opener = envelopes(B, key(1))
    assert fault(opener, b"") == "size"
    assert fault(opener, b"x" * ENVELOPE) == "size"
    assert fault(opener, b"x" * (DATAGRAM + 1)) == "size"
    assert fault(opener, b"x" * 100) == "stranger"
    assert fault(opener, sealed(envelopes(C, key(1)))) == "stranger"
    assert fault(opener, sealed(envelopes(A, key(2)))) == "key"
    forged = GossipKey(generation=1, key=b"f" * 32)
    assert fault(opener, sealed(envelopes(A, forged))) == "seal"
    assert fault(envelopes(A, key(1)), sealed(envelopes(A, key(1)))) == "stranger"


def test_one_member_s_cipher_is_not_another_s() -> None:
    datagram = bytearray(sealed(envelopes(A, key(1))))
    datagram[6:14] = bytes.fromhex(C)
    with pytest.raises(Unacceptable, match="seal"):
        envelopes(B, key(1)).open(bytes(datagram), {A, B, C}, 0.0)


def test_without_a_key_nothing_is_sent() -> None:
    assert envelopes(A).seal(B, PACKETS[0], b"n" * NONCE, 0.0) is None


def test_the_largest_packet_fits() -> None:
    claims = tuple(Claim(B, "suspect", 1, A) for _ in range((LIMIT - 2) // 25))
    assert len(sealed(envelopes(A, key(1)), Gossip(claims))) <= DATAGRAM


# Versions.


def test_the_highest_common_version_is_spoken_once_heard() -> None:
    old, new = envelopes(A, key(1), versions=(1, 2)), envelopes(B, key(1), versions=(2, 3))
    first = new.seal(A, PACKETS[0], b"n" * NONCE, 0.0)
    assert first is not None
    assert first[1] == 2
    old.open(first, {A, B}, 0.0)
    answer = old.seal(B, PACKETS[0], b"n" * NONCE, 0.0)
    assert answer is not None
    assert answer[1] == 2


def test_without_a_common_version_both_sides_learn_it() -> None:
    old, new = envelopes(A, key(1), versions=(1, 1)), envelopes(B, key(1), versions=(2, 3))
    assert fault(new, sealed(old)) == "version"
    answer = new.seal(A, PACKETS[0], b"n" * NONCE, 0.0)
    assert answer is not None
    assert fault(old, answer) == "version"


# Keys.


def test_a_new_key_seals_after_a_moment_and_the_old_one_opens_a_little_longer() -> None:
    ring = Keyring()
    assert ring.sealing(0.0) is None
    ring.learn((key(1),), 100.0)
    assert ring.sealing(100.0) == key(1)
    ring.learn((key(1), key(2)), 200.0)
    assert ring.sealing(200.0) == key(1)
    assert ring.opening(2, 200.0) == key(2)
    assert ring.sealing(200.0 + SETTLE) == key(2)
    assert ring.opening(1, 200.0 + GRACE - 1) == key(1)
    assert ring.opening(1, 200.0 + GRACE) is None
    ring.learn((key(2), key(3)), 300.0)
    assert ring.opening(1, 300.0) is None


def test_a_member_that_starts_after_a_rotation_seals_with_the_newest_key() -> None:
    ring = Keyring()
    ring.learn((key(1), key(2)), 100.0)
    assert ring.sealing(100.0) == key(2)
    assert ring.opening(1, 100.0) == key(1)
    evicted = Keyring()
    evicted.learn((key(1, stale=True), key(2)), 100.0)
    assert evicted.opening(1, 100.0) is None


def test_a_key_that_somebody_who_left_knows_is_opened_only_as_long_as_it_is_used() -> None:
    ring = Keyring()
    ring.learn((key(1),), 100.0)
    ring.learn((key(1, stale=True), key(2)), 200.0)
    assert ring.sealing(200.0 + SETTLE - 0.1).generation == 1  # type: ignore[union-attr]
    assert ring.opening(1, 200.0 + STALE_GRACE - 0.1) is not None
    assert ring.opening(1, 200.0 + STALE_GRACE) is None
    behind = Keyring()
    behind.learn((key(1),), 100.0)
    behind.learn((key(2), key(3)), 200.0)
    assert behind.sealing(200.0) == key(3)
    assert behind.opening(1, 200.0) is None
    assert behind.opening(2, 200.0) == key(2)


def test_keys_are_never_shown() -> None:
    secret = key(1)
    entry = entries.RotateGossipKey(generation=1, key=secret.key)
    state = State(gossip_keys=(secret,))
    for thing in (secret, entry, state, entries.Proposal(entry=entry)):
        assert repr(secret.key)[2:-1] not in repr(thing)
        assert secret.key.hex() not in repr(thing)


def mesh(*entries_: entries.AnyEntry) -> State:
    one, two = member("one", 1)[0], member("two", 2)[0]
    token = entries.Token(id="t", secret_hash=b"", role="peer", uses=1, expires=1e9)
    state = State()
    todo: list[entries.AnyEntry] = [
        entries.Found(mesh="m", member=one),
        entries.AddToken(token=token),
        entries.AddPeer(member=two.model_copy(update={"token": "t"})),
        *entries_,
    ]
    for index, entry in enumerate(todo, 1):
        state = apply(state, index, entries.Proposal(entry=entry, time=float(index)))
    return state


def test_when_a_key_is_due() -> None:
    rotate = entries.RotateGossipKey(generation=1, key=bytes(32))
    assert next_generation(State(), 0.0) is None
    assert next_generation(mesh(), 10.0) == 1
    state = mesh(rotate)
    assert next_generation(state, 10.0) is None
    assert next_generation(state, 4.0 + gossip_keys.DAY) == 2
    evicted = next(peer for peer, known in state.members.items() if known.name == "two")
    gone = mesh(rotate, entries.RemovePeer(peer=evicted))
    assert gone.gossip_keys[-1].stale
    assert next_generation(gone, 10.0) is None, "alone again"
    assert DAY > GRACE > SETTLE


def test_generations_follow_one_another_and_two_are_kept() -> None:
    rotations = [entries.RotateGossipKey(generation=g, key=bytes(32)) for g in (1, 2, 3)]
    assert [key.generation for key in mesh(*rotations).gossip_keys] == [2, 3]
    for wrong in (rotations[1:2], [rotations[0], rotations[0]]):
        with pytest.raises(Refused, match="does not follow"):
            mesh(*wrong)
