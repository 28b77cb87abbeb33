# SPDX-License-Identifier: Apache-2.0
"""Requests and answers over a byte stream: the trio half of `proto.wire`, both ends of it.

A connection has one reader and one writer. Whoever wants to send puts a whole frame into a short queue: so
a cancelled task never leaves half a frame behind, and a full connection makes its senders wait instead of
growing. Every request runs in a task of its own below the connection, at most `MAX_REQUESTS` at once; when
the connection ends, so do they. Nothing a caller sends can make a peer keep more than a bounded number of
bounded frames.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import structlog
import trio

from mobid.operations import Caller
from proto import wire
from proto.api import Arguments, ErrorCode, OperationError, Role

MAX_REQUESTS = 64
"""Requests under way on one connection; more are answered `no-room`."""

QUEUE = 16
"""Frames that wait for the writer, and inputs or items that wait for their reader."""

SEND_TIMEOUT = 60.0
"""A connection that takes no byte for this long is given up."""

CANCEL_TIMEOUT = 1.0
"""How long whoever takes a request back waits for that to be heard."""

STRANGER_TIMEOUT = 30.0
"""How long an unauthenticated connection may last."""

_CHUNK = 64 << 10

log = structlog.get_logger()


class _Framed:
    """A stream of messages over a stream of bytes."""

    def __init__(self, stream: trio.abc.Stream, limit: int) -> None:
        self._stream = stream
        self._decoder = wire.Decoder(limit)
        self._frames_in, self._frames_out = trio.open_memory_channel[bytes](QUEUE)

    async def send(self, message: wire.Message) -> None:
        """Queue a message; raises `BrokenResourceError` when the connection has ended."""
        await self.send_frame(wire.encode(message))

    async def send_frame(self, frame: bytes) -> None:
        """Queue a message that is encoded already."""
        await self._frames_in.send(frame)

    async def write(self) -> None:
        """The writer: returns when the stream is broken or too slow."""
        try:
            async for frame in self._frames_out:
                with trio.move_on_after(SEND_TIMEOUT) as scope:
                    await self._stream.send_all(frame)
                if scope.cancelled_caught:
                    return
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return
        finally:
            self._frames_out.close()

    def finish(self) -> None:
        """No more messages will be sent: the writer returns after the last one that was queued."""
        self._frames_in.close()

    async def messages(self) -> AsyncGenerator[wire.Message, None]:
        """The reader: every message until the stream ends; raises `wire.WireError`."""
        while True:
            try:
                data = await self._stream.receive_some(_CHUNK)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return
            if not data:
                if self._decoder.pending:
                    raise wire.WireError("the connection ended in the middle of a message")
                return
            for message in self._decoder.feed(data):
                yield message


Runner = Callable[["ServedRequest", dict[str, Any]], Awaitable[Any]]


class ServedRequest:
    """A request under way at the server; what its handler holds (`operations.Request`)."""

    def __init__(self, connection: ServerConnection, message: wire.Request) -> None:
        self.id = message.id
        self.op = message.op
        self.caller = connection.caller
        self.hops = message.hops
        self.key = message.key
        self.remark = ""
        """What people should know of the result."""
        self.scope = trio.CancelScope()
        self.cancelled = False
        self._connection = connection
        self.inputs, self._inputs_out = trio.open_memory_channel[dict[str, Any]](QUEUE)

    @property
    def role(self) -> Role:
        return self.caller.role

    async def item(self, item: dict[str, Any]) -> None:
        await self._connection.send(wire.Item(self.id, item))

    async def input(self) -> dict[str, Any]:
        return await self._inputs_out.receive()

    def close(self) -> None:
        self.inputs.close()
        self._inputs_out.close()


class ServerConnection:
    """One client, from its first byte to its last."""

    def __init__(self, stream: trio.abc.Stream, caller: Caller, run: Runner) -> None:
        stranger = caller.role is Role.ANONYMOUS
        self.caller = caller
        self._stream = stream
        self._framed = _Framed(stream, wire.LIMIT_UNAUTHENTICATED if stranger else wire.LIMIT)
        self._run = run
        self._requests: dict[int, ServedRequest] = {}
        self._saying_goodbye = False
        self._lifetime = STRANGER_TIMEOUT if stranger else math.inf

    async def send(self, message: wire.Message) -> None:
        """Queue a message for this client; when it is gone, that is no error: its requests end too."""
        await self._send_frame(wire.encode(message))

    async def _send_frame(self, frame: bytes) -> None:
        try:
            await self._framed.send_frame(frame)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            await trio.sleep_forever()

    async def serve(self) -> None:
        """Answer until the client goes; returns normally whatever the client did."""
        with trio.move_on_after(self._lifetime):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write, nursery.cancel_scope)
                try:
                    async for message in self._framed.messages():
                        await self._take(message, nursery)
                except wire.WireError as error:
                    log.warning("connection.refused", caller=self.caller.id, reason=str(error))
                    await self._say_goodbye(error)
                nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(self._stream)

    async def _write(self, scope: trio.CancelScope) -> None:
        await self._framed.write()
        if not self._saying_goodbye:
            scope.cancel()

    async def _say_goodbye(self, error: wire.WireError) -> None:
        """Tell a client that broke the rules why, as the result of request 0, if it still listens.

        What it still sends is read and thrown away for a moment: closing a socket with unread bytes would
        reset it and take the message along.
        """
        self._saying_goodbye = True
        with trio.move_on_after(1.0):
            code: ErrorCode = "too-large" if "larger" in str(error) else "bad-argument"
            await self.send(wire.Failure(0, OperationError(code, str(error))))
            self._framed.finish()
            with suppress(trio.BrokenResourceError):
                while await self._stream.receive_some(_CHUNK):
                    pass

    async def _take(self, message: wire.Message, nursery: trio.Nursery) -> None:
        match message:
            case wire.Request():
                await self._begin(message, nursery)
            case wire.Input(id, value):
                request = self._requests.get(id)
                if request is not None:
                    try:
                        await request.inputs.send(value)
                    except (trio.BrokenResourceError, trio.ClosedResourceError):
                        return
            case wire.Cancel(id):
                request = self._requests.get(id)
                if request is not None:
                    request.cancelled = True
                    request.scope.cancel()
            case _:
                raise wire.WireError("a client sent what only a server sends")

    async def _begin(self, message: wire.Request, nursery: trio.Nursery) -> None:
        if message.id in self._requests:
            raise wire.WireError(f"request id {message.id} is in use")
        if len(self._requests) >= MAX_REQUESTS:
            full = OperationError(
                "no-room", f"more than {MAX_REQUESTS} requests at once on one connection", "wait for answers"
            )
            await self.send(wire.Failure(message.id, full))
            return
        request = ServedRequest(self, message)
        self._requests[message.id] = request
        nursery.start_soon(self._carry_out, request, message.args)

    async def _carry_out(self, request: ServedRequest, args: dict[str, Any]) -> None:
        answer = b""
        try:
            with request.scope:
                result = await self._run(request, args)
                answer = wire.encode(wire.Result(request.id, result, request.remark))
        except OperationError as error:
            answer = wire.encode(wire.Failure(request.id, error))
        except Exception:
            # The boundary: a mistake in one handler must not end the peer.
            log.exception("operation.failed", op=request.op)
            mistake = OperationError(
                "internal",
                f"{request.op} failed by a mistake in the peer itself",
                "its mobid.log has the details",
            )
            answer = wire.encode(wire.Failure(request.id, mistake))
        finally:
            request.close()
            del self._requests[request.id]
        if not answer:
            cancelled = OperationError("failed", f"{request.op} was cancelled")
            answer = wire.encode(wire.Failure(request.id, cancelled))
        await self._send_frame(answer)


class ClientRequest:
    """A request under way at the client (`links.Stream`)."""

    def __init__(self, client: Client, id: int, op: str) -> None:
        self.id = id
        self._client = client
        self._op = op
        self.abandoned = False
        """Leaving the request does not cancel it: the one for whom it was asked may ask for it again."""
        self._items_in, self._items = trio.open_memory_channel[dict[str, Any]](QUEUE)
        self._done = trio.Event()
        self._answer: wire.Result | wire.Failure | None = None

    async def send(self, value: dict[str, Any]) -> None:
        """Send an input."""
        await self._client.send(wire.Input(self.id, value))

    def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        return self._iterate()

    async def _iterate(self) -> AsyncGenerator[dict[str, Any], None]:
        async for item in self._items:
            yield item
        await self.result()

    async def result(self) -> Any:
        """Wait for the end; items not yet read are dropped. Raises `OperationError`."""
        self._items.close()
        await self._done.wait()
        if isinstance(self._answer, wire.Result):
            return self._answer.result
        assert self._answer is not None
        raise self._answer.error

    @property
    def ended(self) -> bool:
        return self._done.is_set()

    async def take_item(self, item: dict[str, Any]) -> None:
        try:
            await self._items_in.send(item)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return

    def finish(self, answer: wire.Result | wire.Failure) -> None:
        self._answer = answer
        self._items_in.close()
        self._done.set()


class Client:
    """The asking end of a connection. `run` must be running in somebody's nursery."""

    def __init__(self, stream: trio.abc.Stream, where: str) -> None:
        self.where = where
        self.closed = False
        self._stream = stream
        self._framed = _Framed(stream, wire.LIMIT)
        self._requests: dict[int, ClientRequest] = {}
        self._next = 1

    async def run(self) -> None:
        """Read and write until the connection ends; every open request then fails with `unreachable`."""
        reason = f"the connection to {self.where} was lost"
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write, nursery.cancel_scope)
                try:
                    async for message in self._framed.messages():
                        await self._take(message)
                except wire.WireError as error:
                    reason = f"{self.where} sent what cannot be understood: {error}"
                nursery.cancel_scope.cancel()
        finally:
            self.closed = True
            for request in list(self._requests.values()):
                request.finish(wire.Failure(request.id, OperationError("unreachable", reason)))
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(self._stream)

    async def _write(self, scope: trio.CancelScope) -> None:
        await self._framed.write()
        scope.cancel()

    async def _take(self, message: wire.Message) -> None:
        match message:
            case wire.Item(id, item) if id in self._requests:
                await self._requests[id].take_item(item)
            case wire.Result(id) | wire.Failure(id):
                if id == 0 and isinstance(message, wire.Failure):
                    raise wire.WireError(message.error.message)
                if id in self._requests:
                    self._requests.pop(id).finish(message)
            case wire.Request() | wire.Input() | wire.Cancel():
                raise wire.WireError("a server sent what only a client sends")

    async def send(self, message: wire.Message) -> None:
        """Queue a message; raises `OperationError(unreachable)` when the connection has ended."""
        try:
            await self._framed.send(message)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise OperationError("unreachable", f"the connection to {self.where} was lost") from None

    @asynccontextmanager
    async def request(
        self,
        op: str,
        args: Arguments | Mapping[str, Any] | None = None,
        hops: int = 0,
        key: str = "",
    ) -> AsyncGenerator[ClientRequest, None]:
        """Begin a request; leaving the block before its result cancels it at the server."""
        if self.closed:
            raise OperationError("unreachable", f"the connection to {self.where} was lost")
        request = ClientRequest(self, self._next, op)
        self._next += 1
        self._requests[request.id] = request
        try:
            await self.send(wire.Request(request.id, op, as_map(args), hops, key))
            yield request
        finally:
            if not request.ended and not request.abandoned and not self.closed:
                with trio.CancelScope(deadline=trio.current_time() + CANCEL_TIMEOUT, shield=True):
                    await self._cancel(request, wait=bool(key))
            self._requests.pop(request.id, None)

    async def _cancel(self, request: ClientRequest, *, wait: bool) -> None:
        """Take a request back; with `wait` until the server has heard it, which a lost connection is not."""
        with suppress(OperationError):
            await self.send(wire.Cancel(request.id))
            if wait:
                await request.result()

    async def call(
        self,
        op: str,
        args: Arguments | Mapping[str, Any] | None = None,
        timeout: float = 10.0,
        hops: int = 0,
        key: str = "",
    ) -> Any:
        """The result of `op`; items are dropped. Raises the server's `OperationError`, or `timeout`."""
        with trio.move_on_after(timeout):
            async with self.request(op, args, hops, key) as request:
                return await request.result()
        raise OperationError("timeout", f"{self.where} did not answer {op} within {timeout:g} s")


def as_map(args: Arguments | Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments as they go on the wire."""
    if args is None:
        return {}
    if isinstance(args, Arguments):
        return args.model_dump(mode="python", exclude_defaults=True)
    return dict(args)
