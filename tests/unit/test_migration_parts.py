# SPDX-License-Identifier: Apache-2.0
"""The small parts of a migration: durable notes, matched clocks, the record of a pass."""

from __future__ import annotations

import time
from pathlib import Path
from typing import cast

import pytest
from structlog.testing import capture_logs

from mobid.clocks import match_clocks
from mobid.migration_notes import Notes
from mobid.migration_outgoing import Outgoing, Wishes
from mobid.migration_shell import QUEUE, Surroundings
from mobid.page_stream import pass_record
from proto import entries
from proto import handover_events as ev

ONE, TWO = "a" * 32, "b" * 32


def test_notes_are_found_again(tmp_path: Path) -> None:
    notes = Notes(tmp_path / "migrations")
    assert notes.all() == {}
    notes.put(ONE, "releasing")
    notes.put(TWO, "incoming")
    notes.put(TWO, "refused")
    assert Notes(tmp_path / "migrations").all() == {ONE: "releasing", TWO: "refused"}
    notes.put(ONE, None)
    notes.put(ONE, None)
    assert Notes(tmp_path / "migrations").all() == {TWO: "refused"}


def test_an_unreadable_note_does_not_hide_the_others(tmp_path: Path) -> None:
    notes = Notes(tmp_path)
    notes.put(ONE, "releasing")
    (tmp_path / f"{TWO}.json").write_text('{"format": 9, "note": "releasing"}')
    (tmp_path / "x.json").write_text("rubbish")
    (tmp_path / "y.json").write_text("[" * 3000)
    assert notes.all() == {ONE: "releasing"}


async def test_clocks_are_matched_within_the_uncertainty() -> None:
    ahead = 5_000_000_000

    async def ask() -> int:
        return time.monotonic_ns() + ahead

    found = await match_clocks(ask)
    assert abs(found.offset - ahead) <= found.uncertainty
    assert abs(found.to_ours(ahead + 7) - 7) <= found.uncertainty


async def test_no_round_trip_is_no_match() -> None:
    async def ask() -> int:
        return 0

    with pytest.raises(ValueError, match="round trip"):
        await match_clocks(ask, rounds=0)


def test_the_first_pass_has_no_dirty_rate() -> None:
    done = {"ram_pages": 2, "ram_bytes": 8192, "disk_bytes": 4096, "sent_bytes": 100, "duration": 0.5}
    first = pass_record(done, [], 200.0)
    assert first["dirty_rate"] is None
    assert pass_record(done, [first], 200.0)["dirty_rate"] == 12288 / 0.5


def test_what_a_full_queue_of_a_migration_cannot_take_is_logged_and_dropped() -> None:
    migration = entries.Migration(
        id="1" * 32, guest="lab/g", guest_id="g1", epoch=1, source="a" * 16, destination="b" * 16, timeout=9.0
    )
    shell = Outgoing(cast(Surroundings, None), migration, None, Wishes())
    with capture_logs() as logs:
        for _ in range(QUEUE + 2):
            shell.feed(ev.Frozen())
    assert [line["event"] for line in logs] == ["migration.queue.full"] * 2
