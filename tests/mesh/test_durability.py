# SPDX-License-Identifier: Apache-2.0
"""What was acknowledged stays: peers are killed at any moment, their logs torn and damaged."""

from __future__ import annotations

import random
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from mobid import rpc
from mobid.signal import Changed
from proto import log
from proto.api import OperationError
from tests.mesh.peers import Mesh, PeerProcess

ROUNDS = 6
WRITERS = 4


async def write_until_killed(peer: PeerProcess, acknowledged: list[str], delay: float) -> None:
    """Make tokens as fast as they are answered; kill the peer in the midst of it."""

    async def write(client: rpc.Client) -> None:
        while True:
            acknowledged.append((await client.call("peer.token.new"))["id"])

    async def write_until_lost() -> None:
        async with peer.client() as client:
            with pytest.raises(OperationError, match="the connection to tokyo was lost"):
                await write(client)

    async with trio.open_nursery() as nursery:
        for _ in range(WRITERS):
            nursery.start_soon(write_until_lost)
        await trio.sleep(delay)
        peer.kill()


async def tokens_of(peer: PeerProcess) -> list[str]:
    return [row["id"] for row in await peer.ask("peer.token.ls")]


def log_of(peer: PeerProcess) -> list[log.Record]:
    path = peer.directory / "catalog" / "log"
    return log.scan(path.read_bytes(), str(path)).records


async def test_nothing_acknowledged_is_lost_by_kill_9(mesh: Mesh) -> None:
    (tokyo,) = await mesh.start("tokyo")
    acknowledged: list[str] = []
    dice = random.Random(1)
    for _ in range(ROUNDS):
        before = len(acknowledged)
        await write_until_killed(tokyo, acknowledged, dice.uniform(0.05, 0.4))
        assert len(acknowledged) > before
        await tokyo.start()
        found = await tokens_of(tokyo)
        assert set(acknowledged) <= set(found)
        # At most the requests that were under way are there without their answer having arrived.
        assert len(found) <= len(acknowledged) + WRITERS * ROUNDS
    assert [record.index for record in log_of(tokyo)] == list(range(1, len(log_of(tokyo)) + 1))


async def test_a_follower_s_proposals_survive_the_coordinator_s_death_once_each(mesh: Mesh) -> None:
    tokyo, virginia = await mesh.start("tokyo", "virginia")
    acknowledged = await tokens_of(tokyo)
    unknown = 0
    progress = Changed()
    dice = random.Random(2)
    done = False

    async def writer() -> None:
        nonlocal unknown
        async with virginia.client() as client:
            while not done:
                # Sent again by the follower until the coordinator is back; on a slow machine that can take
                # longer than it tries, and then nobody may know whether it came true.
                try:
                    acknowledged.append((await client.call("peer.token.new", timeout=60.0))["id"])
                    progress.set()
                except OperationError as error:
                    if error.code not in ("no-leader", "no-majority"):
                        raise
                    unknown += 1

    async with trio.open_nursery() as nursery:
        for _ in range(WRITERS):
            nursery.start_soon(writer)
        for _ in range(3):
            await trio.sleep(dice.uniform(0.1, 0.4))
            tokyo.kill()
            await tokyo.start()
        before = len(acknowledged)
        with trio.fail_after(30):
            await progress.wait_until(lambda: len(acknowledged) > before)
        done = True
    found = await tokens_of(tokyo)
    assert set(acknowledged) <= set(found)
    assert len(found) - len(acknowledged) <= unknown


async def test_a_follower_catches_up_after_any_death(mesh: Mesh) -> None:
    tokyo, virginia = await mesh.start("tokyo", "virginia")
    dice = random.Random(3)
    for _ in range(3):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(make_tokens, tokyo, 60)
            await trio.sleep(dice.uniform(0.01, 0.3))
            virginia.kill()
        await virginia.start()
    index = (await tokyo.ask("status"))["commit_index"]
    await virginia.until("status", lambda status: status["commit_index"] >= index)
    assert await tokens_of(virginia) == await tokens_of(tokyo)
    assert log_of(virginia) == log_of(tokyo)


async def make_tokens(peer: PeerProcess, count: int) -> None:
    async with peer.client() as client:
        for _ in range(count):
            await client.call("peer.token.new")


async def test_a_follower_alone_still_answers_from_what_it_knows(mesh: Mesh) -> None:
    tokyo, virginia = await mesh.start("tokyo", "virginia")
    await make_tokens(tokyo, 3)
    index = (await tokyo.ask("status"))["commit_index"]
    await virginia.until("status", lambda status: status["commit_index"] >= index)
    tokyo.kill()
    assert await virginia.end() == 0
    await virginia.start()
    assert len(await tokens_of(virginia)) == len(await virginia.ask("peer.token.ls")) == 4
    await virginia.until("leader", lambda leader: leader["leader"] is None and leader["missing"])
    with pytest.raises(OperationError) as caught:
        await virginia.ask("peer.token.new")
    assert caught.value.code == "no-majority"
    assert caught.value.hint


async def test_a_torn_tail_is_cut_and_damage_is_refused_with_its_place(mesh: Mesh) -> None:
    (tokyo,) = await mesh.start("tokyo")
    await make_tokens(tokyo, 3)
    tokyo.kill()
    path = tokyo.directory / "catalog" / "log"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[-100:-7])
    await tokyo.start()
    assert len(await tokens_of(tokyo)) == 3
    assert "catalog.torn" in tokyo.log()
    assert await tokyo.end() == 0
    assert path.read_bytes().startswith(whole)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    path.write_bytes(damaged)
    said = tokyo.fails()
    assert f"{path} is damaged at byte" in said
    assert "no other peer has this catalog" in said
    assert path.read_bytes() == damaged


async def test_of_two_peers_the_one_that_votes_cannot_lose_its_log_quietly(mesh: Mesh) -> None:
    tokyo, virginia = await mesh.start("tokyo", "virginia")
    await make_tokens(tokyo, 3)
    kept = tokyo.directory / "catalog.kept"
    for peer, others in ((virginia, tokyo), (tokyo, virginia)):
        assert await peer.end() == 0
        shutil.copytree(peer.directory / "catalog", kept)
        path = peer.directory / "catalog" / "log"
        path.write_bytes(path.read_bytes()[:-1])
        if peer is virginia:
            await peer.start()
            await peer.knows(2)
            assert await tokens_of(peer) == await tokens_of(others)
            shutil.rmtree(kept)
    said = tokyo.fails()
    assert f"{path} is damaged at byte" in said
    assert "the other peers cannot decide without this one" in said
    shutil.rmtree(path.parent)
    assert f"{path.parent} is damaged at byte 0" in tokyo.fails()
    kept.rename(path.parent)
    await tokyo.start()
    await tokyo.knows(2)
    assert await tokens_of(virginia) == await tokens_of(tokyo)


async def test_a_full_disk_is_named_and_the_peer_goes_on_once_there_is_room(mesh: Mesh) -> None:
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode:
        pytest.skip("user namespaces are not allowed here")
    tokyo = mesh.peer("tokyo")
    tokyo.directory.mkdir()
    small = f'mount -t tmpfs -o size=256k small {tokyo.directory} && exec "$@"'
    tokyo.prefix = ["unshare", "-Urm", "sh", "-c", small, "sh"]
    await tokyo.start()
    assert tokyo.process is not None
    inside = Path(f"/proc/{tokyo.process.pid}/root{tokyo.directory}")
    filler = inside / "filler"
    with pytest.raises(OSError, match="No space left"):
        filler.write_bytes(b"x" * (1 << 20))
    made = await fill(tokyo)
    assert len(await tokyo.ask("peer.token.ls")) == made
    filler.unlink()
    await make_tokens(tokyo, 3)
    # Those that were refused for want of room may have become true since.
    assert len(await tokyo.ask("peer.token.ls")) >= made + 3
    file = inside / "catalog" / "log"
    kept = log.scan(file.read_bytes(), "log")
    assert len(kept.records) >= (await tokyo.ask("status"))["commit_index"]
    assert kept.end == file.stat().st_size
    assert await tokyo.end() == 0


def test_a_peer_on_a_full_disk_says_so(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode:
        pytest.skip("user namespaces are not allowed here")
    directory = tmp_path / "tokyo"
    directory.mkdir()
    command = f'{shlex.quote(sys.executable)} -m mobid run --listen 127.0.0.1:0 --dir "$1"'
    for blocks in (1, 2):
        small = f'mount -t tmpfs -o nr_blocks={blocks} small "$1" && exec {command}'
        done = subprocess.run(
            ["unshare", "-Urm", "sh", "-c", small, "sh", str(directory)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert "no space left on device" in done.stderr.lower()
        assert "mistake" not in done.stderr


async def fill(peer: PeerProcess) -> int:
    """Make tokens until the disk is full; how many were acknowledged."""
    async with peer.client() as client:
        for count in range(100):
            try:
                await client.call("peer.token.new")
            except OperationError as error:
                if (error.code, error.hint) == ("no-room", "make room on the disk"):
                    return count
                raise
    raise AssertionError("the disk was never full")
