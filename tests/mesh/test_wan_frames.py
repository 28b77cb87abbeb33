# SPDX-License-Identifier: Apache-2.0
"""`mobi-helper wan` frame by frame: three sites on veth pairs in a network namespace of the test's own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Self

import pytest

from tests.helperclient import HelperFailure, HelperProcess
from tests.nest import REPOSITORY

SITES = ("a", "b", "c")
MACS = {site: f"0200000000{number:02x}" for number, site in enumerate(SITES, start=1)}
NOBODY = "020000000099"
TCP, UDP = 6, 17


class Rig:
    """The helper in its namespace, with `a1` to `c1` attached; frames go in and out at `a0` to `c0`."""

    def __init__(self, helper: HelperProcess) -> None:
        self.helper = helper
        for site in SITES:
            helper.call("attach", site=site, interface=f"{site}1")

    def inside(self, *program: str) -> subprocess.Popen[str]:
        enter = ["nsenter", "--preserve-credentials", "-U", "-n", "-t", str(self.helper.process.pid)]
        return subprocess.Popen(
            [*enter, sys.executable, "-m", "tests.traffic", *program],
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )

    def send(self, site: str, to: str, count: int, protocol: int = TCP) -> None:
        sender = self.inside("frames-out", f"{site}0", to, MACS[site], str(protocol), str(count))
        assert sender.wait(30) == 0

    def counters(self, site: str, to: str) -> dict[str, Any]:
        lanes = self.helper.call("counters", site=site)[0]["lanes"]
        lane: dict[str, Any] = next(lane for lane in lanes if lane["b"] == to)
        return lane


class Listener:
    """Takes the frames that come out at a site; `numbers` are known when none came for a second."""

    def __init__(self, rig: Rig, site: str) -> None:
        self.process = rig.inside("frames-in", f"{site}0")
        assert self.process.stdout is not None
        self.output: IO[str] = self.process.stdout
        self.numbers: list[int] = []

    def __enter__(self) -> Self:
        assert json.loads(self.output.readline()) == "ready"
        return self

    def __exit__(self, *_: object) -> None:
        self.numbers = json.loads(self.output.readline() or "[]")
        self.process.wait(30)
        self.output.close()


def run_rig(binary: Path, directory: Path, *arguments: str) -> HelperProcess:
    for program in ("ip", "unshare", "nsenter"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is missing (apt-get install iproute2 util-linux)")
    if subprocess.run(["unshare", "-Urn", "true"], check=False).returncode != 0:
        pytest.skip("this host does not allow user namespaces")
    lines = []
    for site in SITES:
        mac = ":".join(MACS[site][i : i + 2] for i in range(0, 12, 2))
        lines.append(f"ip link add {site}0 address {mac} type veth peer name {site}1")
        lines.append(f"ip link set {site}0 up; ip link set {site}1 up")
    script = "; ".join(
        ["set -e", "echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6", *lines, 'exec "$@"']
    )
    wrapper = directory / "wrapper"
    wrapper.write_text(f"#!/bin/sh\nexec unshare -Urn sh -c '{script}' sh {binary} \"$@\"\n")
    wrapper.chmod(0o755)
    return HelperProcess(wrapper, "wan", *arguments, control=directory / "control")


@pytest.fixture
def rig(helper_binary: Path, socket_dir: Path) -> Iterator[Rig]:
    with run_rig(helper_binary, socket_dir) as helper:
        yield Rig(helper)


def test_learns_who_is_where(rig: Rig) -> None:
    with Listener(rig, "b") as b, Listener(rig, "c") as c:
        rig.send("a", MACS["b"], 5)
    assert (b.numbers, c.numbers) == ([*range(5)], [*range(5)]), "an unknown address goes everywhere"
    rig.send("b", NOBODY, 1)
    with Listener(rig, "b") as b, Listener(rig, "c") as c:
        rig.send("a", MACS["b"], 5)
        rig.send("a", "ffffffffffff", 1)
    assert (b.numbers, c.numbers) == ([*range(5), 0], [0])


def test_duplicates_and_cuts(rig: Rig) -> None:
    rig.send("b", NOBODY, 1)
    rig.helper.call("path", a="a", b="b", rtt_us=10_000, duplicate_ppm=1_000_000)
    with Listener(rig, "b") as b:
        rig.send("a", MACS["b"], 5)
    assert b.numbers == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    rig.helper.call("path", a="b", b="a")
    rig.helper.call("cut", a="b", b="a")
    rig.send("a", MACS["b"], 5)
    assert rig.counters("a", "b")["cut_frames"] == 5
    rig.helper.call("heal", a="a", b="b")
    with Listener(rig, "b") as b:
        rig.send("a", MACS["b"], 2)
    assert b.numbers == [0, 1]


def test_blocked_protocols(rig: Rig) -> None:
    rig.send("b", NOBODY, 1)
    rig.helper.call("site", site="b", block=["udp", "icmp"])
    with Listener(rig, "b") as b:
        rig.send("a", MACS["b"], 3, UDP)
        rig.send("a", MACS["b"], 2, TCP)
    assert b.numbers == [0, 1]
    assert rig.helper.call("counters", site="a")[0]["ports"][0]["blocked"] == 3


def test_same_seed_same_losses(helper_binary: Path, socket_dir: Path) -> None:
    def survivors(name: str, seed: int) -> Sequence[int]:
        directory = socket_dir / name
        directory.mkdir()
        with run_rig(helper_binary, directory, "--seed", str(seed)) as helper:
            rig = Rig(helper)
            rig.send("b", NOBODY, 1)
            helper.call("path", a="a", b="b", loss_ppm=500_000)
            with Listener(rig, "b") as b:
                rig.send("a", MACS["b"], 100)
            assert len(b.numbers) + rig.counters("a", "b")["lost"] == 100
            return b.numbers

    first = survivors("1", 7)
    assert 20 < len(first) < 80
    assert first == survivors("2", 7)
    assert first != survivors("3", 8)


def test_refusals_and_end(rig: Rig) -> None:
    for op, arguments, code in (
        ("attach", {"site": "a", "interface": "none"}, "not-found"),
        ("attach", {"site": "a", "interface": "a1"}, "exists"),
        ("detach", {"interface": "none"}, "not-found"),
        ("path", {"a": "a", "b": "a"}, "bad-argument"),
        ("path", {"a": "a", "b": "b", "loss_ppm": 1_000_001}, "bad-argument"),
        ("path", {"a": "a", "b": "b", "colour": 1}, "bad-argument"),
        ("site", {"site": "a", "block": ["everything"]}, "bad-argument"),
        ("counters", {"site": "nowhere"}, "not-found"),
    ):
        with pytest.raises(HelperFailure) as refusal:
            rig.helper.call(op, **arguments)
        assert refusal.value.code == code, (op, arguments)
    rig.helper.call("detach", interface="a1")
    rig.helper.call("attach", site="a", interface="a1")
    rig.helper.close()
    assert rig.helper.process.wait(20) == 0, "it ends when its controller is gone"
