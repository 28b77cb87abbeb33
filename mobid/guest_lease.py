# SPDX-License-Identifier: Apache-2.0
"""Lease-bound guests get each renewal of this peer's lease, one request to each one's shim.

Who is told decides who runs. Only copies that the catalog, as applied here, gives the right to run are told:
a lease counts only once the log is applied up to what its grantor knew, so a copy that has lost its right is
never told again, and its shim stops it, or has done so. A shim that does not answer holds up nobody but its
own guest, which is stopped at the deadline like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import structlog
import trio

from mobid.guest import LocalGuest
from mobid.guest_record import Record
from mobid.helpers import HelperError
from mobid.lease import Lease
from proto.state import State

logger = structlog.get_logger(__name__)


def entitled(record: Record, state: State, me: str) -> bool:
    """Whether peer `me` may extend the lease of this copy: it is bound to one, and has the newest right to
    run or is about to get it by a handover that is open."""
    if not record.lease_bound:
        return False
    guest = state.guests.get(record.key)
    if guest is None or guest.id != record.id:
        return False
    if (guest.owner, guest.epoch) == (me, record.epoch):
        return True
    migration = state.migrations.get(record.migration)
    if migration is None or migration.destination != me or migration.state != "open":
        return False
    return record.epoch == migration.epoch + 1


class Renewals:
    """`guests` gives those that are entitled at the moment."""

    def __init__(self, lease: Lease, guests: Callable[[], Iterable[LocalGuest]]) -> None:
        self._lease = lease
        self._guests = guests
        self._under_way: set[LocalGuest] = set()

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                for local in self._guests():
                    if local.deadline_ns < self._lease.deadline_ns and local not in self._under_way:
                        self._under_way.add(local)
                        nursery.start_soon(self._renew, local)
                await self._lease.changed.wait()

    async def _renew(self, local: LocalGuest) -> None:
        """Tell one shim, and again while the lease was renewed meanwhile."""
        try:
            while local.deadline_ns < self._lease.deadline_ns and local in self._guests():
                await local.extend_lease(self._lease.deadline_ns)
        except HelperError as error:
            logger.warning("a guest's lease is not renewed", guest=local.record.key, reason=error.message)
        finally:
            self._under_way.discard(local)
