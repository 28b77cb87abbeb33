# SPDX-License-Identifier: Apache-2.0
"""`mobictl vm migrate`: a guest moves to another peer while it runs; passes are shown as they go."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import trio
import typer
from rich.console import RenderableType
from rich.text import Text

from mobictl import options, tables
from mobictl.client import Client, new_key
from mobictl.command import Exit, command
from mobictl.commands.vm import app
from mobictl.options import VmArgument, build
from mobictl.progress import Reporter, reporting
from mobictl.session import Session
from mobictl.tables import Column
from proto import api
from proto.api import OperationError
from proto.units import format_rate, format_size, format_time

BEGIN_TIMEOUT = 30.0

PASSES = (
    Column("PASS", "number", right=True),
    Column("RAM", "ram_bytes", tables.size, right=True),
    Column("DISK", "disk_bytes", tables.size, right=True),
    Column("SENT", "sent_bytes", tables.size, right=True),
    Column("TIME", "duration", tables.seconds, right=True),
    Column("DIRTIED", "dirty_rate", lambda value: f"{format_size(value)}/s", right=True),
    Column("BANDWIDTH", "bandwidth", format_rate, right=True),
)


@command(app, "migrate", interrupted="a move that had begun goes on; mobictl vm ls shows where the guest is")
def migrate(
    session: Session,
    vm: VmArgument,
    *,
    to: Annotated[str, typer.Option("--to", metavar="PEER", help="Where it goes.")],
    downtime: Annotated[
        float, options.duration("--downtime", help="The longest pause to aim at.", default="50ms")
    ] = 0.05,
    bandwidth: Annotated[int, options.rate("--bandwidth", help="The most to use (default: all).")] = 0,
    deadline: Annotated[
        float, options.duration("--deadline", help="When to stop trying.", default="60s")
    ] = 60.0,
    mode: Annotated[Literal["auto", "precopy", "cold"], typer.Option("--mode", help="How.")] = "auto",
    on_stall: Annotated[
        Literal["accept", "abort"],
        typer.Option(
            "--on-stall",
            help="When the guest writes faster than the line carries: take a longer pause, or not move.",
        ),
    ] = "accept",
    background: Annotated[
        bool, typer.Option("--background", help="Return once the move has begun; it goes on.")
    ] = False,
) -> None:
    """Move a running guest to another peer."""
    args = build(
        api.VmMigrate,
        "vm.migrate",
        vm=vm,
        to=to,
        downtime=downtime,
        bandwidth=bandwidth,
        deadline=deadline,
        mode=mode,
        on_stall=on_stall,
    )
    if background:
        key = new_key()
        session.persist(lambda client: _begin(client, args, key))
        words = f"{vm}: moving to {to}; mobictl vm ls shows where it is"
        session.show({"vm": vm, "to": to, "background": True}, words)
        return
    with reporting(session, f"{vm} → {to}") as report:
        told: set[str] = set()
        record = session.call(
            "vm.migrate", args, timeout=deadline + 120, on_item=lambda item: progress(report, item, told)
        )
    session.show(record, *summary(record))
    if not record.get("ok"):
        raise Exit(1)


async def _begin(client: Client, args: api.VmMigrate, key: str) -> None:
    """Ask for the move and leave at its first word: from then on the peer carries it out by itself."""
    with trio.move_on_after(BEGIN_TIMEOUT):
        async with client.request("vm.migrate", args, key=key) as request:
            async for _ in request:
                return
            await request.result()
            return
    raise OperationError(
        "timeout", f"the move of {args.vm} did not begin within {BEGIN_TIMEOUT:g} s", "see: mobictl peer ls"
    )


@command(app, "adopt")
def adopt(session: Session, vm: VmArgument) -> None:
    """Let the frozen copy at the source go on; only when the destination will never come back."""
    found = session.call("vm.adopt", build(api.VmArguments, "vm.adopt", vm=vm))
    session.show(found, f"{vm}: goes on at {found['peer']}")


def progress(report: Reporter, item: dict[str, Any], told: set[str]) -> None:
    """One item of a migration: bytes of the present pass, a finished pass, or a stage by name.

    Whoever goes on with the command tells all items again; those in `told` are left out.
    """
    if "done_bytes" not in item:
        text = repr(item)
        if text in told:
            return
        told.add(text)
    number = item.get("pass")
    if "done_bytes" in item:
        report.amount(f"pass {number}", item["done_bytes"], item.get("total_bytes"))
    elif number is not None:
        report.done(f"pass {number}")
        sent = format_size(item.get("sent_bytes") or 0)
        report.step(f"pass {number}: {sent} sent in {format_time(item.get('duration') or 0)}")
    elif "stage" in item:
        report.step(str(item["stage"]))


def summary(record: dict[str, Any]) -> list[RenderableType]:
    """The record of a migration for people: the route, the passes, and what it cost."""
    route = f"{record.get('vm')}: {record.get('from')} → {record.get('to')}"
    passes = [{**one, "number": n} for n, one in enumerate(record.get("passes") or [], 1)]
    if not record.get("ok"):
        where = "it goes on where it was" if record.get("rolled_back") else "see: mobictl vm ls"
        return [Text(f"{route} failed: {record.get('reason') or 'no reason given'}; {where}", style="red")]
    downtime = record.get("downtime_ms") or {}
    parts = [
        f"{name} {tables.milliseconds(downtime[name])}"
        for name in ("host", "guest", "network")
        if downtime.get(name) is not None
    ]
    took, sent = format_time(record.get("total_s") or 0), format_size(record.get("sent_bytes") or 0)
    lines: list[RenderableType] = [
        Text(f"{route} moved in {took}, {sent} sent"),
        Text(
            f"downtime: {', '.join(parts) or 'not measured'}; verified: {record.get('verified', 'pending')}"
        ),
    ]
    return [*lines, tables.table(passes, PASSES)] if passes else lines
