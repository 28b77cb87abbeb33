# SPDX-License-Identifier: Apache-2.0
"""A peer's lease, on a clock of the test."""

from __future__ import annotations

import trio
from trio.testing import wait_all_tasks_blocked

from mobid.lease import GUARD, Lease


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_there_is_no_lease_at_first() -> None:
    lease = Lease()
    assert not lease.valid
    assert lease.deadline == 0
    assert lease.deadline_ns == 1  # a helper's 0 would mean that none is needed


def test_a_lease_ends_by_itself_a_guard_before_its_deadline() -> None:
    clock = Clock()
    lease = Lease(clock)
    lease.extend(101)
    assert lease.valid
    assert lease.deadline_ns == 101 * 10**9
    clock.now = 101 - GUARD
    assert not lease.valid


def test_an_earlier_end_changes_nothing() -> None:
    lease = Lease(Clock())
    lease.extend(102)
    lease.extend(101)
    assert lease.deadline == 102


async def test_a_gap_between_two_leases_is_told() -> None:
    clock = Clock()
    lease = Lease(clock)
    gained = 0

    async def count() -> None:
        nonlocal gained
        while True:
            await lease.gained.wait()
            gained += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        for at in (101, 102, 103):
            await wait_all_tasks_blocked()
            lease.extend(at)
        await wait_all_tasks_blocked()
        assert gained == 1
        clock.now = 104
        lease.extend(105)
        await wait_all_tasks_blocked()
        assert gained == 2
        nursery.cancel_scope.cancel()
