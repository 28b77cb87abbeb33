# SPDX-License-Identifier: Apache-2.0
"""`mobictl peer`, `status`, `leader`, `login`: the mesh and its members."""

from __future__ import annotations

import getpass
import re
import socket
import sys
import time
from typing import Annotated, Any, Literal

import typer

from mobictl import client, options, tables
from mobictl.command import Exit, application, command
from mobictl.credentials import Credentials
from mobictl.options import PeerArgument, build
from mobictl.progress import reporting
from mobictl.session import Session
from mobictl.tables import Column
from proto import api, tokens
from proto.api import OperationError

app = application("Peers: the hosts of the mesh.")
DRAIN_TIMEOUT = 24 * 3600.0
token_app = application("Tokens: let a new peer or user in.")
app.add_typer(token_app, name="token")

COLUMNS = (
    Column("PEER", "name"),
    Column("STATE", "state", tables.state),
    Column("SITE", "site"),
    Column("ADDRESS", "address"),
    Column("RTT", "rtt_ms", tables.milliseconds, right=True),
    Column("VOTER", "voter", tables.yes),
    Column("DRAINING", "draining", tables.yes),
    Column("GUESTS", "guests", right=True),
    Column("FREE", "memory_free", tables.size, right=True),
)
TOKEN_COLUMNS = (
    Column("TOKEN", "id"),
    Column("ROLE", "role"),
    Column("STATE", "state", tables.state),
    Column("USES", "uses", right=True),
    Column("EXPIRES", "expires", tables.moment),
)


def peer_table(rows: list[dict[str, Any]]) -> Any:
    """The table of `peer ls`."""
    return tables.table(sorted(rows, key=lambda row: str(row.get("name", ""))), COLUMNS, "no peers")


@command(app, "ls")
def ls(session: Session) -> None:
    """List the peers of the mesh."""
    rows = session.call("peer.ls")
    session.show(rows, peer_table(rows))


@command(app, "show")
def show(session: Session, peer_name: PeerArgument) -> None:
    """Show all about one peer."""
    row = session.call("peer.show", build(api.PeerArguments, "peer.show", peer=peer_name))
    session.show(row, tables.page(row))


@command(app, "ping")
def ping(session: Session, peer_name: PeerArgument) -> None:
    """Measure the round trip to a peer, as the asked peer sees it."""
    found = session.call("peer.ping", build(api.PeerArguments, "peer.ping", peer=peer_name), timeout=30.0)
    session.show(found, f"{peer_name} answers within {tables.milliseconds(found['rtt_ms'])}")


@command(app, "join")
def join(
    session: Session,
    token: Annotated[str, typer.Argument(metavar="TOKEN", help="The token, or - for standard input.")],
) -> None:
    """Let the asked peer, alone so far, join the mesh of a token."""
    found = session.call("peer.join", build(api.PeerJoin, "peer.join", token=_token_text(token)))
    session.show(found, "joined")


@command(app, "drain", interrupted="the peer goes on being emptied; mobictl peer drain PEER watches it again")
def drain(
    session: Session,
    peer_name: PeerArgument,
    *,
    undo: Annotated[bool, typer.Option("--undo", help="Let guests come to the peer again.")] = False,
    discard_stopped: Annotated[
        bool,
        typer.Option(
            "--discard-stopped", help="Stopped guests go elsewhere too, without what is on their disks."
        ),
    ] = False,
) -> None:
    """Move all guests away from a peer, and let no new ones come."""
    args = build(
        api.PeerDrain,
        "peer.drain",
        peer=peer_name,
        undo=undo or None,
        discard_stopped=discard_stopped or None,
    )
    with reporting(session, f"drain {peer_name}") as report:
        done = session.call(
            "peer.drain",
            args,
            timeout=DRAIN_TIMEOUT,
            on_item=lambda item: report.step(f"{item.get('guest')}: {item.get('state')}"),
        )
    name = done["peer"]
    if undo:
        session.show(done, f"{name} takes guests again")
    elif not done["left"]:
        session.show(done, f"{name} has no guests; it can leave")
    else:
        lines = [f"{one['guest']} stays at {name}: {one['reason']}" for one in done["left"]]
        words = "a guest" if done["guests"] == 1 else f"{done['guests']} guests"
        more = f"{name} still has {words}, and is emptied as soon as that can be"
        session.show(done, *lines, more)
        raise Exit(1)


@command(app, "leave")
def leave(session: Session) -> None:
    """Let the asked peer leave its mesh; it must have no guests."""
    found = session.call("peer.leave")
    session.show(found, "left")


@command(app, "evict")
def evict(session: Session, peer_name: PeerArgument) -> None:
    """Take a peer's key out of the mesh for good.

    Its guests are lost, but those with on-partition: freeze that run are started anew elsewhere, from their
    image, once the peer's lease is out.
    """
    row = session.call("peer.evict", build(api.PeerArguments, "peer.evict", peer=peer_name))
    session.show(row, f"{peer_name}: evicted")


@command(token_app, "new")
def token_new(
    session: Session,
    ttl: Annotated[float, options.duration("--ttl", help="How long it is good for.", default="1h")] = 3600.0,
    uses: Annotated[int, typer.Option("--uses", min=1, help="How often it can be used.")] = 1,
    role: Annotated[
        Literal["peer", "viewer", "operator", "admin"],
        typer.Option("--role", help="peer, or what a user may do."),
    ] = "peer",
) -> None:
    """Make a token that lets a peer or a user in."""
    args = build(api.TokenNew, "peer.token.new", ttl=ttl, uses=uses, role=role)
    made = session.call("peer.token.new", args)
    how = "mobictl peer join" if role == "peer" else "mobictl login"
    until = tables.moment(made["expires"])
    session.note(f"good for {uses} use{'s' * (uses > 1)}, until {until}; use it with: {how} TOKEN")
    if session.json:
        session.show(made)
    else:
        print(made["token"])  # noqa: T201 - the token is the output, also with --quiet


@command(token_app, "ls")
def token_ls(session: Session) -> None:
    """List the tokens that were made, without their secrets."""
    rows = session.call("peer.token.ls")
    session.show(rows, tables.table(rows, TOKEN_COLUMNS, "no tokens"))


@command(token_app, "revoke")
def token_revoke(
    session: Session,
    token: Annotated[str, typer.Argument(metavar="ID", help="The token's id, as in token ls.")],
) -> None:
    """Make a token useless."""
    found = session.call("peer.token.revoke", build(api.TokenRevoke, "peer.token.revoke", token=token))
    session.show(found, f"{token}: revoked")


def status(session: Session) -> None:
    """Show the asked peer, its mesh, and all peers in it."""
    found = session.call("status")
    peers = session.call("peer.ls")
    session.show({**found, "peer_list": peers}, tables.page(found), "", peer_table(peers))


def leader(session: Session) -> None:
    """Show who coordinates the mesh."""
    found = session.call("leader")
    silence = {name: f"silent for {tables.seconds(value)}" for name, value in found["missing"].items()}
    session.show(found, tables.page({**found, "leader": found["leader"] or "none", "missing": silence}))


def _token_text(token: str) -> str:
    """The token; `-` reads it from standard input, so that it need not stand on a command line."""
    return sys.stdin.readline(8192).strip() if token == "-" else token


def user_name() -> str:
    """`user@host`, as a name that the mesh accepts."""
    text = f"{getpass.getuser()}.{socket.gethostname()}"
    return re.sub(r"[^a-zA-Z0-9_.-]", "-", text).lstrip("_.-")[:63] or "user"


def login(
    session: Session,
    token: Annotated[
        str, typer.Argument(metavar="TOKEN", help="The token, or - for standard input.", show_default=False)
    ],
) -> None:
    """Enrol this user's key in a mesh, to speak to its peers over TCP."""
    parsed = tokens.decode(_token_text(token), time.time())
    if parsed.role == "peer":
        hint = "ask for one with: mobictl peer token new --role operator"
        raise OperationError("bad-argument", "this token admits a peer, not a user", hint)
    credentials = Credentials.load_or_create()
    args = build(
        api.MeshLogin,
        "mesh.login",
        token=parsed.id,
        secret=parsed.secret,
        certificate=credentials.certificate(),
        name=user_name(),
    )
    found = client.run(_login, parsed, args)
    members = [
        {"name": str(m["name"]), "address": str(m["address"]), "key": m["key"].hex()}
        for m in found["members"]
    ]
    credentials.remember(parsed.mesh, members)
    address = members[0]["address"] if members else "HOST:PORT"
    session.show(
        {"mesh": parsed.mesh, "role": parsed.role, "peers": [member["name"] for member in members]},
        f"logged in as {args.name} with role {parsed.role}; try: mobictl status --peer {address}",
    )


async def _login(token: tokens.Token, args: api.MeshLogin) -> Any:
    """Try the token's doors in order; what counts is the first that can be reached."""
    last = OperationError("unreachable", "the token names no peer", "ask for a new token")
    for address, key in token.doors:
        try:
            async with client.connect(address, pinned=key) as connection:
                return await connection.call("mesh.login", args, timeout=30.0)
        except OperationError as error:
            if error.code != "unreachable":
                raise
            last = error
    raise last
