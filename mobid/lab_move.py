# SPDX-License-Identifier: Apache-2.0
"""`lab.move`: a whole lab goes to one peer, its running guests live and one after the other."""

from __future__ import annotations

from typing import Any

from mobid.catalog import Catalog
from mobid.links import Links
from mobid.moving import move_live
from mobid.operations import Request, operation
from proto import api, entries
from proto.api import OperationError


class LabMoves:
    """`lab.move` at this peer."""

    def __init__(self, catalog: Catalog, links: Links) -> None:
        self._catalog = catalog
        self._links = links

    @operation("lab.move", role="operator", args=api.LabMove, timeout=None)
    async def move(self, request: Request, args: api.LabMove) -> dict[str, Any]:
        """Move the running guests of a lab: items `{guest, state}`; `{lab, to, moved, stayed}`.

        `stayed` has those that do not run: `{guest, reason}`. Raises `OperationError` that names the guests
        whose move failed, after all were tried.
        """
        state = self._catalog.state
        lab, to = state.find_lab(args.lab), state.find_peer(args.to)
        moved: list[str] = []
        stayed: list[dict[str, str]] = []
        failed: list[str] = []
        for key in sorted(key for key, guest in state.guests.items() if guest.lab == lab.name):
            guest = self._catalog.state.guests.get(key)
            if guest is None or guest.owner == to.id:
                continue
            if guest.state != "running":
                stayed.append({"guest": guest.name, "reason": f"it is {guest.state}"})
                continue
            try:
                await self._move_one(request, guest, to)
                moved.append(guest.name)
            except OperationError as error:
                failed.append(error.message)
        if failed:
            done = f"; {len(moved)} moved" if moved else ""
            raise OperationError("failed", "; ".join(failed[:5]) + done, "the same command tries again")
        return {"lab": lab.name, "to": to.name, "moved": moved, "stayed": stayed}

    async def _move_one(self, request: Request, guest: entries.Guest, to: entries.Member) -> None:
        await request.item({"guest": guest.name, "state": f"moving to {to.name}"})
        await move_live(self._links, guest, to.id)
        await request.item({"guest": guest.name, "state": f"at {to.name}"})
