# SPDX-License-Identifier: Apache-2.0
"""What becomes of a lost peer's guests: which of them, where to, and what is said when there is no room."""

from __future__ import annotations

from typing import Any

import pytest

from proto import entries as e
from proto.catalog import Refused
from proto.failover import Host, fail_over
from proto.state import State
from tests.unit.test_catalog import HANDOVER, A, B, C, run, token
from tests.unit.test_catalog import guest as plain

MIB = 1 << 20


def guest(name: str = "vm", owner: str = A.id, **more: Any) -> e.AddGuest:
    more = {"on_partition": "freeze"} | more
    return e.AddGuest(guest=plain(f"lab/{name}", owner).model_copy(update=more))


@pytest.fixture
def mesh() -> State:
    """Three peers, at two sites; tokyo is the one that gets lost."""
    members = [known.member(name, "t") for known, name in ((B, "virginia"), (C, "amsterdam"))]
    state = run(State(), e.Found(mesh="m" * 16, member=A.member("tokyo")), token())
    for member, site in zip(members, ("east", "west"), strict=True):
        state = run(state, e.AddPeer(member=member.model_copy(update={"site": site})))
    return state


def hosts(state: State, **free: int | None) -> dict[str, Host]:
    found = {}
    for name, left in free.items():
        member = state.find_peer(name)
        found[member.id] = Host(member, left)
    return found


def owners(state: State, free: dict[str, Host]) -> dict[str, str]:
    moves = fail_over(state, A.id, free)
    return {m.guest: state.peer_name(m.owner) for m in moves if isinstance(m, e.FailOverGuest)}


def test_only_bound_guests_that_are_wanted_running_and_stand_still_are_moved(mesh: State) -> None:
    adds = [
        guest("bound"),
        guest("free", on_partition="run"),
        guest("paused", wanted="paused"),
        guest("stopped", wanted="stopped"),
        guest("failed", state="failed"),
        guest("elsewhere", B.id),
        guest("vm"),
    ]
    mesh = run(mesh, *adds, HANDOVER)
    assert owners(mesh, hosts(mesh, virginia=1 << 30)) == {"lab/bound": "virginia"}


def test_several_guests_are_spread_by_the_memory_that_is_left(mesh: State) -> None:
    mesh = run(mesh, *(guest(name, memory=100 * MIB) for name in "abcd"))
    free = hosts(mesh, virginia=350 * MIB, amsterdam=300 * MIB, tokyo=1 << 40)
    assert owners(mesh, free) == {
        "lab/a": "virginia",
        "lab/b": "amsterdam",
        "lab/c": "virginia",
        "lab/d": "amsterdam",
    }


def test_what_starts_at_a_peer_already_takes_memory_that_it_does_not_know_of_yet(mesh: State) -> None:
    mesh = run(mesh, guest("vm", memory=100 * MIB), guest("new", B.id, memory=200 * MIB))
    assert owners(mesh, hosts(mesh, virginia=250 * MIB)) == {}
    mesh = run(mesh, e.Report(guest="lab/new", owner=B.id, epoch=1, state="running"))
    assert owners(mesh, hosts(mesh, virginia=250 * MIB)) == {"lab/vm": "virginia"}
    facts = e.UpdatePeer(peer=B.id, address="h:1", site="east", facts=e.Facts(memory=300 * MIB))
    assert owners(run(mesh, facts), hosts(run(mesh, facts), virginia=None)) == {}


def test_a_guest_stays_at_the_site_where_its_lab_wants_it_if_that_can_be(mesh: State) -> None:
    model = {"name": "lab", "topology": {"defaults": {"place": "amsterdam"}, "nodes": {"vm": {}, "x": {}}}}
    placed = {**model, "topology": {"nodes": {"vm": {"place": {"site": "west"}}, "x": {"place": "nowhere"}}}}
    for lab in (model, placed):
        state = run(mesh, e.PutLab(lab=e.Lab(name="lab", model=lab)), guest("vm"))
        assert owners(state, hosts(state, virginia=1 << 40, amsterdam=1 << 30)) == {"lab/vm": "amsterdam"}
        assert owners(state, hosts(state, virginia=1 << 40, amsterdam=1)) == {"lab/vm": "virginia"}


def test_a_processor_like_the_old_one_is_preferred_and_not_needed(mesh: State) -> None:
    facts = e.UpdatePeer(peer=B.id, address="h:1", site="", facts=e.Facts(cpu_features=("sse",)))
    mesh = run(mesh, facts, guest("vm", cpu_features=("avx", "sse")))
    assert owners(mesh, hosts(mesh, virginia=1 << 40, amsterdam=1 << 30)) == {"lab/vm": "amsterdam"}
    assert owners(mesh, hosts(mesh, virginia=1 << 40)) == {"lab/vm": "virginia"}


def test_draining_peers_take_nothing_and_no_room_is_said_once(mesh: State) -> None:
    mesh = run(mesh, guest("vm"), e.DrainPeer(peer=B.id, draining=True))
    (mark,) = fail_over(mesh, A.id, hosts(mesh, virginia=1 << 40, amsterdam=1))
    assert isinstance(mark, e.MarkGuest)
    assert "tokyo was lost, and no other peer has room for 64M" in mark.message
    mesh = run(mesh, mark)
    assert mesh.guests["lab/vm"].state == "fenced"
    assert fail_over(mesh, A.id, hosts(mesh, amsterdam=1)) == []
    assert owners(mesh, hosts(mesh, amsterdam=1 << 30)) == {"lab/vm": "amsterdam"}


def test_the_catalog_takes_a_failover_only_from_the_coordinator_in_time_and_for_a_bound_guest(
    mesh: State,
) -> None:
    mesh = run(mesh, guest("vm"), guest("free", on_partition="run"))
    good = e.FailOverGuest(guest="lab/vm", epoch=1, owner=B.id, reason="lost")
    for entry, client, words in (
        (good, B.id, "only the coordinator"),
        (e.Batch(entries=(good,)), B.id, "only the coordinator"),
        (good.model_copy(update={"epoch": 2}), "", "in epoch 1"),
        (good.model_copy(update={"guest": "lab/free"}), "", "runs on without a lease"),
        (good.model_copy(update={"owner": A.id}), "", "cannot take"),
        (e.MarkGuest(guest="lab/vm", epoch=1, state="fenced"), B.id, "only the coordinator"),
    ):
        with pytest.raises(Refused, match=words):
            run(mesh, entry, client=client)
    mesh = run(mesh, good)
    moved = mesh.guests["lab/vm"]
    assert (moved.owner, moved.epoch, moved.state, moved.message) == (B.id, 2, "pending", "lost")
    with pytest.raises(Refused, match="in epoch 2"):
        run(mesh, good)


def test_a_guest_whose_owner_does_not_know_of_its_new_policy_is_not_moved(mesh: State) -> None:
    mesh = run(mesh, guest("vm", on_partition="run"), e.ChangeGuest(guest="lab/vm", on_partition="freeze"))
    assert owners(mesh, hosts(mesh, virginia=1 << 40)) == {}
    with pytest.raises(Refused, match="runs on without a lease"):
        run(mesh, e.FailOverGuest(guest="lab/vm", epoch=1, owner=B.id))
    held = e.Report(guest="lab/vm", owner=A.id, epoch=1, state="running", held_to="freeze")
    assert owners(run(mesh, held), hosts(mesh, virginia=1 << 40)) == {"lab/vm": "virginia"}
    again = run(mesh, held, e.ChangeGuest(guest="lab/vm", on_partition="run"))
    assert again.guests["lab/vm"].held_to == "run"


def test_the_longest_lease_never_falls_not_even_by_leaving(mesh: State) -> None:
    mesh = run(mesh, e.SetLease(peer=B.id, duration=10.0), e.SetLease(peer=B.id, duration=1.5))
    assert mesh.members[B.id].lease == 10.0
    mesh = run(mesh, e.RemovePeer(peer=B.id), e.AddPeer(member=B.member("again", "t")))
    assert mesh.members[B.id].lease == 10.0
