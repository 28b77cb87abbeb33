# SPDX-License-Identifier: Apache-2.0
"""Messages between peers that may get lost: one way, without an answer, and without ever making anybody wait.

`send` puts a message into the receiver's outbox and returns. A task per outbox keeps one TLS connection to
that peer, opened when there is something to send and closed when there was nothing for a while, and writes
all that waits at once. A connection that breaks is made again after a short pause; what waited for it is
thrown away, and when an outbox is full its oldest messages are dropped, since a newer one says more. So a
peer that is gone, or behind a wire that swallows everything, costs the others nothing.

On the connection a message is u32 big-endian length and its bytes. TLS's protocol negotiation (ALPN) tells
mail from requests on the same port.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import structlog
import trio

from mobid import tls
from mobid.identity import Identity
from mobid.links import connect_tls
from mobid.tasks import background
from proto.api import OperationError
from proto.entries import Member
from proto.identity import public_key
from proto.messages import LIMIT

PROTOCOL = "mobi-mail"
"""The ALPN name of a connection that carries mail."""

QUEUE_MESSAGES = 1024
QUEUE_BYTES = 16 << 20
"""What an outbox holds before its oldest messages go."""

CONNECT_TIMEOUT = 3.0
FIRST_PAUSE = 0.05
LONGEST_PAUSE = 1.0

FAREWELL = 10.0
"""Seconds in which a peer that has left still gets mail, and may send some: so it learns that it has left."""

IDLE = 60.0
"""A connection without traffic for so long is closed."""

UNACKNOWLEDGED = 3.0
"""A connection whose data the other host has not acknowledged for so long is broken.

Left alone, TCP would wait ever longer to try again, and be silent long after the network has healed.
"""

_WRITE = 256 << 10
_READ = 256 << 10
_LENGTH = 4

log = structlog.get_logger()


class _Outbox:
    """What waits for one peer; bounded, oldest dropped."""

    def __init__(self) -> None:
        self.dropped = 0
        self._waiting: deque[bytes] = deque()
        self._size = 0
        self._filled = trio.Event()

    def put(self, data: bytes) -> None:
        self._waiting.append(data)
        self._size += len(data)
        while len(self._waiting) > QUEUE_MESSAGES or (self._size > QUEUE_BYTES and len(self._waiting) > 1):
            self._size -= len(self._waiting.popleft())
            self.dropped += 1
        self._filled.set()

    def clear(self) -> None:
        self.dropped += len(self._waiting)
        self._waiting.clear()
        self._size = 0

    async def filled(self) -> None:
        """Wait until there is something."""
        if not self._waiting:
            self._filled = trio.Event()
            await self._filled.wait()

    def take(self) -> bytes:
        """Frames of what waits, about `_WRITE` bytes at most."""
        parts: list[bytes] = []
        size = 0
        while self._waiting and (not parts or size + len(self._waiting[0]) <= _WRITE):
            data = self._waiting.popleft()
            parts += (len(data).to_bytes(_LENGTH, "big"), data)
            size += len(data)
        self._size -= size
        return b"".join(parts)


class Mail:
    """All the mail of one peer. `run` must be running before anything leaves."""

    def __init__(
        self,
        identity: Identity,
        member: Callable[[str], Member | None],
        receive: Callable[[str, bytes], None],
    ) -> None:
        """`member(id)` says where a peer is, None if it is none of ours (any more).

        `receive(id, data)` gets what comes from a peer, whose key the connection proved; it must not block.
        """
        self._member = member
        self._receive = receive
        self._context = tls.client_context(identity, PROTOCOL)
        self._outboxes: dict[str, _Outbox] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the outgoing connections, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for peer, outbox in self._outboxes.items():
                nursery.start_soon(self._deliver, peer, outbox)
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    # Sending.

    def send(self, peer: str, data: bytes) -> None:
        """Send `data` to a peer, perhaps; never waits. What is for strangers is dropped."""
        outbox = self._outboxes.get(peer)
        if outbox is None:
            if self._member(peer) is None:
                return
            outbox = self._outboxes[peer] = _Outbox()
            if self._nursery is not None:
                self._nursery.start_soon(self._deliver, peer, outbox)
        outbox.put(data)

    async def _deliver(self, peer: str, outbox: _Outbox) -> None:
        """Empty one outbox as long as its peer is a member."""
        pause = FIRST_PAUSE
        try:
            while (member := self._member(peer)) is not None:
                await outbox.filled()
                before = trio.current_time()
                try:
                    await self._connect_and_write(member, outbox)
                except OperationError as error:
                    outbox.clear()
                    log.debug("mail.broken", peer=member.name, reason=error.message, dropped=outbox.dropped)
                if trio.current_time() - before > LONGEST_PAUSE:
                    pause = FIRST_PAUSE
                await trio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
        finally:
            if self._outboxes.get(peer) is outbox:
                del self._outboxes[peer]

    async def _connect_and_write(self, member: Member, outbox: _Outbox) -> None:
        """One connection, from its first message to its last; raises `OperationError` when it breaks."""
        stream: trio.SSLStream[trio.SocketStream] | None = None
        with trio.move_on_after(CONNECT_TIMEOUT):
            stream = await connect_tls(
                member.address, self._context, public_key(member.certificate), member.name
            )
        if stream is None:
            raise OperationError("unreachable", f"{member.name} at {member.address} does not answer")
        impatient(stream.transport_stream.socket)
        try:
            async with background() as nursery:
                nursery.start_soon(_notice_end, stream, nursery.cancel_scope)
                await self._write(member, outbox, stream)
        finally:
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(stream)

    async def _write(
        self, member: Member, outbox: _Outbox, stream: trio.SSLStream[trio.SocketStream]
    ) -> None:
        while self._member(member.id) is member:
            with trio.move_on_after(IDLE) as idle:
                await outbox.filled()
            if idle.cancelled_caught:
                return
            try:
                await stream.send_all(outbox.take())
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise OperationError(
                    "unreachable", f"the connection was lost: {error.__cause__ or error}"
                ) from None

    # Receiving.

    async def take(self, stream: trio.abc.Stream, peer: str) -> None:
        """Receive what `peer` sends over a connection that it opened, until that ends. Closes it."""
        try:
            await self._read(stream, peer)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return
        finally:
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(stream)

    async def _read(self, stream: trio.abc.Stream, peer: str) -> None:
        buffer = bytearray()
        with trio.move_on_after(2 * IDLE) as patience:
            while data := await stream.receive_some(_READ):
                now = trio.current_time()
                if patience.deadline < now + IDLE:
                    patience.deadline = now + 2 * IDLE
                buffer += data
                if not self._split(buffer, peer):
                    return

    def _split(self, buffer: bytearray, peer: str) -> bool:
        """Take the whole messages out of the buffer; False if there is one that is too large."""
        at = 0
        while len(buffer) - at >= _LENGTH:
            length = int.from_bytes(buffer[at : at + _LENGTH], "big")
            if length > LIMIT:
                log.warning("mail.refused", peer=peer, reason=f"a message of {length} bytes")
                return False
            if len(buffer) - at < _LENGTH + length:
                break
            self._receive(peer, bytes(buffer[at + _LENGTH : at + _LENGTH + length]))
            at += _LENGTH + length
        del buffer[:at]
        return True


def impatient(sock: trio.socket.SocketType) -> None:
    """Send at once, and give up soon when nothing is acknowledged."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(UNACKNOWLEDGED * 1000))


async def _notice_end(stream: trio.SSLStream[trio.SocketStream], scope: trio.CancelScope) -> None:
    """A receiver sends nothing: whatever comes here is the end."""
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        await stream.receive_some(1)
    scope.cancel()
