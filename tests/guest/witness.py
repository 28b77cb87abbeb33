# SPDX-License-Identifier: Apache-2.0
"""Two guests that know whether they were moved correctly, on two real peers.

`mover` and `friend` each run the witness (`kernel/guest/witness.c`): threads that check a pattern in memory,
a file written with fsync and read back, and one TCP connection between the two, which is never opened anew.
The tests, the soak and the benchmark move `mover` from peer to peer and ask both witnesses what they saw.
"""

from __future__ import annotations

import json
import shutil
import statistics
import struct
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from proto.api import OperationError
from tests.built import built_helper
from tests.guest.peers import PeerProcess, eventually

Row = dict[str, Any]

LAB = "witness"
MOVER = f"{LAB}/mover"
FRIEND = f"{LAB}/friend"
PORT = 7000
FAULTS = ("bad", "page_errors", "disk_errors", "tcp_errors")
GROWING = ("pages", "disk_records", "tcp_sent", "tcp_received")


def run_to_end(main: Callable[[], Awaitable[None]]) -> str:
    """Run a program with real peers; returns what went wrong in words, or nothing."""
    failures: list[str] = []
    try:
        trio.run(main)
    except* (OperationError, OSError, RuntimeError, AssertionError) as group:
        failures = [str(error) or repr(error) for error in _leaves(group)]
    return "; ".join(failures)


def _leaves(group: BaseExceptionGroup[Exception]) -> list[Exception]:
    """The errors themselves, out of all the groups around them."""
    found: list[Exception] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


async def joined(peer: PeerProcess, members: int) -> bool:
    """Whether this peer sees so many; a peer that is just joining ends its connections."""
    try:
        return len(await peer.call("peer.ls")) == members
    except (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
        return False


@asynccontextmanager
async def two_peers(
    base: Path, environment: Mapping[str, str] | None = None
) -> AsyncIterator[tuple[PeerProcess, PeerProcess]]:
    """Two peers of one mesh with directories in `base`; tokyo coordinates. They end with the block.

    Each has its breakpoints in a directory of its own, which its environment names.
    """
    tokyo, virginia = (
        PeerProcess(
            base / name,
            name,
            {
                "MOBI_HELPER": str(built_helper()),
                "MOBI_BREAKPOINTS": str(base / f"{name}.breakpoints"),
                **(environment or {}),
            },
        )
        for name in ("tokyo", "virginia")
    )
    async with AsyncExitStack() as stack:
        for peer in (tokyo, virginia):
            stack.push_async_callback(ended, peer)
            await peer.start()
        token = await tokyo.call("peer.token.new", {})
        await virginia.call("peer.join", {"token": token["token"]})
        await eventually(lambda: joined(virginia, 2))
        yield tokyo, virginia


async def ended(peer: PeerProcess) -> None:
    """Stop a peer, also after a failure or an interrupt; one that was killed is started first, to take its
    guests with it.
    """
    with trio.CancelScope(shield=True):
        if peer.process is not None and peer.process.poll() is not None:
            await peer.start()
        await peer.stop()


def lab(mover: str, friend: str, links: bool = True) -> str:
    """The lab as `lab.up` takes it; the two names are the peers where the guests start."""
    nodes = {
        "mover": {"image": "mini", "memory": "64M", "disk": "32M", "place": mover},
        "friend": {"image": "mini", "memory": "64M", "place": friend},
    }
    link = {"endpoints": ["mover:eth1", "friend:eth1"], "subnet": "10.8.0.0/24"}
    return json.dumps({"name": LAB, "topology": {"nodes": nodes, "links": [link] if links else []}})


@dataclass(frozen=True)
class Load:
    """What the moved guest's witness does. MiB, threads, MB/s that are written (0: all it can)."""

    memory: int = 8
    threads: int = 2
    rate: int = 0
    disk: bool = True

    def arguments(self) -> list[str]:
        disk = ["--disk", "/root/witness"] if self.disk else []
        words = ["--memory", self.memory, "--threads", self.threads, "--rate", self.rate]
        return [*map(str, words), *disk]


class Witnesses:
    """The lab on two peers, and where `mover` is now."""

    def __init__(self, tokyo: PeerProcess, virginia: PeerProcess, links: bool = True) -> None:
        self.peers = (tokyo, virginia)
        self.at = tokyo
        self.records: list[Row] = []
        self._links = links
        self._seen: dict[str, Row] = {}

    @property
    def elsewhere(self) -> PeerProcess:
        """The peer where `mover` is not; `friend` stays at virginia."""
        return self.peers[1] if self.at is self.peers[0] else self.peers[0]

    async def start(self, load: Load) -> None:
        """Deploy the lab and start both witnesses; returns when they are connected."""
        file = lab(self.peers[0].name, self.peers[1].name, self._links)
        await self.peers[0].call("lab.up", {"lab": file, "source": "witness.yaml"})
        await self.start_witnesses(load)

    async def start_witnesses(self, load: Load) -> None:
        """Start both witnesses, or start them anew with another load."""
        self._seen = {}
        for guest in (MOVER, FRIEND):
            await self.where(guest).execute(guest, "killall", "-9", "mobi-witness")
        await self.witness(FRIEND, Load(memory=1, threads=1, rate=1), "--listen", str(PORT))
        await self.witness(MOVER, load, "--connect", f"friend:{PORT}")
        if self._links:
            await eventually(self._connected)

    async def witness(self, guest: str, load: Load, *ends: str) -> None:
        """Start a guest's witness, in the background."""
        words = ["mobi-witness", "run", *load.arguments(), *(ends if self._links else ())]
        script = f"{' '.join(words)} </dev/null >/dev/null 2>&1 & echo started"
        code, _, err = await self.where(guest).execute(guest, "sh", "-c", script)
        if code:
            raise RuntimeError(f"the witness of {guest} did not start: {err.decode(errors='replace')}")
        await eventually(lambda: self._answers(guest))

    async def stop_witness(self, guest: str) -> None:
        await self.where(guest).execute(guest, "killall", "mobi-witness")

    async def _answers(self, guest: str) -> bool:
        return (await self.where(guest).execute(guest, "mobi-witness", "report"))[0] in (0, 1)

    async def _connected(self) -> bool:
        reports = await self.reports()
        return all(report["tcp_received"] > 0 for report in reports.values())

    def where(self, guest: str) -> PeerProcess:
        return self.at if guest == MOVER else self.peers[1]

    async def report(self, guest: str) -> Row:
        """What the witness of this guest saw; gaps are those since the last report."""
        code, out, err = await self.where(guest).execute(guest, "mobi-witness", "report")
        if code not in (0, 1):
            raise RuntimeError(f"{guest}: {err.decode(errors='replace').strip()}")
        found: Row = json.loads(out)
        return found

    async def reports(self) -> dict[str, Row]:
        return {guest: await self.report(guest) for guest in (MOVER, FRIEND)}

    async def move(self, **wishes: Any) -> Row:
        """Migrate `mover` to the other peer; returns the record."""
        arguments = {"vm": MOVER, "to": self.elsewhere.name, **wishes}
        record: Row = await self.at.call("vm.migrate", arguments)
        if record["ok"]:
            self.at = self.elsewhere
        self.records.append(record)
        return record

    async def wrong(self) -> list[str]:
        """Everything that a witness has to complain of, as sentences; nothing may stand still either."""
        found = []
        for guest, report in (await self.reports()).items():
            found += [f"{guest}: {key} is {report[key]}" for key in FAULTS if report[key]]
            found += [f"{guest}: {report['first_error']}"] if report["first_error"] else []
            if self._links and report["tcp_connections"] != 1:
                found.append(f"{guest}: {report['tcp_connections']} connections instead of 1")
            before = self._seen.get(guest, {})
            found += [
                f"{guest}: {key} went from {before[key]} to {report[key]}"
                for key in GROWING
                if report[key] < before.get(key, 0)
            ]
            self._seen[guest] = report
        return found

    async def working(self) -> bool:
        """Whether every part of both witnesses that ever did something goes on doing it."""
        before = await self.reports()

        async def gone_on() -> bool:
            now = await self.reports()
            return all(
                now[guest][key] > before[guest][key] for guest in now for key in GROWING if before[guest][key]
            )

        return bool(await eventually(gone_on))


def merged_disk(overlay: Path, base: Path, target: Path) -> Path:
    """Put base and overlay of a disk that nobody uses together (`kernel/helper/overlay.h`)."""
    shutil.copyfile(base, target)
    target.chmod(0o600)
    with overlay.open("rb") as source, target.open("r+b") as out:
        header = source.read(4096)
        block_size, size = struct.unpack_from("<IQ", header, 12)
        blocks = size // block_size
        map_bytes = -(-(-(-blocks // 64) * 8) // 4096) * 4096
        source.seek(4096)
        allocated = source.read(map_bytes)
        for block in range(blocks):
            if allocated[block // 8] >> block % 8 & 1:
                source.seek(4096 + 2 * map_bytes + block * block_size)
                out.seek(block * block_size)
                out.write(source.read(block_size))
    return target


def file_system_errors(image: Path) -> str:
    """What e2fsck says of a file system that was unmounted in order; nothing if it is clean."""
    done = subprocess.run(["e2fsck", "-fn", str(image)], capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr if done.returncode else ""


def file_in(image: Path, path: str) -> bytes:
    """The content of a file inside a file system."""
    command = ["debugfs", "-R", f"cat {path}", str(image)]
    return subprocess.run(command, capture_output=True, timeout=60, check=True).stdout


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """`{min, median, p99, max}` of figures; None where there are none."""
    if not values:
        return dict.fromkeys(("min", "median", "p99", "max"))
    ordered = sorted(values)
    figures = (
        ordered[0],
        statistics.median(ordered),
        ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        ordered[-1],
    )
    return {name: round(v, 3) for name, v in zip(("min", "median", "p99", "max"), figures, strict=True)}
