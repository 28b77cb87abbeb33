# SPDX-License-Identifier: Apache-2.0
"""Which guest starts on which peer: the part of a lab that depends on who is there.

A guest with `place:` goes where it says; the others go, in the file's order, to the peer that has the
most memory left after them, so that guests spread and a small peer is not filled first. Nothing is ever
half placed: either every guest has a peer, or `PlanError` tells all that is in the way.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from proto.lab import Guest, Lab, guests
from proto.problems import Problem, suggestion
from proto.units import format_size


@dataclass(frozen=True, slots=True)
class Host:
    """A peer as the planner sees it; `memory_free` in bytes, `images` None when it can fetch any."""

    name: str
    site: str
    memory_free: int
    images: Collection[str] | None = None


class PlanError(ValueError):
    """A lab that these hosts cannot carry; `problems` has every reason, with paths into the lab file."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("; ".join(problem.message for problem in problems[:5]))
        self.problems = problems


def place(lab: Lab, hosts: Sequence[Host]) -> dict[str, str]:
    """Guest → peer, for every guest of the lab. Raises PlanError."""
    return place_guests(guests(lab), hosts)


def place_guests(
    everyone: Sequence[Guest], hosts: Sequence[Host], stay: Mapping[str, str] = MappingProxyType({})
) -> dict[str, str]:
    """Guest → peer, for these guests. `stay` says where some of them are: they stay there if they fit.

    Raises PlanError.
    """
    free = {host.name: host.memory_free for host in hosts}
    placed: dict[str, str] = {}
    problems: list[Problem] = []
    for guest in sorted(everyone, key=lambda guest: guest.place is None):
        candidates, problem = _candidates(guest, hosts)
        if problem is None:
            candidates = [host for host in candidates if free[host.name] >= guest.memory]
            problem = None if candidates else _no_room(guest, free)
        if problem is not None:
            problems.append(problem)
            continue
        best = max(candidates, key=lambda host: (host.name == stay.get(guest.name), free[host.name]))
        free[best.name] -= guest.memory
        placed[guest.name] = best.name
    if problems:
        raise PlanError(problems)
    return {guest.name: placed[guest.name] for guest in everyone}


def _candidates(guest: Guest, hosts: Sequence[Host]) -> tuple[list[Host], Problem | None]:
    path = ("topology", "nodes", guest.name)
    found = list(hosts)
    if guest.place is not None and guest.place.peer is not None:
        found = [host for host in hosts if host.name == guest.place.peer]
        names = sorted(host.name for host in hosts)
        text = f"{guest.name!r} is placed at {guest.place.peer!r}, which is no peer here"
        if not found:
            return [], Problem((*path, "place"), text + suggestion(guest.place.peer, names, "the peers"))
    elif guest.place is not None:
        found = [host for host in hosts if host.site == guest.place.site]
        names = sorted({host.site for host in hosts if host.site})
        text = f"{guest.name!r} is placed at the site {guest.place.site!r}, where no peer is"
        if not found:
            return [], Problem((*path, "place"), text + suggestion(guest.place.site, names, "the sites"))
    able = [host for host in found if host.images is None or guest.image in host.images]
    if not able:
        images = sorted({image for host in found for image in host.images or ()})
        text = f"{guest.name!r} wants the image {guest.image!r}, which is not there"
        return [], Problem((*path, "image"), text + suggestion(guest.image, images, "the images"))
    return able, None


def _no_room(guest: Guest, free: dict[str, int]) -> Problem:
    where = f"at {guest.place}" if guest.place is not None else "on any peer"
    left = ", ".join(f"{name} {format_size(max(size, 0))}" for name, size in sorted(free.items())[:8])
    wanted = format_size(guest.memory)
    text = f"{guest.name!r} wants {wanted} of memory, and there is no room {where} (free: {left})"
    return Problem(("topology", "nodes", guest.name), text)
