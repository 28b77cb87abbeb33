# SPDX-License-Identifier: Apache-2.0
"""What becomes of the guests of a peer whose lease has run out: the coordinator's decision, as entries.

Only guests that are bound to a lease (`on-partition: freeze`) are touched; a guest that runs on without a
lease may do so on the other side of a cut, and nobody here can know. One that is being moved is left to its
handover (`proto/handover.py`). Each of the others that people want running gets the peer with most memory
left after those placed before it, at the site where its lab wants it if that can be; if there is no room at
all, it is marked `fenced`, and looked at again as long as its peer stays lost. One that is not wanted running
waits for its peer; if that has left the mesh, it is marked `lost`: only now may people start it elsewhere.

The entries name the epoch they were decided in, so that one that comes too late changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from proto import reconcile
from proto.admission import RESERVED_MEMORY
from proto.entries import FailOverGuest, Guest, MarkGuest, Member
from proto.scale import place_in_model
from proto.state import State
from proto.units import format_size

_RUNS = ("pending", "starting", "running", "paused", "migrating", "frozen", "restoring", "fenced")
"""States of a guest that is not meant to be at rest; one that failed or was lost waits for people."""

_UNKNOWN = 1 << 62


@dataclass(frozen=True, slots=True)
class Host:
    """A peer that is there: it holds a lease. `memory_free` in bytes, None if its host has not said."""

    member: Member
    memory_free: int | None = None


def fail_over(state: State, lost: str, hosts: Mapping[str, Host]) -> list[FailOverGuest | MarkGuest]:
    """The entries for the guests of the peer `lost`, in the order of their keys. `hosts` by peer id."""
    free = {
        peer: _free(state, host)
        for peer, host in hosts.items()
        if peer != lost and host.member.status == "member" and not host.member.draining
    }
    entries: list[FailOverGuest | MarkGuest] = []
    for guest in sorted(state.guests_of(lost), key=lambda guest: guest.key):
        if not concerns(state, guest):
            continue
        if guest.wanted != "running":
            message = f"{state.peer_name(lost)} has left the mesh, with what was on its disks"
            entries.append(MarkGuest(guest=guest.key, epoch=guest.epoch, state="lost", message=message))
            continue
        best = _best(state, guest, hosts, free)
        if best is None:
            entries += _mark(state, guest)
            continue
        free[best] -= guest.memory
        reason = f"started anew: {state.peer_name(lost)} was lost"
        entries.append(FailOverGuest(guest=guest.key, epoch=guest.epoch, owner=best, reason=reason))
    return entries


def concerns(state: State, guest: Guest) -> bool:
    """Whether something is to be decided of this guest once no lease of its owner holds any more."""
    stays = state.members[guest.owner].status == "member"
    return (
        guest.ends_with_lease
        and (guest.wanted == "running" or not stays)
        and guest.state in _RUNS
        and state.open_migration(guest.key) is None
    )


def _free(state: State, host: Host) -> int:
    """Bytes that guests may still have there: by the host's own word, and by what the catalog leaves."""
    owned = state.guests_of(host.member.id)
    left = [_UNKNOWN]
    if host.memory_free is not None:
        coming = (guest.memory for guest in owned if guest.state in ("pending", "starting"))
        left.append(host.memory_free - sum(coming))
    if host.member.facts.memory:
        taken = (guest.memory for guest in owned if guest.state != "stopped")
        left.append(host.member.facts.memory - RESERVED_MEMORY - sum(taken))
    return min(left)


def _best(state: State, guest: Guest, hosts: Mapping[str, Host], free: Mapping[str, int]) -> str | None:
    """A guest that is booted anew can run on any processor; its programs rather have the one they had."""
    site = _site(state, guest)

    def order(peer: str) -> tuple[bool, bool, int, str]:
        member = hosts[peer].member
        return member.site != site, _lacks(guest, member), -free[peer], peer

    return min((peer for peer, left in free.items() if left >= guest.memory), key=order, default=None)


def _lacks(guest: Guest, member: Member) -> bool:
    facts = member.facts
    if not facts.cpu_features:
        return False
    host = reconcile.Host(frozenset(facts.cpu_features), facts.xsave_size)
    return bool(reconcile.missing_features(frozenset(guest.cpu_features), guest.xsave_size, host))


def _site(state: State, guest: Guest) -> str | None:
    """The site at which the guest's lab wants it; None if it does not say."""
    lab = state.labs.get(guest.lab)
    place = place_in_model(lab.model, guest.name) if lab else None
    if place is None:
        return None
    if place.site is not None:
        return place.site
    sites = [member.site for member in state.members.values() if member.name == place.peer]
    return sites[0] if sites and sites[0] else None


def _mark(state: State, guest: Guest) -> list[FailOverGuest | MarkGuest]:
    """Say once that it cannot be started anywhere."""
    owner = state.peer_name(guest.owner)
    message = f"{owner} was lost, and no other peer has room for {format_size(guest.memory)}"
    if (guest.state, guest.message) == ("fenced", message):
        return []
    return [MarkGuest(guest=guest.key, epoch=guest.epoch, state="fenced", message=message)]
