# SPDX-License-Identifier: Apache-2.0
"""`mobi-helper disk` as a guest and as its controller see it: real process, real rings, real files."""

from __future__ import annotations

import mmap
import os
import random
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helperclient import HelperFailure, HelperProcess
from tests.vhost import (
    F_EVENT_IDX,
    F_PROTOCOL_FEATURES,
    F_VERSION_1,
    BlockDriver,
    BlockError,
    FrontEnd,
)

BLOCK = 4096
SIZE = 1 << 20


def random_bytes(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base"
    path.write_bytes(random_bytes(1, SIZE))
    return path


class Disk:
    """Starts disk processes over one overlay, and guests on them."""

    def __init__(self, binary: Path, sockets: Path, *arguments: str | Path) -> None:
        self.binary = binary
        self.sockets = sockets
        self.socket = sockets / "blk"
        self.arguments = arguments

    def start(self) -> HelperProcess:
        return HelperProcess(
            self.binary, "disk", "--socket", self.socket, *self.arguments, control=self.sockets / "control"
        )


@pytest.fixture
def disk(helper_binary: Path, socket_dir: Path, base: Path, tmp_path: Path) -> Disk:
    return Disk(helper_binary, socket_dir, "--base", base, "--overlay", tmp_path / "overlay")


@pytest.fixture
def running(disk: Disk) -> Iterator[HelperProcess]:
    with disk.start() as process:
        yield process


def run_wrong(binary: Path, *arguments: str | Path) -> str:
    """Runs a command line that must be refused with one line and status 2; returns the line."""
    result = subprocess.run(
        [binary, "disk", *map(str, arguments)], capture_output=True, text=True, timeout=20, check=False
    )
    assert result.returncode == 2, result
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def test_reads_base_and_own_writes(disk: Disk, running: HelperProcess, base: Path) -> None:
    expected = bytearray(base.read_bytes())
    with FrontEnd(disk.socket) as vm:
        driver = BlockDriver(vm)
        assert driver.capacity == SIZE
        assert driver.read(0, 64 * 1024) == expected[: 64 * 1024]
        # Unaligned at both ends, so that two blocks are copied up.
        data = random_bytes(2, 3 * BLOCK)
        expected[512 * 3 : 512 * 3 + len(data)] = data
        driver.write(512 * 3, data)
        driver.write(8 * BLOCK + 512, b"y" * 512)
        expected[8 * BLOCK + 512 : 8 * BLOCK + 1024] = b"y" * 512
        driver.flush()
        assert (
            b"".join(driver.read(at, 128 * 1024, pieces=5) for at in range(0, SIZE, 128 * 1024)) == expected
        )
        assert driver.identity().startswith(b"mobitopolo")
    status = running.status()
    assert (status["allocated"], status["writes"], status["flushes"]) == (5, 2, 1)
    assert base.read_bytes() == random_bytes(1, SIZE), "the base must never change"


@pytest.mark.parametrize("features", [F_VERSION_1, F_VERSION_1 | F_PROTOCOL_FEATURES | F_EVENT_IDX])
def test_ring_features(disk: Disk, running: HelperProcess, features: int) -> None:
    """Event index; a front end without protocol features; more requests than the ring has entries."""
    with FrontEnd(disk.socket, features=features, queue_size=16) as vm:
        driver = BlockDriver(vm)
        for i in range(100):
            driver.write((i % 7) * BLOCK, bytes([i]) * BLOCK)
            assert driver.read((i % 7) * BLOCK, BLOCK) == bytes([i]) * BLOCK


def test_indirect_descriptors(disk: Disk, running: HelperProcess) -> None:
    with FrontEnd(disk.socket) as vm:
        driver = BlockDriver(vm, indirect=True)
        driver.write(0, b"i" * BLOCK)
        assert driver.read(0, BLOCK, pieces=64) == b"i" * BLOCK


def test_zeroes_and_discards(disk: Disk, running: HelperProcess, base: Path) -> None:
    expected = bytearray(base.read_bytes())
    with FrontEnd(disk.socket) as vm:
        driver = BlockDriver(vm)
        for kind, flags, at in (
            (driver.WRITE_ZEROES, 0, 0),
            (driver.WRITE_ZEROES, 1, 64),
            (driver.DISCARD, 0, 128),
        ):
            begin, length = at * BLOCK + 512, 5 * BLOCK
            driver.zero(begin, length, kind=kind, flags=flags)
            expected[begin : begin + length] = bytes(length)
        assert b"".join(driver.read(at, 128 * 1024) for at in range(0, SIZE, 128 * 1024)) == expected
        with pytest.raises(BlockError):
            driver.zero(SIZE - 512, 1024)


def test_wrong_requests_fail_alone(disk: Disk, running: HelperProcess) -> None:
    with FrontEnd(disk.socket) as vm:
        driver = BlockDriver(vm)
        for offset, length in ((SIZE, 512), (SIZE - 512, 1024), (1 << 62, 512), (0, 100)):
            with pytest.raises(BlockError):
                driver.write(offset, b"z" * length)
        with pytest.raises(BlockError):
            driver.finish(driver.begin(99, 0))
        driver.write(0, b"a" * 512)
        assert driver.read(0, 512) == b"a" * 512


def test_barrier_and_restart(disk: Disk, running: HelperProcess) -> None:
    """After GET_VRING_BASE nothing happens; the queue goes on where it stopped, also in a new guest."""
    with FrontEnd(disk.socket) as vm:
        driver = BlockDriver(vm)
        for i in range(5):
            driver.write(i * BLOCK, b"b" * BLOCK)
        assert vm.stop_queue(driver.queue) == 5
        places = driver.begin(driver.IN, 0, into=[512])
        with pytest.raises(TimeoutError):
            driver.queue.wait(0.3)
        vm.start([5])
        assert driver.finish(places) == 512
        memory = os.dup(vm.memory_fd)
    with FrontEnd(disk.socket, memory_fd=memory, bases=[6]) as vm:
        driver = BlockDriver(vm)
        assert driver.queue.seen_used == 6
        assert driver.read(0, BLOCK) == b"b" * BLOCK
    os.close(memory)


def test_killed_and_restarted(disk: Disk) -> None:
    """kill -9 loses nothing, synced or not; the guest goes on from its used index."""
    with disk.start() as process, FrontEnd(disk.socket) as vm:
        driver = BlockDriver(vm)
        driver.write(0, b"s" * BLOCK)
        driver.flush()
        driver.write(7 * BLOCK, b"u" * BLOCK)
        memory = os.dup(vm.memory_fd)
        process.process.kill()
        process.process.wait(10)
    with disk.start() as process, FrontEnd(disk.socket, memory_fd=memory, bases=[3]) as vm:
        driver = BlockDriver(vm)
        assert process.status()["allocated"] == 2
        assert driver.read(0, BLOCK) == b"s" * BLOCK
        assert driver.read(7 * BLOCK, BLOCK) == b"u" * BLOCK
    os.close(memory)


def test_power_loss_keeps_what_was_synced(disk: Disk, tmp_path: Path, base: Path) -> None:
    """Another boot believes the map of the last sync only."""
    with disk.start() as process, FrontEnd(disk.socket) as vm:
        driver = BlockDriver(vm)
        driver.write(0, b"s" * BLOCK)
        driver.flush()
        driver.write(7 * BLOCK, b"u" * BLOCK)
        process.process.kill()
        process.process.wait(10)
    with (tmp_path / "overlay").open("r+b") as file:
        file.seek(64)
        assert file.read(36) == Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
        file.seek(64)
        file.write(b"0" * 36)
    with disk.start(), FrontEnd(disk.socket) as vm:
        driver = BlockDriver(vm)
        assert driver.read(0, BLOCK) == b"s" * BLOCK
        assert driver.read(7 * BLOCK, BLOCK) == base.read_bytes()[7 * BLOCK : 8 * BLOCK]


def test_maps_are_shared(disk: Disk, running: HelperProcess) -> None:
    """What a copier does: at the source read dirty blocks, at the destination write and set bits."""
    reply, fds = running.call("share")
    overlay, maps_fd = fds
    assert (reply["size"], reply["block_size"], reply["blocks"]) == (SIZE, BLOCK, SIZE // BLOCK)
    with mmap.mmap(maps_fd, 0) as maps, FrontEnd(disk.socket) as vm:
        driver = BlockDriver(vm)
        driver.write(3 * BLOCK, b"d" * BLOCK)
        words = SIZE // BLOCK // 64

        def bits(offset: int) -> set[int]:
            value = int.from_bytes(maps[offset : offset + 8 * words], "little")
            return {i for i in range(64 * words) if value >> i & 1}

        assert bits(reply["allocated_offset"]) == {3}
        assert bits(reply["dirty_offset"]) == set(), "not marked before `track`"
        running.call("track", on=True)
        assert bits(reply["dirty_offset"]) == {3}
        maps[reply["dirty_offset"] : reply["dirty_offset"] + 8 * words] = bytes(8 * words)
        driver.write(65 * BLOCK - 512, b"e" * 1024)
        assert bits(reply["dirty_offset"]) == {64, 65}
        assert os.pread(overlay, BLOCK, reply["data_offset"] + 3 * BLOCK) == b"d" * BLOCK
        os.pwrite(overlay, b"p" * BLOCK, reply["data_offset"] + 9 * BLOCK)
        maps[reply["allocated_offset"] + 1] |= 1 << 1
        assert driver.read(9 * BLOCK, BLOCK) == b"p" * BLOCK
        assert running.call("sync")[0]["allocated"] == 4
        running.call("track", on=False)
    for fd in fds:
        os.close(fd)


def test_overlay_is_guarded(disk: Disk, running: HelperProcess, helper_binary: Path, tmp_path: Path) -> None:
    """One user at a time; a restart is possible while the controller still holds the shared descriptor."""
    other = ("--socket", tmp_path / "other", *disk.arguments)
    assert "in use by another process" in run_wrong(helper_binary, *other)
    _, fds = running.call("share")
    running.call("quit")
    running.process.wait(10)
    with disk.start() as again:
        assert again.status()["state"] == "ok"
    for fd in fds:
        os.close(fd)


def test_wrong_overlays_are_refused(helper_binary: Path, disk: Disk, tmp_path: Path, base: Path) -> None:
    overlay = tmp_path / "overlay"
    with disk.start() as process:
        process.call("quit")
        process.process.wait(10)
    good = overlay.read_bytes()

    def refused(*arguments: str | Path) -> str:
        return run_wrong(helper_binary, "--socket", tmp_path / "s", "--overlay", overlay, *arguments)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(random_bytes(3, SIZE))
    assert "overlay of another base" in refused("--base", elsewhere)
    assert "overlay of another base" in refused("--size", "1M")
    assert "not of 2097152" in refused("--base", base, "--size", "2M")
    overlay.write_bytes(good[:8] + struct.pack("<I", 9) + good[12:])
    assert "format version 9" in refused("--base", base)
    overlay.write_bytes(good[:16] + b"\1" + good[17:])
    assert "damaged" in refused("--base", base)
    overlay.write_bytes(b"something else" * 1000)
    assert "not an overlay" in refused("--base", base)
    assert "No such file" in refused("--base", tmp_path / "missing")


def test_wrong_sizes_are_refused(helper_binary: Path, tmp_path: Path, base: Path) -> None:
    common = ("--socket", tmp_path / "s", "--overlay", tmp_path / "new")
    assert "needs a size" in run_wrong(helper_binary, *common)
    assert "smaller than the base" in run_wrong(helper_binary, *common, "--base", base, "--size", "4K")
    assert "64T" in run_wrong(helper_binary, *common, "--size", "1000T")
    assert "size" in run_wrong(helper_binary, *common, "--size", "big")


def test_read_only_and_larger_than_base(
    helper_binary: Path, socket_dir: Path, base: Path, tmp_path: Path
) -> None:
    disk = Disk(helper_binary, socket_dir, "--base", base, "--size", "2M")
    with disk.start() as process, FrontEnd(disk.socket) as vm:
        driver = BlockDriver(vm)
        assert driver.capacity == 2 * SIZE
        assert vm.features >> 5 & 1, "the guest is told that the disk is read-only"
        assert driver.read(SIZE - BLOCK, 2 * BLOCK) == base.read_bytes()[-BLOCK:] + bytes(BLOCK)
        with pytest.raises(BlockError):
            driver.write(0, b"x" * 512)
        for op in ("share", "sync"):
            with pytest.raises(HelperFailure, match="bad-state"):
                process.call(op)


def test_second_front_end_waits(disk: Disk, running: HelperProcess) -> None:
    """Two guests never write to one disk at the same time."""
    with FrontEnd(disk.socket) as vm:
        with pytest.raises(TimeoutError):
            FrontEnd(disk.socket, timeout=0.3)
        BlockDriver(vm).write(0, b"1" * 512)
    with FrontEnd(disk.socket) as vm:
        assert BlockDriver(vm).read(0, 512) == b"1" * 512
