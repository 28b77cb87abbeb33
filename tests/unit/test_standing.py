# SPDX-License-Identifier: Apache-2.0
"""Whose word that one was evicted is believed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from mobid import standing
from mobid.standing import Standing, says_left
from proto.state import State
from tests.unit.identities import known

OWN = State(index=40, mesh="m" * 16)


@pytest.mark.parametrize(
    ("answer", "left"),
    [
        ({"mesh": OWN.mesh, "status": "left", "index": 41}, True),
        ({"mesh": OWN.mesh, "status": "member", "index": 41}, False),
        ({"mesh": OWN.mesh, "status": "unknown", "index": 41}, False),
        ({"mesh": "n" * 16, "status": "left", "index": 41}, False),
        # It was away itself: this peer may have left, and joined again since.
        ({"mesh": OWN.mesh, "status": "left", "index": 39}, False),
        ({"mesh": OWN.mesh, "status": "left"}, False),
        (None, False),
    ],
)
def test_only_who_knows_more_is_believed(answer: Any, left: bool) -> None:
    assert says_left(answer, OWN) is left


async def test_a_peer_without_a_lease_asks_although_it_has_heard_who_coordinates(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, other = (known(name).member(name) for name in "ab")
    state = State(index=40, mesh=OWN.mesh, members={member.id: member for member in (own, other)})
    lease = SimpleNamespace(valid=True)
    catalog: Any = SimpleNamespace(leader=other.id, fresh=True, state=state, lease=lease)
    asked: list[float] = []
    left = trio.Event()

    async def answer(*_: Any) -> dict[str, Any]:
        asked.append(trio.current_time())
        return {"mesh": OWN.mesh, "status": "left", "index": 41}

    async def leave() -> None:
        left.set()

    monkeypatch.setattr(standing, "ask_door", answer)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Standing(own.id, catalog, leave).run)
        await trio.sleep(100.0)
        assert not asked
        lease.valid = False
        with trio.fail_after(100.0):
            await left.wait()
