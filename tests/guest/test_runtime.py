# SPDX-License-Identifier: Apache-2.0
"""Real guests of the image `mini` at one real peer: their whole life, and what happens when processes die."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from proto.api import OperationError
from tests.built import missing
from tests.guest.peers import PeerProcess, eventually

pytestmark = [pytest.mark.guest, pytest.mark.timeout(180)]

Row = dict[str, Any]


@pytest.fixture
async def peer(tmp_path: Path, helper_binary: Path) -> AsyncIterator[PeerProcess]:
    if gone := missing():
        pytest.skip(gone)
    process = PeerProcess(tmp_path / "tokyo", environment={"MOBI_HELPER": str(helper_binary)})
    await process.start()
    yield process
    await process.stop()


async def run(peer: PeerProcess, name: str = "one", **arguments: Any) -> Row:
    row: Row = await peer.call("vm.run", {"image": "mini", "name": name, **arguments})
    return row


async def until(peer: PeerProcess, name: str, predicate: Callable[[Row], bool]) -> Row:
    """`vm show` of a guest as soon as it says what the test wants."""

    async def look() -> Row | None:
        row: Row = await peer.call("vm.show", {"vm": name})
        return row if predicate(row) else None

    found: Row = await eventually(look)
    return found


async def events(peer: PeerProcess, kind: str) -> list[Row]:
    found: list[Row] = []
    async with peer.client() as client, client.request("events", {"local": True}) as request:
        async for item in request:
            found += [item] if item["kind"] == kind else []
    return found


async def pids(peer: PeerProcess, name: str) -> dict[str, int]:
    """The processes of a guest: its shim, its kernel, its disk process, told by the helpers themselves."""
    row = await peer.call("vm.show", {"vm": name})
    found = {}
    for key, socket in (("shim", "shim"), ("vda", "vda.c")):
        path = peer.socket.with_name(f"{row['id']}.{socket}")
        found[key] = await owner_of(path)
    return found


async def owner_of(control: Path) -> int:
    """The pid behind a control socket, by asking /proc: connecting would take the place of the peer."""
    inode = next(
        line.split()[6]
        for line in Path("/proc/net/unix").read_text().splitlines()
        if line.endswith(str(control))
    )
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(fd) == f"socket:[{inode}]" for fd in (process / "fd").iterdir()):
                return int(process.name)
        except OSError:
            continue
    raise AssertionError(f"nobody listens on {control}")


async def test_a_guest_runs_programs_and_copies_files(peer: PeerProcess) -> None:
    row = await run(peer)
    assert (row["vm"], row["lab"], row["peer"], row["state"], row["epoch"]) == (
        "one",
        "default",
        "tokyo",
        "running",
        1,
    )
    assert row["cpu_features"]
    code, out, err = await peer.execute(
        "one", "sh", "-c", "cat; echo err >&2; echo $X; exit 7", stdin=b"in\n", env={"X": "y"}
    )
    assert (code, out, err) == (7, b"in\ny\n", b"err\n")
    data = random.Random(1).randbytes(3_000_000)
    assert (await peer.put("one", "/root/data", data, mode=0o640))["size"] == len(data)
    assert await peer.get("one", "/root/data") == (data, {"size": len(data), "mode": 0o640})
    code, out, _ = await peer.execute("one", "md5sum", "/root/data")
    assert code == 0
    with pytest.raises(OperationError, match="/none") as caught:
        await peer.get("one", "/none")
    assert caught.value.code == "not-found"
    with pytest.raises(OperationError, match="no-such-program"):
        await peer.execute("one", "no-such-program")


async def test_large_output_flows_and_a_dropped_request_ends_its_program(peer: PeerProcess) -> None:
    await run(peer)
    code, out, _ = await peer.execute("one", "sh", "-c", "dd if=/dev/zero bs=64k count=40 2>/dev/null")
    assert (code, len(out)) == (0, 40 << 16)
    async with peer.client() as client:
        async with client.request(
            "vm.exec", {"vm": "one", "argv": ["sh", "-c", "echo $$; exec sleep 1000"]}
        ) as request:
            item = await anext(aiter(request))
        pid = item["data"].decode().strip()

        async def gone() -> bool:
            return (await peer.execute("one", "test", "-d", f"/proc/{pid}"))[0] != 0

        await eventually(gone)


async def test_the_console_types_and_the_log_keeps(peer: PeerProcess) -> None:
    await run(peer)
    async with peer.client() as client, client.request("vm.console", {"vm": "one"}) as request:
        await peer.execute("one", "sh", "-c", "echo said-$((40+2)) > /dev/console")
        seen = b""
        async for item in request:
            seen += item["data"]
            if b"said-42" in seen:
                break
    async with peer.client() as client, client.request("vm.logs", {"vm": "one"}) as request:
        log = b"".join([item["data"] async for item in request])
    assert b"said-42" in log


async def test_stop_start_and_restart_keep_the_disk(peer: PeerProcess) -> None:
    await run(peer, disk=16 << 20)
    assert (await peer.execute("one", "sh", "-c", "echo kept > /root/kept && sync && test -b /dev/vdb"))[
        0
    ] == 0
    assert (await peer.call("vm.stop", {"vm": "one"}))["state"] == "stopped"
    show = await peer.call("vm.show", {"vm": "one"})
    assert (show["exit_reason"], show["uptime"]) == ("poweroff", None)
    with pytest.raises(OperationError, match="is stopped") as caught:
        await peer.execute("one", "true")
    assert "vm start" in caught.value.hint
    assert (await peer.call("vm.start", {"vm": "one"}))["state"] == "running"
    assert await peer.execute("one", "cat", "/root/kept") == (0, b"kept\n", b"")
    assert (await peer.call("vm.restart", {"vm": "one", "force": True}))["state"] == "running"
    assert await peer.execute("one", "cat", "/root/kept") == (0, b"kept\n", b"")


async def test_pause_and_resume(peer: PeerProcess) -> None:
    await run(peer)
    assert (await peer.call("vm.pause", {"vm": "one"}))["state"] == "paused"
    with pytest.raises(OperationError, match="is paused"):
        await peer.execute("one", "true")
    await trio.sleep(1)
    assert (await peer.call("vm.resume", {"vm": "one"}))["state"] == "running"
    assert (await peer.execute("one", "true"))[0] == 0
    await peer.call("vm.pause", {"vm": "one"})
    assert (await peer.call("vm.stop", {"vm": "one"}))["state"] == "stopped"


async def test_a_peer_that_was_killed_takes_its_guests_back(peer: PeerProcess) -> None:
    await run(peer)
    await run(peer, "two")
    await peer.call("vm.pause", {"vm": "two"})
    await peer.execute("one", "sh", "-c", "echo 5 > /run/alive")
    before = await pids(peer, "one")
    peer.kill()
    await peer.start()
    assert await pids(peer, "one") == before
    assert await peer.execute("one", "cat", "/run/alive") == (0, b"5\n", b"")
    assert (await peer.call("vm.show", {"vm": "two"}))["state"] == "paused"
    assert (await peer.call("vm.resume", {"vm": "two"}))["state"] == "running"
    assert (await peer.execute("two", "true"))[0] == 0


async def test_a_guest_that_died_while_the_peer_was_away_is_started_again(peer: PeerProcess) -> None:
    await run(peer)
    await peer.execute("one", "sh", "-c", "echo kept > /root/kept && sync")
    before = await pids(peer, "one")
    peer.kill()
    for pid in before.values():
        os.kill(pid, signal.SIGKILL)
    await peer.start()
    await until(peer, "one", lambda row: row["restarts"] == 1 and row["state"] == "running")
    assert await peer.execute("one", "cat", "/root/kept") == (0, b"kept\n", b"")


async def test_guests_end_with_their_peer_and_start_with_it(peer: PeerProcess) -> None:
    await run(peer)
    await peer.execute("one", "sh", "-c", "echo kept > /root/kept")
    before = await pids(peer, "one")
    await peer.stop()
    assert not [pid for pid in before.values() if Path(f"/proc/{pid}").exists()]
    await peer.start()
    row = await until(peer, "one", lambda row: row["state"] == "running" and row["uptime"] < 60)
    assert await peer.execute("one", "cat", "/root/kept") == (0, b"kept\n", b"")
    assert row["restarts"] == 0


@pytest.mark.parametrize(
    ("command", "reason", "state"),
    [
        ("poweroff -f", "poweroff", "stopped"),
        ("echo 2 > /proc/sys/vm/panic_on_oom; tail /dev/zero", "panic", "running"),
        ("reboot -f", "reboot", "running"),
    ],
)
async def test_an_end_from_inside_is_told_and_judged(
    peer: PeerProcess, command: str, reason: str, state: str
) -> None:
    """A poweroff is meant; after a panic or a reboot the guest is started again."""
    await run(peer)
    started = (await peer.call("vm.show", {"vm": "one"}))["started"]
    with pytest.raises(OperationError):
        await peer.execute("one", "sh", "-c", f"{command}; sleep 100")
    row = await until(
        peer,
        "one",
        lambda row: (row["state"] == state and row["started"] != started) or row["state"] == "stopped",
    )
    assert row["state"] == state
    if state == "stopped":
        assert (await peer.call("vm.start", {"vm": "one"}))["state"] == "running"
    assert [event["reason"] for event in await events(peer, "guest.exited")] == [reason]
    if state == "running":
        assert row["restarts"] == 1
        assert (await peer.execute("one", "true"))[0] == 0


async def test_a_killed_shim_is_a_crash_and_the_guest_starts_again(peer: PeerProcess) -> None:
    await run(peer)
    before = await pids(peer, "one")
    os.kill(before["shim"], signal.SIGKILL)
    row = await until(peer, "one", lambda row: row["restarts"] == 1 and row["state"] == "running")
    assert (await peer.execute("one", "true"))[0] == 0
    assert (await pids(peer, row["vm"]))["shim"] != before["shim"]


async def test_a_killed_disk_process_is_replaced_under_the_guest(peer: PeerProcess) -> None:
    await run(peer)
    await peer.execute("one", "sh", "-c", "echo before > /root/before; echo 5 > /run/alive")
    before = await pids(peer, "one")
    os.kill(before["vda"], signal.SIGKILL)
    await eventually(lambda: events(peer, "guest.trouble"))
    await until(peer, "one", lambda row: row["state"] == "running" and row["message"] is None)
    code, out, _ = await peer.execute(
        "one",
        "sh",
        "-c",
        "echo after > /root/after; sync; echo 3 > /proc/sys/vm/drop_caches; cat /root/before /run/alive",
    )
    assert (code, out) == (0, b"before\n5\n")
    after = await pids(peer, "one")
    assert after["shim"] == before["shim"]
    assert after["vda"] != before["vda"]


async def test_wrong_requests_are_refused_in_words(peer: PeerProcess) -> None:
    with pytest.raises(OperationError) as caught:
        await run(peer, image="minny")
    assert (caught.value.code, "mini" in caught.value.hint) == ("not-found", True)
    with pytest.raises(OperationError) as caught:
        await run(peer, memory=1 << 39)
    assert caught.value.code == "no-room"
    with pytest.raises(OperationError) as caught:
        await run(peer, place="atlantis")
    assert caught.value.code == "not-found"
    await run(peer)
    with pytest.raises(OperationError) as caught:
        await run(peer)
    assert caught.value.code == "exists"
    with pytest.raises(OperationError) as caught:
        await peer.call("vm.rm", {"vm": "one"})
    assert "--force" in caught.value.hint
    await peer.call("vm.rm", {"vm": "one", "force": True})
    assert await peer.call("vm.ls") == []
    assert list((peer.directory / "guests").iterdir()) == []


LAB: dict[str, Any] = {
    "name": "pair",
    "topology": {
        "defaults": {"image": "mini", "memory": "64M"},
        "nodes": {"a": {"exec": ["echo hello > /root/hello"], "env": {"COLOUR": "red"}}, "b": {}},
        "links": [{"endpoints": ["a:eth1", "b:eth1"], "subnet": "10.9.0.0/24"}],
    },
}


async def test_a_lab_comes_up_and_goes_down(peer: PeerProcess) -> None:
    plan = await peer.call("lab.plan", {"lab": json.dumps(LAB)})
    assert [(guest["vm"], guest["peer"]) for guest in plan["guests"]] == [("a", "tokyo"), ("b", "tokyo")]
    assert await peer.call("vm.ls") == []
    seen: list[tuple[str, str]] = []
    async with peer.client() as client, client.request("lab.up", {"lab": json.dumps(LAB)}) as request:
        async for item in request:
            seen.append((item["guest"], item["state"]))
        result = await request.result()
    assert {(guest["vm"], guest["state"]) for guest in result["guests"]} == {
        ("a", "running"),
        ("b", "running"),
    }
    assert {("a", "running"), ("b", "running")} <= set(seen)
    assert await peer.execute("pair/a", "cat", "/root/hello") == (0, b"hello\n", b"")
    assert await peer.execute("a", "sh", "-c", "echo $COLOUR $(hostname)") == (0, b"red a\n", b"")
    assert (await peer.execute("a", "ping", "-c", "1", "-w", "20", "b"))[0] == 0
    assert [row["lab"] for row in await peer.call("lab.ls")] == ["pair"]
    with pytest.raises(OperationError, match="already"):
        await peer.call("lab.up", {"lab": json.dumps(LAB)})
    assert (await peer.call("lab.down", {"lab": "pair"}))["unconfirmed"] == []
    assert (await peer.call("vm.ls"), await peer.call("lab.ls")) == ([], [])
    assert list((peer.directory / "guests").iterdir()) == []


async def test_a_lab_that_fails_leaves_nothing(peer: PeerProcess) -> None:
    nodes = {"a": {}, "b": {"exec": ["echo it broke >&2; exit 3"]}}
    broken = {"name": "pair", "topology": {"defaults": LAB["topology"]["defaults"], "nodes": nodes}}
    with pytest.raises(OperationError) as caught:
        await peer.call("lab.up", {"lab": json.dumps(broken)})
    assert "it broke" in caught.value.message
    assert "code 3" in caught.value.message
    assert "taken down" in caught.value.message
    assert (await peer.call("vm.ls"), await peer.call("lab.ls")) == ([], [])
    assert list((peer.directory / "guests").iterdir()) == []


async def test_an_interrupted_lab_up_leaves_nothing(peer: PeerProcess) -> None:
    nodes = {"a": {}, "b": {"exec": ["sleep 1000"]}}
    slow = {"name": "pair", "topology": {"defaults": LAB["topology"]["defaults"], "nodes": nodes}}
    async with peer.client() as client, client.request("lab.up", {"lab": json.dumps(slow)}) as request:
        async for item in request:
            if (item["guest"], item["state"]) == ("a", "running"):
                break

    async def nothing_left() -> bool:
        return not await peer.call("lab.ls") and not list((peer.directory / "guests").iterdir())

    await eventually(nothing_left)
    assert await peer.call("vm.ls") == []


async def test_a_lab_that_cannot_be_is_refused_before_anything_changes(peer: PeerProcess) -> None:
    def lab(**node: Any) -> dict[str, str]:
        return {
            "lab": json.dumps({"name": "x", "topology": {"nodes": {"a": {"image": "mini", **node}}}}),
            "source": "x.yaml",
        }

    for node, words in (
        ({"image": "minny"}, "minny"),
        ({"place": "atlantis"}, "atlantis"),
        ({"memory": "512G"}, "no room"),
        ({"memori": "64M"}, "memory"),
    ):
        with pytest.raises(OperationError) as caught:
            await peer.call("lab.up", lab(**node))
        assert words in caught.value.message + caught.value.hint
        assert "x.yaml" in caught.value.message
    assert (await peer.call("vm.ls"), await peer.call("lab.ls")) == ([], [])


async def test_a_peer_without_image_and_kernel_gets_them_from_another(
    peer: PeerProcess, tmp_path: Path
) -> None:
    token = (await peer.call("peer.token.new", {}))["token"]
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "MOBI_KERNEL": ""}
    other = PeerProcess(tmp_path / "virginia", "virginia", {**peer.environment, **environment})
    await other.start(join=token)
    try:
        row = await run(other, place="virginia")
        assert (row["peer"], row["state"]) == ("virginia", "running")
        assert (await peer.execute("one", "hostname"))[1] == b"one\n"
        assert [image["image"] for image in await other.call("image.ls")] == ["mini"]
        await peer.call("vm.rm", {"vm": "one", "force": True})
        assert list((other.directory / "guests").iterdir()) == []
    finally:
        await other.stop()


async def test_a_full_disk_stops_the_guest_until_there_is_room(tmp_path: Path, peer: PeerProcess) -> None:
    """The peer's directory is a small file system of its own, in a mount namespace."""
    directory = tmp_path / "small"
    directory.mkdir()
    mount = f'mount -t tmpfs -o size=160m tmpfs {directory} && exec "$@"'
    small = PeerProcess(
        directory / "peer", environment=peer.environment, prefix=["unshare", "-rm", "sh", "-c", mount, "sh"]
    )
    try:
        await small.start()
    except AssertionError:
        pytest.skip("this host does not let a user mount a tmpfs in a namespace of its own")
    assert small.process is not None
    ballast = Path(f"/proc/{small.process.pid}/root{directory}/ballast")
    try:
        ballast.write_bytes(bytes(80 << 20))
        await run(small, disk=128 << 20)
        command = "dd if=/dev/urandom of=/dev/vdb bs=1M count=100 2>/dev/null && sync && echo done"
        results: list[tuple[int, bytes, bytes]] = []

        async def write() -> None:
            results.append(await small.execute("one", "sh", "-c", command))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            row = await until(small, "one", lambda row: row["state"] == "paused")
            assert "vdb" in row["message"]
            assert "space" in row["message"]
            ballast.unlink()
            await until(small, "one", lambda row: row["state"] == "running" and row["message"] is None)
        assert results == [(0, b"done\n", b"")]
    finally:
        await small.stop()


async def test_a_guest_without_room_for_a_file_is_refused_at_once(tmp_path: Path, peer: PeerProcess) -> None:
    """The guests' directory is a file system that is full to the last byte."""
    first = PeerProcess(tmp_path / "peer", environment=peer.environment)
    await first.start()
    await first.stop()
    guests = tmp_path / "peer" / "guests"
    mount = f'mount -t tmpfs -o nr_blocks=1 tmpfs {guests} && echo x >{guests}/ballast && exec "$@"'
    full = PeerProcess(
        tmp_path / "peer", environment=peer.environment, prefix=["unshare", "-rm", "sh", "-c", mount, "sh"]
    )
    try:
        await full.start()
    except AssertionError:
        pytest.skip("this host does not let a user mount a tmpfs in a namespace of its own")
    try:
        with trio.fail_after(30), pytest.raises(OperationError, match="has 0 MiB left") as caught:
            await run(full)
        assert "make room there" in caught.value.message
        assert await full.call("vm.ls") == []
    finally:
        await full.stop()
