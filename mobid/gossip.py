# SPDX-License-Identifier: Apache-2.0
"""Gossip: the UDP socket on which peers find out who is alive, and how far.

The shell of `proto/swim/machine.py`: it opens and seals datagrams (`proto/gossip_wire.py`), keeps the timer,
takes members and keys from the catalog, and tells others what it sees. It decides nothing: what it says is a
hint. While this peer coordinates it also has the keys rotated (`proto/gossip_keys.py`).

Anybody can send datagrams here. What no member sealed is counted and dropped, a flood is dropped unopened,
and nothing is ever sent to where a datagram came from, only to addresses of the catalog.
"""

from __future__ import annotations

import math
import random
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import structlog
import trio

from mobid.signal import Changed
from mobid.tasks import background
from proto import wire
from proto.api import OperationError
from proto.entries import Entry, RotateGossipKey
from proto.gossip_keys import Keyring, next_generation
from proto.gossip_wire import NONCE, Envelopes, Unacceptable
from proto.machine import Send, WakeAt, Woken
from proto.state import State
from proto.swim.events import TIMER, Effect, Event, Members, Received, Roster, SetMeta, Settings
from proto.swim.machine import Swim
from proto.swim.packets import DATAGRAM, Packet, Reach

PORT_OFFSET = 1000
"""The gossip port is the peer's TCP port plus this, if it is free: a firewall's rule can name it."""

BURST = 64
"""Datagrams read before others get their turn."""

RATE = 4000
"""Datagrams a second that are opened; the members of ten thousand send this one far fewer."""

RESOLVE_TIMEOUT = 5.0
RESOLVE_AGAIN = 30.0
META_PAUSE = 2.0
META_SHARE = 10
"""All members together tell so many times a second what changed at their hosts, at most."""

META_STEP = 1 / 16
"""What changed by less than this share is not told."""

HINT_PAUSE = 2.0
ROTATION_PAUSE = 1.0
LONGEST_ROTATION_PAUSE = 60.0

log = structlog.get_logger()


@dataclass(frozen=True)
class Liveness:
    """How a peer looks from here. `rtt` is a round trip in seconds, measured, else estimated; None if neither
    is known yet."""

    state: Reach
    rtt: float | None


class Catalog(Protocol):
    """What this module needs of `mobid.catalog`."""

    @property
    def state(self) -> State: ...

    @property
    def changed(self) -> Changed: ...

    @property
    def leads(self) -> bool: ...

    async def propose(self, entry: Entry, timeout: float = ...) -> int: ...


class Gossip:
    """The membership of the peer `own`. Made, then `open`, then `run`."""

    def __init__(
        self,
        own: str,
        state: Callable[[], State],
        turned: Callable[[str, Reach], None],
        hint: Callable[[str, Reach, float | None, int | None], None] = lambda *_: None,
        settings: Settings | None = None,
    ) -> None:
        """`turned(peer, state)` is told when a peer looks different. `hint(peer, state, rtt, memory_free)` is
        told then too, and every few seconds of every member."""
        self.counters: Counter[str] = Counter()
        self._own = own
        self._state = state
        self._turned = turned
        self._hint = hint
        self._swim = Swim(own, settings or Settings(), random.Random(secrets.randbits(64)), int(time.time()))
        self._keys = Keyring()
        self._envelopes = Envelopes(own, self._keys)
        self._socket: socket.socket | None = None
        self._members: frozenset[str] = frozenset()
        self._addresses: dict[str, tuple[str, Any]] = {}
        """Of each member the HOST:PORT it advertises, and what that resolved to (None: nothing yet)."""
        self._wake = math.inf
        self._rearmed = Changed()
        self._budget = float(RATE)
        self._budget_at = 0.0
        self._foreign: set[str] = set()

    # Asking.

    def liveness(self, peer: str) -> Liveness:
        """How this peer (id) looks from here; the own one is always alive, who is no member is dead.

        A member that has not told yet where it gossips is suspect.
        """
        if peer == self._own:
            return Liveness("alive", 0.0)
        if peer not in self._members:
            member = self._state().members.get(peer)
            return Liveness("suspect" if member and member.status == "member" else "dead", None)
        return Liveness(self._swim.sight(peer).state, self._swim.vivaldi.rtt(peer))

    def last_answer(self, peer: str) -> dict[str, Any]:
        """What a peer last told of its host: `memory_free` in bytes; empty if nothing yet."""
        meta = self._swim.sight(peer).meta
        try:
            told = wire.unpack(meta) if meta else {}
        except wire.WireError:
            return {}
        free = told.get("memory_free") if isinstance(told, dict) else None
        return {"memory_free": free} if isinstance(free, int) else {}

    def figures(self) -> dict[str, int]:
        """Counters since the start, for people: datagrams and bytes in and out, and what was dropped why."""
        always = ("packets_in", "packets_out", "bytes_in", "bytes_out", "bad")
        return {**dict.fromkeys(always, 0), **self.counters, "health": self._swim.health}

    # The socket.

    def open(self, host: str, tcp_port: int, known: str) -> int:
        """Bind at `host`; returns the port: that of last time (`known` is the HOST:PORT then, or empty), or
        the one that belongs to `tcp_port`, or any.

        Raises `OperationError`.
        """
        last = known.rpartition(":")[2]
        wanted = [int(last)] if last.isdecimal() else []
        if tcp_port + PORT_OFFSET < 1 << 16:
            wanted.append(tcp_port + PORT_OFFSET)
        reason: OSError | None = None
        for port in (*wanted, 0):
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            made = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            try:
                if family is socket.AF_INET6 and host == "::":
                    made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
                made.bind((host, port))
            except OSError as error:
                made.close()
                reason = error
                continue
            self._socket = made
            return int(made.getsockname()[1])
        raise OperationError("failed", f"no UDP socket for gossip can be had at {host}: {reason}")

    def close(self) -> None:
        """Close the socket, after `run`."""
        if self._socket is not None:
            self._socket.close()

    # Running.

    async def run(self, catalog: Catalog, memory_free: Callable[[], int]) -> None:
        """Gossip as long as the peer lasts. `memory_free()` is what this host has now, in bytes."""
        async with background(
            self._receive,
            self._keep_time,
            lambda: self._follow(catalog),
            lambda: self._rotate(catalog),
            lambda: self._tell(memory_free),
        ):
            await self._keep_hinting()

    async def _receive(self) -> None:
        assert self._socket is not None
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            for _ in range(BURST):
                try:
                    datagram, _address = self._socket.recvfrom(2 * DATAGRAM)
                except BlockingIOError:
                    break
                except OSError:
                    # An earlier datagram found nobody at its address, which SWIM notices by itself.
                    self.counters["unreachable"] += 1
                    continue
                self._take(datagram)

    def _take(self, datagram: bytes) -> None:
        now = trio.current_time()
        self.counters["packets_in"] += 1
        self.counters["bytes_in"] += len(datagram)
        self._budget = min(RATE, self._budget + (now - self._budget_at) * RATE) - 1
        self._budget_at = now
        if self._budget < 0:
            self._budget = 0.0
            self.counters["flood"] += 1
            return
        try:
            opened = self._envelopes.open(datagram, self._members, now)
        except Unacceptable as error:
            self._refuse(error)
            return
        self._handle(Received(opened.sender, opened.packet))

    def _refuse(self, error: Unacceptable) -> None:
        self.counters["bad"] += 1
        self.counters[f"bad_{error.fault}"] += 1
        if error.fault == "version" and error.sender not in self._foreign:
            self._foreign.add(error.sender)
            name = self._state().peer_name(error.sender)
            log.warning("gossip.version", peer=name, hint="no protocol version in common: upgrade the older")

    async def _keep_time(self) -> None:
        while True:
            with trio.move_on_at(self._wake):
                await self._rearmed.wait()
            if trio.current_time() >= self._wake:
                self._wake = math.inf
                self._handle(Woken(TIMER))

    def _handle(self, event: Event) -> None:
        now = trio.current_time()
        for effect in self._swim.handle(event, now):
            self._carry_out(effect, now)

    def _carry_out(self, effect: Effect, now: float) -> None:
        match effect:
            case Send(peer, message):
                self._send(peer, message, now)
            case WakeAt(_, at):
                self._wake = at
                self._rearmed.set()
            case _:
                self._turned(effect.peer, effect.state)
                self._hint_at(effect.peer)

    def _send(self, peer: str, packet: Packet, now: float) -> None:
        address = self._addresses.get(peer, ("", None))[1]
        if address is None or self._socket is None:
            self.counters["unsent"] += 1
            return
        datagram = self._envelopes.seal(peer, packet, secrets.token_bytes(NONCE), now)
        if datagram is None:
            self.counters["unsent"] += 1
            return
        try:
            self._socket.sendto(datagram, address)
        except OSError:
            # No way there just now, or no room in the queue: gossip is repeated anyway.
            self.counters["unsent"] += 1
            return
        self.counters["packets_out"] += 1
        self.counters["bytes_out"] += len(datagram)

    # What the catalog says.

    async def _follow(self, catalog: Catalog) -> None:
        """Keys, members and their addresses, as they change."""
        seen: State | None = None
        while True:
            state = catalog.state
            if seen is None or (state.gossip_keys, state.members) != (seen.gossip_keys, seen.members):
                seen = state
                self._keys.learn(state.gossip_keys, trio.current_time())
                await self._enrol(state)
            with trio.move_on_after(RESOLVE_AGAIN) as waited:
                await catalog.changed.wait_until(partial(_newer, catalog, state))
            if waited.cancelled_caught and any(found is None for _, found in self._addresses.values()):
                seen = None

    async def _enrol(self, state: State) -> None:
        """Gossip with the members that have told where; nobody without a key yet."""
        members = {
            member.id: member.gossip
            for member in state.members.values()
            if member.status == "member" and member.gossip and state.gossip_keys
        }
        members.pop(self._own, None)
        for peer in set(self._addresses) - set(members):
            del self._addresses[peer]
        for peer, address in members.items():
            told, found = self._addresses.get(peer, ("", None))
            if told != address or found is None:
                self._addresses[peer] = (address, await self._resolve(address))
        known = frozenset(members)
        if known != self._members:
            self._members = known
            self._envelopes.enrol(known | {self._own})
            self._handle(Members(Roster.of(known | {self._own})))

    async def _resolve(self, address: str) -> Any:
        assert self._socket is not None
        host, _, port = address.rpartition(":")
        flags = socket.AI_V4MAPPED if self._socket.family is socket.AF_INET6 else 0
        with trio.move_on_after(RESOLVE_TIMEOUT):
            try:
                found = await trio.socket.getaddrinfo(
                    host.strip("[]"),
                    int(port),
                    family=self._socket.family,
                    type=socket.SOCK_DGRAM,
                    flags=flags,
                )
                return found[0][4]
            except (OSError, ValueError) as error:
                log.info("gossip.unresolved", address=address, reason=str(error))
        return None

    async def _rotate(self, catalog: Catalog) -> None:
        """While this peer coordinates: a new key whenever one is due."""
        pause = ROTATION_PAUSE
        while True:
            due = next_generation(catalog.state, time.time()) if catalog.leads else None
            if due is not None:
                try:
                    await catalog.propose(RotateGossipKey(generation=due, key=secrets.token_bytes(32)))
                    pause = ROTATION_PAUSE
                    continue
                except OperationError as error:
                    log.info("gossip.key.not.rotated", generation=due, reason=error.message)
                    pause = min(2 * pause, LONGEST_ROTATION_PAUSE)
            state = catalog.state
            with trio.move_on_after(pause if due is not None else LONGEST_ROTATION_PAUSE):
                await catalog.changed.wait_until(partial(_newer, catalog, state))

    # Telling.

    async def _tell(self, memory_free: Callable[[], int]) -> None:
        """What this host has free, to everybody, when it has changed."""
        told: int | None = None
        while True:
            free = memory_free()
            if told is None or abs(free - told) > META_STEP * max(told, 1):
                told = free
                self._handle(SetMeta(wire.pack({"memory_free": free})))
            await trio.sleep(max(META_PAUSE, len(self._members) / META_SHARE))

    async def _keep_hinting(self) -> None:
        while True:
            for peer in sorted(self._members):
                self._hint_at(peer)
            await trio.sleep(HINT_PAUSE)

    def _hint_at(self, peer: str) -> None:
        sight = self.liveness(peer)
        self._hint(peer, sight.state, sight.rtt, self.last_answer(peer).get("memory_free"))


def _newer(catalog: Catalog, state: State) -> bool:
    return catalog.state is not state
