# SPDX-License-Identifier: Apache-2.0
"""Guests and hosts that misbehave: random rings, random requests, memory that vanishes, no space.

Whatever a guest does, the process lives, serves the next guest rightly, and has not touched a byte outside of
the memory it was given. Run it with a helper built with sanitizers (`MOBI_HELPER`) to see more than crashes.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.helperclient import HelperProcess
from tests.vhost import (
    DESC_INDIRECT,
    DESC_NEXT,
    DESC_WRITE,
    GET_CONFIG,
    GET_FEATURES,
    GUEST_BASE,
    SET_CONFIG,
    SET_FEATURES,
    SET_MEM_TABLE,
    SET_VRING_ADDR,
    SET_VRING_BASE,
    SET_VRING_CALL,
    SET_VRING_ENABLE,
    SET_VRING_KICK,
    SET_VRING_NUM,
    USER_BASE,
    BlockDriver,
    FrontEnd,
    Queue,
    Refused,
)

SIZE = 1 << 20
BLOCK = 4096
MEMORY = 1 << 20
FENCE = 64 * 1024
"""Bytes at both ends of guest memory that the back end is not given."""


def start(binary: Path, sockets: Path, overlay: Path) -> HelperProcess:
    arguments = ("--socket", sockets / "blk", "--overlay", overlay, "--size", str(SIZE))
    return HelperProcess(binary, "disk", *arguments, control=sockets / "control")


def check_served(socket: Path) -> None:
    """A guest that keeps the rules is served as if nothing had happened."""
    with FrontEnd(socket) as vm:
        driver = BlockDriver(vm)
        driver.write(SIZE - BLOCK, b"good" * 1024)
        assert driver.read(SIZE - BLOCK, BLOCK) == b"good" * 1024


class Hostile:
    """Fills a queue with rubbish that is near enough to the truth to get past the first checks."""

    def __init__(self, vm: FrontEnd, seed: int) -> None:
        self.vm = vm
        self.random = random.Random(seed)

    def address(self) -> int:
        pick = self.random.random()
        if pick < 0.7:
            return GUEST_BASE + self.random.randrange(MEMORY)
        if pick < 0.9:
            edge = self.random.choice([0, FENCE, MEMORY - FENCE, MEMORY])
            return GUEST_BASE + edge + self.random.randrange(-64, 64)
        return self.random.choice([0, (1 << 64) - 1, self.random.getrandbits(64)])

    def length(self) -> int:
        return self.random.choice(
            [0, 1, 15, 16, 17, 512, BLOCK, 16 * self.random.randrange(1200), self.random.getrandbits(32)]
        )

    def descriptor(self, table: int) -> bytes:
        flags = self.random.choice([0, DESC_NEXT, DESC_WRITE, DESC_NEXT | DESC_WRITE, DESC_INDIRECT])
        if self.random.random() < 0.1:
            flags = self.random.getrandbits(16)
        following = (
            self.random.randrange(table + 2) if self.random.random() < 0.95 else self.random.getrandbits(16)
        )
        return struct.pack("<QIHH", self.address(), self.length(), flags, following)

    def round(self, queue: Queue) -> None:
        """Rubbish in memory, tables and rings, then a kick and the barrier."""
        memory, table = self.vm.memory, queue.size
        for _ in range(20):
            at = self.random.randrange(FENCE + queue.used + 4096, MEMORY - FENCE - 4096)
            kind = self.random.choice([0, 1, 4, 8, 11, 13, 99])
            memory[at : at + 16] = struct.pack("<IIQ", kind, 0, self.random.choice([0, 1, 7, 1 << 60]))
        for i in range(table):
            at = FENCE + queue.desc + 16 * i
            memory[at : at + 16] = self.descriptor(table)
        ahead = self.random.choice([1, 3, table, table + 1, self.random.getrandbits(16)])
        at = FENCE + queue.avail
        index = struct.unpack_from("<H", memory, at + 2)[0]
        for i in range(table):
            head = self.random.randrange(table + 1) if self.random.random() < 0.9 else 0xFFFF
            struct.pack_into("<H", memory, at + 4 + 2 * i, head)
        struct.pack_into("<H", memory, at + 2, (index + ahead) & 0xFFFF)
        os.eventfd_write(queue.kick, 1)
        # Whatever is ready together with this question has been looked at when the barrier is asked for.
        self.vm.ask_number(GET_FEATURES)
        self.vm.stop_queue(queue)


@pytest.mark.parametrize("seed", range(8))
def test_random_rings(helper_binary: Path, socket_dir: Path, tmp_path: Path, seed: int) -> None:
    with start(helper_binary, socket_dir, tmp_path / "overlay") as process:
        with FrontEnd(socket_dir / "blk", queue_size=16, size=MEMORY, start=False) as vm:
            vm.negotiate()
            region = (GUEST_BASE + FENCE, MEMORY - 2 * FENCE, USER_BASE, FENCE)
            vm.share_memory([region])
            hostile = Hostile(vm, seed)
            fence = hostile.random.randbytes(FENCE)
            vm.memory[:FENCE] = vm.memory[-FENCE:] = fence
            for _ in range(60):
                offered = struct.unpack_from("<H", vm.memory, FENCE + vm.queues[0].avail + 2)[0]
                vm.start_queue(vm.queues[0], offered)
                hostile.round(vm.queues[0])
            assert vm.memory[:FENCE] == fence
            assert vm.memory[-FENCE:] == fence
        check_served(socket_dir / "blk")
        assert process.process.poll() is None


REQUESTS = (
    SET_FEATURES,
    SET_MEM_TABLE,
    SET_VRING_NUM,
    SET_VRING_ADDR,
    SET_VRING_BASE,
    SET_VRING_KICK,
    SET_VRING_CALL,
    SET_VRING_ENABLE,
    GET_CONFIG,
    SET_CONFIG,
)


def random_request(chance: random.Random, vm: FrontEnd) -> tuple[int, bytes, list[int]]:
    """A message of a front end with one or several things wrong, or none."""
    number = chance.choice([0, 1, 2, 255, 256, 1 << 32, chance.getrandbits(64)])
    word = chance.choice([0, 1, 3, 16, 1024, 65536, chance.getrandbits(32)])
    kind = chance.choice([*REQUESTS, chance.randrange(50)])
    count = chance.choice([0, 1, 2, 8, 9])
    payload = {
        SET_FEATURES: struct.pack("<Q", number),
        SET_MEM_TABLE: struct.pack("<II", count, 0)
        + b"".join(
            struct.pack("<4Q", *(chance.choice([0, BLOCK, number]) for _ in range(4))) for _ in range(count)
        ),
        SET_VRING_ADDR: struct.pack("<II", 0, 0)
        + struct.pack("<4Q", *(chance.choice([USER_BASE + 8 * word, number]) for _ in range(4))),
        SET_VRING_KICK: struct.pack("<Q", number),
        SET_VRING_CALL: struct.pack("<Q", number),
        GET_CONFIG: struct.pack("<III", word, word, 0) + bytes(min(word, 200)),
        SET_CONFIG: struct.pack("<III", word, word, 0) + bytes(min(word, 200)),
    }.get(kind, struct.pack("<II", number & 1, word))
    if chance.random() < 0.1:
        payload = payload[: chance.randrange(len(payload) + 1)]
    files = [vm.memory_fd, vm.queues[0].kick, vm.queues[0].call_remote.fileno()]
    fds = [chance.choice(files) for _ in range(chance.choice([0, 1, 1, count]))]
    return kind, payload, fds


@pytest.mark.parametrize("seed", range(8))
def test_random_requests(helper_binary: Path, socket_dir: Path, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    with start(helper_binary, socket_dir, tmp_path / "overlay") as process:
        for _ in range(15):
            with FrontEnd(socket_dir / "blk", start=chance.random() < 0.7) as vm:
                vm.socket.settimeout(0.05)
                with suppress(EOFError, BrokenPipeError, ConnectionResetError):
                    for _ in range(30):
                        kind, payload, fds = random_request(chance, vm)
                        vm.send(kind, payload, fds, chance.choice([1, 1, 9, chance.getrandbits(32)]))
                        os.eventfd_write(vm.queues[0].kick, 1)
                        with suppress(TimeoutError, BlockingIOError):
                            if not vm.socket.recv(4096):
                                break
        check_served(socket_dir / "blk")
        assert process.process.poll() is None


def test_memory_that_vanishes(helper_binary: Path, socket_dir: Path, tmp_path: Path) -> None:
    """A guest that shortens its memory file harms itself only."""
    with start(helper_binary, socket_dir, tmp_path / "overlay") as process:
        with FrontEnd(socket_dir / "blk") as vm:
            BlockDriver(vm).write(0, b"x" * BLOCK)
            os.ftruncate(vm.memory_fd, 0)
            os.eventfd_write(vm.queues[0].kick, 1)
            vm.stop_queue(vm.queues[0])
        check_served(socket_dir / "blk")
        assert process.process.poll() is None


def test_refused_settings(helper_binary: Path, socket_dir: Path, tmp_path: Path) -> None:
    """With acknowledgements, each wrong order is refused by itself and the connection goes on."""
    with start(helper_binary, socket_dir, tmp_path / "overlay"), FrontEnd(socket_dir / "blk") as vm:
        for request, payload in (
            (SET_VRING_NUM, struct.pack("<II", 0, 100)),
            (SET_VRING_NUM, struct.pack("<II", 9, 128)),
            (SET_VRING_BASE, struct.pack("<II", 0, 7)),
            (SET_FEATURES, struct.pack("<Q", 1 << 60)),
            (SET_VRING_ADDR, struct.pack("<II4Q", 0, 0, 1, 2, 3, 4)),
        ):
            with pytest.raises(Refused):
                vm.order(request, payload)
        vm.stop_queue(vm.queues[0])
        vm.start([0])
        assert BlockDriver(vm).read(0, 512) == bytes(512)


def fill(driver: BlockDriver) -> int:
    """Writes block after block until one is not answered; returns its number."""
    for block in range(SIZE // BLOCK):
        try:
            driver.write(block * BLOCK, bytes([block]) * BLOCK, timeout=0.5)
        except TimeoutError:
            return block
    raise AssertionError("there was room for everything")


def test_no_space_holds_the_guest(helper_binary: Path, socket_dir: Path) -> None:
    """On a full disk the guest waits, and nothing is lost once there is room."""
    if shutil.which("unshare") is None:
        pytest.skip("unshare is missing (apt-get install util-linux)")
    small = socket_dir / "small"
    small.mkdir()
    script = 'mount -t tmpfs -o size=600k none "$0" && head -c 400000 /dev/zero > "$0/ballast" && exec "$@"'
    wrapper = socket_dir / "wrapper"
    wrapper.write_text(f"#!/bin/sh\nexec unshare -Urm sh -c '{script}' {small} {helper_binary} \"$@\"\n")
    wrapper.chmod(0o755)
    probe = subprocess.run(["unshare", "-Urm", "mount", "-t", "tmpfs", "none", str(small)], check=False)
    if probe.returncode != 0:
        pytest.skip("this host does not allow user namespaces with mounts")
    with start(wrapper, socket_dir, small / "overlay") as process, FrontEnd(socket_dir / "blk") as vm:
        driver = BlockDriver(vm)
        written = fill(driver)
        assert process.wait_event("state")["state"] == "no-space"
        status = process.status()
        assert status["state"] == "no-space"
        assert "No space left" in status["message"]
        assert status["writes"] == written
        Path(f"/proc/{process.process.pid}/root{small}/ballast").unlink()
        head, length = driver.queue.wait(timeout=15)
        assert (head, length) == (0, 1)
        assert process.wait_event("state")["state"] == "ok"
        driver.flush()
        for i in range(written + 1):
            assert driver.read(i * BLOCK, BLOCK) == bytes([i]) * BLOCK
        assert process.status()["state"] == "ok"


def test_serves_within_bounded_time_for_ever(helper_binary: Path, socket_dir: Path, tmp_path: Path) -> None:
    """A guest that kicks without pause does not keep the controller from being answered."""
    with (
        start(helper_binary, socket_dir, tmp_path / "overlay") as process,
        FrontEnd(socket_dir / "blk") as vm,
    ):
        end = time.monotonic() + 0.5
        answers = 0
        while time.monotonic() < end:
            os.eventfd_write(vm.queues[0].kick, 1)
            vm.queues[0].offer(0)
            process.status()
            answers += 1
        assert answers > 3
