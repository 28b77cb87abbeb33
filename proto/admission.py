# SPDX-License-Identifier: Apache-2.0
"""Whether a guest may go to a peer: what must hold before a handover is opened.

The facts are the catalog's, so every peer that asks comes to the same answer; what only the destination can
know (free space, the image, its processes) it checks while it prepares. The log's own rules (owner, epoch,
one handover at a time) are checked again when the entry is applied.
"""

from __future__ import annotations

from proto.api import OperationError
from proto.entries import Guest, Handover, Member
from proto.state import State

LIVE_STATES = ("running", "paused", "frozen")

RESERVED_MEMORY = 64 << 20
"""Bytes of a host that no guest gets."""


def check_move(state: State, guest: Guest, destination: Member) -> None:
    """Raises `OperationError` with the reason and the mend if `guest` may not move to `destination` live."""
    name = destination.name
    if guest.owner == destination.id:
        raise OperationError("conflict", f"{guest.key} is at {name} already")
    if destination.status != "member":
        raise OperationError("conflict", f"{name} has left the mesh")
    if destination.draining:
        raise OperationError("conflict", f"{name} is being drained and takes no guests")
    if guest.state not in LIVE_STATES:
        raise OperationError(
            "conflict", f"{guest.key} is {guest.state}: only a running guest moves live", "start it first"
        )
    if state.open_migration(guest.key):
        raise OperationError(
            "conflict", f"{guest.key} is being migrated already", "wait until that has ended"
        )
    _check_cpu(guest, destination)
    _check_memory(state, guest, destination)


def _check_cpu(guest: Guest, destination: Member) -> None:
    """Programs of the guest chose their code by the features they saw at boot; all must be there."""
    facts = destination.facts
    if not facts.cpu_features or not guest.cpu_features:
        return
    missing = sorted(set(guest.cpu_features) - set(facts.cpu_features))
    if missing:
        shown = ", ".join(missing[:6]) + (f" and {len(missing) - 6} more" if len(missing) > 6 else "")
        raise OperationError(
            "unsupported",
            f"{guest.key} was booted with processor features that {destination.name} lacks: {shown}",
            "cap the guest's features with `cpu:` in the lab file and boot it again, or choose another peer",
        )
    if facts.xsave_size and facts.xsave_size < guest.xsave_size:
        raise OperationError(
            "unsupported",
            f"{guest.key} saves {guest.xsave_size} bytes of processor state, {destination.name} "
            f"{facts.xsave_size}",
            "choose a peer whose processor has at least the guest's features",
        )


def _check_memory(state: State, guest: Guest, destination: Member) -> None:
    if not destination.facts.memory:
        return
    taken = sum(other.memory for other in state.guests_of(destination.id) if other.state != "stopped")
    free = destination.facts.memory - RESERVED_MEMORY - taken
    if guest.memory > free:
        raise OperationError(
            "no-room",
            f"{guest.key} needs {guest.memory >> 20} MiB, and {destination.name} has "
            f"{max(free, 0) >> 20} MiB left",
            "stop a guest there, or choose another peer",
        )


def open_handover(
    state: State, guest: Guest, destination: Member, migration: str, timeout: float
) -> Handover:
    """The entry that opens a handover, after `check_move`. `migration` is 32 hex digits never used before,
    `timeout` in seconds."""
    check_move(state, guest, destination)
    return Handover(
        migration=migration,
        guest=guest.key,
        epoch=guest.epoch,
        source=guest.owner,
        destination=destination.id,
        timeout=timeout,
    )
