# SPDX-License-Identifier: Apache-2.0
"""Reads the beats of all guests (`tests/guest/beats.py`) while a run lasts, in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.guest.beats import Beat, Beats

POLL = 0.05


class Witness:
    """What all guests of a mesh said of themselves, as long as the block lasts."""

    def __init__(self, directories: Mapping[str, Path]) -> None:
        self._beats = Beats(directories)
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="witness", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join(30)
        self._beats.close()

    def _run(self) -> None:
        while not self._end.wait(POLL):
            with self._lock:
                self._beats.look()

    def count(self, guest: str) -> int:
        """How often a guest (LAB/NAME) has beaten so far."""
        with self._lock:
            return len(self._beats.of(guest))

    def since(self, guest: str, at: float, peers: Collection[str]) -> list[Beat]:
        """The beats of a guest at these peers from a time on (UTC), in order."""
        with self._lock:
            return [
                beat
                for beat in self._beats.of(guest)
                if beat.at >= at and beat.copy.partition(":")[0] in peers
            ]

    def wrong(self) -> list[str]:
        """All that must not be; empty if no guest ever ran twice."""
        with self._lock:
            return [f"{guest}: {text}" for guest in self._beats.guests() for text in self._beats.twice(guest)]
