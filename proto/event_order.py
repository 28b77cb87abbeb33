# SPDX-License-Identifier: Apache-2.0
"""Streams of events from many peers, brought into the one order that everybody prints.

Events are ordered by (stamp, peer); stamps are hybrid logical clocks (`proto/hlc.py`). A stream is in order
by itself, and says from time to time how far it is: a heartbeat carries a stamp below which nothing more will
come. The *watermark* is the least of what all streams have said, and an event at or below it can be printed:
nothing before it can still arrive. (The same idea holds up events in stream processors: Akidau et al., *The
Dataflow Model*, VLDB 2015.)

A peer that is silent must not hold up the others for ever. After `hold` seconds of silence its stream does
not count until it speaks again, and no event waits longer than that. What then comes below what has been
printed is printed at once and called late.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any

Event = dict[str, Any]


@dataclass
class _Stream:
    mark: int = 0
    """Nothing at or below this stamp will come any more."""
    last: int = 0
    """The stamp of the newest event that came."""
    heard: float = -math.inf
    ended: bool = False
    counted: bool = True


class Merge:
    """The machine: events, heartbeats and losses in, events in order out. `now` is any steady clock."""

    def __init__(self, hold: float) -> None:
        self._hold = hold
        self._streams: dict[str, _Stream] = {}
        self._waiting: list[tuple[int, str, float, Event]] = []
        self._printed = (0, "")

    def expect(self, peer: str, now: float, after: int = 0) -> None:
        """There is a stream of `peer`; its events up to the stamp `after` are known."""
        self._streams.setdefault(peer, _Stream(mark=after, last=after, heard=now))

    def position(self, peer: str) -> int:
        """The stamp of the newest event of `peer` that came."""
        return self._streams[peer].last

    def event(self, peer: str, stamp: int, event: Event, now: float) -> None:
        """An event came; one that came before is dropped."""
        stream = self._streams[peer]
        stream.heard = now
        if stamp <= stream.last:
            return
        stream.last = stamp
        stream.mark = max(stream.mark, stamp)
        heappush(self._waiting, (stamp, peer, now, event))

    def heartbeat(self, peer: str, stamp: int, now: float) -> None:
        """Everything of `peer` up to `stamp` has come."""
        stream = self._streams[peer]
        stream.heard, stream.mark = now, max(stream.mark, stamp)

    def end(self, peer: str) -> None:
        """Nothing more comes from `peer`: it left, or only the past was asked for."""
        self._streams[peer].ended = True

    @property
    def ended(self) -> bool:
        """Whether nothing more comes from anybody and all has been released."""
        return not self._waiting and all(stream.ended for stream in self._streams.values())

    def silent(self, now: float) -> list[str]:
        """The peers that have become silent since this was last asked; they do not count any more."""
        turned = []
        for peer, stream in sorted(self._streams.items()):
            counted = stream.ended or now - stream.heard <= self._hold
            if stream.counted and not counted:
                turned.append(peer)
            stream.counted = counted
        return turned

    def release(self, now: float, limit: float = math.inf) -> list[tuple[Event, bool]]:
        """The events whose turn it is, each with whether it is late.

        A stamp beyond `limit` is no clock's (`hlc.believable`): such an event is late to all, and makes
        no other late.
        """
        streams = [stream for stream in self._streams.values() if stream.counted and not stream.ended]
        mark = min((stream.mark for stream in streams), default=math.inf)
        ready: list[tuple[Event, bool]] = []
        overdue = [stamp for stamp, _, came, _ in self._waiting if now - came > self._hold]
        mark = max(mark, *overdue) if overdue else mark
        while self._waiting and self._waiting[0][0] <= mark:
            stamp, peer, _, event = heappop(self._waiting)
            late = (stamp, peer) < self._printed or stamp > limit
            if not late:
                self._printed = (stamp, peer)
            ready.append((event, late))
        return ready
