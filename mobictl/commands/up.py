# SPDX-License-Identifier: Apache-2.0
"""`mobictl up` and `down`: peers on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mobictl import client, lifecycle, places, takedown
from mobictl.client import split_address
from mobictl.commands.peer import peer_table
from mobictl.labfile import load_wan_file
from mobictl.progress import reporting
from mobictl.session import Session
from proto.api import OperationError, check_name

MOST_PEERS = 64


def up(
    session: Session,
    *,
    peers: Annotated[
        int | None, typer.Option("--peers", min=1, max=MOST_PEERS, help="How many (default 1).")
    ] = None,
    wan: Annotated[
        Path | None,
        typer.Option("--wan", metavar="FILE", help="An emulated WAN; the peers have its sites' names."),
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="The name of a single peer.")] = None,
    listen: Annotated[
        str | None,
        typer.Option(
            "--listen",
            metavar="ADDRESS:PORT",
            help="Where a single peer listens (default: on this machine only).",
        ),
    ] = None,
) -> None:
    """Start peers on this machine as ordinary processes, joined to one mesh."""
    directory = session.root
    plan = _plan(directory, peers, wan, name, listen)
    with places.directory_lock(directory), reporting(session, "up") as report:
        manifest = lifecycle.run_up(directory, plan, report)
    rows: list[dict[str, Any]] = client.Mesh(manifest.peers[0].target).call("peer.ls")
    local = [
        {
            "name": p.name,
            "address": p.listen,
            "socket": str(p.socket.resolve()),
            "directory": str(p.directory),
            "pid": p.running(),
        }
        for p in manifest.peers
    ]
    session.show({"directory": str(directory), "wan": manifest.wan, "peers": local}, peer_table(rows))


def _plan(
    directory: Path, peers: int | None, wan_file: Path | None, name: str | None, listen: str | None
) -> lifecycle.Plan:
    if wan_file is not None:
        if name is not None or listen is not None:
            raise OperationError(
                "bad-argument", "--name and --listen do not go with --wan", "the file has the names"
            )
        wan = load_wan_file(wan_file)
        names = list(wan.sites)
        if peers is not None and peers > len(names):
            text = f"{wan_file} has {len(names)} sites, {peers} peers are wanted"
            raise OperationError("bad-argument", text, "one peer is at each site")
        return lifecycle.Plan(names[:peers], wan, wan_file)
    known = [peer.name for peer in places.load_manifest(directory).peers]
    if (name is not None or listen is not None) and peers not in (None, 1):
        raise OperationError("bad-argument", "--name and --listen are for a single peer", "leave out --peers")
    if listen is not None and len(known) > 1:
        text = f"{directory} has the mesh of {', '.join(known)}; --listen is for a single peer"
        raise OperationError("bad-argument", text, "leave out --listen, or give another --dir")
    if listen is not None:
        split_address(listen)
    if name is not None:
        return lifecycle.Plan([check_name(name, "--name")], listen=listen)
    names = known if peers is None and known else [f"peer{n}" for n in range(1, (peers or 1) + 1)]
    return lifecycle.Plan(names, listen=listen)


def down(session: Session) -> None:
    """End the peers of this machine, their guests, and whatever a killed peer left behind."""
    directory = session.root
    manifest = places.load_manifest(directory)
    if not manifest.peers:
        raise OperationError(
            "not-found", f"no mesh was started in {directory}", "name its directory with --dir"
        )
    with places.directory_lock(directory), reporting(session, "down") as report:
        ended = takedown.take_down(manifest, report)
    words = f"{', '.join(ended)} ended" if ended else "nothing was running"
    session.show({"directory": str(directory), "ended": ended}, words)
