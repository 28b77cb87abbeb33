# SPDX-License-Identifier: Apache-2.0
"""What holder and grantor of a lease say to one another and to their surroundings (`proto/leases.py`).

All times are seconds of the peer's own CLOCK_BOOTTIME, which goes on while a host sleeps. Durations cross
the network, times never do.
"""

from __future__ import annotations

from dataclasses import dataclass

# Messages.


@dataclass(frozen=True, slots=True)
class Renew:
    """Holder to coordinator: a lease of `duration` seconds, please. `number` grows with each request."""

    number: int
    duration: float


@dataclass(frozen=True, slots=True)
class Granted:
    """The lease asked for with `number` holds `duration` seconds from when the request was *sent*, once the
    holder has applied the log up to `index`."""

    number: int
    duration: float
    index: int


@dataclass(frozen=True, slots=True)
class NotGranted:
    """Not by me, or not now; `reason` is for the log."""

    number: int
    reason: str


LeaseMessage = Renew | Granted | NotGranted


# Effects.


@dataclass(frozen=True, slots=True)
class Deadline:
    """The own lease holds until `at` (own clock); tell the shims of lease-bound guests and the switch.

    Comes at every renewal; never goes back.
    """

    at: float


@dataclass(frozen=True, slots=True)
class PeerLost:
    """At the coordinator: the lease of `peer` has run out by every clock, in this `term`.

    What may be committed because of it goes through `peer_events.Fence`.
    """

    peer: str
    term: int


@dataclass(frozen=True, slots=True)
class PeerFound:
    """At the coordinator: a peer that was lost has a lease again."""

    peer: str
