# SPDX-License-Identifier: Apache-2.0
"""`mobictl wan`: the emulated WAN between the peers of `mobictl up --wan`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mobictl import options, places, tables
from mobictl.command import application, command
from mobictl.nest import nest_call
from mobictl.session import Session
from mobictl.tables import Column
from proto.units import format_percentage, format_rate, format_time

app = application("The emulated WAN (of mobictl up --wan).")

PATHS = (
    Column("A", "a"),
    Column("B", "b"),
    Column("RTT", "rtt", format_time, right=True),
    Column("RATE", "rate", lambda value: format_rate(value) if value else "–", right=True),
    Column("LOSS", "loss", format_percentage, right=True),
    Column("JITTER", "jitter", format_time, right=True),
    Column("STATE", "state", tables.state),
)
SiteA = Annotated[str, typer.Argument(metavar="A", help="A site.")]
SiteB = Annotated[str, typer.Argument(metavar="B", help="Another site.")]


def _ask(session: Session, op: str, args: dict[str, Any] | None = None) -> Any:
    return nest_call(places.load_manifest(session.root), op, args)


def _table(paths: list[dict[str, Any]]) -> Any:
    rows = [{**path, "state": "cut" if path.get("cut") else "up"} for path in paths]
    return tables.table(rows, PATHS, "no paths")


@command(app, "show")
def show(session: Session) -> None:
    """Show the paths between the sites as they are now."""
    found = _ask(session, "wan.show")
    session.show(found, _table(found["paths"]))


@command(app, "set")
def set_(
    session: Session,
    a: SiteA,
    b: SiteB,
    *,
    rtt: Annotated[float | None, options.duration("--rtt", help="The round trip.")] = None,
    rate: Annotated[int | None, options.rate("--rate", help="What passes in each direction.")] = None,
    loss: Annotated[float | None, options.share("--loss", help="How many packets are lost.")] = None,
    jitter: Annotated[float | None, options.duration("--jitter", help="How much the delay varies.")] = None,
) -> None:
    """Change the path between two sites; what is not named stays as it is."""
    changes = {"rtt": rtt, "rate": rate, "loss": loss, "jitter": jitter}
    given = {key: value for key, value in changes.items() if value is not None}
    if not given:
        raise typer.BadParameter("say what to change, such as --rtt 100ms")
    path = _ask(session, "wan.set", {"a": a, "b": b, **given})
    session.show(path, _table([path]))


@command(app, "cut")
def cut(session: Session, a: SiteA, b: SiteB) -> None:
    """Let nothing pass between two sites."""
    found = _ask(session, "wan.cut", {"a": a, "b": b})
    session.show(found, f"{a} and {b} are cut off from one another; mobictl wan heal ends that")


@command(app, "heal")
def heal(
    session: Session,
    a: Annotated[str | None, typer.Argument(metavar="A", help="A site (default: all).")] = None,
    b: Annotated[str | None, typer.Argument(metavar="B", help="Another site.")] = None,
) -> None:
    """Undo all cuts, or the one between two sites."""
    found = _ask(session, "wan.heal", {key: site for key, site in (("a", a), ("b", b)) if site is not None})
    session.show(found, _table(found["paths"]))
