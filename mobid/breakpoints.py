# SPDX-License-Identifier: Apache-2.0
"""Places where a test can hold a peer, to let something fail exactly then.

Whatever may fail between two steps of a protocol is best tried out between these two steps, not near them.
With `MOBI_BREAKPOINTS=DIRECTORY` in its environment a peer that comes to the place NAME looks for the file
`NAME` there. If it exists, it is renamed to `NAME.reached` and the peer waits until somebody removes that;
then it goes on, and does not stop there again. Without the variable nothing of this exists.
"""

from __future__ import annotations

import os
from pathlib import Path

import structlog
import trio

INTERVAL = 0.01

log = structlog.get_logger()


class Breakpoints:
    """The places of one peer; none is set without a directory."""

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory

    @classmethod
    def of_environment(cls) -> Breakpoints:
        """Those of `$MOBI_BREAKPOINTS`."""
        named = os.environ.get("MOBI_BREAKPOINTS")
        return cls(Path(named) if named else None)

    async def reached(self, name: str) -> None:
        """Wait here if somebody wants it."""
        if self._directory is None:
            return
        held = self._directory / f"{name}.reached"
        try:
            (self._directory / name).rename(held)
        except FileNotFoundError:
            return
        log.warning("breakpoint", place=name)
        while held.exists():  # noqa: ASYNC110 - what is awaited is another process
            await trio.sleep(INTERVAL)
