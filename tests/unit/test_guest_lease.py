# SPDX-License-Identifier: Apache-2.0
"""Whose lease is extended, that a slow shim holds up nobody else, and what is left of a stale copy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from mobid.guest import LocalGuest
from mobid.guest_lease import Renewals, entitled
from mobid.guest_record import Record
from mobid.lease import Lease
from mobid.stale_guests import KEPT, keep_aside
from proto import entries
from proto.state import State

ME, OTHER = "a" * 16, "b" * 16

RECORD = Record(
    key="lab/g", id="g1", epoch=2, image="mini", image_hash="", kernel="", init="", memory=1 << 26, cpus=1,
    disks=(), lease_bound=True,
)  # fmt: skip


def state(owner: str = ME, epoch: int = 2, **migration: Any) -> State:
    guest = entries.Guest(key="lab/g", id="g1", image="mini", memory=1 << 26, owner=owner, epoch=epoch)
    found = {}
    if migration:
        given = {
            "id": "m",
            "guest": "lab/g",
            "guest_id": "g1",
            "epoch": epoch,
            "source": OTHER,
            "destination": ME,
            "timeout": 9,
        }
        found["m"] = entries.Migration.model_validate({**given, **migration})
    return State(guests={"lab/g": guest}, migrations=found)


def test_the_owner_of_the_newest_epoch_is_entitled() -> None:
    assert entitled(RECORD, state(), ME)
    assert not entitled(RECORD, state(owner=OTHER), ME)
    assert not entitled(RECORD, state(epoch=3), ME)
    assert not entitled(replace(RECORD, id="g0"), state(), ME)
    assert not entitled(RECORD, State(), ME)


def test_a_guest_without_a_lease_is_told_none() -> None:
    assert not entitled(replace(RECORD, lease_bound=False), state(), ME)


def test_the_destination_of_an_open_handover_is_entitled() -> None:
    incoming = replace(RECORD, migration="m")
    assert entitled(incoming, state(OTHER, 1, state="open"), ME)
    assert not entitled(incoming, state(OTHER, 1, state="cancelled"), ME)
    assert not entitled(incoming, state(OTHER, 1, state="failed-over"), ME)
    assert not entitled(RECORD, state(OTHER, 1, state="open"), ME), "it is not the copy that comes"
    assert not entitled(incoming, state(OTHER, 1, state="open", destination=OTHER, source=ME), ME)


class Shim:
    """Stands for a local guest whose shim answers when it is let."""

    def __init__(self) -> None:
        self.deadline_ns = 0
        self.answers = trio.Event()
        self.told: list[int] = []

    async def extend_lease(self, deadline_ns: int) -> None:
        self.deadline_ns = deadline_ns
        self.told.append(deadline_ns)
        await self.answers.wait()


async def test_a_slow_shim_holds_up_nobody_and_gets_the_newest() -> None:
    lease = Lease(lambda: 0.0)
    quick, slow = Shim(), Shim()
    quick.answers.set()
    renewals = Renewals(lease, lambda: cast(list[LocalGuest], [slow, quick]))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(renewals.run)
        for at in (1, 2, 3):
            lease.extend(at)
            await wait_all_tasks_blocked()
        assert quick.told == [10**9, 2 * 10**9, 3 * 10**9]
        assert slow.told == [10**9]
        slow.answers.set()
        await wait_all_tasks_blocked()
        assert slow.told == [10**9, 3 * 10**9]
        nursery.cancel_scope.cancel()


async def test_a_copy_that_lost_its_right_is_told_nothing_more() -> None:
    lease = Lease(lambda: 0.0)
    guest = Shim()
    guest.answers.set()
    entitled_now = [guest]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Renewals(lease, lambda: cast(list[LocalGuest], entitled_now)).run)
        lease.extend(1)
        await wait_all_tasks_blocked()
        entitled_now.clear()
        lease.extend(2)
        await wait_all_tasks_blocked()
        assert guest.told == [10**9]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("copies", [1, KEPT + 2])
def test_the_newest_stale_copies_are_kept(tmp_path: Path, copies: int) -> None:
    for epoch in range(1, copies + 1):
        directory = tmp_path / "guests" / "g1"
        directory.mkdir(parents=True)
        (directory / "vda.overlay").write_text(str(epoch))
        kept = keep_aside(directory, replace(RECORD, epoch=epoch))
        assert kept is not None
        assert (kept / "vda.overlay").read_text() == str(epoch)
        assert not directory.exists()
    assert len(list((tmp_path / "fenced").iterdir())) == min(copies, KEPT)
    assert (tmp_path / "fenced" / f"g1-{copies}").is_dir()


def test_a_copy_that_cannot_be_kept_is_removed(tmp_path: Path) -> None:
    directory = tmp_path / "guests" / "g1"
    directory.mkdir(parents=True)
    (tmp_path / "fenced").write_text("in the way")
    assert keep_aside(directory, RECORD) is None
    assert not directory.exists()
