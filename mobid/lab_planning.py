# SPDX-License-Identifier: Apache-2.0
"""What must be known before a lab is made or changed: the file's meaning, images, who has room.

Everything here only looks. Whatever is wrong is told with its place in the file, and nothing was changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from mobid.catalog import Catalog
from mobid.images import Images
from mobid.links import Links
from mobid.placing import hosts
from proto import api, entries
from proto.api import OperationError
from proto.lab import Guest, Lab
from proto.labcheck import LabError, read_lab
from proto.plan import PlanError, place_guests
from proto.problems import Problem
from proto.scale import scaled
from proto.state import State

SHOWN_PROBLEMS = 5


class LabPlanning:
    """Reads lab files and finds images and places for their guests."""

    def __init__(self, catalog: Catalog, images: Images, links: Links) -> None:
        self._catalog = catalog
        self._images = images
        self._links = links

    def read(self, args: api.LabFile) -> Lab:
        """The lab of a file. Raises `OperationError` with all that is wrong."""
        try:
            return read_lab(args.lab)
        except LabError as error:
            raise _refusal(args.source, error.problems) from None

    async def images(self, source: str, lab: Lab, wanted: Mapping[str, str]) -> dict[str, tuple[str, str]]:
        """Image reference → (name, SHA-256) for these, each with a guest that wants it."""
        whole = scaled(lab)
        found: dict[str, tuple[str, str]] = {}
        for reference, guest in wanted.items():
            try:
                found[reference] = await self._images.resolve(reference)
            except OperationError as error:
                where = whole.in_file(Problem(("topology", "nodes", guest, "image"), "")).where
                mend = f" ({error.hint})" if error.hint else ""
                text = f"{source}: {where}: {error.message}{mend}"
                raise OperationError(error.code, text, "nothing was changed") from None
        return found

    async def owners(
        self,
        source: str,
        lab: Lab,
        wanted: Sequence[Guest],
        stay: Mapping[str, str] | None = None,
        more: Sequence[tuple[entries.Guest, int]] = (),
    ) -> dict[str, str]:
        """Guest → id of a peer that has room for it and is where the file says.

        `stay` has the peers (ids) of guests that end before they are made again; `more` has running guests
        that will have another size of memory where they are.
        """
        state = self._catalog.state
        there = await hosts(self._catalog, self._links)
        for guest in wanted:
            if guest.place is not None and guest.place.peer in there.silent:
                raise OperationError(
                    "unreachable",
                    f"{source}: {guest.name!r} is placed at {guest.place.peer!r}, which does not answer",
                    "mobictl peer ls shows who does",
                )
        names = {guest: state.peer_name(peer) for guest, peer in (stay or {}).items()}
        change = _memory_changes(state, lab.name, names, more)
        room = [replace(h, memory_free=h.memory_free + change.get(h.name, 0)) for h in there.hosts]
        _check_growth(source, more, {host.name: host.memory_free for host in room}, state)
        try:
            placed = place_guests(wanted, room, names)
        except PlanError as error:
            whole = scaled(lab)
            raise _refusal(source, [whole.in_file(problem) for problem in error.problems]) from None
        return {name: state.find_peer(peer).id for name, peer in placed.items()}


def _memory_changes(
    state: State, lab: str, stay: Mapping[str, str], more: Sequence[tuple[entries.Guest, int]]
) -> dict[str, int]:
    """Peer's name → bytes that become free there (or are needed: below zero)."""
    change: dict[str, int] = {}
    for name, peer in stay.items():
        change[peer] = change.get(peer, 0) + state.guests[f"{lab}/{name}"].memory
    for guest, memory in more:
        peer = state.peer_name(guest.owner)
        change[peer] = change.get(peer, 0) + guest.memory - memory
    return change


def _check_growth(
    source: str, more: Sequence[tuple[entries.Guest, int]], free: Mapping[str, int], state: State
) -> None:
    for guest, memory in more:
        peer = state.peer_name(guest.owner)
        if memory > guest.memory and free.get(peer, 0) < 0:
            raise OperationError(
                "no-room",
                f"{source}: {peer} has no room for the memory that {guest.name!r} shall have",
                "nothing was changed; move a guest away from there first",
            )


def _refusal(source: str, problems: list[Problem]) -> OperationError:
    """All problems of a lab file as one error."""
    shown = "; ".join(f"{problem.where}: {problem.message}" for problem in problems[:SHOWN_PROBLEMS])
    more = f"; and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
    return OperationError("bad-argument", f"{source}: {shown}{more}", "nothing was changed")
