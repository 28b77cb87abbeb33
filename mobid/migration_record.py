# SPDX-License-Identifier: Apache-2.0
"""The record of a migration for those who did not see it: an attempt of `vm.migrate` that began it may have
been lost with its peer, and the next attempt, at any peer, asks for the same record.

The source measured it and keeps the last ones in memory. When the source is gone too, the log still says how
the migration ended.
"""

from __future__ import annotations

from typing import Any

from mobid.migration_outgoing import DOWNTIMES, PARTS
from proto.entries import Migration
from proto.state import State

KEPT = 100


class Records:
    """The last records that were made here, by the id of the migration."""

    def __init__(self) -> None:
        self._records: dict[str, dict[str, Any]] = {}

    def put(self, id: str, record: dict[str, Any]) -> None:
        """Keep one; the oldest goes."""
        self._records[id] = record
        while len(self._records) > KEPT:
            del self._records[next(iter(self._records))]

    def get(self, id: str) -> dict[str, Any] | None:
        return self._records.get(id)


def of_log(migration: Migration, state: State) -> dict[str, Any]:
    """What the log says of a migration that is over; what only its source measured is None."""
    done = migration.state == "done"
    guest = state.guests.get(migration.guest)
    unknown = ("frozen_s", "sent_bytes", "residue_bytes", "frames_held", "frames_lost", "guest_clock")
    return {
        "vm": migration.guest.partition("/")[2],
        "from": state.peer_name(migration.source),
        "to": state.peer_name(migration.destination),
        "mode": "precopy",
        "ok": done,
        "passes": [],
        "started": migration.opened,
        "total_s": migration.closed - migration.opened,
        **dict.fromkeys(unknown),
        "downtime_ms": dict.fromkeys(DOWNTIMES),
        "parts_ms": dict.fromkeys(PARTS),
        "verified": None,
        "epoch": guest.epoch if guest is not None else migration.epoch,
        "rolled_back": not done,
        "reason": None if done else migration.reason or migration.state,
    }
