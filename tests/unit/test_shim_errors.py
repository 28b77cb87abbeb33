# SPDX-License-Identifier: Apache-2.0
"""How the shim takes a kernel that does not behave: a stand-in makes each mistake on request."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.helperclient import HelperClient, HelperFailure
from tests.shim import Shim
from tests.waiting import wait_for

Start = Callable[..., Shim]


@pytest.fixture
def start(helper_binary: Path, standin_kernel: Path, socket_dir: Path) -> Iterator[Start]:
    with ExitStack() as stack:

        def start_one(mistake: str = "none", *arguments: str) -> Shim:
            control = socket_dir / f"c{len(os.listdir(socket_dir))}"
            options = ("--append", f"standin={mistake}", *arguments)
            return stack.enter_context(Shim(helper_binary, standin_kernel, control, *options))

        yield start_one


def boottime_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def wait_stopped(pid: int) -> None:
    """Until the process obeys its SIGSTOP."""
    wait_for(lambda: Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T")


def test_a_freeze_that_takes_too_long_is_undone(start: Start) -> None:
    shim = start("late")
    shim.wait_state("running")
    with pytest.raises(HelperFailure, match="timeout"):
        shim.call("freeze", timeout_ms=50)
    assert shim.status()["state"] == "running"
    reply, _ = shim.call("freeze", timeout_ms=5000)
    assert reply["frozen_ns"] > 0
    shim.call("thaw")


def test_a_kernel_that_never_freezes(start: Start) -> None:
    shim = start("mute")
    shim.wait_state("running")
    with pytest.raises(HelperFailure, match="timeout"):
        shim.call("freeze", timeout_ms=50)
    assert shim.status()["state"] == "running"
    shim.call("kill")
    assert shim.status()["exit"]["reason"] == "killed"


def test_a_refused_freeze_says_why(start: Start) -> None:
    shim = start("refuse")
    shim.wait_state("running")
    with pytest.raises(HelperFailure, match=r"io: devices\?busy: Device or resource busy"):
        shim.call("freeze", timeout_ms=1000)
    assert shim.status()["state"] == "running"


def test_a_kernel_that_dies_instead_of_freezing(start: Start) -> None:
    shim = start("die")
    shim.wait_state("running")
    with pytest.raises(HelperFailure, match="bad-state: the guest has ended"):
        shim.call("freeze", timeout_ms=5000)
    exit_ = shim.wait_exit()
    assert exit_["reason"] == "crashed"
    assert exit_["code"] == -signal.SIGSEGV


def test_last_words_without_an_end_are_enforced(start: Start) -> None:
    assert start("linger").wait_exit()["reason"] == "poweroff"


def test_reports_nobody_asked_for_change_nothing(start: Start) -> None:
    shim = start("garbage")
    shim.wait_state("running")
    shim.call("freeze", timeout_ms=5000)
    assert shim.status()["state"] == "frozen"
    shim.call("thaw")


def test_operations_in_the_wrong_state(start: Start) -> None:
    shim = start("silent")
    for op, arguments in (
        ("freeze", {"timeout_ms": 10}),
        ("thaw", {}),
        ("go", {}),
        ("reconnect", {"devices": []}),
    ):
        with pytest.raises(HelperFailure, match="bad-state: the guest is starting"):
            shim.call(op, **arguments)
    shim.call("kill")
    with pytest.raises(HelperFailure, match="bad-state: the guest is exited"):
        shim.call("freeze", timeout_ms=10)
    shim.call("kill")


def test_a_guest_that_does_not_freeze_at_its_deadline_is_stopped(start: Start) -> None:
    shim = start("mute")
    pid = shim.wait_state("running")["pid"]
    deadline = boottime_ns() + 50_000_000
    shim.call("lease", deadline_ns=deadline)
    assert shim.wait_event("expired")["deadline_ns"] == deadline
    assert shim.status()["stopped"]
    wait_stopped(pid)
    shim.call("lease", deadline_ns=0)
    status = shim.status()
    assert not status["stopped"]
    assert not status["expired"]
    shim.call("kill")


def test_a_guest_may_not_even_boot_past_its_deadline(start: Start) -> None:
    shim = start("silent")
    shim.call("lease", deadline_ns=1)
    shim.wait_event("expired")
    assert shim.status()["stopped"]


def test_a_missing_kernel_is_named(helper_binary: Path, socket_dir: Path) -> None:
    command = [str(helper_binary), "guest", "--control", str(socket_dir / "c"), "--memory", "64M", "--kernel"]
    for kernel, words in (("/nowhere/linux", "No such file"), ("/etc/hostname", "cannot be executed")):
        ended = subprocess.run([*command, kernel], capture_output=True, text=True, timeout=20)
        assert ended.returncode == 1
        assert words in ended.stderr


def test_a_missing_backend_is_named(helper_binary: Path, standin_kernel: Path, socket_dir: Path) -> None:
    command = [str(helper_binary), "guest", "--control", str(socket_dir / "c"), "--memory", "64M"]
    command += ["--kernel", str(standin_kernel), "--device", f"blk:{socket_dir}/none"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert ended.returncode == 1
    assert f"device 0 at {socket_dir}/none: No such file or directory" in ended.stderr


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_guest_never_outlives_its_shim(start: Start, number: signal.Signals) -> None:
    shim = start()
    pidfd = os.pidfd_open(shim.wait_state("running")["pid"])
    shim.process.send_signal(number)
    assert shim.process.wait(10) == (-signal.SIGKILL if number == signal.SIGKILL else 0)
    deadline = time.monotonic() + 10
    while True:
        try:
            signal.pidfd_send_signal(pidfd, 0)
        except ProcessLookupError:
            break
        assert time.monotonic() < deadline, "the guest's kernel lives on without its shim"
        time.sleep(0.01)
    os.close(pidfd)


def test_the_memory_keeps_its_length(start: Start) -> None:
    shim = start()
    shim.wait_state("running")
    reply, (memory,) = shim.call("memory")
    assert reply["size"] == 64 << 20 == os.fstat(memory).st_size
    for length in (1, 65 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(memory, length)
    with pytest.raises(HelperFailure, match="bad-state"):
        shim.call("memory", size=4096)
    os.close(memory)


def test_a_guest_that_was_let_go_runs_for_whoever_asks(start: Start) -> None:
    """The peer dies between its word and the kernel's answer: the next one must not say that it never ran."""
    shim = start("slow", "--resume")
    shim.wait_state("waiting")
    shim.send("go")
    shim.close()
    with HelperClient(shim.control) as controller:
        assert controller.status()["state"] == "running"
        assert controller.wait_event("state")["state"] == "running"
        assert controller.status()["state"] == "running"


def test_a_guest_that_could_not_be_let_go_is_waiting_again(start: Start) -> None:
    shim = start("stay", "--resume")
    shim.wait_state("waiting")
    shim.events.clear()
    with pytest.raises(HelperFailure, match="devices busy"):
        shim.call("go")
    assert shim.status()["state"] == "waiting"
    assert [event["state"] for event in shim.events if event["event"] == "state"] == ["waiting"]


def test_the_controller_may_come_and_go(start: Start) -> None:
    shim = start()
    shim.wait_state("running")
    shim.close()
    with HelperClient(shim.control) as controller:
        controller.call("freeze", timeout_ms=1000)
    with HelperClient(shim.control) as controller:
        controller.call("thaw")
    with HelperClient(shim.control) as controller:
        assert controller.status()["state"] == "running"
