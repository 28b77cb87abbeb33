# SPDX-License-Identifier: Apache-2.0
"""What the replicas of a log say to one another.

A message may be lost, doubled, late or out of order, and says who sent it by the channel it came through.
`term` is the sender's. `proto/messages.py` turns messages into bytes and back and checks their sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

from proto.log import Record
from proto.raft.configuration import Configuration


@dataclass(frozen=True, slots=True)
class AskVote:
    """A candidate asks for a vote. `pre`: would you vote, if I asked with this term? (changes nothing).

    `forced`: the old leader itself handed over, so that having heard of it lately is no reason to refuse.
    """

    term: int
    last_index: int
    last_term: int
    pre: bool = False
    forced: bool = False


@dataclass(frozen=True, slots=True)
class Voted:
    """The answer; `pre` as asked. `term` is the voter's own if it refuses."""

    term: int
    granted: bool
    pre: bool = False


@dataclass(frozen=True, slots=True)
class Append:
    """The leader's records after `prev_index`; without records a heartbeat. `round` counts the leader's
    heartbeats and comes back in the answer: what a quorum answered was asked by a leader who still led."""

    term: int
    prev_index: int
    prev_term: int
    records: tuple[Record, ...]
    commit: int
    round: int


@dataclass(frozen=True, slots=True)
class Appended:
    """`ok`: everything up to `index` is durable at the sender and equal to the leader's log.

    Else the logs differ at the asked place, and the leader should try `index`, whose term here is
    `hint_term`. `recovering`: this replica has lost acknowledged records; its answers must not count.
    """

    term: int
    ok: bool
    index: int
    round: int
    hint_term: int = 0
    recovering: bool = False


@dataclass(frozen=True, slots=True)
class SnapshotPart:
    """A piece of the state after record `index`, for a replica too far behind for records. `round` is 0 from
    a replica that was asked with `Follow`; else it comes from the leader."""

    term: int
    index: int
    last_term: int
    configuration: Configuration
    size: int
    offset: int
    data: bytes
    round: int = 0


@dataclass(frozen=True, slots=True)
class SnapshotTaken:
    """So many bytes of the snapshot at `index` are here. `round` as in the part."""

    term: int
    index: int
    received: int
    round: int = 0


@dataclass(frozen=True, slots=True)
class Lead:
    """The leader hands over: campaign at once."""

    term: int


@dataclass(frozen=True, slots=True)
class AskRead:
    """A member asks the leader up to where it must apply to read what is true now. `fresh`: as in `Read`."""

    cookie: int
    fresh: bool = False


@dataclass(frozen=True, slots=True)
class Readable:
    """The answer: once `index` is applied, what is read was true after the question; None: not the leader."""

    cookie: int
    index: int | None


@dataclass(frozen=True, slots=True)
class Follow:
    """A member that is no replica asks any replica for the committed records after `after`.

    The answer comes at once if there is something, else when there is, or with the next heartbeat.
    """

    after: int
    after_term: int


@dataclass(frozen=True, slots=True)
class Feed:
    """Committed records for a follower; `leader` is whom the sender follows ("" if nobody leads)."""

    term: int
    leader: str
    configuration: Configuration
    prev_index: int
    prev_term: int
    records: tuple[Record, ...]
    commit: int


Message = (
    AskVote
    | Voted
    | Append
    | Appended
    | SnapshotPart
    | SnapshotTaken
    | Lead
    | AskRead
    | Readable
    | Follow
    | Feed
)
