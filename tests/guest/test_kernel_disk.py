# SPDX-License-Identifier: Apache-2.0
"""The guest's kernel with a disk of `mobi-helper disk`: moves, and backends that stop, hang or die."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.guest.uml import (
    BACKEND_LOST,
    BOOTED,
    FAILED,
    FREEZE,
    FROZEN,
    GO,
    RUNNING,
    THAW,
    WAITING,
    Boot,
    Guest,
    copy_memory,
)
from tests.helperclient import HelperProcess

pytestmark = [pytest.mark.guest, pytest.mark.timeout(240)]

TIMEOUT_MS = 300


class Backend:
    """Disk processes one after the other over one overlay, and connections to the present one."""

    def __init__(self, binary: Path, sockets: Path, overlay: Path) -> None:
        self.binary = binary
        self.sockets = sockets
        self.overlay = overlay
        self.generation = 0
        self.stack = ExitStack()
        self.process: HelperProcess | None = None

    def start(self) -> None:
        self.generation += 1
        self.process = HelperProcess(
            self.binary,
            "disk",
            *("--socket", self.path, "--overlay", self.overlay, "--size", "16M"),
            control=self.sockets / f"control{self.generation}",
        )
        self.stack.enter_context(self.process)

    @property
    def path(self) -> Path:
        return self.sockets / f"blk{self.generation}"

    def signal(self, number: int) -> None:
        assert self.process is not None
        os.kill(self.process.process.pid, number)

    def connect(self) -> socket.socket:
        connection = self.stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        connection.connect(str(self.path))
        return connection


@pytest.fixture
def backend(helper_binary: Path, socket_dir: Path, tmp_path: Path) -> Iterator[Backend]:
    backend = Backend(helper_binary, socket_dir, tmp_path / "overlay")
    with backend.stack:
        backend.start()
        yield backend


def boot_with_disk(
    boot_kernel: Boot, backend: Backend, *, work: str = "memory,disk", mode: str = "seccomp"
) -> Guest:
    options = [f"work={work}", "pages=512", "virtio_uml.device=/dev0:2", f"freeze_timeout={TIMEOUT_MS}"]
    with backend.connect() as connection:
        guest = boot_kernel(mode=mode, options=options, devices=[connection])
    guest.report(BOOTED)
    return guest


def fresh_process(boot_kernel: Boot, backend: Backend, mode: str = "seccomp") -> Guest:
    with backend.connect() as connection:
        fresh = boot_kernel(resume=True, mode=mode, devices=[connection])
    fresh.report(WAITING)
    return fresh


@pytest.mark.parametrize("mode", ["seccomp", "ptrace"])
def test_a_guest_moves_with_its_disk_busy(boot_kernel: Boot, backend: Backend, mode: str) -> None:
    guest = boot_with_disk(boot_kernel, backend, mode=mode)
    for _ in range(8 if mode == "seccomp" else 3):
        guest.wait_progress(blocks=100, rounds=1)
        fresh = fresh_process(boot_kernel, backend, mode)
        assert guest.ask(FREEZE, FROZEN).flags == 0
        copy_memory(guest.memory, fresh.memory)
        guest.leave()
        fresh.ask(GO, RUNNING)
        guest = fresh
    guest.wait_progress(blocks=1000, rounds=2)


def test_a_cancelled_freeze_leaves_the_disk_working(boot_kernel: Boot, backend: Backend) -> None:
    guest = boot_with_disk(boot_kernel, backend)
    for _ in range(8):
        guest.wait_progress(blocks=100)
        guest.ask(FREEZE, FROZEN)
        guest.ask(THAW, RUNNING)
    guest.wait_progress(blocks=1000)


def test_a_guest_goes_on_with_a_new_backend_after_a_crash(boot_kernel: Boot, backend: Backend) -> None:
    guest = boot_with_disk(boot_kernel, backend)
    for _ in range(4):
        guest.wait_progress(blocks=100)
        backend.signal(signal.SIGKILL)
        guest.wait_progress(rounds=2)
        backend.start()
        fresh = fresh_process(boot_kernel, backend)
        assert guest.ask(FREEZE, FROZEN).flags == BACKEND_LOST
        copy_memory(guest.memory, fresh.memory)
        guest.leave()
        fresh.ask(GO, RUNNING)
        guest = fresh
    guest.wait_progress(blocks=1000)


def test_a_freeze_without_a_backend_can_be_cancelled(boot_kernel: Boot, backend: Backend) -> None:
    guest = boot_with_disk(boot_kernel, backend)
    guest.wait_progress(blocks=100)
    backend.signal(signal.SIGKILL)
    for _ in range(2):
        assert guest.ask(FREEZE, FROZEN).flags == BACKEND_LOST
        guest.ask(THAW, RUNNING)
        guest.wait_progress(rounds=2)


def test_a_backend_that_does_not_finish_fails_the_freeze(boot_kernel: Boot, backend: Backend) -> None:
    guest = boot_with_disk(boot_kernel, backend)
    guest.wait_progress(blocks=100)
    backend.signal(signal.SIGSTOP)
    guest.wait_progress(rounds=2)
    report = guest.ask(FREEZE, FAILED)
    assert report.text == "device 0: the backend does not finish its requests"
    guest.wait_progress(rounds=2)
    backend.signal(signal.SIGCONT)
    guest.wait_progress(blocks=500)
    guest.ask(FREEZE, FROZEN)
    guest.ask(THAW, RUNNING)
    guest.wait_progress(blocks=500)


def test_a_backend_that_does_not_stop_is_given_up(boot_kernel: Boot, backend: Backend) -> None:
    guest = boot_with_disk(boot_kernel, backend, work="memory")
    guest.wait_progress(rounds=2)
    backend.signal(signal.SIGSTOP)
    assert guest.ask(FREEZE, FAILED).text == "device 0: the backend does not stop"
    guest.wait_progress(rounds=2)
    backend.signal(signal.SIGKILL)
    backend.start()
    fresh = fresh_process(boot_kernel, backend)
    assert guest.ask(FREEZE, FROZEN).flags == BACKEND_LOST
    copy_memory(guest.memory, fresh.memory)
    guest.leave()
    fresh.ask(GO, RUNNING)
    fresh.wait_progress(rounds=2)
    fresh.ask(FREEZE, FROZEN)


def test_a_resume_without_its_socket_is_refused(boot_kernel: Boot, backend: Backend) -> None:
    guest = boot_with_disk(boot_kernel, backend)
    fresh = boot_kernel(resume=True)
    fresh.report(WAITING)
    guest.ask(FREEZE, FROZEN)
    copy_memory(guest.memory, fresh.memory)
    assert fresh.ask(GO, FAILED).text == "device 0: no freeze_device= was given"
    guest.ask(THAW, RUNNING)
    guest.wait_progress(blocks=100)
