# SPDX-License-Identifier: Apache-2.0
"""The membership under simulated faults: everybody comes to see everybody as they are."""

from __future__ import annotations

import random
from typing import Any

import pytest

from proto.swim.beliefs import Beliefs
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
