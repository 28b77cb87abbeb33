# SPDX-License-Identifier: Apache-2.0
"""`mobictl up --wan` and `mobictl wan`: peers in network namespaces, and the paths between them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli import ROOT, Cli, clean, home
from tests.waiting import wait_for

WAN = str(ROOT / "deploy/examples/wan.yaml")


@pytest.fixture
def cli(helper_binary: Path) -> Iterator[Cli]:
    if (
        shutil.which("ip") is None
        or subprocess.run(["unshare", "-Urn", "true"], capture_output=True).returncode
    ):
        pytest.skip("this machine has no ip program or no user namespaces (mobictl doctor says more)")
    made = Cli(home(), {"MOBI_HELPER": str(helper_binary)})
    yield made
    clean(made)


def test_peers_of_a_wan_feel_its_paths_and_their_cuts(cli: Cli) -> None:
    made = cli.json("up", "--wan", WAN)
    assert [peer["name"] for peer in made["peers"]] == ["tokyo", "virginia", "amsterdam"]
    assert {row["site"] for row in cli.json("peer", "ls")} == {"tokyo", "virginia", "amsterdam"}
    assert cli.json("peer", "ping", "virginia")["rtt_ms"] >= 160
    shown = {frozenset((path["a"], path["b"])): path for path in cli.json("wan", "show")["paths"]}
    assert shown[frozenset(("tokyo", "amsterdam"))]["rate"] == 12_500_000

    assert cli.json("wan", "set", "tokyo", "virginia", "--rtt", "40ms")["rtt"] == 0.04
    assert 40 <= cli.json("peer", "ping", "virginia")["rtt_ms"] < 160
    error = cli.error("wan", "cut", "tokyo", "virgina")
    assert (error["code"], error["hint"]) == ("not-found", "did you mean virginia?")

    for other in ("tokyo", "amsterdam"):  # a peer that any other reaches is alive to all
        cli("wan", "cut", other, "virginia")
    wait_for(lambda: {r["name"]: r["state"] for r in cli.json("peer", "ls")}["virginia"] == "dead")
    cli("wan", "heal")
    wait_for(lambda: {r["name"]: r["state"] for r in cli.json("peer", "ls")}["virginia"] == "alive")

    cli("down")
    assert cli.processes() == []


def test_down_after_kill_9_of_the_nest_and_a_peer(cli: Cli) -> None:
    made = cli.json("up", "--wan", WAN, "--peers", "2")
    os.kill(int((cli.dir / "wan/mobid.pid").read_text()), signal.SIGKILL)
    os.kill(made["peers"][1]["pid"], signal.SIGKILL)
    cli("down")
    assert cli.processes() == []


def test_a_wrong_wan_file_is_told_with_its_place(cli: Cli, tmp_path: Path) -> None:
    wrong = tmp_path / "wan.yaml"
    wrong.write_text("sites: {a: {}, b: {}}\npaths:\n  - {between: [a, c], rtt: 10}\n")
    problems = cli.error("up", "--wan", str(wrong))["problems"]
    assert [(p["line"], p["column"], p["message"]) for p in problems] == [
        (3, 28, "10 needs a unit; write for example 10ms or 10s")
    ]
    wrong.write_text("sites: {a: {}, b: {nat: cone}}\npaths: []\n")
    assert cli.error("up", "--wan", str(wrong))["problems"][0]["message"] == "'nat' is not supported yet"
    assert "3 peers are wanted" in cli.error("up", "--wan", WAN, "--peers", "4")["message"].replace("4", "3")
    assert cli.processes() == []
