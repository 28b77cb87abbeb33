# SPDX-License-Identifier: Apache-2.0
"""Live migration on loopback: how long a guest stands still, by the load it puts on its own memory.

The load is a guest program that writes memory at a share of the bandwidth that the migration may use; content
that does not compress, so that a byte changed is a byte to send. Three downtimes are told: *host* from the
freeze to the resume, *guest* the largest hole in a clock loop inside the guest, *network* the longest silence
that the other end of its TCP connection saw (a record comes each millisecond). The rows `part …` say what the
host's downtime is made of. The floor of it is copying the last difference and sending it through a socket.
"""

from __future__ import annotations

import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from tests.bench.report import Figure, Row, figure
from tests.built import missing
from tests.guest.witness import FRIEND, Load, Witnesses, run_to_end, two_peers

BANDWIDTH = 100_000_000
MOVES = 5
SETTLE = 1.0
"""Seconds of ordinary running before every move."""
FLOOR_RUNS = 5
LOADS = {"idle": 0.0, "20%": 0.2, "50%": 0.5, "80%": 0.8, "200%": 2.0}
QEMU: Figure = {"error": "not measured yet: this benchmark does not start QEMU so far"}


@dataclass
class Seen:
    """What the moves of one load gave."""

    records: list[dict[str, Any]] = field(default_factory=list)
    silences: list[float] = field(default_factory=list)

    def all(self, pick: Callable[[dict[str, Any]], float | None]) -> list[float]:
        return [value for record in self.records if (value := pick(record)) is not None]


def run() -> list[Row]:
    """Measure; raises `RuntimeError` if something is missing or went wrong."""
    if gone := missing():
        raise RuntimeError(gone)
    seen: dict[str, Seen] = {}
    if failure := run_to_end(lambda: _measure(seen)):
        raise RuntimeError(failure)
    return [row for load, found in seen.items() for row in _rows(load, found)]


async def _measure(found: dict[str, Seen]) -> None:
    with tempfile.TemporaryDirectory(prefix="mobi-bench-") as base:
        async with two_peers(Path(base)) as peers:
            witnesses = Witnesses(*peers)
            for load, share in LOADS.items():
                wanted = Load(threads=0, disk=False)
                if share:
                    wanted = Load(memory=32, threads=1, rate=int(share * BANDWIDTH / 1e6), disk=False)
                await (witnesses.start_witnesses if found else witnesses.start)(wanted)
                found[load] = await _moves(witnesses)
                print(f"bench migration: {load} done", file=sys.stderr, flush=True)


async def _moves(witnesses: Witnesses) -> Seen:
    seen = Seen()
    for _ in range(MOVES):
        await trio.sleep(SETTLE)
        await witnesses.report(FRIEND)
        record = await witnesses.move(bandwidth=BANDWIDTH)
        if not record["ok"]:
            raise RuntimeError(f"a migration failed: {record['reason']}")
        seen.records.append(record)
        seen.silences.append((await witnesses.report(FRIEND))["largest_tcp_gap_ms"])
    if wrong := await witnesses.wrong():
        raise RuntimeError("; ".join(wrong))
    return seen


def _rows(load: str, seen: Seen) -> list[Row]:
    residue = max(seen.all(lambda record: record["residue_bytes"]), default=0.0)
    floor = floor_of(int(residue))

    def row(case: str, unit: str, values: list[float], below: Figure | None = None) -> Row:
        return Row(f"{case}, {load}", unit, "lower", figure(values), {"qemu": QEMU}, below)

    rows = [
        row("downtime host", "ms", seen.all(lambda record: record["downtime_ms"]["host"]), floor),
        row("downtime guest", "ms", seen.all(lambda record: record["downtime_ms"]["guest"])),
        row("downtime network", "ms", seen.silences),
        row("total", "s", seen.all(lambda record: record["total_s"])),
        row("bytes", "B", seen.all(lambda record: record["sent_bytes"])),
        row("passes", "1", seen.all(lambda record: len(record["passes"]))),
        Row(f"dirty rate, {load}", "B/s", "higher", figure(seen.all(_dirty_rate))),
        row("residue", "B", seen.all(lambda record: record["residue_bytes"])),
    ]
    parts = [record["parts_ms"] for record in seen.records]
    for name in parts[0]:
        rows.append(row(f"part {name}", "ms", [part[name] for part in parts if part[name] is not None]))
    return rows


def _dirty_rate(record: dict[str, Any]) -> float | None:
    """What the guest really wrote, by the last pass: a starved one does not reach its share."""
    rate: float | None = record["passes"][-1]["dirty_rate"]
    return rate


def floor_of(size: int) -> Figure:
    """Milliseconds to copy so many bytes once and to move them through a TCP connection on loopback."""
    data, times = bytes(size), []
    for _ in range(FLOOR_RUNS):
        with socket.create_server(("127.0.0.1", 0)) as server:
            client = socket.create_connection(server.getsockname())
            peer, _ = server.accept()
        with client, peer:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            reader = threading.Thread(target=_drain, args=(peer, size))
            reader.start()
            began = time.perf_counter()
            client.sendall(bytearray(data))
            reader.join()
            times.append((time.perf_counter() - began) * 1000)
    return figure(times)


def _drain(connection: socket.socket, size: int) -> None:
    buffer = bytearray(1 << 20)
    while size > 0:
        got = connection.recv_into(buffer)
        if not got:
            return
        size -= got
