# SPDX-License-Identifier: Apache-2.0
"""Frames through real switches: unicast, broadcast, learning, refusals, checksums, fragments, keys."""

from __future__ import annotations

import struct
import time
from contextlib import ExitStack
from typing import Any

import pytest

from tests.helperclient import HelperFailure
from tests.switch_rig import (
    BROADCAST,
    ETHERTYPE,
    NETWORK,
    MakeSwitch,
    NetDriver,
    SwitchProcess,
    mac,
    mesh,
    number_of,
    numbered,
    rekey,
    tie,
)

A, B, C = mac(1), mac(2), mac(3)


def pair(make: MakeSwitch, stack: ExitStack, mtu: int = 1500) -> tuple[SwitchProcess, ...]:
    """Two tied switches that know guests A (at 1) and B (at 2)."""
    one, two = make(1), make(2)
    tie(one, two, mtu)
    for switch in (one, two):
        switch.network()
    one.mac_set(B, peer=2)
    two.mac_set(A, peer=1)
    return one, two


def guests(one: SwitchProcess, two: SwitchProcess, stack: ExitStack) -> tuple[NetDriver, NetDriver]:
    return stack.enter_context(one.guest(1, A)), stack.enter_context(two.guest(1, B))


def test_frames_between_guests_of_one_host(make: MakeSwitch, stack: ExitStack) -> None:
    switch = make(1)
    switch.network()
    a, b, c = (stack.enter_context(switch.guest(i, mac(i))) for i in (1, 2, 3))
    a.send(*(numbered(B, A, n, 60 + n) for n in range(200)))
    assert [number_of(f) for f in b.receive_all(200)] == list(range(200))
    a.send(numbered(BROADCAST, A, 7))
    assert number_of(b.receive()) == number_of(c.receive()) == 7
    assert c.silent()
    assert a.silent()


def test_frames_between_hosts_both_ways(make: MakeSwitch, stack: ExitStack) -> None:
    one, two = pair(make, stack)
    a, b = guests(one, two, stack)
    for start in range(0, 1000, 100):
        a.send(*(numbered(B, A, n, 60 + n) for n in range(start, start + 100)))
        b.send(*(numbered(A, B, n, 1514 - n) for n in range(start, start + 100)))
        sent = range(start, start + 100)
        got = b.receive_all(100)
        assert [number_of(f) for f in got] == list(sent)
        assert got[-1] == numbered(B, A, start + 99, 60 + start + 99)
        assert [number_of(f) for f in a.receive_all(100)] == list(sent)
    counters = one.port_counters(1)
    assert counters["tx_frames"] == counters["rx_frames"] == 1000
    assert one.peer_counters(2)["bad_auth"] == one.peer_counters(2)["replayed"] == 0


def test_over_ipv6(make: MakeSwitch, stack: ExitStack) -> None:
    one, two = make(1, "::1"), make(2, "::1")
    mesh(one, two)
    a, b = guests(one, two, stack)
    a.send(numbered(BROADCAST, A, 1))
    b.receive()
    b.send(numbered(A, B, 2))
    assert number_of(a.receive()) == 2


def test_an_ipv4_peer_behind_a_socket_for_both(make: MakeSwitch, stack: ExitStack) -> None:
    one, two = make(1, "::"), make(2)
    one.address = "127.0.0.1"
    mesh(one, two)
    a, b = guests(one, two, stack)
    a.send(numbered(BROADCAST, A, 1))
    assert number_of(b.receive()) == 1
    b.send(numbered(A, B, 2))
    assert number_of(a.receive()) == 2


def test_a_path_of_another_family_is_refused(make: MakeSwitch) -> None:
    one, two = make(1), make(2, "::1")
    with pytest.raises(HelperFailure, match="::1"):
        rekey(two, one)


def test_broadcast_reaches_all_hosts_once(make: MakeSwitch, stack: ExitStack) -> None:
    switches = [make(n) for n in (1, 2, 3)]
    mesh(*switches)
    a, b, c = (stack.enter_context(s.guest(1, mac(s.number))) for s in switches)
    a.send(*(numbered(BROADCAST, A, n) for n in range(50)))
    for guest in (b, c):
        assert [number_of(f) for f in guest.receive_all(50)] == list(range(50))
        assert guest.silent()


def test_unknown_addresses_are_learned(make: MakeSwitch, stack: ExitStack) -> None:
    """An address behind a guest (a container's) is flooded to until it has sent something."""
    switches = [make(n) for n in (1, 2, 3)]
    mesh(*switches)
    a, b, c = (stack.enter_context(s.guest(1, mac(s.number))) for s in switches)
    inner = mac(77)
    a.send(numbered(inner, A, 1))
    assert number_of(b.receive()) == number_of(c.receive()) == 1
    b.send(numbered(BROADCAST, inner, 2))
    assert number_of(a.receive()) == number_of(c.receive()) == 2
    a.send(numbered(inner, A, 3))
    assert number_of(b.receive()) == 3
    assert c.silent()
    learned = [m for m in switches[0].counters()["macs"] if m["mac"] == inner]
    assert learned == [{"network": NETWORK, "mac": inner, "peer": 2, "epoch": 0, "told": 0}]


def test_networks_are_apart(make: MakeSwitch, stack: ExitStack) -> None:
    one, two = pair(make, stack)
    a, b = guests(one, two, stack)
    two.network(NETWORK + 1)
    other = stack.enter_context(NetDriver(two.add_port(2, C, network=NETWORK + 1), C))
    other.send(numbered(BROADCAST, C, 1), numbered(B, C, 2))
    one_of_other = two.port_counters(2)
    a.send(numbered(BROADCAST, A, 3))
    assert number_of(b.receive()) == 3
    assert other.silent()
    assert one_of_other["network"] == NETWORK + 1
    two.wait_port(2, lambda p: p["tx_frames"] == 2)
    one.wait_peer(2, lambda p: p["foreign"] >= 1)
    assert b.silent()


def test_a_spoofed_source_is_dropped(make: MakeSwitch, stack: ExitStack) -> None:
    switch = make(1)
    switch.network()
    a, b, c = (stack.enter_context(switch.guest(i, mac(i))) for i in (1, 2, 3))
    a.send(numbered(B, C, 1), numbered(B, BROADCAST, 2), numbered(B, A, 3))
    assert number_of(b.receive()) == 3
    assert switch.port_counters(1)["spoofed"] == 2
    assert c.silent()


def test_malformed_frames_of_a_guest_are_counted(make: MakeSwitch, stack: ExitStack) -> None:
    switch = make(1)
    switch.network()
    a, b = (stack.enter_context(switch.guest(i, mac(i))) for i in (1, 2))
    gso = struct.pack("<BBHHHHH", 1, 1, 54, 1448, 34, 16, 1)
    outside = struct.pack("<BBHHHHH", 1, 0, 0, 0, 60, 16, 1)
    a.send(b"short")
    a.send(numbered(B, A, 1, 1600))
    a.send(numbered(B, A, 2), header=gso)
    a.send(numbered(B, A, 3), header=outside)
    a.send(numbered(B, A, 4))
    assert number_of(b.receive()) == 4
    assert switch.port_counters(1)["tx_malformed"] == 4


def internet_sum(data: bytes) -> int:
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data[: len(data) // 2 * 2]))
    total += data[-1] << 8 if len(data) % 2 else 0
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


@pytest.mark.parametrize("takes_partial", [True, False])
@pytest.mark.parametrize("hosts", [1, 2])
def test_checksums_left_to_the_device(
    make: MakeSwitch, stack: ExitStack, takes_partial: bool, hosts: int
) -> None:
    """A UDP checksum that the sending guest left undone is carried on, or done for a guest that needs it."""
    one, two = pair(make, stack) if hosts == 2 else (make(1),) * 2
    one.network()
    a = stack.enter_context(one.guest(1, A))
    b = stack.enter_context(two.guest(2, B, device=~0 if takes_partial else ~2))
    payload = b"odd length!"
    pseudo = bytes([10, 0, 0, 1, 10, 0, 0, 2]) + struct.pack(">HH", 17, 8 + len(payload))
    udp = struct.pack(">HHHH", 1000, 2000, 8 + len(payload), internet_sum(pseudo)) + payload
    ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0) + pseudo[:8]
    frame = B + A + b"\x08\x00" + ip + udp
    a.send(frame, header=struct.pack("<BBHHHHH", 1, 0, 0, 0, 34, 6, 0))
    deadline = time.monotonic() + 10
    while (got := b.poll()) is None and time.monotonic() < deadline:
        time.sleep(0.001)
    assert got is not None
    header, received = got
    flags, _, _, _, start, offset, buffers = struct.unpack("<BBHHHHH", header)
    assert buffers == 1
    if takes_partial:
        assert (flags, start, offset) == (1, 34, 6)
        assert received == frame
    else:
        assert flags == 0
        assert internet_sum(pseudo + received[34:]) == 0xFFFF
        assert received[:40] == frame[:40]


@pytest.mark.parametrize("mtu", [576, 1280])
def test_fragments_for_a_small_path(make: MakeSwitch, stack: ExitStack, mtu: int) -> None:
    one, two = pair(make, stack, mtu)
    a, b = guests(one, two, stack)
    sizes = [60, 500, 520, 1000, 1200, 1280, 1514, 61]
    for n, size in enumerate(sizes):
        a.send(numbered(B, A, n, size))
    assert [(number_of(f), len(f)) for f in b.receive_all(len(sizes))] == list(enumerate(sizes))
    counters = two.peer_counters(1)
    assert counters["fragments_rx"] >= 4
    assert counters["malformed"] == counters["reassembly_failed"] == 0
    assert one.peer_counters(2)["fragments_tx"] == counters["fragments_rx"]


def test_rekey_under_traffic(make: MakeSwitch, stack: ExitStack) -> None:
    one, two = pair(make, stack)
    a, b = guests(one, two, stack)
    received = []
    for n in range(600):
        a.send(numbered(B, A, n))
        if n % 40 == 0:
            rekey(two, one)
        while (got := b.poll()) is not None:
            received.append(number_of(got[1]))
    while len(received) < 600:
        received.append(number_of(b.receive()))
    assert received == list(range(600))
    counters = two.peer_counters(1)
    assert counters["bad_auth"] == counters["replayed"] == 0
    assert two.counters()["strangers"] == 0


def test_an_old_key_ends(make: MakeSwitch, stack: ExitStack) -> None:
    """The key before last is refused two seconds after the last one was used."""
    one, two = pair(make, stack)
    a, b = guests(one, two, stack)
    key, key_id = b"k" * 32, 4242
    two.call("peer_receive_key", peer=1, identity=one.identity, key_id=key_id, key=key)
    target: dict[str, Any] = {"peer": 2, "identity": two.identity, "address": "127.0.0.1", "port": two.port}
    one.call("peer_set", **target, key_id=key_id, key=key)
    a.send(numbered(B, A, 1))
    b.receive()
    rekey(two, one)
    a.send(numbered(B, A, 2))
    b.receive()
    with pytest.raises(HelperFailure, match="taken"):
        two.call("peer_receive_key", peer=1, identity=one.identity, key_id=key_id, key=key)
    deadline = time.monotonic() + 20
    while True:  # the number is free again once the old key is gone
        try:
            two.call("peer_receive_key", peer=1, identity=one.identity, key_id=key_id, key=b"n" * 32)
            break
        except HelperFailure:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_a_lease_that_ended_stops_output(make: MakeSwitch, stack: ExitStack) -> None:
    switch = make(1)
    switch.network()
    path = switch.directory / "bound"
    switch.call(
        "port_add", port=1, network=NETWORK, mac=A, socket=str(path), mtu=1400, epoch=1, state="running",
        lease_bound=True,
    )  # fmt: skip
    a = stack.enter_context(NetDriver(path, A))
    b = stack.enter_context(switch.guest(2, B))
    now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    switch.call("lease", deadline_ns=now + 10**12)
    a.send(numbered(B, A, 1))
    assert number_of(b.receive()) == 1
    switch.call("lease", deadline_ns=now)
    a.send(numbered(B, A, 2))
    switch.wait_port(1, lambda p: p["tx_fenced"] == 1)
    b.send(numbered(BROADCAST, B, 3))
    assert number_of(a.receive()) == 3, "a frozen guest may be sent to"
    switch.call("lease", deadline_ns=now + 10**12)
    a.send(numbered(B, A, 4))
    assert number_of(b.receive()) == 4


def test_a_slow_guest_gets_its_frames_later(make: MakeSwitch, stack: ExitStack) -> None:
    """More frames than it has buffers wait in the switch, up to a bound."""
    switch = make(1)
    switch.network()
    a, b = (stack.enter_context(switch.guest(i, mac(i))) for i in (1, 2))
    for n in range(600):
        a.send(numbered(B, A, n))
    switch.wait_port(1, lambda p: p["tx_frames"] == 600)
    assert switch.port_counters(2)["backlog"] == 600 - 256
    assert [number_of(f) for f in b.receive_all(600)] == list(range(600))
    for n in range(2500):
        a.send(numbered(B, A, n, 1500))
    switch.wait_port(1, lambda p: p["tx_frames"] == 3100)
    assert switch.port_counters(2)["rx_dropped"] > 0


def test_wrong_requests(make: MakeSwitch) -> None:
    switch = make(1)
    switch.network()
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("peer_set", {"peer": 0, "identity": 1, "address": "::1", "port": 1, "key_id": 1, "key": b"k" * 32}),
        (
            "peer_set",
            {"peer": 1, "identity": 1, "address": "here", "port": 1, "key_id": 1, "key": b"k" * 32},
        ),
        ("peer_set", {"peer": 1, "identity": 1, "address": "::1", "port": 1, "key_id": 1, "key": b"short"}),
        ("network_set", {"network": 1 << 24, "peers": []}),
        ("network_set", {"network": 1, "peers": [5]}),
        ("network_remove", {"network": 99}),
        ("port_remove", {"port": 3}),
        ("hold", {"port": 3}),
        ("mac_set", {"network": NETWORK, "mac": b"short", "peer": 0, "epoch": 1}),
        ("mac_set", {"network": NETWORK, "mac": A, "peer": 9, "epoch": 1}),
        ("mac_next", {"network": NETWORK, "mac": A, "peer": 0, "epoch": 2}),
        ("impair", {"port": 3, "delay": 5}),
    ]
    for op, arguments in wrong:
        with pytest.raises(HelperFailure):
            switch.call(op, **arguments)
    switch.add_port(3, A)
    refused: list[dict[str, Any]] = [{"port": 3, "loss_ppm": 2_000_000}, {"port": 3, "colour": 1}]
    for arguments in refused:
        with pytest.raises(HelperFailure):
            switch.call("impair", **arguments)
    with pytest.raises(HelperFailure, match="there already"):
        switch.add_port(4, A)
    with pytest.raises(HelperFailure, match="still has ports"):
        switch.call("network_remove", network=NETWORK)
    switch.call("port_remove", port=3)
    switch.call("network_remove", network=NETWORK)
    assert switch.status()["ports"] == 0


def test_an_epoch_is_never_lowered(make: MakeSwitch) -> None:
    one, two = make(1), make(2)
    mesh(one, two)
    one.mac_set(B, peer=2, epoch=5)
    one.mac_set(B, peer=0, epoch=4)
    entry = next(m for m in one.counters()["macs"] if m["mac"] == B)
    assert (entry["peer"], entry["epoch"]) == (2, 5)
    with pytest.raises(HelperFailure, match="newer epoch"):
        one.add_port(1, B, epoch=4)


def test_ethertype_is_not_looked_at(make: MakeSwitch, stack: ExitStack) -> None:
    switch = make(1)
    switch.network()
    a, b = (stack.enter_context(switch.guest(i, mac(i))) for i in (1, 2))
    frame = B + A + b"\x81\x00\x00\x05" + ETHERTYPE + bytes(1500)
    a.send(frame)
    assert b.receive() == frame
