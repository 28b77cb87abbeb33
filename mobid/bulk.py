# SPDX-License-Identifier: Apache-2.0
"""Raw sockets for bulk data, next to TLS on the same port.

A bulk connection begins with 48 bytes in the clear (`kernel/README.md` §6): they name a migration and a
stream of it. The receiving side has said beforehand which ones it expects; any other is closed before
anything is allocated for it. Secrecy and authenticity are not the business of this connection: the `pages`
helper seals every record with a key that went over TLS.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
import trio

from proto.api import OperationError

PREAMBLE_SIZE = 48
VERSION = 1
PREAMBLE_TIMEOUT = 10.0

_PREAMBLE = struct.Struct(">8sHHI16s16s")
_MAGIC = b"MOBITOPO"

log = structlog.get_logger()


def preamble(migration: bytes, stream: int = 0) -> bytes:
    """The 48 bytes that open a bulk connection; `migration` has 16 bytes."""
    if len(migration) != 16:
        raise ValueError("a migration's id has 16 bytes")
    return _PREAMBLE.pack(_MAGIC, VERSION, stream, 0, migration, bytes(16))


class Expectation:
    """One bulk connection that may come."""

    def __init__(self) -> None:
        self._arrived = trio.Event()
        self._socket: socket.socket | None = None

    async def wait(self, timeout: float) -> socket.socket:
        """The socket, in blocking mode, preamble consumed.

        The caller owns it. Raises `OperationError(timeout)`.
        """
        with trio.move_on_after(timeout):
            await self._arrived.wait()
        if self._socket is None:
            raise OperationError("timeout", f"no bulk connection came within {timeout:g} s")
        taken, self._socket = self._socket, None
        return taken

    def give(self, sock: socket.socket) -> None:
        self._socket = sock
        self._arrived.set()

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class Bulk:
    """The bulk connections that this peer expects."""

    def __init__(self) -> None:
        self._expected: dict[tuple[bytes, int], Expectation] = {}

    @contextmanager
    def expect(self, migration: bytes, stream: int = 0) -> Iterator[Expectation]:
        """Let one connection for this migration and stream in, as long as the block lasts."""
        key = (migration, stream)
        if key in self._expected:
            raise OperationError("exists", f"migration {migration.hex()} is expected already")
        expectation = self._expected[key] = Expectation()
        try:
            yield expectation
        finally:
            self._expected.pop(key, None)
            expectation.close()

    async def take(self, sock: trio.socket.SocketType) -> None:
        """An incoming connection whose first byte was not TLS's: match it or close it."""
        data = b""
        with sock, trio.move_on_after(PREAMBLE_TIMEOUT):
            while len(data) < PREAMBLE_SIZE:
                more = await sock.recv(PREAMBLE_SIZE - len(data))
                if not more:
                    return
                data += more
            magic, version, stream, zero, migration, zeros = _PREAMBLE.unpack(data)
            well_formed = magic == _MAGIC and version == VERSION and not zero and not any(zeros)
            expectation = self._expected.pop((migration, stream), None) if well_formed else None
            if expectation is None:
                log.warning("bulk.refused", well_formed=well_formed)
                return
            expectation.give(_detached(sock))


async def connect(host: str, port: int, opening: bytes) -> socket.socket:
    """A TCP connection on which `opening` was written, as a blocking socket; raises `OSError`."""
    stream = await trio.open_tcp_stream(host, port)
    try:
        await stream.send_all(opening)
    except trio.BrokenResourceError as error:
        raise ConnectionError(str(error)) from None
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    return _detached(stream.socket)


def _detached(sock: trio.socket.SocketType) -> socket.socket:
    plain = socket.socket(fileno=sock.detach())
    plain.setblocking(True)
    return plain
