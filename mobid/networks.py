# SPDX-License-Identifier: Apache-2.0
"""The networks of a peer: its switch is kept in step with the catalog, and the guests' ports are made in it.

What the switch has to know follows from the catalog (`proto/segments.py`) and is told again whenever the
catalog changes; saying the same twice costs nothing. When the switch dies, a new one is started, everything
is told to it, the ports are made again, and the guests are asked to connect anew: they lose the frames of
that moment, no more.

A migration uses `hold`, `redirect`, `expect` and `announce`, whose meaning is in `kernel/README.md`, section
7. They act on all ports of a guest.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import structlog
import trio

from mobid.helpers import HelperError, Helpers
from mobid.lease import Lease
from mobid.migration_shell import Frames
from mobid.signal import Changed
from mobid.switch import HERE, Switch, free_port, open_switch
from mobid.tunnels import Reaching, Tunnels
from proto import entries
from proto.api import OperationError
from proto.segments import Place, Segment, concerned, impairment, mac_bytes, segments
from proto.state import State

logger = structlog.get_logger(__name__)

READY_TIMEOUT = 15.0
TUNNEL_TIMEOUT = 5.0
LINGER = 15.0
"""Seconds for which a port that was redirected, and a peer without guests on a network, are kept: frames for
them may still be under way, and a lost marker is made up for within 10."""
RESTART_PAUSE = 0.5
LONGEST_RESTART_PAUSE = 10.0
RTT_INTERVAL = 5.0
RTT_CHANGE = 0.2
MICROSECOND = 1e-6


class Liveness(Protocol):
    @property
    def rtt(self) -> float | None: ...


class Links(Reaching, Protocol):
    """What this module needs of `mobid.links`."""

    def liveness(self, peer: str) -> Liveness: ...


class Catalog(Protocol):
    """What this module needs of `mobid.catalog`."""

    @property
    def state(self) -> State: ...

    @property
    def changed(self) -> Changed: ...


class Emitting(Protocol):
    """What this module needs of `mobid.events`."""

    def emit(self, kind: str, **facts: Any) -> None: ...


async def nobody_reconnects(_guest: str) -> None:
    """Of a peer without guests."""


@dataclass(frozen=True, slots=True)
class Port:
    """A guest's port in the switch. `epoch` is the right under which it sends."""

    guest: str
    interface: entries.Interface
    handle: int
    network: int
    socket: Path
    epoch: int
    state: Literal["incoming", "running"]
    lease_bound: bool
    gone_at: float | None = None
    """When it was redirected (trio's clock); it lingers, and is then removed."""

    @property
    def mac(self) -> bytes:
        return mac_bytes(self.interface.mac)


class Networks:
    """The switch of the peer `own` (id). `reconnect` makes a guest (LAB/NAME) connect to its ports anew."""

    def __init__(
        self,
        *,
        own: str,
        catalog: Catalog,
        links: Links,
        helpers: Helpers,
        events: Emitting,
        lease: Lease,
        sockets: Path,
        log: Path,
        listen: tuple[str, int],
        reconnect: Callable[[str], Awaitable[None]] = nobody_reconnects,
    ) -> None:
        self.reconnect = reconnect
        self._own = own
        self._catalog = catalog
        self._links = links
        self._helpers = helpers
        self._events = events
        self._lease = lease
        self._sockets = sockets
        self._log = log
        self._listen = listen
        self._ports: dict[tuple[str, str], Port] = {}
        self._unclaimed: list[dict[str, Any]] = []
        """Ports of an adopted switch, as it counts them, of guests that the catalog does not know: it may be
        behind, so they stay as they are until it is up to date."""
        self._switch: Switch | None = None
        self._switched = Changed()
        self._wake = trio.Event()
        """Set when the switch may have to be told something."""
        self._lock = trio.Lock()
        self._lingering: dict[tuple[int, str], float] = {}
        self._placed: dict[tuple[int, bytes], str] = {}
        """Which guest (id) the switch was told to have an address. A new guest begins with epoch 1 again."""
        self._ending = False
        self._retired = False
        self._seen: State | None = None
        self._idle_until: float | None = None
        self.tunnels = Tunnels(own, lambda: catalog.state, links, lambda: self._switch, self._wake_up)

    # The switch.

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep a switch running, while guests here have networks, and in step with the catalog.

        Lasts until cancelled; a switch with ports goes on then, for the guests', and the next peer in this
        directory takes it back.
        """
        adopt, restored = self._control.exists(), False
        if not adopt:
            task_status.started()
        try:
            while not self._ending:
                if not adopt:
                    await self._until_needed()
                switch = await self._open_at_last(adopt=adopt)
                if adopt:
                    task_status.started()
                await self._follow(switch, restored)
                adopt, restored = False, bool(self._ports)
        finally:
            switch_left = self._switch
            if switch_left is not None and not self._ports and not switch_left.helper.exited.is_set():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(switch_left.helper.pid, signal.SIGTERM)

    @property
    def _control(self) -> Path:
        return self._sockets / "switch.sock"

    async def _until_needed(self) -> None:
        await self._catalog.changed.wait_until(
            lambda: bool(self._ports) or bool(segments(self._catalog.state, self._own))
        )

    async def _open_at_last(self, *, adopt: bool) -> Switch:
        pause, said = RESTART_PAUSE, ""
        while True:
            try:
                return await self._open(adopt=adopt)
            except HelperError as error:
                if error.message != said:
                    said = error.message
                    self._events.emit("switch.failed", reason=said)
            await trio.sleep(pause)
            pause = min(2 * pause, LONGEST_RESTART_PAUSE)

    async def _open(self, *, adopt: bool) -> Switch:
        switch = await open_switch(
            self._helpers,
            control=self._control,
            log=self._log,
            own=self._own,
            listen=self._listen,
            adopt=adopt,
        )
        try:
            async with self._lock:
                await self._begin(switch)
        except BaseException:
            if switch.adopted:
                switch.helper.forget()
            else:
                switch.helper.kill()
            raise
        self._switch = switch
        self._switched.set()
        self._events.emit("switch.started", port=switch.udp_port, adopted=switch.adopted)
        return switch

    async def _begin(self, switch: Switch) -> None:
        self._placed = {}
        if switch.adopted:
            await self._take_back(switch)
        else:
            await self._tell_lease(switch)  # without one, ports bound to it would send for ever
            self._unclaimed = []
            self._ports = {key: port for key, port in self._ports.items() if port.gone_at is None}
        await self._tell_all(switch)
        if not switch.adopted:
            for port in self._ports.values():
                await self._make(switch, port)
        await self._tell_impairments(switch)

    async def _restored(self) -> None:
        """After a crash: the guests' devices are new ones."""
        for guest in sorted({port.guest for port in self._ports.values() if port.state == "running"}):
            try:
                await self.reconnect(guest)
            except (HelperError, OperationError) as error:
                self._events.emit("guest.disconnected", guest=guest, reason=error.message)

    async def _follow(self, switch: Switch, restored: bool) -> None:
        """Tell this switch what changes, until it ends."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_told, switch, nursery)
            nursery.start_soon(self._keep_rtt, switch)
            nursery.start_soon(self._keep_lease, switch)
            nursery.start_soon(self._watch_catalog)
            if restored:
                nursery.start_soon(self._restored)
            await switch.helper.exited.wait()
            nursery.cancel_scope.cancel()
        self._switch = None
        if not self._ending and not self._retired:
            self._events.emit("switch.lost", code=switch.helper.returncode)
        self._retired = False

    async def _keep_told(self, switch: Switch, nursery: trio.Nursery) -> None:
        kept: dict[str, trio.CancelScope] = {}
        while True:
            self._wake = trio.Event()
            try:
                async with self._lock:
                    self._claim()
                    await self._tell_all(switch)
                    await self._tell_impairments(switch)
                    await self._clear(switch)
            except (HelperError, OperationError) as error:
                logger.warning("the switch was not told", reason=error.message)
                with trio.move_on_after(RESTART_PAUSE):
                    await switch.helper.exited.wait()
            if await self._retire(switch):
                return
            partners = self._partners()
            for peer in set(kept) - partners:
                kept.pop(peer).cancel()
                self.tunnels.forget(peer)
                if self._has_left(peer):
                    self.tunnels.renew()
            for peer in partners - set(kept):
                kept[peer] = trio.CancelScope()
                nursery.start_soon(self._keep_tunnel, switch, peer, kept[peer])
            with trio.move_on_after(self._until_next_clearing()):
                await self._wake.wait()

    async def _watch_catalog(self) -> None:
        self._seen = None
        while True:
            await self._catalog.changed.wait_until(lambda: self._catalog.state is not self._seen)
            self._seen = self._catalog.state
            self._wake_up()

    def _wake_up(self) -> None:
        self._wake.set()

    async def _keep_tunnel(self, switch: Switch, peer: str, scope: trio.CancelScope) -> None:
        with scope:
            await self.tunnels.keep(switch, peer)

    def _partners(self) -> set[str]:
        """The members that share a network with this peer, or did a moment ago."""
        members = self._catalog.state.members
        return {peer for _, peer in self._lingering if peer in members and members[peer].status == "member"}

    def _has_left(self, peer: str) -> bool:
        member = self._catalog.state.members.get(peer)
        return member is None or member.status == "left"

    async def _retire(self, switch: Switch) -> bool:
        """End the switch when nobody has needed it for a while."""
        now = trio.current_time()
        if self._ports or self._unclaimed or self._lingering or segments(self._catalog.state, self._own):
            self._idle_until = None
            return False
        if self._idle_until is None:
            self._idle_until = now + LINGER
        if now < self._idle_until:
            return False
        self._retired, self._idle_until = True, None
        await switch.helper.quit()
        return True

    async def _ready(self) -> Switch:
        """The running switch; raises `OperationError(failed)` if there is none for long."""
        with trio.move_on_after(READY_TIMEOUT):
            await self._switched.wait_until(lambda: self._switch is not None)
        if self._switch is None:
            raise OperationError(
                "failed",
                "this peer's switch does not run",
                f"{self._log} says why; mobictl doctor looks further",
            )
        return self._switch

    async def close(self) -> None:
        """End the switch, because the peer ends and its guests have."""
        self._ending = True
        if self._switch is not None:
            await self._switch.helper.quit()

    # Telling it what the catalog says.

    async def _tell_all(self, switch: Switch) -> None:
        """Networks and addresses; with the lock held."""
        wanted = segments(self._catalog.state, self._own)
        for segment in wanted.values():
            await self._tell_segment(switch, segment)
        for (network,), _ in switch.told("network_set"):
            if network not in wanted and not any(p.network == network for p in self._ports.values()):
                await self._drop_segment(switch, int(str(network)))

    async def _tell_segment(self, switch: Switch, segment: Segment) -> None:
        now = trio.current_time()
        for peer in segment.peers:
            self._lingering[segment.id, peer] = now + LINGER
        peers = {
            peer
            for (network, peer), until in self._lingering.items()
            if network == segment.id and until > now
        }
        handles = sorted(switch.handle(peer) for peer in peers if switch.knows(peer))
        await switch.tell("network_set", (segment.id,), network=segment.id, peers=handles)
        for mac, place in segment.places.items():
            await self._tell_place(switch, segment.id, mac, place)
        for network, mac in list(self._placed):
            if network == segment.id and mac not in segment.places:
                await self._unplace(switch, network, mac)

    def _port_of(self, network: int, mac: object) -> Port | None:
        return next((p for p in self._ports.values() if p.network == network and p.mac == mac), None)

    def _handle(self, switch: Switch, peer: str) -> int | None:
        if peer == self._own:
            return HERE
        return switch.handle(peer) if switch.knows(peer) else None

    async def _tell_place(self, switch: Switch, network: int, mac: bytes, place: Place) -> None:
        about = (network, mac)
        handle = self._handle(switch, place.peer)
        if handle is None:
            return  # its first key comes soon, and then all is told again
        if self._placed.get(about, place.guest) != place.guest:
            await self._unplace(switch, network, mac)
        try:
            await switch.tell(
                "mac_set",
                about,
                network=network,
                mac=mac,
                peer=handle,
                epoch=place.epoch,
                failover=place.failover,
            )
        except HelperError as error:
            if error.code != "mismatch":
                raise
            logger.warning("an address is here by the same right", mac=mac.hex(":"), reason=error.message)
            return
        self._placed[about] = place.guest
        following = self._handle(switch, place.next_peer) if place.next_epoch else HERE
        if following is None:
            return
        if place.next_epoch or switch.last("mac_next", about):
            await switch.tell(
                "mac_next", about, network=network, mac=mac, peer=following, epoch=place.next_epoch
            )

    async def _unplace(self, switch: Switch, network: int, mac: bytes) -> None:
        if self._port_of(network, mac) is not None:
            return  # the guest's port goes soon, and the entry with it
        try:
            await switch.call("mac_remove", network=network, mac=mac)
        except HelperError as error:
            if error.code != "not-found":
                raise
        self._placed.pop((network, mac), None)
        switch.forget("mac_set", (network, mac))
        switch.forget("mac_next", (network, mac))

    async def _drop_segment(self, switch: Switch, network: int) -> None:
        await switch.call("network_remove", network=network)
        switch.forget("network_set", (network,))
        self._placed = {about: guest for about, guest in self._placed.items() if about[0] != network}
        for op in ("mac_set", "mac_next"):
            for about, _ in switch.told(op):
                if about[0] == network:
                    switch.forget(op, about)

    async def _tell_impairments(self, switch: Switch) -> None:
        networks = self._catalog.state.networks
        for port in self._ports.values():
            network = networks.get(port.interface.network)
            if network is None:
                continue
            what = impairment(network, port.guest, port.interface.name)
            await switch.tell("impair", (port.handle,), port=port.handle, **_impair_arguments(what))

    async def _keep_rtt(self, switch: Switch) -> None:
        """The switch's patience with markers depends on it."""
        told: dict[str, float] = {}
        while True:
            for peer in switch.peers:
                rtt = self._links.liveness(peer).rtt
                if rtt is None or abs(rtt - told.get(peer, -1.0)) < RTT_CHANGE * rtt:
                    continue
                try:
                    await switch.call(
                        "rtt", peer=switch.handle(peer), rtt_us=min(int(rtt / MICROSECOND), 60_000_000)
                    )
                except HelperError as error:
                    logger.debug("the switch was not told a round trip", reason=error.message)
                told[peer] = rtt
            await trio.sleep(RTT_INTERVAL)

    async def _tell_lease(self, switch: Switch) -> None:
        await switch.tell("lease", (), deadline_ns=self._lease.deadline_ns)

    async def _keep_lease(self, switch: Switch) -> None:
        """Renew what lease-bound ports send by; the switch itself stops them at the deadline."""
        while True:
            told = self._lease.deadline
            try:
                if told:
                    await self._tell_lease(switch)
            except HelperError as error:
                logger.warning("the switch was not told the lease", reason=error.message)
            if self._lease.deadline == told:
                await self._lease.changed.wait()

    # What is removed later.

    def _until_next_clearing(self) -> float:
        now = trio.current_time()
        times = [until for until in self._lingering.values() if until > now]
        times += [self._idle_until] if self._idle_until is not None else []
        times += [port.gone_at + LINGER for port in self._ports.values() if port.gone_at is not None]
        return max(min(times, default=now + 3600.0) - now, 0.05)

    async def _clear(self, switch: Switch) -> None:
        now = trio.current_time()
        for key, port in list(self._ports.items()):
            if port.gone_at is not None and port.gone_at + LINGER <= now:
                await self._drop(switch, key)
        self._lingering = {key: until for key, until in self._lingering.items() if until > now}
        for peer in set() if self._unclaimed else set(switch.peers) - self._partners():
            await switch.remove_peer(peer)

    # Ports.

    async def add_port(
        self, guest: entries.Guest, interface: entries.Interface, *, incoming: bool = False
    ) -> Path:
        """The vhost-user socket of this interface of a guest that starts here, or comes here (`incoming`).

        Again: the same port. Raises `OperationError`.
        """
        switch = await self._ready()
        network = self._catalog.state.networks.get(interface.network)
        if network is None:
            raise OperationError(
                "not-found", f"{guest.key} wants the network {interface.network}, which is gone"
            )
        key = (guest.key, interface.name)
        try:
            async with self._lock:
                self._claim()
                old = self._ports.get(key)
                epoch = guest.epoch + 1 if incoming else guest.epoch
                if old is not None and old.gone_at is None and old.epoch == epoch:
                    return old.socket
                if old is not None:
                    await self._drop(switch, key)
                await self._tell_all(switch)
                port = Port(
                    guest=guest.key,
                    interface=interface,
                    handle=free_port(self._handles()),
                    network=network.id,
                    socket=self._sockets / f"{guest.id}-{interface.name}.net",
                    epoch=epoch,
                    state="incoming" if incoming else "running",
                    lease_bound=guest.lease_bound,
                )
                await self._make(switch, port)
                self._ports[key] = port
                await self._tell_impairments(switch)
                return port.socket
        except HelperError as error:
            raise OperationError(
                "failed", f"{guest.key} cannot be given its port {interface.name}: {error.message}"
            ) from None

    async def make_up(self, guests: Sequence[entries.Guest]) -> None:
        """For guests that have run since before this peer: if the switch ended while no peer was here, their
        ports are made again, and they connect to them."""
        for guest in guests:
            missing = [i for i in guest.interfaces if (guest.key, i.name) not in self._ports]
            if not missing:
                continue
            try:
                for interface in missing:
                    await self.add_port(guest, interface)
                await self.reconnect(guest.key)
            except (HelperError, OperationError) as error:
                self._events.emit("guest.disconnected", guest=guest.key, reason=error.message)

    async def _make(self, switch: Switch, port: Port) -> None:
        switch.forget("impair", (port.handle,))
        await switch.call(
            "port_add",
            port=port.handle,
            network=port.network,
            mac=port.mac,
            socket=str(port.socket),
            mtu=port.interface.mtu,
            epoch=port.epoch,
            state=port.state,
            lease_bound=port.lease_bound,
        )
        switch.forget("mac_set", (port.network, port.mac))

    async def _take_back(self, switch: Switch) -> None:
        """The ports that an adopted switch has."""
        self._unclaimed = (await switch.counters())["ports"]
        self._claim()

    def _claim(self) -> None:
        """Take those ports of an adopted switch whose guests the catalog knows by now."""
        if not self._unclaimed:
            return
        by_mac = {
            mac_bytes(interface.mac): (guest, interface)
            for guest in self._catalog.state.guests.values()
            for interface in guest.interfaces
        }
        strange = []
        for found in self._unclaimed:
            guest, interface = by_mac.get(found["mac"], (None, None))
            if guest is None or interface is None:
                strange.append(found)
                continue
            gone = found["state"] == "gone"
            self._ports[guest.key, interface.name] = Port(
                guest=guest.key,
                interface=interface,
                handle=found["port"],
                network=found["network"],
                socket=self._sockets / f"{guest.id}-{interface.name}.net",
                epoch=found["epoch"],
                state="incoming" if found["state"] == "incoming" else "running",
                lease_bound=guest.lease_bound,
                gone_at=trio.current_time() if gone else None,
            )
        self._unclaimed = strange

    def _handles(self) -> set[int]:
        """The switch's numbers of ports that are taken."""
        return {port.handle for port in self._ports.values()} | {found["port"] for found in self._unclaimed}

    async def drop_strangers(self) -> None:
        """The catalog is up to date: ports of guests that it does not know go."""
        async with self._lock:
            self._claim()
            switch, known = self._switch, self._catalog.state.guests
            try:
                while self._unclaimed and switch is not None:
                    await switch.call("port_remove", port=self._unclaimed[-1]["port"])
                    self._unclaimed.pop()
                for key in [key for key, port in self._ports.items() if port.guest not in known]:
                    if switch is not None:
                        await self._drop(switch, key)
            except HelperError as error:
                logger.warning("a port could not be removed", reason=error.message)
        self._wake_up()

    async def remove_port(self, guest: str, interface: str) -> None:
        """Remove the port of the guest LAB/NAME; no error if it is not there. One that was redirected goes
        later, since frames for it may still come."""
        key = (guest, interface)
        port = self._ports.get(key)
        if port is None or port.gone_at is not None:
            return
        async with self._lock:
            switch = self._switch
            try:
                if switch is not None:
                    await self._drop(switch, key)
            except HelperError as error:
                logger.warning("a port could not be removed", guest=guest, reason=error.message)
            self._ports.pop(key, None)

    async def _drop(self, switch: Switch, key: tuple[str, str]) -> None:
        port = self._ports.pop(key)
        await switch.call("port_remove", port=port.handle)
        switch.forget("impair", (port.handle,))
        switch.forget("mac_set", (port.network, port.mac))
        switch.forget("mac_next", (port.network, port.mac))

    # Moves.

    async def opened(self, migration: entries.Migration) -> None:
        """Return when the switch here takes the guest's frames from the destination too, or has no part in
        the guest's networks. Raises `OperationError`."""
        state = self._catalog.state
        if self._own not in concerned(state, migration.guest):
            return
        if migration.destination != self._own:
            await self.tunnels.wait_given(migration.destination)
        switch = await self._ready()
        try:
            async with self._lock:
                await self._tell_all(switch)
        except HelperError as error:
            raise OperationError("failed", f"the switch was not told: {error.message}") from None

    def _ports_of(self, guest: str) -> list[tuple[tuple[str, str], Port]]:
        return [(key, port) for key, port in self._ports.items() if port.guest == guest]

    async def _each(self, guest: str, op: str, **arguments: Any) -> None:
        """One operation on all ports of a guest; raises `OperationError`."""
        ports = self._ports_of(guest)
        if not ports:
            return
        switch = self._switch
        if switch is None:
            raise OperationError("failed", f"{op} of {guest}: the switch does not run")
        try:
            for _, port in ports:
                await switch.call(op, port=port.handle, **arguments)
        except HelperError as error:
            raise OperationError("failed", f"{op} of {guest}: {error.message}") from None

    async def _peer_handle(self, peer: str) -> int:
        with trio.move_on_after(TUNNEL_TIMEOUT):
            await self.tunnels.wait_given(peer)
        if self._switch is None or not self._switch.knows(peer):
            raise OperationError("failed", f"there is no tunnel to {self._catalog.state.peer_name(peer)} yet")
        return self._switch.handle(peer)

    async def hold(self, guest: str) -> None:
        """Keep the frames for a guest that is about to be frozen. Raises `OperationError`."""
        await self._each(guest, "hold")

    async def unhold(self, guest: str) -> None:
        """The guest goes on here: deliver what was held."""
        await self._each(guest, "unhold")

    async def redirect(self, guest: str, peer: str, epoch: int) -> None:
        """The guest runs at `peer` (id) with `epoch`: send it what was held and what follows."""
        if self._ports_of(guest):
            await self._each(guest, "redirect", peer=await self._peer_handle(peer), epoch=epoch)
        for key, port in self._ports_of(guest):
            self._ports[key] = replace(port, gone_at=trio.current_time())

    async def expect(self, guest: str, source: str, epoch: int) -> None:
        """Before the guest, whose ports are `incoming`, resumes here: await frames from `source` (id)."""
        if self._ports_of(guest):
            networks = {port.network for _, port in self._ports_of(guest)}
            wanted = segments(self._catalog.state, self._own)
            others = {peer for id in networks & set(wanted) for peer in wanted[id].peers} - {source}
            with trio.move_on_after(TUNNEL_TIMEOUT):
                for peer in others:  # those who send to the guest will have to reach it here
                    await self.tunnels.wait_given(peer)
            from_handle = {"from": await self._peer_handle(source)}
            await self._each(guest, "expect", epoch=epoch, **from_handle)

    async def announce(self, guest: str) -> None:
        """The guest runs here now: tell the other switches."""
        await self._each(guest, "announce")
        for key, port in self._ports_of(guest):
            self._ports[key] = replace(port, state="running")

    async def frames(self, guest: str) -> Frames:
        """How many frames for this guest were held or lost here."""
        handles = {port.handle for _, port in self._ports_of(guest)}
        if not handles:
            return Frames(0, 0)
        rows = [row for row in await self.port_counters() if row["port"] in handles]
        return Frames(sum(row["held"] for row in rows), sum(row["lost_held"] for row in rows))

    # For operations.

    async def port_counters(self) -> list[dict[str, Any]]:
        """The counters of all ports here. Raises `OperationError`."""
        switch = await self._ready()
        try:
            return list((await switch.counters())["ports"])
        except HelperError as error:
            raise OperationError("failed", f"the switch gives no counters: {error.message}") from None

    @property
    def ports(self) -> list[Port]:
        return list(self._ports.values())


def _impair_arguments(what: entries.Impairment) -> dict[str, int]:
    return {
        "delay_us": round(what.delay / MICROSECOND),
        "jitter_us": round(what.jitter / MICROSECOND),
        "loss_ppm": round(what.loss * 1e6),
        "rate": what.rate,
        "reorder_ppm": round(what.reorder * 1e6),
        "duplicate_ppm": round(what.duplicate * 1e6),
    }
