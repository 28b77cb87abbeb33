# SPDX-License-Identifier: Apache-2.0
"""A mesh on this machine whose hosts can die, be cut off and be stopped: every peer in a network namespace.

`mobictl up --wan` makes the namespaces. What runs in a peer's namespace is its host: the peer, its helpers
and its guests. So a host is stopped by SIGSTOP to every process there, and goes on by SIGCONT; its peer alone
is killed by its pid.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mobictl.client import Mesh
from mobictl.places import LocalPeer, load_manifest
from proto.api import OperationError
from tests.cli import Cli, clean, home

SETTLE_TIMEOUT = 60.0
SOON = 90.0
PAUSE = 0.1


class Hosts:
    """A running mesh. `cli` is its user; commands go through `ask` to a named peer."""

    def __init__(self, cli: Cli, names: list[str]) -> None:
        self.cli = cli
        self.names = names
        self.wan_file = cli.home / "lan.yaml"
        sites = "".join(f"  {name}: {{}}\n" for name in names)
        self.wan_file.write_text(f"sites:\n{sites}")
        self.up()
        self._spaces = {name: _space(self._peer(name).running()) for name in names}

    # The mesh.

    def up(self) -> None:
        """Start every peer that does not run."""
        self.cli("up", "--wan", str(self.wan_file), "--peers", str(len(self.names)))

    def up_all(self) -> None:
        """As `up`; it is no mistake if all run."""
        if not all(self.running(name) for name in self.names):
            self.up()

    def _peer(self, name: str) -> LocalPeer:
        return next(peer for peer in load_manifest(self.cli.dir).peers if peer.name == name)

    def directories(self) -> dict[str, Path]:
        """Each peer's own directory."""
        return {name: self._peer(name).directory for name in self.names}

    def running(self, name: str) -> bool:
        """Whether the peer's process is there."""
        return bool(self._peer(name).running())

    def ask(self, peer: str, op: str, /, timeout: float = 20.0, key: str = "", **args: Any) -> Any:
        """One operation, asked of this peer alone; raises `OperationError`."""
        return Mesh(self._peer(peer).target).call(op, args, timeout=timeout, key=key)

    def read(self, peer: str, guest: str, path: str) -> bytes:
        """A file of a guest, asked of this peer; raises `OperationError`."""
        parts: list[bytes] = []
        args = {"vm": guest, "path": path}
        mesh = Mesh(self._peer(peer).target)
        mesh.call("vm.get", args, timeout=20.0, on_item=lambda item: parts.append(item["data"]))
        return b"".join(parts)

    def leader(self, among: Iterable[str]) -> str:
        """Who leads, in the eyes of the first of these that knows; "" if none does."""
        for name in among:
            if self.running(name):
                try:
                    found = self.ask(name, "leader", timeout=5.0)
                except OperationError:
                    continue
                if found["leader"]:
                    return str(found["leader"])
        return ""

    def wait_for_leader(self, among: Iterable[str], voters: int = 0) -> str:
        """The leader that one of these peers sees, once there is one (and so many voters)."""
        chosen = list(among)
        deadline = time.monotonic() + SETTLE_TIMEOUT
        while time.monotonic() < deadline:
            leader = self.leader(chosen)
            if leader and (not voters or len(self.ask(leader, "leader")["voters"]) == voters):
                return leader
            time.sleep(PAUSE)
        raise TimeoutError(f"no leader among {', '.join(chosen)} within {SETTLE_TIMEOUT:g} s")

    @staticmethod
    def soon(what: str, true: Callable[[], bool]) -> None:
        """Wait until `true()` holds; no answer counts as no. Raises `TimeoutError`, which says `what`."""
        deadline = time.monotonic() + SOON
        while True:
            with suppress(OperationError):
                if true():
                    return
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {SOON:g} s: {what}")
            time.sleep(PAUSE)

    # Faults.

    def kill(self, name: str) -> None:
        """SIGKILL to the peer's process; helpers and guests go on."""
        pid = self._peer(name).running()
        if pid:
            os.kill(pid, signal.SIGKILL)
            deadline = time.monotonic() + 10
            while self.running(name) and time.monotonic() < deadline:
                time.sleep(0.01)

    def processes(self, name: str) -> list[int]:
        """Every process of the host."""
        own = self._spaces[name]
        return [pid for pid in _processes() if _space(pid) == own]

    def kill_host(self, name: str) -> None:
        """The host dies: everything there, in one go."""
        for pid in self.processes(name):
            _signal(pid, signal.SIGKILL)

    @contextmanager
    def stopped(self, name: str) -> Iterator[None]:
        """The host stands still within the block."""
        stopped: set[int] = set()
        while new := set(self.processes(name)) - stopped:
            for pid in new:
                _signal(pid, signal.SIGSTOP)
            stopped |= new
        try:
            yield
        finally:
            for pid in stopped:
                _signal(pid, signal.SIGCONT)

    def cut(self, side: Iterable[str], other: Iterable[str]) -> None:
        """Nothing passes between the two sides."""
        others = list(other)
        for a in side:
            for b in others:
                self.cli("wan", "cut", a, b)

    def heal(self) -> None:
        self.cli("wan", "heal")


def _processes() -> Iterator[int]:
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            yield int(path.name)


def _space(pid: int) -> str:
    """The network namespace of a process, "" if it has ended."""
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return ""


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


@contextmanager
def hosts(names: list[str], helper: Path) -> Iterator[Hosts]:
    """A mesh of these peers; it ends with the block, whatever state it is in."""
    cli = Cli(home(), {"MOBI_HELPER": str(helper), "XDG_CACHE_HOME": str(_cache())})
    try:
        yield Hosts(cli, names)
    finally:
        clean(cli)


def _cache() -> Path:
    """The user's own cache, which has kernel and images."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
