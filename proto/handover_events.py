# SPDX-License-Identifier: Apache-2.0
"""What the handover's machines hear and want: their events, messages and effects (`proto/handover.py`).

A shell carries effects out in the order given and feeds back what happened. Peers are named by id; the empty
id is the coordinator, whoever that is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from proto.entries import Entry, HandoverState
from proto.machine import Persist, Persisted, Send, WakeAt, Woken

Released = Literal["no", "yes", "maybe"]

Note = Literal["releasing", "incoming", "refused"]


# Events.


@dataclass(frozen=True)
class Begin:
    """The log says that the migration is open, and this peer has just begun with it."""


@dataclass(frozen=True)
class Adopted:
    """This peer restarted and found the migration: its durable note, and its copy as it is.

    `copy` is of this peer's process for the guest: `waiting` (for the go-ahead), or none.
    """

    note: Note | None
    copy: Literal["running", "frozen", "waiting", "none"]


@dataclass(frozen=True)
class Logged:
    """What the log, as applied at this peer, says of the migration."""

    state: HandoverState


@dataclass(frozen=True)
class Prepared:
    """Source: the destination is ready. Destination: process, devices and streams are there."""


@dataclass(frozen=True)
class Switch:
    """Pre-copy has come far enough (`proto/precopy.py`)."""


@dataclass(frozen=True)
class Abort:
    """Somebody wants no more of it: a user, a deadline, a preparation that failed."""

    reason: str


@dataclass(frozen=True)
class StreamBroken:
    """The stream is closed for good. At the destination: without a release having come."""

    reason: str


@dataclass(frozen=True)
class Frozen:
    """The guest stands still."""


@dataclass(frozen=True)
class FreezeFailed:
    """The guest goes on."""

    reason: str


@dataclass(frozen=True)
class Sent:
    """What became of the release: `no` promises that nothing of it left this host."""

    released: Released


@dataclass(frozen=True)
class Received:
    """State and release are here; `match` says whether the roots are equal."""

    match: bool


@dataclass(frozen=True)
class LeaseValid:
    """This peer's lease holds, with a log applied that is at least as new as the lease."""


@dataclass(frozen=True)
class Started:
    """The guest runs here."""


@dataclass(frozen=True)
class StartFailed:
    """The guest does not run here. `ran`: it may have, for a moment."""

    ran: bool
    reason: str


@dataclass(frozen=True)
class Synced:
    """The guest's disks are on this host's disk; `ok` is false if that failed."""

    ok: bool = True


@dataclass(frozen=True)
class Discarded:
    """The process made for the guest is dead, its files are gone."""


@dataclass(frozen=True)
class PeerLost:
    """Coordinator: the destination's lease and the margin have run out."""


@dataclass(frozen=True)
class Adopt:
    """Coordinator: an operator says that the destination's copy does not run and never will."""


# Messages between peers; they arrive as events.


@dataclass(frozen=True)
class Settle:
    """Bring it to an end: run it if the release came, else make sure that it never will."""

    migration: str


@dataclass(frozen=True)
class AskDurable:
    """Source to destination: is your copy durable?"""

    migration: str


@dataclass(frozen=True)
class Durable:
    """Destination to source: it is; yours may go."""

    migration: str


@dataclass(frozen=True)
class Superseded:
    """Source: the log has removed the guest, or given a later right to run it than this handover does."""


@dataclass(frozen=True)
class CopyLost:
    """Destination to coordinator: the copy here is gone, and it may have run. It never will again."""

    migration: str


# Effects beyond those of `proto/machine.py`. The data of `Persist` is a `Note`, or None to forget it.


@dataclass(frozen=True)
class Prepare:
    """Source: ask the destination to prepare. Destination: start process, devices and streams.

    Then `Prepared`, or `Abort`.
    """


@dataclass(frozen=True)
class ReportReady:
    """Tell the source that pages may come."""


@dataclass(frozen=True)
class Freeze:
    """Freeze the guest; then `Frozen` or `FreezeFailed`."""


@dataclass(frozen=True)
class Thaw:
    """The guest goes on here."""


@dataclass(frozen=True)
class SendFinal:
    """Send the last difference, the root and the release in one go; then `Sent`.

    If the process that sends ends without having answered, that is `Sent("maybe")`.
    """


@dataclass(frozen=True)
class CancelStream:
    """Close the stream. Destination: then `StreamBroken`, or `Received` if the release was first."""


@dataclass(frozen=True)
class Start:
    """Let the guest run; then `Started` or `StartFailed`."""


@dataclass(frozen=True)
class Propose:
    """Propose an entry. Whether it became true is heard as `Logged`; it is proposed again until then."""

    entry: Entry


@dataclass(frozen=True)
class Refuse:
    """Sign `refusal_text` of the migration and propose `Cancel` with it."""

    reason: str


@dataclass(frozen=True)
class Sync:
    """Make the guest's disks durable; then `Synced`."""


@dataclass(frozen=True)
class Discard:
    """Kill this peer's process for the guest and remove its files; then `Discarded`."""


@dataclass(frozen=True)
class Over:
    """The machine is done; `outcome` is what the log said."""

    outcome: HandoverState
    reason: str


Event = (
    Begin
    | Adopted
    | Logged
    | Prepared
    | Switch
    | Abort
    | StreamBroken
    | Frozen
    | FreezeFailed
    | Sent
    | Received
    | LeaseValid
    | Started
    | StartFailed
    | Synced
    | Discarded
    | Settle
    | AskDurable
    | Durable
    | Superseded
    | CopyLost
    | PeerLost
    | Adopt
    | Persisted
    | Woken
)

Effect = (
    Prepare
    | ReportReady
    | Freeze
    | Thaw
    | SendFinal
    | CancelStream
    | Start
    | Propose
    | Refuse
    | Sync
    | Discard
    | Over
    | Persist
    | Send
    | WakeAt
)
