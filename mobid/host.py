# SPDX-License-Identifier: Apache-2.0
"""What this machine has: memory, processors and their features, read from the kernel."""

from __future__ import annotations

import os
import struct
from pathlib import Path

from proto.reconcile import Host

AT_MINSIGSTKSZ = 51
"""Key of the auxiliary vector: bytes of a signal frame, which grow with the extended register state."""


def memory_available(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes that programs can still get without swapping."""
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def memory_total() -> int:
    """Bytes of RAM."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cpus() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0))


def processor() -> Host:
    """The features of the processors (those that all of them have) and the size of their register state."""
    return Host(
        _features(Path("/proc/cpuinfo").read_text()), _signal_frame(Path("/proc/self/auxv").read_bytes())
    )


def _features(cpuinfo: str) -> frozenset[str]:
    found: frozenset[str] | None = None
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            flags = frozenset(value.split())
            found = flags if found is None else found & flags
    return found or frozenset()


def _signal_frame(auxv: bytes) -> int:
    pair = struct.Struct("@LL")
    for offset in range(0, len(auxv) - pair.size + 1, pair.size):
        key, value = pair.unpack_from(auxv, offset)
        if key == AT_MINSIGSTKSZ:
            return int(value)
    return 0
