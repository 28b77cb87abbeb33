# SPDX-License-Identifier: Apache-2.0
"""When pre-copy switches, gives up, or goes on."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proto.precopy import (
    LEAST_PASSES,
    MOST_PASSES,
    Again,
    Decision,
    GiveUp,
    Pass,
    Policy,
    Precopy,
    Stall,
    SwitchOver,
)


def policy(on_stall: Stall = "accept", target: float = 0.05, bandwidth: float = 0.0) -> Policy:
    return Policy(target=target, fixed_cost=0.005, deadline=60.0, on_stall=on_stall, bandwidth=bandwidth)


def play(rules: Policy, memory: float, dirty_rate: float, speed: float) -> tuple[Decision, int, float]:
    """A guest that changes `dirty_rate` bytes/s, none twice, at `speed` bytes/s; until the last decision."""
    precopy, now, todo = Precopy(rules), 0.0, memory
    while True:
        duration = 0.001 + todo / speed
        now += duration
        decision = precopy.decide(Pass(int(todo), int(todo), duration), now)
        if not isinstance(decision, Again):
            return decision, len(precopy.passes), now
        todo = min(memory, dirty_rate * duration)


def test_an_idle_guest_switches_after_the_second_pass() -> None:
    decision, passes, _ = play(policy(), 64e6, 0.0, 1e8)
    assert isinstance(decision, SwitchOver)
    assert not decision.stalled
    assert passes == LEAST_PASSES


def test_a_busy_guest_takes_more_passes() -> None:
    decision, passes, _ = play(policy(), 512e6, 3e7, 1e8)
    assert isinstance(decision, SwitchOver)
    assert not decision.stalled
    assert passes > LEAST_PASSES
    assert decision.forecast.downtime <= 0.05


def test_what_cannot_converge_follows_the_policy() -> None:
    accepted, _, _ = play(policy("accept"), 512e6, 2e8, 1e8)
    assert isinstance(accepted, SwitchOver)
    assert accepted.stalled
    given_up, _, _ = play(policy("abort"), 512e6, 2e8, 1e8)
    assert isinstance(given_up, GiveUp)
    assert "faster than it can be sent" in given_up.reason


def test_the_deadline_ends_it() -> None:
    precopy = Precopy(policy("abort"))
    precopy.decide(Pass(10**9, 10**9, 30.0), 30.0)
    decision = precopy.decide(Pass(10**9, 10**9, 31.0), 61.0)
    assert isinstance(decision, GiveUp)
    assert "deadline" in decision.reason


def test_a_ceiling_counts_as_bandwidth() -> None:
    precopy = Precopy(policy(bandwidth=1e6))
    precopy.decide(Pass(10**8, 10**8, 1.0), 1.0)
    decision = precopy.decide(Pass(10**6, 10**6, 0.5), 1.5)
    assert isinstance(decision, Again)
    assert decision.forecast is not None
    assert decision.forecast.bandwidth == 1e6


@given(
    st.floats(1e6, 1e10),
    st.floats(0, 1e10),
    st.floats(1e5, 1e10),
    st.sampled_from(["accept", "abort"]),
)
def test_it_always_ends(memory: float, dirty_rate: float, speed: float, on_stall: Stall) -> None:
    _, passes, _ = play(policy(on_stall), memory, dirty_rate, speed)
    assert LEAST_PASSES <= passes <= MOST_PASSES
