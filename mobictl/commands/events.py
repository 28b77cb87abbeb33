# SPDX-License-Identifier: Apache-2.0
"""`mobictl events`: what happened in the mesh, as lines or NDJSON."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from mobictl import options, tables
from mobictl.client import Client
from mobictl.options import build
from mobictl.session import Session, write_json
from proto import api

SHOWN = ("time", "peer", "kind", "peer_id", "stamp")
"""Facts of every event, which have a place of their own in its line, or none."""


def events(
    session: Session,
    *,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what happens, until Ctrl-C.")
    ] = False,
    since: Annotated[
        float | None, options.duration("--since", help="Only those not older than this.")
    ] = None,
) -> None:
    """Show the mesh's event log."""
    kept: list[dict[str, Any]] = []
    position: dict[str, int] = {}
    begun = time.monotonic()

    def take(item: dict[str, Any]) -> None:
        if "remark" in item:
            session.note(item["remark"])
            return
        position[item["peer_id"]] = max(item["stamp"], position.get(item["peer_id"], 0))
        if not session.json:
            session.show(item, line(item))
        elif follow:
            write_json(item)
        else:
            kept.append(item)

    async def work(client: Client) -> None:
        age = None if since is None else since + time.monotonic() - begun
        args = build(api.Events, "events", since=age, follow=follow, after=position)
        async with client.request("events", args) as request:
            async for item in request:
                take(item)

    try:
        session.persist(work)
    except KeyboardInterrupt:
        if not follow:
            raise
    if session.json and not follow:
        write_json(kept)


def line(event: dict[str, Any]) -> str:
    """One event in one line: when, where, what, and its facts."""
    facts = {key: value for key, value in event.items() if key not in SHOWN}
    words = " ".join(f"{key}={value}" for key, value in facts.items() if value not in (None, ""))
    text = (
        f"{tables.moment(event.get('time'))}  {event.get('peer', ''):<12} {event.get('kind', ''):<22} {words}"
    )
    return "".join(c if c.isprintable() else "?" for c in text).rstrip()
