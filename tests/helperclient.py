# SPDX-License-Identifier: Apache-2.0
"""A small blocking client for a helper's control socket, for tests that are not about mobid.

    with HelperProcess(helper_binary, "disk", "--socket", vhost, control=socket_dir / "c") as disk:
        reply, fds = disk.call("share")
        event = disk.wait_event("state")

Every wait has a deadline; a reply that says no is a `HelperFailure`.
"""

from __future__ import annotations

import array
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import msgpack

from tests.waiting import PATIENCE

MESSAGE_MAX = 65536
FDS_MAX = 8


class HelperFailure(Exception):
    """A reply with `ok: false`; `code` and `message` are the helper's."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


class HelperClient:
    """One connection to a control socket; events that come before an awaited reply are kept in `events`."""

    def __init__(self, path: Path | str, timeout: float = PATIENCE) -> None:
        self.timeout = timeout
        self.events: list[dict[str, Any]] = []
        self.last_id = 0
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(timeout)
        try:
            self.socket.connect(str(path))
        except OSError:
            self.socket.close()
            raise

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.socket.sendmsg([data], rights)

    def receive(self, deadline: float) -> tuple[dict[str, Any], list[int]]:
        """The next message and its descriptors; `EOFError` if the helper closed, or `TimeoutError`."""
        self.socket.settimeout(max(deadline - time.monotonic(), 0.001))
        data, fds, _, _ = socket.recv_fds(self.socket, MESSAGE_MAX, FDS_MAX)
        if not data:
            raise EOFError("the helper closed the control connection")
        return msgpack.unpackb(data), list(fds)

    def send(self, op: str, fds: Sequence[int] = (), **arguments: Any) -> int:
        """Sends a request without waiting; returns its id for `reply`."""
        self.last_id += 1
        self.send_raw(msgpack.packb({"id": self.last_id, "op": op, **arguments}), fds)
        return self.last_id

    def reply(self, request_id: int, timeout: float | None = None) -> tuple[dict[str, Any], list[int]]:
        """The reply to a request, or `HelperFailure`; another reply that comes before it fails the test."""
        deadline = time.monotonic() + (timeout or self.timeout)
        while True:
            message, fds = self.receive(deadline)
            if "event" in message:
                self.events.append(message)
                continue
            assert message["id"] == request_id, f"reply to {message['id']}, {request_id} was awaited"
            if not message["ok"]:
                raise HelperFailure(message["error"], message["message"])
            return message, fds

    def call(
        self, op: str, fds: Sequence[int] = (), timeout: float | None = None, **arguments: Any
    ) -> tuple[dict[str, Any], list[int]]:
        return self.reply(self.send(op, fds, **arguments), timeout)

    def status(self) -> dict[str, Any]:
        return self.call("status")[0]

    def wait_event(self, name: str, timeout: float | None = None, **facts: Any) -> dict[str, Any]:
        """The first event, kept or to come, with this name and these values; those before it are dropped."""
        deadline = time.monotonic() + (timeout or self.timeout)
        while True:
            while self.events:
                event = self.events.pop(0)
                if event["event"] == name and facts.items() <= event.items():
                    return event
            message, _ = self.receive(deadline)
            assert "event" in message, f"a reply nobody awaits: {message}"
            self.events.append(message)


class HelperProcess(HelperClient):
    """A helper started for one test, and its connection. Leaving the block kills it; `log` is its stderr."""

    def __init__(
        self,
        binary: Path,
        role: str,
        *arguments: str | Path,
        control: Path,
        timeout: float = PATIENCE,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.control = control
        self.log_path = Path(f"{control}.log")
        command = [str(binary), role, "--control", str(control), *map(str, arguments)]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=pass_fds
            )
        try:
            self._connect(timeout)
        except BaseException:
            self.end()
            raise

    def _connect(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(f"helper ended with {self.process.returncode}: {self.log}")
            try:
                super().__init__(self.control, timeout)
                return
            except (FileNotFoundError, ConnectionRefusedError):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no control socket at {self.control}: {self.log}") from None
            time.sleep(0.005)

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)

    def __exit__(self, *details: object) -> None:
        self.close()
        self.end()
        if details[0] is not None:
            print(self.log)  # noqa: T201 - pytest shows it with the failure
