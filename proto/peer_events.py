# SPDX-License-Identifier: Apache-2.0
"""What the one machine of a peer hears and wants (`proto/peer.py`).

`Received`, `Woken`, `Persisted`, `Read`, `TransferTo`, and the effects `Send`, `WakeAt`, `Persist`, `Became`
and `ReadFailed` are those of `proto/raft/events.py`. Messages are those of Raft, of the leases, and
`Forward`. A time is seconds of CLOCK_BOOTTIME, a wall time seconds since 1970.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from proto.api import OperationError
from proto.entries import Entry, Proposal
from proto.lease_events import Deadline, LeaseMessage, PeerFound, PeerLost
from proto.machine import Persisted, Send, WakeAt, Woken
from proto.raft import events as raft
from proto.raft import messages
from proto.state import State
from proto.swim.packets import Reach

# Messages.


@dataclass(frozen=True, slots=True)
class Forward:
    """A member's own proposals (`entries.encode`), on their way to the coordinator.

    No answer is sent: the proposer sees in its own copy of the log what became of them, and sends them
    again until then.
    """

    proposals: tuple[bytes, ...]


Message = messages.Message | LeaseMessage | Forward


# Events.


@dataclass(frozen=True, slots=True)
class Proposed:
    """This peer wants an entry: `proposal` has its client (this peer), boot and sequence (from 1, growing).

    `Applied` with the same three says what became of it; it is sent again until then, or until `GivenUp`.
    With an empty client it is the coordinator's own decision: tried once, and only if this peer leads.
    """

    proposal: Proposal
    wall: float


@dataclass(frozen=True, slots=True)
class GivenUp:
    """Nobody waits for this proposal any more; do not send it again (it may still become true)."""

    sequence: int


@dataclass(frozen=True, slots=True)
class Wall:
    """What the wall clock shows now. Once at the start and again every minute or so is enough: in between,
    and for proposals of others, the machine counts on with CLOCK_BOOTTIME."""

    wall: float


@dataclass(frozen=True, slots=True)
class Fence:
    """Commit `entry` because the lease of `peer` has run out.

    Done only if this peer still coordinates in `term` and the lease is still out at this moment; until the
    entry is applied the peer gets no lease. Else nothing happens, and the next `PeerLost` asks again.
    """

    peer: str
    entry: Entry
    term: int
    wall: float


@dataclass(frozen=True, slots=True)
class Sighted:
    """A hint from the membership: how a member looks, and what its host has free (None: as before).

    Of this peer itself too: what its own host has free.
    """

    peer: str
    state: Reach
    rtt: float | None = None
    memory_free: int | None = None


# Effects.


@dataclass(frozen=True, slots=True)
class Applied:
    """Record `index` was applied. `proposal` is None for records that are no commands; `refused` says why
    an entry changed nothing. `state` is the state after it.

    `repeated`: the entry changed nothing now, since it was decided at `index` or before; `refused` is what
    was decided then. After `Restored` there is one of these, with the index of the decision, for each
    proposal of this peer that was decided in the records not seen.
    """

    index: int
    proposal: Proposal | None
    refused: OperationError | None
    state: State
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class Restored:
    """The state was replaced by a snapshot: records in between were not seen one by one."""

    state: State


@dataclass(frozen=True, slots=True)
class Readable:
    """`state` of this peer is now at least as new as everything acknowledged before the `Read`."""

    cookie: int
    state: State


@dataclass(frozen=True, slots=True)
class Settings:
    """The times and bounds of a peer's machine, in seconds, bytes and records."""

    raft: raft.Settings = field(default_factory=raft.Settings)
    lease: float = 1.5
    """Lease of a peer near the coordinator, renewed every fifth of it."""
    long_lease: float = 10.0
    """Lease of a peer whose round trip to the coordinator is longer than `near`."""
    near: float = 0.05
    drift: float = 0.01
    margin: float = 0.15
    resend: float = 0.5
    """A proposal not seen applied after so long is sent again."""
    compact_records: int = 10_000
    compact_bytes: int = 16 << 20
    keep_records: int = 1_000
    voter_dead_after: float = 10.0
    """A voter that looks dead for so long is replaced, if another member can take its place."""


Event = (
    raft.Received
    | Woken
    | Persisted
    | raft.Read
    | raft.TransferTo
    | Proposed
    | GivenUp
    | Wall
    | Fence
    | Sighted
)

Effect = (
    Send
    | WakeAt
    | raft.Persist
    | raft.Became
    | raft.ReadFailed
    | Applied
    | Restored
    | Readable
    | Deadline
    | PeerLost
    | PeerFound
)
