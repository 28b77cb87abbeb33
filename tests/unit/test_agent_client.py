# SPDX-License-Identifier: Apache-2.0
"""The client of the agent channel: what it does when the guest is slow, silent, hostile or gone.

The other end of the line is played by the test, frame by frame, since a real agent cannot be made to
misbehave; `tests/guest` has the real one. Time is trio's mock clock.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import msgpack
import pytest
import trio
import trio.testing

from mobid.agent import SILENCE, Agent, AgentGone, AgentRefused, AgentTimeout
from proto.agent import CREDIT, WINDOW, AgentError, Frame, FrameReader, FrameType, encode, pack_map


@dataclass
class Guest:
    """The guest's end of the line."""

    line: trio.StapledStream[trio.abc.SendStream, trio.abc.ReceiveStream]
    reader: FrameReader = field(default_factory=FrameReader)
    frames: list[Frame] = field(default_factory=list)

    async def next(self, *kinds: FrameType) -> Frame:
        """The next frame, past others than these kinds (probes of the heartbeat are answered)."""
        while True:
            while self.frames:
                frame = self.frames.pop(0)
                if frame.type in kinds:
                    return frame
                if frame.type == FrameType.PROBE:
                    await self.result(frame.session, ok=True)
            self.frames += self.reader.feed(bytes(await self.line.receive_some(4096)))

    async def send(self, kind: FrameType, session: int, payload: bytes) -> None:
        await self.line.send_all(encode(Frame(kind, session, payload)))

    async def result(self, session: int, **values: object) -> None:
        await self.send(FrameType.RESULT, session, pack_map(values))

    async def stream(self, session: int, channel: int, data: bytes) -> None:
        await self.send(FrameType.STREAM, session, bytes((channel,)) + data)

    async def say_hello(self) -> None:
        reset = await self.next(FrameType.RESET)
        await self.send(FrameType.HELLO, reset.session, pack_map({"version": 1}))


Attached = tuple[Agent, Guest]


@asynccontextmanager
async def attached(hello: bool = True) -> AsyncIterator[Attached]:
    near, far = trio.testing.memory_stream_pair()
    agent, guest = Agent(near, "lab/guest"), Guest(far)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(agent.run)
        if hello:
            await guest.say_hello()
            await agent.wait_ready()
        yield agent, guest
        nursery.cancel_scope.cancel()


async def both(one: Callable[[], Awaitable[object]], other: Callable[[], Awaitable[object]]) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one)
        nursery.start_soon(other)


async def test_the_reset_is_said_until_the_agent_answers(autojump_clock: trio.testing.MockClock) -> None:
    async with attached(hello=False) as (agent, guest):
        await guest.next(FrameType.RESET)
        await guest.line.send_all(b"boot messages \xa5\x5a\x05\x00 and half a frame")
        await guest.next(FrameType.RESET)
        await guest.say_hello()
        assert await agent.wait_ready() == {"version": 1}


async def test_an_agent_that_never_says_hello_is_reported(autojump_clock: trio.testing.MockClock) -> None:
    async with attached(hello=False) as (agent, _):
        with pytest.raises(AgentTimeout, match="lab/guest does not answer"):
            await agent.wait_ready()
        with pytest.raises(AgentTimeout, match="not said hello"):
            await agent.probe()


async def test_a_program_with_input_both_streams_and_a_code() -> None:
    async with attached() as (agent, guest):

        async def play() -> None:
            request = await guest.next(FrameType.EXEC)
            assert msgpack.unpackb(request.payload)["argv"] == ["cat"]
            got = b""
            while piece := (await guest.next(FrameType.STREAM)).payload[1:]:
                got += piece
                await guest.send(FrameType.CREDIT, request.session, CREDIT.pack(0, len(piece)))
            await guest.stream(request.session, 1, got[:10])
            await guest.stream(request.session, 2, b"warning")
            await guest.stream(request.session, 1, b"")
            assert len(got) == 3 * WINDOW
            await guest.result(request.session, ok=True, code=7, signal=0)

        async def run() -> None:
            async with agent.exec(["cat"]) as session:
                await session.write(b"0123456789" + bytes(3 * WINDOW - 10))
                await session.close_input()
                pieces = []
                while (piece := await session.read()) is not None:
                    pieces.append(piece)
                assert pieces == [(1, b"0123456789"), (2, b"warning"), (1, b"")]
                assert session.result is not None
                assert session.result["code"] == 7

        await both(play, run)


async def test_a_refusal_carries_the_agents_words() -> None:
    async with attached() as (agent, guest):

        async def play() -> None:
            request = await guest.next(FrameType.GET)
            await guest.result(request.session, ok=False, error="not-found", message="cannot open /none")

        async def run() -> None:
            with pytest.raises(AgentRefused, match="cannot open /none") as caught:
                await agent.request(FrameType.GET, {"path": "/none"})
            assert caught.value.code == "not-found"

        await both(play, run)


async def test_an_unanswered_request_ends(autojump_clock: trio.testing.MockClock) -> None:
    async with attached() as (agent, _):
        with pytest.raises(AgentTimeout, match="no answer to probe in 15 s"):
            await agent.probe()


async def test_a_program_ends_when_its_guest_falls_silent(autojump_clock: trio.testing.MockClock) -> None:
    async with attached() as (agent, _), agent.exec(["sleep"]) as session:
        began = trio.current_time()
        with pytest.raises(AgentTimeout, match="nothing heard"):
            await session.finish()
        assert trio.current_time() - began >= SILENCE


async def test_silence_of_a_paused_guest_means_nothing(autojump_clock: trio.testing.MockClock) -> None:
    async with attached() as (agent, guest), agent.exec(["sleep"]) as session:
        request = await guest.next(FrameType.EXEC)
        async with agent.suspended():
            await trio.sleep(10 * SILENCE)
        await guest.result(request.session, ok=True, code=0)
        assert (await session.finish())["code"] == 0


async def test_a_closed_line_ends_everything() -> None:
    async with attached() as (agent, guest), agent.exec(["sleep"]) as session:
        await guest.stream(session.number, 1, b"last words")
        await guest.line.aclose()
        assert await session.read() == (1, b"last words")
        with pytest.raises(AgentGone, match="lab/guest was closed"):
            await session.read()
        with pytest.raises(AgentGone):
            await agent.probe()


async def test_leaving_a_session_kills_its_program() -> None:
    async with attached() as (agent, guest):
        async with agent.exec(["yes"]) as session:
            number = session.number
        frame = await guest.next(FrameType.SIGNAL)
        assert (frame.session, msgpack.unpackb(frame.payload)) == (number, {"signal": 9})


async def test_a_guest_that_sends_too_much_is_cut_off() -> None:
    async with attached() as (agent, guest), agent.exec(["yes"]) as session:
        for _ in range(5):
            await guest.stream(session.number, 1, bytes(WINDOW // 4))
        # Nothing is read until all has arrived: reading would give credit.
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(AgentError, match="credit"):
            await session.finish()
