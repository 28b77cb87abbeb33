# SPDX-License-Identifier: Apache-2.0
"""A vhost-user *front end* for tests: the part of a virtual machine monitor that our back ends talk to.

It shares a memfd as guest memory, keeps split virtqueues in it (virtio 1.2, section 2.7) and sends real
requests, as a guest's driver would. Addresses of guest memory are made up on purpose: guest physical ones
begin at `GUEST_BASE`, those of ring tables at `USER_BASE`, so that a back end that mixes them up fails.
All that a guest may write can be written wrong too: `write_desc`, `offer` and `memory` are open to a test
that plays a hostile guest.

    with FrontEnd(path) as vm:
        disk = BlockDriver(vm)
        disk.write(0, b"x" * 4096)
        assert disk.read(0, 4096) == b"x" * 4096

Every wait has a deadline (`TimeoutError`); a reply that says no is a `Refused`.
"""

from __future__ import annotations

import array
import contextlib
import mmap
import os
import select
import socket
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

GUEST_BASE = 0x1_0000_0000
USER_BASE = 0x7F00_0000_0000
RING_SPACE = 64 * 1024

GET_FEATURES, SET_FEATURES, SET_OWNER, SET_MEM_TABLE = 1, 2, 3, 5
SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE, GET_VRING_BASE = 8, 9, 10, 11
SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR = 12, 13, 14
GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, GET_QUEUE_NUM, SET_VRING_ENABLE = 15, 16, 17, 18
GET_CONFIG, SET_CONFIG = 24, 25

F_PROTOCOL_FEATURES = 1 << 30
F_VERSION_1 = 1 << 32
F_INDIRECT = 1 << 28
F_EVENT_IDX = 1 << 29
PROTOCOL_REPLY_ACK = 1 << 3

DESC_NEXT, DESC_WRITE, DESC_INDIRECT = 1, 2, 4


class Refused(Exception):
    """The back end answered a request with an error."""


class Queue:
    """One virtqueue in the shared memory, seen from the driver."""

    def __init__(self, vm: FrontEnd, index: int, size: int) -> None:
        self.vm = vm
        self.index = index
        self.size = size
        self.desc = index * RING_SPACE
        self.avail = self.desc + 16 * size
        self.used = (self.avail + 6 + 2 * size + 4095) & ~4095
        self.seen_used = 0
        self.kick = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # As UML does it: the call descriptor is one end of a stream socket.
        self.call, self.call_remote = socket.socketpair()
        self.call.setblocking(False)

    def close(self) -> None:
        os.close(self.kick)
        self.call.close()
        self.call_remote.close()

    def u16(self, offset: int) -> int:
        return int.from_bytes(self.vm.memory[offset : offset + 2], "little")

    @property
    def avail_index(self) -> int:
        return self.u16(self.avail + 2)

    @property
    def used_index(self) -> int:
        return self.u16(self.used + 2)

    def write_desc(self, i: int, address: int, length: int, flags: int = 0, following: int = 0) -> None:
        struct.pack_into("<QIHH", self.vm.memory, self.desc + 16 * i, address, length, flags, following)

    def offer(self, head: int, kick: bool = True) -> None:
        """Puts a chain's head into the available ring and, if asked to, tells the device."""
        index = self.avail_index
        struct.pack_into("<H", self.vm.memory, self.avail + 4 + 2 * (index % self.size), head)
        # Not by pack_into(), which clears first: the device would see the index jump to 0 and back.
        self.vm.memory[self.avail + 2 : self.avail + 4] = ((index + 1) & 0xFFFF).to_bytes(2, "little")
        if kick:
            os.eventfd_write(self.kick, 1)

    def collect(self) -> tuple[int, int] | None:
        """The next used entry `(head, bytes written)` if there is one."""
        if self.used_index == self.seen_used:
            return None
        at = self.used + 4 + 8 * (self.seen_used % self.size)
        head, written = struct.unpack_from("<II", self.vm.memory, at)
        self.seen_used = (self.seen_used + 1) & 0xFFFF
        if self.vm.features & F_EVENT_IDX:
            struct.pack_into("<H", self.vm.memory, self.avail + 4 + 2 * self.size, self.seen_used)
        return head, written

    def wait(self, timeout: float = 10.0) -> tuple[int, int]:
        """Waits for a notification as a driver does, never by polling alone."""
        deadline = time.monotonic() + timeout
        while (entry := self.collect()) is None:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.call], [], [], left)[0]:
                raise TimeoutError(f"queue {self.index}: nothing was completed in {timeout} s")
            if not self.call.recv(4096):
                raise EOFError("the back end closed the call descriptor")
        return entry


class FrontEnd:
    """A connection to a back end with `queues` running queues; memory is `size` bytes."""

    def __init__(
        self,
        path: Path | str,
        *,
        queues: int = 1,
        queue_size: int = 256,
        size: int = 8 << 20,
        features: int = F_VERSION_1 | F_PROTOCOL_FEATURES | F_INDIRECT,
        bases: Sequence[int] | None = None,
        memory_fd: int | None = None,
        timeout: float = 10.0,
        start: bool = True,
    ) -> None:
        self.memory_fd = os.dup(memory_fd) if memory_fd is not None else os.memfd_create("guest")
        if memory_fd is None:
            os.ftruncate(self.memory_fd, size)
        self.memory = mmap.mmap(self.memory_fd, size)
        self.size = size
        self.acknowledged = False
        self.queues = [Queue(self, i, queue_size) for i in range(queues)]
        self.data = queues * RING_SPACE
        self.socket = self._connect(path, timeout)
        try:
            self.socket.settimeout(timeout)
            self.offered = self.ask_number(GET_FEATURES)
            # Bits of the device itself are taken as offered, those of rings and transport as asked for.
            self.features = features & self.offered | self.offered & ((1 << 24) - 1)
            if start:
                self.negotiate()
                self.start(bases or [0] * queues)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _connect(path: Path | str, timeout: float) -> socket.socket:
        deadline = time.monotonic() + timeout
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.connect(str(path))
                return connection
            except (FileNotFoundError, ConnectionRefusedError):
                connection.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def close(self) -> None:
        self.socket.close()
        for queue in self.queues:
            queue.close()
        with contextlib.suppress(BufferError):
            self.memory.close()
        os.close(self.memory_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 1) -> None:
        message = struct.pack("<III", request, flags, len(payload)) + payload
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.socket.sendmsg([message], rights)

    def receive(self, request: int) -> bytes:
        header = self._exactly(12)
        got, flags, size = struct.unpack("<III", header)
        assert got == request, f"a reply to {got}, {request} was awaited"
        assert flags & 7 == 5, f"flags {flags:x} of a reply"
        return self._exactly(size)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self.socket.recv(size - len(data))
            if not piece:
                raise EOFError("the back end closed the connection")
            data += piece
        return data

    def ask(self, request: int, payload: bytes = b"") -> bytes:
        self.send(request, payload)
        return self.receive(request)

    def ask_number(self, request: int) -> int:
        return int(struct.unpack("<Q", self.ask(request))[0])

    def order(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """A request without an answer of its own: acknowledged if that was negotiated."""
        self.send(request, payload, fds, 1 | (8 if self.acknowledged else 0))
        if self.acknowledged and struct.unpack("<Q", self.receive(request))[0]:
            raise Refused(f"request {request}")

    def negotiate(self) -> None:
        self.order(SET_OWNER)
        self.order(SET_FEATURES, struct.pack("<Q", self.features))
        if self.features & F_PROTOCOL_FEATURES:
            protocol = self.ask_number(GET_PROTOCOL_FEATURES)
            self.order(SET_PROTOCOL_FEATURES, struct.pack("<Q", protocol))
            self.acknowledged = bool(protocol & PROTOCOL_REPLY_ACK)

    def share_memory(self, regions: Sequence[tuple[int, int, int, int]] | None = None) -> None:
        """Regions `(guest address, size, user address, offset in the memfd)`; by default all of memory."""
        regions = regions or [(GUEST_BASE, self.size, USER_BASE, 0)]
        payload = struct.pack("<II", len(regions), 0) + b"".join(struct.pack("<4Q", *r) for r in regions)
        self.order(SET_MEM_TABLE, payload, [self.memory_fd] * len(regions))

    def start_queue(self, queue: Queue, base: int) -> None:
        i = queue.index
        self.order(SET_VRING_CALL, struct.pack("<Q", i), [queue.call_remote.fileno()])
        self.order(SET_VRING_NUM, struct.pack("<II", i, queue.size))
        self.order(SET_VRING_BASE, struct.pack("<II", i, base))
        tables = [USER_BASE + queue.desc, USER_BASE + queue.used, USER_BASE + queue.avail]
        self.order(SET_VRING_ADDR, struct.pack("<II4Q", i, 0, *tables, (1 << 64) - 1))
        self.order(SET_VRING_KICK, struct.pack("<Q", i), [queue.kick])
        if self.features & F_PROTOCOL_FEATURES:
            self.order(SET_VRING_ENABLE, struct.pack("<II", i, 1))

    def start(self, bases: Sequence[int]) -> None:
        self.share_memory()
        for queue, base in zip(self.queues, bases, strict=True):
            queue.seen_used = queue.used_index
            self.start_queue(queue, base)

    def stop_queue(self, queue: Queue) -> int:
        """GET_VRING_BASE: afterwards the device writes nothing more. Returns where it would go on."""
        index, base = struct.unpack("<II", self.ask(GET_VRING_BASE, struct.pack("<II", queue.index, 0)))
        assert index == queue.index
        return int(base)

    def config(self, size: int) -> bytes:
        return self.ask(GET_CONFIG, struct.pack("<III", 0, size, 0) + bytes(size))[12:]

    def submit(
        self, queue: Queue, out: Sequence[bytes], into: Sequence[int], *, indirect: bool = False
    ) -> list[int]:
        """Offers one chain in the first descriptors; returns where the `into` buffers are in memory."""
        table, at, places = [], self.data + 4096, []
        for data in out:
            self.memory[at : at + len(data)] = data
            table.append((GUEST_BASE + at, len(data), 0))
            at += len(data)
        for length in into:
            places.append(at)
            table.append((GUEST_BASE + at, length, DESC_WRITE))
            at += length
        assert at <= self.size, "the request does not fit into guest memory"
        for i, (address, length, flags) in enumerate(table):
            more = DESC_NEXT if i + 1 < len(table) else 0
            if indirect:
                struct.pack_into(
                    "<QIHH", self.memory, self.data + 16 * i, address, length, flags | more, i + 1
                )
            else:
                queue.write_desc(i, address, length, flags | more, i + 1)
        if indirect:
            queue.write_desc(0, GUEST_BASE + self.data, 16 * len(table), DESC_INDIRECT)
        queue.offer(0)
        return places


class BlockError(Exception):
    """A request ended with a status other than OK."""


class BlockDriver:
    """virtio-blk on queue 0: one request at a time."""

    IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13

    def __init__(self, vm: FrontEnd, *, indirect: bool = False) -> None:
        self.vm = vm
        self.queue = vm.queues[0]
        self.indirect = indirect

    @property
    def capacity(self) -> int:
        """Bytes, from the configuration space."""
        return int(struct.unpack("<Q", self.vm.config(8))[0]) * 512

    def begin(self, kind: int, sector: int, out: Sequence[bytes] = (), into: Sequence[int] = ()) -> list[int]:
        header = struct.pack("<IIQ", kind, 0, sector)
        return self.vm.submit(self.queue, [header, *out], [*into, 1], indirect=self.indirect)

    def finish(self, places: list[int], timeout: float = 10.0) -> int:
        """Waits for the request; returns the bytes written before the status."""
        _, written = self.queue.wait(timeout)
        status = self.vm.memory[places[-1]]
        if status:
            raise BlockError(f"status {status}")
        return written - 1

    def read(self, offset: int, length: int, pieces: int = 1) -> bytes:
        sizes = [length // pieces] * (pieces - 1)
        sizes.append(length - sum(sizes))
        places = self.begin(self.IN, offset // 512, into=sizes)
        assert self.finish(places) == length
        return b"".join(self.vm.memory[p : p + n] for p, n in zip(places, sizes, strict=False))

    def write(self, offset: int, data: bytes, timeout: float = 10.0) -> None:
        self.finish(self.begin(self.OUT, offset // 512, [data]), timeout)

    def flush(self) -> None:
        self.finish(self.begin(self.FLUSH, 0))

    def identity(self) -> bytes:
        places = self.begin(self.GET_ID, 0, into=[20])
        self.finish(places)
        return bytes(self.vm.memory[places[0] : places[0] + 20])

    def zero(self, offset: int, length: int, *, kind: int = WRITE_ZEROES, flags: int = 0) -> None:
        self.finish(self.begin(kind, 0, [struct.pack("<QII", offset // 512, length // 512, flags)]))
