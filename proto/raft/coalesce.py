# SPDX-License-Identifier: Apache-2.0
"""Fewer messages that say the same: what a replica sends to one peer in one moment, put together.

A leader that is given many proposals at once sends each as soon as it has it. A shell that carries such a run
of messages out can replace appends that follow one another by one append of all their records, and
acknowledgements by the last one: a message may be lost or late anyway, and what the later one says includes
the earlier one. Everything behind it, writes and answers, gets fewer too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from proto.peer_events import Forward
from proto.raft.messages import Append, Appended

MOST_RECORDS = 4_096
MOST_BYTES = 1 << 20
"""Of payload in one append made of several."""


def coalesce(messages: Iterable[Any]) -> list[Any]:
    """The messages for one peer, in order, the fewest that say as much."""
    made: list[Any] = []
    for message in messages:
        joined = _joined(made[-1], message) if made else None
        if joined is None:
            made.append(message)
        else:
            made[-1] = joined
    return made


def _joined(first: Any, second: Any) -> Any:
    """One message instead of two that follow one another; None if that cannot be."""
    match first, second:
        case Append(), Append() if first.term == second.term and _follows(first, second):
            return Append(
                first.term,
                first.prev_index,
                first.prev_term,
                first.records + second.records,
                max(first.commit, second.commit),
                max(first.round, second.round),
            )
        case Forward(), Forward() if _fits([*first.proposals, *second.proposals]):
            return Forward(first.proposals + second.proposals)
        case Appended(), Appended() if _plain(first) and _plain(second) and first.term == second.term:
            return Appended(first.term, True, max(first.index, second.index), max(first.round, second.round))
    return None


def _follows(first: Append, second: Append) -> bool:
    end = first.records[-1] if first.records else None
    index, term = (end.index, end.term) if end else (first.prev_index, first.prev_term)
    if (second.prev_index, second.prev_term) != (index, term):
        return False
    if not first.records or not second.records:
        return True
    return _fits([record.payload for record in first.records + second.records])


def _fits(payloads: list[bytes]) -> bool:
    return len(payloads) <= MOST_RECORDS and sum(map(len, payloads)) <= MOST_BYTES


def _plain(message: Appended) -> bool:
    return message.ok and not message.recovering
