# SPDX-License-Identifier: Apache-2.0
"""What a machine with one timer wants to do when: a heap of things, the earliest of which sets the timer."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator


class Agenda:
    """Things by the time they are due; a thing is a kind and what it is about (a number, a peer or "").

    Nothing is ever taken off: whoever handles a thing looks whether it still matters.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, str, int | str]] = []
        self._count = 0

    def add(self, at: float, kind: str, about: int | str = "") -> None:
        """`kind` is due at `at`."""
        self._count += 1
        heapq.heappush(self._heap, (at, self._count, kind, about))

    def due(self, now: float) -> Iterator[tuple[str, int | str]]:
        """Take off what is due, the earliest first."""
        while self._heap and self._heap[0][0] <= now:
            _, _, kind, about = heapq.heappop(self._heap)
            yield kind, about

    @property
    def next(self) -> float:
        """When the earliest is due; infinity if nothing is."""
        return self._heap[0][0] if self._heap else math.inf
