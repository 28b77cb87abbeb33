# SPDX-License-Identifier: Apache-2.0
"""`mobictl vm`: single guests."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mobictl import options, tables
from mobictl.command import application, command
from mobictl.options import VmArgument, build
from mobictl.session import Session
from mobictl.tables import Column
from proto import api

app = application("Guests: make, see, enter, stop and move them.")

COLUMNS = (
    Column("VM", "name"),
    Column("STATE", "state", tables.state),
    Column("PEER", "peer"),
    Column("EPOCH", "epoch", right=True),
    Column("MEMORY", "memory", tables.size, right=True),
    Column("ADDRESSES", "addresses", tables.joined),
    Column("UPTIME", "uptime", tables.seconds, right=True),
    Column("REMARK", "remark"),
)
CHANGE_TIMEOUT = 180.0
Force = Annotated[bool, typer.Option("--force", "-f", help="Do not ask the guest: pull the plug.")]


def full_name(row: dict[str, Any]) -> str:
    """`LAB/NAME`, just NAME for a guest of vm run."""
    lab, name = str(row.get("lab", "")), str(row.get("vm", ""))
    short = name.removeprefix(f"{lab}/")
    return short if lab in ("", "default") else f"{lab}/{short}"


AT_REST = ("stopped", "failed", "fenced")
"""States that stay as they are, whether or not the guest's peer answers."""


def _as_seen(row: dict[str, Any]) -> dict[str, Any]:
    """Of a guest whose peer is silent the state is only the last known one."""
    if row.get("owner_state", "alive") == "alive" or row.get("state") == "lost":
        return {}
    silent = "is silent" if row["owner_state"] == "suspect" else "does not answer"
    mark = "" if row.get("state") in AT_REST else "?"
    return {"state": f"{row.get('state')}{mark}", "remark": f"{row.get('peer')} {silent}", "uptime": None}


def guest_table(rows: list[dict[str, Any]]) -> Any:
    """The table of `vm ls`."""
    ordered = sorted(rows, key=lambda row: (str(row.get("lab", "")), str(row.get("vm", ""))))
    named = [{**row, **_as_seen(row), "name": full_name(row)} for row in ordered]
    empty = "no guests; make one with: mobictl vm run mini, or mobictl lab up FILE"
    return tables.table(named, COLUMNS, empty)


@command(app, "ls")
def ls(session: Session) -> None:
    """List all guests of the mesh."""
    rows = session.call("vm.ls")
    session.show(rows, guest_table(rows))


@command(app, "show")
def show(session: Session, vm: VmArgument) -> None:
    """Show all about one guest."""
    row = session.call("vm.show", build(api.VmArguments, "vm.show", vm=vm))
    session.show(row, tables.page(row))


@command(app, "run", interrupted="the guest is removed again; mobictl vm ls shows when it is gone")
def run(
    session: Session,
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="The image, as in: mobictl image ls.")],
    *,
    name: Annotated[
        str | None, typer.Option("--name", help="The guest's name (default: made from the image).")
    ] = None,
    memory: Annotated[int | None, options.size("--memory", "-m", help="Its memory, such as 64M.")] = None,
    disk: Annotated[int | None, options.size("--disk", help="An empty disk /dev/vdb of this size.")] = None,
    place: Annotated[
        str | None, typer.Option("--place", metavar="PEER", help="The peer it starts on.")
    ] = None,
    on_partition: Annotated[
        str,
        typer.Option(
            "--on-partition",
            metavar="run|freeze",
            help="When its peer is cut off from the majority: go on, or stand still so that another peer may "
            "restart it.",
        ),
    ] = "run",
) -> None:
    """Start one guest of an image."""
    args = build(
        api.VmRun,
        "vm.run",
        image=image,
        name=name,
        memory=memory,
        disk=disk,
        place=place,
        on_partition=on_partition,
    )
    row = session.call("vm.run", args, timeout=CHANGE_TIMEOUT)
    session.show(row, guest_table([row]))


def _change(session: Session, op: str, args: api.Arguments, done: str) -> None:
    row = session.call(op, args, timeout=CHANGE_TIMEOUT)
    name = full_name(row) if isinstance(row, dict) and "vm" in row else str(getattr(args, "vm", ""))
    session.show(row, f"{name}: {done}")


@command(app, "start")
def start(session: Session, vm: VmArgument) -> None:
    """Start a guest that is stopped."""
    _change(session, "vm.start", build(api.VmArguments, "vm.start", vm=vm), "started")


@command(app, "restart")
def restart(session: Session, vm: VmArgument, force: Force = False) -> None:
    """Stop a guest and start it again."""
    _change(session, "vm.restart", build(api.VmForce, "vm.restart", vm=vm, force=force), "restarted")


@command(app, "stop")
def stop(session: Session, vm: VmArgument, force: Force = False) -> None:
    """Ask a guest to power off, and wait until it did."""
    _change(session, "vm.stop", build(api.VmForce, "vm.stop", vm=vm, force=force), "stopped")


@command(app, "rm")
def rm(session: Session, vm: VmArgument, force: Force = False) -> None:
    """Remove a guest and its disk; a running one only with --force."""
    row = session.call("vm.rm", build(api.VmForce, "vm.rm", vm=vm, force=force), timeout=CHANGE_TIMEOUT)
    session.show(row, f"{full_name(row)}: removed", *unconfirmed(row))


def unconfirmed(document: dict[str, Any]) -> list[str]:
    """What to say of peers that did not confirm that something has ended there."""
    silent = document.get("unconfirmed") or []
    return [f"not confirmed by {name}: what is still there ends when it is back" for name in silent]


@command(app, "pause")
def pause(session: Session, vm: VmArgument) -> None:
    """Freeze a guest where it is."""
    _change(session, "vm.pause", build(api.VmArguments, "vm.pause", vm=vm), "paused")


@command(app, "resume")
def resume(session: Session, vm: VmArgument) -> None:
    """Let a paused guest go on."""
    _change(session, "vm.resume", build(api.VmArguments, "vm.resume", vm=vm), "running")
