# SPDX-License-Identifier: Apache-2.0
"""Tasks below a block: they begin with it and end with it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio


@asynccontextmanager
async def background(*tasks: Callable[[], Awaitable[Any]]) -> AsyncGenerator[trio.Nursery, None]:
    """Run `tasks` as long as the block lasts, then cancel them.

    An exception of the block comes out as itself, not in a group; one of a task comes out in a group, since
    that is a mistake and not an answer.
    """
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        for task in tasks:
            nursery.start_soon(task)
        try:
            yield nursery
        except Exception as error:  # noqa: BLE001 - raised again below, outside the nursery
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
