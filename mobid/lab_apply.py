# SPDX-License-Identifier: Apache-2.0
"""`lab.plan` and `lab.apply`: a changed file for a lab that runs.

The difference (`proto/labdiff.py`) becomes true in the catalog as one entry or not at all; then the owners'
keepers carry it out, and this only watches. Unlike `lab up`, which makes a lab or nothing, nothing is taken
back afterwards: what the file says is wanted, and if a guest does not come up, that is told, the others run,
and the same command with a mended file goes on from there.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

import trio

from mobid.catalog import Catalog
from mobid.guest_ops import wait_gone
from mobid.images import Images
from mobid.lab_planning import LabPlanning
from mobid.labs import UP_TIMEOUT, Labs
from mobid.links import Links
from mobid.moving import move_live
from mobid.operations import Request, operation, step
from proto import api, deploy, entries
from proto.api import OperationError
from proto.lab import Guest, Lab, guests
from proto.labdiff import Change, Difference, difference, images_to_find
from proto.scale import scaled
from proto.state import State

ATTEMPTS = 3
"""Times that the difference is computed anew because the lab was changed by another command meanwhile."""


class LabChanges:
    """`lab.plan` and `lab.apply` at this peer."""

    def __init__(
        self,
        catalog: Catalog,
        images: Images,
        links: Links,
        labs: Labs,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._catalog = catalog
        self._links = links
        self._labs = labs
        self._planning = LabPlanning(catalog, images, links)
        self._clock = clock

    @operation("lab.plan", role="viewer", args=api.LabFile, timeout=None)
    async def plan(self, _request: Request, args: api.LabFile) -> dict[str, Any]:
        """What lab up or lab apply would do: `{lab, exists, changes, untouched, guests}`; nothing changes.

        `guests` are those that would be made, and where.
        """
        lab = self._planning.read(args)
        state = self._catalog.state
        if lab.name not in state.labs:
            choices = await self._labs.choices(args, lab)
            batch = deploy.lab_entries(lab, args.source, choices, deploy.taken_macs(state))
            made = [entry.guest for entry in batch.entries if isinstance(entry, entries.AddGuest)]
            changes = [Change("guest", guest.name, "add") for guest in made]
            untouched = 0
        else:
            found = await self._difference(args, lab)
            owners, ids = await self._choices(args, found)
            batch = found.batch(args.source, owners, ids)
            made = [entry.guest for entry in batch.entries if isinstance(entry, entries.AddGuest)]
            changes, untouched = list(found.changes), found.untouched
        return {
            "lab": lab.name,
            "exists": lab.name in state.labs,
            "changes": [change.as_dict() for change in changes],
            "untouched": untouched,
            "guests": [deploy.row(guest, state, self._clock()) for guest in made],
        }

    @operation("lab.apply", role="operator", args=api.LabFile, timeout=None)
    async def apply(self, request: Request, args: api.LabFile) -> dict[str, Any]:
        """Make a lab what a file says, touching only what differs; one that does not exist is made.

        Items `{stage, guest, state}`; result `{lab, changes, untouched, guests, networks, unconfirmed}`.
        """
        lab = self._planning.read(args)
        if lab.name not in self._catalog.state.labs:
            return {**await self._labs.up(request, args), "changes": [], "untouched": 0, "unconfirmed": []}
        await request.item({"stage": "checking", "guest": None, "state": None})
        if self._catalog.applied(step(request)) is not None:
            return await self._watch_again(request, lab.name)
        before, found = await self._commit(args, lab, step(request))
        silent = await self._carry_out(request, before, found)
        await self._move(request, args, found)
        return {
            **self._labs.shown(lab.name),
            "changes": [change.as_dict() for change in found.changes],
            "untouched": found.untouched,
            "unconfirmed": silent,
        }

    async def _watch_again(self, request: Request, lab: str) -> dict[str, Any]:
        """An earlier attempt of the command made the change: wait for what is wanted."""
        wanted = (g for g in self._catalog.state.guests.values() if g.lab == lab and g.wanted == "running")
        _raise(await self._watch(request, State(), frozenset(guest.key for guest in wanted)))
        return {**self._labs.shown(lab), "changes": [], "untouched": 0, "unconfirmed": []}

    # Deciding.

    async def _difference(self, args: api.LabFile, lab: Lab) -> Difference:
        state = self._catalog.state
        images = await self._planning.images(args.source, lab, images_to_find(state, lab))
        return difference(state, lab, images)

    async def _choices(self, args: api.LabFile, found: Difference) -> tuple[dict[str, str], dict[str, str]]:
        """The owners and ids of the guests that are placed."""
        growing = [
            (guest, entry.memory)
            for entry in found.before
            if isinstance(entry, entries.ChangeGuest) and entry.memory is not None
            if (guest := self._catalog.state.guests.get(entry.guest)) is not None
        ]
        owners: dict[str, str] = {}
        if found.to_place or growing:
            owners = await self._planning.owners(args.source, found.file, found.to_place, found.stay, growing)
        return owners, {one.name: secrets.token_hex(4) for one in found.to_place}

    async def _commit(self, args: api.LabFile, lab: Lab, request: str) -> tuple[State, Difference]:
        """Write the difference into the catalog; the state that it was made from, and the difference."""
        for attempt in range(1, ATTEMPTS + 1):
            before = self._catalog.state
            found = await self._difference(args, lab)
            owners, ids = await self._choices(args, found)
            try:
                batch = found.batch(args.source, owners, ids)
                await self._catalog.propose(batch, timeout=30, request=request)
            except OperationError as error:
                if self._catalog.applied(request) is not None:
                    return before, found
                now = self._catalog.state.labs.get(lab.name)
                if attempt == ATTEMPTS or now is None or now.revision == found.old.revision:
                    raise error
            else:
                return before, found
        raise AssertionError("the last attempt returns or raises")

    # Watching.

    async def _carry_out(self, request: Request, before: State, found: Difference) -> list[str]:
        """Wait until what was changed runs and what was removed is gone; the names of peers that did not
        confirm. Raises `OperationError` that names the guests which do not run."""
        removed = [entry.guest for entry in found.before if isinstance(entry, entries.RemoveGuest)]
        owners: dict[str, tuple[str, ...]] = {}
        for key in removed:
            guest = before.guests[key]
            owners[guest.owner] = (*owners.get(guest.owner, ()), guest.id)
        silent: list[str] = []

        async def wait_removed() -> None:
            gone = await wait_gone(self._links, owners)
            silent.extend(before.peer_name(peer) for peer in gone)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_removed)
            trouble = await self._watch(request, before, _watched(before, found))
        _raise(trouble)
        return silent

    async def _watch(self, request: Request, before: State, keys: frozenset[str]) -> list[str]:
        """Tell each change of state of these guests until they run; what is wrong with those that do not."""
        told: dict[str, str] = {}
        with trio.move_on_after(UP_TIMEOUT):
            while True:
                state = self._catalog.state
                for key in sorted(keys):
                    guest = state.guests.get(key)
                    if guest is not None and told.get(key) != guest.state:
                        told[key] = guest.state
                        await request.item({"stage": "starting", "guest": guest.name, "state": guest.state})
                if all(self._is_settled(before, key) for key in keys):
                    break
                await self._catalog.wait(lambda new, seen=state: new.index > seen.index)  # type: ignore[misc]
        return [text for key in sorted(keys) if (text := self._trouble(before, key))]

    def _is_settled(self, before: State, key: str) -> bool:
        guest = self._catalog.state.guests.get(key)
        if guest is None or _is_there(before, guest):
            return True
        if guest.state in ("lost", "fenced") or self._links.liveness(guest.owner).state == "dead":
            return True
        # One that failed before and is wanted again has not been tried yet.
        return guest.state == "failed" and guest.wanted != "running"

    def _trouble(self, before: State, key: str) -> str:
        guest = self._catalog.state.guests.get(key)
        if guest is None:
            return f"{key} was removed meanwhile"
        if _is_there(before, guest):
            return ""
        if self._links.liveness(guest.owner).state == "dead":
            owner = self._catalog.state.peer_name(guest.owner)
            return (
                f"{key} is at {owner}, which does not answer; it becomes what the file says when that is back"
            )
        why = guest.message or guest.exit_reason
        return f"{key} is {guest.state}" + (f": {why}" if why else "")

    # Moving.

    async def _move(self, request: Request, args: api.LabFile, found: Difference) -> None:
        """Guests whose place the file has changed go there, one after the other."""
        trouble: list[str] = []
        specifications = {one.name: one for one in guests(scaled(found.file).lab)}
        for name in found.moves:
            try:
                await self._move_one(request, args, found.file, specifications[name])
            except OperationError as error:
                trouble.append(error.message)
        if trouble:
            raise OperationError(
                "failed",
                "; ".join(trouble[:5]),
                "all else is as the file says; mobictl vm migrate tries again",
            )

    async def _move_one(self, request: Request, args: api.LabFile, lab: Lab, wanted: Guest) -> None:
        guest = self._catalog.state.guests.get(f"{lab.name}/{wanted.name}")
        if guest is None:
            return
        to = (await self._planning.owners(args.source, lab, [wanted]))[wanted.name]
        if to == guest.owner:
            return
        name = self._catalog.state.peer_name(to)
        await request.item({"stage": "moving", "guest": guest.name, "state": f"moving to {name}"})
        await move_live(self._links, guest, to)
        await request.item({"stage": "moving", "guest": guest.name, "state": f"at {name}"})


def _raise(trouble: list[str]) -> None:
    if trouble:
        more = f"; and {len(trouble) - 5} more" if len(trouble) > 5 else ""
        raise OperationError(
            "failed",
            "; ".join(trouble[:5]) + more,
            "the rest of the lab is as the file says; mend the cause and run lab apply again",
        )


def _watched(before: State, found: Difference) -> frozenset[str]:
    """The guests that start because of the difference."""
    lab = found.file.name
    keys = {f"{lab}/{one.name}" for one in found.to_place}
    for change in found.changes:
        key = f"{lab}/{change.name}"
        guest = before.guests.get(key) if change.what == "guest" else None
        wanted = guest is not None and guest.wanted == "running"
        if change.how == "start" or (change.how == "restart" and wanted):
            keys.add(key)
    return frozenset(keys)


def _is_there(before: State, guest: entries.Guest) -> bool:
    """Whether a guest runs as it is wanted, and not still as it was before."""
    old: Mapping[str, entries.Guest] = before.guests
    was = old.get(guest.key)
    if guest.wanted != "running":
        return guest.state in (guest.wanted, "stopped")
    again = was is None or was.id != guest.id or was.state != "running" or guest.started > was.started
    return guest.state == "running" and again
