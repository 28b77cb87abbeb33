# SPDX-License-Identifier: Apache-2.0
"""Long commands of `mobictl` on real guests, whose asked peer is killed half-way: another one goes on."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mobid.config import cache_directory
from tests.built import missing
from tests.cli import TIMEOUT, Cli, clean, home
from tests.waiting import wait_for

pytestmark = [
    pytest.mark.guest,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]

LAB = """
name: pair
topology:
  defaults: {image: mini, memory: 64M}
  nodes:
    a: {place: peer1, exec: ["sleep 2"]}
    b: {place: peer3}
  links:
    - {endpoints: ["a:eth1", "b:eth1"], subnet: 10.8.0.0/24}
"""


@pytest.fixture
def cli(helper_binary: Path) -> Iterator[Cli]:
    """Three peers, all of them voters."""
    kernel = os.environ.get("MOBI_KERNEL")
    extra = {"MOBI_HELPER": str(helper_binary), "XDG_CACHE_HOME": str(cache_directory().parent)}
    made = Cli(home(), {**extra, **({"MOBI_KERNEL": kernel} if kernel else {})})
    try:
        made("up", "--peers", "3")
        wait_for(lambda: len(made.json("leader")["voters"]) == 3)
        yield made
    finally:
        clean(made)


def kill(cli: Cli, name: str) -> None:
    os.kill(int((cli.dir / name / "mobid.pid").read_text()), signal.SIGKILL)


def test_a_lab_comes_up_although_the_asked_peer_is_killed(cli: Cli) -> None:
    file = cli.home / "pair.yaml"
    file.write_text(LAB)
    making = cli.start("lab", "up", str(file), "--peer", "peer2")
    assert making.stderr is not None
    said = ""
    while "a: " not in said:
        line = making.stderr.readline()
        assert line, making.communicate(timeout=TIMEOUT)
        said += line
    kill(cli, "peer2")
    out, errors = making.communicate(timeout=TIMEOUT)
    assert making.returncode == 0, said + errors
    assert "another peer is asked" in errors
    assert out.startswith("pair is up")
    lines = [line for line in (said + errors).splitlines() if line.startswith(("a: ", "b: "))]
    assert len(lines) == len(set(lines)), "a step was told twice"
    rows = cli.json("vm", "ls")
    assert {(row["vm"], row["state"], row["epoch"]) for row in rows} == {
        ("a", "running", 1),
        ("b", "running", 1),
    }


def read_until(process: subprocess.Popen[str], words: str) -> str:
    """What it prints, up to a line with these words."""
    assert process.stdout is not None
    said = ""
    while words not in said:
        line = process.stdout.readline()
        assert line, process.communicate(timeout=TIMEOUT)
        said += line
    return said


def test_a_console_log_is_followed_on_without_repeating_or_losing_a_byte(cli: Cli) -> None:
    cli("vm", "run", "mini", "--name", "one", "--place", "peer1")
    cli("vm", "exec", "one", "--", "sh", "-c", "echo first mark > /dev/console")
    logs = cli.start("vm", "logs", "one", "--follow", "--peer", "peer2")
    said = read_until(logs, "first mark")
    kill(cli, "peer2")
    cli("vm", "exec", "one", "--", "sh", "-c", "echo second mark > /dev/console")
    said += read_until(logs, "second mark")
    logs.send_signal(signal.SIGINT)
    said += logs.communicate(timeout=TIMEOUT)[0]
    whole = cli("vm", "logs", "one").stdout
    assert whole.startswith(said)
    assert said.count("first mark") == said.count("second mark") == 1
