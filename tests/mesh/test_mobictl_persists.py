# SPDX-License-Identifier: Apache-2.0
"""`mobictl` and peers that die half-way: it goes on with another one, once, and repeats nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cli import TIMEOUT, Cli, clean, home
from tests.waiting import wait_for


@pytest.fixture
def mesh() -> Iterator[Cli]:
    """Three peers of one mesh on this machine; peer1 founded it."""
    cli = Cli(home())
    try:
        cli("up", "--peers", "3", "--quiet")
        yield cli
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
        stopped.clear()
        clean(cli)


stopped: list[int] = []


def pid(cli: Cli, name: str) -> int:
    return int((cli.dir / name / "mobid.pid").read_text())


def stop(cli: Cli, name: str) -> None:
    os.kill(pid(cli, name), signal.SIGSTOP)
    stopped.append(pid(cli, name))


class Events:
    """A running `mobictl events --follow`, read line by line."""

    def __init__(self, cli: Cli, *arguments: str) -> None:
        self._process = cli.start("events", "--follow", "--json", "--since", "1h", *arguments)
        self.seen: list[tuple[str, int]] = []

    def until(self, kind: str, **facts: Any) -> None:
        assert self._process.stdout is not None
        while True:
            line = self._process.stdout.readline()
            assert line, self._process.communicate(timeout=TIMEOUT)[1]
            event = json.loads(line)
            self.seen.append((event["peer_id"], event["stamp"]))
            if event["kind"] == kind and facts.items() <= event.items():
                return

    def end(self) -> str:
        """Ctrl-C; what was said on standard error."""
        self._process.send_signal(signal.SIGINT)
        _, errors = self._process.communicate(timeout=TIMEOUT)
        assert self._process.returncode == 0, errors
        assert len(self.seen) == len(set(self.seen)), "an event was printed twice"
        return errors


def test_events_go_on_where_they_were_when_the_asked_peer_is_killed(mesh: Cli) -> None:
    events = Events(mesh, "--peer", "peer2")
    first = mesh.json("peer", "token", "new")["id"]
    events.until("token.made", token=first)
    os.kill(pid(mesh, "peer2"), signal.SIGKILL)
    second = mesh.json("peer", "token", "new")["id"]
    events.until("token.made", token=second)
    third = mesh.json("peer", "token", "new", "--peer", "peer3")["id"]
    events.until("token.made", token=third)
    events.end()


def test_a_peer_that_stands_still_is_left_and_the_command_is_done_once(mesh: Cli) -> None:
    before = len(mesh.json("peer", "token", "ls"))
    stop(mesh, "peer2")
    made = mesh.json("peer", "token", "new", "--peer", "peer2")
    os.kill(stopped.pop(), signal.SIGCONT)
    mesh.json("peer", "ping", "peer2")
    rows = mesh.json("peer", "token", "ls", "--peer", "peer2")
    assert [row["state"] for row in rows if row["id"] == made["id"]] == ["valid"]
    assert len(rows) == before + 1


def test_a_named_peer_that_never_answered_is_an_error_at_once(mesh: Cli) -> None:
    os.kill(pid(mesh, "peer2"), signal.SIGKILL)
    assert mesh.error("vm", "ls", "--peer", "peer2")["code"] == "unreachable"
    assert mesh.json("vm", "ls") == []


def test_over_tcp_the_other_members_are_asked(mesh: Cli) -> None:
    rows = {row["name"]: row["address"] for row in mesh.json("peer", "ls")}
    token = mesh("peer", "token", "new", "--role", "admin", "--quiet").stdout.strip()
    mesh("login", token)
    away = Cli(mesh.home, {"MOBI_DIR": str(mesh.home / "nothing"), "MOBI_PEER": rows["peer2"]})
    doors = mesh.home / "config" / "mobitopolo" / "doors.json"
    doors.unlink()
    assert away.json("status")["name"] == "peer2"
    (known,) = json.loads(doors.read_text())["meshes"].values()
    assert {member["address"] for member in known["members"]} == set(rows.values())
    events = Events(away)
    events.until("user.enrolled")
    os.kill(pid(mesh, "peer2"), signal.SIGKILL)
    made = mesh.json("peer", "token", "new")["id"]
    events.until("token.made", token=made)
    assert "another peer is asked" not in events.end(), "JSON on a pipe is left alone"


def test_what_cannot_be_taken_up_says_so(mesh: Cli) -> None:
    leaving = mesh.start("peer", "leave", "--peer", "peer3", "--json")
    out, _ = leaving.communicate(timeout=TIMEOUT)
    assert leaving.returncode == 0, out
    assert [row["state"] for row in mesh.json("peer", "ls")].count("alive") == 2


def test_when_nobody_is_left_it_says_so_after_a_while(mesh: Cli) -> None:
    events = mesh.start("events", "--follow", "--peer", "peer2")
    assert events.stdout is not None
    events.stdout.readline()
    for name in ("peer1", "peer2", "peer3"):
        os.kill(pid(mesh, name), signal.SIGKILL)
    try:
        _, errors = events.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        events.kill()
        raise
    assert events.returncode == 1
    assert "cannot be reached" in errors
    assert "another peer is asked" in errors


def alone(cli: Cli) -> None:
    """Kill two of the three voters, once they are."""
    wait_for(lambda: len(cli.json("leader")["voters"]) == 3)
    for name in ("peer2", "peer3"):
        os.kill(pid(cli, name), signal.SIGKILL)


def test_without_a_majority_changes_are_refused_and_questions_are_answered(mesh: Cli) -> None:
    alone(mesh)
    error = mesh.error("peer", "token", "new")
    assert error["code"] == "no-majority"
    assert "1 of 3 voters answer; missing: peer2 (silent for " in error["message"]
    for question in (("peer", "ls"), ("vm", "ls"), ("leader",)):
        done = mesh(*question)
        assert "this may be old: no coordinator" in done.stderr
        assert "missing: peer2" in done.stderr
        assert "this may be old" not in done.stdout
    found = mesh.json("leader")
    assert (found["leader"], found["missing"].keys()) == (None, {"peer2", "peer3"})
    page = mesh("leader").stdout
    assert page.split()[:2] == ["leader", "none"]
    assert "silent for" in page


def test_a_command_waits_for_the_mesh_to_have_a_coordinator_again(mesh: Cli) -> None:
    wait_for(lambda: len(mesh.json("leader")["voters"]) == 3)
    for name in ("peer2", "peer3"):
        stop(mesh, name)
    wait_for(lambda: len(mesh.json("leader", "--peer", "peer1")["missing"]) == 2)
    waiting = mesh.start("peer", "token", "new", "--peer", "peer1")
    assert waiting.stderr is not None
    line = waiting.stderr.readline()
    assert "no coordinator yet" in line
    while stopped:
        os.kill(stopped.pop(), signal.SIGCONT)
    out, errors = waiting.communicate(timeout=TIMEOUT)
    assert waiting.returncode == 0, errors
    assert out.startswith("mobi")
    assert len(mesh.json("peer", "token", "ls")) >= 1
