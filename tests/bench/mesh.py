# SPDX-License-Identifier: Apache-2.0
"""Deciding: how long nobody decides after the coordinator was killed, and what a decision costs.

Three of our peers and three nodes of etcd run side by side on loopback, with the same heartbeats and election
times. *Without a coordinator* is what a client feels: the coordinator is killed with SIGKILL, and a client
that repeats a small write at the survivors in turn, with the same patience for both systems, notes when the
first one succeeds. Kills alternate between the systems. *Commits* are small writes by C clients, each with
one under way; both systems are spoken to by clients in this one process, which costs them a share of it.
The rows of the simulated membership are explained in `membership.py`.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import trio

from mobid import rpc
from mobid.tasks import background
from proto.api import OperationError
from tests.bench import etcd, failover, membership
from tests.bench.report import Row, figure
from tests.guest.peers import PeerProcess, eventually
from tests.guest.witness import run_to_end

KILLS = 20
TIMES = {"100/1000 ms": (0.1, 1.0), "10/100 ms": (0.01, 0.1)}
CLIENTS = (1, 16, 256)
COMMIT_SECONDS = 5.0
COMMIT_RUNS = 3
PATIENCE = 0.1
"""Seconds a client waits for one write before it asks the other survivor."""
OUTAGE_LIMIT = 30.0
PAUSE = 1.0
"""Seconds of ordinary running before each kill."""
FAILURES = (OperationError, etcd.EtcdError, OSError, trio.BrokenResourceError, trio.ClosedResourceError)

Write = Callable[[], Awaitable[None]]


class Cluster(Protocol):
    """Three replicas of either system."""

    def names(self) -> list[str]: ...

    async def leader(self) -> str: ...

    def kill(self, name: str) -> None: ...

    async def restart(self, name: str) -> None: ...

    def client(self, name: str) -> Any:
        """An async context manager that gives a `Write`."""


class Ours:
    """Three peers of a mesh."""

    def __init__(self, peers: dict[str, PeerProcess], tokens: list[str]) -> None:
        self._peers = peers
        self._tokens = tokens

    def names(self) -> list[str]:
        return list(self._peers)

    async def leader(self) -> str:
        for peer in self._peers.values():
            found = await peer.call("leader")
            if found["leader"]:
                return str(found["leader"])
        return ""

    def kill(self, name: str) -> None:
        self._peers[name].kill()

    async def restart(self, name: str) -> None:
        await self._peers[name].start()

    @asynccontextmanager
    async def client(self, name: str) -> AsyncIterator[Write]:
        """Each write is one record of the log: a token that is revoked (again)."""
        stream = await trio.open_unix_socket(str(self._peers[name].socket))
        connection = rpc.Client(stream, name)

        async def write() -> None:
            await connection.call("peer.token.revoke", {"token": self._tokens[0]}, timeout=10.0)

        async with background(connection.run):
            yield write


class Etcd:
    """Three nodes of etcd."""

    def __init__(self, nodes: list[etcd.Node]) -> None:
        self._nodes = {node.name: node for node in nodes}

    def names(self) -> list[str]:
        return list(self._nodes)

    async def leader(self) -> str:
        for name, node in self._nodes.items():
            if await node.leader():
                return name
        return ""

    def kill(self, name: str) -> None:
        self._nodes[name].kill()

    async def restart(self, name: str) -> None:
        self._nodes[name].start()
        await self._nodes[name].wait_ready()

    @asynccontextmanager
    async def client(self, name: str) -> AsyncIterator[Write]:
        async with etcd.Connection(self._nodes[name].port) as connection:
            yield lambda: connection.put("bench", "value")


@dataclass
class Commits:
    """What C clients got done: commits per second of each run, and all latencies in milliseconds.

    A client whose write fails is out for the rest of its run; `failures` says why.
    """

    rates: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@dataclass
class Found:
    """Outages in seconds by times, commits by number of clients."""

    outages: dict[str, list[float]] = field(default_factory=dict)
    commits: dict[int, Commits] = field(default_factory=dict)


def run() -> list[Row]:
    """Measure; raises `RuntimeError` if something is missing or went wrong."""
    found = {"ours": Found(), "etcd": Found()}
    if failure := run_to_end(lambda: _measure(found)):
        raise RuntimeError(failure)
    return [*_rows(found["ours"], found["etcd"]), *failover.run(), *membership.run()]


async def _measure(found: dict[str, Found]) -> None:
    for label, (heartbeat, election) in TIMES.items():
        with tempfile.TemporaryDirectory(prefix="mobi-bench-") as base:
            async with _clusters(Path(base), heartbeat, election) as clusters:
                for kill in range(KILLS):
                    for name, cluster in clusters.items():
                        seconds = await _outage(cluster)
                        found[name].outages.setdefault(label, []).append(seconds)
                    _say(f"coordinator {label}: {kill + 1} of {KILLS} kills")
                if heartbeat == TIMES["100/1000 ms"][0]:
                    await _measure_commits(found, clusters)


def _say(text: str) -> None:
    print(f"bench mesh: {text}", file=sys.stderr, flush=True)


@asynccontextmanager
async def _clusters(base: Path, heartbeat: float, election: float) -> AsyncIterator[dict[str, Cluster]]:
    async with AsyncExitStack() as stack:
        clusters: dict[str, Cluster] = {
            "ours": await stack.enter_async_context(_ours(base, heartbeat, election))
        }
        if not etcd.missing():
            nodes = await stack.enter_async_context(etcd.cluster(base / "etcd", heartbeat, election))
            clusters["etcd"] = Etcd(nodes)
        yield clusters


@asynccontextmanager
async def _ours(base: Path, heartbeat: float, election: float) -> AsyncIterator[Ours]:
    options = ["--heartbeat", f"{heartbeat * 1000:g}ms", "--election", f"{election * 1000:g}ms"]
    peers = {name: PeerProcess(base / name, name, options=options) for name in ("tokyo", "virginia", "oslo")}
    first = peers["tokyo"]
    async with AsyncExitStack() as stack:
        for peer in peers.values():
            stack.callback(_end, peer)
            token = "" if peer is first else (await first.call("peer.token.new", {}))["token"]
            await peer.start(join=token)
        for peer in peers.values():
            await eventually(lambda peer=peer: _has_voters(peer, 3))  # type: ignore[misc]
        made = await first.call("peer.token.new", {"role": "viewer", "ttl": 86400.0, "uses": 1})
        yield Ours(peers, [made["id"]])


async def _has_voters(peer: PeerProcess, count: int) -> bool:
    found = await peer.call("leader")
    return bool(found["leader"]) and len(found["voters"]) == count


def _end(peer: PeerProcess) -> None:
    if peer.process is not None and peer.process.poll() is None:
        peer.kill()


async def _outage(cluster: Cluster) -> float:
    """Seconds from the kill to the end of the first write that succeeded."""
    await trio.sleep(PAUSE)
    leader = await cluster.leader()
    survivors = [name for name in cluster.names() if name != leader]
    async with AsyncExitStack() as stack:
        writes = [await stack.enter_async_context(cluster.client(name)) for name in survivors]
        cluster.kill(leader)
        began = time.perf_counter()
        seconds = await _first_success(writes, began)
    await cluster.restart(leader)
    return seconds


async def _first_success(writes: list[Write], began: float) -> float:
    with trio.fail_after(OUTAGE_LIMIT):
        while True:
            for write in writes:
                with trio.move_on_after(PATIENCE):
                    try:
                        await write()
                        return time.perf_counter() - began
                    except FAILURES:
                        await trio.sleep(PATIENCE / 10)


async def _measure_commits(found: dict[str, Found], clusters: dict[str, Cluster]) -> None:
    for count in CLIENTS:
        for _ in range(COMMIT_RUNS):
            for name, cluster in clusters.items():
                commits = found[name].commits.setdefault(count, Commits())
                await _commit(cluster, count, commits)
                if commits.failures:
                    _say(f"{name}: {len(commits.failures)} clients failed: {commits.failures[-1]}")
        _say(f"commits by {count} clients")


async def _commit(cluster: Cluster, count: int, commits: Commits) -> None:
    """`count` clients, spread over all replicas, write as fast as they are answered."""
    names = cluster.names()
    before = len(commits.latencies)
    async with AsyncExitStack() as stack:
        writes = [
            await stack.enter_async_context(cluster.client(names[number % len(names)]))
            for number in range(count)
        ]
        end = time.perf_counter() + COMMIT_SECONDS
        async with trio.open_nursery() as nursery:
            for write in writes:
                nursery.start_soon(_write_until, end, write, commits)
    commits.rates.append((len(commits.latencies) - before) / COMMIT_SECONDS)


async def _write_until(end: float, write: Write, commits: Commits) -> None:
    while (began := time.perf_counter()) < end:
        try:
            await write()
        except FAILURES as error:
            commits.failures.append(str(error))
            return
        commits.latencies.append((time.perf_counter() - began) * 1000)


def _rows(ours: Found, others: Found) -> list[Row]:
    why = etcd.missing() or "it was not measured"
    rows = [
        Row(
            f"coordinator {label}",
            "s",
            "lower",
            figure(ours.outages.get(label, [])),
            {"etcd": figure(others.outages.get(label, []), why)},
        )
        for label in TIMES
    ]
    for count in CLIENTS:
        own, other = ours.commits.get(count, Commits()), others.commits.get(count, Commits())
        rates = {"etcd": figure(other.rates, why)}
        latencies = {"etcd": figure(other.latencies, why)}
        rows.append(Row(f"commits {count} clients", "1/s", "higher", figure(own.rates), rates))
        rows.append(Row(f"latency {count} clients", "ms", "lower", figure(own.latencies), latencies))
    return rows
