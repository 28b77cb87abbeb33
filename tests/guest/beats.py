# SPDX-License-Identifier: Apache-2.0
"""Which copy of a guest ran when: the guest's own witness that it never ran twice.

A guest prints a *beat* on its console some 15 times a second: its boot id, a number, and the time of its own
clock. Each copy of a guest has a console log of its own at the peer where it runs, so a beat says which copy
it was (the log), as what it ran (the boot id goes with the memory, also through a migration; a restart has a
new one) and when.

The time is the guest's CLOCK_REALTIME, read in the same moment in which the guest runs. A guest's clock is
the host's CLOCK_MONOTONIC with an offset that is set when it boots or comes to another process, so that all
copies on one host show the host's time, to a millisecond, also after they stood still. When a line reaches
its log says nothing: the shim that writes it may be stopped longer than the guest, and does so later.

`Beats` reads all logs from the first line on and keeps them open, since a copy's log goes with the copy.
`Beats.twice` looks for two copies whose stretches overlap. A host that was stopped and goes on is a case of
its own: its guest may run for a moment before its shim has looked at the lease, and may even beat; what holds
then is that none of its frames is accepted. That is what `heard` is for: the beats that another guest
received by UDP.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import trio

from tests.guest.peers import PeerProcess, eventually

INTERVAL = 0.02
STRETCH_GAP = 1.0
"""Seconds without a beat after which a copy is taken to have stood still; a loaded host is slow."""
SLACK = 0.02
"""Seconds by which the clocks of two copies may differ."""
PORT = 5005
PROGRAM, HEARD = "/root/datagram", "/root/heard"

READ_CLOCK = "$(adjtimex | sed -n 's/.*tv_u*sec: *//p')"
PRINT = f"set -- {READ_CLOCK}; echo beat $boot $n $1 $2; n=$((n+1)); usleep 50000"
LOOP = f"boot=$(cat /proc/sys/kernel/random/boot_id); n=0; while :; do {PRINT}; done"

BEAT = f"( {LOOP} ) </dev/null >/dev/console 2>/dev/null &"
"""For a shell in the guest, or `exec:` of a lab file: beat for ever."""

_LINE = re.compile(rb"beat ([0-9a-f-]{36}) (\d+) (\d+) (\d+)\r?\n")


@dataclass(frozen=True, order=True)
class Beat:
    """The guest ran `at` this time (UTC). `copy` is PEER:EPOCH:LOG, LOG a number of the console's log."""

    at: float
    copy: str
    boot: str
    number: int


@dataclass
class _Log:
    file: BinaryIO
    guest: str
    copy: str
    rest: bytes = b""


def parse(data: bytes, copy: str = "") -> list[Beat]:
    """All whole beats in some output."""
    return [
        Beat(int(seconds) + int(micros) / 1e6, copy, boot.decode(), int(number))
        for boot, number, seconds, micros in _LINE.findall(data)
    ]


class Beats:
    """All beats of all guests on these peers. `run` is the task that reads them."""

    def __init__(self, directories: Mapping[str, Path]) -> None:
        """`directories` of the peers, by their names."""
        self._directories = directories
        self._logs: dict[tuple[int, int], _Log] = {}
        self._found: list[tuple[str, Beat]] = []

    async def run(self) -> None:
        """Read until cancelled; never slower than logs are removed."""
        while True:
            self.look()
            await trio.sleep(INTERVAL)

    def look(self) -> None:
        """Read everything that is there now."""
        for peer, directory in self._directories.items():
            for pattern in ("guests/*/console.log", "fenced/*/console.log"):
                for path in directory.glob(pattern):
                    self._open(peer, path)
        for log in self._logs.values():
            log.rest += log.file.read()
            end = log.rest.rfind(b"\n") + 1
            self._found += [(log.guest, beat) for beat in parse(log.rest[:end], log.copy)]
            log.rest = log.rest[end:]

    def _open(self, peer: str, path: Path) -> None:
        try:
            record = json.loads(path.with_name("guest.json").read_bytes())
            file = path.open("rb")
        except OSError:
            return  # it goes at this moment
        status = os.fstat(file.fileno())
        key = (status.st_dev, status.st_ino)
        if key in self._logs:
            file.close()
            return
        self._logs[key] = _Log(file, record["key"], f"{peer}:{record['epoch']}:{len(self._logs)}")

    def close(self) -> None:
        for log in self._logs.values():
            log.file.close()

    # Looking.

    def guests(self) -> list[str]:
        """All guests (LAB/NAME) that were ever seen."""
        return sorted({key for key, _ in self._found})

    def of(self, guest: str) -> list[Beat]:
        """The beats of a guest (LAB/NAME) by time, as read until now."""
        self.look()
        return sorted(beat for key, beat in self._found if key == guest)

    async def goes_on(self, guest: str, more: int = 5) -> list[Beat]:
        """Wait until a guest has beaten some more times."""
        before = len(self.of(guest))

        async def beaten() -> bool:
            return len(self.of(guest)) >= before + more

        await eventually(beaten)
        return self.of(guest)

    async def stands(self, guest: str) -> Beat:
        """Wait until a guest has not beaten for `STRETCH_GAP`; its last beat."""
        while True:
            before = len(self.of(guest))
            await trio.sleep(STRETCH_GAP)
            if before and len(self.of(guest)) == before:
                return self.of(guest)[-1]

    def twice(self, guest: str, moment: float = 0.0) -> list[str]:
        """Where two copies of a guest ran at the same time for longer than `moment`, in words."""
        return overlaps(self.of(guest), moment)


def stretches(beats: Sequence[Beat]) -> list[tuple[str, float, float]]:
    """(copy, from, until) of the times in which each copy surely ran."""
    by_copy: dict[str, list[float]] = {}
    for beat in beats:
        by_copy.setdefault(beat.copy, []).append(beat.at)
    found = []
    for copy, times in by_copy.items():
        times.sort()
        first = last = times[0]
        for at in times[1:]:
            if at - last > STRETCH_GAP:
                found.append((copy, first, last))
                first = at
            last = at
        found.append((copy, first, last))
    return sorted(found, key=lambda stretch: stretch[1])


def overlaps(beats: Sequence[Beat], moment: float = 0.0) -> list[str]:
    """Where two of these copies ran at the same time for longer than `moment` seconds."""
    found = []
    latest: tuple[str, float, float] | None = None
    for stretch in stretches(beats):
        if latest is not None and stretch[0] != latest[0] and stretch[1] < latest[2] - SLACK:
            seconds = min(stretch[2], latest[2]) - stretch[1]
            said = f"{latest[0]} and {stretch[0]} both ran for {seconds:.3f} s from {stretch[1]:.3f}"
            found += [said] if seconds >= moment else []
        if latest is None or stretch[2] > latest[2]:
            latest = stretch
    return found


async def speak(speaker: PeerProcess, guest: str, hearer: PeerProcess, other: str) -> None:
    """Let `guest` beat on its console, and to the guest `other` on its first network, from now on.

    It need not ask for the other's address: what waits for an answer is sent later, when it may run again.
    """
    interface = (await hearer.call("vm.show", {"vm": other}))["interfaces"][0]
    address = interface["addresses"][0].partition("/")[0]
    known = f"arp -s {address} {interface['mac']}"
    program = await trio.to_thread.run_sync(datagram_program)
    for peer, key in ((speaker, guest), (hearer, other)):
        await peer.put(key, PROGRAM, program, mode=0o755)
    hear = f"( {PROGRAM} hear {PORT} ) </dev/null >{HEARD} 2>/dev/null &"
    say = f"( ( {LOOP} ) | tee /dev/console | {PROGRAM} say {address} {PORT} ) </dev/null >/dev/null 2>&1 &"
    say = f"{known} || exit; {say}"
    for peer, key, script in ((hearer, other, hear), (speaker, guest, say)):
        code, _, err = await peer.execute(key, "sh", "-c", script)
        assert code == 0, err


@lru_cache
def datagram_program() -> bytes:
    """`datagram.c`, for any guest."""
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "datagram"
        source = Path(__file__).with_name("datagram.c")
        command = ["gcc", "-O2", "-static", "-Wall", "-Wextra", "-Werror", "-o", str(program), str(source)]
        subprocess.run(command, check=True, timeout=120)
        return program.read_bytes()


async def heard(peer: PeerProcess, guest: str) -> list[Beat]:
    """The beats that reached the guest to which another one speaks, in the order of their arrival."""
    code, out, err = await peer.execute(guest, "cat", HEARD)
    assert code == 0, err
    return parse(out)
