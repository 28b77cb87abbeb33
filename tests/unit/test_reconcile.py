# SPDX-License-Identifier: Apache-2.0
"""Wanted against actual, restart policies, CPU features."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.entries import Guest
from proto.reconcile import (
    LONGEST_PAUSE,
    MOST_FAILURES,
    STABLE_AFTER,
    Actual,
    Host,
    Phase,
    Step,
    after_end,
    missing_features,
    next_step,
)

ME = "a" * 16


def guest(**changes: object) -> Guest:
    given = {"key": "lab/g", "id": "g1", "image": "mini", "memory": 1 << 26, "owner": ME, **changes}
    return Guest.model_validate(given)


@pytest.mark.parametrize(
    ("wanted", "state", "phase", "step"),
    [
        ("running", "pending", "absent", Step.START),
        ("running", "running", "running", Step.NOTHING),
        ("running", "running", "ended", Step.START),
        ("running", "running", "absent", Step.START),
        ("running", "paused", "paused", Step.RESUME),
        ("running", "lost", "absent", Step.NOTHING),
        ("paused", "running", "running", Step.PAUSE),
        ("paused", "paused", "paused", Step.NOTHING),
        ("paused", "pending", "absent", Step.START),
        ("stopped", "running", "running", Step.STOP),
        ("stopped", "paused", "paused", Step.STOP),
        ("stopped", "running", "ended", Step.STOP),
        ("stopped", "stopped", "ended", Step.NOTHING),
        ("stopped", "stopped", "absent", Step.NOTHING),
        ("stopped", "failed", "absent", Step.NOTHING),
        ("stopped", "pending", "absent", Step.STOP),
    ],
)
def test_the_step_follows_from_wanted_and_actual(wanted: str, state: str, phase: Phase, step: Step) -> None:
    assert next_step(guest(wanted=wanted, state=state), ME, Actual(phase), now=0) is step


def test_a_guest_that_is_not_ours_is_discarded_unless_a_migration_has_it() -> None:
    for wanted in (None, guest(owner="b" * 16)):
        assert next_step(wanted, ME, Actual("running"), 0) is Step.DISCARD
        assert next_step(wanted, ME, Actual("absent", files=True), 0) is Step.DISCARD
        assert next_step(wanted, ME, Actual("absent"), 0) is Step.NOTHING
        assert next_step(wanted, ME, Actual("paused", held=True), 0) is Step.NOTHING


def test_a_guest_made_with_something_else_is_restarted() -> None:
    for phase in ("running", "paused"):
        actual = Actual(phase, outdated=True)
        assert next_step(guest(), ME, actual, 0) is Step.RESTART
        assert next_step(guest(wanted="stopped"), ME, actual, 0) is Step.STOP
    assert next_step(guest(), ME, Actual("ended", outdated=True), 0) is Step.START
    assert next_step(guest(), ME, Actual("running", outdated=True, held=True), 0) is Step.NOTHING


def test_a_restart_waits_for_its_time() -> None:
    actual = Actual("ended", retry_at=10.0)
    assert next_step(guest(), ME, actual, now=9.9) is Step.WAIT
    assert next_step(guest(), ME, actual, now=10.0) is Step.START


@pytest.mark.parametrize(
    ("policy", "reason", "restart", "state"),
    [
        ("never", "panic", False, "failed"),
        ("never", "reboot", False, "stopped"),
        ("never", "poweroff", False, "stopped"),
        ("on-failure", "panic", True, "starting"),
        ("on-failure", "crashed", True, "starting"),
        ("on-failure", "killed", True, "starting"),
        ("on-failure", "reboot", True, "starting"),
        ("on-failure", "poweroff", False, "stopped"),
        ("always", "poweroff", True, "starting"),
        ("always", "panic", True, "starting"),
    ],
)
def test_the_policy_decides_about_an_end(policy: str, reason: str, restart: bool, state: str) -> None:
    verdict = after_end(policy, reason, ran_for=5.0, failures=0)
    assert (verdict.restart, verdict.state) == (restart, state)


@pytest.mark.parametrize("phase", ["absent", "ended", "paused"])
def test_without_a_lease_nothing_begins_to_run(phase: Phase) -> None:
    assert next_step(guest(), ME, Actual(phase, may_run=False), 0.0) is Step.NOTHING
    assert next_step(guest(wanted="stopped"), ME, Actual(phase, may_run=False), 0.0) is Step.STOP
    assert next_step(guest(owner="b" * 16), ME, Actual(phase, files=True, may_run=False), 0.0) is Step.DISCARD


@pytest.mark.parametrize("phase", ["absent", "running", "paused", "ended"])
@pytest.mark.parametrize("wanted", ["running", "paused", "stopped"])
def test_a_stale_copy_goes_before_anything_else(phase: Phase, wanted: str) -> None:
    stale = Actual(phase, files=True, stale=True)
    assert next_step(guest(wanted=wanted, epoch=3), ME, stale, 0.0) is Step.DISCARD
    assert next_step(guest(wanted=wanted), ME, replace(stale, held=True), 0.0) is Step.NOTHING


@given(st.sampled_from(["on-failure", "always"]), st.sampled_from(["panic", "crashed", "killed", "reboot"]))
def test_pauses_grow_and_failing_ends(policy: str, reason: str) -> None:
    failures, delays = 0, []
    while (verdict := after_end(policy, reason, 1.0, failures)).restart:
        failures = verdict.failures
        delays.append(verdict.delay)
    assert delays == sorted(delays)
    assert len(delays) == MOST_FAILURES
    assert delays[-1] <= LONGEST_PAUSE
    assert verdict.state == "failed"
    assert after_end(policy, reason, STABLE_AFTER, failures).delay <= delays[1]


def test_a_host_must_have_all_that_the_guest_saw() -> None:
    host = Host(frozenset({"sse2", "avx", "avx2"}), 832)
    assert missing_features(frozenset({"sse2", "avx"}), 832, host) == []
    assert missing_features(frozenset({"sse2", "avx512f", "amx_tile"}), 100, host) == ["amx_tile", "avx512f"]
    [why] = missing_features(frozenset(), 2696, host)
    assert "2696" in why
