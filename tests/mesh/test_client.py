# SPDX-License-Identifier: Apache-2.0
"""The public Python client against a real peer: calls, streams, cancellation, and a peer that dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import trio

from mobictl.client import Mesh, connect
from mobictl.helpers import alive
from proto.api import OperationError, PeerArguments
from tests.cli import Cli, clean, home


@pytest.fixture
def peer() -> Iterator[tuple[str, int]]:
    """A peer alone: its address for the client, and its process id."""
    cli = Cli(home())
    try:
        made = cli.json("up")["peers"][0]
        yield f"unix:{made['socket']}", made["pid"]
    finally:
        clean(cli)


def test_blocking_calls(peer: tuple[str, int]) -> None:
    mesh = Mesh(peer[0])
    assert [row["name"] for row in mesh.call("peer.ls")] == ["peer1"]
    assert mesh.call("peer.show", PeerArguments(peer="peer1"))["name"] == "peer1"
    seen: list[object] = []
    mesh.call("events", on_item=seen.append)
    assert len(seen) >= 2
    with pytest.raises(OperationError) as error:
        mesh.call("peer.show", {"peer": "peer2"})
    assert error.value.code == "not-found"
    with pytest.raises(OperationError) as error:
        mesh.call("peer.show", {"pear": "peer1"})
    assert error.value.code == "bad-argument"
    with pytest.raises(OperationError) as error:
        mesh.call("nonsense")
    assert "nonsense" in error.value.message


async def test_requests_side_by_side_and_cancelled(peer: tuple[str, int]) -> None:
    async with connect(peer[0]) as client:
        async with client.request("events", {"follow": True, "since": 3600.0}) as request:
            async for event in request:
                assert event["peer"] == "peer1"
                break
            assert (await client.call("status"))["name"] == "peer1"
            assert not request.ended
        assert request.ended, "leaving the block ends the request at the peer too"
        with pytest.raises(OperationError) as error:
            await client.call("events", {"follow": True}, timeout=0.5)
        assert error.value.code == "timeout"
        assert (await client.call("status"))["name"] == "peer1"


async def test_a_peer_that_dies_is_unreachable_at_once(peer: tuple[str, int]) -> None:
    async def follow() -> None:
        async with connect(peer[0]) as client, client.request("events", {"follow": True}) as request:
            os.kill(peer[1], signal.SIGKILL)
            async for _ in request:
                pass

    with pytest.raises(OperationError) as error:
        await follow()
    assert error.value.code == "unreachable"
    with trio.fail_after(30):
        while alive(peer[1]):  # noqa: ASYNC110 - its listening socket may be closed after its connections
            await trio.sleep(0.01)
    with pytest.raises(OperationError) as error:
        async with connect(peer[0]):
            pass
    assert error.value.code == "unreachable"


async def test_errors_of_the_block_are_not_wrapped(peer: tuple[str, int]) -> None:
    with pytest.raises(KeyError):
        async with connect(peer[0]):
            raise KeyError("mine")
    with trio.move_on_after(0.2) as scope:
        async with connect(peer[0]) as client:
            await client.call("events", {"follow": True})
    assert scope.cancelled_caught


@pytest.mark.parametrize(
    "target", ["unix:/nonexistent", "unix:/" + "x" * 200, "host", "host:0", "host:99999"]
)
def test_targets_that_are_none(target: str) -> None:
    with pytest.raises(OperationError) as error:
        Mesh(target).call("status")
    assert error.value.code in ("unreachable", "bad-argument")
