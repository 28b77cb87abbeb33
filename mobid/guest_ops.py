# SPDX-License-Identifier: Apache-2.0
"""The operations on guests: `vm.…`.

Those that change what a guest shall be write that into the catalog and wait until the guest's keeper has
reported it; those that talk to a guest (programs, files, console) go through its agent or its shim, at the
peer where it lives.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import trio
from pydantic import Field

from mobid.agent import Agent, AgentRefused, AgentTimeout, Session
from mobid.catalog import Catalog
from mobid.guests import Guests
from mobid.images import Images
from mobid.links import Links
from mobid.operations import Request, made_id, operation, step, taken_back
from mobid.placing import hosts, place_one
from mobid.tasks import background
from proto import api, deploy, entries
from proto.agent import AgentError, FrameType
from proto.api import Arguments, OperationError
from proto.drain import Host, destination
from proto.lab import DEFAULT_LAB, DEFAULT_MEMORY
from proto.labfields import MEMORY, PAGE
from proto.state import State
from proto.units import format_size

AGENT_TIMEOUT = 20.0
CHANGE_TIMEOUT = 180.0
GONE_TIMEOUT = 60.0
SILENT_TIMEOUT = 5.0
"""Seconds for a peer that seems dead anyway."""
FOLLOW_INTERVAL = 0.25
LOG_CHUNK = 64 << 10
NO_LEASE = "its peer has no lease: it is cut off from the majority"
CHUNK = 64 << 10


class GuestGone(Arguments):
    """`guest.gone`: wait until this peer has nothing left of these guests (ids)."""

    ids: list[str] = Field(max_length=10_000)


class GuestOperations:
    """`vm.…` at this peer."""

    def __init__(
        self,
        guests: Guests,
        catalog: Catalog,
        images: Images,
        links: Links,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._guests = guests
        self._catalog = catalog
        self._images = images
        self._links = links
        self._clock = clock

    # Looking.

    @operation("vm.ls", role="viewer")
    async def ls(self, _request: Request, _args: api.Nothing) -> list[dict[str, Any]]:
        """All guests of the mesh, by lab and name."""
        state = self._catalog.state
        return [self._row(state.guests[key]) for key in sorted(state.guests)]

    @operation("vm.show", role="viewer", args=api.VmArguments)
    async def show(self, _request: Request, args: api.VmArguments) -> dict[str, Any]:
        """One guest, with everything the catalog knows of it."""
        state = self._catalog.state
        guest = self._seen(state.find_guest(args.vm))
        return deploy.details(guest, state, self._clock(), self._owner_state(guest))

    # Making and removing.

    @operation("vm.run", role="operator", args=api.VmRun, timeout=None)
    async def run(self, request: Request, args: api.VmRun) -> dict[str, Any]:
        """Make one guest of an image and wait until it runs; if that fails nothing of it is left."""
        id = made_id(request, "guest", 8)
        if self._catalog.applied(step(request)) is None:
            guest = await self._new_guest(args, id)
            await self._catalog.propose(entries.AddGuest(guest=guest), request=step(request))
        made = [guest for guest in self._catalog.state.guests.values() if guest.id == id]
        if not made:
            raise OperationError("not-found", "the guest was removed meanwhile")
        try:
            await request.item({"stage": "starting", "guest": made[0].key, "state": made[0].state})
            return self._row(await self._settled(made[0].key, "running", ("running",)))
        except BaseException as error:
            if not isinstance(error, trio.Cancelled) or taken_back(request):
                with (
                    trio.CancelScope(shield=True),
                    trio.move_on_after(GONE_TIMEOUT),
                    suppress(OperationError),
                ):
                    await self._remove(made[0])
            raise

    async def _new_guest(self, args: api.VmRun, id: str) -> entries.Guest:
        image, digest = await self._images.resolve(args.image)
        state = self._catalog.state
        memory = _whole_pages(args.memory or DEFAULT_MEMORY)
        owner = place_one(args.place, memory, await hosts(self._catalog, self._links), state)
        return entries.Guest(
            key=f"{DEFAULT_LAB}/{args.name or _free_name(state, image)}",
            id=id,
            image=image,
            image_hash=digest,
            memory=memory,
            disk=args.disk,
            cpus=args.cpus,
            owner=owner,
            on_partition=args.on_partition,
        )

    @operation("vm.rm", role="operator", args=api.VmForce, timeout=CHANGE_TIMEOUT)
    async def rm(self, request: Request, args: api.VmForce) -> dict[str, Any]:
        """Remove a guest and its disks; one that runs only with `force`."""
        if self._catalog.applied(step(request)) is not None:
            lab, _, name = args.vm.rpartition("/")
            return {"vm": name, "lab": lab or DEFAULT_LAB, "unconfirmed": []}
        guest = self._catalog.state.find_guest(args.vm)
        if guest.state in ("running", "paused", "migrating", "starting") and not args.force:
            raise OperationError(
                "conflict",
                f"{guest.key} is {guest.state}",
                f"stop it first, or: mobictl vm rm {guest.key} --force",
            )
        silent = await self._remove(guest, step(request))
        return {"vm": guest.name, "lab": guest.lab, "unconfirmed": silent}

    async def _remove(self, guest: entries.Guest, request: str = "") -> list[str]:
        """Remove it; the names of peers that did not confirm that it has ended."""
        await self._catalog.propose(entries.RemoveGuest(guest=guest.key), request=request)
        silent = await wait_gone(self._links, {guest.owner: (guest.id,)})
        return [self._catalog.state.peer_name(peer) for peer in silent]

    @operation("guest.gone", role="peer", args=GuestGone, timeout=GONE_TIMEOUT)
    async def gone(self, _request: Request, args: GuestGone) -> dict[str, Any]:
        """Answer when nothing is left here of guests that the catalog does not know any more."""
        await self._catalog.wait(lambda s: not {g.id for g in s.guests.values()}.intersection(args.ids))
        for id in args.ids:
            await self._guests.wait_gone(id)
        return {}

    # Changing what is wanted.

    @operation("vm.start", role="operator", args=api.VmArguments, timeout=CHANGE_TIMEOUT)
    async def start(self, request: Request, args: api.VmArguments) -> dict[str, Any]:
        """Start a guest that was stopped, or that has ended; one that was lost begins anew elsewhere."""
        guest = self._catalog.state.find_guest(args.vm)
        if guest.state == "lost":
            await self._place_anew(guest, step(request))
        elif guest.state == "fenced":
            raise OperationError(
                "conflict",
                f"{guest.key} waits until it is certain that it has ended elsewhere: {guest.message}",
                "it then starts by itself, on a peer that has room",
            )
        elif self._owner_state(guest) == "dead":
            owner = self._catalog.state.peer_name(guest.owner)
            raise OperationError(
                "unreachable",
                f"{guest.key} is at {owner}, which does not answer",
                f"if {owner} will never come back: mobictl peer evict {owner}, and start the guest then",
            )
        return self._row(await self._want(guest.key, "running", ("running",), step(request)))

    async def _place_anew(self, guest: entries.Guest, request: str) -> None:
        """Give a lost guest to a peer that has room: it begins there from its image."""
        state = self._catalog.state
        there = await hosts(self._catalog, self._links)
        members = (state.find_peer(host.name) for host in there.hosts)
        free = {host.name: host.memory_free for host in there.hosts}
        found = {member.id: Host(member, free[member.name]) for member in members}
        to, reason = destination(state, guest, found)
        if not to:
            raise OperationError("no-room", f"{guest.key} was lost and cannot begin anew: {reason}")
        move = entries.MoveGuest(guest=guest.key, epoch=guest.epoch, owner=to)
        want = entries.SetWanted(guest=guest.key, wanted="running")
        await self._catalog.propose(entries.Batch(entries=(move, want)), request=request)

    @operation("vm.stop", role="operator", args=api.VmForce, route="guest", timeout=CHANGE_TIMEOUT)
    async def stop(self, request: Request, args: api.VmForce) -> dict[str, Any]:
        """Ask a guest to power off and kill it if it does not; with `force` kill it at once."""
        return self._row(await self._stop(args, step(request)))

    @operation("vm.restart", role="operator", args=api.VmForce, route="guest", timeout=2 * CHANGE_TIMEOUT)
    async def restart(self, request: Request, args: api.VmForce) -> dict[str, Any]:
        """Stop a guest and start it again."""
        started = step(request, "vm.restart.start")
        if self._catalog.applied(started) is None:
            await self._stop(args, step(request))
        return self._row(await self._want(args.vm, "running", ("running",), started))

    @operation("vm.pause", role="operator", args=api.VmArguments, route="guest", timeout=CHANGE_TIMEOUT)
    async def pause(self, request: Request, args: api.VmArguments) -> dict[str, Any]:
        """Freeze a guest where it is."""
        self._must_be(args.vm, ("running", "paused"))
        return self._row(await self._want(args.vm, "paused", ("paused",), step(request)))

    @operation("vm.resume", role="operator", args=api.VmArguments, route="guest", timeout=CHANGE_TIMEOUT)
    async def resume(self, request: Request, args: api.VmArguments) -> dict[str, Any]:
        """Let a paused guest go on."""
        self._must_be(args.vm, ("running", "paused"))
        return self._row(await self._want(args.vm, "running", ("running",), step(request)))

    async def _stop(self, args: api.VmForce, request: str) -> entries.Guest:
        keeper, guest = self._guests.keeper(args.vm), self._catalog.state.find_guest(args.vm)
        again = self._catalog.applied(request) is not None and guest.wanted != "stopped"
        if keeper is not None and args.force and not again:
            keeper.force = True
            keeper.wake()
        return await self._want(args.vm, "stopped", ("stopped", "failed"), request)

    async def _want(
        self, key: str, wanted: entries.WantedState, states: tuple[entries.GuestState, ...], request: str
    ) -> entries.Guest:
        guest = self._catalog.state.guests.get(key)
        if guest is None or guest.wanted != wanted:
            await self._catalog.propose(entries.SetWanted(guest=key, wanted=wanted), request=request)
        return await self._settled(key, wanted, states)

    async def _settled(
        self, key: str, wanted: entries.WantedState, states: tuple[entries.GuestState, ...]
    ) -> entries.Guest:
        """Wait until the guest is in one of these states. Raises `OperationError` if that was given up."""

        def over(state: State) -> bool:
            guest = state.guests.get(key)
            return guest is None or guest.wanted != wanted or guest.state in states

        try:
            state = await self._catalog.wait(over, timeout=CHANGE_TIMEOUT)
        except OperationError as error:
            guest = self._catalog.state.guests.get(key)
            if error.code != "timeout" or guest is None:
                raise
            why = f": {guest.message}" if guest.message else ""
            raise OperationError("timeout", f"{key} is still {guest.state}{why}") from None
        guest = state.guests.get(key)
        if guest is None:
            raise OperationError("not-found", f"{key} was removed meanwhile")
        if guest.state not in states:
            raise OperationError("failed", guest.message or f"{key} is {guest.state} ({guest.exit_reason})")
        return guest

    def _must_be(self, key: str, states: tuple[entries.GuestState, ...]) -> None:
        guest = self._catalog.state.find_guest(key)
        if guest.state not in states:
            raise OperationError("conflict", f"{key} is {guest.state}", _mend(guest))

    def _row(self, guest: entries.Guest) -> dict[str, Any]:
        state, owner_state = self._catalog.state, self._owner_state(guest)
        return deploy.row(self._seen(guest), state, self._clock(), owner_state)

    def _owner_state(self, guest: entries.Guest) -> str:
        return self._links.liveness(guest.owner).state

    def _seen(self, guest: entries.Guest) -> entries.Guest:
        """The guest as the catalog knows it, or standing still here without a lease, which nobody reports."""
        if not self._guests.stands_still(guest):
            return guest
        return guest.model_copy(update={"state": "frozen", "message": NO_LEASE})

    # Talking to a guest.

    @operation("vm.exec", role="operator", args=api.VmExec, route="guest", timeout=None)
    async def exec(self, request: Request, args: api.VmExec) -> dict[str, Any]:
        """Run a program in a guest: both output streams, its input, its exit code or signal."""
        async with (
            self._agent(args.vm) as agent,
            agent.exec(args.argv, args.env, args.cwd, args.tty) as session,
        ):
            result, _ = await _with_input(request, session, _pass_output)
        return {"code": result.get("code"), "signal": result.get("signal") or None}

    @operation("vm.get", role="operator", args=api.VmGet, route="guest", timeout=None)
    async def get(self, request: Request, args: api.VmGet) -> dict[str, Any]:
        """Read a file of a guest."""
        async with (
            self._agent(args.vm) as agent,
            agent.session(FrameType.GET, {"path": args.path}) as session,
        ):
            size = 0
            while (piece := await session.read()) is not None:
                size += len(piece[1])
                if piece[1]:
                    await request.item({"data": piece[1]})
            result = session.result or {}
            _check_size(args, size, result)
        return {"size": size, "mode": result.get("mode")}

    @operation("vm.put", role="operator", args=api.VmPut, route="guest", timeout=None)
    async def put(self, request: Request, args: api.VmPut) -> dict[str, Any]:
        """Write a file of a guest; it has its name only once all of it has arrived."""
        arguments = {"path": args.path, "mode": args.mode, "size": args.size}
        async with self._agent(args.vm) as agent, agent.session(FrameType.PUT, arguments) as session:
            result, size = await _with_input(request, session, _drop_output)
            _check_size(args, size, result)
        return {"size": size, "mode": args.mode}

    @asynccontextmanager
    async def _agent(self, key: str) -> AsyncIterator[Agent]:
        """The agent of a guest that runs here; what goes wrong with it is told as an `OperationError`."""
        guest = self._seen(self._catalog.state.find_guest(key))
        if guest.state not in ("running", "starting", "migrating"):
            why = f": {guest.message}" if guest.state == "frozen" else ""
            raise OperationError("conflict", f"{key} is {guest.state}{why}", _mend(guest))
        try:
            yield await self._guests.local(key).ready_agent(AGENT_TIMEOUT)
        except AgentRefused as error:
            code: api.ErrorCode = "not-found" if error.code == "not-found" else "failed"
            raise OperationError(code, f"{key}: {error}") from error
        except AgentTimeout as error:
            raise OperationError("timeout", str(error), f"mobictl vm logs {key} shows its console") from error
        except AgentError as error:
            raise OperationError("failed", f"{key}: {error}") from error

    @operation("vm.console", role="operator", args=api.VmArguments, route="guest", timeout=None)
    async def console(self, request: Request, args: api.VmArguments) -> dict[str, Any]:
        """A guest's console and keyboard, until the guest ends or another console takes its place."""
        stream = await self._guests.local(args.vm).console()

        async def type_into() -> None:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                while True:
                    await stream.send_all(_data_of(await request.input()))

        async with stream, background(type_into):
            with suppress(trio.BrokenResourceError):  # the guest ended: the same as the end of the stream
                while data := await stream.receive_some(CHUNK):
                    await request.item({"data": bytes(data)})
        return {}

    @operation("vm.logs", role="viewer", args=api.VmLogs, route="guest", timeout=None)
    async def logs(self, request: Request, args: api.VmLogs) -> dict[str, Any]:
        """What a guest's console has printed; with `follow` also what it prints from now on."""
        path = self._guests.local(args.vm).console_log
        older, position = path.with_name(path.name + ".1"), 0
        file, begin = args.after or (0, 0)
        for part in (older, path) if _inode(path) != file else (path,):
            position = await _send_log(request, part, begin if _inode(part) == file else 0)
        while args.follow and path.parent.exists():
            await trio.sleep(FOLLOW_INTERVAL)
            if path.exists() and path.stat().st_size < position:  # rotated
                position = await _send_log(request, older, position)
                position = 0
            position = await _send_log(request, path, position)
        return {}


async def wait_gone(links: Links, guests: dict[str, tuple[str, ...]]) -> list[str]:
    """Wait until the owners (ids) have nothing left of their removed guests (ids); those that did not answer.

    A peer that cannot be asked will remove them when it comes back and reads the catalog.
    """
    silent: list[str] = []

    async def ask(owner: str, ids: tuple[str, ...]) -> None:
        timeout = GONE_TIMEOUT if links.liveness(owner).state != "dead" else SILENT_TIMEOUT
        try:
            await links.call(owner, "guest.gone", GuestGone(ids=list(ids)), timeout=timeout)
        except OperationError:
            silent.append(owner)

    async with trio.open_nursery() as nursery:
        for owner, ids in guests.items():
            nursery.start_soon(ask, owner, ids)
    return sorted(silent)


def _mend(guest: entries.Guest) -> str:
    if guest.state == "paused":
        return f"mobictl vm resume {guest.key} lets it go on"
    if guest.state == "frozen":
        return "it goes on by itself when its peer has a lease again"
    if guest.state in ("stopped", "failed"):
        return f"mobictl vm start {guest.key} starts it"
    return ""


def _whole_pages(memory: int) -> int:
    least, most = MEMORY
    if not least <= memory <= most:
        raise OperationError(
            "bad-argument",
            f"a guest's memory is {format_size(least)} to {format_size(most)}, not {memory} bytes",
        )
    return -(-memory // PAGE) * PAGE


def _free_name(state: State, image: str) -> str:
    taken = {guest.name for guest in state.guests.values() if guest.lab == DEFAULT_LAB}
    return next(name for n in range(1, len(taken) + 2) if (name := f"{image[:24]}-{n}") not in taken)


async def _with_input(
    request: Request, session: Session, take_output: Callable[[Request, Session], Awaitable[None]]
) -> tuple[Mapping[str, object], int]:
    """Pass the caller's input on while the output is taken; the session's result, and the input's bytes."""
    wrong: list[OperationError] = []
    size = 0

    async def pass_input() -> None:
        nonlocal size
        try:
            while data := _data_of(await request.input()):
                size += len(data)
                await session.write(data)
            await session.close_input()
        except OperationError as error:
            wrong.append(error)
            session.fail(AgentError(error.message))

    try:
        async with background(pass_input):
            await take_output(request, session)
    except AgentError:
        if wrong:
            raise wrong[0] from None
        raise
    return session.result or {}, size


def _check_size(args: api.VmGet, size: int, result: Mapping[str, object]) -> None:
    if result.get("size") != size:
        raise OperationError(
            "failed", f"{args.path} of {args.vm} was not copied whole: {size} of {result.get('size')} bytes"
        )


async def _pass_output(request: Request, session: Session) -> None:
    while (piece := await session.read()) is not None:
        channel, data = piece
        if data:
            await request.item({"channel": channel, "data": data})


async def _drop_output(_request: Request, session: Session) -> None:
    await session.finish()


def _data_of(item: dict[str, Any]) -> bytes:
    data = item.get("data")
    if not isinstance(data, bytes) or len(data) > 1 << 20 or item.get("channel", 0) != 0:
        raise OperationError("bad-argument", "an input is {channel: 0, data: bytes}, at most 1 MiB")
    return data


def _inode(path: Path) -> int:
    """What tells a log from the one that took its place; 0 if there is none."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0


async def _send_log(request: Request, path: Path, position: int) -> int:
    """Send a log file from `position` on; where it ended."""
    try:
        with path.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            file.seek(position)
            while data := file.read(LOG_CHUNK):
                await request.item({"data": data, "position": [inode, file.tell()]})
            return file.tell()
    except FileNotFoundError:
        return 0
