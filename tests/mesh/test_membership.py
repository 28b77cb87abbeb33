# SPDX-License-Identifier: Apache-2.0
"""Who gets in, who does not, and what everybody then knows: real peers on loopback."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import trio

from mobid import rpc, tls
from mobid.identity import Identity, load_or_create
from mobid.links import connect_tls
from mobid.tasks import background
from proto import tokens, wire
from proto.api import OperationError
from tests.mesh.peers import Mesh, PeerProcess


async def test_a_mesh_of_one_works_at_once(mesh: Mesh) -> None:
    (tokyo,) = await mesh.start("tokyo")
    status = await tokyo.ask("status")
    assert (status["name"], status["leader"], status["peers"], status["guests"]) == ("tokyo", "tokyo", 1, 0)
    leader = await tokyo.ask("leader")
    assert (leader["leader"], leader["voters"], leader["missing"]) == ("tokyo", ["tokyo"], {})
    assert leader["term"] >= 1
    (row,) = await tokyo.ask("peer.ls")
    keys = "peer name site address state rtt_ms voter draining guests memory_free cpu_features version"
    assert set(row) == set(keys.split())
    assert await tokyo.end() == 0


async def test_peers_join_and_everyone_knows_everyone(mesh: Mesh) -> None:
    peers = await mesh.start("tokyo", "virginia", "amsterdam")
    for peer in peers:
        rows = await peer.ask("peer.ls")
        assert [row["name"] for row in rows] == ["amsterdam", "tokyo", "virginia"]
    ping = await peers[1].ask("peer.ping", peer="amsterdam")
    assert ping["peer"] == "amsterdam"
    assert ping["rtt_ms"] > 0
    events = await collect(peers[2], "events")
    assert {event["peer"] for event in events} == {"tokyo", "virginia", "amsterdam"}
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)


async def collect(peer: PeerProcess, op: str, **args: Any) -> list[dict[str, Any]]:
    async with peer.client() as client, client.request(op, args) as request:
        return [item async for item in request]


async def test_a_one_use_token_admits_one_peer(mesh: Mesh) -> None:
    (tokyo,) = await mesh.start("tokyo")
    token = await tokyo.token()
    await mesh.peer("virginia").start(token=token)
    said = mesh.peer("amsterdam").fails(token=token)
    assert "is spent" in said
    assert "mobictl peer token new" in said
    assert (await tokyo.ask("status"))["peers"] == 2
    (row,) = await tokyo.ask("peer.token.ls")
    assert (row["state"], row["uses"], row["role"]) == ("spent", 0, "peer")


async def test_bad_tokens_are_refused_in_words(mesh: Mesh) -> None:
    (tokyo,) = await mesh.start("tokyo")
    good = tokens.decode(await tokyo.token(ttl=3600.0))
    revoked = await tokyo.ask("peer.token.new")
    await tokyo.ask("peer.token.revoke", token=revoked["id"])
    forged = tokens.Token(good.id, b"x" * 20, good.mesh, good.role, good.expires, good.doors)
    old = tokens.Token(good.id, good.secret, good.mesh, good.role, 1.0, good.doors)
    text = tokens.encode(good)
    cases = {
        tokens.encode(forged): "not known to the mesh",
        tokens.encode(old): "has expired",
        revoked["token"]: "was revoked",
        text[:-7]: "truncated or altered",
        text[:20] + ("A" if text[20] != "A" else "B") + text[21:]: "truncated or altered",
        await tokyo.token(role="viewer"): "is a user's",
        "hello": "this is no token",
    }
    for place, (bad, words) in enumerate(cases.items()):
        assert words in mesh.peer(f"p{place}").fails(token=bad)
    assert (await tokyo.ask("status"))["peers"] == 1


async def test_an_impostor_at_the_address_is_noticed(mesh: Mesh, tmp_path: Path) -> None:
    (tokyo,) = await mesh.start("tokyo")
    token = tokens.decode(await tokyo.token())
    other = load_or_create(tmp_path / "other.pem")
    doors = tuple((address, other.public_key) for address, _ in token.doors)
    lured = tokens.Token(token.id, token.secret, token.mesh, token.role, token.expires, doors)
    assert "does not hold the expected key" in mesh.peer("virginia").fails(token=tokens.encode(lured))


async def test_a_name_is_taken_once(mesh: Mesh) -> None:
    (tokyo,) = await mesh.start("tokyo")
    token = await tokyo.token(uses=2)
    other = PeerProcess(mesh.base / "elsewhere", "tokyo")
    (mesh.base / "elsewhere").mkdir()
    mesh.peers.append(other)
    assert "a peer named tokyo already" in other.fails(token=token)


async def open_as(peer: PeerProcess, identity: Identity | None) -> trio.SSLStream[trio.SocketStream]:
    server = load_or_create(peer.directory / "identity.pem")
    return await connect_tls(await peer.address(), tls.client_context(identity), server.public_key, peer.name)


async def answer_as(peer: PeerProcess, identity: Identity | None, op: str, **args: Any) -> Any:
    """What somebody with this key (or none) gets over TCP."""
    client = rpc.Client(await open_as(peer, identity), peer.name)
    with trio.fail_after(20):
        async with background(client.run):
            return await client.call(op, args)


async def test_a_key_that_nobody_enrolled_opens_nothing(mesh: Mesh, tmp_path: Path) -> None:
    (tokyo,) = await mesh.start("tokyo")
    stranger = load_or_create(tmp_path / "stranger.pem")
    with pytest.raises(OperationError) as caught:
        await answer_as(tokyo, stranger, "status")
    assert caught.value.code == "unreachable"


async def test_without_a_key_one_may_only_join_or_log_in(mesh: Mesh) -> None:
    (tokyo,) = await mesh.start("tokyo")
    for op in ("status", "peer.ls", "vm.ls", "stop", "kernel.current", "no.such"):
        with pytest.raises(OperationError) as caught:
            await answer_as(tokyo, None, op)
        assert caught.value.code in ("unauthenticated", "unsupported")


async def test_roles_are_enforced(mesh: Mesh, tmp_path: Path) -> None:
    tokyo, virginia = await mesh.start("tokyo", "virginia")
    ann = load_or_create(tmp_path / "ann.pem")
    token = tokens.decode(await tokyo.token(role="viewer"))
    login = {"token": token.id, "secret": token.secret, "certificate": ann.certificate, "name": "ann"}
    entered = await answer_as(virginia, None, "mesh.login", **login)
    assert entered["role"] == "viewer"
    assert sorted(member["name"] for member in entered["members"]) == ["tokyo", "virginia"]
    assert await answer_as(virginia, None, "mesh.login", **login) == entered
    for peer in (tokyo, virginia):
        rows = await answer_as(peer, ann, "peer.ls")
        assert len(rows) == 2
        for op in ("stop", "peer.token.new", "peer.leave"):
            with pytest.raises(OperationError, match="needs role admin; ann has role viewer") as caught:
                await answer_as(peer, ann, op)
            assert caught.value.code == "forbidden"
        with pytest.raises(OperationError, match="needs role peer"):
            await answer_as(peer, ann, "kernel.current")
    other = load_or_create(tmp_path / "other.pem")
    with pytest.raises(OperationError, match="is spent"):
        await answer_as(tokyo, None, "mesh.login", **{**login, "certificate": other.certificate})


async def test_an_evicted_peer_ends_and_its_key_opens_nothing(mesh: Mesh) -> None:
    tokyo, virginia = await mesh.start("tokyo", "virginia")
    identity = load_or_create(virginia.directory / "identity.pem")
    row = await tokyo.ask("peer.evict", peer="virginia")
    assert row["state"] == "left"
    assert await virginia.ended() == 1
    assert virginia.process is not None
    assert virginia.process.stdout is not None
    assert "is no member of its mesh any more" in virginia.process.stdout.read()
    with pytest.raises(OperationError):
        await answer_as(tokyo, identity, "peer.ls")


async def test_a_peer_leaves(mesh: Mesh) -> None:
    tokyo, virginia = await mesh.start("tokyo", "virginia")
    await virginia.ask("peer.leave")
    assert await virginia.ended() == 0
    with pytest.raises(OperationError, match="is the only peer of its mesh"):
        await tokyo.ask("peer.leave")
    assert [row["state"] for row in await tokyo.ask("peer.ls")] == ["alive", "left"]
    gone = [event for event in await collect(tokyo, "events") if event["kind"] == "peer.left"]
    assert [(event["peer"], event["name"]) for event in gone] == [("tokyo", "virginia")]


async def test_a_key_that_joins_again_is_believed_once_it_has_caught_up(mesh: Mesh) -> None:
    tokyo, virginia = await mesh.start("tokyo", "virginia")
    assert "catalog.returning" not in virginia.log()
    await virginia.ask("peer.leave")
    assert await virginia.ended() == 0
    shutil.rmtree(virginia.directory / "catalog")
    for name in ("mesh.json", "left"):
        (virginia.directory / name).unlink()
    await virginia.start(token=await tokyo.token())
    await virginia.knows(2)
    assert "catalog.returning" in virginia.log()
    recovering = virginia.directory / "catalog" / "recovering"
    await virginia.until("status", lambda _status: not recovering.exists())


async def test_a_running_peer_that_is_alone_joins_another_mesh(mesh: Mesh) -> None:
    (tokyo,) = await mesh.start("tokyo")
    (virginia,) = await mesh.start("virginia")
    before = await virginia.address()
    joined = await virginia.ask("peer.join", token=await tokyo.token())
    assert joined["mesh"] == (await tokyo.ask("status"))["mesh"]
    await tokyo.knows(2)
    await virginia.knows(2)
    assert await virginia.address() == before
    events = await collect(tokyo, "events")
    assert [event["peer"] for event in events if event["kind"] == "mesh.founded"] == ["tokyo"]
    assert {event["peer"] for event in events} == {"tokyo", "virginia"}
    own = [event for event in events if event["peer"] == "virginia"]
    assert own[0]["kind"] == "mesh.joined", "what was in the mesh that it gave up is no matter of this one"
    with pytest.raises(OperationError, match="is a member of that mesh already"):
        await virginia.ask("peer.join", token=await tokyo.token())
    with pytest.raises(OperationError, match="has a mesh of its own"):
        await tokyo.ask("peer.join", token=await (await mesh.start("amsterdam"))[0].token())


def kept_times(peer: PeerProcess) -> Any:
    return json.loads((peer.directory / "mesh.json").read_text())["times"]


async def test_the_times_of_a_mesh_are_fixed_when_it_is_founded(mesh: Mesh) -> None:
    tokyo, virginia = mesh.peer("tokyo"), mesh.peer("virginia")
    quick = ["--heartbeat", "80ms", "--election", "800ms"]
    await tokyo.start(*quick)
    token = await tokyo.token()
    said = virginia.fails("--election", "2s", token=token)
    assert "--heartbeat 100ms --election 2000ms is not what this mesh was founded with" in said
    assert "leave both options out" in said
    await virginia.start(token=token)
    await tokyo.knows(2)
    assert kept_times(tokyo) == kept_times(virginia) == {"heartbeat": 0.08, "election": 0.8}
    for peer in (tokyo, virginia):
        assert await peer.end() == 0
        assert "--heartbeat 80ms --election 800ms" in peer.fails("--heartbeat", "100ms")
    await tokyo.start()
    await virginia.start(*quick)
    await tokyo.knows(2)
    assert kept_times(tokyo) == kept_times(virginia) == {"heartbeat": 0.08, "election": 0.8}


async def test_a_directory_that_does_not_know_the_times_gets_them_once(mesh: Mesh) -> None:
    (tokyo,) = await mesh.start("tokyo")
    assert await tokyo.end() == 0
    kept = json.loads((tokyo.directory / "mesh.json").read_text())
    del kept["times"]
    (tokyo.directory / "mesh.json").write_text(json.dumps(kept))
    await tokyo.start()
    assert await tokyo.end() == 0
    assert kept_times(tokyo) == {"heartbeat": 0.1, "election": 1.0}
    assert "is not what this mesh was founded with" in tokyo.fails("--election", "2s")


async def test_a_dead_peer_is_seen_as_such_and_seen_again(mesh: Mesh) -> None:
    tokyo, virginia = await mesh.start("tokyo", "virginia")
    virginia.kill()
    await tokyo.until("peer.ls", lambda rows: rows[1]["state"] == "suspect")
    with pytest.raises(OperationError) as caught:
        await tokyo.ask("peer.ping", peer="virginia")
    assert caught.value.code == "unreachable"
    await virginia.start()
    await tokyo.knows(2)


# Bad bytes.


async def raw(peer: PeerProcess, data: bytes) -> bytes:
    """What the TCP port answers to these bytes before it closes."""
    host, port = (await peer.address()).rsplit(":", 1)
    stream = await trio.open_tcp_stream(host, int(port))
    answer = b""
    with trio.fail_after(20):
        async with stream:
            try:
                await stream.send_all(data)
                while more := await stream.receive_some():
                    answer += more
            except trio.BrokenResourceError:
                return answer
    return answer


async def test_rubbish_at_the_port_is_closed_and_harms_nobody(mesh: Mesh) -> None:
    (tokyo,) = await mesh.start("tokyo")
    unexpected = b"MOBITOPO" + bytes(40)
    for data in (
        b"GET / HTTP/1.0\r\n\r\n",
        b"\x16\x03\x01" + b"\xff" * 200,
        unexpected,
        b"M" * 48,
        b"\0" * 100,
    ):
        await raw(tokyo, data)
    assert (await tokyo.ask("status"))["name"] == "tokyo"
    assert "Traceback" not in tokyo.log()


async def test_oversized_and_truncated_messages(mesh: Mesh) -> None:
    (tokyo,) = await mesh.start("tokyo")
    large = wire.encode(wire.Request(1, "mesh.join", {"secret": b"x" * wire.LIMIT_UNAUTHENTICATED}))
    for data, words in (
        (large, "larger than"),
        (b"\0\0\0\x05\x81", ""),
        ((2**32 - 1).to_bytes(4, "big"), "larger"),
    ):
        stream = await open_as(tokyo, None)
        with trio.fail_after(20):
            await stream.send_all(data)
            if words:
                decoder, got = wire.Decoder(), list[wire.Message]()
                while not got:
                    got += decoder.feed(await stream.receive_some())
                assert isinstance(got[0], wire.Failure)
                assert words in got[0].error.message
            await trio.aclose_forcefully(stream)
    assert (await tokyo.ask("status"))["name"] == "tokyo"
    assert "Traceback" not in tokyo.log()


# Wrong starts.


async def test_a_second_start_in_one_directory_is_refused(mesh: Mesh) -> None:
    (tokyo,) = await mesh.start("tokyo")
    again = mesh.peer("tokyo")
    said = again.fails()
    assert tokyo.process is not None
    assert f"a peer is running in {tokyo.directory} already (process {tokyo.process.pid})" in said
    assert (await tokyo.ask("status"))["name"] == "tokyo"


async def test_a_signal_while_joining_ends_the_peer_quietly(mesh: Mesh) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        door = (f"127.0.0.1:{deaf.getsockname()[1]}", b"k" * 32)
        token = tokens.encode(tokens.Token("ab", b"s" * 20, "m", "peer", 4e9, (door,)))
        tokyo = mesh.peer("tokyo")
        tokyo.launch(token=token)
        connection, _ = await trio.to_thread.run_sync(deaf.accept)
        with connection:
            assert await tokyo.end() == 0
    assert tokyo.process is not None
    assert tokyo.process.stdout is not None
    assert tokyo.process.stdout.read() == ""


async def test_a_port_in_use_is_named(mesh: Mesh) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        said = mesh.peer("tokyo").fails("--listen", f"127.0.0.1:{port}")
    assert f"port {port} on 127.0.0.1 is in use" in said
    assert "--listen" in said


async def test_directories_that_are_no_peer_s(mesh: Mesh) -> None:
    full = mesh.peer("full")
    full.directory.mkdir()
    (full.directory / "photo.jpg").write_bytes(b"x")
    assert "neither empty nor a peer's directory" in full.fails()
    future = mesh.peer("future")
    future.directory.mkdir()
    (future.directory / "format").write_text("3\n")
    assert "this version reads format 2" in future.fails()
    (future.directory / "format").write_text("1\n")
    assert "use the version of Mobitopolo that wrote it" in future.fails()
    (tokyo,) = await mesh.start("tokyo")
    assert await tokyo.end() == 0
    renamed = mesh.peer("kyoto")
    renamed.directory = tokyo.directory
    assert "belongs to the peer tokyo, not kyoto" in renamed.fails()
    (tokyo.directory / "identity.pem").chmod(0o644)
    assert "can be read by others" in tokyo.fails()
