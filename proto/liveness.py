# SPDX-License-Identifier: Apache-2.0
"""Who seems alive: a guess from answered and unanswered pings, never an authority.

Each member is pinged at a steady pace. Silence makes it *suspect*, longer silence *dead*; one answer makes
it alive again. The round trip is smoothed as TCP does it (RFC 6298: 7/8 old, 1/8 new). Nothing is ever
killed, moved or refused because of this guess alone: that takes the catalog and, for guests, a lease.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Reach = Literal["alive", "suspect", "dead"]

INTERVAL = 1.0
"""Seconds between two pings of a peer."""

SUSPECT_AFTER = 3.0
DEAD_AFTER = 10.0


@dataclass(frozen=True)
class Members:
    """Event: these are the other members now."""

    peers: frozenset[str]


@dataclass(frozen=True)
class Answered:
    """Event: a ping came back after `rtt` seconds."""

    peer: str
    rtt: float


@dataclass(frozen=True)
class Tick:
    """Event: time has passed; comes about every `INTERVAL`."""


@dataclass(frozen=True)
class Ping:
    """Effect: ping this peer once, and feed `Answered` if it answers."""

    peer: str


@dataclass(frozen=True)
class Turned:
    """Effect: a peer looks different now; tell who wants to know."""

    peer: str
    state: Reach


@dataclass
class _Sight:
    last: float
    state: Reach = "alive"
    rtt: float | None = None


class Liveness:
    """The machine (`proto.machine`). A new member counts as alive until its silence says otherwise."""

    def __init__(self) -> None:
        self._sights: dict[str, _Sight] = {}

    def handle(self, event: Members | Answered | Tick, now: float) -> list[Ping | Turned]:
        """Take an event; the effects say whom to ping and who has turned."""
        match event:
            case Members(peers):
                self._sights = {peer: self._sights.get(peer) or _Sight(now) for peer in peers}
                return []
            case Answered(peer, rtt):
                return self._answered(peer, rtt, now)
            case Tick():
                pings: list[Ping | Turned] = [Ping(peer) for peer in sorted(self._sights)]
                return pings + self._judge(now)

    def _answered(self, peer: str, rtt: float, now: float) -> list[Ping | Turned]:
        sight = self._sights.get(peer)
        if sight is None:
            return []
        sight.last = now
        sight.rtt = rtt if sight.rtt is None else sight.rtt + (rtt - sight.rtt) / 8
        return self._judge(now)

    def _judge(self, now: float) -> list[Ping | Turned]:
        turned: list[Ping | Turned] = []
        for peer, sight in sorted(self._sights.items()):
            silence = now - sight.last
            state: Reach = (
                "dead" if silence >= DEAD_AFTER else "suspect" if silence >= SUSPECT_AFTER else "alive"
            )
            if state != sight.state:
                sight.state = state
                turned.append(Turned(peer, state))
        return turned

    def state(self, peer: str) -> Reach:
        """How a peer looks; one that was never a member looks dead."""
        sight = self._sights.get(peer)
        return sight.state if sight else "dead"

    def rtt(self, peer: str) -> float | None:
        """Smoothed round trip in seconds, None before the first answer."""
        sight = self._sights.get(peer)
        return sight.rtt if sight else None
