# SPDX-License-Identifier: Apache-2.0
"""What a stale copy of a guest says reaches nobody: its own switch stops it, and so does everybody else's."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path as FilePath

import pytest

from tests.switch_rig import NETWORK, NetDriver, SwitchProcess, mac, mesh, number_of, numbered
from tests.waiting import wait_for

GUEST, OTHER = mac(99), mac(1)
PORT = 9


@pytest.fixture
def switches(helper_binary: FilePath, socket_dir: FilePath) -> Iterator[list[SwitchProcess]]:
    """Switches 1 (the observer's), 2 (where the guest was) and 3 (where it will be), all tied."""
    with ExitStack() as stack:
        made = [stack.enter_context(SwitchProcess(helper_binary, socket_dir, n)) for n in (1, 2, 3)]
        mesh(*made)
        yield made


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def bound_port(switch: SwitchProcess, epoch: int = 1) -> FilePath:
    path = switch.directory / f"bound{switch.number}"
    switch.call(
        "port_add", port=PORT, network=NETWORK, mac=GUEST, socket=str(path), mtu=1400, epoch=epoch,
        state="running", lease_bound=True,
    )  # fmt: skip
    return path


def from_now(seconds: float) -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) + int(seconds * 1e9)


def test_delayed_frames_do_not_outlive_the_lease(switches: list[SwitchProcess], stack: ExitStack) -> None:
    switch = switches[1]
    switch.call("lease", deadline_ns=from_now(60))
    guest = stack.enter_context(NetDriver(bound_port(switch), GUEST))
    other = stack.enter_context(switch.guest(1, OTHER))
    switch.call("impair", port=PORT, delay_us=400_000)
    guest.send(numbered(OTHER, GUEST, 1))
    switch.wait_port(PORT, lambda p: p["tx_frames"] == 1)
    switch.call("lease", deadline_ns=from_now(0))
    switch.wait_port(PORT, lambda p: p["tx_fenced"] == 1)
    assert other.silent()


def test_a_switch_that_was_stopped_sends_nothing_afterwards(
    switches: list[SwitchProcess], stack: ExitStack
) -> None:
    """The whole host stands still for longer than its lease, with frames in the guest's queue."""
    observer, old, _ = switches
    observer.mac_set(GUEST, peer=2)
    old.mac_set(OTHER, peer=1)
    other = stack.enter_context(observer.guest(1, OTHER))
    old.call("lease", deadline_ns=from_now(1.0))
    guest = stack.enter_context(NetDriver(bound_port(old), GUEST))
    guest.send(numbered(OTHER, GUEST, 1))
    assert number_of(other.receive()) == 1
    end = from_now(1.0)
    os.kill(old.process.pid, signal.SIGSTOP)
    try:
        guest.send(*(numbered(OTHER, GUEST, n) for n in range(2, 50)))
        wait_for(lambda: time.clock_gettime_ns(time.CLOCK_BOOTTIME) > end)
    finally:
        os.kill(old.process.pid, signal.SIGCONT)
    old.wait_port(PORT, lambda p: p["tx_fenced"] == 48)
    assert other.silent()
    assert old.port_counters(PORT)["tx_frames"] == 1


@pytest.mark.parametrize("step", [1, 2])
def test_after_a_failover_nothing_of_the_old_place_is_accepted(
    switches: list[SwitchProcess], stack: ExitStack, step: int
) -> None:
    """The old place has not heard of it, and has not looked at its lease yet: it sends as before."""
    observer, old, new = switches
    other = stack.enter_context(observer.guest(1, OTHER))
    for switch in (observer, new):
        switch.mac_set(GUEST, peer=2)
    for switch in (old, new):
        switch.mac_set(OTHER, peer=1)
    old.call("lease", deadline_ns=from_now(60))
    stale = stack.enter_context(NetDriver(bound_port(old), GUEST))
    stale.send(numbered(OTHER, GUEST, 1))
    assert number_of(other.receive()) == 1
    for switch, peer in ((observer, 3), (new, 0)):
        switch.call("mac_set", network=NETWORK, mac=GUEST, peer=peer, epoch=1 + step, failover=True)
    stale.send(*(numbered(OTHER, GUEST, n) for n in range(2, 12)))
    observer.wait_peer(2, lambda p: p["spoofed"] == 10)
    new.call("lease", deadline_ns=from_now(60))
    fresh = stack.enter_context(NetDriver(bound_port(new, epoch=1 + step), GUEST))
    fresh.send(numbered(OTHER, GUEST, 100))
    assert number_of(other.receive()) == 100
    other.send(numbered(GUEST, OTHER, 7))
    assert number_of(fresh.receive()) == 7
    assert stale.silent()
    old.call("mac_set", network=NETWORK, mac=GUEST, peer=3, epoch=1 + step, failover=True)
    stale.send(numbered(OTHER, GUEST, 200))
    old.wait_port(PORT, lambda p: p["spoofed"] == 1)
    assert other.silent()
