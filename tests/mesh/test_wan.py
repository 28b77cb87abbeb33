# SPDX-License-Identifier: Apache-2.0
"""The emulated WAN: real namespaces, real TCP, `mobi-helper wan` in between, as root and as an ordinary user.

What is asserted holds on a busy machine too: a round trip is never shorter than asked, a rate never higher, a
cut path carries nothing. How close it comes is a benchmark's business.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from proto.api import OperationError
from tests.nest import ORDINARY, NestProcess

FILE = """
sites: {tokyo: {}, virginia: {}, amsterdam: {}}
paths:
  - {between: [tokyo, virginia], rtt: 80ms, rate: 40mbit}
  - {between: [virginia, amsterdam], rtt: 30ms, loss: 30%}
"""
TOKYO, VIRGINIA, AMSTERDAM = "198.18.0.1", "198.18.0.2", "198.18.0.3"
DIGITS = tuple("0123456789")
RATE = 5_000_000
"""40mbit in bytes per second."""


def start(directory: Path, helper: Path, user: int) -> NestProcess:
    if shutil.which("ip") is None or shutil.which("setpriv") is None:
        pytest.skip("ip or setpriv is missing (apt-get install iproute2 util-linux)")
    return NestProcess(directory, FILE, helper, user)


@pytest.fixture
def nest(helper_binary: Path, socket_dir: Path) -> Iterator[NestProcess]:
    with start(socket_dir, helper_binary, os.getuid()) as running:
        yield running


@pytest.fixture
def unprivileged(helper_binary: Path, socket_dir: Path) -> Iterator[NestProcess]:
    """A nest of a user who has no capability and can get none."""
    with start(socket_dir, helper_binary, os.getuid() or ORDINARY) as running:
        yield running


def test_round_trips_cut_and_heal(unprivileged: NestProcess) -> None:
    nest = unprivileged
    shown = nest.call("wan.show")
    assert [(s["site"], s["address"]) for s in shown["sites"]] == [
        ("tokyo", TOKYO),
        ("virginia", VIRGINIA),
        ("amsterdam", AMSTERDAM),
    ]
    assert {(p["a"], p["b"]): (p["rtt"], p["rate"], p["loss"]) for p in shown["paths"]} == {
        ("tokyo", "virginia"): (0.08, RATE, 0.0),
        ("tokyo", "amsterdam"): (0.0, None, 0.0),
        ("virginia", "amsterdam"): (0.03, None, 0.3),
    }
    nest.serve("virginia", "echo-server", VIRGINIA)
    assert 0.08 <= min(nest.round_trips("tokyo", VIRGINIA)) < 0.8

    changed = nest.call("wan.set", a="virginia", b="tokyo", rtt=0.01)
    assert (changed["rtt"], changed["rate"]) == (0.01, RATE), "the rest of the path stays as it is"
    assert 0.01 <= min(nest.round_trips("tokyo", VIRGINIA)) < 0.08

    cut = nest.call("wan.cut", a="tokyo", b="virginia")
    assert [p["cut"] for p in cut["paths"]] == [True, False, False]
    waiting = nest.start("tokyo", "echo", VIRGINIA)
    time.sleep(1.5)
    assert waiting.read_text() == "", "nothing passes where the path is cut"
    nest.call("wan.heal")
    assert len(nest.wait(waiting, "[")) == 5, "TCP goes on once the path is whole"


def test_rate(nest: NestProcess) -> None:
    size = 3_000_000
    sink = nest.serve("virginia", "sink", VIRGINIA)
    nest.start("tokyo", "source", VIRGINIA, str(size))
    total, seconds = nest.wait(sink, "[")
    assert total == size
    # What was in the first segment is not timed, and a link that was idle may send two packets at once.
    assert (size - 256 * 1024) / RATE < seconds < 20 * size / RATE


def test_loss(nest: NestProcess) -> None:
    receiver = nest.serve("amsterdam", "count", AMSTERDAM)
    nest.start("virginia", "datagrams", AMSTERDAM, "400")
    received = nest.wait(receiver, DIGITS)
    # 280 are expected, with a standard deviation of 9.
    assert 200 < received < 360


def test_killed_helper_is_replaced(nest: NestProcess) -> None:
    """The network comes back as it was, and connections over it go on."""
    nest.serve("virginia", "echo-server", VIRGINIA)
    nest.call("wan.set", a="tokyo", b="virginia", rtt=0.05)
    helpers = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(nest.process.pid)],
        capture_output=True,
        text=True,
        check=True,
    )
    (pid,) = [int(line.split()[0]) for line in helpers.stdout.splitlines() if " wan --control" in line]
    os.kill(pid, signal.SIGKILL)
    assert min(nest.round_trips("tokyo", VIRGINIA)) >= 0.05
    assert nest.call("wan.show")["paths"][0]["rtt"] == 0.05


def test_refusals(nest: NestProcess) -> None:
    for op, args, words in (
        ("wan.cut", {"a": "tokio", "b": "virginia"}, "no site 'tokio'"),
        ("wan.cut", {"a": "tokyo", "b": "tokyo"}, "both ends"),
        ("wan.set", {"a": "tokyo", "b": "virginia", "loss": 2.0}, "less than or equal to 1"),
        ("wan.set", {"a": "tokyo", "b": "virginia", "colour": 1}, "colour"),
        ("wan.start", {"site": "tokyo", "argv": ["/nowhere"], "log": "/dev/null"}, "/nowhere"),
        ("wan.start", {"site": "tokyo", "argv": ["true"], "log": "/nowhere/log"}, "/nowhere/log"),
        ("wan.fly", {}, "no operation"),
    ):
        with pytest.raises(OperationError, match=words):
            nest.call(op, **args)
    again = subprocess.run(
        [
            sys.executable,
            "-m",
            "mobid",
            "wan",
            "--dir",
            nest.directory / "wan",
            "--file",
            nest.directory / "wan.yaml",
        ],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert again.returncode == 1
    assert "running in" in again.stderr
    assert "Traceback" not in again.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sites: {a: {}}\npaths: [{between: [a, b]}]", "paths[0].between[1]: there is no site 'b'"),
        ("sites: {a: {}, b: {}}\npaths: [{between: [a, b], rtt: 5}]", "paths[0].rtt: 5 needs a unit"),
        ("sites: [", "no YAML"),
        ("sites: {a: {colour: 1}}", "colour"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "wan.yaml").write_text(text)
    result = subprocess.run(
        [sys.executable, "-m", "mobid", "wan", "--dir", tmp_path / "w", "--file", tmp_path / "wan.yaml"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert result.returncode == 1
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "w").exists(), "nothing is made for a file that is wrong"


def test_forbidden_user_namespaces(tmp_path: Path) -> None:
    """Where the host does not allow them, one line says so and what to do."""
    (tmp_path / "wan.yaml").write_text(FILE)
    nest = f"{sys.executable} -m mobid wan --dir {tmp_path}/wan --file {tmp_path}/wan.yaml"
    script = f"echo 0 >/proc/sys/user/max_user_namespaces || exit 77; exec {nest}"
    result = subprocess.run(
        ["unshare", "-Ur", "sh", "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    if result.returncode == 77 or "unshare" in result.stderr:
        pytest.skip(f"user namespaces cannot be tried here: {result.stderr}")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1, result.stderr
    assert "user namespaces" in result.stderr
    assert "sysctl -w user.max_user_namespaces=15000" in result.stderr


def test_stop_ends_the_nest_and_nothing_else(nest: NestProcess) -> None:
    nest.serve("tokyo", "echo-server", "127.0.0.1")
    assert nest.call("stop") == {}
    assert nest.process.wait(20) == 0
    assert Path(f"/proc/{nest.pids[0]}").exists()
    assert not (nest.directory / "wan/run/wan.sock").exists()
