# SPDX-License-Identifier: Apache-2.0
"""Waiting for something to have changed, without losing a change between two looks."""

from __future__ import annotations

from collections.abc import Callable

import trio


class Changed:
    """Set as often as you like; everybody who waits wakes and looks again."""

    def __init__(self) -> None:
        self._event: trio.Event | None = None

    def set(self) -> None:
        """Wake all who wait now."""
        if self._event is not None:
            self._event.set()
            self._event = None

    async def wait(self) -> None:
        """The next `set`."""
        if self._event is None:
            self._event = trio.Event()
        await self._event.wait()

    async def wait_until(self, predicate: Callable[[], bool]) -> None:
        """Until `predicate()` holds; it is looked at once before waiting and after every `set`."""
        while not predicate():
            await self.wait()
