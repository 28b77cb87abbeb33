# SPDX-License-Identifier: Apache-2.0
"""Live moves that no person asks for one by one: of a lab, to a changed place, away from a peer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from mobid.links import Links
from proto import api, entries
from proto.api import OperationError

Tell = Callable[[dict[str, Any]], Awaitable[None]]


async def nobody_told(_item: dict[str, Any]) -> None:
    """For moves that nobody watches."""


async def move_live(links: Links, guest: entries.Guest, to: str, tell: Tell = nobody_told) -> dict[str, Any]:
    """Move a running guest to the peer `to` (id); the migration's record. `tell` gets its progress.

    Raises `OperationError` if the guest did not move; then it goes on where it was.
    """
    async with links.stream(guest.owner, "vm.migrate", api.VmMigrate(vm=guest.key, to=to)) as stream:
        async for item in stream:
            await tell(item)
        record: dict[str, Any] = await stream.result()
    if not record.get("ok"):
        raise OperationError(
            "failed", f"{guest.key} did not move: {record.get('reason') or 'no reason given'}"
        )
    return record
