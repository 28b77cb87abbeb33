# SPDX-License-Identifier: Apache-2.0
"""The sockets that a peer listens on."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from pathlib import Path

from mobid.server import MAX_CONNECTIONS, open_unix


async def test_a_busy_peer_keeps_a_burst_of_clients_waiting(tmp_path: Path) -> None:
    """Nobody is accepted meanwhile; all must have a connection all the same."""
    path = tmp_path / "mobid.sock"
    listener = open_unix(path)
    with ExitStack() as stack:
        for _ in range(MAX_CONNECTIONS):
            client = stack.enter_context(
                socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            )
            client.connect(str(path))
    await listener.aclose()
