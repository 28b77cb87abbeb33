# SPDX-License-Identifier: Apache-2.0
"""Replicas of a log under simulated faults: they never disagree, and go on when they can.

The second half takes one protection out at a time and sees that the simulation notices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from proto.raft.configuration import Configuration, _majority
from proto.raft.election import Election
from proto.raft.log import Log
from proto.raft.replica import Replica
from proto.raft.replication import Leadership
from tests.sim.raft_world import Violation, World
from tests.sim.run import replay_command

SEEDS = 200
CHUNK = 50


@pytest.mark.parametrize("start", range(0, SEEDS, CHUNK))
def test_replicas_never_disagree_and_come_to_rest(start: int) -> None:
    for seed in range(start, start + CHUNK):
        world = World(seed)
        try:
            world.run()
        except Violation as violation:
            pytest.fail(f"{violation}; replay: {replay_command('raft', seed)}")


def no_memory_of_leaders(monkeypatch: pytest.MonkeyPatch) -> None:
    """A voter that has just heard a leader votes nevertheless."""
    asked = Election.asked
    monkeypatch.setattr(
        Election, "asked", lambda self, peer, message, _heard: asked(self, peer, message, -1e9)
    )


def no_patience_after_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A voter that has just started votes."""
    start = Election.start

    def wrong(self: Any) -> None:
        start(self)
        self._started = -1e9

    monkeypatch.setattr(Election, "start", wrong)


def any_log_may_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vote goes to a candidate that is behind."""
    monkeypatch.setattr(Log, "last_term", property(lambda _self: 0))


def acknowledgements_before_they_are_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records are acknowledged when they are in memory."""
    monkeypatch.setattr(
        Replica,
        "stable",
        property(lambda self: self.log.last_index, lambda _self, _value: None),
        raising=False,
    )


def one_majority_while_joint(monkeypatch: pytest.MonkeyPatch) -> None:
    """During a change the new voters alone decide, and at once."""
    monkeypatch.setattr(Configuration, "quorum", lambda self, agreeing: _majority(self.voters, agreeing))
    monkeypatch.setattr(Configuration, "joint", property(lambda _self: False))


def the_lease_survives_a_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A leader reads by its lease although it told another one to campaign."""
    monkeypatch.setattr(
        Leadership, "handed_over", property(lambda _self: False, lambda _self, _value: None), raising=False
    )


def the_lease_counts_from_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not from when the round began."""
    count = Leadership._count_rounds

    def wrong(self: Any) -> None:
        before = self.agreed_round
        count(self)
        if self.agreed_round > before:
            self.agreed_at = self._replica.now

    monkeypatch.setattr(Leadership, "_count_rounds", wrong)


def lost_promises_are_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica that has lost its log goes on as if nothing had happened."""
    init = Replica.__init__

    def wrong(self: Any, *arguments: Any) -> None:
        init(self, *arguments)
        self.recovering = False

    monkeypatch.setattr(Replica, "__init__", wrong)


MISTAKES: list[Callable[[pytest.MonkeyPatch], None]] = [
    no_memory_of_leaders,
    no_patience_after_a_start,
    any_log_may_win,
    acknowledgements_before_they_are_durable,
    one_majority_while_joint,
    the_lease_survives_a_transfer,
    the_lease_counts_from_the_answer,
    lost_promises_are_believed,
]


def notices(seeds: range) -> int | None:
    """The first seed that finds something wrong."""
    for seed in seeds:
        try:
            World(seed).run()
        except (AssertionError, IndexError, KeyError, StopIteration):
            return seed
    return None


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_the_simulation_notices_planted_mistakes(
    monkeypatch: pytest.MonkeyPatch, mistake: Callable[[pytest.MonkeyPatch], None]
) -> None:
    mistake(monkeypatch)
    assert notices(range(400)) is not None
