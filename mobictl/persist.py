# SPDX-License-Identifier: Apache-2.0
"""A command that outlives the peer it was asked of.

Any peer does any command, so when the asked one dies half-way the command is asked again, of another. Its key
is the same in every attempt, so whatever the first had begun is recognised and done once. While the mesh has
no coordinator, or this peer cannot see it, others are asked too, for a bounded time: a longer one while a
coordinator may be elected (`no-leader`), a short one when too many voters are missing for that
(`no-majority`). Then this peer may be on the wrong side of a cut, and all others are asked at once whether
they see a coordinator.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, TypeVar

import trio

from mobictl import client
from mobictl.credentials import Credentials
from mobictl.doors import Doors, Known
from mobictl.places import config_directory
from proto.api import UNDECIDED, OperationError

GONE_PATIENCE: Final = 10.0
"""Seconds for which a peer is looked for that takes the command of one that died; it may be restarting."""
LEADER_PATIENCE: Final = 30.0
"""Seconds for which a command waits for the mesh to have a coordinator."""
MAJORITY_PATIENCE: Final = 5.0
"""Seconds for which it waits for missing voters when nobody sees a coordinator: they may be starting."""
OTHER_TIMEOUT: Final = 3.0
"""Seconds for another peer to take a connection, or to say whether it sees a coordinator."""
DOORS_TIMEOUT: Final = 2.0
PAUSE: Final = 0.2
MAJORITY_PAUSE: Final = 1.0
RAN_WELL: Final = 30.0
"""Seconds after which an attempt that fails is the beginning of another trouble."""

ResultT = TypeVar("ResultT")
Attempt = Callable[[client.Client], Awaitable[ResultT]]


class Persistence:
    """One command's way from peer to peer. `tell` shows a line about it to a person, `remark` one about the
    answer to whoever asked."""

    def __init__(self, doors: Doors, tell: Callable[[str], None], remark: Callable[[str], None]) -> None:
        self._doors = doors
        self._tell = tell
        self._remark = remark
        self._known = Known.load(config_directory())
        self._connected = False
        self._trouble: float | None = None
        self._opinions = 1
        self._looked_round = False
        self._waiting: list[str] = []
        self._said = ""

    async def run(self, attempt: Attempt[ResultT]) -> ResultT:
        """The result of `attempt` with the first peer that lives long enough. Raises OperationError."""
        target, timeout = self._doors.first(), client.CONNECT_TIMEOUT
        while True:
            begun = trio.current_time()
            try:
                async with client.connect(target, timeout=timeout, watched=True) as connection:
                    self._connected = True
                    result = await attempt(connection)
                    for remark in connection.remarks:
                        self._remark(remark)
                    await self._learn(connection)
                    return result
            except OperationError as error:
                patience = self._patience(error)
                now = trio.current_time()
                if now - begun > RAN_WELL or self._trouble is None:
                    self._trouble = now
                if now - self._trouble > patience:
                    raise
                self._explain(error, target)
                cut_off = error.code == "no-majority"
            target = await (self._look_round(target) if cut_off else self._next(target))
            timeout = OTHER_TIMEOUT

    def _patience(self, error: OperationError) -> float:
        """For how long to go on after this, in seconds; raises it if it is an answer."""
        if isinstance(error, client.PeerLost):
            # A peer that was named and never answered may be a slip of the pen.
            if self._doors.named is not None and not self._connected:
                raise error
            return GONE_PATIENCE
        if error.code == "no-leader":
            return LEADER_PATIENCE
        if error.code == "no-majority":
            return MAJORITY_PATIENCE if self._looked_round else LEADER_PATIENCE
        if error.code == "unreachable" and self._opinions:
            # This peer does not reach who must do it; perhaps another one does.
            self._opinions -= 1
            return GONE_PATIENCE
        raise error

    def _explain(self, error: OperationError, target: str) -> None:
        if error.code in UNDECIDED:
            text = f"no coordinator yet: {error.message}"
        else:
            text = f"{target} cannot go on with this; another peer is asked"
        if self._said != text:
            self._said = text
            self._tell(text)

    async def _next(self, tried: str) -> str:
        """The next peer; each gets its turn, and the one that was tried last comes last."""
        if not self._waiting:
            self._waiting = [*self._doors.others(tried, self._known), tried]
        else:
            await trio.sleep(PAUSE)
        target = self._waiting.pop(0)
        if target == tried:
            await trio.sleep(PAUSE)
        return target

    async def _look_round(self, tried: str) -> str:
        """A peer that sees a coordinator; if there is none, after a pause, the one that was tried."""
        self._looked_round = True
        found: list[str] = []

        async def look(target: str) -> None:
            if await _sees_coordinator(target):
                found.append(target)
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep, MAJORITY_PAUSE)
            for target in self._doors.others(tried, self._known):
                nursery.start_soon(look, target)
        return found[0] if found else tried

    async def _learn(self, connection: client.Client) -> None:
        """Remember who else could be asked, now and then, if this user can speak to them at all."""
        if not self._known.stale(self._doors.place) or not (config_directory() / "meshes.json").exists():
            return
        with suppress(OperationError, KeyError, TypeError, ValueError):
            answer = await connection.call("mesh.doors", timeout=DOORS_TIMEOUT)
            if answer["mesh"] in Credentials.load().meshes:
                self._known.remember(self._doors.place, answer)


async def _sees_coordinator(target: str) -> bool:
    with trio.move_on_after(OTHER_TIMEOUT), suppress(OperationError, KeyError, TypeError):
        async with client.connect(target, timeout=OTHER_TIMEOUT) as connection:
            answer = await connection.call("leader", timeout=OTHER_TIMEOUT)
            return answer["leader"] is not None
    return False
