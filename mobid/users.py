# SPDX-License-Identifier: Apache-2.0
"""The people whose keys the mesh knows: who they are, and taking a key back.

A user comes in with a token (`mesh.login`). When the catalog no longer lists the key, every peer ends its
connections and takes no new ones (`mobid/server.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mobid.catalog import Catalog
from mobid.operations import Request, operation, step
from proto import api, entries
from proto.api import OperationError


class Users:
    """`user.…` at this peer. `emit` is that of the events."""

    def __init__(self, catalog: Catalog, emit: Callable[..., None]) -> None:
        self._catalog = catalog
        self._emit = emit

    @operation("user.ls", role="admin")
    async def ls(self, _request: Request, _args: api.Nothing) -> list[dict[str, Any]]:
        """All users: `{user: id, name, role, token: the one they came in with}`."""
        users = self._catalog.state.users.values()
        return [_row(user) for user in sorted(users, key=lambda user: (user.name, user.id))]

    @operation("user.rm", role="admin", args=api.UserArguments)
    async def rm(self, request: Request, args: api.UserArguments) -> dict[str, Any]:
        """A user's key opens nothing any more."""
        if self._catalog.applied(step(request)) is not None:
            return {"name": args.user}
        user = self._find(args.user)
        await self._catalog.propose(entries.RemoveUser(user=user.id), request=step(request))
        self._emit("user.removed", name=user.name)
        return _row(user)

    def _find(self, reference: str) -> entries.User:
        """The user with this id, beginning of an id, or name. Raises OperationError."""
        users = self._catalog.state.users
        if reference in users:
            return users[reference]
        found = [u for u in users.values() if u.name == reference or _begins(u.id, reference)]
        if len(found) == 1:
            return found[0]
        known = ", ".join(f"{user.name} {user.id}" for user in found or users.values())
        if found:
            raise OperationError("ambiguous", f"{reference!r} names several users: {known}", "give the id")
        hint = f"there are: {known}" if known else "nobody has logged in yet"
        raise OperationError("not-found", f"there is no user {reference!r}", hint)


def _begins(id: str, reference: str) -> bool:
    return len(reference) >= 4 and id.startswith(reference)


def _row(user: entries.User) -> dict[str, Any]:
    return {"user": user.id, "name": user.name, "role": user.role, "token": user.token}
