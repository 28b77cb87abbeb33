# SPDX-License-Identifier: Apache-2.0
"""How a peer gets its first catalog: it founds a mesh of its own, or joins one with a token.

What a newcomer is told when it joins, some of the members and the times of the mesh, is kept (`recovery.py`),
so that a crash before the catalog has come costs nothing: the next start goes on from there.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

import trio

from mobid import rpc, tls
from mobid.config import Times
from mobid.identity import Identity
from mobid.links import connect_tls
from mobid.recovery import Known
from mobid.tasks import background
from proto import api, entries, tokens, versions
from proto.api import OperationError

JOIN_TIMEOUT = 30.0


def new_mesh_id() -> str:
    """16 random hex digits."""
    return secrets.token_hex(8)


def known_after(answer: dict[str, Any]) -> Known:
    """What a newcomer knows by the answer to `mesh.join`; raises `OperationError` if it makes no sense."""
    try:
        members = tuple(entries.Member(**member) for member in answer["members"])
        # A coordinator of an earlier version tells neither the times nor whether the key is new.
        times = Times.of(answer["times"]) if "times" in answer else None
        returning = bool(answer.get("returning", True))
        return Known(str(answer["mesh"]), members, fresh=True, times=times, returning=returning)
    except (KeyError, TypeError, ValueError) as error:
        raise OperationError("failed", f"the mesh's answer cannot be understood: {error}") from None


async def join(identity: Identity, text: str, name: str, site: str, address: str) -> dict[str, Any]:
    """Ask the doors of the token, one after the other, to be let in; returns the answer of `mesh.join`.

    Raises `OperationError`: what the mesh said, or `unreachable` if no door answered.
    """
    token = tokens.decode(text, time.time())
    if token.role != "peer":
        raise OperationError("bad-argument", f"token {token.id} is a user's", "mobictl login takes it")
    args = api.MeshJoin(
        token=token.id,
        secret=token.secret,
        certificate=identity.certificate,
        name=name,
        site=site,
        address=address,
        oldest_protocol=versions.OLDEST,
        newest_protocol=versions.NEWEST,
    )
    return await _knock(token.doors, "mesh.join", args)


async def _knock(doors: Sequence[tuple[str, bytes]], op: str, args: api.Arguments) -> dict[str, Any]:
    reason = OperationError("unreachable", "the token names no address")
    for door in doors:
        try:
            answer: dict[str, Any] = await ask_door(door, op, args, JOIN_TIMEOUT)
            return answer
        except OperationError as error:
            reason = error
            if error.code not in ("unreachable", "timeout", *api.UNDECIDED):
                raise
    raise reason


async def ask_door(door: tuple[str, bytes], op: str, args: api.Arguments, timeout: float) -> Any:
    """Ask the peer with this address and key as a stranger, without a certificate. Raises
    `OperationError`."""
    address, key = door
    with trio.move_on_after(timeout):
        stream = await connect_tls(address, tls.client_context(None), key, "the mesh")
        client = rpc.Client(stream, address)
        async with background(client.run):
            return await client.call(op, args, timeout)
    raise OperationError("timeout", f"{address} did not answer within {timeout:g} s")
