# SPDX-License-Identifier: Apache-2.0
"""The membership under simulated faults: everybody comes to see everybody as they are."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest

from proto.swim.beliefs import Beliefs
from proto.swim.events import SetMeta
from proto.swim.machine import Swim
from proto.swim.packets import Claim
from tests.sim.run import replay_command
from tests.sim.swim_faults import Trial
from tests.sim.swim_world import Violation, World

SEEDS = 60
CHUNK = 15


@pytest.mark.parametrize("start", range(0, SEEDS, CHUNK))
def test_views_come_true_after_faults(start: int) -> None:
    for seed in range(start, start + CHUNK):
        try:
            Trial(seed).settle()
        except Violation as violation:
            pytest.fail(f"{violation}; replay: {replay_command('membership', seed)}")


def test_the_simulated_faults_make_members_dead_and_alive_again() -> None:
    dead = back = 0
    for seed in range(30):
        trial = Trial(seed)
        trial.settle()
        dead += any(state == "dead" for *_, state in trial.turned)
        back += any(state == "alive" for *_, state in trial.turned)
    assert dead > 15
    assert back > 10


def finds(seeds: range) -> bool:
    """Whether one of these seeds notices that something is wrong."""
    for seed in seeds:
        try:
            Trial(seed).settle()
        except Violation:
            return True
    return False


def nothing(*_args: Any, **_named: Any) -> None:
    """Something is left out."""


def believe_anything(beliefs: Beliefs, claim: Claim, now: float, *, hearsay: bool = False) -> None:
    if claim.peer != beliefs.own and claim.peer in beliefs.roster.known and claim.state == "alive":
        beliefs._revive(claim.peer, claim, now)


@pytest.mark.parametrize(
    ("machine", "name", "wrong"),
    [
        (Beliefs, "told_of_self", nothing),
        (Beliefs, "suspicion_ended", nothing),
        (Beliefs, "hear", believe_anything),
        (Swim, "_raise_dead", nothing),
    ],
    ids=["no refutation", "no death", "older claims count", "the dead are never asked"],
)
def test_planted_mistakes_are_found(
    monkeypatch: pytest.MonkeyPatch, machine: type, name: str, wrong: Any
) -> None:
    monkeypatch.setattr(machine, name, wrong)
    assert finds(range(30))


def test_a_seed_is_one_schedule() -> None:
    first, second = Trial(12), Trial(12)
    first.settle()
    second.settle()
    assert first.trace == second.trace


@pytest.mark.parametrize("loss", [0.0, 0.1])
def test_a_crash_is_known_to_all_within_the_bound_and_nobody_else_dies(loss: float) -> None:
    world = World(1, 50, loss=loss)
    world.run(10.0)
    victim = world.hosts[world.roster.ids[random.Random(2).randrange(50)]]
    world.crash(victim)
    world.run(60.0)
    dead = {(seer, peer) for _, seer, peer, state in world.turned if state == "dead"}
    assert dead == {(host.id, victim.id) for host in world.up}


class Plane:
    """`count` members on a plane of 100 ms by 100 ms, each with an access delay of 1 to 10 ms."""

    def __init__(self, count: int) -> None:
        rng = random.Random(5)
        self.world = World(3, count, loss=0.02)
        places = {id: (rng.random() / 10, rng.random() / 10) for id in self.world.roster.ids}
        access = {id: 0.001 + 0.009 * rng.random() for id in places}
        self.rtt = {
            (a, b): math.dist(places[a], places[b]) + access[a] + access[b] for a in places for b in places
        }
        self.world.delay = lambda a, b: self.rtt[a.id, b.id] / 2 * (0.95 + 0.1 * rng.random())
        for host in self.world.up:
            self.world.tell(host, SetMeta(b"here"))

    def wrong(self) -> list[float]:
        """The relative error of every estimate of a pair that was never measured."""
        found = []
        for host, peer in itertools.product(self.world.up, self.world.roster.ids):
            assert host.machine is not None
            rtt, measured = host.machine.vivaldi.rtt(peer), host.machine.vivaldi.measured(peer)
            if rtt is not None and measured is None:
                truth = self.rtt[host.id, peer]
                found.append(abs(rtt - truth) / truth)
        return found


def test_members_know_how_far_those_are_that_they_never_measured() -> None:
    plane = Plane(100)
    plane.world.run(3.0)
    assert plane.wrong() == [], "nobody can know yet"
    plane.world.run(80.0)
    wrong = sorted(plane.wrong())
    assert len(wrong) > 100
    assert wrong[len(wrong) // 2] < 0.15
    assert wrong[len(wrong) * 9 // 10] < 0.6


def test_two_that_never_reach_one_another_know_by_others_how_far_they_are() -> None:
    plane = Plane(12)
    one, two = plane.world.up[:2]
    one.deaf_to, two.deaf_to = frozenset({two.id}), frozenset({one.id})
    plane.world.run(200.0)
    assert len(plane.wrong()) == 2
    assert max(plane.wrong()) < 0.3
