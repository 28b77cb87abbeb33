# SPDX-License-Identifier: Apache-2.0
"""How a peer gets its first catalog: it founds a mesh of its own, or joins one with a token.

What a newcomer is told when it joins is kept in `mesh.json` until the catalog itself has come, so that a
crash in between costs nothing: the next start goes on from there.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trio

from mobid import rpc, tls
from mobid.config import write_durably
from mobid.identity import Identity
from mobid.links import connect_tls
from mobid.tasks import background
from proto import api, entries, tokens, versions
from proto.api import OperationError
from proto.state import State

JOIN_TIMEOUT = 30.0


def new_mesh_id() -> str:
    """16 random hex digits."""
    return secrets.token_hex(8)


def read_bootstrap(path: Path) -> State | None:
    """What was kept of an earlier join.

    None if there was none. Raises `OperationError` for a damaged file.
    """
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text())
        members = [
            entries.Member(**{**member, "certificate": bytes.fromhex(member["certificate"])})
            for member in value["members"]
        ]
        return State(
            mesh=value["mesh"],
            coordinator=value["coordinator"],
            members={member.id: member for member in members},
        )
    except (ValueError, KeyError, TypeError) as error:
        raise OperationError(
            "failed", f"{path} is damaged: {error}", "join anew from an empty directory"
        ) from None


def write_bootstrap(path: Path, answer: dict[str, Any]) -> None:
    """Keep the answer to `mesh.join`."""
    members = [{**member, "certificate": member["certificate"].hex()} for member in answer["members"]]
    value = {"mesh": answer["mesh"], "coordinator": answer["coordinator"], "members": members}
    write_durably(path, json.dumps(value, indent=1).encode())


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
    context = tls.client_context(None)
    for address, key in doors:
        try:
            with trio.fail_after(JOIN_TIMEOUT):
                stream = await connect_tls(address, context, key, "the mesh")
                client = rpc.Client(stream, address)
                async with background(client.run):
                    answer: dict[str, Any] = await client.call(op, args, JOIN_TIMEOUT)
                    return answer
        except OperationError as error:
            reason = error
            if error.code not in ("unreachable", "timeout", "no-leader"):
                raise
        except trio.TooSlowError:
            reason = OperationError("timeout", f"{address} did not answer within {JOIN_TIMEOUT:g} s")
    raise reason
