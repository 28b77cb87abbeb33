# SPDX-License-Identifier: Apache-2.0
"""The control socket every role of the helper serves, by the role `guest` with a stand-in for the kernel."""

from __future__ import annotations

import os
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest

from tests.helperclient import HelperClient, HelperFailure
from tests.shim import Shim
from tests.waiting import PATIENCE


@pytest.fixture
def shim(helper_binary: Path, standin_kernel: Path, socket_dir: Path) -> Iterator[Shim]:
    with Shim(helper_binary, standin_kernel, socket_dir / "control") as shim:
        shim.wait_state("running")
        yield shim


def refused(shim: HelperClient, data: bytes) -> str:
    shim.send_raw(data)
    reply, fds = shim.receive(time.monotonic() + PATIENCE)
    assert not fds
    assert reply["ok"] is False
    assert isinstance(reply["message"], str)
    return f"{reply['id']} {reply['error']}"


def open_fds(shim: Shim) -> int:
    return len(os.listdir(f"/proc/{shim.process.pid}/fd"))


def test_hello(shim: Shim) -> None:
    reply, _ = shim.call("hello")
    assert reply["role"] == "guest"
    assert reply["pid"] == shim.process.pid
    assert reply["protocol"] == 1
    assert stat.S_IMODE(shim.control.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "data",
    [
        b"\xc1",
        b"\xc0",
        b"\x93\x01\x02\x03",
        b"\x80\x80",
        msgpack.packb({"id": 1, "op": "hello"})[:-1],
        msgpack.packb({"op": "hello"}),
        msgpack.packb({"id": 0, "op": "hello"}),
        msgpack.packb({"id": -1, "op": "hello"}),
        msgpack.packb({"id": "1", "op": "hello"}),
        b"\xdf\xff\xff\xff\xff",
        b"\x81\xa2id\xdd\x7f\xff\xff\xff",
        b"\x91" * 3000,
        b"x" * 65537,
    ],
)
def test_what_is_no_request_is_refused(shim: Shim, data: bytes) -> None:
    assert refused(shim, data) == "0 bad-request"
    assert shim.status()["state"] == "running"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ({"op": "nothing"}, "unknown-op"),
        ({"op": 7}, "bad-argument"),
        ({}, "bad-argument"),
        ({"op": "status", "verbose": True}, "bad-argument"),
        ({"op": "hello", "timeout_ms": 1}, "bad-argument"),
        ({"op": "freeze"}, "bad-argument"),
        ({"op": "freeze", "timeout_ms": None}, "bad-argument"),
        ({"op": "freeze", "timeout_ms": 0}, "bad-argument"),
        ({"op": "freeze", "timeout_ms": 1.5}, "bad-argument"),
        ({"op": "freeze", "timeout_ms": 1 << 63}, "bad-argument"),
        ({"op": "reconnect", "devices": "all"}, "bad-argument"),
        ({"op": "reconnect", "devices": [1]}, "bad-argument"),
        ({"op": "reconnect", "devices": ["a\0b"]}, "bad-argument"),
        ({"op": "reconnect", "devices": ["x" * 108]}, "bad-argument"),
        ({"op": "reconnect", "devices": ["x"] * 17}, "bad-argument"),
        ({"op": "status", 5: 6}, "bad-argument"),
    ],
)
def test_bad_arguments_are_named(shim: Shim, arguments: dict[object, object], code: str) -> None:
    assert refused(shim, msgpack.packb({"id": 9, **arguments})) == f"9 {code}"


def test_descriptors_nobody_takes_are_closed(shim: Shim) -> None:
    reading, writing = os.pipe()
    before = open_fds(shim)
    for _ in range(20):
        shim.call("hello", fds=[reading] * 8)
    shim.send("hello", fds=[reading] * 9)
    reply, _ = shim.receive(time.monotonic() + PATIENCE)
    assert reply["error"] == "bad-request"
    shim.call("hello")
    assert open_fds(shim) == before
    os.close(reading)
    os.close(writing)


def test_a_newer_controller_replaces_the_older(shim: Shim) -> None:
    slow = shim.send("freeze", timeout_ms=1000)
    shim.reply(slow)
    with HelperClient(shim.control) as newer:
        assert newer.call("status")[0]["state"] == "frozen"
        with pytest.raises((EOFError, OSError)):
            shim.call("hello")
        newer.call("thaw")
        assert newer.wait_event("state")["state"] == "running"


def test_a_controller_that_does_not_read_is_dropped(shim: Shim) -> None:
    for _ in range(20000):
        try:
            shim.send("status")
        except OSError:
            break
    else:
        pytest.fail("the shim kept all answers")
    with HelperClient(shim.control) as newer:
        assert newer.status()["state"] == "running"
    assert "does not read" in shim.log


def refused_control(binary: Path, control: Path) -> str:
    """What a helper says that cannot have this control socket."""
    command = [str(binary), "guest", "--control", str(control), "--kernel", "/x", "--memory", "64M"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 1
    return ended.stderr


def test_a_stale_socket_is_replaced_and_a_living_one_is_not(
    helper_binary: Path, standin_kernel: Path, socket_dir: Path
) -> None:
    control = socket_dir / "control"
    with Shim(helper_binary, standin_kernel, control) as first:
        assert "Address already in use" in refused_control(helper_binary, control)
        assert first.call("hello")
    assert control.is_socket(), "a killed helper leaves its socket"
    with Shim(helper_binary, standin_kernel, control) as third:
        third.call("quit")
        assert third.process.wait(PATIENCE) == 0
    assert not control.exists()


def test_a_file_that_is_no_socket_is_not_replaced(helper_binary: Path, socket_dir: Path) -> None:
    control = socket_dir / "control"
    control.write_text("kept")
    assert "Address already in use" in refused_control(helper_binary, control)
    assert control.read_text() == "kept"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--control is required"),
        (["--control"], "needs a value"),
        (["--control", ""], "must not be empty"),
        (["--nothing"], "'--nothing' is no option"),
        (["something"], "'something' is not an option"),
        (["--control", "c", "--kernel", "k", "--memory", "64X"], "'64X' is not a size"),
        (["--control", "c", "--kernel", "k", "--memory", "1K"], "at least 16M"),
        (["--control", "c", "--kernel", "k", "--memory", "99999999999T"], "is not a size"),
        (
            ["--control", "c", "--kernel", "k", "--memory", "64M", "--mode", "kvm"],
            "neither seccomp nor ptrace",
        ),
        (["--control", "c", "--kernel", "k", "--memory", "64M", "--device", "usb:/x"], "neither net:SOCKET"),
        (["--control", "c", "--kernel", "k", "--memory", "64M", "--cpus", "none"], "not a number"),
    ],
)
def test_a_wrong_command_line_is_one_line(helper_binary: Path, arguments: list[str], words: str) -> None:
    ended = subprocess.run(
        [str(helper_binary), "guest", *arguments], capture_output=True, text=True, timeout=PATIENCE
    )
    assert ended.returncode == 2
    assert words in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert ended.stdout == ""


def test_help_and_version(helper_binary: Path) -> None:
    for arguments in (["--help"], ["guest", "--help"], ["--version"], ["guest", "--version"]):
        ended = subprocess.run(
            [str(helper_binary), *arguments], capture_output=True, text=True, timeout=PATIENCE
        )
        assert ended.returncode == 0
        assert ended.stdout
        assert ended.stderr == ""


def test_a_late_answer_never_reaches_another_controller(
    helper_binary: Path, standin_kernel: Path, socket_dir: Path
) -> None:
    with Shim(helper_binary, standin_kernel, socket_dir / "c", "--append", "standin=late") as shim:
        shim.wait_state("running")
        shim.send("freeze", timeout_ms=5000)
        with HelperClient(shim.control) as newer:
            assert newer.wait_event("state")["state"] == "frozen"
            assert newer.call("hello")[0]["role"] == "guest"


def test_refusals_carry_their_sentence(shim: Shim) -> None:
    with pytest.raises(HelperFailure, match="the guest is running, thaw is not possible"):
        shim.call("thaw")
