# SPDX-License-Identifier: Apache-2.0
"""A peer's host as far as a test can stop it: every process of the peer, its helpers and its guests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from tests.guest.peers import PeerProcess


def helpers_of(peer: PeerProcess, role: str = "") -> list[int]:
    """The helper processes of a peer, also those whose mobid is gone; with `role` only those."""
    runtime = str(peer.socket.resolve().parent).encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_bytes().split(b"\0")
            of_peer = len(words) > 3 and words[2] == b"--control" and words[3].startswith(runtime)
            if of_peer and role in ("", words[1].decode()):
                found.append(int(path.parent.name))
    return found


def descendants(pid: int) -> list[int]:
    """All processes below this one."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return children + [lower for child in children for lower in descendants(child)]


def guests_processes(peer: PeerProcess) -> list[int]:
    """The kernels of a peer's guests with everything below them."""
    return [pid for shim in helpers_of(peer, "guest") for pid in descendants(shim)]


def everything(peer: PeerProcess) -> list[int]:
    """mobid, its helpers, its guests, in the order in which they decide about one another."""
    assert peer.process is not None
    return [peer.process.pid, *helpers_of(peer), *guests_processes(peer)]


def stop(pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)


def go_on(pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
