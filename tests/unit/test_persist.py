# SPDX-License-Identifier: Apache-2.0
"""For how long `mobictl` goes on with a command that nobody can decide, and whom it asks meanwhile."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing

from mobictl import client, persist
from mobictl.doors import Doors
from mobictl.persist import Persistence
from proto.api import ErrorCode, OperationError

NAMES = ("a", "b", "c")


class _Doors:
    """Of peers that are called by one letter; the command is asked of `a`."""

    named = None
    place = "here"

    def first(self) -> str:
        return NAMES[0]

    def others(self, tried: str, _known: object) -> list[str]:
        return [name for name in NAMES if name != tried]


@dataclass
class World:
    """Peers, what each says to a command ("" is yes), and how often each was asked what."""

    says: dict[str, ErrorCode | str] = field(default_factory=dict)
    leaders: set[str] = field(default_factory=set)
    silent: set[str] = field(default_factory=set)
    asked: Counter[tuple[str, str]] = field(default_factory=Counter)

    @asynccontextmanager
    async def connect(self, target: str, **_options: Any) -> AsyncGenerator[_Connection, None]:
        yield _Connection(self, target)

    async def run(self) -> tuple[str, float]:
        """The answer to the command, a peer's name or an error's code, and after how many seconds."""
        begun = trio.current_time()
        try:
            answer = await Persistence(cast("Doors", _Doors()), _ignore, _ignore).run(_attempt)
        except OperationError as error:
            answer = error.code
        return answer, trio.current_time() - begun


@dataclass
class _Connection:
    world: World
    target: str
    remarks: tuple[str, ...] = ()

    async def call(self, op: str, *, timeout: float) -> Any:
        self.world.asked[self.target, op] += 1
        if self.target in self.world.silent:
            await trio.sleep(timeout)
            raise OperationError("timeout", f"{self.target} did not answer")
        if op == "leader":
            return {"leader": "c" if self.target in self.world.leaders else None}
        if code := self.world.says.get(self.target, "no-majority"):
            raise OperationError(cast("ErrorCode", code), f"{self.target} says {code}")
        return self.target


async def _attempt(connection: client.Client) -> Any:
    return await connection.call("command", timeout=120.0)


def _ignore(_text: str) -> None:
    pass


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    made = World()
    monkeypatch.setattr(persist, "config_directory", lambda: tmp_path)
    monkeypatch.setattr(client, "connect", made.connect)
    return made


async def test_without_a_majority_it_gives_up_once_all_others_were_asked(
    world: World, autojump_clock: trio.testing.MockClock
) -> None:
    answer, took = await world.run()
    assert answer == "no-majority"
    assert took < 10
    assert world.asked["b", "leader"]
    assert world.asked["c", "leader"]
    assert not world.asked["b", "command"], "it would only have said the same"


async def test_silent_others_do_not_put_it_off(world: World, autojump_clock: trio.testing.MockClock) -> None:
    world.silent = {"b", "c"}
    answer, took = await world.run()
    assert answer == "no-majority"
    assert took < 10


async def test_on_the_wrong_side_of_a_cut_the_other_side_is_asked(
    world: World, autojump_clock: trio.testing.MockClock
) -> None:
    world.silent, world.leaders, world.says = {"b"}, {"c"}, {"c": ""}
    answer, took = await world.run()
    assert answer == "c"
    assert took == 0
    assert world.asked["c", "command"] == 1


async def test_an_election_is_waited_for_longer(world: World, autojump_clock: trio.testing.MockClock) -> None:
    world.says = dict.fromkeys(NAMES, "no-leader")
    answer, took = await world.run()
    assert answer == "no-leader"
    assert took > 25
    assert all(world.asked[name, "command"] for name in NAMES)


async def test_missing_voters_that_come_back_in_time_are_waited_for(
    world: World, autojump_clock: trio.testing.MockClock
) -> None:
    async with trio.open_nursery() as nursery:

        async def come_back() -> None:
            await trio.sleep(4.0)
            world.says = dict.fromkeys(NAMES, "no-leader")
            await trio.sleep(10.0)
            world.says = dict.fromkeys(NAMES, "")

        nursery.start_soon(come_back)
        answer, _ = await world.run()
    assert answer in NAMES
