# SPDX-License-Identifier: Apache-2.0
"""`mobictl net`: networks, links, and what they do to frames."""

from __future__ import annotations

from typing import Annotated

import typer

from mobictl import options, tables
from mobictl.command import application, command
from mobictl.options import build
from mobictl.session import Session
from mobictl.tables import Column
from proto import api
from proto.units import format_percentage, format_rate, format_time

app = application("Networks and links.")

QUALITY = (
    Column("DELAY", "delay", format_time, right=True),
    Column("JITTER", "jitter", format_time, right=True),
    Column("LOSS", "loss", format_percentage, right=True),
    Column("RATE", "rate", format_rate, right=True),
)
COLUMNS = (
    Column("NETWORK", "network"),
    Column("ID", "id", right=True),
    Column("SUBNET", "subnet"),
    Column("MEMBERS", "members", tables.joined),
    *QUALITY,
)
PORTS = (
    Column("PORT", "endpoint"),
    Column("PEER", "peer"),
    Column("MAC", "mac"),
    Column("ADDRESSES", "addresses", tables.joined),
    *QUALITY,
    Column("RX", "rx_bytes", tables.size, right=True),
    Column("TX", "tx_bytes", tables.size, right=True),
    Column("LOST", "lost_held", right=True),
)


@command(app, "ls")
def ls(session: Session) -> None:
    """List all networks and links of the mesh."""
    rows = session.call("net.ls")
    session.show(rows, tables.table(rows, COLUMNS, "no networks"))


@command(app, "show")
def show(session: Session, network: Annotated[str, typer.Argument(metavar="[LAB:]NETWORK")]) -> None:
    """Show all about one network or link."""
    row = session.call("net.show", build(api.NetArguments, "net.show", network=network))
    ports = [{**port, **(port.get("counters") or {})} for port in row.get("ports", [])]
    facts = {key: value for key, value in row.items() if key != "ports"}
    session.show(row, tables.page(facts), "", tables.table(ports, PORTS, "no ports"))


@command(app, "impair")
def impair(
    session: Session,
    link: Annotated[str, typer.Argument(metavar="LAB:LINK", help="As in: mobictl net ls.")],
    *,
    delay: Annotated[float | None, options.duration("--delay", help="How long every frame takes.")] = None,
    jitter: Annotated[float | None, options.duration("--jitter", help="How much that varies.")] = None,
    loss: Annotated[float | None, options.share("--loss", help="How many frames are lost.")] = None,
    rate: Annotated[int | None, options.rate("--rate", help="How much passes.")] = None,
    reorder: Annotated[float | None, options.share("--reorder", help="How many frames overtake.")] = None,
    duplicate: Annotated[float | None, options.share("--duplicate", help="How many come twice.")] = None,
    endpoint: Annotated[
        str | None, typer.Option("--endpoint", metavar="GUEST:ethN", help="Only what this end sends.")
    ] = None,
) -> None:
    """Change what a link does to frames; what is not named stays as it is."""
    args = build(
        api.NetImpair,
        "net.impair",
        link=link,
        endpoint=endpoint,
        delay=delay,
        jitter=jitter,
        loss=loss,
        rate=rate,
        reorder=reorder,
        duplicate=duplicate,
    )
    if not args.model_fields_set - {"link", "endpoint"}:
        raise typer.BadParameter("say what to change, such as --delay 50ms")
    row = session.call("net.impair", args)
    session.show(row, tables.page(row) if isinstance(row, dict) else f"{link}: changed")
