# SPDX-License-Identifier: Apache-2.0
"""`mobictl lab`: whole networks of guests from one file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mobictl import picture, tables
from mobictl.command import application, command
from mobictl.commands.vm import guest_table
from mobictl.labfile import load_lab_file
from mobictl.options import LabArgument, build
from mobictl.progress import reporting
from mobictl.session import Session
from mobictl.tables import Column
from proto import api
from proto.api import OperationError
from proto.lab import lab_schema
from proto.labcheck import write_lab
from proto.problems import Problem

app = application("Labs: networks of guests from one file.")

UP_TIMEOUT = 600.0
FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="The lab file.", show_default=False)]
LABS = (
    Column("LAB", "lab"),
    Column("GUESTS", "guests", right=True),
    Column("RUNNING", "running", right=True),
    Column("CREATED", "created", tables.moment),
    Column("SOURCE", "source"),
)
PLAN = (
    Column("VM", "vm"),
    Column("PEER", "peer"),
    Column("IMAGE", "image"),
    Column("MEMORY", "memory", tables.size, right=True),
    Column("DISK", "disk", lambda value: tables.size(value) if value else "–", right=True),
    Column("ADDRESSES", "addresses", tables.joined),
)
NETWORKS = (
    Column("NETWORK", "name"),
    Column("SUBNET", "subnet"),
    Column("MEMBERS", "members", tables.joined),
)


def _ask(
    session: Session, op: str, file: Path, on_item: Callable[[dict[str, Any]], None] | None = None
) -> Any:
    """Send a lab file; what a peer finds wrong with it is told with its place in the file."""
    lab, document = load_lab_file(file)
    source = str(file.absolute())
    args = build(api.LabFile, op, lab=write_lab(lab), source=source)
    try:
        return session.call(op, args, timeout=UP_TIMEOUT, on_item=on_item)
    except OperationError as error:
        problems = located(error.message, source)
        if not problems:
            raise
        raise document.error(problems) from None


def located(message: str, source: str) -> list[Problem]:
    """The problems in `SOURCE: topology.nodes.a.place: words; …`; none in other messages."""
    if not message.startswith(f"{source}: "):
        return []
    parts = re.split(r"(?:^|; )(topology(?:\.[\w-]+|\[\d+\])*): ", message.removeprefix(f"{source}: "))
    return [Problem(tuple(parts[n].split(".")), parts[n + 1]) for n in range(1, len(parts) - 1, 2)]


@command(app, "validate")
def validate(session: Session, file: FileArgument) -> None:
    """Check a lab file, without asking any peer."""
    lab, _ = load_lab_file(file)
    topology = lab.topology
    facts = {"guests": len(topology.nodes), "links": len(topology.links), "networks": len(topology.networks)}
    words = ", ".join(
        f"{count} {name if count != 1 else name[:-1]}" for name, count in facts.items() if count
    )
    session.show({"lab": lab.name, "ok": True, **facts}, f"{file}: the lab {lab.name!r} is right ({words})")


@command(app, "up", interrupted="the lab is taken down again; mobictl lab ls shows when it is gone")
def up(session: Session, file: FileArgument) -> None:
    """Make a lab of a file and start its guests."""
    with reporting(session, "lab up") as report:
        seen: dict[str, str] = {}

        def step(item: dict[str, Any]) -> None:
            guest, state = str(item.get("guest") or ""), str(item.get("state") or "")
            if not guest:
                report.step(str(item.get("stage") or ""))
            elif seen.get(guest) != state:
                seen[guest] = state
                report.step(f"{guest}: {state}")

        made = _ask(session, "lab.up", file, step)
    session.show(made, f"{made['lab']} is up", guest_table(_rows(made)))


def _rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The guests of a result as rows of `vm ls`."""
    return [row for row in document.get("guests", []) if isinstance(row, dict)]


@command(app, "plan")
def plan(session: Session, file: FileArgument) -> None:
    """Show what lab up would make and where, without making it."""
    found = _ask(session, "lab.plan", file)
    session.show(found, tables.table(_rows(found), PLAN, "no guests"))


@command(app, "down", interrupted="the lab goes on ending; mobictl lab ls shows when it is gone")
def down(session: Session, lab: LabArgument) -> None:
    """End a lab: its guests, their disks, its networks."""
    found = session.call("lab.down", build(api.LabArguments, "lab.down", lab=lab), timeout=UP_TIMEOUT)
    session.show(found, f"{lab}: gone")


@command(app, "ls")
def ls(session: Session) -> None:
    """List the labs of the mesh."""
    rows = session.call("lab.ls")
    session.show(rows, tables.table(rows, LABS, "no labs; make one with: mobictl lab up FILE"))


@command(app, "show")
def show(session: Session, lab: LabArgument) -> None:
    """Show a lab's guests and networks."""
    found = session.call("lab.show", build(api.LabArguments, "lab.show", lab=lab))
    networks = [row for row in found.get("networks", []) if isinstance(row, dict)]
    facts = {key: value for key, value in found.items() if not isinstance(value, list | dict)}
    parts: list[Any] = [tables.page(facts), "", guest_table(_rows(found))]
    session.show(found, *parts, *(["", tables.table(networks, NETWORKS)] if networks else []))


@command(app, "graph")
def graph(
    session: Session,
    lab: Annotated[str, typer.Argument(metavar="LAB|FILE", help="A running lab, or a lab file.")],
    *,
    form: Annotated[
        Literal["dot", "mermaid", "svg"], typer.Option("--format", help="What to write.")
    ] = "dot",
) -> None:
    """Draw a lab: Graphviz or Mermaid text, or an SVG picture."""
    drawn = _graph(session, lab)
    text = {"dot": picture.dot, "mermaid": picture.mermaid, "svg": picture.svg}[form](drawn)
    if session.json:
        session.show({"lab": drawn.lab, "format": form, "graph": text})
    else:
        print(text)  # noqa: T201 - this is the output


def _graph(session: Session, lab: str) -> picture.Graph:
    path = Path(lab)
    if path.suffix in (".yaml", ".yml") or "/" in lab:
        return picture.from_lab(load_lab_file(path)[0])
    return picture.from_document(session.call("lab.graph", build(api.LabArguments, "lab.graph", lab=lab)))


@command(app, "schema")
def schema(session: Session) -> None:
    """Print the JSON Schema of lab files, for editors."""
    del session
    print(json.dumps(lab_schema(), indent=1, ensure_ascii=False))  # noqa: T201 - this is the output
