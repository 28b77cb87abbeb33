# SPDX-License-Identifier: Apache-2.0
"""Events of one peer: stamped, bounded on disk, followed without a gap."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import structlog.testing
import trio
import trio.testing

from mobid import events
from mobid.events import Events
from mobid.stamps import HybridClock
from proto import hlc

OWN = "0123456789abcdef"


def test_what_is_emitted_is_read_back(tmp_path: Path) -> None:
    now = 100.0
    log = Events(tmp_path / "e", OWN, "tokyo", HybridClock(lambda: now))
    log.emit("guest.started", vm="lab/a")
    now = 200.0
    log.emit("guest.exited", vm="lab/a", code=1)
    log.close()
    again = Events(tmp_path / "e", OWN, "tokyo", HybridClock(lambda: now))
    assert [event["kind"] for event in again.since(None)] == ["guest.started", "guest.exited"]
    (newer,) = again.since(50.0)
    facts = {"time": 200.0, "peer": "tokyo", "kind": "guest.exited", "vm": "lab/a", "code": 1}
    assert newer == {**facts, "peer_id": OWN, "stamp": hlc.of_time(200.0)}
    again.close()


def test_stamps_grow_over_restarts_even_if_the_clock_goes_back(tmp_path: Path) -> None:
    for now in (100.0, 50.0, 50.0):
        log = Events(tmp_path / "e", OWN, "tokyo", HybridClock(lambda now=now: now))  # type: ignore[misc]
        log.emit("peer.started")
        log.close()
    stamps = [event["stamp"] for event in log.since(None)]
    assert stamps == sorted(set(stamps))
    assert len(stamps) == 3


def test_the_files_stay_bounded_and_broken_lines_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "LIMIT", 4000)
    log = Events(tmp_path / "e", OWN, "tokyo", HybridClock())
    for number in range(200):
        log.emit("test", number=number)
    with (tmp_path / "e").open("ab") as file:
        file.write(b"[" * 3000 + b'\n{"time": 1, "kin')
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) == 2
    assert max(sizes) <= 4000 + 3020
    numbers = [event["number"] for event in log.since(None)]
    assert numbers == list(range(numbers[0], 200))
    log.close()


async def test_a_reader_goes_on_from_memory_or_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "BACKLOG", 10)
    log = Events(tmp_path / "e", OWN, "tokyo", HybridClock())
    log.emit("test", number=0)
    first = log.newest
    for number in range(1, 30):
        log.emit("test", number=number)
    for after, expected in ((first, range(1, 30)), (0, range(30))):
        found, stamp = log.newer(after)
        assert [event["number"] for event in found] == list(expected)
        assert stamp > found[-1]["stamp"]
    position = log.newest
    assert log.newer(position)[0] == []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.wait_newer, position)
        await trio.testing.wait_all_tasks_blocked()
        log.emit("test", number=30)
    assert [event["number"] for event in log.newer(position)[0]] == [30]
    log.close()


def kinds(log: Events) -> list[str]:
    return [event["kind"] for event in log.since(None)]


def test_what_was_before_the_present_mesh_is_not_told(tmp_path: Path) -> None:
    log = Events(tmp_path / "e", OWN, "tokyo", HybridClock())
    log.emit("mesh.founded", mesh="a" * 16)
    log.emit("leader.elected")
    assert kinds(log) == ["mesh.founded", "leader.elected"]
    log.emit("mesh.joined", mesh="b" * 16)
    assert kinds(log) == [event["kind"] for event in log.newer(0)[0]] == ["mesh.joined"]
    log.close()
    again = Events(tmp_path / "e", OWN, "tokyo", HybridClock())
    again.emit("peer.started")
    assert kinds(again) == ["mesh.joined", "peer.started"]
    again.emit("mesh.joined", mesh="b" * 16)
    assert kinds(again) == ["mesh.joined", "peer.started", "mesh.joined"], "back in the same mesh"
    assert b"mesh.founded" in (tmp_path / "e").read_bytes(), "who looks for it finds it"
    again.close()


def test_an_event_that_cannot_be_written_is_told_and_complained_of_once_per_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Events(tmp_path / "e", OWN, "tokyo", HybridClock())
    healthy, said = log._write, structlog.testing.capture_logs

    def full(_line: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with said() as entries:
        for write in (full, full, healthy, full, full):
            monkeypatch.setattr(log, "_write", write)
            log.emit("test")
    assert [entry["event"] for entry in entries] == ["events.not.written", "events.not.written"]
    assert "No space left" in entries[0]["reason"]
    assert len(log.newer(0)[0]) == 5
    log.close()


def test_a_file_that_cannot_be_rotated_now_is_rotated_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "LIMIT", 400)
    log = Events(tmp_path / "e", OWN, "tokyo", HybridClock())
    (tmp_path / "e.1").mkdir()
    for number in range(10):
        log.emit("test", number=number)
    (tmp_path / "e.1").rmdir()
    log.emit("test", number=10)
    assert next(reversed(list(log.since(None))))["number"] == 10
    log.close()
