# SPDX-License-Identifier: Apache-2.0
"""Whether all is well: what must have come true some time after the last fault."""

from __future__ import annotations

from typing import TYPE_CHECKING

from proto import entries
from proto.state import State

if TYPE_CHECKING:
    from tests.sim.hosts import Copy, Host
    from tests.sim.mesh_world import World


def trouble(world: World) -> list[str]:
    """What is not well yet; empty if everything is."""
    state = world.invariants.newest
    members = [world.hosts[id] for id, m in state.members.items() if m.status == "member"]
    present = [host for host in members if not host.gone]
    found = _peers(world, state, present)
    if found:
        return found
    found += [f"{client.name} still waits" for client in world.clients if client.busy]
    found += [f"migration of {m.guest} is open" for m in state.migrations.values() if m.state == "open"]
    for guest in state.guests.values():
        found += _guest(world, state, guest)
    known = {guest.id for guest in state.guests.values()}
    for host in present:
        found += [
            f"{host.name} keeps {copy.guest.key} e{copy.epoch}, which is not its own"
            for id, copy in host.copies.items()
            if id not in known or _is_of_no_use(world, host, copy, state.guests[copy.guest.key])
        ]
    return found


def _is_of_no_use(world: World, host: Host, copy: Copy, guest: entries.Guest) -> bool:
    """Whether a copy should be gone. What a source keeps of a guest whose new owner has died with the only
    other copy is kept until the guest is started elsewhere."""
    last = bool(copy.migration) and copy.phase != "running" and world.hosts[guest.owner].gone
    return guest.owner != host.id and not last


def _peers(world: World, state: State, present: list[Host]) -> list[str]:
    leaders = [host for host in present if host.process is not None and host.process.role == "leader"]
    if len(leaders) != 1:
        return [f"{len(leaders)} coordinators"]
    leader = leaders[0]
    found: list[str] = []
    for host in present:
        process = host.process
        if process is None:
            found.append(f"{host.name} does not run")
        elif process.leader != leader.id:
            found.append(f"{host.name} takes {world.name(process.leader) or 'nobody'} for the coordinator")
        elif process.state.index != state.index:
            found.append(f"{host.name} is at record {process.state.index} of {state.index}")
        else:
            world.invariants.same_state(host, state.index, process.state)
    return found


def _guest(world: World, state: State, guest: entries.Guest) -> list[str]:
    running = [
        host
        for host in world.hosts.values()
        for copy in host.copies.values()
        if copy.guest.id == guest.id and copy.phase == "running"
    ]
    owner = world.hosts[guest.owner]
    if owner.gone or state.members[guest.owner].status != "member":
        if guest.on_partition == "freeze" and guest.wanted == "running" and _could_move(world, state, guest):
            return [f"{guest.key} is not failed over from {owner.name}"]
        return [f"{guest.key} runs at {host.name}, not its owner" for host in running]
    if guest.wanted != "running":
        return [f"{guest.key} runs at {host.name} and is wanted {guest.wanted}" for host in running]
    if running != [owner]:
        return [f"{guest.key} runs at {running}, wanted at {owner.name} e{guest.epoch}"]
    copy = owner.copies[guest.id]
    return [] if copy.epoch == guest.epoch else [f"{guest.key} runs as e{copy.epoch}, not e{guest.epoch}"]


def _could_move(world: World, state: State, guest: entries.Guest) -> bool:
    if guest.state == "lost":
        return False
    return any(
        m.status == "member" and not m.draining and not world.hosts[m.id].gone for m in state.members.values()
    )
