# SPDX-License-Identifier: Apache-2.0
"""How a peer is emptied: one guest after the other, elsewhere after a failure, and nobody forgotten."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from proto import entries
from proto.drain import LONGEST_PAUSE, PATIENCE, Drain, Host, destination
from proto.state import State

A, B, C = "a" * 16, "b" * 16, "c" * 16
NAMES = {A: "tokyo", B: "virginia", C: "amsterdam"}
FREE = 1 << 30


def member(id: str, **more: Any) -> entries.Member:
    given = {"id": id, "name": NAMES[id], "address": "127.0.0.1:1", "certificate": b"", **more}
    return entries.Member.model_validate(given)


def guest(name: str, **more: Any) -> entries.Guest:
    given = {
        "key": f"lab/{name}",
        "id": name,
        "image": "mini",
        "memory": 64 << 20,
        "owner": A,
        "state": "running",
        "started": 1.0,
        **more,
    }
    return entries.Guest.model_validate(given)


def mesh(*guests: entries.Guest, place: dict[str, Any] | None = None, **sites: str) -> State:
    nodes = {g.name: {"image": "mini", **({"place": place[g.name]} if place else {})} for g in guests}
    lab = entries.Lab(name="lab", model={"name": "lab", "topology": {"nodes": nodes}})
    return State(
        mesh="m",
        members={id: member(id, site=sites.get(name, ""), draining=id == A) for id, name in NAMES.items()},
        labs={"lab": lab},
        guests={g.key: g for g in guests},
    )


def hosts(state: State, **free: int) -> dict[str, Host]:
    return {id: Host(m, free.get(m.name, FREE)) for id, m in state.members.items()}


def test_running_guests_go_one_by_one_to_where_most_memory_is() -> None:
    state, drain = mesh(guest("x"), guest("y")), Drain(A)
    move = drain.next_move(state, hosts(state, amsterdam=2 * FREE), 0.0)
    assert move is not None
    assert (move.guest.name, move.to, move.live) == ("x", C, True)
    migration = entries.Migration(
        id="1" * 32, guest="lab/x", guest_id="g1", epoch=1, source=A, destination=C, timeout=1.0, state="open"
    )
    moving = State(**{**state.__dict__, "migrations": {migration.id: migration}})
    assert drain.next_move(moving, hosts(state), 0.0) is None
    assert drain.stuck(moving) == {}


def test_the_lab_s_wish_comes_before_the_site_and_the_site_before_memory() -> None:
    state = mesh(guest("x"), tokyo="japan", virginia="usa", amsterdam="japan")
    assert destination(state, guest("x"), hosts(state, virginia=4 * FREE)) == (C, "")
    state = mesh(guest("x"), place={"x": {"site": "usa"}}, tokyo="japan", virginia="usa", amsterdam="japan")
    assert destination(state, guest("x"), hosts(state)) == (B, "")
    assert destination(state, guest("x"), hosts(state), avoid={B}) == (C, "")


def test_a_failed_move_is_tried_elsewhere_after_growing_pauses() -> None:
    state, drain = mesh(guest("x")), Drain(A)
    now, tried, pauses = 0.0, [], []
    for _ in range(8):
        move = drain.next_move(state, hosts(state), now)
        assert move is not None
        tried.append(move.to)
        drain.failed(move, "the line was cut", now)
        assert drain.next_move(state, hosts(state), now) is None
        wake = drain.wake_at()
        assert wake is not None
        pauses.append(wake - now)
        now = wake
        stuck = {"lab/x": "the line was cut"} if len(tried) >= PATIENCE else {}
        assert drain.stuck(state) == stuck
    assert set(tried[:2]) == {B, C}
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_PAUSE


def test_what_does_not_run_and_has_a_disk_stays_and_is_named() -> None:
    state, drain = mesh(guest("p", state="paused"), guest("s", state="stopped")), Drain(A)
    assert drain.next_move(state, hosts(state), 0.0) is None
    stuck = drain.stuck(state)
    assert "vm resume lab/p" in stuck["lab/p"]
    assert "--discard-stopped" in stuck["lab/s"]


def test_what_never_ran_goes_on_paper_and_what_starts_is_awaited() -> None:
    state, drain = mesh(guest("s", state="stopped", started=0.0), guest("t", state="starting")), Drain(A)
    move = drain.next_move(state, hosts(state), 0.0)
    assert move is not None
    assert (move.guest.name, move.live) == ("s", False)
    assert drain.stuck(state) == {}


def test_no_room_anywhere_is_said_with_names_and_passes_when_there_is_room() -> None:
    state, drain = mesh(guest("x")), Drain(A)
    assert drain.next_move(state, hosts(state, virginia=1 << 20, amsterdam=2 << 20), 0.0) is None
    assert drain.stuck(state)["lab/x"] == ("virginia has 1M of memory left; amsterdam has 2M of memory left")
    assert drain.next_move(state, {}, 0.0) is None
    assert "no other peer" in drain.stuck(state)["lab/x"]
    assert drain.next_move(state, hosts(state), 0.0) is not None
    assert drain.stuck(state) == {}


def test_a_processor_that_lacks_features_is_not_chosen() -> None:
    state = mesh(guest("x", cpu_features=("avx2",)))
    poor = member(B, facts={"cpu_features": ("sse2",)})
    rich = member(C, facts={"cpu_features": ("sse2", "avx2")})
    there = {B: Host(poor, 4 * FREE), C: Host(rich, FREE)}
    assert destination(state, state.guests["lab/x"], there) == (C, "")
    assert "avx2" in destination(state, state.guests["lab/x"], {B: there[B]})[1]


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 5))
def test_every_guest_leaves_whatever_fails_as_long_as_it_ends(outcomes: list[bool], count: int) -> None:
    state, drain, now = mesh(*(guest(f"g{n}") for n in range(count))), Drain(A), 0.0
    results = iter(outcomes)
    for _ in range(200):
        if not state.guests_of(A):
            break
        move = drain.next_move(state, hosts(state), now)
        if move is None:
            wake = drain.wake_at()
            assert wake is not None
            now = max(now, wake)
        elif next(results, True):
            gone = move.guest.model_copy(update={"owner": move.to, "epoch": 2})
            state = State(**{**state.__dict__, "guests": {**state.guests, gone.key: gone}})
        else:
            drain.failed(move, "no", now)
    assert state.guests_of(A) == []
    assert drain.stuck(state) == {}
