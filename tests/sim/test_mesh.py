# SPDX-License-Identifier: Apache-2.0
"""The whole mesh in virtual time: nothing forbidden happens, and the simulation would notice if it did."""

from __future__ import annotations

import math
import os
from dataclasses import replace

import pytest

from proto import entries
from tests.sim import clients
from tests.sim.hosts import Copy
from tests.sim.linearizability import Operation, first_contradiction, is_linearizable
from tests.sim.mesh_world import World
from tests.sim.mutations import found_by
from tests.sim.run import failures, replay_command

SEEDS = 300
CHUNK = 50

NOTICED_BY = {"shim": 12, "read": 12, "fsync": 60, "release": 60}
"""Mutations that are cheap to find, and within how many seeds one must notice them."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("start", range(0, SEEDS, CHUNK))
def test_nothing_forbidden_happens_and_everything_heals(start: int) -> None:
    found = list(failures("mesh", range(start, start + CHUNK), os.cpu_count() or 1))
    assert not found, [f"{f.what}; replay: {replay_command('mesh', f.seed)}" for f in found]


def test_a_seed_is_a_schedule() -> None:
    first, second = World(3, whole_trace=True), World(3, whole_trace=True)
    first.run()
    second.run()
    assert first.trace() == second.trace()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", NOTICED_BY)
def test_a_missing_protection_is_noticed(name: str) -> None:
    for seed in range(NOTICED_BY[name]):
        if found_by(name, range(seed, seed + 1)):
            return
    pytest.fail(f"{NOTICED_BY[name]} seeds did not notice that {name} is missing")


def migration(state: entries.HandoverState, source: str, destination: str) -> entries.Migration:
    return entries.Migration(
        id="1" * 32,
        guest="lab/g",
        guest_id="g",
        epoch=1,
        source=source,
        destination=destination,
        timeout=9.0,
        state=state,
    )


def guest(owner: str, epoch: int) -> entries.Guest:
    return entries.Guest(key="lab/g", id="g", image="i", memory=1 << 26, owner=owner, epoch=epoch)


@pytest.mark.parametrize("state", ["cancelled", "failed-over"])
def test_a_hold_outlives_the_process_but_not_its_handover(state: entries.HandoverState) -> None:
    here, there = list(World(3, peers=9).hosts.values())[:2]
    assert here.process is not None
    closed = migration(state, here.id, there.id)
    copy = here.copies["g"] = Copy(guest(here.id, 1), 1, migration=closed.id)
    here.process.state = replace(
        here.process.state, guests={"lab/g": guest(here.id, 1)}, migrations={closed.id: closed}
    )
    here.process.moves.take_up()
    assert not copy.migration


# The check of histories.


def op(called: float, returned: float, *ask: object, answer: object = None) -> Operation:
    return Operation("k", called, returned, ask, answer)


def check(*operations: Operation) -> bool:
    return is_linearizable(list(operations), clients.NOTHING, clients.step)


def test_one_after_the_other_is_linearizable() -> None:
    assert check(op(0, 1, "put", "a", answer="ok"), op(2, 3, "read", answer=("a", 1)))


def test_a_read_that_is_too_old_is_not() -> None:
    assert not check(op(0, 1, "put", "a", answer="ok"), op(2, 3, "read", answer=clients.NOTHING))


def test_what_overlaps_may_be_in_either_order() -> None:
    put = op(0, 5, "put", "a", answer="ok")
    assert check(put, op(1, 2, "read", answer=clients.NOTHING), op(3, 4, "read", answer=("a", 1)))
    assert not check(put, op(1, 2, "read", answer=("a", 1)), op(3, 4, "read", answer=clients.NOTHING))


def test_what_was_never_answered_may_be_true_later_or_never() -> None:
    unknown = op(0, math.inf, "put", "a")
    assert check(unknown, op(1, 2, "read", answer=clients.NOTHING), op(3, 4, "read", answer=("a", 1)))
    assert check(unknown, op(1, 2, "read", answer=clients.NOTHING))
    assert not check(unknown, op(1, 2, "read", answer=("a", 1)), op(3, 4, "read", answer=clients.NOTHING))


def test_two_cannot_both_create() -> None:
    both = (op(0, 3, "create", "a", answer="ok"), op(1, 4, "create", "b", answer="ok"))
    assert not check(*both)


def test_keys_are_searched_alone() -> None:
    wrong = Operation("other", 0.0, 1.0, ("read",), ("x", 1))
    assert (
        first_contradiction([op(0, 1, "put", "a", answer="ok"), wrong], clients.NOTHING, clients.step)
        == "other"
    )
