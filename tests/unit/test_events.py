# SPDX-License-Identifier: Apache-2.0
"""Events: in order, bounded on disk, followed without a gap."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from mobid import events
from mobid.events import Events
from mobid.tasks import background


def test_what_is_emitted_is_read_back(tmp_path: Path) -> None:
    now = 100.0
    log = Events(tmp_path / "e", "tokyo", lambda: now)
    log.emit("guest.started", vm="lab/a")
    now = 200.0
    log.emit("guest.exited", vm="lab/a", code=1)
    log.close()
    again = Events(tmp_path / "e", "tokyo", lambda: now)
    assert [event["kind"] for event in again.since(None)] == ["guest.started", "guest.exited"]
    assert list(again.since(50.0)) == [
        {"time": 200.0, "peer": "tokyo", "kind": "guest.exited", "vm": "lab/a", "code": 1}
    ]
    again.close()


def test_the_files_stay_bounded_and_broken_lines_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "LIMIT", 2000)
    log = Events(tmp_path / "e", "tokyo")
    for number in range(200):
        log.emit("test", number=number)
    with (tmp_path / "e").open("ab") as file:
        file.write(b'{"time": 1, "kin')
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) == 2
    assert max(sizes) <= 2000 + 20
    numbers = [event["number"] for event in log.since(None)]
    assert numbers == list(range(numbers[0], 200))
    log.close()


async def test_a_follower_sees_every_event_from_its_call_on(tmp_path: Path) -> None:
    log = Events(tmp_path / "e", "tokyo")
    log.emit("before")
    following = log.follow()
    log.emit("first")
    seen: list[str] = []

    async def follow() -> None:
        async for event in following:
            seen.append(event["kind"])

    with trio.fail_after(5):
        async with background(follow):
            while len(seen) < 3:
                log.emit("more")
                await trio.lowlevel.checkpoint()
    assert seen[:3] == ["first", "more", "more"]
    log.close()
