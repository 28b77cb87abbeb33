# SPDX-License-Identifier: Apache-2.0
"""What a keeper says of a copy that its peer made by an earlier right than the one it has now."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import trio

from mobid.guest import Exit, LocalGuest
from mobid.guest_keeper import Keeper, Keeping
from mobid.guest_record import Record
from mobid.lease import Lease
from proto import entries
from proto.state import State

ME = "a" * 16


class Catalog:
    """Takes down what is proposed, and does not answer; its guest came back here in epoch 3."""

    fresh = True

    def __init__(self, migrations: dict[str, entries.Migration] | None = None) -> None:
        guest = entries.Guest(
            key="lab/g", id="g1", image="mini", memory=1 << 26, owner=ME, epoch=3, restart_policy="never"
        )
        self.state = State(guests={guest.key: guest}, migrations=migrations or {})
        self.proposed: list[entries.Entry] = []
        self.reported = trio.Event()

    async def propose(self, entry: entries.Entry, **_: Any) -> int:
        self.proposed.append(entry)
        self.reported.set()
        await trio.sleep_forever()
        raise AssertionError


class Copy:
    """What the peer finds of its own copy of epoch 1 after the host has started again."""

    phase = "ended"
    exit = Exit("crashed", "its processes were gone when the peer started")
    trouble = ""

    def __init__(self) -> None:
        self.record = RECORD

    def save(self, **changes: Any) -> None:
        self.record = replace(self.record, **changes)


RECORD = Record(
    key="lab/g", id="g1", epoch=1, image="mini", image_hash="", kernel="", init="", memory=1 << 26,
    cpus=1, disks=(), stage="ready", lease_bound=True,
)  # fmt: skip


class Watched(Keeper):
    """Stops before it discards anything."""

    def __init__(self, keeping: Any) -> None:
        super().__init__(cast(Keeping, keeping), "g1", cast(LocalGuest, Copy()))
        self.discards = trio.Event()

    async def _put_away(self, _local: LocalGuest) -> None:
        """There are no processes."""

    async def _discard(self, local: LocalGuest) -> None:
        self.discards.set()
        await trio.sleep_forever()


def watched(catalog: Catalog, events: SimpleNamespace) -> Watched:
    return Watched(SimpleNamespace(me=ME, catalog=catalog, events=events, lease=Lease(), clock=lambda: 9.0))


async def run_until(keeper: Keeper, seen: trio.Event) -> None:
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keeper.run)
            await seen.wait()
            nursery.cancel_scope.cancel()


async def test_the_end_of_a_stale_copy_is_not_taken_for_the_end_of_the_guest() -> None:
    """It went elsewhere and came back by two failovers: what is here is not it."""
    catalog, emitted = Catalog(), list[str]()
    events = SimpleNamespace(emit=lambda kind, **_: emitted.append(kind))
    keeper = watched(catalog, events)
    await run_until(keeper, keeper.discards)
    assert (catalog.proposed, emitted) == ([], [])


async def test_a_copy_whose_handover_failed_over_is_the_guest_though_its_peer_never_knew_of_it() -> None:
    """The peer gave the handover up before it was decided: nothing has left, nobody else has the guest."""
    migration = entries.Migration(
        id="1" * 32,
        guest="lab/g",
        guest_id="g1",
        epoch=1,
        source=ME,
        destination="b" * 16,
        timeout=9.0,
        state="failed-over",
    )
    catalog = Catalog({migration.id: migration})
    events = SimpleNamespace(emit=lambda *_, **__: None)
    keeper = watched(catalog, events)
    await run_until(keeper, catalog.reported)
    (batch,) = catalog.proposed
    assert isinstance(batch, entries.Batch)
    report = batch.entries[0]
    assert isinstance(report, entries.Report)
    assert (report.epoch, report.state) == (3, "failed")
    assert not keeper.discards.is_set()
