# SPDX-License-Identifier: Apache-2.0
"""Connections to the other peers: calls, streams, and raw sockets for bulk data.

Calls to one peer share a TLS connection, which is made when it is first needed and again, with growing
pauses, when it breaks. A stream has a connection of its own, so that a slow reader holds up nobody else. A
bulk connection is plain TCP to the same port (`mobid/bulk.py`).

A shared connection to a host that vanished does not break by itself. It is given up when gossip finds the
peer dead (`drop`), or when answers do not come.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import AbstractContextManager, asynccontextmanager
from typing import Any, Protocol

import structlog
import trio
import trio.testing

from mobid import rpc, tls
from mobid.bulk import Bulk, Expectation
from mobid.bulk import connect as connect_bulk
from mobid.gossip import Liveness
from mobid.identity import Identity
from mobid.operations import Caller
from mobid.tasks import background
from proto.api import Arguments, OperationError, Role
from proto.entries import Member
from proto.identity import public_key
from proto.state import State

CONNECT_TIMEOUT = 10.0
PING_TIMEOUT = 3.0
LOST_ANSWERS = 2
"""After so many unanswered calls in a row the shared connection is given up and made anew."""

STRANGERS_INTERVAL = 1.0
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 1.5

log = structlog.get_logger()


class Stream(Protocol):
    """A request under way at another peer."""

    def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        """The items, until the request ends; raises `OperationError` if it ends with an error."""
        ...

    abandoned: bool

    async def send(self, value: dict[str, Any]) -> None:
        """Send an input."""
        ...

    async def result(self) -> Any:
        """The result; items not yet read are dropped. Raises `OperationError`."""
        ...


class Sight(Protocol):
    """How peers look: `mobid.gossip`."""

    def liveness(self, peer: str) -> Liveness: ...

    def last_answer(self, peer: str) -> dict[str, Any]: ...


class _Link:
    """The shared connection to one peer, and how long to wait before the next attempt."""

    def __init__(self) -> None:
        self.lock = trio.Lock()
        self.client: rpc.Client | None = None
        self.scope: trio.CancelScope | None = None
        self.pause = 0.0
        self.not_before = 0.0
        self.lost_answers = 0

    def drop(self) -> None:
        if self.scope is not None:
            self.scope.cancel()
        self.client = self.scope = None
        self.lost_answers = 0


class Links:
    """What a peer uses to reach the others; a peer is always named by its id."""

    def __init__(
        self,
        identity: Identity,
        state: Callable[[], State],
        local: rpc.Runner,
        sight: Sight,
    ) -> None:
        self._identity = identity
        self._state = state
        self._local = local
        self._sight = sight
        self._context = tls.client_context(identity)
        self._links: dict[str, _Link] = {}
        self._nursery: trio.Nursery | None = None
        self._running = trio.Event()
        self.incoming_bulk = Bulk()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the connections, for ever."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._running.set()
            task_status.started()
            try:
                while True:
                    self._drop_strangers()
                    await trio.sleep(STRANGERS_INTERVAL)
            finally:
                self._nursery = None

    # Asking.

    async def call(
        self,
        peer: str,
        op: str,
        args: Arguments | Mapping[str, Any] | None = None,
        timeout: float = 10.0,
    ) -> Any:
        """Ask `peer` for `op`; raises its `OperationError`, or `unreachable`, or `timeout`.

        This peer's own id is answered without a connection.
        """
        if peer == self._identity.id:
            return await self._local_call(op, args, timeout)
        name = self._state().peer_name(peer)
        deadline = trio.current_time() + timeout
        client: rpc.Client | None = None
        with trio.move_on_at(deadline):
            client = await self._client(peer)
            try:
                # The deadline passes before this timeout does, so that an error is the peer's own.
                answer = await client.call(op, args, timeout)
            except OperationError:
                self._heard(peer)
                raise
            self._heard(peer)
            return answer
        if client is not None:
            self._lost_answer(peer, client)
        raise OperationError("timeout", f"{name} did not answer {op} within {timeout:g} s")

    async def _local_call(self, op: str, args: Arguments | Mapping[str, Any] | None, timeout: float) -> Any:
        async with self._local_stream(op, args) as stream:
            with trio.move_on_after(timeout):
                return await stream.result()
        raise OperationError("timeout", f"{op} did not end within {timeout:g} s")

    @asynccontextmanager
    async def stream(
        self,
        peer: str,
        op: str,
        args: Arguments | Mapping[str, Any] | None = None,
        timeout: float = 10.0,
        *,
        hops: int = 0,
        key: str = "",
    ) -> AsyncGenerator[Stream, None]:
        """`async with links.stream(peer, op, args) as stream:`; leaving the block cancels the request.

        `timeout` is for the connection only.
        """
        if peer == self._identity.id:
            async with self._local_stream(op, args) as local:
                yield local
            return
        member = self._member(peer)
        connection: trio.SSLStream[trio.SocketStream] | None = None
        with trio.move_on_after(timeout):
            connection = await self._connect(member)
        if connection is None:
            raise OperationError(
                "unreachable", f"{member.name} at {member.address} did not answer in {timeout:g} s"
            )
        client = rpc.Client(connection, member.name)
        async with background(client.run), client.request(op, args, hops, key) as request:
            yield request

    @asynccontextmanager
    async def _local_stream(
        self, op: str, args: Arguments | Mapping[str, Any] | None
    ) -> AsyncGenerator[Stream, None]:
        """This peer asking itself goes through the same code as anybody, over a stream in memory."""
        ours, theirs = trio.testing.memory_stream_pair()
        caller = Caller(Role.PEER, self._identity.id, self._state().peer_name(self._identity.id))
        server = rpc.ServerConnection(theirs, caller, self._local)
        client = rpc.Client(ours, "this peer")
        async with background(server.serve, client.run), client.request(op, args) as request:
            yield request

    async def bulk(self, peer: str, preamble: bytes, timeout: float = 10.0) -> socket.socket:
        """A TCP connection to `peer` on which `preamble` was written: a blocking socket to hand on.

        Raises `OperationError(unreachable)`.
        """
        member = self._member(peer)
        reason = f"no answer in {timeout:g} s"
        with trio.move_on_after(timeout):
            try:
                return await connect_bulk(*_split(member.address), preamble)
            except OSError as error:
                reason = str(error)
        raise OperationError(
            "unreachable", f"no bulk connection to {member.name} at {member.address}: {reason}"
        )

    def expect(self, migration: bytes, stream: int = 0) -> AbstractContextManager[Expectation]:
        """`with links.expect(id) as expected: … await expected.wait(10)`: lets one bulk connection in."""
        return self.incoming_bulk.expect(migration, stream)

    def liveness(self, peer: str) -> Liveness:
        """How this peer (id) looks from here; the own one is always alive."""
        return self._sight.liveness(peer)

    def last_answer(self, peer: str) -> dict[str, Any]:
        """What a peer last told of its host (`memory_free`); empty if nothing yet."""
        return self._sight.last_answer(peer)

    # Connecting.

    def _member(self, peer: str) -> Member:
        member = self._state().members.get(peer)
        if member is None or member.status != "member":
            raise OperationError("not-found", f"{self._state().peer_name(peer)} is no member of this mesh")
        return member

    async def _connect(self, member: Member) -> trio.SSLStream[trio.SocketStream]:
        return await connect_tls(member.address, self._context, public_key(member.certificate), member.name)

    async def _client(self, peer: str) -> rpc.Client:
        """The shared connection, made if need be; waits for the pause after a failure."""
        member = self._member(peer)
        await self._running.wait()
        link = self._links.setdefault(peer, _Link())
        async with link.lock:
            if link.client is not None and not link.client.closed:
                return link.client
            await trio.sleep_until(link.not_before)
            if self._nursery is None:
                raise OperationError("unreachable", "this peer is ending")
            try:
                with trio.move_on_after(CONNECT_TIMEOUT):
                    connection = await self._connect(member)
                    link.client = rpc.Client(connection, member.name)
                    link.pause = link.not_before = 0.0
                    link.scope = trio.CancelScope()
                    self._nursery.start_soon(_run_in, link.scope, link.client)
                    return link.client
                raise OperationError("unreachable", f"{member.name} at {member.address} does not answer")
            except OperationError:
                link.pause = min(max(FIRST_PAUSE, 2 * link.pause), LONGEST_PAUSE)
                link.not_before = trio.current_time() + link.pause
                raise

    # Giving up.

    def drop(self, peer: str) -> None:
        """Give the shared connection up: the peer is dead."""
        if peer in self._links:
            self._links[peer].drop()

    def _drop_strangers(self) -> None:
        members = self._state().members
        for peer in list(self._links):
            if peer not in members or members[peer].status != "member":
                self._links.pop(peer).drop()

    def _heard(self, peer: str) -> None:
        if peer in self._links:
            self._links[peer].lost_answers = 0

    def _lost_answer(self, peer: str, client: rpc.Client) -> None:
        link = self._links.get(peer)
        if link is None or link.client is not client:
            return
        link.lost_answers += 1
        if link.lost_answers >= LOST_ANSWERS:
            link.drop()

    async def ping(self, peer: str, timeout: float = PING_TIMEOUT) -> float:
        """One round trip over the shared connection, in seconds; raises `OperationError`."""
        if peer == self._identity.id:
            return 0.0
        with trio.move_on_after(timeout):
            await self._client(peer)
            begun = trio.current_time()
            await self.call(peer, "ping", timeout=timeout)
            return trio.current_time() - begun
        raise OperationError("unreachable", f"{self._state().peer_name(peer)} does not answer")


async def _run_in(scope: trio.CancelScope, client: rpc.Client) -> None:
    with scope:
        await client.run()


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


async def connect_tls(
    address: str, context: ssl.SSLContext, key: bytes, name: str
) -> trio.SSLStream[trio.SocketStream]:
    """A TLS connection to whoever holds `key` (raw public key) at HOST:PORT; raises `OperationError`."""
    try:
        tcp = await trio.open_tcp_stream(*_split(address))
    except OSError as error:
        raise OperationError(
            "unreachable",
            f"{name} at {address} cannot be reached: {error}",
            "is it running, and the way to it open?",
        ) from None
    stream = trio.SSLStream(tcp, context, server_hostname=None, https_compatible=True)
    try:
        await stream.do_handshake()
        tls.check_pinned(stream.getpeercert(binary_form=True), key, f"{address} ({name})")
        await tls.check_protocol(stream, f"{name} at {address}")
    except (trio.BrokenResourceError, ssl.SSLError) as error:
        await trio.aclose_forcefully(tcp)
        raise OperationError(
            "unreachable", f"{name} at {address} refused a secure connection: {error}"
        ) from None
    except BaseException:
        await trio.aclose_forcefully(tcp)
        raise
    return stream
