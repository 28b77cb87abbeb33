# SPDX-License-Identifier: Apache-2.0
"""The one shape of every decision: events in, effects out.

A machine is a pure object with one method, `handle(event, now)`. It is told what happened (an *event*) and
what time it is (seconds on a clock that never goes back), changes its own state, and answers with what should
be done (*effects*), in the order in which it must be carried out. It opens no socket, reads no clock and
rolls no dice of its own: time is an argument, randomness a seeded `random.Random` given at construction. So
the same code runs in a live peer, where a trio shell carries the effects out, in the simulator, where a seed
decides what arrives when, and in a test of five lines; and a recorded list of events replays a bug exactly.

Events and effects are frozen dataclasses. The effects that every shell understands are here; a machine adds
its own beside itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Send:
    """Send `message` to the peer with id `peer`; it may be lost, doubled or late."""

    peer: str
    message: Any


@dataclass(frozen=True)
class WakeAt:
    """Feed `Woken(timer)` back at time `at`; a later `WakeAt` with the same timer replaces it."""

    timer: str
    at: float


@dataclass(frozen=True)
class Persist:
    """Make `data` durable, then feed `Persisted(key)` back. A barrier: later effects wait for it."""

    key: str
    data: Any


@dataclass(frozen=True)
class Woken:
    """Event: the time asked for with `WakeAt` has come."""

    timer: str


@dataclass(frozen=True)
class Persisted:
    """Event: the data of `Persist(key)` is on disk."""

    key: str
