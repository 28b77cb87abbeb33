# SPDX-License-Identifier: Apache-2.0
"""What a keeper says of a copy that its peer made by an earlier right than the one it has now."""

from __future__ import annotations

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
    """Takes down what is proposed; its guest came back here by two failovers."""

    fresh = True

    def __init__(self) -> None:
        guest = entries.Guest(
            key="lab/g", id="g1", image="mini", memory=1 << 26, owner=ME, epoch=3, restart_policy="never"
        )
        self.state = State(guests={guest.key: guest})
        self.proposed: list[entries.Entry] = []

    async def propose(self, entry: entries.Entry, **_: Any) -> int:
        self.proposed.append(entry)
        return 1


class Copy:
    """What the peer finds of its own copy of epoch 1 after the host has started again."""

    phase = "ended"
    exit = Exit("crashed", "its processes were gone when the peer started")
    trouble = ""
    record = Record(
        key="lab/g", id="g1", epoch=1, image="mini", image_hash="", kernel="", init="", memory=1 << 26,
        cpus=1, disks=(), stage="ready", lease_bound=True,
    )  # fmt: skip


class Watched(Keeper):
    """Stops before it discards anything."""

    def __init__(self, keeping: Any) -> None:
        super().__init__(cast(Keeping, keeping), "g1", cast(LocalGuest, Copy()))
        self.discards = trio.Event()

    async def _discard(self, local: LocalGuest) -> None:
        self.discards.set()
        await trio.sleep_forever()


async def test_the_end_of_a_stale_copy_is_not_taken_for_the_end_of_the_guest() -> None:
    catalog, emitted = Catalog(), list[str]()
    events = SimpleNamespace(emit=lambda kind, **_: emitted.append(kind))
    keeping = SimpleNamespace(me=ME, catalog=catalog, events=events, lease=Lease(), clock=lambda: 9.0)
    keeper = Watched(keeping)
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keeper.run)
            await keeper.discards.wait()
            nursery.cancel_scope.cancel()
    assert (catalog.proposed, emitted) == ([], [])
