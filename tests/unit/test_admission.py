# SPDX-License-Identifier: Apache-2.0
"""Which guests may go to which peers."""

from __future__ import annotations

from typing import Any

import pytest

from proto.admission import check_move, open_handover
from proto.api import OperationError
from proto.entries import Facts, Guest, Member, Migration
from proto.state import State

MIB = 1 << 20


def member(id: str, **more: Any) -> Member:
    facts = Facts(memory=512 * MIB, cpu_features=("sse2", "avx2"), xsave_size=832)
    return Member(id=id, name=f"peer-{id}", address="h:1", certificate=b"", **{"facts": facts, **more})


def guest(**more: Any) -> Guest:
    base: dict[str, Any] = {
        "key": "lab/g",
        "id": "g1",
        "image": "i",
        "memory": 64 * MIB,
        "owner": "s",
        "state": "running",
        "cpu_features": ("sse2",),
        "xsave_size": 832,
    }
    return Guest(**{**base, **more})


def world(*guests: Guest, **destination: Any) -> State:
    members = {"s": member("s"), "d": member("d", **destination)}
    return State(members=members, guests={g.key: g for g in guests})


def test_a_running_guest_may_go() -> None:
    state = world(guest())
    entry = open_handover(state, guest(), state.members["d"], "ab" * 16, 100.0)
    assert (entry.source, entry.destination, entry.epoch) == ("s", "d", 1)


@pytest.mark.parametrize(
    ("changes", "destination", "code", "said"),
    [
        ({"owner": "d"}, {}, "conflict", "already"),
        ({"state": "stopped"}, {}, "conflict", "stopped"),
        ({"cpu_features": ("sse2", "avx512f")}, {}, "unsupported", "avx512f"),
        ({"xsave_size": 2696}, {}, "unsupported", "2696"),
        ({"memory": 600 * MIB}, {}, "no-room", "600 MiB"),
        ({}, {"draining": True}, "conflict", "drained"),
        ({}, {"status": "left"}, "conflict", "left"),
    ],
)
def test_refusals_say_why(changes: dict[str, Any], destination: dict[str, Any], code: str, said: str) -> None:
    moving = guest(**changes)
    state = world(moving, **destination)
    with pytest.raises(OperationError, match=said) as refused:
        check_move(state, moving, state.members["d"])
    assert refused.value.code == code


def test_memory_taken_by_others_counts() -> None:
    other = guest(key="lab/other", id="g2", owner="d", memory=400 * MIB)
    state = world(guest(), other)
    with pytest.raises(OperationError, match="48 MiB left"):
        check_move(state, guest(), state.members["d"])


def test_one_handover_at_a_time() -> None:
    opened = Migration(id="m", guest="lab/g", guest_id="g", epoch=1, source="s", destination="d", timeout=1.0)
    state = State(members=world().members, guests={"lab/g": guest()}, migrations={"m": opened})
    with pytest.raises(OperationError, match="being migrated already"):
        check_move(state, guest(), state.members["d"])
