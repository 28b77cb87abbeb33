# SPDX-License-Identifier: Apache-2.0
"""Helpers whose peer is gone: found by their control sockets, asked to end.

Helpers outlive their peer on purpose, so that a restarted one takes them back. When nobody will restart
it, somebody must end them: `mobictl down`. Every helper has a control socket (`SOCK_SEQPACKET`,
`kernel/README.md` section 1) below the peer's runtime directory, and the kernel tells who listens at it.
It is asked to quit; one that does not within its time is killed, by the number that the kernel gave and
only if it still is a helper of this user.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgpack

QUIT_TIMEOUT: Final = 5.0
MOST_SOCKETS: Final = 10_000
HELPER: Final = "mobi-helper"


@dataclass
class Orphan:
    """A helper that still listens: its control socket, connected, and its process id."""

    path: Path
    connection: socket.socket
    pid: int


def _sockets(directory: Path) -> Iterator[Path]:
    for count, (folder, _, files) in enumerate(os.walk(directory)):
        if count > MOST_SOCKETS:
            return
        for name in files:
            path = Path(folder) / name
            if path.is_socket():
                yield path


def find(directory: Path) -> list[Orphan]:
    """All helpers that listen at a control socket below a runtime directory."""
    found = []
    for path in _sockets(directory):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.settimeout(QUIT_TIMEOUT)
        try:
            connection.connect(str(path))
            pid, uid, _ = struct.unpack(
                "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            )
        except OSError:
            # Nobody listens there, or it is a socket of another type (a device, the peer's API).
            connection.close()
            continue
        if uid == os.getuid():
            found.append(Orphan(path, connection, pid))
        else:
            connection.close()
    return found


def end_all(directory: Path) -> int:
    """End every helper below a runtime directory; returns how many there were."""
    orphans = find(directory)
    for orphan in orphans:
        try:
            orphan.connection.send(msgpack.packb({"id": 1, "op": "quit"}))
        except OSError:
            continue
    deadline = time.monotonic() + QUIT_TIMEOUT
    for orphan in orphans:
        if not _gone(orphan.pid, deadline):
            _kill(orphan.pid)
        orphan.connection.close()
    return len(orphans)


def is_helper(pid: int) -> bool:
    """Whether the process is one of our helpers now (a number may have gone to somebody else)."""
    try:
        name = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
        return os.path.basename(name).decode(errors="replace") == HELPER
    except OSError:
        return False


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in ("Z", "X")


def _gone(pid: int, deadline: float) -> bool:
    while alive(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _kill(pid: int) -> None:
    if is_helper(pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return
