# SPDX-License-Identifier: Apache-2.0
"""Requests over a stream in memory: order, limits, cancellation, and what a bad client gets."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from mobid import rpc
from mobid.operations import Caller, taken_back
from mobid.rpc import Client, ServedRequest, ServerConnection
from mobid.tasks import background
from proto import wire
from proto.api import OperationError, Role

Handler = Callable[[ServedRequest, dict[str, Any]], Awaitable[Any]]

ADMIN = Caller(Role.ADMIN, name="local")
STRANGER = Caller(Role.ANONYMOUS)


@asynccontextmanager
async def connected(handler: Handler, caller: Caller = ADMIN) -> AsyncGenerator[Client, None]:
    ours, theirs = trio.testing.memory_stream_pair()
    client = Client(ours, "the peer")
    async with background(ServerConnection(theirs, caller, handler).serve, client.run):
        with trio.fail_after(20):
            yield client


async def echo(request: ServedRequest, args: dict[str, Any]) -> Any:
    """Answers with its arguments, after as many items as asked for, or fails as asked for."""
    for place in range(args.get("items", 0)):
        await request.item({"place": place})
    if args.get("fail"):
        raise OperationError("conflict", "no", "yes")
    if args.get("crash"):
        raise RuntimeError("a mistake")
    return args.get("result", args)


async def test_results_errors_and_mistakes() -> None:
    async with connected(echo) as client:
        assert await client.call("x", {"a": b"\0"}) == {"a": b"\0"}
        with pytest.raises(OperationError) as caught:
            await client.call("x", {"fail": True})
        assert (caught.value.code, caught.value.message, caught.value.hint) == ("conflict", "no", "yes")
        with pytest.raises(OperationError) as caught:
            await client.call("x", {"crash": True})
        assert caught.value.code == "internal"
        assert "mistake" not in caught.value.hint
        assert await client.call("x") == {}


async def test_items_come_in_order_before_the_result() -> None:
    async with connected(echo) as client, client.request("x", {"items": 500, "result": 7}) as request:
        assert [item["place"] async for item in request] == list(range(500))
        assert await request.result() == 7


async def test_items_nobody_reads_do_not_stop_others() -> None:
    async with connected(echo) as client:
        assert await client.call("x", {"items": 500, "result": 7}) == 7


async def test_inputs_reach_the_handler_in_order() -> None:
    async def total(request: ServedRequest, _args: dict[str, Any]) -> Any:
        return [(await request.input())["n"] for _ in range(300)]

    async with connected(total) as client, client.request("x") as request:
        for number in range(300):
            await request.send({"n": number})
        assert await request.result() == list(range(300))


async def test_leaving_a_request_cancels_it_at_the_server() -> None:
    ended = trio.Event()
    began = trio.Event()

    async def forever(_request: ServedRequest, _args: dict[str, Any]) -> Any:
        try:
            began.set()
            await trio.sleep_forever()
        finally:
            ended.set()

    async with connected(forever) as client:
        async with client.request("x"):
            await began.wait()
        await ended.wait()
        with pytest.raises(OperationError) as caught:
            await client.call("x", timeout=0.01)
        assert caught.value.code == "timeout"


async def test_a_request_that_is_taken_back_is_told_from_one_whose_caller_is_lost() -> None:
    seen: list[tuple[str, bool, bool]] = []
    began, ended = trio.Event(), trio.Event()

    async def forever(request: ServedRequest, _args: dict[str, Any]) -> Any:
        nonlocal ended
        try:
            began.set()
            await trio.sleep_forever()
        finally:
            seen.append((request.key, request.cancelled, taken_back(request)))
            ended.set()

    for key, abandoned in (("0123456789abcdef", False), ("0123456789abcdef", True), ("", True)):
        began, ended = trio.Event(), trio.Event()
        async with connected(forever) as client, client.request("x", key=key) as request:
            await began.wait()
            request.abandoned = abandoned
        await ended.wait()
    assert seen == [
        ("0123456789abcdef", True, True),
        ("0123456789abcdef", False, False),
        ("", False, True),
    ]


async def test_too_many_requests_at_once_are_refused_and_the_rest_goes_on() -> None:
    gate = trio.Event()

    async def wait(_request: ServedRequest, _args: dict[str, Any]) -> Any:
        await gate.wait()
        return "done"

    answers: list[str] = []

    async def ask(client: Client) -> None:
        try:
            answers.append(await client.call("x"))
        except OperationError as error:
            answers.append(error.code)

    async with connected(wait) as client:
        async with trio.open_nursery() as nursery:
            for _ in range(rpc.MAX_REQUESTS + 5):
                nursery.start_soon(ask, client)
            while len(answers) < 5:
                await trio.testing.wait_all_tasks_blocked()
            gate.set()
        assert sorted(answers) == ["done"] * rpc.MAX_REQUESTS + ["no-room"] * 5


async def test_requests_of_a_client_that_goes_are_cancelled() -> None:
    ended = trio.Event()

    async def forever(_request: ServedRequest, _args: dict[str, Any]) -> Any:
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    ours, theirs = trio.testing.memory_stream_pair()
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ServerConnection(theirs, ADMIN, forever).serve)
            await ours.send_all(wire.encode(wire.Request(1, "x")))
            await trio.testing.wait_all_tasks_blocked()
            await ours.aclose()
    assert ended.is_set()


async def test_open_requests_fail_when_the_server_goes() -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    client = Client(ours, "the peer")
    with trio.fail_after(10):
        async with background(client.run), client.request("x") as request:
            await trio.testing.wait_all_tasks_blocked()
            await theirs.aclose()
            with pytest.raises(OperationError, match="the connection to the peer was lost") as caught:
                await request.result()
        assert caught.value.code == "unreachable"
        with pytest.raises(OperationError, match="was lost"):
            await client.call("x")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ((wire.LIMIT_UNAUTHENTICATED + 1).to_bytes(4, "big"), "larger than"),
        (b"\0\0\0\1\xc1", "no valid MessagePack"),
        (b"\0\0\0\1\x90", "not a map"),
        (wire.encode(wire.Item(1, {})), "only a server sends"),
    ],
)
async def test_a_stranger_that_breaks_the_rules_is_told_and_cut_off(data: bytes, words: str) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ServerConnection(theirs, STRANGER, echo).serve)
            await ours.send_all(data)
            decoder, got = wire.Decoder(), list[wire.Message]()
            while not got:
                got += decoder.feed(await ours.receive_some())
            await ours.send_eof()
            assert await ours.receive_some() == b""
    assert isinstance(got[0], wire.Failure)
    assert words in got[0].error.message


async def test_a_truncated_message_ends_the_connection() -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ServerConnection(theirs, ADMIN, echo).serve)
            await ours.send_all(wire.encode(wire.Request(1, "x", {"a": 1}))[:-1])
            await ours.send_eof()


async def test_a_stranger_may_not_stay(autojump_clock: trio.testing.MockClock) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ServerConnection(theirs, STRANGER, echo).serve)
        assert await ours.receive_some() == b""
    assert trio.current_time() >= rpc.STRANGER_TIMEOUT


async def test_a_result_that_is_too_large_is_an_error_of_its_own() -> None:
    async def huge(_request: ServedRequest, _args: dict[str, Any]) -> Any:
        return b"x" * (wire.LIMIT + 1)

    async with connected(huge) as client:
        with pytest.raises(OperationError) as caught:
            await client.call("x")
        assert caught.value.code == "too-large"


async def test_a_reader_that_stops_reading_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    ours, theirs = trio.testing.lockstep_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ServerConnection(theirs, ADMIN, echo).serve)
        await ours.send_all(wire.encode(wire.Request(1, "x")))
    assert trio.current_time() >= rpc.SEND_TIMEOUT
