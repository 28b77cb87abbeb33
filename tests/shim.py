# SPDX-License-Identifier: Apache-2.0
"""A shim (`mobi-helper guest`) for one test: states to wait for, a console to type on, memory to copy."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

from tests.helperclient import HelperProcess
from tests.memfd import copy_data


class Console:
    """An attached console or agent stream."""

    def __init__(self, fd: int) -> None:
        self.socket = socket.socket(fileno=fd)
        self.text = b""

    def type(self, text: str) -> None:
        self.socket.sendall(text.encode())

    def expect(self, wanted: str, timeout: float = 20.0) -> str:
        """Reads until `wanted` has come; returns everything up to the end of its line."""
        deadline = time.monotonic() + timeout
        while wanted.encode() not in self.text or b"\n" not in self.text.split(wanted.encode(), 1)[1]:
            self.socket.settimeout(max(deadline - time.monotonic(), 0.001))
            data = self.socket.recv(65536)
            if not data:
                raise EOFError(f"the stream ended before {wanted!r}: {self.text!r}")
            self.text += data
        before, rest = self.text.split(wanted.encode(), 1)
        line, self.text = rest.split(b"\n", 1)
        return (before + wanted.encode() + line).decode()

    def close(self) -> None:
        self.socket.close()


class Shim(HelperProcess):
    """`Shim(binary, kernel, control, "--initrd", …)`; the guest has 64 MiB unless the arguments say more."""

    def __init__(self, binary: Path, kernel: Path, control: Path, *arguments: str | Path) -> None:
        self.console_log = Path(f"{control}.console")
        fixed = ("--kernel", kernel, "--memory", "64M", "--console", self.console_log)
        super().__init__(binary, "guest", *fixed, *arguments, control=control)

    def wait_state(self, state: str, timeout: float = 30.0) -> dict[str, Any]:
        """The status once the guest is in `state`; an end on the way there fails the test."""
        deadline = time.monotonic() + timeout
        while True:
            self.events.clear()
            status = self.status()
            if status["state"] == state:
                return status
            assert status["state"] != "exited", f"{status['exit']}\n{self.log}"
            self.wait_event("state", timeout=max(deadline - time.monotonic(), 0.001))

    def wait_exit(self, timeout: float = 30.0) -> dict[str, Any]:
        """`exit` of the status, once the guest has ended."""
        exit_: dict[str, Any] = self.wait_state("exited", timeout)["exit"]
        return exit_

    def attach(self, op: str = "console") -> Console:
        return Console(self.call(op)[1][0])

    def freeze(self) -> dict[str, Any]:
        return self.call("freeze", timeout_ms=10000, timeout=20)[0]


def copy_memory(source: Shim, destination: Shim) -> int:
    """What `pages` does, in its plainest form: copies all that is not a hole; returns the bytes copied."""
    reply, (memory,) = source.call("memory")
    size = reply["size"]
    _, (copy,) = destination.call("memory", size=size)
    copied = copy_data(memory, copy)
    os.close(memory)
    os.close(copy)
    return copied
