# SPDX-License-Identifier: Apache-2.0
"""Drive the guest's kernel directly, without the shim: what `mobi-helper guest` will do, in a test's hands.

`Guest` is one host process of a guest: it boots one, or waits to resume one. The descriptors, options and
datagrams are those of `kernel/README.md` §2 and §3.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import select
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.memfd import copy_data

FREEZE, THAW, GO, EXIT = 1, 2, 3, 4
FROZEN, RUNNING, FAILED, BOOTED, POWEROFF, REBOOT, PANIC, WAITING = range(1, 9)
BACKEND_LOST = 1

REPORT = struct.Struct("=IIiIQQQQ80s")
REQUEST = struct.Struct("=II")
MEMORY_FD, CONTROL_FD, AGENT_FD, DEVICE_FD = 100, 101, 102, 110
SPARE_FD = 400
PATIENCE = 30.0
"""Seconds until something that must happen is taken to have failed; the machine may be busy."""


class Report(NamedTuple):
    """A `struct freeze_report`; times in ns of CLOCK_MONOTONIC."""

    kind: int
    sequence: int
    error: int
    flags: int
    t_request: int
    t_begin: int
    t_devices: int
    t_done: int
    text: str


def prepare_child(places: dict[int, int]) -> None:
    """In the child before exec: put the descriptors at their numbers and close every other one."""
    spare = {wanted: fcntl.fcntl(fd, fcntl.F_DUPFD, SPARE_FD) for wanted, fd in places.items()}
    for wanted, fd in spare.items():
        os.dup2(fd, wanted)
    last = 0
    for wanted in sorted(spare):
        if last < wanted:
            os.closerange(last, wanted)
        last = wanted + 1
    os.closerange(last, 4096)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class Guest:
    """One process of the kernel. Use as a context manager: leaving it kills the whole process group."""

    def __init__(
        self,
        kernel: Path,
        memory: int,
        *,
        size: int = 64 << 20,
        mode: str = "seccomp",
        resume: bool = False,
        options: Sequence[str] = (),
        devices: Sequence[socket.socket] = (),
    ) -> None:
        self.memory = memory
        self.output = ""
        self._agent_bytes = b""
        self._sequence = 0
        self.console, console = socket.socketpair()
        self.control, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.agent, agent = socket.socketpair()
        places = {0: console.fileno(), 1: console.fileno(), 2: console.fileno(), MEMORY_FD: memory}
        places |= {CONTROL_FD: control.fileno(), AGENT_FD: agent.fileno()}
        places |= {DEVICE_FD + n: device.fileno() for n, device in enumerate(devices)}
        command = [str(kernel), f"mem={size}", f"seccomp={'on' if mode == 'seccomp' else 'off'}"]
        command += [f"freeze_memory={MEMORY_FD}", f"freeze_control={CONTROL_FD}"]
        command += [f"freeze_device={DEVICE_FD + n}" for n in range(len(devices))]
        command += ["con=null", "con0=fd:0,fd:1", "ssl=null", f"ssl0=fd:{AGENT_FD}", "noreboot", "quiet"]
        command += ["freeze_resume"] if resume else []
        self.process = subprocess.Popen(
            [*command, *options],
            preexec_fn=lambda: prepare_child(places),  # noqa: PLW1509 (no threads here)
            close_fds=False,
            start_new_session=True,
            env={"HOME": "/nonexistent"},
        )
        for end in (console, control, agent):
            end.close()
        self.console.setblocking(False)
        self.agent.setblocking(False)

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE)
        for end in (self.console, self.control, self.agent):
            end.close()

    def _read_streams(self, seconds: float) -> None:
        readable, _, _ = select.select([self.console, self.agent], [], [], seconds)
        for stream in readable:
            data = stream.recv(65536)
            if not data:
                time.sleep(0.01)
            if stream is self.console:
                self.output += data.decode(errors="replace").replace("\r", "")
            else:
                self._agent_bytes += data

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        """Read console and agent until the condition holds."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not come; console:\n{self.output[-2000:]}"
            self._read_streams(0.1)

    def report(self, kind: int | None = None) -> Report:
        """The next report of the kernel, which must be of the given kind."""
        deadline = time.monotonic() + PATIENCE
        while not select.select([self.control], [], [], 0.05)[0]:
            assert time.monotonic() < deadline, f"no report came; console:\n{self.output[-2000:]}"
            with contextlib.suppress(ConnectionResetError):
                self._read_streams(0)
        data = self.control.recv(REPORT.size)
        self._read_streams(0)
        assert data, f"the kernel ended: {self.process.wait(PATIENCE)}; console:\n{self.output[-2000:]}"
        fields = Report._make(REPORT.unpack(data))
        report = fields._replace(text=data[-80:].split(b"\0")[0].decode())
        assert kind in (None, report.kind), f"{report}; console:\n{self.output[-2000:]}"
        return report

    def send(self, op: int) -> int:
        self._sequence += 1
        self.control.send(REQUEST.pack(op, self._sequence))
        return self._sequence

    def ask(self, op: int, kind: int | None = None) -> Report:
        """A request and its answer."""
        sequence = self.send(op)
        report = self.report(kind)
        assert report.sequence == sequence
        return report

    def leave(self) -> None:
        """End this process after a freeze; another one takes the guest over."""
        self.send(EXIT)
        assert self.process.wait(PATIENCE) == 0

    def command(self, line: str) -> None:
        self.agent.send(f"{line}\n".encode())

    def answer(self) -> str:
        """The next line on the agent's serial line."""
        self.wait_for(lambda: b"\n" in self._agent_bytes, "a line of the agent")
        line, self._agent_bytes = self._agent_bytes.split(b"\n", 1)
        return line.decode()

    def progress(self) -> dict[str, int]:
        """The newest complete CHECK line."""
        lines = re.findall(r"CHECK (.*)\n", self.output)
        return {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", lines[-1])} if lines else {}

    def wait_progress(self, **more: int) -> dict[str, int]:
        """Wait until each counter has grown by so much since a CHECK line that is yet to come."""
        self.output = ""
        self.wait_for(lambda: bool(self.progress()), "a CHECK line")
        start = self.progress()
        self.wait_for(
            lambda: all(self.progress()[name] >= start[name] + by for name, by in more.items()),
            f"progress {more}",
        )
        assert self.progress()["bad"] == 0, self.output[-2000:]
        return self.progress()


@contextlib.contextmanager
def memory_file(size: int = 0) -> Iterator[int]:
    fd = os.memfd_create("guest")
    try:
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)


def copy_memory(source: int, destination: int) -> None:
    os.ftruncate(destination, os.fstat(source).st_size)
    copy_data(source, destination)


Boot = Callable[..., Guest]
"""The fixture `boot_kernel`: starts a `Guest`, whose arguments it takes, with the tests' ramdisk."""


def move(guest: Guest, boot_kernel: Boot, **arguments: object) -> Guest:
    """Freeze, copy the memory, and go on in a fresh process that was started before."""
    fresh = boot_kernel(resume=True, **arguments)
    fresh.report(WAITING)
    guest.ask(FREEZE, FROZEN)
    copy_memory(guest.memory, fresh.memory)
    guest.leave()
    fresh.ask(GO, RUNNING)
    return fresh
