# SPDX-License-Identifier: Apache-2.0
"""Real peers for the tests with guests: `mobid run` as a process, and requests to its socket."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import trio

from mobid.config import runtime_directory
from mobid.rpc import Client
from mobid.tasks import background
from proto.api import OperationError

INTERVAL = 0.1
START_TIMEOUT = 30.0
CALL_TIMEOUT = 120.0


async def eventually(predicate: Callable[[], Awaitable[Any]]) -> Any:
    """What `predicate` answers as soon as that is true; the test's own time-out bounds the wait."""
    while not (answer := await predicate()):  # noqa: ASYNC110 - what is awaited is another process
        await trio.sleep(INTERVAL)
    return answer


class PeerProcess:
    """One peer in a directory of its own; it can be killed and started again."""

    def __init__(
        self,
        directory: Path,
        name: str = "tokyo",
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        *,
        options: Sequence[str] = (),
    ) -> None:
        self.prefix = list(prefix)
        """A command that runs the peer's, in another namespace for example."""
        self.options = list(options)
        """More arguments of `mobid run`."""
        self.directory = directory
        self.name = name
        self.process: subprocess.Popen[bytes] | None = None
        self.environment = {**os.environ, **(environment or {})}
        self._listen = "127.0.0.1:0"

    @property
    def socket(self) -> Path:
        return runtime_directory(self.directory) / "mobid.sock"

    @property
    def log(self) -> str:
        path = self.directory.with_name(self.directory.name + ".log")
        return path.read_text(errors="replace") if path.exists() else ""

    async def start(self, join: str = "") -> None:
        """Start the process and wait until it answers; `join` is a token of another peer's mesh. One that
        ran before gets the same port.
        """
        command = [sys.executable, "-m", "mobid", "run", "--dir", str(self.directory), "--name", self.name]
        command += ["--join", join] if join else []
        log = self.directory.with_name(self.directory.name + ".log")
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [*self.prefix, *command, "--listen", self._listen, *self.options],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self.environment,
            )
        with trio.fail_after(START_TIMEOUT):
            while True:
                assert self.process.poll() is None, self.log
                with suppress(OSError, OperationError):
                    await self.call("status")
                    if said := re.findall(r" is ready: (\S+)", self.log):
                        self._listen = said[-1]
                        return
                await trio.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL; its helpers go on."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    async def stop(self) -> None:
        """End the peer and its guests in order."""
        if self.process is None or self.process.poll() is not None:
            return
        with suppress(OperationError):
            await self.call("stop", {"guests": True})
        try:
            await trio.to_thread.run_sync(self.process.wait, 30)
        except subprocess.TimeoutExpired:
            self.kill()

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        client = Client(await trio.open_unix_socket(str(self.socket)), self.name)
        async with background(client.run):
            yield client

    async def call(
        self, op: str, args: Mapping[str, Any] | None = None, timeout: float = CALL_TIMEOUT
    ) -> Any:
        """One request on a connection of its own."""
        async with self.client() as client:
            return await client.call(op, args, timeout=timeout)

    async def execute(
        self, vm: str, *argv: str, stdin: bytes = b"", env: Mapping[str, str] | None = None
    ) -> tuple[int, bytes, bytes]:
        """Run a program in a guest: (code, stdout, stderr)."""
        out = {1: bytearray(), 2: bytearray()}
        arguments = {"vm": vm, "argv": list(argv), "env": dict(env or {})}
        with trio.fail_after(CALL_TIMEOUT):
            async with self.client() as client, client.request("vm.exec", arguments) as request:
                for at in range(0, len(stdin), 60_000):
                    await request.send({"channel": 0, "data": stdin[at : at + 60_000]})
                await request.send({"channel": 0, "data": b""})
                async for item in request:
                    out[item["channel"]] += item["data"]
                result = await request.result()
        return result["code"], bytes(out[1]), bytes(out[2])

    async def put(self, vm: str, path: str, data: bytes, mode: int = 0o644) -> Any:
        async with (
            self.client() as client,
            client.request("vm.put", {"vm": vm, "path": path, "mode": mode}) as request,
        ):
            for at in range(0, len(data), 100_000):
                await request.send({"data": data[at : at + 100_000]})
            await request.send({"data": b""})
            return await request.result()

    async def get(self, vm: str, path: str) -> tuple[bytes, Any]:
        data = bytearray()
        async with self.client() as client, client.request("vm.get", {"vm": vm, "path": path}) as request:
            async for item in request:
                data += item["data"]
            return bytes(data), await request.result()
