# SPDX-License-Identifier: Apache-2.0
"""A user who asks any peer, and another one when that peer dies half-way.

A command is asked with one key until some peer answers for good; what is kept of the answer is what the mesh
has *acknowledged*. An answer that says no for good is not a failure of the mesh and is raised.
"""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from proto.api import OperationError
from tests.chaos.hosts import Hosts

PAUSE = 0.1
ATTEMPT = 60.0
PASSING = frozenset({"unreachable", "no-leader", "no-majority", "timeout"})
"""Codes after which another peer may know better."""


class Unanswered(Exception):
    """Nobody answered for good within the patience; the command may have become true or not."""


def ask_anyone(
    hosts: Hosts,
    rng: random.Random,
    op: str,
    patience: float,
    among: Callable[[], Sequence[str]],
    **args: Any,
) -> Any:
    """The answer of some peer; raises `Unanswered`, or `OperationError` if the answer is no."""
    key = secrets.token_hex(8)
    end = time.monotonic() + patience
    why = "no peer runs"
    while time.monotonic() < end:
        running = [name for name in among() if hosts.running(name)]
        if running:
            try:
                return hosts.ask(rng.choice(running), op, timeout=ATTEMPT, key=key, **args)
            except OperationError as error:
                if error.code not in PASSING:
                    raise
                why = error.message
        time.sleep(PAUSE)
    raise Unanswered(f"{op}: {why}")
