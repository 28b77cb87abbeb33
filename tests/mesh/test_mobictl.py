# SPDX-License-Identifier: Apache-2.0
"""`mobictl` as a person uses it: real processes, real peers, its output and exit codes read back."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli import ROOT, TIMEOUT, Cli, clean, home
from tests.waiting import wait_for


@pytest.fixture
def cli() -> Iterator[Cli]:
    made = Cli(home())
    yield made
    clean(made)


@pytest.fixture(scope="module")
def mesh() -> Iterator[Cli]:
    """Two peers that the tests of this module share; none of them ends or changes them."""
    made = Cli(home())
    try:
        made("up", "--peers", "2")
        yield made
    finally:
        clean(made)


def test_up_tells_what_it_did_and_a_second_one_is_refused(mesh: Cli) -> None:
    rows = mesh.json("peer", "ls")
    assert [(row["name"], row["state"]) for row in rows] == [("peer1", "alive"), ("peer2", "alive")]
    assert {row["voter"] for row in rows} == {True, False}
    error = mesh.error("up")
    assert error["code"] == "exists"
    assert "peer1, peer2" in error["message"]


def test_status_is_readable_and_names_the_peers(mesh: Cli) -> None:
    text = mesh("status").stdout
    assert "peer1" in text
    assert "peer2" in text
    assert "\x1b" not in text, "no colours in a pipe"
    assert mesh.json("status")["name"] == "peer1"


def test_options_stand_before_or_behind_the_command_or_in_the_environment(mesh: Cli) -> None:
    before = json.loads(mesh("--json", "--peer", "peer2", "status").stdout)
    behind = mesh.json("status", "--peer", "peer2")
    mesh.extra["MOBI_PEER"] = "peer2"
    try:
        environment = mesh.json("status")
    finally:
        del mesh.extra["MOBI_PEER"]
    assert before["name"] == behind["name"] == environment["name"] == "peer2"


def test_who_drains_is_shown(mesh: Cli) -> None:
    assert [row["draining"] for row in mesh.json("peer", "ls")] == [False, False]
    try:
        mesh("peer", "drain", "peer2")
        assert {row["name"]: row["draining"] for row in mesh.json("peer", "ls")} == {
            "peer1": False,
            "peer2": True,
        }
        heading, *lines = mesh("peer", "ls").stdout.splitlines()
        place = heading.index("DRAINING")
        assert [line[place : place + 3].strip() for line in lines] == ["", "yes"]
    finally:
        mesh("peer", "drain", "peer2", "--undo")


def test_quiet_says_nothing(mesh: Cli) -> None:
    done = mesh("peer", "ls", "--quiet")
    assert (done.stdout, done.stderr) == ("", "")


def test_leader_ping_and_events(mesh: Cli) -> None:
    assert mesh.json("leader")["leader"] == "peer1"
    assert mesh.json("peer", "ping", "peer2")["rtt_ms"] > 0
    kinds = {event["kind"] for event in mesh.json("events", "--since", "1h")}
    assert {"mesh.founded", "peer.started"} <= kinds


def test_events_follow_is_ndjson_until_ctrl_c(mesh: Cli) -> None:
    running = mesh.start("events", "--follow", "--json")
    assert running.stdout is not None
    first = json.loads(running.stdout.readline())
    assert {"time", "peer", "kind"} <= first.keys()
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=TIMEOUT)
    assert running.returncode == 0, errors


def test_unknown_names_get_words_and_code_1(mesh: Cli) -> None:
    assert mesh.error("peer", "show", "peer9") == {
        "code": "not-found",
        "message": "there is no peer 'peer9'",
        "hint": "there are: peer1, peer2",
    }
    done = mesh("peer", "show", "peer9", code=1)
    assert done.stdout == ""
    assert done.stderr == "mobictl: there is no peer 'peer9'\n  there are: peer1, peer2\n"


def test_login_with_a_token_opens_tcp(mesh: Cli) -> None:
    address = mesh.json("peer", "ls")[1]["address"]
    assert mesh.error("peer", "ls", "--peer", address)["code"] == "unauthenticated"
    token = mesh("peer", "token", "new", "--role", "viewer", "--ttl", "10m", "--quiet").stdout.strip()
    found = mesh.json("login", token)
    assert found["role"] == "viewer"
    rows = mesh.json("peer", "ls", "--peer", address)
    assert [row["name"] for row in rows] == ["peer1", "peer2"]
    assert mesh.error("peer", "token", "new", "--peer", address)["code"] == "forbidden"
    assert mesh.error("login", token[:-4])["code"] == "bad-argument"


def test_spent_revoked_and_forged_tokens_are_refused(mesh: Cli) -> None:
    peer_token = mesh.json("peer", "token", "new")
    assert "not a user" in mesh.error("login", peer_token["token"])["message"]
    user_token = mesh.json("peer", "token", "new", "--role", "operator")
    assert mesh.json("peer", "token", "revoke", user_token["id"])["state"] == "revoked"
    mesh.extra["XDG_CONFIG_HOME"] = str(mesh.home / "other")
    try:
        assert mesh.error("login", user_token["token"])["code"] in (
            "unauthenticated",
            "forbidden",
            "conflict",
        )
        assert mesh.error("login", "mobi1-forged")["code"] == "bad-argument"
    finally:
        del mesh.extra["XDG_CONFIG_HOME"]


def test_lab_files_are_checked_without_a_peer(cli: Cli, tmp_path: Path) -> None:
    good = ROOT / "deploy/examples/unified-file-server.yaml"
    assert cli.json("lab", "validate", str(good))["guests"] == 3
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("name: t\ntopology:\n  nodes:\n    a: {image: mini, memroy: 1}\n")
    error = cli.error("lab", "up", str(wrong))
    assert error["problems"] == [
        {
            "line": 4,
            "column": 22,
            "path": "topology.nodes.a.memroy",
            "message": "unknown key 'memroy'; did you mean 'memory'?",
        }
    ]
    done = cli("lab", "validate", str(wrong), code=1)
    assert f"{wrong}:4:22: unknown key 'memroy'; did you mean 'memory'?\n" in done.stderr
    assert "     4 |     a: {image: mini, memroy: 1}\n       |                      ^\n" in done.stderr


@pytest.mark.parametrize(("form", "start"), [("dot", "graph "), ("mermaid", "graph LR"), ("svg", "<svg ")])
def test_graph_of_a_file(cli: Cli, form: str, start: str) -> None:
    example = str(ROOT / "deploy/examples/unified-file-server.yaml")
    text = cli("lab", "graph", example, "--format", form).stdout
    assert text.startswith(start)
    assert all(name in text for name in ("content", "protocol", "client", "10.9.2.0/24"))


def test_schema_command_prints_what_is_published(cli: Cli) -> None:
    printed = cli("lab", "schema").stdout
    assert printed == (ROOT / "deploy/lab.schema.json").read_text()


def test_a_wrong_name_and_image_are_said_in_words(mesh: Cli, tmp_path: Path) -> None:
    error = mesh.error("vm", "run", "mini", "--name", "a/B")
    assert "'a/B' is no name" in error["message"]
    file = tmp_path / "lab.yaml"
    file.write_text("name: x\ntopology:\n  nodes:\n    a: {image: nowhere}\n")
    error = mesh.error("lab", "up", str(file))
    assert "there is no image 'nowhere'" in error["message"]
    assert "builds it" in error["message"], "the mend stands with the mistake"
    assert error["problems"][0]["line"] == 4


def test_listen_moves_a_peer_whose_port_was_taken(cli: Cli) -> None:
    with socket.socket() as other, socket.socket() as probe:
        address = cli.json("up")["peers"][0]["address"]
        cli("down")
        other.bind(("127.0.0.1", int(address.rpartition(":")[2])))
        other.listen()
        error = cli.error("up")
        assert "is in use by another program (choose another with --listen)" in error["message"]
        probe.bind(("127.0.0.1", 0))
        free = f"127.0.0.1:{probe.getsockname()[1]}"
        probe.close()
        assert cli.json("up", "--listen", free)["peers"][0]["address"] == free
        assert cli.json("status")["address"] == free


def test_listen_is_refused_for_several_known_peers(mesh: Cli) -> None:
    error = mesh.error("up", "--listen", "127.0.0.1:1234")
    assert "peer1, peer2; --listen is for a single peer" in error["message"]


def test_kill_9_then_down_then_up_again(cli: Cli) -> None:
    made = cli.json("up", "--peers", "2")
    os.kill(made["peers"][1]["pid"], signal.SIGKILL)
    assert cli.json("down")["ended"] == ["peer1"]
    assert cli.processes() == []
    again = cli.json("up")
    assert [peer["name"] for peer in again["peers"]] == ["peer1", "peer2"]
    assert len(cli.json("peer", "ls")) == 2
    assert sorted(cli.json("down")["ended"]) == ["peer1", "peer2"]
    assert cli.json("down")["ended"] == []


def test_up_brings_a_killed_peer_back_and_leaves_the_others(cli: Cli) -> None:
    before = {peer["name"]: peer for peer in cli.json("up", "--peers", "2")["peers"]}
    os.kill(before["peer2"]["pid"], signal.SIGKILL)
    after = {peer["name"]: peer for peer in cli.json("up")["peers"]}
    assert after["peer1"] == before["peer1"]
    assert after["peer2"]["pid"] not in (0, before["peer2"]["pid"])
    wait_for(lambda: [row["state"] for row in cli.json("peer", "ls")] == ["alive", "alive"])
    os.kill(after["peer2"]["pid"], signal.SIGKILL)
    (cli.dir / "peer2" / "format").write_text("99\n")
    assert "peer2 ended while starting" in cli.error("up")["message"]
    assert cli.json("status")["name"] == "peer1", "who ran goes on"
    assert cli.json("down")["ended"] == ["peer1"]


def test_up_leaves_out_who_was_evicted_also_while_it_was_away(cli: Cli) -> None:
    made = {peer["name"]: peer for peer in cli.json("up", "--peers", "3")["peers"]}
    os.kill(made["peer3"]["pid"], signal.SIGKILL)
    cli("peer", "evict", "peer3")
    said = cli("up").stderr
    assert "peer3: left out" in said
    assert [peer["name"] for peer in json.loads((cli.dir / "up.json").read_text())["peers"]] == [
        "peer1",
        "peer2",
    ]
    rows = {row["name"]: row["state"] for row in cli.json("peer", "ls")}
    assert rows == {"peer1": "alive", "peer2": "alive", "peer3": "left"}


def test_the_token_of_up_is_written_nowhere(cli: Cli) -> None:
    cli("up", "--peers", "2")
    arguments = "".join(cli.processes())
    assert "mobi1-" not in arguments
    written = [path for path in cli.home.rglob("*") if path.is_file() and b"mobi1-" in path.read_bytes()]
    assert written == []


def test_down_ends_helpers_whose_peer_was_killed(cli: Cli, helper_binary: Path) -> None:
    made = cli.json("up")
    runtime = Path(made["peers"][0]["socket"]).parent
    helper = subprocess.Popen(
        [str(helper_binary), "switch", "--control", str(runtime / "left.ctl")], start_new_session=True
    )
    try:
        deadline = time.monotonic() + 30
        while not (runtime / "left.ctl").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(made["peers"][0]["pid"], signal.SIGKILL)
        cli("down")
        assert helper.wait(10) == 0, "it was asked to quit, not killed"
    finally:
        helper.kill()
        helper.wait()


@pytest.mark.parametrize("step", ["at once", "first peer", "second peer", "joined"])
def test_ctrl_c_during_up_leaves_nothing(cli: Cli, step: str) -> None:
    running = cli.start("up", "--peers", "2")
    wanted = {
        "at once": None,
        "first peer": "peer1: running",
        "second peer": "peer2: running",
        "joined": "joined",
    }
    try:
        if wanted[step] is None:
            deadline = time.monotonic() + 30
            while not (cli.dir / "up.json").exists():
                assert time.monotonic() < deadline
                time.sleep(0.005)
        else:
            assert running.stderr is not None
            while str(wanted[step]) not in running.stderr.readline():
                assert running.poll() is None
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=TIMEOUT)
    finally:
        running.kill()
        running.wait()
    assert running.returncode == 130, errors
    assert "Traceback" not in errors
    assert cli.processes() == []
    assert not (cli.dir / "up.json").exists()
    if step == "joined":
        again = cli.json("up", "--peers", "2")
        assert [peer["name"] for peer in again["peers"]] == ["peer1", "peer2"]


def test_a_peer_that_cannot_start_says_why_and_leaves_nothing(cli: Cli) -> None:
    cli.dir.mkdir(parents=True)
    (cli.dir / "peer2").mkdir()
    (cli.dir / "peer2" / "something").write_text("else")
    error = cli.error("up", "--peers", "2")
    assert "peer2 ended while starting" in error["message"]
    assert "is neither empty nor a peer's directory" in error["message"]
    assert cli.processes() == []
