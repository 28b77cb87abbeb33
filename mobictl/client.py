# SPDX-License-Identifier: Apache-2.0
"""The public Python client of a peer.

A program talks to one peer, any one, and that peer forwards what is not its own business. Over the peer's
unix socket the caller is its owner; over TCP both sides show a key: the user's, enrolled by `mobictl
login`, and the peer's, which must be among those that the mesh told at the login.

Under trio:

    async with connect("unix:/run/…/mobid.sock") as client:
        guests = await client.call("vm.ls")
        async with client.request("vm.migrate", {"vm": "protocol", "to": "amsterdam"}) as request:
            async for item in request:
                print(item)
            record = await request.result()

Without trio, `Mesh("127.0.0.1:7400").call("vm.ls")` does the same and blocks.

Whatever goes wrong is an `OperationError` with a code, a sentence and a hint; it is a `PeerLost` if the
peer does not answer (any more). A request whose block is left before its result, by Ctrl-C too, is cancelled
at the peer. Each request carries a key: asked again with the same one, at any peer, it is done once.
"""

from __future__ import annotations

import secrets
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import trio

from mobictl.credentials import Credentials
from proto import versions, wire
from proto.api import Arguments, OperationError
from proto.identity import IdentityError, public_key

CONNECT_TIMEOUT: Final = 10.0
SEND_TIMEOUT: Final = 60.0
CANCEL_TIMEOUT: Final = 2.0
CALL_TIMEOUT: Final = 120.0
WATCH_INTERVAL: Final = 2.0
WATCH_TIMEOUT: Final = 8.0
"""A watched peer that leaves a ping unanswered for so long is given up."""
QUEUE: Final = 64
_CHUNK: Final = 64 << 10

Args = Arguments | Mapping[str, Any] | None


def new_key() -> str:
    """A key for a command."""
    return secrets.token_hex(16)


class PeerLost(OperationError):
    """The asked peer cannot be reached, or the connection to it was lost: another one may be asked."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__("unreachable", message, hint)


class Request:
    """One request under way: iterate over its items, `send` inputs, then take its `result`."""

    def __init__(self, client: Client, id: int, op: str) -> None:
        self.id = id
        self.op = op
        self._client = client
        self._put, self._items = trio.open_memory_channel[dict[str, Any]](QUEUE)
        self._answer: wire.Result | wire.Failure | None = None
        self._done = trio.Event()

    async def send(self, value: dict[str, Any]) -> None:
        """Give the request an input. Raises OperationError(unreachable)."""
        await self._client.send(wire.Input(self.id, value))

    async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        async for item in self._items:
            yield item
        if isinstance(self._answer, wire.Failure):
            raise self._answer.error

    async def result(self) -> Any:
        """Wait for the end; items not yet read are dropped. Raises the peer's OperationError."""
        self._items.close()
        await self._done.wait()
        if isinstance(self._answer, wire.Failure):
            raise self._answer.error
        return self._answer.result if self._answer is not None else None

    @property
    def ended(self) -> bool:
        return self._done.is_set()

    async def take(self, item: dict[str, Any]) -> None:
        try:
            await self._put.send(item)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return

    def finish(self, answer: wire.Result | wire.Failure) -> None:
        self._answer = answer
        self._put.close()
        self._done.set()


class Client:
    """A connection to one peer; `connect` makes it. Requests may run side by side."""

    def __init__(self, stream: trio.abc.Stream, where: str) -> None:
        self.where = where
        self._stream = stream
        self._decoder = wire.Decoder()
        self._requests: dict[int, Request] = {}
        self.remarks: dict[str, None] = {}
        """What the peer remarked on its results: that they may be old, and why."""
        self._next = 1
        self._lost: OperationError | None = None
        self._writing = trio.Lock()

    async def send(self, message: wire.Message) -> None:
        """Write one message; raises OperationError(unreachable) when the connection is gone.

        A frame is written as a whole or the connection is given up: a cancelled sender must not leave half of
        one, on which the next frame would be misread.
        """
        frame = wire.encode(message)
        async with self._writing:
            if self._lost is not None:
                raise self._lost
            try:
                with trio.CancelScope(shield=True), trio.fail_after(SEND_TIMEOUT):
                    await self._stream.send_all(frame)
            except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
                raise self._lose(f"the connection to {self.where} was lost") from None
        await trio.lowlevel.checkpoint()

    def _lose(self, reason: str) -> OperationError:
        if self._lost is None:
            self._lost = PeerLost(reason, "see whether the peer still runs: mobictl status")
        for request in list(self._requests.values()):
            request.finish(wire.Failure(request.id, self._lost))
        self._requests.clear()
        return self._lost

    async def read(self) -> None:
        """Hand every message to its request until the connection ends; run by `connect`."""
        reason = f"the connection to {self.where} was lost"
        try:
            while data := await self._stream.receive_some(_CHUNK):
                for message in self._decoder.feed(data):
                    await self._take(message)
        except (trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError) as error:
            if "alert" in str(error.__cause__):
                reason = f"{self.where} does not accept this user's key"
        except wire.WireError as error:
            reason = f"{self.where} sent what cannot be understood: {error}"
        finally:
            self._lose(reason)

    async def _take(self, message: wire.Message) -> None:
        match message:
            case wire.Item(id, item):
                if id in self._requests:
                    await self._requests[id].take(item)
            case wire.Failure(0, error):
                raise wire.WireError(error.message)
            case wire.Result(id) | wire.Failure(id):
                if isinstance(message, wire.Result) and message.remark:
                    self.remarks[message.remark] = None
                request = self._requests.pop(id, None)
                if request is not None:
                    request.finish(message)
            case _:
                raise wire.WireError("a message that only a client sends")

    @asynccontextmanager
    async def request(self, op: str, args: Args = None, *, key: str = "") -> AsyncGenerator[Request, None]:
        """Begin `op`; leaving the block before its result cancels it at the peer and waits for that.

        Another attempt of a command has the `key` of the first; without one it is a command of its own.
        """
        if self._lost is not None:
            raise self._lost
        request = Request(self, self._next, op)
        self._next += 1
        self._requests[request.id] = request
        try:
            await self.send(wire.Request(request.id, op, arguments(args), key=key or new_key()))
            yield request
        finally:
            if not request.ended:
                await self._cancel(request)
            self._requests.pop(request.id, None)

    async def _cancel(self, request: Request) -> None:
        with trio.move_on_after(CANCEL_TIMEOUT) as scope:
            scope.shield = True
            try:
                await self.send(wire.Cancel(request.id))
                await request.result()
            except OperationError:
                return

    async def call(
        self,
        op: str,
        args: Args = None,
        *,
        timeout: float = CALL_TIMEOUT,
        on_item: Callable[[dict[str, Any]], None] | None = None,
        key: str = "",
    ) -> Any:
        """The result of `op`; `on_item` sees each item. `timeout` in seconds. Raises OperationError."""
        with trio.move_on_after(timeout):
            async with self.request(op, args, key=key) as request:
                if on_item is not None:
                    async for item in request:
                        on_item(item)
                return await request.result()
        raise OperationError("timeout", f"{self.where} did not answer {op} within {timeout:g} s")

    async def watch(self) -> None:
        """Ping the peer all the time, and give it up when it does not answer: a host that stands still keeps
        its connections."""
        while self._lost is None:
            await trio.sleep(WATCH_INTERVAL)
            try:
                await self.call("ping", timeout=WATCH_TIMEOUT)
            except OperationError as error:
                if error.code == "timeout":
                    self._lose(f"{self.where} does not answer any more")


def arguments(args: Args) -> dict[str, Any]:
    """Arguments as they go on the wire."""
    if isinstance(args, Arguments):
        return args.model_dump(mode="python", exclude_defaults=True)
    return dict(args or {})


@asynccontextmanager
async def connect(
    target: str,
    *,
    credentials: Credentials | None = None,
    pinned: bytes | None = None,
    timeout: float = CONNECT_TIMEOUT,
    watched: bool = False,
) -> AsyncGenerator[Client, None]:
    """A `Client` for `unix:PATH` or `HOST:PORT`. Raises OperationError(unreachable, unauthenticated).

    `watched` gives up a peer that stands still (`Client.watch`).
    `credentials` default to this user's own, as left by `mobictl login`; with `pinned`, a raw public key, the
    caller comes as a stranger to exactly that peer (that is how a login itself goes).
    """
    with trio.move_on_after(timeout) as scope:
        if target.startswith("unix:"):
            stream = await _connect_unix(Path(target.removeprefix("unix:")))
        else:
            stream = await _connect_tls(target, credentials, pinned)
    if scope.cancelled_caught:
        raise _unreachable(target, f"no answer within {timeout:g} s")
    client = Client(stream, target)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.read)
            if watched:
                nursery.start_soon(client.watch)
            try:
                yield client
            finally:
                nursery.cancel_scope.cancel()
                with trio.CancelScope(shield=True):
                    await trio.aclose_forcefully(stream)
    except BaseExceptionGroup as group:
        # The nursery is ours: whoever uses the connection shall see the error itself, not our group round it.
        raise first_error(group) from None


def _unreachable(target: str, reason: str) -> PeerLost:
    hint = (
        "start a peer with: mobictl up" if target.startswith("unix:") else "is it running, and its port open?"
    )
    return PeerLost(f"the peer at {target} cannot be reached: {reason}", hint)


def _reason(error: OSError) -> str:
    """The words of a connection error; trio wraps the attempts on several addresses."""
    inner = error.__cause__ if isinstance(error.__cause__, OSError) else error
    if isinstance(inner, OSError) and inner.strerror:
        return inner.strerror.lower()
    return " ".join(str(error).split()) or type(error).__name__


async def _connect_unix(path: Path) -> trio.abc.Stream:
    try:
        return await trio.open_unix_socket(str(path))
    except OSError as error:
        raise _unreachable(f"unix:{path}", _reason(error)) from None
    except ValueError:
        raise _unreachable(f"unix:{path}", "the path is too long for a unix socket (108 bytes)") from None


def split_address(target: str) -> tuple[str, int]:
    """`HOST:PORT` or `[ADDRESS]:PORT` → (host, port). Raises OperationError(bad-argument)."""
    host, colon, port = target.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdecimal() or not 0 < int(port) < 65536:
        raise OperationError(
            "bad-argument",
            f"{target!r} is no peer's address",
            "write HOST:PORT, or unix:PATH for a local one",
        )
    return host, int(port)


async def _connect_tls(target: str, credentials: Credentials | None, pinned: bytes | None) -> trio.abc.Stream:
    host, port = split_address(target)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    # The key is the name: it is compared below, after the handshake has proved that the peer holds it.
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(versions.names())
    allowed = {pinned} if pinned is not None else set()
    if pinned is None:
        credentials = credentials or Credentials.load()
        credentials.use(context)
        allowed = credentials.peer_keys
    try:
        tcp = await trio.open_tcp_stream(host, port)
        stream = trio.SSLStream(tcp, context, https_compatible=True)
        await stream.do_handshake()
    except (OSError, trio.BrokenResourceError) as error:
        raise _unreachable(
            target, _reason(error) if isinstance(error, OSError) else "it is no peer"
        ) from None
    try:
        shown = public_key(stream.getpeercert(binary_form=True) or b"")
    except IdentityError:
        shown = b""
    if stream.selected_alpn_protocol() is None:
        await trio.aclose_forcefully(stream)
        raise OperationError(
            "unsupported",
            f"the peer at {target} speaks none of the protocols that this mobictl does "
            f"({', '.join(versions.names())})",
            "use versions of Mobitopolo that are closer to one another",
        )
    if shown not in allowed:
        await trio.aclose_forcefully(stream)
        raise OperationError(
            "unauthenticated",
            f"whoever answers at {target} is no peer of a mesh that this user has logged into",
            "get a token from: mobictl peer token new --role operator; then: mobictl login TOKEN",
        )
    return stream


class Mesh:
    """The blocking client: every call opens a connection, does its work, closes it."""

    def __init__(self, target: str, credentials: Credentials | None = None) -> None:
        self.target = target
        self._credentials = credentials

    def call(
        self,
        op: str,
        args: Args = None,
        *,
        timeout: float = CALL_TIMEOUT,
        on_item: Callable[[dict[str, Any]], None] | None = None,
        key: str = "",
    ) -> Any:
        """As `Client.call`."""

        async def asked() -> Any:
            async with connect(self.target, credentials=self._credentials) as client:
                return await client.call(op, args, timeout=timeout, on_item=on_item, key=key)

        return run(asked)


def run(function: Callable[..., Any], *args: Any) -> Any:
    """`trio.run`, with the one error that is meant taken out of its groups."""
    try:
        return trio.run(function, *args)
    except BaseExceptionGroup as group:
        raise first_error(group) from group


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What to tell of several errors at once: Ctrl-C before all, else the first that was meant for a user."""
    flat: list[BaseException] = []
    pending: list[BaseException] = [group]
    while pending:
        error = pending.pop(0)
        if isinstance(error, BaseExceptionGroup):
            pending = [*error.exceptions, *pending]
        else:
            flat.append(error)
    for kind in (KeyboardInterrupt, OperationError):
        for error in flat:
            if isinstance(error, kind):
                return error
    return flat[0]
