# SPDX-License-Identifier: Apache-2.0
"""`mobictl vm` with real guests: bytes in and out, exit codes, the console's keys, and a move."""

from __future__ import annotations

import hashlib
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mobictl.helpers import alive
from mobid.config import cache_directory
from tests.built import missing
from tests.cli import ROOT, TIMEOUT, Cli, clean, home

pytestmark = [pytest.mark.guest, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def cli(helper_binary: Path) -> Iterator[Cli]:
    """Two peers, and one guest `one` that the tests of this module share."""
    cache = cache_directory()
    kernel = os.environ.get("MOBI_KERNEL")
    if gone := missing():
        pytest.skip(gone)
    extra = {"MOBI_HELPER": str(helper_binary), "XDG_CACHE_HOME": str(cache.parent)}
    made = Cli(home(), {**extra, **({"MOBI_KERNEL": kernel} if kernel else {})})
    try:
        made("up", "--peers", "2")
        made("vm", "run", "mini", "--name", "one", "--place", "peer1")
        yield made
    finally:
        clean(made)


def test_exec_passes_streams_and_exit_code(cli: Cli) -> None:
    done = cli("vm", "exec", "one", "--", "sh", "-c", "echo out; echo err >&2; exit 7", code=7)
    assert (done.stdout, done.stderr) == ("out\n", "err\n")
    assert cli("vm", "exec", "one", "--", "cat", input="hello").stdout == "hello"
    ended = cli.json("vm", "exec", "one", "--", "sh", "-c", "kill -9 $$", code=137)
    assert ended == {"code": 137, "signal": 9, "stdout": "", "stderr": ""}
    assert cli(
        "vm", "exec", "one", "-e", "A=b c", "--cwd", "/tmp", "--", "sh", "-c", 'echo "$A"; pwd'
    ).stdout == ("b c\n/tmp\n")


def test_exec_of_what_is_not_there(cli: Cli) -> None:
    assert "cannot run nonsense" in cli.error("vm", "exec", "one", "--", "nonsense")["message"]
    assert cli.error("vm", "exec", "two", "--", "true")["hint"] == "there are: default/one"
    done = cli("vm", "exec", "one", "-e", "A", "--", "true", code=2)
    assert "'A' is not NAME=VALUE" in done.stderr


def test_exec_is_cancelled_by_ctrl_c(cli: Cli) -> None:
    running = cli.start("vm", "exec", "one", "--", "sh", "-c", "echo begun; exec sleep 1000")
    assert running.stdout is not None
    assert running.stdout.readline() == "begun\n"
    running.send_signal(2)
    running.communicate(timeout=TIMEOUT)
    assert running.returncode == 130
    deadline = time.monotonic() + 30
    while "sleep 1000" in cli("vm", "exec", "one", "--", "ps").stdout:
        assert time.monotonic() < deadline


def test_copy_in_and_out(cli: Cli, tmp_path: Path) -> None:
    data = os.urandom(1_000_000)
    (tmp_path / "in").write_bytes(data)
    (tmp_path / "in").chmod(0o750)
    assert cli.json("vm", "cp", str(tmp_path / "in"), "one:/root/")["size"] == len(data)
    seen = cli("vm", "exec", "one", "--", "sha256sum", "/root/in").stdout.split()[0]
    assert seen == hashlib.sha256(data).hexdigest()
    cli("vm", "cp", "default/one:/root/in", str(tmp_path / "out"))
    assert (tmp_path / "out").read_bytes() == data
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert "cannot open /nope" in cli.error("vm", "cp", "one:/nope", str(tmp_path))["message"]
    assert "cannot be read" in cli.error("vm", "cp", "/nope", "one:/root/")["message"]
    assert "only one" in cli.error("vm", "cp", "one:/a", "one:/b")["message"]
    assert "begins with /" in cli.error("vm", "cp", "one:a", "here")["message"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_life_of_a_guest(cli: Cli) -> None:
    row = cli.json("vm", "run", "mini", "--memory", "48M")
    assert (row["vm"], row["state"], row["memory"]) == ("mini-1", "running", 48 << 20)
    assert cli.json("vm", "pause", "mini-1")["state"] == "paused"
    assert "vm resume" in cli.error("vm", "exec", "mini-1", "--", "true")["hint"]
    assert cli.json("vm", "resume", "mini-1")["state"] == "running"
    assert "--force" in cli.error("vm", "rm", "mini-1")["hint"]
    assert cli.json("vm", "stop", "mini-1")["state"] == "stopped"
    assert cli.json("vm", "start", "mini-1")["state"] == "running"
    assert cli.json("vm", "restart", "mini-1", "--force")["state"] == "running"
    cli("vm", "rm", "mini-1", "--force")
    assert [row["vm"] for row in cli.json("vm", "ls")] == ["one"]
    assert cli.error("vm", "run", "minni")["code"] == "not-found"


def test_tables_and_pages_for_people(cli: Cli) -> None:
    lines = cli("vm", "ls").stdout.splitlines()
    assert lines[0].split() == ["VM", "STATE", "PEER", "EPOCH", "MEMORY", "ADDRESSES", "UPTIME"]
    assert lines[1].split()[:2] == ["one", "running"]
    assert "image           mini@" in cli("vm", "show", "one").stdout
    assert cli("image", "ls").stdout.split()[:3] == ["IMAGE", "SIZE", "HASH"]


def test_console_gives_keys_until_its_escape_and_mends_the_terminal(cli: Cli) -> None:
    outer, inner = pty.openpty()
    try:
        before = termios.tcgetattr(inner)
        running = subprocess.Popen(
            [sys.executable, "-m", "mobictl", "vm", "console", "one"],
            env=cli.environment(),
            stdin=inner,
            stdout=inner,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        seen = b""
        deadline = time.monotonic() + 60
        while b"there" not in seen:
            assert time.monotonic() < deadline, seen
            if termios.tcgetattr(inner)[3] & termios.ICANON == 0:
                os.write(outer, b"there\r")
                seen += os.read(outer, 1000)
            time.sleep(0.1)
        os.write(outer, b"\x1d")
        assert running.wait(TIMEOUT) == 0
        assert termios.tcgetattr(inner) == before
    finally:
        os.close(outer)
        os.close(inner)


def test_migrate_tells_the_passes_and_the_record(cli: Cli) -> None:
    boot = cli("vm", "exec", "one", "--", "cat", "/proc/sys/kernel/random/boot_id").stdout
    source = cli.json("vm", "show", "one")["peer"]
    to = "peer2" if source == "peer1" else "peer1"
    record = cli.json("vm", "migrate", "one", "--to", to, "--bandwidth", "500MB/s")
    assert (record["from"], record["to"], record["ok"]) == (source, to, True)
    assert len(record["passes"]) >= 2
    assert record["downtime_ms"]["host"] > 0
    back = cli("vm", "migrate", "one", "--to", source)
    assert f"one: {to} → {source} moved in" in back.stdout
    assert "pass 1: " in back.stderr
    assert cli("vm", "exec", "one", "--", "cat", "/proc/sys/kernel/random/boot_id").stdout == boot
    assert f"is at {source} already" in cli.error("vm", "migrate", "one", "--to", source)["message"]
    assert cli.error("vm", "migrate", "one", "--to", "peer3")["code"] == "not-found"


def test_migrate_in_the_background_returns_at_once_and_goes_on(cli: Cli) -> None:
    (row,) = [row for row in cli.json("vm", "ls") if row["vm"] == "one"]
    to = "peer1" if row["peer"] == "peer2" else "peer2"
    assert "is at" in cli.error("vm", "migrate", "one", "--to", row["peer"], "--background")["message"]
    begun = cli.json("vm", "migrate", "one", "--to", to, "--background", "--bandwidth", "4MB/s")
    assert begun == {"vm": "one", "to": to, "background": True}
    deadline = time.monotonic() + 60
    while (now := cli.json("vm", "show", "one"))["peer"] != to or now["state"] != "running":
        assert time.monotonic() < deadline, now
    assert now["epoch"] == row["epoch"] + 1


def test_a_lab_from_its_file_to_its_end(cli: Cli, tmp_path: Path) -> None:
    file = str(ROOT / "deploy/examples/two-guests.yaml")
    plan = cli.json("lab", "plan", file)
    assert [guest["vm"] for guest in plan["guests"]] == ["a", "b"]
    assert cli.json("lab", "ls") == []

    up = cli("lab", "up", file)
    assert "a: running\n" in up.stderr
    assert "two-guests is up" in up.stdout
    pinged = cli("vm", "exec", "a", "--", "ping", "-c", "2", "-W", "5", "b").stdout
    assert "2 packets received" in pinged
    assert "10.8.0.2" in pinged
    assert cli.json("net", "ls")[0]["delay"] == 0.01
    assert cli.json("net", "impair", "a-eth1--b-eth1", "--delay", "40ms", "--loss", "0%")["delay"] == 0.04
    assert cli("lab", "graph", "two-guests", "--format", "svg").stdout.count("<rect") == 3

    assert cli.error("lab", "up", file)["code"] == "exists"
    elsewhere = tmp_path / "elsewhere.yaml"
    elsewhere.write_text(
        Path(file)
        .read_text()
        .replace("name: two-guests", "name: other")
        .replace("a: {}", "a: {place: pear1}")
    )
    problem = cli.error("lab", "up", str(elsewhere))["problems"][0]
    assert problem["message"] == "'a' is placed at 'pear1', which is no peer here; did you mean 'peer1'?"
    assert (problem["line"], problem["column"]) == (13, 16)
    assert [lab["lab"] for lab in cli.json("lab", "ls")] == ["two-guests"]

    cli("lab", "down", "two-guests")
    assert cli.json("net", "ls") == []
    assert cli.error("lab", "down", "two-guests")["code"] == "not-found"


def descendants(pid: int) -> set[int]:
    """All processes below one, by the parents that /proc tells."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found: set[int] = set()
    pending = [pid]
    while pending:
        children = parents.get(pending.pop(), [])
        found.update(children)
        pending += children
    return found


def test_down_after_kill_9_of_every_peer_ends_their_guests(cli: Cli) -> None:
    other = Cli(home(), cli.extra)
    try:
        made = other.json("up", "--peers", "2")["peers"]
        for peer in made:
            other("vm", "run", "mini", "--place", peer["name"])
        below = set().union(*(descendants(peer["pid"]) for peer in made))
        assert len(below) >= 8, "shim, kernel, disk and switch of each"
        for peer in made:
            os.kill(peer["pid"], signal.SIGKILL)
        assert "without a peer ended" in other("down").stderr
        assert not [pid for pid in below if alive(pid)]
    finally:
        clean(other)
