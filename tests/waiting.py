# SPDX-License-Identifier: Apache-2.0
"""Waiting for what another process does: until it is so, never for a time that should be enough."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

PATIENCE = 60.0
"""Seconds until something that must happen is taken to have failed; the machine may be busy."""


def wait_for(
    condition: Callable[[], bool], timeout: float = PATIENCE, state: Callable[[], Any] = lambda: ""
) -> None:
    """Return once `condition` is true; else `TimeoutError`, with `state` as it is then."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"did not come true in {timeout} s: {state()}")
        time.sleep(0.005)
