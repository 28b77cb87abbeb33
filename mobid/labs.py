# SPDX-License-Identifier: Apache-2.0
"""The operations on labs: `lab.…`.

`lab up` checks everything that can be known before anything changes (the file, the names, who answers,
memory, images), writes the whole lab into the catalog as one entry, and then only watches: the owners'
keepers start the guests. It succeeds when all of them run. If one fails, or whoever asked goes away,
everything is taken down again, so there is no half-made lab; should that not succeed either, the error names
what is left.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Any

import trio

from mobid.catalog import Catalog
from mobid.guest_ops import wait_gone
from mobid.images import Images
from mobid.lab_planning import LabPlanning
from mobid.links import Links
from mobid.operations import Request, operation, step, taken_back
from proto import api, deploy, entries
from proto.api import OperationError
from proto.lab import Lab, guests
from proto.scale import scaled
from proto.state import State

UP_TIMEOUT = 600.0
DOWN_TIMEOUT = 90.0


class Labs:
    """`lab.…` at this peer."""

    def __init__(
        self, catalog: Catalog, images: Images, links: Links, clock: Callable[[], float] = time.time
    ) -> None:
        self._catalog = catalog
        self._links = links
        self._planning = LabPlanning(catalog, images, links)
        self._clock = clock

    # Deploying.

    @operation("lab.up", role="operator", args=api.LabFile, timeout=None)
    async def up(self, request: Request, args: api.LabFile) -> dict[str, Any]:
        """Deploy a lab: items `{stage, guest, state}`, result `{lab, guests}`."""
        await request.item({"stage": "checking", "guest": None, "state": None})
        name = await self._make(request, args)
        try:
            with trio.fail_after(UP_TIMEOUT):
                await self._watch_start(request, name)
        except trio.TooSlowError:
            error = OperationError("timeout", self._waiting_for(name))
            raise await self._rolled_back(name, error) from None
        except OperationError as error:
            raise await self._rolled_back(name, error) from None
        except BaseException:
            if taken_back(request):
                with trio.CancelScope(shield=True):
                    await self._take_down(name)
            raise
        return self.shown(name)

    async def _make(self, request: Request, args: api.LabFile) -> str:
        """Write the lab into the catalog, unless an earlier attempt of the command has; its name."""
        if self._catalog.applied(step(request)) is not None:
            return self._planning.read(args).name
        lab = self._planning.read(args)
        choices = await self.choices(args, lab)
        batch = deploy.lab_entries(lab, args.source, choices, deploy.taken_macs(self._catalog.state))
        await self._catalog.propose(batch, timeout=30, request=step(request))
        return lab.name

    async def choices(self, args: api.LabFile, lab: Lab) -> deploy.Choices:
        """Everything that can be known before a new lab is made. Raises `OperationError`."""
        state = self._catalog.state
        if lab.name in state.labs or any(guest.lab == lab.name for guest in state.guests.values()):
            raise OperationError(
                "exists",
                f"there is a lab {lab.name} already",
                f"mobictl lab apply changes it, mobictl lab down {lab.name} removes it",
            )
        everyone = guests(scaled(lab).lab)
        wanted: dict[str, str] = {}
        for guest in everyone:
            wanted.setdefault(guest.image, guest.name)
        images = await self._planning.images(args.source, lab, wanted)
        owners = await self._planning.owners(args.source, lab, everyone)
        return deploy.Choices(owners, images, {name: secrets.token_hex(4) for name in owners})

    async def _watch_start(self, request: Request, lab: str) -> None:
        """Tell each change of a guest's state until all run. Raises `OperationError` when one failed."""
        told: dict[str, str] = {}
        while True:
            state = self._catalog.state
            own = _guests_of(state, lab)
            for guest in own:
                if told.get(guest.key) != guest.state:
                    told[guest.key] = guest.state
                    await request.item({"stage": "starting", "guest": guest.name, "state": guest.state})
            for guest in own:
                if guest.state in ("failed", "lost"):
                    raise OperationError(
                        "failed", f"{guest.key} failed: {guest.message or guest.exit_reason}"
                    )
            if not own:
                raise OperationError("conflict", f"the lab {lab} was taken down meanwhile")
            if all(guest.state == "running" for guest in own):
                return
            await self._catalog.wait(lambda new, seen=state: new.index > seen.index)  # type: ignore[misc]

    def _waiting_for(self, lab: str) -> str:
        late = [f"{guest.name} is {guest.state}" for guest in _guests_of(self._catalog.state, lab)]
        return f"the lab {lab} did not come up within {UP_TIMEOUT:g} s: " + ", ".join(late[:8])

    async def _rolled_back(self, lab: str, error: OperationError) -> OperationError:
        """Take the lab down and say in the error what became of it."""
        with trio.CancelScope(shield=True):
            left = await self._take_down(lab)
        note = f"the lab was taken down again{left}"
        return OperationError(error.code, f"{error.message}; {note}", error.hint)

    async def _take_down(self, lab: str) -> str:
        """Remove the lab; a remark about what could not be removed, or nothing."""
        with trio.move_on_after(DOWN_TIMEOUT):
            try:
                silent = await self._remove(lab)
            except OperationError as error:
                return f", but not wholly: {error.message} (mobictl lab down {lab} tries again)"
            return f", but {', '.join(silent)} did not confirm it" if silent else ""
        return f", but that took too long (mobictl lab down {lab} tries again)"

    # Removing.

    @operation("lab.down", role="operator", args=api.LabArguments, timeout=None)
    async def down(self, request: Request, args: api.LabArguments) -> dict[str, Any]:
        """End and remove all guests of a lab, its networks and the lab: `{lab, guests, unconfirmed}`."""
        state = self._catalog.state
        if self._catalog.applied(step(request)) is None and not _guests_of(state, args.lab):
            state.find_lab(args.lab)
        count = len(_guests_of(state, args.lab))
        with trio.CancelScope(shield=True), trio.move_on_after(DOWN_TIMEOUT):
            silent = await self._remove(args.lab, step(request))
            return {"lab": args.lab, "guests": count, "unconfirmed": silent}
        raise OperationError("timeout", f"the guests of {args.lab} did not end in time", "try again")

    async def _remove(self, lab: str, request: str = "") -> list[str]:
        """Remove everything of a lab and wait for the owners; the names of those that did not confirm."""
        state = self._catalog.state
        batch = deploy.removal_entries(state, lab)
        if not batch.entries:
            return []
        owners: dict[str, tuple[str, ...]] = {}
        for guest in _guests_of(state, lab):
            owners[guest.owner] = (*owners.get(guest.owner, ()), guest.id)
        await self._catalog.propose(batch, timeout=30, request=request)
        return [state.peer_name(peer) for peer in await wait_gone(self._links, owners)]

    # Looking.

    @operation("lab.ls", role="viewer")
    async def ls(self, _request: Request, _args: api.Nothing) -> list[dict[str, Any]]:
        """All labs: `{lab, guests, running, created, source}`."""
        state = self._catalog.state
        rows = []
        for name in sorted(state.labs):
            own = _guests_of(state, name)
            rows.append(
                {
                    "lab": name,
                    "guests": len(own),
                    "running": sum(guest.state == "running" and self._answers(guest) for guest in own),
                    "created": state.labs[name].created,
                    "source": state.labs[name].source,
                }
            )
        return rows

    @operation("lab.show", role="viewer", args=api.LabArguments)
    async def show(self, _request: Request, args: api.LabArguments) -> dict[str, Any]:
        """One lab with its guests and networks."""
        lab = self._catalog.state.find_lab(args.lab)
        return {**self.shown(lab.name), "source": lab.source, "created": lab.created, "model": lab.model}

    @operation("lab.graph", role="viewer", args=api.LabArguments)
    async def graph(self, _request: Request, args: api.LabArguments) -> dict[str, Any]:
        """One lab as nodes and edges."""
        state = self._catalog.state
        return deploy.graph(state.find_lab(args.lab).name, state)

    def shown(self, lab: str) -> dict[str, Any]:
        """`{lab, guests, networks}`."""
        state = self._catalog.state
        return {
            "lab": lab,
            "guests": [self._row(guest, state) for guest in _guests_of(state, lab)],
            "networks": deploy.graph(lab, state)["networks"],
        }

    def _row(self, guest: entries.Guest, state: State) -> dict[str, Any]:
        return deploy.row(guest, state, self._clock(), self._links.liveness(guest.owner).state)

    def _answers(self, guest: entries.Guest) -> bool:
        return self._links.liveness(guest.owner).state == "alive"


def _guests_of(state: State, lab: str) -> list[entries.Guest]:
    return [guest for guest in state.guests.values() if guest.lab == lab]
