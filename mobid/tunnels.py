# SPDX-License-Identifier: Apache-2.0
"""Keys for the tunnels between the peers' switches.

Each direction of a tunnel has keys of its own, made by the *receiver*: it tells its switch to accept the key,
then gives it to the sender over the control channel (TLS, both sides known), whose switch seals with it from
there on. A key lives in one switch process at each end, so counters never repeat. It is replaced every hour,
when the own switch is a new process, when the other peer says that its switch is a new process, and when a
peer has left the mesh. The old key holds for a moment beside the new one, so no frame is lost by that.
"""

from __future__ import annotations

import ipaddress
import secrets
import socket
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Protocol

import structlog
import trio
from pydantic import Field

from mobid.helpers import HelperError
from mobid.operations import Request, operation
from mobid.signal import Changed
from mobid.switch import Switch
from proto.api import Arguments, OperationError
from proto.state import State

logger = structlog.get_logger(__name__)

REKEY_INTERVAL = 3600.0
CALL_TIMEOUT = 10.0
FIRST_PAUSE = 0.2
LONGEST_PAUSE = 5.0


class TunnelKey(Arguments):
    """`tunnel.key`, from a member about itself: seal what goes to me with this key and send it to this UDP
    port of my address. `switch` names the switch process the key lives in."""

    switch: Annotated[str, Field(max_length=64)]
    port: Annotated[int, Field(ge=1, le=65535)]
    key_id: Annotated[int, Field(ge=0, lt=2**32)]
    key: Annotated[bytes, Field(min_length=32, max_length=32)] = Field(repr=False)


class Reaching(Protocol):
    """What the tunnels need of the links."""

    async def call(
        self, peer: str, op: str, args: Arguments | Mapping[str, Any] | None = None, timeout: float = 10.0
    ) -> Any: ...


class _Tunnel:
    """What is known of the other end."""

    def __init__(self) -> None:
        self.given_to = ""
        """Which of its switch processes has our key."""
        self.given = Changed()
        self.wanted = trio.Event()
        """Set when a new key has to be given to it."""
        self.sends_to = ""
        """Which of our switch processes the peer was given a key of."""
        self.pending: TunnelKey | None = None
        """A key our switch accepts and the peer may not have got. It is given again, never replaced: the
        switch keeps few keys, and the one in use must not be pushed out by attempts that fail."""


class Tunnels:
    """The keys of one peer. `switch` gives the running switch, or None while there is none; `introduced` is
    called when that switch has come to know a peer."""

    def __init__(
        self,
        own: str,
        state: Callable[[], State],
        links: Reaching,
        switch: Callable[[], Switch | None],
        introduced: Callable[[], None],
    ) -> None:
        self._own = own
        self._state = state
        self._links = links
        self._switch = switch
        self._introduced = introduced
        self._tunnels: dict[str, _Tunnel] = {}

    async def keep(self, switch: Switch, peer: str) -> None:
        """Give `peer` (id) keys for frames to this switch, for ever; ends by cancellation."""
        tunnel = self._tunnels.setdefault(peer, _Tunnel())
        pause = FIRST_PAUSE
        while True:
            tunnel.wanted = trio.Event()
            try:
                await self._give_key(switch, peer, tunnel)
            except (OperationError, HelperError) as error:
                logger.debug("tunnel.key.not.given", peer=self._state().peer_name(peer), reason=error.message)
                with trio.move_on_after(pause):
                    await tunnel.wanted.wait()
                pause = min(2 * pause, LONGEST_PAUSE)
                continue
            pause = FIRST_PAUSE
            with trio.move_on_after(REKEY_INTERVAL):
                await tunnel.wanted.wait()

    async def wait_given(self, peer: str) -> None:
        """Wait until `peer` (id) can send frames to the switch that runs here now."""
        tunnel = self._tunnels.setdefault(peer, _Tunnel())

        def given() -> bool:
            switch = self._switch()
            return switch is not None and tunnel.sends_to == switch.instance

        await tunnel.given.wait_until(given)

    def forget(self, peer: str) -> None:
        """This peer has no tunnel with that one any more."""
        self._tunnels.pop(peer, None)

    def renew(self) -> None:
        """Give every peer a new key."""
        for tunnel in self._tunnels.values():
            tunnel.wanted.set()

    async def _give_key(self, switch: Switch, peer: str, tunnel: _Tunnel) -> None:
        key = tunnel.pending
        if key is None or key.switch != switch.instance:
            key = TunnelKey(
                switch=switch.instance,
                port=switch.udp_port,
                key_id=secrets.randbits(32),
                key=secrets.token_bytes(32),
            )
            first = not switch.knows(peer)
            await switch.add_key(peer, key.key_id, key.key)
            tunnel.pending = key
            if first:
                self._introduced()
        answer = await self._links.call(peer, "tunnel.key", key, timeout=CALL_TIMEOUT)
        tunnel.pending, tunnel.sends_to = None, switch.instance
        tunnel.given_to = str(answer["switch"])
        tunnel.given.set()

    @operation("tunnel.key", role="peer", args=TunnelKey)
    async def take_key(self, request: Request, args: TunnelKey) -> dict[str, str]:
        """A member gives us a key for frames to it; the answer is `{switch}`, who has it now."""
        peer = request.caller.id
        switch, member = self._switch(), self._state().members.get(peer)
        if switch is None or member is None or not switch.knows(peer):
            raise OperationError("conflict", "this peer's switch is not ready for tunnels yet", "try again")
        address = await _resolve(member.address.rpartition(":")[0])
        try:
            await switch.set_peer(peer, (address, args.port), args.key_id, args.key)
        except HelperError as error:
            raise OperationError("failed", f"no tunnel to {member.name}: {error.message}") from None
        tunnel = self._tunnels.setdefault(peer, _Tunnel())
        if tunnel.given_to and tunnel.given_to != args.switch:
            tunnel.wanted.set()
        return {"switch": switch.instance}


async def _resolve(host: str) -> str:
    """An IP address for a host's name; raises `OperationError(failed)`."""
    host = host.removeprefix("[").removesuffix("]")
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        found = await trio.socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)
    except OSError as error:
        raise OperationError("failed", f"the address of {host} cannot be found: {error}") from None
    return str(found[0][4][0])
