# SPDX-License-Identifier: Apache-2.0
"""Real guests under the shim: boot, freeze, move, end, and what happens when nobody looks after them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.helperclient import HelperClient, HelperFailure, HelperProcess
from tests.shim import Console, Shim, copy_memory
from tests.waiting import wait_for

pytestmark = [pytest.mark.guest, pytest.mark.timeout(120)]

Start = Callable[..., Shim]
MODES = ["seccomp", "ptrace"]


@pytest.fixture
def start(
    helper_binary: Path, guest_kernel: Path, checker_ramdisk: Path, socket_dir: Path
) -> Iterator[Start]:
    with ExitStack() as stack:

        def start_one(*arguments: str) -> Shim:
            control = socket_dir / f"c{len(os.listdir(socket_dir))}"
            return stack.enter_context(
                Shim(helper_binary, guest_kernel, control, "--initrd", checker_ramdisk, *arguments)
            )

        yield start_one


def running(shim: Shim) -> Console:
    """The console of a guest whose program is ready."""
    console = shim.attach()
    shim.wait_state("running")
    wait_for(lambda: "ready" in shim.console_log.read_text())
    return console


def count(console: Console) -> int:
    """Rounds that the guest has checked its memory; it must never have found a wrong word."""
    console.type("count\n")
    words = console.expect("count").split("count")[1].split()
    assert words[1:] == ["bad", "0"]
    return int(words[0])


def wait_progress(console: Console, past: int) -> int:
    wait_for(lambda: count(console) > past)
    return count(console)


def boottime_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


@pytest.mark.parametrize("mode", MODES)
def test_freeze_and_thaw(start: Start, mode: str) -> None:
    shim = start("--mode", mode)
    console = running(shim)
    assert shim.status()["mode"] == mode
    rounds = count(console)
    for _ in range(5):
        times = shim.freeze()
        assert times["requested_ns"] <= times["begun_ns"] <= times["frozen_ns"]
        status = shim.status()
        assert status["state"] == "frozen"
        assert status["since_ns"] >= times["frozen_ns"]
        assert shim.call("thaw")[0]["running_ns"] > times["frozen_ns"]
        rounds = wait_progress(console, rounds)


def test_a_frozen_guest_does_not_write_its_memory(start: Start) -> None:
    shim = start()
    running(shim)
    shim.freeze()
    reply, (memory,) = shim.call("memory")
    before = os.pread(memory, reply["size"], 0)
    time.sleep(0.2)
    assert os.pread(memory, reply["size"], 0) == before
    os.close(memory)


@pytest.mark.parametrize("mode", MODES)
def test_a_guest_moves_between_shims(start: Start, mode: str) -> None:
    source = start("--mode", mode)
    rounds = wait_progress(running(source), 0)
    for _ in range(3):
        destination = start("--mode", mode, "--resume")
        destination.wait_state("waiting")
        source.freeze()
        copied = copy_memory(source, destination)
        assert 0 < copied <= 64 << 20
        console = destination.attach()
        destination.call("go")
        source.call("quit")
        assert source.process.wait(10) == 0
        rounds = wait_progress(console, rounds)
        source = destination
    console.type("poweroff\n")
    assert source.wait_exit()["reason"] == "poweroff"


def test_a_cancelled_move_leaves_the_source_running(start: Start) -> None:
    source = start()
    console = running(source)
    destination = start("--resume")
    destination.wait_state("waiting")
    source.freeze()
    copy_memory(source, destination)
    destination.call("quit")
    source.call("thaw")
    wait_progress(console, count(console))


def test_memory_of_no_guest_is_refused(start: Start) -> None:
    shim = start("--resume")
    shim.wait_state("waiting")
    shim.call("memory", size=64 << 20)
    with pytest.raises(HelperFailure, match="io: "):
        shim.call("go")
    assert shim.wait_exit()["reason"] == "crashed"


@pytest.mark.parametrize("reason", ["poweroff", "reboot", "panic"])
def test_how_a_guest_ended_is_told(start: Start, reason: str) -> None:
    shim = start()
    console = running(shim)
    console.type(f"{reason}\n")
    exit_ = shim.wait_exit()
    assert exit_["reason"] == reason
    if reason == "panic":
        assert "kill init" in exit_["message"]
    shim.call("quit")
    assert shim.process.wait(10) == 0


def test_how_a_moved_guest_ended_is_told(start: Start) -> None:
    source = start()
    running(source)
    destination = start("--resume")
    destination.wait_state("waiting")
    source.freeze()
    copy_memory(source, destination)
    console = destination.attach()
    destination.call("go")
    console.type("reboot\n")
    assert destination.wait_exit()["reason"] == "reboot"


def test_kill_takes_all_processes(start: Start) -> None:
    shim = start()
    running(shim)
    pid = shim.status()["pid"]
    session = subprocess.run(["ps", "-o", "pid=", "-s", str(pid)], capture_output=True, text=True, timeout=10)
    pids = session.stdout.split()
    assert len(pids) >= 3, "a kernel and a stub for each of its processes"
    shim.call("kill")
    exit_ = shim.status()["exit"]
    assert exit_["reason"] == "killed"
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_a_kernel_killed_by_somebody_else_has_crashed(start: Start) -> None:
    shim = start()
    running(shim)
    os.kill(shim.status()["pid"], signal.SIGKILL)
    exit_ = shim.wait_exit()
    assert exit_["reason"] == "crashed"
    assert exit_["code"] == -signal.SIGKILL


def test_the_agent_stream_is_the_serial_line(start: Start) -> None:
    shim = start()
    running(shim)
    for _ in range(2):
        agent = shim.attach("agent")
        agent.type("hello\n")
        assert agent.expect("HELLO") == "HELLO"
    agent.type("x" * 3000 + "\n")
    assert len(agent.expect("X" * 3000)) == 3000
    shim.freeze()
    agent.type("later\n")
    shim.call("thaw")
    assert agent.expect("LATER") == "LATER"


def test_a_newer_console_replaces_the_older(start: Start) -> None:
    shim = start()
    older = running(shim)
    newer = shim.attach()
    while older.socket.recv(65536):
        pass
    assert count(newer) >= 0


def test_the_guest_runs_without_a_controller(start: Start) -> None:
    shim = start()
    rounds = count(running(shim))
    shim.close()
    with HelperClient(shim.control) as controller:
        assert controller.status()["state"] == "running"
        (fd,) = controller.call("console")[1]
        wait_progress(Console(fd), rounds)


def test_an_expired_lease_freezes_the_guest(start: Start) -> None:
    shim = start()
    console = running(shim)
    rounds = count(console)
    shim.close()
    with HelperClient(shim.control) as controller:
        deadline = boottime_ns() + 200_000_000
        controller.call("lease", deadline_ns=deadline)
        assert controller.wait_event("expired")["deadline_ns"] == deadline
        status = controller.status()
        assert (status["state"], status["expired"], status["stopped"]) == ("frozen", True, False)
        assert status["deadline_ns"] == deadline
        with pytest.raises(HelperFailure, match="bad-state: the lease has expired"):
            controller.call("thaw")
        controller.call("lease", deadline_ns=boottime_ns() + 60_000_000_000)
        assert controller.status()["state"] == "frozen"
        controller.call("thaw")
    wait_progress(console, rounds)


def test_a_lease_expires_with_nobody_connected(start: Start) -> None:
    shim = start()
    running(shim)
    shim.call("lease", deadline_ns=boottime_ns() + 100_000_000)
    shim.close()
    wait_for(lambda: "the guest is frozen" in shim.log)
    with HelperClient(shim.control) as controller:
        status = controller.status()
    assert (status["state"], status["expired"]) == ("frozen", True)


def test_a_lease_from_the_first_instruction_on(start: Start) -> None:
    """A guest that boots when it ends cannot be frozen, and is stopped."""
    with pytest.raises(RuntimeError, match="the lease has expired, the guest must not run"):
        start("--lease", str(boottime_ns()))
    shim = start("--lease", str(boottime_ns() + 30_000_000))
    status = shim.status()
    assert status["deadline_ns"] > 0
    shim.wait_event("expired", timeout=20)
    status = shim.status()
    assert status["expired"]
    assert status["stopped"] or status["state"] == "frozen"
    shim.call("lease", deadline_ns=boottime_ns() + 60_000_000_000)
    if shim.status()["state"] == "frozen":
        shim.call("thaw")
    wait_for(lambda: "ready" in shim.console_log.read_text())


def test_a_renewed_lease_never_freezes(start: Start) -> None:
    shim = start()
    console = running(shim)
    rounds = count(console)
    for _ in range(10):
        shim.call("lease", deadline_ns=boottime_ns() + 2_000_000_000)
        rounds = wait_progress(console, rounds)
    shim.call("lease", deadline_ns=0)
    status = shim.status()
    assert (status["state"], status["expired"]) == ("running", False)


def test_no_go_without_a_lease(start: Start) -> None:
    source = start()
    running(source)
    destination = start("--resume")
    destination.wait_state("waiting")
    source.freeze()
    copy_memory(source, destination)
    destination.call("lease", deadline_ns=1)
    with pytest.raises(HelperFailure, match="lease has expired"):
        destination.call("go")
    destination.call("lease", deadline_ns=0)
    destination.call("go")


@pytest.mark.parametrize("frozen", [False, True])
def test_reconnect_goes_on_in_a_fresh_process(start: Start, frozen: bool) -> None:
    shim = start()
    console = running(shim)
    rounds = wait_progress(console, 0)
    pid = shim.status()["pid"]
    if frozen:
        shim.freeze()
    shim.call("reconnect", devices=[], timeout=20)
    if frozen:
        assert shim.status()["state"] == "waiting"
        shim.call("go")
    status = shim.status()
    assert status["state"] == "running"
    assert status["pid"] != pid
    wait_progress(console, rounds)
    with pytest.raises(HelperFailure, match="the guest has 0 devices, not 1"):
        shim.call("reconnect", devices=["/nowhere"])


def test_a_guest_goes_on_after_its_disk_was_killed(
    start: Start, helper_binary: Path, socket_dir: Path, tmp_path: Path
) -> None:
    options = ("--overlay", str(tmp_path / "overlay"), "--size", "16M")
    first, second = str(socket_dir / "blk1"), str(socket_dir / "blk2")
    with HelperProcess(helper_binary, "disk", "--socket", first, *options, control=socket_dir / "d1") as disk:
        shim = start("--device", f"blk:{first}")
        console = running(shim)
        console.type("disk\n")
        assert console.expect("disk").endswith("disk 1")
        disk.call("status")
    with HelperProcess(helper_binary, "disk", "--socket", second, *options, control=socket_dir / "d2"):
        console.type("disk\n")
        shim.call("reconnect", devices=[second], timeout=20)
        assert console.expect("disk").endswith("disk 2")
        console.type("disk\n")
        assert console.expect("disk").endswith("disk 3")
        with pytest.raises(HelperFailure, match="No such file"):
            shim.call("reconnect", devices=[str(socket_dir / "nowhere")])
        assert shim.status()["state"] == "running"


def test_the_console_log_is_bounded(
    helper_binary: Path, guest_kernel: Path, checker_ramdisk: Path, socket_dir: Path
) -> None:
    control = socket_dir / "c"
    log = Path(f"{control}.console")
    with log.open("wb") as file:
        file.truncate(8 << 20)
    with Shim(helper_binary, guest_kernel, control, "--initrd", checker_ramdisk) as shim:
        running(shim)
    assert "ready" in log.read_text()
    assert log.stat().st_size < 1 << 20
    assert Path(f"{log}.1").stat().st_size == 8 << 20
