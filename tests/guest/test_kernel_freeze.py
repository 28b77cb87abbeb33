# SPDX-License-Identifier: Apache-2.0
"""Freeze, thaw and resume of the guest's kernel, without devices."""

from __future__ import annotations

import hashlib
import os
import signal
import struct
import time

import pytest

from tests.guest.uml import (
    BOOTED,
    FAILED,
    FREEZE,
    FROZEN,
    GO,
    PANIC,
    POWEROFF,
    REBOOT,
    RUNNING,
    THAW,
    WAITING,
    Boot,
    copy_memory,
    move,
)
from tests.memfd import data_ranges

pytestmark = [pytest.mark.guest, pytest.mark.timeout(240)]

MODES = ["seccomp", "ptrace"]
WORK = ["work=memory,registers,forks", "pages=1024"]


def digest(fd: int) -> str:
    total = hashlib.sha256()
    for start, end in data_ranges(fd):
        total.update(struct.pack("=QQ", start, end))
        total.update(os.pread(fd, end - start, start))
    return total.hexdigest()


@pytest.mark.parametrize("mode", MODES)
def test_a_guest_under_load_moves_without_a_wrong_word(boot_kernel: Boot, mode: str) -> None:
    guest = boot_kernel(mode=mode, options=WORK)
    guest.report(BOOTED)
    for _ in range(12 if mode == "seccomp" else 5):
        guest.wait_progress(tick=2, rounds=2, forks=2)
        guest = move(guest, boot_kernel, mode=mode)
    guest.wait_progress(tick=5, rounds=10, forks=20)


@pytest.mark.parametrize("mode", MODES)
def test_a_cancelled_freeze_leaves_the_guest_running(boot_kernel: Boot, mode: str) -> None:
    guest = boot_kernel(mode=mode, options=WORK)
    guest.report(BOOTED)
    for _ in range(10):
        guest.wait_progress(rounds=1)
        guest.ask(FREEZE, FROZEN)
        guest.ask(THAW, RUNNING)
    guest.wait_progress(tick=3, rounds=5, forks=5)
    guest = move(guest, boot_kernel, mode=mode)
    guest.ask(FREEZE, FROZEN)
    guest.ask(THAW, RUNNING)
    guest.wait_progress(tick=3, rounds=5, forks=5)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_of_a_frozen_guest_changes(boot_kernel: Boot, mode: str) -> None:
    guest = boot_kernel(mode=mode, options=WORK)
    guest.report(BOOTED)
    guest.wait_progress(rounds=2)
    guest.ask(FREEZE, FROZEN)
    before = digest(guest.memory)
    for number in (signal.SIGALRM, signal.SIGIO, signal.SIGCHLD, signal.SIGWINCH):
        guest.process.send_signal(number)
    guest.command("typed while frozen")
    time.sleep(0.3)
    assert digest(guest.memory) == before
    guest.ask(THAW, RUNNING)
    assert guest.answer() == "ready"
    assert guest.answer() == "echo typed while frozen"
    guest.wait_progress(rounds=2)


def test_console_and_agent_go_on_after_a_resume(boot_kernel: Boot) -> None:
    guest = boot_kernel()
    guest.report(BOOTED)
    assert guest.answer() == "ready"
    for number in range(3):
        guest.command(f"before {number}")
        assert guest.answer() == f"echo before {number}"
        guest = move(guest, boot_kernel)
        guest.command(f"after {number}")
        assert guest.answer() == f"echo after {number}"
        guest.wait_progress(tick=2)


def test_clocks_go_on_and_follow_the_host(boot_kernel: Boot) -> None:
    guest = boot_kernel()
    guest.report(BOOTED)
    assert guest.answer() == "ready"
    guest.command("time")
    _, real, monotonic = guest.answer().split()
    guest = move(guest, boot_kernel)
    guest.command("time")
    _, later_real, later_monotonic = guest.answer().split()
    passed = float(later_real) - float(real)
    assert passed > 0
    assert float(later_monotonic) - float(monotonic) == pytest.approx(passed, abs=0.05)
    assert float(later_real) == pytest.approx(time.time(), abs=5)


@pytest.mark.parametrize("moved", [False, True], ids=["booted", "resumed"])
@pytest.mark.parametrize(
    ("word", "kind"), [("poweroff", POWEROFF), ("halt", POWEROFF), ("reboot", REBOOT), ("panic", PANIC)]
)
@pytest.mark.parametrize("mode", MODES)
def test_the_end_of_a_guest_is_reported(
    boot_kernel: Boot, mode: str, word: str, kind: int, moved: bool
) -> None:
    guest = boot_kernel(mode=mode, options=["work=memory,forks"])
    guest.report(BOOTED)
    assert guest.answer() == "ready"
    if moved:
        guest = move(guest, boot_kernel, mode=mode)
    guest.command(word)
    report = guest.report(kind)
    if kind == PANIC:
        assert "Attempted to kill init" in report.text
    assert guest.process.wait(30) == (-signal.SIGABRT if kind == PANIC else 0)


def test_requests_in_the_wrong_state(boot_kernel: Boot) -> None:
    guest = boot_kernel()
    guest.report(BOOTED)
    assert guest.ask(GO, FAILED).text == "this guest is running"
    guest.ask(THAW, RUNNING)
    guest.control.send(b"\x01\x00\x00\x00")
    guest.control.send(b"\x01" * 500)
    guest.wait_progress(tick=2)
    guest.ask(FREEZE, FROZEN)
    guest.ask(GO, FAILED)
    guest.ask(FREEZE, FROZEN)
    guest.ask(THAW, RUNNING)
    fresh = boot_kernel(resume=True)
    fresh.report(WAITING)
    fresh.ask(FREEZE, FAILED)
    fresh.leave()


def test_a_guest_ends_when_its_parent_is_gone(boot_kernel: Boot) -> None:
    for state in ("running", "frozen", "waiting"):
        guest = boot_kernel(resume=state == "waiting")
        guest.report(WAITING if state == "waiting" else BOOTED)
        if state == "frozen":
            guest.ask(FREEZE, FROZEN)
        guest.control.close()
        guest.process.wait(30)


def test_memory_that_holds_no_guest_is_refused(boot_kernel: Boot) -> None:
    fresh = boot_kernel(resume=True)
    fresh.report(WAITING)
    os.ftruncate(fresh.memory, 64 << 20)
    report = fresh.ask(GO, FAILED)
    assert report.text == "the memory holds no frozen guest"
    assert fresh.process.wait(30) == 1


def test_a_running_guests_memory_is_refused(boot_kernel: Boot) -> None:
    guest = boot_kernel()
    guest.report(BOOTED)
    fresh = boot_kernel(resume=True)
    fresh.report(WAITING)
    copy_memory(guest.memory, fresh.memory)
    assert fresh.ask(GO, FAILED).text == "the memory holds no frozen guest"


def test_a_guest_does_not_change_its_mode(boot_kernel: Boot) -> None:
    guest = boot_kernel(mode="seccomp")
    guest.report(BOOTED)
    guest.ask(FREEZE, FROZEN)
    fresh = boot_kernel(resume=True, mode="ptrace")
    fresh.report(WAITING)
    copy_memory(guest.memory, fresh.memory)
    assert fresh.ask(GO, FAILED).text == "the guest was frozen in seccomp mode"
    guest.ask(THAW, RUNNING)
    guest.wait_progress(tick=2)


def test_a_freeze_asked_for_before_the_kernel_listens(boot_kernel: Boot) -> None:
    guest = boot_kernel()
    guest.ask(FREEZE, FROZEN)
    guest.ask(THAW, RUNNING)
    guest.report(BOOTED)
    guest.wait_progress(tick=2)
