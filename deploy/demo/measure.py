# SPDX-License-Identifier: Apache-2.0
"""What the demo measures from inside the guests: latencies, throughputs, the client's connection, the
prober's gaps."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy.demo.command import DemoError, in_guest

LAB = "unified-file-server"
CONTENT, PROTOCOL, CLIENT = (f"{LAB}/{name}" for name in ("content", "protocol", "client"))
PROBE_INTERVAL = 0.02
DROP_CACHES = "sync; echo 3 >/proc/sys/vm/drop_caches"


def latency_ms(directory: Path, guest: str, host: str) -> float:
    """Median of five pings."""
    said = in_guest(directory, guest, "ping", "-n", "-c", "5", "-i", "0.2", host)
    times = sorted(float(t) for t in re.findall(r"time=([\d.]+) ms", said))
    if not times:
        raise DemoError(f"{host} does not answer pings from {guest}")
    return times[len(times) // 2]


def stream_mbps(directory: Path, guest: str, host: str) -> float:
    """One TCP stream for three seconds, as received."""
    said = in_guest(directory, guest, "iperf3", "--json", "--client", host, "--time", "3", timeout=60)
    return float(json.loads(said)["end"]["sum_received"]["bits_per_second"]) / 1e6


def file_mbps(directory: Path, file: int) -> float:
    """The client reads one file once, past its own cache."""
    said = in_guest(
        directory,
        CLIENT,
        "sh",
        "-c",
        f"dd if=/mnt/ufs/file-{file} of=/dev/null bs=256k iflag=direct 2>&1",
        timeout=120,
    )
    found = re.search(r"(\d+) bytes .* copied, ([\d.e-]+) s", said)
    if not found:
        raise DemoError(f"the client could not read file-{file}: {said.strip()}")
    return 8 * int(found[1]) / float(found[2]) / 1e6


def placement(directory: Path) -> dict[str, float]:
    """The row of the paper's table for where the protocol handler is now; keys as in the report."""
    row = {
        "content_ms": latency_ms(directory, PROTOCOL, "content"),
        "content_mbps": stream_mbps(directory, PROTOCOL, "content"),
        "client_ms": latency_ms(directory, PROTOCOL, "client"),
        "client_mbps": stream_mbps(directory, PROTOCOL, "client"),
    }
    in_guest(directory, PROTOCOL, "sh", "-c", DROP_CACHES)
    row["file_cold_mbps"] = file_mbps(directory, 0)
    row["file_cached_mbps"] = file_mbps(directory, 0)
    return row


def connection(directory: Path) -> str:
    """The client's TCP connection to the share, as local port and inode: another connection is another
    string."""
    for line in in_guest(directory, CLIENT, "cat", "/proc/net/tcp").splitlines()[1:]:
        fields = line.split()
        if fields[2].endswith(":01BD") and fields[3] == "01":  # port 445, established
            return f"port {int(fields[1].rpartition(':')[2], 16)}"
    raise DemoError("the client has no connection to the share")


def reconnects(directory: Path) -> int:
    """How often the client's CIFS had to connect anew since it mounted."""
    said = in_guest(directory, CLIENT, "cat", "/proc/fs/cifs/Stats")
    found = re.search(r"(\d+) session (\d+) share reconnects", said)
    return int(found[1]) + int(found[2]) if found else 0


def largest_gap_ms(lines: Sequence[str], start: float, end: float) -> float | None:
    """Largest gap between two answers to the prober between two times (CLOCK_REALTIME), beyond its
    interval."""
    stamps = [float(s) for line in lines for s in re.findall(r"^\[([\d.]+)\] \d+ bytes from", line)]
    gaps = [b - a for a, b in itertools.pairwise(stamps) if b >= start and a <= end]
    return 1000 * max(max(gaps) - PROBE_INTERVAL, 0.0) if gaps else None


def reader_results(lines: Sequence[str]) -> tuple[list[tuple[float, int]], int, int]:
    """(ticks of (time, bytes), files read, files wrong) from the reader's output."""
    ticks: list[tuple[float, int]] = []
    reads = bad = 0
    for line in lines:
        try:
            record: dict[str, Any] = json.loads(line)
        except ValueError:  # a line cut off where the reader was stopped, or a message of the mount
            continue
        if "file" in record:
            reads += bool(record["whole"])
            bad += record["wrong"] > 0
        elif "t" in record:
            ticks.append((record["t"], record["bytes"]))
    return ticks, reads, bad
