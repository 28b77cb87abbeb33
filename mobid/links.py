# SPDX-License-Identifier: Apache-2.0
"""Connections to the other peers: calls, streams, and raw sockets for bulk data.

Calls to one peer share a TLS connection, which is made when it is first needed and again, with growing
pauses, when it breaks. A stream has a connection of its own, so that a slow reader holds up nobody else. A
bulk connection is plain TCP to the same port: it begins with a preamble of 48 bytes that names a migration,
after which the socket belongs to `pages`, whose records are sealed; one that nobody expects is closed.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from proto.api import Arguments

Reach = Literal["alive", "suspect", "dead"]


class Stream(Protocol):
    """A request under way at another peer."""

    def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        """The items, until the request ends; raises `OperationError` if it ends with an error."""
        ...

    async def send(self, value: dict[str, Any]) -> None:
        """Send an input."""
        ...

    async def result(self) -> Any:
        """The result; items not yet read are dropped. Raises `OperationError`."""
        ...


class Expectation(Protocol):
    """A bulk connection that may come."""

    async def wait(self, timeout: float) -> socket.socket:
        """The socket, blocking mode, preamble consumed; raises `OperationError(timeout)`."""
        ...


@dataclass(frozen=True)
class Liveness:
    """How a peer looks from here. `rtt` is a smoothed round trip in seconds, None if never measured."""

    state: Reach
    rtt: float | None


class Links:
    """What a peer uses to reach the others; a peer is always named by its id."""

    async def call(
        self, peer: str, op: str, args: Arguments | Mapping[str, Any] | None = None, timeout: float = 10.0
    ) -> Any:
        """Ask `peer` for `op`; raises its `OperationError`, or `unreachable`, or `timeout`.

        This peer's own id is answered without a connection.
        """
        raise NotImplementedError

    def stream(
        self, peer: str, op: str, args: Arguments | Mapping[str, Any] | None = None, timeout: float = 10.0
    ) -> AbstractAsyncContextManager[Stream]:
        """`async with links.stream(peer, op, args) as stream:`; leaving the block cancels the request.

        `timeout` is for the connection only.
        """
        raise NotImplementedError

    async def bulk(self, peer: str, preamble: bytes, timeout: float = 10.0) -> socket.socket:
        """A TCP connection to `peer` on which `preamble` was written: a blocking socket to hand on.

        Raises `OperationError(unreachable)`.
        """
        raise NotImplementedError

    def expect(self, migration: bytes, stream: int = 0) -> AbstractContextManager[Expectation]:
        """`with links.expect(id) as expected: … await expected.wait(10)`: lets one bulk connection in."""
        raise NotImplementedError

    def liveness(self, peer: str) -> Liveness:
        """How this peer (id) looks from here; the own one is always alive."""
        raise NotImplementedError
