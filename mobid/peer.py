# SPDX-License-Identifier: Apache-2.0
"""The peer: composes its parts, starts them in order, and ends them in the reverse order.

Each part is one object of one module that gets what it needs by constructor; no part reaches through
another. A part that works by itself has `async def run()`, which lasts as long as the peer; the operations
of all parts are found by `@operation`.

A peer ends in one of three ways: it was told to stop (its guests end first), it was asked to end by a
signal (its guests go on, and the next start takes them back), or it must start anew with another catalog
because it has joined another mesh.
"""

from __future__ import annotations

import importlib.metadata
import os
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import structlog
import trio

from mobid import host, joining
from mobid.breakpoints import Breakpoints
from mobid.catalog import Catalog
from mobid.config import Config, Times, agreed
from mobid.drains import Drains
from mobid.event_service import EventService
from mobid.events import Events
from mobid.gossip import Gossip
from mobid.guest_ops import GuestOperations
from mobid.guests import Guests
from mobid.helpers import HelperError, Helpers, find_binary
from mobid.identity import Identity
from mobid.images import Images
from mobid.lab_apply import LabChanges
from mobid.lab_move import LabMoves
from mobid.labs import Labs
from mobid.links import Links
from mobid.mail import Mail
from mobid.mesh import Mesh
from mobid.migrate import Migrations
from mobid.migration_notes import Notes
from mobid.migration_shell import Surroundings
from mobid.network_ops import NetworkOperations
from mobid.networks import Networks
from mobid.operations import Operations, Request, operation, step
from mobid.recovery import Known, open_store, present, read_known, write_known
from mobid.rpc import ServedRequest
from mobid.server import Server, open_tcp, open_unix
from mobid.stamps import HybridClock
from mobid.standing import Standing
from mobid.store import Store
from mobid.users import Users
from proto import api, entries, tokens, versions
from proto.api import OperationError
from proto.peer_events import Settings
from proto.raft import events as raft
from proto.raft.configuration import Configuration
from proto.state import State
from proto.swim.packets import Reach

KNOWN = "mesh.json"
CATALOG = "catalog"
LEAVE_TIMEOUT = 30.0
ADVERTISE_TIMEOUT = 15.0
ADVERTISE_PAUSE = 1.0
SHUTDOWN_TIMEOUT = 60.0
FAREWELL = 0.3
KNOWN_PAUSE = 5.0

log = structlog.get_logger()


class Outcome(Enum):
    """How a peer ended."""

    STOPPED = "stopped"
    REPLACED = "replaced"
    """Start it again: it has another catalog now."""
    LEFT = "left"
    EVICTED = "evicted"


class Peer:
    """All parts of one running peer. Made by `load`; then `open`, `run`, `close`."""

    def __init__(
        self, config: Config, identity: Identity, store: Store, known: Known | None, times: Times
    ) -> None:
        self.config = config
        self.times = times
        self.identity = identity
        self.started = time.time()
        self.outcome = Outcome.STOPPED
        self.stamps = HybridClock()
        self.catalog = Catalog(
            store,
            identity.id,
            self._post,
            _settings(times),
            bootstrap=known.state if known else None,
            stamps=self.stamps,
        )
        self.mail = Mail(identity, self.catalog.member, self.catalog.receive)
        self.gossip = Gossip(identity.id, lambda: self.catalog.state, self._turned, self.catalog.sight)
        self.links = Links(identity, lambda: self.catalog.state, self._carry_out, self.gossip)
        self.operations = Operations(
            identity.id,
            lambda: self.catalog.state,
            self.links,
            self.catalog.wait_leader,
            self._catch_up,
        )
        name = config.name or socket.gethostname()
        self.events = Events(config.path("events.ndjson"), identity.id, name, self.stamps)
        self.mesh = Mesh(
            identity, self.catalog, self.links, times=times, facts=self._facts_now, emit=self.events.emit
        )
        self._known = known
        self._composed = trio.Event()
        self._joined_another = False
        self._scope = trio.CancelScope()
        self._tcp: trio.SocketListener | None = None
        self.address = self.gossip_address = ""
        self._shutdown: list[Callable[[], Awaitable[None]]] = []
        self._closing: list[Callable[[], Awaitable[None]]] = []
        history = EventService(self.events, self.stamps, self.links, self._members)
        users = Users(self.catalog, self.events.emit)
        self.standing = Standing(identity.id, self.catalog, self._left_behind)
        for part in (self, self.mesh, self.standing, users, history):
            self.operations.add(part)
        if not self.catalog.empty:
            self.catalog.begin()

    async def _catch_up(self) -> None:
        try:
            await self.catalog.read(timeout=2 * self.times.election)
        except OperationError as error:
            log.info("catalog.not.caught.up", reason=error.message)

    @property
    def id(self) -> str:
        return self.identity.id

    @property
    def name(self) -> str:
        """This peer's name in the mesh."""
        member = self.catalog.state.members.get(self.id)
        return member.name if member else self.events.peer

    async def _carry_out(self, request: ServedRequest, args: dict[str, Any]) -> Any:
        await self._composed.wait()
        result = await self.operations.run(request, args)
        if not self.catalog.leader:
            # What changes something could not have been done: this was a question, answered from an old copy.
            request.remark = f"this may be old: {self.catalog.quorum.no_leader().message}"
        return result

    def _post(self, peer: str, data: bytes) -> None:
        self.mail.send(peer, data)

    def _members(self) -> dict[str, str]:
        members = self.catalog.state.members.values()
        return {member.id: member.name for member in members if member.status == "member"}

    def _turned(self, peer: str, state: Reach) -> None:
        if state == "dead":
            self.links.drop(peer)
        self.events.emit("peer.turned", name=self.catalog.state.peer_name(peer), state=state)

    # Starting.

    async def open(self) -> None:
        """Listen, and have a catalog: the one on disk, a new mesh's, or the one joined by `config.join`.

        Raises `OperationError`.
        """
        config, state = self.config, self.catalog.state
        own = state.members.get(self.id)
        if own and config.name and config.name != own.name:
            raise OperationError(
                "conflict",
                f"{config.directory} belongs to the peer {own.name}, not {config.name}",
                f"start it with --name {own.name}, or give another --dir",
            )
        token = tokens.decode(config.join) if config.join else None
        if token and state.mesh and token.mesh != state.mesh:
            raise OperationError(
                "conflict",
                f"{config.directory} belongs to mesh {state.mesh}, the token to another",
                "give another --dir",
            )
        self._tcp = _listen(config.listen, own.address if own else None)
        port = self._tcp.socket.getsockname()[1]
        self.address = config.advertise or _outward(config.listen[0], port, token)
        gossip_port = self.gossip.open(config.listen[0], port, own.gossip if own else "")
        self.gossip_address = f"{self.address.rpartition(':')[0]}:{gossip_port}"
        self.events.peer = own.name if own else config.name or _host_name()
        if self.catalog.empty:
            await self._first_catalog()

    async def _first_catalog(self) -> None:
        config = self.config
        if config.join:
            await self._join(config.join)
            return
        member = entries.Member(
            id=self.id,
            name=self.events.peer,
            site=config.site,
            address=self.address,
            certificate=self.identity.certificate,
            facts=_facts(),
            gossip=self.gossip_address,
        )
        write_known(config.path(KNOWN), Known("", (), times=self.times))
        self.catalog.found(joining.new_mesh_id(), member)
        self.catalog.begin()
        self.events.emit("mesh.founded", mesh=self.catalog.state.mesh)

    async def _join(self, token: str) -> None:
        """Be let in, and keep what is needed to fetch the catalog; the peer must then be made anew."""
        answer = await joining.join(self.identity, token, self.events.peer, self.config.site, self.address)
        known = joining.known_after(answer)
        times = agreed(self.config.times, known.times)
        write_known(self.config.path(KNOWN), replace(known, times=times))
        self._joined_another = True
        self.events.emit("mesh.joined", mesh=answer["mesh"])
        self.outcome = Outcome.REPLACED

    # Running.

    async def run(self, ready: Callable[[], None] = lambda: None) -> Outcome:
        """Everything, until told to stop.

        `ready` is called once both sockets answer and the catalog is up to date, or cannot be.
        """
        if self.outcome is Outcome.REPLACED:
            return self.outcome
        assert self._tcp is not None
        unix = open_unix(self.config.socket)
        server = Server(
            self.identity,
            lambda: self.catalog.state,
            self.catalog.changed,
            self._carry_out,
            self.links.incoming_bulk,
            mail=self.mail,
        )
        with self._scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.links.run)
                await nursery.start(self.mail.run)
                await nursery.start(self.catalog.run)
                nursery.start_soon(server.serve, self._tcp, unix)
                await self._compose(nursery)
                nursery.start_soon(self._keep_membership)
                nursery.start_soon(self.standing.run)
                nursery.start_soon(self._keep_known)
                nursery.start_soon(self._report_leaders)
                nursery.start_soon(self._report_who_left)
                self.events.emit("peer.started", version=version())
                await self._settle()
                self._composed.set()
                ready()
        self.config.socket.unlink(missing_ok=True)
        return self.outcome

    async def _compose(self, nursery: trio.Nursery) -> None:
        """Make the parts that work for guests, and start them."""
        self.helpers = Helpers(nursery, _helper_binary())
        self.images = Images(self.config.cache, self.catalog, self.links, self.id)
        assert self._tcp is not None
        self.networks = Networks(
            own=self.id,
            catalog=self.catalog,
            links=self.links,
            helpers=self.helpers,
            events=self.events,
            lease=self.catalog.lease,
            sockets=self.config.runtime,
            log=self.config.path("switch.log"),
            listen=self._tcp.socket.getsockname()[:2],
            reconnect=self._reconnect,
        )
        self.guests = Guests(
            config=self.config,
            me=self.id,
            catalog=self.catalog,
            events=self.events,
            helpers=self.helpers,
            images=self.images,
            ports=self.networks,
            lease=self.catalog.lease,
        )
        self._shutdown += [self.networks.close, self.guests.end_all]
        self._closing.append(self.guests.close)
        vms = GuestOperations(self.guests, self.catalog, self.images, self.links)
        self.migrations = Migrations(
            Surroundings(
                identity=self.identity,
                catalog=self.catalog,
                links=self.links,
                events=self.events,
                helpers=self.helpers,
                guests=self.guests,
                moves=self.networks,
                notes=Notes(self.config.path("migrations")),
                sockets=self.config.runtime,
                logs=self.config.path("pages.log"),
                breakpoints=Breakpoints.of_environment(),
            )
        )
        self._shutdown.append(self.migrations.end_all)
        nets = NetworkOperations(self.networks, self.catalog, self.links)
        labs = Labs(self.catalog, self.images, self.links)
        changes = LabChanges(self.catalog, self.images, self.links, labs)
        moves = LabMoves(self.catalog, self.links)
        drains = Drains(self.catalog, self.links, self.events)
        for part in (
            self.images,
            vms,
            labs,
            changes,
            moves,
            drains,
            self.migrations,
            nets,
            self.networks.tunnels,
        ):
            self.operations.add(part)
        await nursery.start(self.networks.run)
        nursery.start_soon(self.guests.run)
        nursery.start_soon(self._make_up_ports)
        nursery.start_soon(self.migrations.run)
        nursery.start_soon(drains.run)
        nursery.start_soon(self.gossip.run, self.catalog, self.guests.memory_free)

    async def _settle(self) -> None:
        """Wait a moment until peer and mesh know of one another, so that the first answers are not old."""
        with trio.move_on_after(3 * self.times.election):
            await self.guests.settled()

    async def _reconnect(self, guest: str) -> None:
        await self.guests.local(guest).reconnect()

    async def _make_up_ports(self) -> None:
        """Once the log has caught up, since it says which guests are here; without a coordinator by what is
        known, and again later."""
        await self.guests.adopted.wait()
        with trio.move_on_after(3 * self.times.election):
            await self.catalog.wait(lambda _state: self.catalog.fresh)
        await self._make_up_known()
        await self.catalog.wait(lambda _state: self.catalog.fresh)
        await self.networks.drop_strangers()
        await self._make_up_known()

    async def _make_up_known(self) -> None:
        await self.networks.make_up([g for g in self.catalog.state.guests_of(self.id) if self._runs(g.key)])

    def _runs(self, guest: str) -> bool:
        try:
            return self.guests.local(guest).phase == "running"
        except OperationError:
            return False

    async def _keep_membership(self) -> None:
        """Tell the mesh where this peer is and what its host has; end when it is no member any more."""
        state = await self.catalog.wait(lambda state: state.index > 0 and self.id in state.members)
        own = state.members[self.id]
        self.events.peer = own.name
        facts = _facts()
        site = self.config.site or own.site
        told = (own.address, own.gossip, own.site, own.facts)
        if own.status == "member" and told != (self.address, self.gossip_address, site, facts):
            update = entries.UpdatePeer(
                peer=self.id, address=self.address, site=site, facts=facts, gossip=self.gossip_address
            )
            await self._tell(update)
        await self.catalog.wait(lambda state: state.members[self.id].status == "left")
        await self._left_behind()

    async def _left_behind(self) -> None:
        """This peer is no member any more: its guests end, and then it."""
        if self.outcome not in (Outcome.LEFT, Outcome.EVICTED):
            self.outcome = Outcome.EVICTED
            self.events.emit("peer.evicted")
            for key in self.guests.here():
                self.events.emit("guest.discarded", guest=key, reason="its peer was evicted")
        await self._end_guests()
        self._end_soon()

    async def _keep_known(self) -> None:
        """Keep who the members and voters are, for a start at which the catalog does not say it.

        What the catalog says before it is up to date may be older than what is kept.
        """
        await self.catalog.wait(lambda _state: self.catalog.fresh)
        known = self._known
        while True:
            state, configuration = self.catalog.state, self.catalog.configuration
            now = Known(
                state.mesh,
                present(state.members.values()),
                times=self.times,
                configuration=replace(configuration, learners=frozenset()),
            )
            if state.index and known != now and not self._joined_another:
                known = now
                try:
                    await trio.to_thread.run_sync(write_known, self.config.path(KNOWN), known)
                except OperationError as error:
                    log.warning("members.not.kept", reason=error.message)
                    known = None
                    await trio.sleep(KNOWN_PAUSE)
                    continue
            await self.catalog.changed.wait_until(partial(_differs, self.catalog, state, configuration))

    async def _report_leaders(self) -> None:
        """Tell people when another peer coordinates; each one speaks for itself."""
        term = 0
        while True:
            await self.catalog.changed.wait_until(
                lambda: self.catalog.leads and self.catalog.leadership.term != term  # noqa: B023
            )
            term = self.catalog.leadership.term
            self.events.emit("leader.elected", name=self.name, term=term)

    async def _report_who_left(self) -> None:
        """While this peer coordinates: nobody asks a peer that has left for its events any more."""
        async for _, proposal, state in self.catalog.changes():
            entry = proposal.entry if proposal else None
            if isinstance(entry, entries.RemovePeer) and not entry.force and self.catalog.leads:
                self.events.emit("peer.left", name=state.peer_name(entry.peer))

    async def _tell(self, entry: entries.Entry) -> None:
        while True:
            try:
                await self.catalog.propose(entry, timeout=ADVERTISE_TIMEOUT)
                return
            except OperationError as error:
                log.warning("peer.not.told", reason=error.message)
                if error.code not in api.UNDECIDED:
                    return
            await trio.sleep(ADVERTISE_PAUSE)

    def end(self) -> None:
        """End the peer; its guests go on."""
        self._scope.cancel()

    def _end_soon(self) -> None:
        """End once the answer to whoever asked for it has left."""
        self._scope.deadline = trio.current_time() + FAREWELL

    async def close(self) -> None:
        """Put everything away, after `run`; guests go on."""
        for close in reversed(self._closing):
            await close()
        if self._tcp is not None:
            await self._tcp.aclose()
        self.gossip.close()
        self.catalog.close()
        self.events.close()

    async def _end_guests(self) -> None:
        with trio.move_on_after(SHUTDOWN_TIMEOUT):
            for shutdown in reversed(self._shutdown):
                await shutdown()

    # Operations about the peer itself.

    def _facts_now(self) -> dict[str, Any]:
        return {"memory_free": self.guests.memory_free()}

    @operation("status", role="viewer")
    async def status(self, _request: Request, _args: api.Nothing) -> dict[str, Any]:
        """This peer at a glance; `guests` are its own, `peers` the members of the mesh."""
        state = self.catalog.state
        return {
            "peer": self.id,
            "name": self.name,
            "mesh": state.mesh,
            "address": self.address,
            "version": version(),
            "uptime": time.time() - self.started,
            "guests": len(state.guests_of(self.id)),
            "leader": state.peer_name(self.catalog.leader) or None,
            "peers": len(self._members()),
            "commit_index": state.index,
            "gossip": self.gossip.figures(),
        }

    @operation("stop", role="admin", args=api.Stop, timeout=2 * SHUTDOWN_TIMEOUT)
    async def stop(self, _request: Request, args: api.Stop) -> dict[str, Any]:
        """End this peer, its guests first."""
        if args.guests:
            await self._end_guests()
        self.events.emit("peer.stopped")
        self._end_soon()
        return {"name": self.name}

    @operation("peer.leave", role="admin", timeout=2 * LEAVE_TIMEOUT)
    async def leave(self, request: Request, _args: api.Nothing) -> dict[str, Any]:
        """Leave the mesh, without guests; the peer then ends. The others must be able to go on alone."""
        state = await self.catalog.read()
        if len(self._members()) < 2:
            raise OperationError(
                "conflict",
                f"{self.name} is the only peer of its mesh and cannot leave it",
                "mobictl down ends it",
            )
        if guests := state.guests_of(self.id):
            names = ", ".join(guest.key for guest in guests[:5])
            raise OperationError(
                "conflict",
                f"{self.name} still has guests: {names}",
                f"move them: mobictl peer drain {self.name}",
            )
        await self.mesh.release(state.members[self.id])
        await self.catalog.hand_over(LEAVE_TIMEOUT)
        self.outcome = Outcome.LEFT
        try:
            await self.catalog.propose(entries.RemovePeer(peer=self.id), request=step(request))
        except OperationError:
            self.outcome = Outcome.STOPPED
            raise
        return {"name": self.name}

    @operation("peer.join", role="admin", args=api.PeerJoin)
    async def join(self, _request: Request, args: api.PeerJoin) -> dict[str, Any]:
        """Join another mesh; this peer must be alone, with nothing in its catalog that would be lost."""
        state = self.catalog.state
        token = tokens.decode(args.token, time.time())
        if token.mesh == state.mesh:
            raise OperationError("exists", f"{self.name} is a member of that mesh already")
        if len(self._members()) > 1 or state.guests or state.labs:
            raise OperationError(
                "conflict",
                f"{self.name} has a mesh of its own with other peers, labs or guests",
                "join with a peer that is alone: mobid run --dir NEW --join TOKEN",
            )
        await self._join(args.token)
        self._end_soon()
        return {"name": self.name, "mesh": token.mesh}


def load(config: Config, identity: Identity) -> Peer:
    """The peer of a prepared directory, its catalog read; raises `OperationError`."""
    known = read_known(config.path(KNOWN))
    times = agreed(config.times, known.times if known else None)
    store = open_store(config.path(CATALOG), known, identity.id)
    if known is None and not store.empty:
        known = Known("", ())
    if known is not None and (known.fresh or known.times is None):
        write_known(config.path(KNOWN), replace(known, fresh=False, returning=False, times=times))
    if store.torn:
        log.warning("catalog.torn", bytes=store.torn)
    return Peer(config, identity, store, known, times)


def _settings(times: Times) -> Settings:
    return Settings(raft=raft.Settings(heartbeat=times.heartbeat, election=times.election))


def _differs(catalog: Catalog, before: State, configuration: Configuration) -> bool:
    return catalog.state.members is not before.members or catalog.configuration != configuration


def version() -> str:
    """The version of this package."""
    try:
        return importlib.metadata.version("mobitopolo")
    except importlib.metadata.PackageNotFoundError:
        return "0.1.0"


def _helper_binary() -> Path:
    try:
        return find_binary()
    except HelperError as error:
        # The peer is of use without guests; starting one will name the missing file.
        log.warning("helper.missing", reason=error.message)
        return Path("mobi-helper")


def _facts() -> entries.Facts:
    processor = host.processor()
    return entries.Facts(
        version=version(),
        memory=host.memory_total(),
        cpus=len(os.sched_getaffinity(0)),
        cpu_features=tuple(sorted(processor.features)),
        xsave_size=processor.xsave_size,
        oldest_protocol=versions.OLDEST,
        newest_protocol=versions.NEWEST,
    )


def _host_name() -> str:
    return socket.gethostname().partition(".")[0] or "peer"


def _listen(wanted: tuple[str, int], known: str | None) -> trio.SocketListener:
    """With port 0, the port of last time if it is free: the others know that one."""
    if wanted[1] == 0 and known:
        try:
            return open_tcp((wanted[0], int(known.rpartition(":")[2])))
        except OperationError:
            return open_tcp(wanted)
    return open_tcp(wanted)


def _outward(host: str, port: int, token: tokens.Token | None) -> str:
    """The address to tell others; for a wildcard, the one from which this host would reach them."""
    if host in ("0.0.0.0", "::"):
        target = token.doors[0][0].rpartition(":")[0] if token and token.doors else "192.0.2.1"
        family = socket.AF_INET6 if ":" in target else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((target.strip("[]"), 9))
                host = probe.getsockname()[0]
            except OSError:
                host = "127.0.0.1"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
