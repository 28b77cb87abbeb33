# SPDX-License-Identifier: Apache-2.0
"""Packets nobody should have sent: forged, replayed, cut short, too long, or from a member that misbehaves.

None may reach a guest, each is counted, and right frames go on. The last tests throw random packets and
random requests of a guest's driver at the switch; run with a helper built with sanitizers (`MOBI_HELPER`)
they show what a reader of this code cannot.
"""

from __future__ import annotations

import random
import socket
import struct
import time
from contextlib import ExitStack

import pytest

from tests.switch_rig import (
    BROADCAST,
    DATA,
    FRAGMENT,
    HEADER,
    MARK,
    NETWORK,
    REDIRECTED,
    MakeSwitch,
    NetDriver,
    Outsider,
    SwitchProcess,
    mac,
    number_of,
    numbered,
)
from tests.waiting import wait_for

A, X = mac(1), mac(900)


class Scene:
    """A guest A behind a switch, and an outsider with good keys."""

    def __init__(self, switch: SwitchProcess, stack: ExitStack) -> None:
        self.switch = switch
        switch.network()
        self.guest = stack.enter_context(switch.guest(1, A))
        self.outsider = stack.enter_context(Outsider(switch))
        self.number = 0

    def peer(self) -> dict[str, int]:
        return self.switch.peer_counters(self.outsider.number)

    def still_good(self) -> None:
        """A right frame arrives, and it is the next thing to arrive: nothing before it did."""
        self.number += 1
        self.outsider.send(numbered(A, X, self.number))
        assert number_of(self.guest.receive()) == self.number


@pytest.fixture
def scene(make: MakeSwitch, stack: ExitStack) -> Scene:
    return Scene(make(1), stack)


def test_forged_packets(scene: Scene) -> None:
    good = scene.outsider.seal(bytes(4) + numbered(A, X, 1))
    for i in range(len(good)):
        broken = bytearray(good)
        broken[i] ^= 0x40
        scene.outsider.send_raw(bytes(broken))
    wait_for(lambda: scene.peer()["bad_auth"] + scene.switch.counters()["strangers"] == len(good))
    assert scene.switch.counters()["strangers"] == 4, "those with another key id"
    scene.outsider.send_raw(good)
    assert number_of(scene.guest.receive()) == 1, "forgeries did not use up the counter"
    scene.outsider.counter = 1000
    scene.still_good()


def test_replayed_packets(scene: Scene) -> None:
    packets = [scene.outsider.seal(bytes(4) + numbered(A, X, n)) for n in range(50)]
    for packet in packets:
        scene.outsider.send_raw(packet)
    assert [number_of(f) for f in scene.guest.receive_all(50)] == list(range(50))
    for packet in packets:
        scene.outsider.send_raw(packet)
    wait_for(lambda: scene.peer()["replayed"] == 50)
    scene.still_good()


def test_reordered_packets_are_fresh_once(scene: Scene) -> None:
    """Counters out of order within the window are taken, each once; older than the window: refused."""
    order = list(range(1, 1500))
    random.Random(5).shuffle(order)
    for start in range(0, len(order), 100):
        for counter in order[start : start + 100]:
            scene.outsider.send_raw(scene.outsider.seal(bytes(4) + numbered(A, X, counter), counter=counter))
        got = {number_of(f) for f in scene.guest.receive_all(100 if start < 1400 else 99)}
        assert got == set(order[start : start + 100])
    jump = 50_000
    for counter in (jump, 1, 700, jump - 1983, jump - 1985, jump):
        scene.outsider.send_raw(scene.outsider.seal(bytes(4) + numbered(A, X, counter), counter=counter))
    assert [number_of(f) for f in scene.guest.receive_all(2)] == [jump, jump - 1983]
    wait_for(lambda: scene.peer()["replayed"] == 4)
    scene.outsider.counter = jump
    scene.still_good()


def test_a_forged_counter_does_not_move_the_window(scene: Scene) -> None:
    first = scene.outsider.seal(bytes(4) + numbered(A, X, 7))
    far = struct.pack(">IIQ", NETWORK, scene.outsider.key_id, 1 << 60) + bytes(100)
    scene.outsider.send_raw(far)
    wait_for(lambda: scene.peer()["bad_auth"] == 1)
    scene.outsider.send_raw(first)
    assert number_of(scene.guest.receive()) == 7


def test_wrong_lengths(scene: Scene) -> None:
    seal = scene.outsider.seal
    good = seal(bytes(4) + numbered(A, X, 1))
    for length in range(len(good)):
        scene.outsider.send_raw(good[:length])
    wait_for(lambda: scene.peer()["bad_auth"] + scene.switch.counters()["strangers"] == len(good))
    before = scene.peer()["malformed"]
    wrong = [
        seal(b""),
        seal(bytes(3)),
        seal(bytes(4)),
        seal(bytes(4) + A + X),
        seal(bytes(4) + bytes(64_500)),
        seal(bytes([0x10, 0, 0, 0]) + numbered(A, X, 1)),
        seal(bytes([4, 0, 0, 0]) + numbered(A, X, 1)),
        seal(bytes([1, 0, 59, 0]) + numbered(A, X, 1)),
        seal(bytes([1, 0, 255, 255]) + numbered(A, X, 1)),
        seal(bytes([1, 0, 4, 0]) + numbered(A, X, 1)),
        seal(bytes(4) + numbered(A, X, 1), kind=3),
        seal(bytes(4) + numbered(A, X, 1), kind=0x80),
        seal(bytes(4) + bytes(23), kind=MARK),
        seal(bytes(4) + bytes(25), kind=MARK),
        seal(bytes(4) + bytes(5), kind=REDIRECTED),
        seal(bytes(4) + A + bytes(13), kind=REDIRECTED),
    ]
    for packet in wrong:
        scene.outsider.send_raw(packet)
    # The first two have no room for a meta at all and are taken for garbage.
    wait_for(lambda: scene.peer()["malformed"] - before == len(wrong) - 2, state=scene.peer)
    scene.still_good()


def test_a_member_cannot_speak_for_others(scene: Scene) -> None:
    seal, send = scene.outsider.seal, scene.outsider.send_raw
    scene.switch.mac_set(mac(50), peer=0, epoch=3)
    marker = struct.pack(">BB6sQQ", 1, 0, A, 2, 1)
    for plain, kind in (
        (numbered(BROADCAST, A, 1), DATA),
        (numbered(A, mac(50), 1), DATA),
        (numbered(A, BROADCAST, 1), DATA),
    ):
        send(seal(bytes(4) + plain, kind))
    wait_for(lambda: scene.peer()["spoofed"] == 3)
    send(seal(bytes(4) + A + numbered(A, X, 1), REDIRECTED))
    for what in range(6):
        send(seal(bytes(4) + bytes([what]) + marker[1:], MARK))
    wait_for(lambda: scene.switch.counters()["strays"] == 6, state=scene.switch.counters)
    send(seal(bytes(4) + numbered(A, X, 1), network=NETWORK + 1))
    wait_for(lambda: scene.peer()["foreign"] == 1)
    entry = next(m for m in scene.switch.counters()["macs"] if m["mac"] == A)
    assert (entry["peer"], entry["epoch"]) == (0, 1)
    scene.still_good()


def test_fragments_that_do_not_fit(scene: Scene) -> None:
    def piece(number: int, index: int, count: int, size: int, data: bytes) -> None:
        head = struct.pack(">IBBH", number, index, count, size)
        scene.outsider.send_raw(scene.outsider.seal(head + data, DATA | FRAGMENT))

    whole = bytes(4) + numbered(A, X, 77, 1000)
    piece(1, 1, 2, 600, whole[600:])
    piece(1, 0, 2, 600, whole[:600])
    assert scene.guest.receive() == whole[4:], "out of order is fine"
    before = scene.peer()["malformed"]
    for arguments in (
        (2, 0, 1, 600, whole[:600]),
        (2, 2, 2, 600, whole[:600]),
        (2, 0, 2, 600, whole[:599]),
        (2, 1, 2, 600, whole[:601]),
        (2, 0, 2, 0, b"x"),
        (2, 0, 255, 0xFFFF, bytes(1400)),
        (2, 0, 2, 600, b""),
    ):
        piece(*arguments)
    piece(3, 0, 2, 600, whole[:600])
    for arguments in ((3, 0, 2, 600, whole[:600]), (3, 1, 3, 600, whole[:600]), (3, 1, 2, 700, whole[:10])):
        piece(*arguments)
    wait_for(lambda: scene.peer()["malformed"] - before == 10, state=scene.peer)
    for number in range(100, 140):
        piece(number, 0, 2, 600, whole[:600])
    wait_for(lambda: scene.peer()["reassembly_failed"] > 20)
    scene.still_good()


def test_random_packets(scene: Scene) -> None:
    """Sealed with the right key, so that everything behind the authentication sees them."""
    rng = random.Random(20)
    for round_number in range(15):
        for _ in range(200):
            size = rng.choice((rng.randrange(64), rng.randrange(1500), rng.randrange(9000)))
            plain = bytearray(rng.randbytes(size))
            if rng.random() < 0.7 and size >= 18:
                plain[:4] = bytes([rng.choice((0, 1, 2, 3, rng.randrange(256))), 0, *rng.randbytes(2)])
                plain[4:16] = rng.choice((A, BROADCAST, mac(rng.randrange(5)))) + rng.choice((A, X, mac(7)))
            kind = rng.choice((DATA, REDIRECTED, MARK, FRAGMENT, FRAGMENT | 1, rng.randrange(256)))
            if kind & FRAGMENT and size >= 8:
                plain[:8] = struct.pack(
                    ">IBBH",
                    rng.randrange(4),
                    rng.randrange(4),
                    rng.randrange(5),
                    rng.choice((size - 8, 100)) % 65536,
                )
            if kind == MARK and rng.random() < 0.8:
                plain = bytearray(4) + struct.pack(
                    ">BB6sQQ", rng.randrange(6), 0, A, rng.randrange(5), rng.randrange(3)
                )
            scene.outsider.send_raw(
                scene.outsider.seal(bytes(plain), kind, rng.choice((NETWORK, NETWORK, 1)))
            )
        for _ in range(50):
            scene.outsider.send_raw(rng.randbytes(rng.randrange(200)))
        while scene.guest.poll() is not None:
            pass
        assert scene.switch.status()["ports"] == 1, f"alive after round {round_number}"
    while scene.guest.poll() is not None:
        pass
    scene.outsider.send(numbered(A, X, 1 << 40))
    deadline = time.monotonic() + 10
    while number_of(scene.guest.receive()) != 1 << 40:
        assert time.monotonic() < deadline


def test_random_packets_at_a_guest_that_moves_in(make: MakeSwitch, stack: ExitStack) -> None:
    """The same for the states of a handover: the outsider plays the old place."""
    rng = random.Random(21)
    switch = make(1)
    outsider = stack.enter_context(Outsider(switch))
    switch.mac_set(A, peer=outsider.number, epoch=1)
    path = switch.add_port(1, A, epoch=2, state="incoming")
    switch.expect(1, 2, outsider.number)
    for round_number in range(30):
        for _ in range(60):
            what = rng.randrange(5)
            frame = numbered(rng.choice((A, BROADCAST)), mac(rng.randrange(2, 9)), 1, rng.randrange(22, 300))
            if what == 0:
                outsider.send(A + frame, kind=REDIRECTED)
            elif what == 1:
                outsider.send(frame, meta=bytes([rng.choice((0, 2)), 0, 0, 0]))
            else:
                epoch, sender = rng.randrange(1, 5), rng.choice((outsider.identity, rng.randrange(600)))
                outsider.send(struct.pack(">BB6sQQ", rng.randrange(5), 0, A, epoch, sender), kind=MARK)
        if round_number == 10:
            guest = stack.enter_context(NetDriver(path, A))
            switch.call("announce", port=1)
        if round_number == 20:
            switch.call("hold", port=1)
        if round_number == 25:
            switch.call("redirect", port=1, peer=outsider.number, epoch=3)
        assert switch.status()["ports"] == 1
    assert guest.poll() is not None
    switch.call("port_remove", port=1)
    assert switch.status()["ports"] == 0


def test_a_hostile_driver(make: MakeSwitch, stack: ExitStack) -> None:
    """Random descriptors break the guest's own queues at worst."""
    rng = random.Random(22)
    switch = make(1)
    switch.network()
    good, other = stack.enter_context(switch.guest(1, A)), stack.enter_context(switch.guest(2, X))
    for round_number in range(20):
        port = 10 + round_number
        with switch.guest(port, mac(port)) as bad:
            queue = bad.transmitting
            for _ in range(40):
                i = rng.randrange(256)
                address = rng.choice((0x1_0000_0000, 0, 1 << 63)) + rng.randrange(9 << 20)
                length = rng.choice((0, 1, 11, 12, 26, 1600, 0xFFFFFFFF))
                queue.write_desc(i, address, length, rng.randrange(8), rng.randrange(300))
                queue.offer(rng.choice((i, i, rng.randrange(65536))))
            bad.receiving.write_desc(0, rng.randrange(1 << 40), rng.randrange(3000), 2)
            other.send(numbered(BROADCAST, X, round_number))
            assert number_of(good.receive()) == round_number
        switch.call("port_remove", port=port)
    assert HEADER == 12


def test_traffic_to_a_closed_peer_is_harmless(scene: Scene) -> None:
    """The outsider's socket is gone: the kernel's refusals must not stop the switch."""
    scene.switch.mac_set(mac(60), peer=scene.outsider.number)
    packets = scene.peer()["tx_packets"]
    quiet = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    quiet.close()
    scene.outsider.socket.close()
    for n in range(20):
        scene.guest.send(numbered(mac(60), A, n))
    wait_for(lambda: scene.peer()["tx_packets"] + scene.peer()["tx_errors"] >= packets + 20)
    assert scene.switch.status()["ports"] == 1
