# SPDX-License-Identifier: Apache-2.0
"""Wanted against actual: what the owner of a guest does next, and what an end of a guest means.

The catalog says what each guest shall be and who has the right to run it; a peer knows what its processes
are. The next step follows from the two alone (`next_step`), so it does not matter how they came to differ: a
command, a crash, a restart of the peer, a move. Steps are repeatable; after each one the peer looks again.
That is the whole of deploying, stopping, restarting and cleaning up.

A guest that ends by itself is judged by its restart policy (`after_end`): a reboot was asked for from inside
and is carried out at once, a failure is answered with growing pauses, and one that fails again and again is
left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal

from proto.entries import Guest, GuestState

Phase = Literal["absent", "running", "paused", "ended"]
"""What a peer has of a guest: nothing or only files; a process that runs; a frozen one; one that has ended.
"""

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 30.0
STABLE_AFTER = 60.0
"""Seconds a guest must have run for its earlier failures to be forgotten."""
MOST_FAILURES = 6
"""Failures in a row after which a guest is left alone."""


class Step(Enum):
    """What to do with one guest now."""

    NOTHING = "nothing"
    START = "start"
    WAIT = "wait"
    """Start it later, at `Actual.retry_at`."""
    PAUSE = "pause"
    RESUME = "resume"
    STOP = "stop"
    RESTART = "restart"
    """End it in order, to start it as it is wanted now."""
    DISCARD = "discard"
    """It is not ours, or not any more: end its processes, put its files out of the way."""


@dataclass(frozen=True, slots=True)
class Actual:
    """What a peer has of a guest. `held`: a migration uses it, hands off. `retry_at` is on the caller's
    clock.

    `may_run`: it needs no lease, or the peer's lease holds. `stale`: it was made by an earlier right than
    the catalog gives now; between the two the guest may have run elsewhere. `outdated`: its processes were
    made with something else than what is asked for now.
    """

    phase: Phase
    files: bool = False
    held: bool = False
    retry_at: float | None = None
    may_run: bool = True
    stale: bool = False
    outdated: bool = False


def next_step(wanted: Guest | None, me: str, actual: Actual, now: float) -> Step:
    """The next step of peer `me` for a guest that the catalog knows as `wanted` (None: not at all)."""
    if actual.held:
        return Step.NOTHING
    if wanted is None or wanted.owner != me or actual.stale:
        return Step.DISCARD if actual.files or actual.phase != "absent" else Step.NOTHING
    if wanted.state == "lost":
        return Step.NOTHING
    if wanted.wanted == "stopped":
        alive = actual.phase in ("running", "paused")
        return Step.STOP if alive or wanted.state not in ("stopped", "failed") else Step.NOTHING
    if not actual.may_run and actual.phase != "running":
        return Step.NOTHING
    if actual.phase in ("absent", "ended"):
        return Step.WAIT if actual.retry_at is not None and now < actual.retry_at else Step.START
    if actual.outdated:
        return Step.RESTART
    if wanted.wanted == "paused":
        return Step.PAUSE if actual.phase == "running" else Step.NOTHING
    return Step.RESUME if actual.phase == "paused" else Step.NOTHING


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the end of a guest means: start it again after `delay` seconds, or leave it in `state`."""

    restart: bool
    delay: float
    failures: int
    state: GuestState


def is_failure(reason: str) -> bool:
    """Whether a guest that ended for this reason did not mean to."""
    return reason not in ("poweroff", "reboot")


def after_end(policy: str, reason: str, ran_for: float, failures: int) -> Verdict:
    """Judge an end that nobody outside asked for.

    `policy` is the guest's restart policy, `reason` the shim's word (poweroff, reboot, panic, killed,
    crashed) or another one for a start that failed; `failures` counts those in a row so far.
    """
    if policy == "never":
        return Verdict(False, 0.0, failures, "failed" if is_failure(reason) else "stopped")
    if reason == "poweroff" and policy != "always":
        return Verdict(False, 0.0, 0, "stopped")
    if not is_failure(reason) and ran_for >= STABLE_AFTER:
        return Verdict(True, 0.0, 0, "starting")
    failures = 1 if ran_for >= STABLE_AFTER else failures + 1
    if failures > MOST_FAILURES:
        return Verdict(False, 0.0, failures, "failed")
    if not is_failure(reason) and failures == 1:
        return Verdict(True, 0.0, failures, "starting")
    return Verdict(True, min(FIRST_PAUSE * 2.0 ** (failures - 1), LONGEST_PAUSE), failures, "starting")


def missing_features(features: frozenset[str], xsave_size: int, host: Host) -> list[str]:
    """What a host lacks to go on with a guest that was booted with these CPU features; empty if nothing.

    A program in the guest has chosen its instructions by what it saw at its start, so the host must have
    every feature of the guest, and save at least as much extended register state (`xsave_size`, bytes).
    """
    missing = sorted(features - host.features)
    if xsave_size > host.xsave_size:
        missing.append(f"{xsave_size} bytes of extended registers (here {host.xsave_size})")
    return missing


@dataclass(frozen=True, slots=True)
class Host:
    """What a host's processors have."""

    features: frozenset[str]
    xsave_size: int
