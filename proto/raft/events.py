# SPDX-License-Identifier: Apache-2.0
"""What a replica hears and wants: the events and effects of `proto/raft/machine.py`, and what it keeps.

`Send`, `WakeAt`, `Woken` and `Persisted` are those of `proto/machine.py`, with one difference: `Persist` here
is no barrier. The shell writes what it is given in order, in the background, several at once if they wait,
and feeds `Persisted(key)` for each; what must wait for it waits in the machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from proto.log import Record
from proto.machine import Persisted, Send, WakeAt, Woken
from proto.raft.configuration import Configuration

Role = Literal["observer", "follower", "candidate", "leader"]
"""An observer is no voter: a learner, a plain member that follows, or a peer that recovers."""

TIMER = "raft"
"""The only timer of the machine. A shell begins by feeding `Woken(TIMER)`: what follows from `Stored`."""


@dataclass(frozen=True, slots=True)
class Ballot:
    """The newest term seen, and the peer voted for in it ("" for none)."""

    term: int = 0
    voted: str = ""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state after record `index`; `data` is the encoded catalog (`proto/state_codec.py`)."""

    index: int = 0
    term: int = 0
    configuration: Configuration = field(default_factory=Configuration)
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class Durable:
    """What to make durable, all of it, in this order; None and empty mean unchanged.

    `truncate`: records with an index from here on go first. `snapshot`: replaces everything up to its
    index; `keep` is the first index of the records that stay in the log file (its end + 1 if none do);
    the record before it, if it is the snapshot's last, has the snapshot's term, whatever the file said.
    `recovered`: the peer is not `Stored.recovering` any more; it would be after a restart without this.
    """

    ballot: Ballot | None = None
    snapshot: Snapshot | None = None
    keep: int | None = None
    truncate: int | None = None
    records: tuple[Record, ...] = ()
    recovered: bool = False


@dataclass(frozen=True)
class Stored:
    """What was durable when the peer started. The first record follows `base_index`, whose term is
    `base_term`; the snapshot's index is not before `base_index`. Everything up to `commit` is known to be
    committed (perhaps more is): it is applied at once, so that a peer that starts alone can answer.
    `recovering`: the log was damaged or lost although the peer had voted or acknowledged before; so it stays,
    over restarts, until `Durable.recovered`."""

    ballot: Ballot = field(default_factory=Ballot)
    snapshot: Snapshot = field(default_factory=Snapshot)
    base_index: int = 0
    base_term: int = 0
    records: list[Record] = field(default_factory=list)
    recovering: bool = False
    commit: int = 0


@dataclass(frozen=True, slots=True)
class Settings:
    """Times in seconds, sizes in bytes. A replica campaigns `election` to 1.3 × `election` after it last
    heard a leader; votes for nobody within `election` of that; a leader without a quorum for `election`
    steps down, and one whose disk has lacked a committed record for so long hands over."""

    heartbeat: float = 0.1
    election: float = 1.0
    append_bytes: int = 256 << 10
    inflight: int = 64
    """Appends under way to one replica."""
    part_bytes: int = 256 << 10
    drift: float = 0.01
    """How much faster or slower than another one a clock may run, as a fraction."""


# Events. Also `Woken` and `Persisted`.


@dataclass(frozen=True, slots=True)
class Received:
    """A message of a member (authenticated by the channel)."""

    peer: str
    message: Any
    """A `messages.Message`; at `proto.peer` also a lease message or `Forward`."""


@dataclass(frozen=True, slots=True)
class Propose:
    """Append these payloads as commands. Without leadership nothing happens."""

    payloads: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Read:
    """Ask for a linearizable read; then `ReadReady` or `ReadFailed` with the cookie.

    `fresh`: only a quorum's answer to a question asked after now will do, not the leader's lease.
    """

    cookie: int
    fresh: bool = False


@dataclass(frozen=True, slots=True)
class ChangeVoters:
    """The leader shall see to it that these are the voters: first learners, then, caught up, by a joint
    change. Without leadership, or while a change is under way, nothing happens."""

    voters: frozenset[str]


@dataclass(frozen=True, slots=True)
class TransferTo:
    """The leader shall hand over to this voter; given up after `election` seconds."""

    peer: str


@dataclass(frozen=True, slots=True)
class Compact:
    """The state after applied record `index` is `data`: forget the records before `keep`."""

    index: int
    data: bytes
    keep: int


@dataclass(frozen=True, slots=True)
class Contacts:
    """Members that may be asked for the log, the best first, when no leader is known."""

    peers: tuple[str, ...]


# Effects. Also `Send` and `WakeAt`.


@dataclass(frozen=True, slots=True)
class Persist:
    """Make `data` durable in the background, then feed `Persisted(key)`."""

    key: str
    data: Durable


@dataclass(frozen=True, slots=True)
class Commit:
    """These records (of every kind) are committed; apply them in order."""

    records: tuple[Record, ...]


@dataclass(frozen=True, slots=True)
class Restore:
    """Forget the state: it is this snapshot's now."""

    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class Became:
    """Role, term or leader ("" if unknown) changed.

    `quiet`: a new leader's promise that no earlier leader can have had a quorum's answer within so many
    seconds before now (0 after a hand-over).
    """

    role: Role
    term: int
    leader: str
    quiet: float = 0.0


@dataclass(frozen=True, slots=True)
class ReadReady:
    """`index` is applied here, and what is read now was true after the question."""

    cookie: int
    index: int


@dataclass(frozen=True, slots=True)
class ReadFailed:
    """No leader could be asked in time."""

    cookie: int


Event = Received | Woken | Persisted | Propose | Read | ChangeVoters | TransferTo | Compact | Contacts
Effect = Send | WakeAt | Persist | Commit | Restore | Became | ReadReady | ReadFailed
