# SPDX-License-Identifier: Apache-2.0
"""Real peers for tests: `mobid` processes on loopback, and a client to ask them."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from mobid import rpc
from mobid.tasks import background
from proto.api import OperationError

START_TIMEOUT = 30.0
END_TIMEOUT = 20.0
REPOSITORY = Path(__file__).resolve().parent.parent.parent


class PeerProcess:
    """One `mobid run`. Killed at the end of the test, whatever happened."""

    def __init__(self, base: Path, name: str) -> None:
        self.name = name
        self.directory = base / name
        self.runtime = base / "run"
        self.process: subprocess.Popen[str] | None = None
        self.prefix: list[str] = []
        """A program that starts the peer in surroundings of its own."""

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "XDG_RUNTIME_DIR": str(self.runtime), "PYTHONPATH": str(REPOSITORY)}

    @property
    def socket(self) -> Path:
        digest = hashlib.sha256(str(self.directory.resolve()).encode()).hexdigest()[:12]
        return self.runtime / digest / "mobid.sock"

    def command(self, *more: str) -> list[str]:
        listen = [] if "--listen" in more else ["--listen", "127.0.0.1:0"]
        base = [sys.executable, "-m", "mobid", "run", "--dir", str(self.directory), "--name", self.name]
        return [*self.prefix, *base, *listen, *more]

    def launch(self, *more: str, token: str | None = None) -> None:
        """Begin the process, without waiting for it."""
        self.runtime.mkdir(exist_ok=True)
        join = ["--join", "-"] if token else []
        self.process = subprocess.Popen(
            self.command(*more, *join),
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self.process.stdin is not None
        self.process.stdin.write(f"{token}\n" if token else "")
        self.process.stdin.close()

    async def start(self, *more: str, token: str | None = None) -> None:
        """Begin the process and wait until it says that it is ready."""
        self.launch(*more, token=token)
        assert self.process is not None
        assert self.process.stdout is not None
        with trio.fail_after(START_TIMEOUT):
            line = await trio.to_thread.run_sync(self.process.stdout.readline, abandon_on_cancel=True)
        assert "is ready" in line, line + self.process.stdout.read()

    def fails(self, *more: str, token: str | None = None) -> str:
        """What a start says that must fail; it takes no traceback for an answer."""
        self.launch(*more, token=token)
        assert self.process is not None
        assert self.process.stdout is not None
        said = self.process.stdout.read()
        assert self.process.wait(timeout=START_TIMEOUT) == 1, said
        assert "Traceback" not in said
        return said

    def kill(self) -> None:
        """kill -9."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(timeout=END_TIMEOUT)

    async def end(self) -> int:
        """SIGTERM, and the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return await self.ended()

    async def ended(self) -> int:
        """Wait for the process to end by itself; its exit code."""
        process = self.process
        assert process is not None
        with trio.fail_after(END_TIMEOUT):
            return await trio.to_thread.run_sync(process.wait, abandon_on_cancel=True)

    @asynccontextmanager
    async def client(self) -> AsyncGenerator[rpc.Client, None]:
        """A connection to its unix socket, as its owner."""
        stream = await trio.open_unix_socket(str(self.socket))
        client = rpc.Client(stream, self.name)
        async with background(client.run):
            yield client

    async def ask(self, op: str, timeout: float = 20.0, **args: Any) -> Any:
        """One operation's result."""
        async with self.client() as client:
            return await client.call(op, args, timeout)

    async def token(self, **args: Any) -> str:
        """The text of a new token."""
        return str((await self.ask("peer.token.new", **args))["token"])

    async def address(self) -> str:
        """HOST:PORT."""
        return str((await self.ask("status"))["address"])

    async def until(self, op: str, predicate: Any, **args: Any) -> Any:
        """Ask until the answer is right; errors count as not yet."""
        last: Any = None
        with trio.move_on_after(START_TIMEOUT):
            while True:
                try:
                    last = await self.ask(op, **args)
                    if predicate(last):
                        return last
                except (OperationError, OSError) as error:
                    last = error
                await trio.sleep(0.05)
        raise AssertionError(f"{self.name} never gave the expected answer to {op}; the last was {last!r}")

    async def knows(self, count: int) -> None:
        """Wait until this peer sees so many members alive."""
        await self.until(
            "peer.ls", lambda rows: [row["state"] for row in rows].count("alive") == count == len(rows)
        )

    def log(self) -> str:
        return (self.directory / "mobid.log").read_text()


class Mesh:
    """Makes peers below one directory."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.peers: list[PeerProcess] = []

    def peer(self, name: str) -> PeerProcess:
        """A peer that is not started yet."""
        peer = PeerProcess(self.base, name)
        self.peers.append(peer)
        return peer

    async def start(self, *names: str) -> list[PeerProcess]:
        """Running peers of one mesh; the first founded it."""
        founder = self.peer(names[0])
        await founder.start()
        made = [founder]
        for name in names[1:]:
            peer = self.peer(name)
            await peer.start(token=await founder.token())
            made.append(peer)
        for peer in made:
            await peer.knows(len(made))
        return made

    def close(self) -> None:
        for peer in self.peers:
            peer.kill()
            if peer.process is not None and peer.process.stdout is not None:
                peer.process.stdout.close()


@pytest.fixture
def mesh(socket_dir: Path) -> Iterator[Mesh]:
    """Peers in a short directory; all killed afterwards."""
    made = Mesh(socket_dir)
    yield made
    made.close()
