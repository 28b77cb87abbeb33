# SPDX-License-Identifier: Apache-2.0
"""Starts the nest of an emulated WAN for a test, as root or as a user without any privilege."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import pytest

from proto import wire

REPOSITORY = Path(__file__).resolve().parent.parent
ORDINARY = 47811
"""A user id without a name, a home or a privilege."""


def identity(user: int) -> dict[str, Any]:
    """Arguments of `subprocess` that run a child as `user`; nothing when that is who we are."""
    return {"user": user, "group": user, "extra_groups": []} if user != os.getuid() else {}


def interpreter(user: int) -> tuple[str, dict[str, str]]:
    """A Python that this user can run, and its environment; skips the test if there is none."""
    paths = [str(REPOSITORY), sysconfig.get_paths()["purelib"]]
    environment = {
        "PYTHONPATH": os.pathsep.join(paths),
        "PATH": os.environ["PATH"],
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for candidate in (sys.executable, f"/usr/bin/{version}"):
        probe = [candidate, "-c", "import msgpack, pydantic, trio, tests.traffic"]
        try:
            subprocess.run(
                probe, env=environment, timeout=30, check=True, capture_output=True, **identity(user)
            )
            return candidate, environment
        except (OSError, subprocess.CalledProcessError):
            continue
    pytest.skip(f"user {user} can run no {version} with the packages (are they in a private home directory?)")


@contextmanager
def acting_as(user: int) -> Iterator[None]:
    """Whoever answers on a socket sees the effective user of the moment of connecting."""
    own = os.geteuid()
    if user == own:
        yield
        return
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(own)


class NestProcess:
    """A running nest, spoken to over its socket. Leaving the block ends it and what it started."""

    def __init__(self, directory: Path, file: str, helper: Path, user: int) -> None:
        self.directory = directory
        self.user = user
        self.python, environment = interpreter(user)
        environment |= {
            "HOME": str(directory),
            "MOBI_HELPER": str(helper),
            "XDG_RUNTIME_DIR": str(directory / "runtime"),
        }
        (directory / "wan.yaml").write_text(file)
        (directory / "runtime").mkdir(mode=0o700)
        for path in (directory, directory / "runtime"):
            os.chown(path, user, -1)
        command = [self.python, "-m", "mobid", "wan", "--dir", str(directory / "wan")]
        command += ["--file", str(directory / "wan.yaml")]
        if user:
            command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *command]
        self.output = (directory / "output").open("w+b")
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=self.output,
            **identity(user),
        )
        self.pids: list[int] = []

    @property
    def said(self) -> str:
        return (self.directory / "output").read_text(errors="replace")

    def __enter__(self) -> Self:
        deadline = time.monotonic() + 30
        while True:
            try:
                self.call("wan.show")
                return self
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.__exit__()
                    raise AssertionError(f"the nest did not start: {self.said}") from None
                time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        for pid in self.pids:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, 9)
        self.process.terminate()
        try:
            self.process.wait(20)
        finally:
            self.process.kill()
            self.process.wait(10)
            self.output.close()

    def call(self, op: str, **args: Any) -> Any:
        """The result of an operation; raises `OperationError` as the nest says it."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(20)
            with acting_as(self.user):
                connection.connect(str((self.directory / "wan/run").resolve() / "wan.sock"))
            connection.sendall(wire.encode(wire.Request(1, op, args)))
            decoder = wire.Decoder()
            while data := connection.recv(65536):
                for message in decoder.feed(data):
                    if isinstance(message, wire.Failure):
                        raise message.error
                    assert isinstance(message, wire.Result)
                    return message.result
        raise EOFError("the nest closed the connection")

    def start(self, site: str, *program: str) -> Path:
        """Starts a program of `tests.traffic` in a site; returns the file of its output."""
        log = self.directory / f"{len(self.pids)}-{site}.log"
        argv = [self.python, "-m", "tests.traffic", *program]
        self.pids.append(self.call("wan.start", site=site, argv=argv, log=str(log))["pid"])
        return log

    def serve(self, site: str, *program: str) -> Path:
        """As `start`, and waits until the program is ready."""
        log = self.start(site, *program)
        assert self.wait(log, '"ready"') == "ready"
        return log

    def wait(self, log: Path, beginning: str | tuple[str, ...], timeout: float = 40.0) -> Any:
        """The first line of output that begins so, as the value that it is."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            for line in log.read_text().splitlines() if log.exists() else ():
                if line.startswith(beginning):
                    return json.loads(line)
            time.sleep(0.02)
        raise AssertionError(f"no result in {timeout} s: {log.read_text()}")

    def round_trips(self, site: str, address: str) -> list[float]:
        times: list[float] = self.wait(self.start(site, "echo", address), "[")
        return times
