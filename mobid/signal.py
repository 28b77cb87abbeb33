# SPDX-License-Identifier: Apache-2.0
"""Waiting for something to have changed, without losing a change between two looks."""

from __future__ import annotations

from collections.abc import Callable

import trio


class Changed:
    """Set as often as you like; everybody who waits wakes and looks again."""

    def __init__(self) -> None:
        self._event = trio.Event()

    def set(self) -> None:
        """Wake all who wait now."""
        self._event.set()
        self._event = trio.Event()

    async def wait(self) -> None:
        """The next `set`."""
        await self._event.wait()

    async def wait_until(self, predicate: Callable[[], bool]) -> None:
        """Until `predicate()` holds; it is looked at once before waiting and after every `set`."""
        while not predicate():
            await self._event.wait()
