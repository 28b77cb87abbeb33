# SPDX-License-Identifier: Apache-2.0
"""Three nodes of etcd on loopback, to measure beside ours.

They are spoken to as any program without a gRPC library would: JSON over HTTP/1.1 to the gateway that every
node has, one kept-alive connection per client.
"""

from __future__ import annotations

import base64
import json
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import trio

PROGRAM = "etcd"
START_TIMEOUT = 30.0


class EtcdError(Exception):
    """etcd said no, or nothing."""


def missing() -> str:
    """Why etcd cannot be run here, or nothing."""
    return "" if shutil.which(PROGRAM) else "there is no etcd (Debian: etcd-server)"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


class Connection:
    """One client's connection to one node, made anew when a call was given up or failed."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._stream: trio.SocketStream | None = None
        self._buffer = bytearray()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._drop()

    async def _drop(self) -> None:
        if self._stream is not None:
            stream, self._stream = self._stream, None
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(stream)
        self._buffer.clear()

    async def call(self, path: str, body: dict[str, Any]) -> Any:
        """The answer to one POST; raises `EtcdError` or `OSError`."""
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
        try:
            if self._stream is None:
                self._stream = await trio.open_tcp_stream("127.0.0.1", self._port)
            await self._stream.send_all(head.encode() + data)
            status, answer = await self._answer(self._stream)
        except BaseException as error:
            await self._drop()  # a late answer would be taken for that of the next call
            if isinstance(error, trio.BrokenResourceError | trio.ClosedResourceError):
                raise EtcdError("the connection broke") from None
            raise
        if status != 200:
            raise EtcdError(answer.decode(errors="replace").strip())
        return json.loads(answer)

    async def _answer(self, stream: trio.SocketStream) -> tuple[int, bytes]:
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            await self._more(stream)
        lines = bytes(self._buffer[:end]).split(b"\r\n")
        del self._buffer[: end + 4]
        headers = {name.lower(): value.strip() for name, _, value in (li.partition(b":") for li in lines[1:])}
        size = int(headers.get(b"content-length", b"0"))
        while len(self._buffer) < size:
            await self._more(stream)
        body = bytes(self._buffer[:size])
        del self._buffer[:size]
        return int(lines[0].split()[1]), body

    async def _more(self, stream: trio.SocketStream) -> None:
        data = await stream.receive_some(65536)
        if not data:
            raise EtcdError("the connection was closed")
        self._buffer += data

    async def put(self, key: str, value: str) -> None:
        """One committed write."""
        texts = {"key": key, "value": value}
        encoded = {name: base64.b64encode(text.encode()).decode() for name, text in texts.items()}
        await self.call("/v3/kv/put", encoded)


class Node:
    """One etcd process; it can be killed and started again."""

    def __init__(self, base: Path, name: str, client: int, peer: int, arguments: list[str]) -> None:
        self.name = name
        self.port = client
        self._log = base / f"{name}.log"
        own, other = f"http://127.0.0.1:{client}", f"http://127.0.0.1:{peer}"
        self._command = [PROGRAM, "--name", name, "--data-dir", str(base / name), "--log-level", "error"]
        self._command += ["--listen-client-urls", own, "--advertise-client-urls", own]
        self._command += ["--listen-peer-urls", other, "--initial-advertise-peer-urls", other, *arguments]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def kill(self) -> None:
        """SIGKILL, by its pid."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(10)

    async def leader(self) -> bool:
        """Whether this node leads; raises `EtcdError` or `OSError` while it does not answer."""
        async with Connection(self.port) as connection:
            status = await connection.call("/v3/maintenance/status", {})
        member: str = status["header"]["member_id"]
        return bool(status.get("leader") == member)

    async def wait_ready(self) -> None:
        """Until it answers a write."""
        with trio.fail_after(START_TIMEOUT):
            while True:
                try:
                    async with Connection(self.port) as connection:
                        await connection.put("ready", self.name)
                        return
                except (EtcdError, OSError):
                    await trio.sleep(0.05)


@asynccontextmanager
async def cluster(base: Path, heartbeat: float, election: float) -> AsyncIterator[list[Node]]:
    """Three nodes with these times (seconds); they end with the block."""
    names = ("a", "b", "c")
    ports = _free_ports(6)
    members = ",".join(f"{name}=http://127.0.0.1:{port}" for name, port in zip(names, ports[3:], strict=True))
    arguments = ["--initial-cluster", members, "--initial-cluster-token", "bench"]
    arguments += ["--heartbeat-interval", str(round(heartbeat * 1000))]
    arguments += ["--election-timeout", str(round(election * 1000))]
    base.mkdir(parents=True, exist_ok=True)
    nodes = [
        Node(base, name, client, peer, arguments)
        for name, client, peer in zip(names, ports[:3], ports[3:], strict=True)
    ]
    try:
        for node in nodes:
            node.start()
        for node in nodes:
            await node.wait_ready()
        yield nodes
    finally:
        for node in nodes:
            node.kill()
