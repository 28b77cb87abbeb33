# SPDX-License-Identifier: Apache-2.0
"""How a peer is emptied: which of its guests goes next, where to, and what stands in the way of the others.

A peer that drains gets no guests any more, and those that it has leave it one by one: one that runs moves
live, one that was never started is only written down for another peer. A stopped guest stays, and is named:
what is on its disks is nowhere else. A move that failed is tried again after growing pauses, at another peer
if there is one. Everything else follows from the catalog, so whoever coordinates can go on at any point; what
is kept here (`Drain`) is only what has failed so far.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from proto.admission import check_move
from proto.api import OperationError
from proto.entries import Guest, Member
from proto.scale import place_in_model
from proto.state import State
from proto.units import format_size

FIRST_PAUSE = 1.0
LONGEST_PAUSE = 30.0
PATIENCE = 3
"""Failed moves in a row after which whoever watches is told that a guest does not get away."""

SOON = ("starting", "migrating", "restoring")
"""States that pass by themselves."""


@dataclass(frozen=True, slots=True)
class Host:
    """A peer that answers; `memory_free` in bytes."""

    member: Member
    memory_free: int


@dataclass(frozen=True, slots=True)
class Move:
    """The guest (as the catalog has it) goes to the peer `to` (id): live, or, if it never ran, on paper."""

    guest: Guest
    to: str
    live: bool


@dataclass
class _Trouble:
    failures: int = 0
    not_before: float = 0.0
    avoid: set[str] = field(default_factory=set)
    reason: str = ""
    blocked: bool = False
    """Whether there is no way at the moment, whatever was tried."""


class Drain:
    """The drain of one peer (id). Times are seconds of any clock that goes on."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self._trouble: dict[str, _Trouble] = {}

    def next_move(self, state: State, hosts: Mapping[str, Host], now: float) -> Move | None:
        """The next move, None if there is none now; `stuck` then says why. `hosts` by id."""
        if any(m.source == self.peer and m.state == "open" for m in state.migrations.values()):
            return None
        found: Move | None = None
        guests = {guest.key: guest for guest in state.guests_of(self.peer)}
        self._trouble = {key: trouble for key, trouble in self._trouble.items() if key in guests}
        for guest in sorted(guests.values(), key=lambda guest: guest.key):
            trouble = self._trouble.setdefault(guest.key, _Trouble())
            if now < trouble.not_before or guest.state in SOON:
                continue
            live = guest.state == "running"
            reason = "" if live or never_ran(guest) else _why_not(state, guest)
            if not reason:
                to, reason = destination(state, guest, hosts, trouble.avoid)
                if to and found is None:
                    found = Move(guest, to, live)
            trouble.blocked = bool(reason)
            trouble.reason = reason or trouble.reason
        return found

    def failed(self, move: Move, reason: str, now: float) -> None:
        """The move came to nothing; it is tried again later, and rather elsewhere."""
        trouble = self._trouble.setdefault(move.guest.key, _Trouble())
        pause = min(FIRST_PAUSE * 2.0**trouble.failures, LONGEST_PAUSE)
        trouble.failures += 1
        trouble.avoid.add(move.to)
        trouble.not_before, trouble.reason = now + pause, reason

    def wake_at(self) -> float | None:
        """When a move that failed can be tried again; None if none waits for that."""
        return min((t.not_before for t in self._trouble.values() if t.failures), default=None)

    def stuck(self, state: State) -> dict[str, str]:
        """Guest → what keeps it here, of those that do not get away."""
        left = {guest.key for guest in state.guests_of(self.peer)}
        return {
            key: trouble.reason
            for key, trouble in sorted(self._trouble.items())
            if key in left and (trouble.blocked or trouble.failures >= PATIENCE)
        }


def never_ran(guest: Guest) -> bool:
    """Whether nothing of the guest can be on a disk."""
    return guest.state in ("pending", "stopped", "failed") and not guest.started


def _why_not(state: State, guest: Guest) -> str:
    """Why a guest that does not run cannot leave."""
    owner = state.peer_name(guest.owner)
    if guest.state == "paused":
        return f"it is paused; let it go on: mobictl vm resume {guest.key}"
    if guest.state in ("stopped", "failed"):
        return (
            f"it is {guest.state}, and its disk is at {owner} only; start it (mobictl vm start {guest.key}), "
            f"remove it, or give its disk up with --discard-stopped"
        )
    return f"it is {guest.state}"


def destination(
    state: State, guest: Guest, hosts: Mapping[str, Host], avoid: Collection[str] = ()
) -> tuple[str, str]:
    """The peer (id) that takes the guest, or "" and the reason why none can.

    Those that `avoid` names come last. Among the others one where the lab wants the guest comes first, then
    one of the site where it is, then the one with most memory left.
    """
    wanted = place_in_model(state.labs[guest.lab].model, guest.name) if guest.lab in state.labs else None
    here = state.members.get(guest.owner)
    able: list[Host] = []
    reasons: list[str] = []
    for host in hosts.values():
        if host.member.id == guest.owner or host.member.draining:
            continue
        reason = _hindrance(state, guest, host)
        if reason:
            reasons.append(reason)
        else:
            able.append(host)

    def order(host: Host) -> tuple[bool, bool, bool, int, str]:
        member = host.member
        elsewhere = here is None or member.site != here.site
        unwanted = wanted is not None and not wanted.fits(member.name, member.site)
        return member.id in avoid, unwanted, elsewhere, -host.memory_free, member.id

    if able:
        return min(able, key=order).member.id, ""
    return "", "; ".join(reasons[:3]) or "there is no other peer that answers and takes guests"


def _hindrance(state: State, guest: Guest, host: Host) -> str:
    if host.memory_free < guest.memory:
        return f"{host.member.name} has {format_size(host.memory_free)} of memory left"
    if guest.state != "running":
        return ""
    try:
        check_move(state, guest, host.member)
    except OperationError as error:
        return error.message
    return ""
