# SPDX-License-Identifier: Apache-2.0
"""How a peer that was away learns that it was evicted.

Who is evicted gets no records any more, and its key opens no connection: its own catalog would call it a
member for ever, and its guests would run on beside those that took their place. So a peer to which no
coordinator grants a lease asks the members it knows, as a stranger would, over TLS that pins *their* keys (to
have heard who coordinates is not enough: two that were evicted tell it to one another for ever). One
member's word that it left is enough: any member could have evicted it. But it must know more than this peer
does: one that was away itself may not know yet that this peer has joined again. No answer means nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import structlog
import trio
from pydantic import StringConstraints

from mobid.catalog import Catalog
from mobid.joining import ask_door
from mobid.operations import Request, operation
from proto.api import Arguments, OperationError
from proto.identity import public_key
from proto.state import State

PATIENCE = 10.0
"""Seconds between two looks whether there is reason to ask."""
ASK_TIMEOUT = 5.0

log = structlog.get_logger()


class StandingOf(Arguments):
    """`mesh.standing`: is the peer with this id a member?"""

    peer: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]


class Standing:
    """`mesh.standing`, and the question of this peer (`own`, its id). `left` is called once it has learnt
    that it is no member any more."""

    def __init__(self, own: str, catalog: Catalog, left: Callable[[], Awaitable[None]]) -> None:
        self._own = own
        self._catalog = catalog
        self._left = left

    @operation("mesh.standing", role="anonymous", args=StandingOf)
    async def standing(self, _request: Request, args: StandingOf) -> dict[str, Any]:
        """`{mesh, status, index}`: member, left, or unknown, as far as this peer knows the log."""
        state = self._catalog.state
        member = state.members.get(args.peer)
        return {"mesh": state.mesh, "status": member.status if member else "unknown", "index": state.index}

    async def run(self) -> None:
        """Ask whenever there is no lease, until cancelled."""
        while True:
            await trio.sleep(PATIENCE)
            if not self._catalog.lease.valid and await self._was_evicted():
                await self._left()
                return

    async def _was_evicted(self) -> bool:
        state = self._catalog.state
        for member in state.members.values():
            if member.id == self._own or member.status != "member":
                continue
            door = (member.address, public_key(member.certificate))
            try:
                answer = await ask_door(door, "mesh.standing", StandingOf(peer=self._own), ASK_TIMEOUT)
            except OperationError as error:
                log.debug("standing.not.told", peer=member.name, reason=error.message)
                continue
            if says_left(answer, state):
                return True
        return False


def says_left(answer: Any, state: State) -> bool:
    """Whether an answer to `mesh.standing` tells a peer that knows `state` that it is no member any more."""
    match answer:
        case {"mesh": state.mesh, "status": "left", "index": int(index)}:
            return index > state.index
    return False
