# SPDX-License-Identifier: Apache-2.0
"""What happened, for people: kept as objects while a simulation runs, put into words only when asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

LINE = 260


class Trace:
    """The last `limit` events of a seed, each with real time and whom it concerns."""

    __slots__ = ("_events",)

    def __init__(self, limit: int | None) -> None:
        self._events: deque[tuple[float, str, tuple[Any, ...]]] = deque(maxlen=limit)

    def say(self, now: float, who: str, *what: Any) -> None:
        """`what` are words and frozen objects; objects that change later would lie."""
        self._events.append((now, who, what))

    def lines(self, names: dict[str, str]) -> Iterator[str]:
        """One line per event; ids of peers are replaced by their names."""
        for now, who, what in self._events:
            text = " ".join(part if isinstance(part, str) else repr(part) for part in what)
            for id, name in names.items():
                text = text.replace(id, name)
            yield f"{now:10.4f} {who:8} {text if len(text) <= LINE else text[:LINE] + '…'}"
