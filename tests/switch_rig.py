# SPDX-License-Identifier: Apache-2.0
"""What tests of the switch stand on: guests' network drivers, switch processes, and a path between them.

`NetDriver` plays a guest on a vhost-user port, `SwitchProcess` is a real `mobi-helper switch`, `tie` gives
two of them each other's keys, `Outsider` is a peer in Python that can seal whatever it likes, and `Path` is a
UDP relay with a delay, for paths that are slower than loopback.
"""

from __future__ import annotations

import heapq
import os
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path as FilePath
from typing import Any, Self

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tests.helperclient import HelperProcess
from tests.vhost import DESC_WRITE, F_PROTOCOL_FEATURES, F_VERSION_1, GUEST_BASE, FrontEnd
from tests.waiting import PATIENCE, wait_for

HEADER = 12
SLOT = 2048
RING = 256
NETWORK = 7
BROADCAST = b"\xff" * 6
ETHERTYPE = b"\x88\xb5"  # for local experiments, IEEE 802
DATA, REDIRECTED, MARK = 0, 1, 2
FRAGMENT = 0x10


def mac(n: int) -> bytes:
    return b"\x02\x00\x00\x00" + struct.pack(">H", n)


def numbered(to: bytes, source: bytes, number: int, size: int = 60) -> bytes:
    """A frame with a number to recognize it by."""
    head = to + source + ETHERTYPE + struct.pack(">Q", number)
    return head + b"\xa5" * (size - len(head))


def number_of(frame: bytes) -> int:
    return int(struct.unpack_from(">Q", frame, 14)[0])


class NetDriver:
    """A guest's virtio-net driver: 256 receive buffers always offered, up to 256 frames on their way out."""

    def __init__(self, path: FilePath | str, address: bytes, *, features: int = 0, device: int = ~0) -> None:
        wanted = F_VERSION_1 | F_PROTOCOL_FEATURES | features
        self.vm = FrontEnd(path, queues=2, queue_size=RING, features=wanted, start=False)
        self.vm.features &= device | ~((1 << 24) - 1)
        self.address = address
        self.receiving, self.transmitting = self.vm.queues
        self.free = list(range(RING))
        self.buffers = self.vm.data
        self.slots = self.vm.data + RING * SLOT
        self.vm.negotiate()
        for i in range(RING):
            self.receiving.write_desc(i, GUEST_BASE + self.buffers + i * SLOT, SLOT, DESC_WRITE)
            self.receiving.offer(i, kick=False)
        self.vm.start([0, 0])
        self.closed = False

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.vm.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def freeze(self) -> None:
        """As the guest's kernel does: no frame is written into its memory afterwards."""
        for queue in self.vm.queues:
            self.vm.stop_queue(queue)

    def send(self, *frames: bytes, header: bytes = bytes(HEADER), timeout: float = 10.0) -> None:
        for frame in frames:
            slot = self._slot(timeout)
            at = self.slots + slot * SLOT
            self.vm.memory[at : at + HEADER + len(frame)] = header + frame
            self.transmitting.write_desc(slot, GUEST_BASE + at, HEADER + len(frame))
            self.transmitting.offer(slot, kick=False)
        os.eventfd_write(self.transmitting.kick, 1)

    def _slot(self, timeout: float) -> int:
        while (done := self.transmitting.collect()) is not None:
            self.free.append(done[0])
        if not self.free:
            os.eventfd_write(self.transmitting.kick, 1)
            self.free.append(self.transmitting.wait(timeout)[0])
        return self.free.pop()

    def poll(self) -> tuple[bytes, bytes] | None:
        """`(virtio header, frame)` if one is there."""
        done = self.receiving.collect()
        if done is None:
            return None
        head, written = done
        at = self.buffers + head * SLOT
        data = bytes(self.vm.memory[at : at + written])
        self.receiving.offer(head)
        return data[:HEADER], data[HEADER:]

    def receive(self, timeout: float = 10.0) -> bytes:
        deadline = time.monotonic() + timeout
        while (got := self.poll()) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no frame in {timeout} s")
            time.sleep(0.001)
        return got[1]

    def receive_all(self, count: int, timeout: float = 10.0) -> list[bytes]:
        return [self.receive(timeout) for _ in range(count)]

    def silent(self, seconds: float = 0.1) -> bool:
        """Whether nothing comes for a while; what was to come has passed the switch before when asked after a
        frame that did arrive."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.poll() is not None:
                return False
            time.sleep(0.002)
        return True


class SwitchProcess(HelperProcess):
    """A switch of the peer with this number, listening on loopback."""

    def __init__(
        self, binary: FilePath, directory: FilePath, number: int, address: str = "127.0.0.1"
    ) -> None:
        super().__init__(binary, "switch", control=directory / f"s{number}")
        self.number = number
        self.directory = directory
        self.address = address
        self.identity = 0xABCD_0000_0000 + number
        self.peers: list[int] = []
        self.port = int(self.call("listen", address=address, port=0, identity=self.identity)[0]["port"])

    def network(self, network: int = NETWORK) -> None:
        """Puts all tied peers into the network."""
        self.call("network_set", network=network, peers=self.peers)

    def add_port(
        self, port: int, address: bytes, *, epoch: int = 1, state: str = "running", network: int = NETWORK
    ) -> FilePath:
        path = self.directory / f"v{self.number}-{port}"
        arguments: dict[str, Any] = {"network": network, "mac": address, "socket": str(path), "mtu": 1500}
        self.call("port_add", port=port, epoch=epoch, state=state, **arguments)
        return path

    def guest(self, port: int, address: bytes, **options: Any) -> NetDriver:
        return NetDriver(self.add_port(port, address), address, **options)

    def expect(self, port: int, epoch: int, source: int) -> None:
        arguments: dict[str, Any] = {"port": port, "epoch": epoch, "from": source}
        self.call("expect", **arguments)

    def mac_set(self, address: bytes, peer: int, epoch: int = 1) -> None:
        self.call("mac_set", network=NETWORK, mac=address, peer=peer, epoch=epoch)

    def mac_next(self, address: bytes, peer: int, epoch: int) -> None:
        self.call("mac_next", network=NETWORK, mac=address, peer=peer, epoch=epoch)

    def counters(self) -> dict[str, Any]:
        return self.call("counters")[0]

    def port_counters(self, port: int) -> dict[str, Any]:
        return next(p for p in self.counters()["ports"] if p["port"] == port)

    def peer_counters(self, peer: int) -> dict[str, Any]:
        return next(p for p in self.counters()["peers"] if p["peer"] == peer)

    def wait_port(
        self, port: int, accept: Callable[[dict[str, Any]], bool], timeout: float = PATIENCE
    ) -> None:
        wait_for(lambda: accept(self.port_counters(port)), timeout, lambda: self.port_counters(port))

    def wait_peer(
        self, peer: int, accept: Callable[[dict[str, Any]], bool], timeout: float = PATIENCE
    ) -> None:
        wait_for(lambda: accept(self.peer_counters(peer)), timeout, lambda: self.peer_counters(peer))


MakeSwitch = Callable[..., SwitchProcess]


def rekey(receiver: SwitchProcess, sender: SwitchProcess, mtu: int = 1500, port: int | None = None) -> bytes:
    """A new key for frames from `sender` to `receiver`; first where it is accepted, as mobid does it."""
    key, key_id = secrets.token_bytes(32), secrets.randbits(32)
    receiver.call("peer_receive_key", peer=sender.number, identity=sender.identity, key_id=key_id, key=key)
    sender.call(
        "peer_set",
        peer=receiver.number,
        identity=receiver.identity,
        address=receiver.address,
        port=port or receiver.port,
        key_id=key_id,
        key=key,
        mtu=mtu,
    )
    return key


def tie(a: SwitchProcess, b: SwitchProcess, mtu: int = 1500, path: Path | None = None) -> None:
    """Tunnels both ways; through `path` if given."""
    rekey(a, b, mtu, path.port(b, a) if path else None)
    rekey(b, a, mtu, path.port(a, b) if path else None)
    a.peers.append(b.number)
    b.peers.append(a.number)


def mesh(*switches: SwitchProcess, path: Path | None = None, network: int = NETWORK) -> None:
    """Ties all to all and puts them into one network."""
    for i, a in enumerate(switches):
        for b in switches[i + 1 :]:
            tie(a, b, path=path)
    for switch in switches:
        switch.network(network)


class Outsider:
    """A peer made of Python: it holds real keys of one switch, and seals and opens packets by hand."""

    def __init__(self, switch: SwitchProcess, number: int = 900, *, member: bool = True) -> None:
        self.switch = switch
        self.number = number
        self.identity = 0xFFFF_0000 + number
        self.counter = 0
        self.key, self.key_id = secrets.token_bytes(32), secrets.randbits(32)
        self.my_key, self.my_key_id = secrets.token_bytes(32), secrets.randbits(32)
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.socket.settimeout(10)
        switch.call("peer_receive_key", peer=number, identity=self.identity, key_id=self.key_id, key=self.key)
        switch.call(
            "peer_set",
            peer=number,
            identity=self.identity,
            address="127.0.0.1",
            port=self.socket.getsockname()[1],
            key_id=self.my_key_id,
            key=self.my_key,
        )
        if member:
            switch.peers.append(number)
            switch.network()

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def seal(
        self, plain: bytes, kind: int = DATA, network: int = NETWORK, counter: int | None = None
    ) -> bytes:
        """`plain` is meta and what follows it."""
        if counter is None:
            self.counter += 1
            counter = self.counter
        header = struct.pack(">IIQ", kind << 24 | network, self.key_id, counter)
        return header + AESGCM(self.key).encrypt(b"TUN\0" + struct.pack(">Q", counter), plain, header)

    def send_raw(self, packet: bytes) -> None:
        self.socket.sendto(packet, ("127.0.0.1", self.switch.port))

    def send(self, frame: bytes, meta: bytes = bytes(4), kind: int = DATA, network: int = NETWORK) -> None:
        self.send_raw(self.seal(meta + frame, kind, network))

    def open(self, packet: bytes) -> tuple[int, bytes]:
        """`(type byte, plain)` of a packet the switch sent."""
        first, key_id, counter = struct.unpack_from(">IIQ", packet)
        assert key_id == self.my_key_id
        nonce = b"TUN\0" + struct.pack(">Q", counter)
        return first >> 24, AESGCM(self.my_key).decrypt(nonce, packet[16:], packet[:16])

    def receive(self) -> tuple[int, bytes]:
        return self.open(self.socket.recv(65536))


class Path:
    """Relays datagrams between switches, each after a delay; a thread with one socket per direction.

    `delay` is given in seconds by `set_delay(sender, receiver)`; the order of a direction is kept."""

    def __init__(self) -> None:
        self.delays: dict[int, float] = {}
        self.targets: dict[int, tuple[str, int]] = {}
        self.sockets: dict[int, socket.socket] = {}
        self.ports: dict[tuple[int, int], int] = {}
        self.lossy: Callable[[int, bytes], bool] = lambda _direction, _packet: False
        self.stopped = threading.Event()
        self.thread: threading.Thread | None = None

    def port(self, sender: SwitchProcess, receiver: SwitchProcess) -> int:
        """Where `sender` has to send what is for `receiver`."""
        key = (sender.number, receiver.number)
        if key not in self.ports:
            relay = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            relay.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
            relay.bind(("127.0.0.1", 0))
            relay.setblocking(False)
            number = relay.getsockname()[1]
            self.sockets[number] = relay
            self.targets[number] = (receiver.address, receiver.port)
            self.delays[number] = 0.0
            self.ports[key] = number
        return self.ports[key]

    def set_delay(self, sender: SwitchProcess, receiver: SwitchProcess, seconds: float) -> None:
        self.delays[self.port(sender, receiver)] = seconds

    def __enter__(self) -> Self:
        return self

    def start(self) -> None:
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        if self.thread:
            self.thread.join(10)
        for relay in self.sockets.values():
            relay.close()

    def _arrivals(self, relay: socket.socket) -> Iterator[bytes]:
        for _ in range(64):
            try:
                yield relay.recv(65536)
            except BlockingIOError:
                return

    def _run(self) -> None:
        waiting: list[tuple[float, int, int, bytes]] = []
        order = 0
        last: dict[int, float] = {}
        while not self.stopped.is_set():
            wait = min(max(waiting[0][0] - time.monotonic(), 0), 0.05) if waiting else 0.05
            ready, _, _ = select.select(list(self.sockets.values()), [], [], wait)
            for relay in ready:
                direction = relay.getsockname()[1]
                for packet in self._arrivals(relay):
                    if self.lossy(direction, packet):
                        continue
                    due = max(time.monotonic() + self.delays[direction], last.get(direction, 0.0))
                    last[direction] = due
                    order += 1
                    heapq.heappush(waiting, (due, order, direction, packet))
            while waiting and waiting[0][0] <= time.monotonic():
                _, _, direction, packet = heapq.heappop(waiting)
                self.sockets[direction].sendto(packet, self.targets[direction])
