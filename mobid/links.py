# SPDX-License-Identifier: Apache-2.0
"""Connections to the other peers: calls, streams, and raw sockets for bulk data.

Calls to one peer share a TLS connection, which is made when it is first needed and again, with growing
pauses, when it breaks. A stream has a connection of its own, so that a slow reader holds up nobody else. A
bulk connection is plain TCP to the same port (`mobid/bulk.py`).

The links also ping every member all the time, which keeps the shared connections warm, finds the broken
ones, and feeds the guess of who is alive (`proto/liveness.py`; SWIM will take its place).
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import structlog
import trio
import trio.testing

from mobid import rpc, tls
from mobid.bulk import Bulk, Expectation
from mobid.bulk import connect as connect_bulk
from mobid.identity import Identity
from mobid.operations import Caller
from mobid.tasks import background
from proto import liveness as sight
from proto.api import Arguments, OperationError, Role
from proto.entries import Member
from proto.identity import public_key
from proto.liveness import Reach
from proto.state import State

CONNECT_TIMEOUT = 10.0
PING_TIMEOUT = 3.0
LOST_PINGS = 2
"""After so many unanswered pings in a row the shared connection is given up and made anew."""

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


@dataclass(frozen=True)
class Liveness:
    """How a peer looks from here. `rtt` is a smoothed round trip in seconds, None if never measured."""

    state: Reach
    rtt: float | None


class _Link:
    """The shared connection to one peer, and how long to wait before the next attempt."""

    def __init__(self) -> None:
        self.lock = trio.Lock()
        self.client: rpc.Client | None = None
        self.scope: trio.CancelScope | None = None
        self.pause = 0.0
        self.not_before = 0.0
        self.lost_pings = 0
        self.pinging = False

    def drop(self) -> None:
        if self.scope is not None:
            self.scope.cancel()
        self.client = self.scope = None


class Links:
    """What a peer uses to reach the others; a peer is always named by its id."""

    def __init__(
        self,
        identity: Identity,
        state: Callable[[], State],
        local: rpc.Runner,
        turned: Callable[[str, Reach], None] = lambda _peer, _state: None,
    ) -> None:
        self._identity = identity
        self._state = state
        self._local = local
        self._turned = turned
        self._context = tls.client_context(identity)
        self._links: dict[str, _Link] = {}
        self._answers: dict[str, dict[str, Any]] = {}
        self._nursery: trio.Nursery | None = None
        self._running = trio.Event()
        self._liveness = sight.Liveness()
        self.incoming_bulk = Bulk()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the connections and ping the members, for ever."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._running.set()
            task_status.started()
            try:
                while True:
                    self._watch(nursery)
                    await trio.sleep(sight.INTERVAL)
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
        with trio.move_on_at(deadline):
            client = await self._client(peer)
            return await client.call(op, args, max(0.0, deadline - trio.current_time()))
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
        if peer == self._identity.id:
            return Liveness("alive", 0.0)
        return Liveness(self._liveness.state(peer), self._liveness.rtt(peer))

    def last_answer(self, peer: str) -> dict[str, Any]:
        """What a peer's last ping said of its host; empty if none was answered yet."""
        return self._answers.get(peer, {})

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

    # Pinging.

    def _watch(self, nursery: trio.Nursery) -> None:
        present = {m.id for m in self._state().members.values() if m.status == "member"}
        others = frozenset(present - {self._identity.id})
        for peer in set(self._links) - others:
            self._links.pop(peer).drop()
            self._answers.pop(peer, None)
        self._handle(sight.Members(others))
        for effect in self._handle(sight.Tick()):
            link = self._links.setdefault(effect.peer, _Link())
            if not link.pinging:
                link.pinging = True
                nursery.start_soon(self._ping, effect.peer, link)

    def _handle(self, event: sight.Members | sight.Answered | sight.Tick) -> list[sight.Ping]:
        pings = []
        for effect in self._liveness.handle(event, trio.current_time()):
            match effect:
                case sight.Ping():
                    pings.append(effect)
                case sight.Turned(peer, state):
                    self._turned(peer, state)
        return pings

    async def _ping(self, peer: str, link: _Link) -> None:
        try:
            await self.ping(peer)
            link.lost_pings = 0
        except OperationError:
            link.lost_pings += 1
            if link.lost_pings >= LOST_PINGS:
                link.drop()
        finally:
            link.pinging = False

    async def ping(self, peer: str, timeout: float = PING_TIMEOUT) -> float:
        """One round trip over the shared connection, in seconds; raises `OperationError`."""
        if peer == self._identity.id:
            return 0.0
        client = None
        with trio.move_on_after(timeout):
            client = await self._client(peer)
        if client is None:
            raise OperationError("unreachable", f"{self._state().peer_name(peer)} does not answer")
        begun = trio.current_time()
        answer = await client.call("ping", timeout=timeout)
        rtt = trio.current_time() - begun
        self._answers[peer] = answer if isinstance(answer, dict) else {}
        self._handle(sight.Answered(peer, rtt))
        return rtt


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
    except (trio.BrokenResourceError, ssl.SSLError) as error:
        await trio.aclose_forcefully(tcp)
        raise OperationError(
            "unreachable", f"{name} at {address} refused a secure connection: {error}"
        ) from None
    except BaseException:
        await trio.aclose_forcefully(tcp)
        raise
    return stream
