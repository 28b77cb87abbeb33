# SPDX-License-Identifier: Apache-2.0
"""The guests' own word on who ran when.

Every guest of these runs has `BEAT` among its commands: a loop that prints a line with this boot's random id
and a growing number on its console, twenty times a second. The shims keep the consoles in files, wherever a
copy runs. `Copies` reads all of these files while the run lasts (also of copies that are discarded later:
an open file stays readable) and stamps each line with this machine's clock. Two things are then wrong:

* the same (boot, number) printed twice: one copy went on at two places;
* two boots of one guest that print in the same stretch of time: two copies ran beside one another.
"""

from __future__ import annotations

import itertools
import json
import re
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

BEAT = (
    "(id=$(cat /proc/sys/kernel/random/uuid); n=0; while :; do echo BEAT $id $n >/dev/console; "
    "n=$((n+1)); usleep 50000; done) >/dev/null 2>&1 &"
)
"""A command of a lab file's `exec`."""

POLL = 0.02
SLACK = 0.5
"""Seconds by which a line may be read later than it was printed; the machine is busy."""

_LINE = re.compile(rb"BEAT ([0-9a-f-]{36}) (\d+)\r?\n")


@dataclass
class _Console:
    """One copy's console file as far as it was read."""

    guest: str
    file: BinaryIO
    rest: bytes = b""


@dataclass
class Boot:
    """What was seen of one boot of a guest: when (monotonic seconds), and at which files."""

    first: float
    last: float
    numbers: set[int] = field(default_factory=set)
    times: list[float] = field(default_factory=list)


class Copies:
    """Reads the consoles of all guests below a mesh's directory, as long as the block lasts."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._consoles: dict[tuple[int, int], _Console] = {}
        self.boots: dict[str, dict[str, Boot]] = defaultdict(dict)
        self.twice: list[str] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="copies", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join(30)
        for console in self._consoles.values():
            console.file.close()

    def _run(self) -> None:
        while not self._end.wait(POLL):
            self._look()
        self._look()

    def _look(self) -> None:
        for path in self._directory.glob("*/guests/*/console.log"):
            self._open(path)
        for console in self._consoles.values():
            self._read(console)

    def _open(self, path: Path) -> None:
        try:
            stat = path.stat()
            key = (stat.st_dev, stat.st_ino)
            if key not in self._consoles:
                record = json.loads((path.parent / "guest.json").read_text())
                self._consoles[key] = _Console(record["key"], path.open("rb"))
        except (OSError, ValueError, KeyError):
            return  # it is being made or removed at this moment; the next look sees

    def _read(self, console: _Console) -> None:
        data = console.file.read()
        if not data:
            return
        now = time.monotonic()
        text = console.rest + data
        end = 0
        for match in _LINE.finditer(text):
            end = match.end()
            self._note(console.guest, match[1].decode(), int(match[2]), now)
        console.rest = text[max(end, len(text) - 100) :]

    def _note(self, guest: str, boot: str, number: int, now: float) -> None:
        seen = self.boots[guest].setdefault(boot, Boot(now, now))
        if number in seen.numbers:
            self.twice.append(f"{guest}: boot {boot} printed line {number} twice")
        seen.numbers.add(number)
        seen.times.append(now)
        seen.last = now

    def wrong(self) -> list[str]:
        """All that must not be; empty if no guest ran twice."""
        found = list(self.twice)
        for guest, boots in self.boots.items():
            ordered = sorted(boots.items(), key=lambda item: item[1].first)
            for (earlier, one), (later, other) in itertools.pairwise(ordered):
                if one.last > other.first + SLACK:
                    text = f"boot {earlier} still ran {one.last - other.first:.2f} s after boot {later} began"
                    found.append(f"{guest}: {text}")
        return found

    def beats(self, guest: str) -> int:
        """How many lines this guest has printed so far."""
        return sum(len(boot.numbers) for boot in self.boots[guest].values())
