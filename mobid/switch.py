# SPDX-License-Identifier: Apache-2.0
"""The switch process of a peer, and what it has been told.

`Switch` is one process (`kernel/README.md`, section 7): when it dies another `Switch` takes its place, and
everything is told again. `tell` remembers what was said under a key and says nothing twice, so that the
callers may simply state what is wanted, as often as they like. Peers are named by their ids here; the switch
calls them by small numbers that this module gives out.
"""

from __future__ import annotations

import contextlib
import secrets
from pathlib import Path
from typing import Any

import structlog

from mobid.helpers import Helper, HelperError, Helpers

logger = structlog.get_logger(__name__)

PEERS = 1024
PORTS = 1024
HERE = 0


class Switch:
    """A running switch. `instance` names this process to other peers; `udp_port` is where it listens."""

    def __init__(self, helper: Helper, udp_port: int, *, adopted: bool) -> None:
        self.helper = helper
        self.udp_port = udp_port
        self.adopted = adopted
        self.instance = secrets.token_hex(8)
        self._peers: dict[str, int] = {}
        self._numbers: dict[str, int] = {}
        """Given out, also to peers the switch does not know yet: two may be introduced at the same time."""
        self._told: dict[tuple[object, ...], dict[str, Any]] = {}

    async def call(self, op: str, **arguments: Any) -> dict[str, Any]:
        """One request; raises `HelperError`."""
        reply, _ = await self.helper.call(op, **arguments)
        return reply

    async def tell(self, op: str, about: tuple[object, ...], **arguments: Any) -> bool:
        """`call`, unless it was the last thing said with this `op` `about` this. Whether it was said."""
        key = (op, *about)
        if self._told.get(key) == arguments:
            return False
        await self.call(op, **arguments)
        self._told[key] = arguments
        return True

    def last(self, op: str, about: tuple[object, ...]) -> dict[str, Any]:
        """What was said last, empty if nothing was."""
        return self._told.get((op, *about), {})

    def told(self, op: str) -> list[tuple[tuple[object, ...], dict[str, Any]]]:
        """Everything said with this `op`, as `(about, arguments)`."""
        return [(key[1:], arguments) for key, arguments in self._told.items() if key[0] == op]

    def forget(self, op: str, about: tuple[object, ...]) -> None:
        """What was said is not true any more: `tell` says it again."""
        self._told.pop((op, *about), None)

    # Peers.

    def handle(self, peer: str) -> int:
        """The number of a peer (id) that was announced with `add_key`; raises `KeyError`."""
        return self._peers[peer]

    def knows(self, peer: str) -> bool:
        return peer in self._peers

    @property
    def peers(self) -> list[str]:
        return list(self._peers)

    async def add_key(self, peer: str, key_id: int, key: bytes) -> None:
        """Accept packets of `peer` under this key. The first one makes the peer known."""
        number = self._numbers.get(peer)
        if number is None:
            number = _free(set(self._numbers.values()), 1, PEERS, "peers")
            self._numbers[peer] = number
        await self.call("peer_receive_key", peer=number, identity=int(peer, 16), key_id=key_id, key=key)
        self._peers[peer] = number

    async def set_peer(self, peer: str, udp: tuple[str, int], key_id: int, key: bytes) -> None:
        """Seal what goes to `peer` with this key, and send it to this address and port."""
        await self.call(
            "peer_set",
            peer=self._peers[peer],
            identity=int(peer, 16),
            address=udp[0],
            port=udp[1],
            key_id=key_id,
            key=key,
        )

    async def remove_peer(self, peer: str) -> None:
        """Forget a peer with its keys."""
        number = self._peers.pop(peer, None)
        if number is None:
            return
        del self._numbers[peer]
        for op in ("rtt", "network_set"):
            for about, _ in self.told(op):
                if op == "network_set" or about == (peer,):
                    self.forget(op, about)
        await self.call("peer_remove", peer=number)

    # Looking.

    async def counters(self) -> dict[str, Any]:
        """All counters; the ports' and peers' lists are whole, `macs` has the first 256."""
        whole: dict[str, Any] = {"ports": [], "peers": []}
        first: int | None = 0
        while first is not None:
            page = await self.call("counters", first=first)
            whole["ports"] += page["ports"]
            whole["peers"] += page["peers"]
            first = page["more"]
            whole |= {key: page[key] for key in ("macs", "macs_total", "strangers", "strays")}
        return whole

    async def take_back_peers(self) -> None:
        """After an adoption: which peer has which number."""
        for peer in (await self.counters())["peers"]:
            self._peers[f"{peer['identity']:016x}"] = peer["peer"]
        self._numbers = dict(self._peers)


def _free(taken: set[int], first: int, end: int, what: str) -> int:
    for number in range(first, end):
        if number not in taken:
            return number
    raise HelperError("limit", f"the switch has no room for more {what}")


def free_port(taken: set[int]) -> int:
    """A number no port has; raises `HelperError(limit)`."""
    return _free(taken, 0, PORTS, "ports")


async def open_switch(
    helpers: Helpers, *, control: Path, log: Path, own: str, listen: tuple[str, int], adopt: bool = True
) -> Switch:
    """The switch of peer `own` (id): the one that runs, if `adopt`, else a new one.

    It listens at `listen`, or at any port if that one is taken. Raises `HelperError`.
    """
    if adopt:
        with contextlib.suppress(HelperError):
            switch = await _adopt(helpers, control, own)
            if switch is not None:
                return switch
    control.unlink(missing_ok=True)
    helper = await helpers.start("switch", [], control=control, log=log)
    try:
        port = await _listen(helper, own, listen)
    except BaseException:
        helper.kill()
        raise
    return Switch(helper, port, adopted=False)


async def _adopt(helpers: Helpers, control: Path, own: str) -> Switch | None:
    helper = await helpers.adopt(control, role="switch")
    try:
        status, _ = await helper.call("status")
        if status["identity"] == int(own, 16) and status["port"]:
            switch = Switch(helper, status["port"], adopted=True)
            await switch.take_back_peers()
            return switch
    except HelperError as error:
        logger.warning("the switch that runs cannot be used", reason=error.message)
    await helper.quit()
    return None


async def _listen(helper: Helper, own: str, listen: tuple[str, int]) -> int:
    address, port = listen
    try:
        reply, _ = await helper.call("listen", address=address, port=port, identity=int(own, 16))
    except HelperError as error:
        logger.info("the port is taken, another is used", port=port, reason=error.message)
        reply, _ = await helper.call("listen", address=address, port=0, identity=int(own, 16))
    return int(reply["port"])
