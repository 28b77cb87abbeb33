# SPDX-License-Identifier: Apache-2.0
"""Who may come in: the TCP port for peers, users and bulk data, and the unix socket for this machine's
owner.

The first byte tells TLS (0x16) from a bulk connection ("M"); it is looked at without being taken. A TLS
client whose key the catalog lists is that peer or user; one without a certificate is a stranger, who may
only join or log in. On the unix socket the kernel vouches for the caller: the same uid has role admin,
nobody else gets in.

When the catalog no longer lists a key, its connections end.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
import struct
from collections.abc import Callable
from pathlib import Path

import structlog
import trio

from mobid import rpc, tls
from mobid.bulk import Bulk
from mobid.identity import Identity
from mobid.mail import FAREWELL, PROTOCOL, Mail
from mobid.operations import Caller
from mobid.signal import Changed
from proto.api import OperationError, Role
from proto.identity import IdentityError, peer_id, public_key
from proto.state import State

MAX_CONNECTIONS = 512
"""Connections at once. As many may wait to be accepted, which a busy peer does late: who comes to a full
queue of a Unix socket takes itself for connected and finds the connection lost."""

MAX_STRANGERS = 32
"""Connections that have not yet proved who they are; more are closed at once."""

HANDSHAKE_TIMEOUT = 15.0

EVICTION_GRACE = 1.0
"""A peer whose key was just removed may still read why."""

log = structlog.get_logger()


def identify(state: State, certificate: bytes | None) -> Caller | None:
    """Whose certificate (DER) this is; None for one that the catalog does not list."""
    if certificate is None:
        return Caller(Role.ANONYMOUS)
    try:
        id = peer_id(public_key(certificate))
    except IdentityError:
        return None
    member = state.members.get(id)
    if member and member.status == "member" and member.certificate == certificate:
        return Caller(Role.PEER, id, member.name)
    user = state.users.get(id)
    if user and user.certificate == certificate:
        return Caller(Role.parse(user.role), id, user.name)
    return None


def open_tcp(address: tuple[str, int]) -> trio.SocketListener:
    """Listen on (address, port); raises `OperationError` if that cannot be."""
    host, port = address
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(MAX_CONNECTIONS)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise OperationError(
                "exists",
                f"port {port} on {host} is in use by another program",
                "choose another with --listen",
            ) from None
        raise OperationError(
            "failed", f"cannot listen on {host}:{port}: {error}", "give an address of this host with --listen"
        ) from None
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock))


def open_unix(path: Path) -> trio.SocketListener:
    """Listen on the peer's own socket; the directory lock has made sure that nobody else does."""
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        sock.bind(str(path))
        sock.listen(MAX_CONNECTIONS)
    except OSError as error:
        sock.close()
        raise OperationError(
            "failed", f"cannot make the socket {path}: {error}", "set XDG_RUNTIME_DIR to a shorter path"
        ) from None
    finally:
        os.umask(before)
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock))


class Server:
    """Accepts connections and gives each its caller."""

    def __init__(
        self,
        identity: Identity,
        state: Callable[[], State],
        changed: Changed,
        run: rpc.Runner,
        bulk: Bulk,
        *,
        mail: Mail | None = None,
    ) -> None:
        self._identity = identity
        self._state = state
        self._changed = changed
        self._run = run
        self._bulk = bulk
        self._mail = mail
        self._context: tuple[tuple[bytes, ...], ssl.SSLContext] | None = None
        self._open: dict[trio.CancelScope, tuple[bytes, Caller, float]] = {}
        self._connections = 0
        self._strangers = 0

    async def serve(self, tcp: trio.SocketListener, unix: trio.SocketListener) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch)
            nursery.start_soon(trio.serve_listeners, self._accept_tcp, [tcp])
            nursery.start_soon(trio.serve_listeners, self._accept_unix, [unix])

    # The unix socket.

    async def _accept_unix(self, stream: trio.SocketStream) -> None:
        credentials = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        _pid, uid, _gid = struct.unpack("3i", credentials)
        if uid != os.getuid() or self._connections >= MAX_CONNECTIONS:
            await stream.aclose()
            return
        await self._serve(stream, Caller(Role.ADMIN, name="local"))

    async def _serve(self, stream: trio.abc.Stream, caller: Caller) -> None:
        self._connections += 1
        try:
            await rpc.ServerConnection(stream, caller, self._run).serve()
        finally:
            self._connections -= 1

    # TCP.

    async def _accept_tcp(self, stream: trio.SocketStream) -> None:
        """Never raises: whatever comes from the network ends here."""
        if self._strangers >= MAX_STRANGERS or self._connections >= MAX_CONNECTIONS:
            await stream.aclose()
            return
        self._strangers += 1
        first = b""
        try:
            with trio.move_on_after(HANDSHAKE_TIMEOUT):
                first = await stream.socket.recv(1, socket.MSG_PEEK)
                if first == b"M":
                    await self._bulk.take(stream.socket)
                    return
            if first != b"\x16":
                await trio.aclose_forcefully(stream)
                return
            secured = await self._secure(stream)
        except OSError:
            await trio.aclose_forcefully(stream)
            return
        finally:
            self._strangers -= 1
        if secured is not None:
            await self._serve_secured(secured)

    async def _secure(self, stream: trio.SocketStream) -> trio.SSLStream[trio.SocketStream] | None:
        secured = trio.SSLStream(stream, self._current_context(), server_side=True, https_compatible=True)
        with trio.move_on_after(HANDSHAKE_TIMEOUT):
            try:
                await secured.do_handshake()
                return secured
            except (trio.BrokenResourceError, ssl.SSLError) as error:
                log.warning("connection.refused", reason=str(error.__cause__ or error))
        await trio.aclose_forcefully(stream)
        return None

    async def _serve_secured(self, stream: trio.SSLStream[trio.SocketStream]) -> None:
        if stream.selected_alpn_protocol() is None:
            await tls.refuse_protocol(stream)
            return
        certificate: bytes | None = stream.getpeercert(binary_form=True)
        caller = identify(self._state(), certificate)
        if caller is None:
            await trio.aclose_forcefully(stream)
            return
        with trio.CancelScope() as scope:
            if certificate is None:
                await self._serve_stranger(stream, caller)
                return
            is_mail = stream.selected_alpn_protocol() == PROTOCOL
            self._open[scope] = (certificate, caller, FAREWELL if is_mail else EVICTION_GRACE)
            try:
                if self._mail is not None and is_mail:
                    await self._take_mail(self._mail, stream, caller)
                else:
                    await self._serve(stream, caller)
            finally:
                del self._open[scope]

    async def _take_mail(self, mail: Mail, stream: trio.SSLStream[trio.SocketStream], caller: Caller) -> None:
        if caller.role is not Role.PEER:
            await trio.aclose_forcefully(stream)
            return
        self._connections += 1
        try:
            await mail.take(stream, caller.id)
        finally:
            self._connections -= 1

    async def _serve_stranger(self, stream: trio.abc.Stream, caller: Caller) -> None:
        if self._strangers >= MAX_STRANGERS:
            await trio.aclose_forcefully(stream)
            return
        self._strangers += 1
        try:
            await self._serve(stream, caller)
        finally:
            self._strangers -= 1

    def _current_context(self) -> ssl.SSLContext:
        state = self._state()
        trusted = tuple(
            [member.certificate for member in state.members.values() if member.status == "member"]
            + [user.certificate for user in state.users.values()]
        )
        if self._context is None or self._context[0] != trusted:
            self._context = (trusted, tls.server_context(self._identity, trusted, [PROTOCOL]))
        return self._context[1]

    async def _watch(self) -> None:
        """End the connections of those who lost their right to them."""
        state = self._state()
        while True:
            before = state
            await self._changed.wait()
            state = self._state()
            if state.members is before.members and state.users is before.users:
                continue
            for scope, (certificate, caller, grace) in self._open.items():
                if identify(state, certificate) != caller:
                    scope.deadline = min(scope.deadline, trio.current_time() + grace)
