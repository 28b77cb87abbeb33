# SPDX-License-Identifier: Apache-2.0
"""The client of a guest's agent: programs run, files copied, addresses set, through the guest's serial line.

`proto.agent` knows what the bytes mean; this module moves them. One `Agent` owns one attached stream: its
`run` reads, writes and keeps asking whether the agent is still there, and every conversation is a `Session`
that other tasks read and write. A guest may be slow, paused, hostile or gone, so every wait here has an end:
a request has a deadline, and a running session ends when nothing at all was heard for `SILENCE` seconds
although the guest is supposed to run.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import trio

from proto.agent import (
    CHUNK,
    AgentError,
    AgentMachine,
    Fact,
    Finished,
    FrameType,
    Hello,
    Output,
    Violation,
    Writable,
)

READY_TIMEOUT = 30.0
REQUEST_TIMEOUT = 15.0
HEARTBEAT = 5.0
SILENCE = 30.0
RESET_AGAIN = 1.0
OUTGOING_LIMIT = 1 << 20
"""Bytes that may wait for the guest to read them; sessions wait before this is reached."""


class AgentGone(AgentError):
    """The channel is closed: the guest ended, moved away, or another reader took it."""


class AgentTimeout(AgentError):
    """The agent did not answer in time."""


class AgentRefused(AgentError):
    """The agent answered with an error; `code` is its word for it."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Session:
    """One conversation with the agent. Read until the end, then look at `result`."""

    def __init__(self, agent: Agent, number: int) -> None:
        self.number = number
        self.result: Mapping[str, object] | None = None
        self._agent = agent
        self._incoming: deque[tuple[int, bytearray]] = deque()
        self._ended: set[int] = set()
        self._failure: AgentError | None = None
        self._changed = trio.Event()

    async def read(self) -> tuple[int, bytes] | None:
        """The next piece of output as (channel, bytes), no bytes at the end of a channel; None after the
        result.

        Raises `AgentError` if the session ended without a result.
        """
        while not self._incoming:
            if self._failure is not None:
                raise self._failure
            if self.result is not None:
                return None
            await self._changed.wait()
        channel, data = self._incoming.popleft()
        self._agent.consumed(self.number, channel, len(data))
        return channel, bytes(data)

    async def write(self, data: bytes) -> None:
        """Send input; waits for credit. Returns silently if the session ended meanwhile (see `read`)."""
        view = memoryview(data)
        while view and not self._over:
            room = min(self._agent.writable(self.number), CHUNK, len(view))
            if room == 0:
                await self._changed.wait()
                continue
            self._agent.send(self.number, bytes(view[:room]))
            view = view[room:]
            await self._agent.drained()

    async def close_input(self) -> None:
        """No more input follows."""
        if not self._over:
            self._agent.send(self.number, b"")
            await trio.lowlevel.checkpoint()

    def signal(self, number: int) -> None:
        """Send a signal to the program."""
        self._agent.signal(self.number, number)

    async def finish(self) -> Mapping[str, object]:
        """Throw away the remaining output and return the result."""
        while await self.read() is not None:
            pass
        assert self.result is not None
        return self.result

    @property
    def _over(self) -> bool:
        return self.result is not None or self._failure is not None

    def take(self, fact: Fact) -> None:
        """Called by the agent's reader: something happened in this session."""
        match fact:
            case Output(channel=channel, data=data):
                if data and self._incoming and self._incoming[-1][0] == channel:
                    self._incoming[-1][1].extend(data)
                else:
                    self._incoming.append((channel, bytearray(data)))
            case Finished(error=None, result=result):
                self.result = result
            case Finished(error=str(code), message=message):
                self._failure = AgentRefused(code, message)
            case Violation(message=message):
                self._failure = AgentError(message)
        self.wake()

    def fail(self, error: AgentError) -> None:
        """End the session with an error; output that came before it can still be read."""
        if not self._over:
            self._failure = error
        self.wake()

    def wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


class Agent:
    """The agent of one guest over one attached stream. `guest` is its name for messages."""

    def __init__(self, stream: trio.abc.Stream, guest: str) -> None:
        self.guest = guest
        self.hello: Mapping[str, object] = {}
        self._stream = stream
        self._machine = AgentMachine()
        self._sessions: dict[int, Session] = {}
        self._outgoing = bytearray()
        self._wake_writer = trio.Event()
        self._drained = trio.Event()
        self._drained.set()
        self._ready = trio.Event()
        self._gone: AgentError | None = None
        self._heard = -math.inf
        self._suspended = 0

    async def run(self) -> None:
        """Serve the channel until it closes or the task is cancelled; then every open session fails."""
        self._heard = trio.current_time()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                nursery.start_soon(self._attend)
                await self._read()
                nursery.cancel_scope.cancel()
        finally:
            self._end(AgentGone(f"the connection to the agent of {self.guest} was closed"))
            with trio.CancelScope(shield=True), trio.move_on_after(1):
                await self._stream.aclose()

    @property
    def silent_for(self) -> float:
        """Seconds since something was heard from the agent; 0 while the guest is suspended."""
        return 0.0 if self._suspended else trio.current_time() - self._heard

    @property
    def is_ready(self) -> bool:
        return self._ready.is_set() and self._gone is None

    async def wait_ready(self, timeout: float = READY_TIMEOUT) -> Mapping[str, object]:
        """Wait for the agent's hello: `{version, boot_id, hostname, image, uptime}`. Raises `AgentError`."""
        with trio.move_on_after(timeout):
            await self._ready.wait()
            if self._gone is not None:
                raise self._gone
            return self.hello
        raise AgentTimeout(f"the agent of {self.guest} does not answer (no hello within {timeout:g} s)")

    @asynccontextmanager
    async def suspended(self) -> AsyncIterator[None]:
        """While the guest is frozen its silence means nothing."""
        self.suspend()
        try:
            yield
        finally:
            self.unsuspend()

    def suspend(self) -> None:
        self._suspended += 1

    def unsuspend(self) -> None:
        self._suspended = max(0, self._suspended - 1)
        self._heard = trio.current_time()

    async def request(
        self, kind: FrameType, arguments: Mapping[str, object], timeout: float = REQUEST_TIMEOUT
    ) -> Mapping[str, object]:
        """A request without streams; its result. Raises `AgentTimeout`, `AgentRefused`, `AgentGone`."""
        with trio.move_on_after(timeout):
            async with self.session(kind, arguments) as session:
                return await session.finish()
        name = kind.name.lower()
        raise AgentTimeout(
            f"the agent of {self.guest} does not answer (no answer to {name} in {timeout:g} s)"
        )

    @asynccontextmanager
    async def session(self, kind: FrameType, arguments: Mapping[str, object]) -> AsyncIterator[Session]:
        """Open a session; at the end of the block what is still running is killed."""
        if self._gone is not None:
            raise self._gone
        if not self._ready.is_set():
            raise AgentTimeout(f"the agent of {self.guest} has not said hello yet")
        number, data = self._machine.open(kind, arguments)
        session = self._sessions[number] = Session(self, number)
        self._post(data)
        try:
            yield session
        finally:
            del self._sessions[number]
            self._post(self._machine.abandon(number))

    @asynccontextmanager
    async def exec(
        self,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        tty: bool = False,
    ) -> AsyncIterator[Session]:
        """Run a program; the result is `{code, signal}`."""
        arguments = {"argv": list(argv), "env": dict(env or {}), "cwd": cwd, "tty": tty}
        async with self.session(FrameType.EXEC, arguments) as session:
            yield session

    async def configure(self, settings: Mapping[str, object]) -> None:
        """`{hostname, interfaces, hosts, env}` (`kernel/README.md` §9)."""
        await self.request(FrameType.CONFIGURE, settings, timeout=60)

    async def probe(self, timeout: float = REQUEST_TIMEOUT, **arguments: bool) -> Mapping[str, object]:
        """The guest's clocks, largest gap, load and free memory; `reset` and `samples` as in the README."""
        return await self.request(FrameType.PROBE, arguments, timeout)

    async def poweroff(self, timeout: float = REQUEST_TIMEOUT) -> None:
        """Ask the guest to power off; returns when the agent has agreed."""
        await self.request(FrameType.POWEROFF, {}, timeout)

    def close(self, why: str) -> None:
        """The guest is no more: everything that waits for its agent ends."""
        self._end(AgentGone(why))

    def writable(self, session: int) -> int:
        return self._machine.writable(session)

    def send(self, session: int, data: bytes) -> None:
        self._post(self._machine.send(session, data))

    def consumed(self, session: int, channel: int, count: int) -> None:
        if count:
            self._post(self._machine.consumed(session, channel, count))

    def signal(self, session: int, number: int) -> None:
        self._post(self._machine.signal(session, number))

    async def drained(self) -> None:
        """Wait until so little is queued that more may be sent."""
        await self._drained.wait()

    def _post(self, data: bytes) -> None:
        if not data or self._gone is not None:
            return
        if len(self._outgoing) + len(data) > OUTGOING_LIMIT:
            self._end(AgentTimeout(f"the agent of {self.guest} does not answer (it does not read its line)"))
            return
        self._outgoing += data
        if len(self._outgoing) > OUTGOING_LIMIT // 4 and self._drained.is_set():
            self._drained = trio.Event()
        self._wake_writer.set()

    async def _write(self) -> None:
        try:
            while self._gone is None:
                await self._wake_writer.wait()
                self._wake_writer = trio.Event()
                while self._outgoing:
                    piece = bytes(self._outgoing[:CHUNK])
                    del self._outgoing[: len(piece)]
                    await self._stream.send_all(piece)
                    if len(self._outgoing) <= OUTGOING_LIMIT // 8:
                        self._drained.set()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self._end(AgentGone(f"the connection to the agent of {self.guest} was closed"))

    async def _read(self) -> None:
        self._post(self._machine.reset())
        try:
            while self._gone is None:
                data = await self._stream.receive_some(65_536)
                if not data:
                    return
                self._handle(*self._machine.receive(bytes(data)))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return

    def _handle(self, facts: Sequence[Fact], reply: bytes) -> None:
        self._post(reply)
        if facts:
            self._heard = trio.current_time()
        for fact in facts:
            if isinstance(fact, Hello):
                self.hello = fact.facts
                self._ready.set()
            elif (session := self._sessions.get(fact.session)) is not None:
                if isinstance(fact, Writable):
                    session.wake()
                else:
                    session.take(fact)

    async def _attend(self) -> None:
        """Ask for a hello until it comes; afterwards probe, and end what waits for a silent agent."""
        while not self._ready.is_set():
            await trio.sleep(RESET_AGAIN)
            self._look_behind_stalled_frame(RESET_AGAIN)
            if not self._suspended and not self._ready.is_set():
                self._post(self._machine.reset())
        while self._gone is None:
            await trio.sleep(HEARTBEAT)
            if self._suspended:
                continue
            self._look_behind_stalled_frame(2 * HEARTBEAT)
            if self.silent_for > SILENCE:
                error = f"the agent of {self.guest} does not answer (nothing heard for {SILENCE:g} s)"
                for session in list(self._sessions.values()):
                    session.fail(AgentTimeout(error))
            await self._heartbeat()

    async def _heartbeat(self) -> None:
        try:
            await self.probe(timeout=HEARTBEAT)
        except AgentError:
            return  # its silence is what silent_for measures

    def _look_behind_stalled_frame(self, patience: float) -> None:
        while self._machine.reader.pending and self.silent_for >= patience:
            self._handle(*self._machine.skip())

    def _end(self, error: AgentError) -> None:
        if self._gone is not None:
            return
        self._gone = error
        self._ready.set()
        self._drained.set()
        self._wake_writer.set()
        for session in list(self._sessions.values()):
            session.fail(error)
