# SPDX-License-Identifier: Apache-2.0
"""`mobictl lab`: whole networks of guests from one file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.text import Text

from mobictl import picture, tables
from mobictl.command import application, command
from mobictl.commands.vm import guest_table, unconfirmed
from mobictl.labfile import load_lab_file
from mobictl.options import LabArgument, build
from mobictl.progress import Reporter, reporting
from mobictl.session import Session
from mobictl.tables import Column
from proto import api
from proto.api import OperationError
from proto.lab import lab_schema
from proto.labcheck import write_lab
from proto.problems import Problem
from proto.scale import scaled

app = application("Labs: networks of guests from one file.")

UP_TIMEOUT = 600.0
MOVE_TIMEOUT = 24 * 3600.0
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
    topology = scaled(lab).lab.topology
    facts = {"guests": len(topology.nodes), "links": len(topology.links), "networks": len(topology.networks)}
    words = ", ".join(
        f"{count} {name if count != 1 else name[:-1]}" for name, count in facts.items() if count
    )
    session.show({"lab": lab.name, "ok": True, **facts}, f"{file}: the lab {lab.name!r} is right ({words})")


@command(app, "up", interrupted="the lab is taken down again; mobictl lab ls shows when it is gone")
def up(session: Session, file: FileArgument) -> None:
    """Make a lab of a file and start its guests."""
    with reporting(session, "lab up") as report:
        made = _ask(session, "lab.up", file, _stages(report))
    session.show(made, f"{made['lab']} is up", guest_table(_rows(made)))


@command(app, "apply", interrupted="what has begun goes on; mobictl lab show tells how far it is")
def apply(session: Session, file: FileArgument) -> None:
    """Make a lab what its changed file says, touching only what differs."""
    with reporting(session, "lab apply") as report:
        done = _ask(session, "lab.apply", file, _stages(report))
    lines = [Text(f"{done['lab']}: {_outcome(done)}"), *_lines(done)]
    session.show(done, *lines, *unconfirmed(done), "", guest_table(_rows(done)))


def _outcome(done: dict[str, Any]) -> str:
    if not done["changes"]:
        return "is up" if not done["untouched"] else "nothing to do"
    return f"is as the file says; {_untouched(done)}"


def _untouched(document: dict[str, Any]) -> str:
    count = document["untouched"]
    return f"{count} guest{'s' * (count != 1)} untouched"


_COSTS = {
    "live": "while it runs",
    "restart": "starts again, with its disk",
    "anew": "made anew, with an empty disk",
    "move": "moves live",
    "start": "starts",
}
_STYLES = {"+": "green", "~": "yellow", "-/+": "red", "-": "red"}


def _lines(document: dict[str, Any]) -> list[Text]:
    """The changes of a plan, a line each: what, at which cost, and what differs."""
    changes = document.get("changes", [])
    width = max((len(change["name"]) for change in changes), default=0)
    lines = []
    for change in changes:
        cost = _COSTS.get(change["how"], "") if change["what"] == "guest" or change["how"] == "live" else ""
        words = "; ".join(part for part in (cost, ", ".join(change["details"])) if part)
        line = f"{change['sign']:>3} {change['what']:<7}  {change['name']:<{width}}  {words}"
        lines.append(Text(line.rstrip(), _STYLES.get(change["sign"], "")))
    return lines


def _stages(report: Reporter) -> Callable[[dict[str, Any]], None]:
    """Tells each stage, and each change of a guest's state once."""
    seen: dict[str, str] = {}

    def step(item: dict[str, Any]) -> None:
        guest, state = str(item.get("guest") or ""), str(item.get("state") or "")
        if not guest:
            report.step(str(item.get("stage") or ""))
        elif seen.get(guest) != state:
            seen[guest] = state
            report.step(f"{guest}: {state}")

    return step


def _rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The guests of a result as rows of `vm ls`."""
    return [row for row in document.get("guests", []) if isinstance(row, dict)]


@command(app, "plan")
def plan(session: Session, file: FileArgument) -> None:
    """Show what lab up would make and where, or what lab apply would change; nothing is done."""
    found = _ask(session, "lab.plan", file)
    made = tables.table(_rows(found), PLAN, "no guests")
    if not found["exists"]:
        session.show(found, made)
    elif not found["changes"]:
        session.show(found, f"{found['lab']}: nothing to do; {_untouched(found)}")
    else:
        placed = ["", made] if _rows(found) else []
        session.show(found, *_lines(found), _untouched(found), *placed)


@command(app, "move", interrupted="a move that had begun goes on; mobictl lab show tells who is where")
def move(
    session: Session,
    lab: LabArgument,
    to: Annotated[str, typer.Option("--to", metavar="PEER", help="Where its guests go.")],
) -> None:
    """Move the running guests of a lab to one peer, live."""
    args = build(api.LabMove, "lab.move", lab=lab, to=to)
    with reporting(session, f"{lab} → {to}") as report:
        done = session.call("lab.move", args, timeout=MOVE_TIMEOUT, on_item=_stages(report))
    lines = [f"{one['guest']} stays where it is: {one['reason']}" for one in done["stayed"]]
    session.show(done, f"{lab}: {len(done['moved'])} moved to {done['to']}", *lines)


@command(app, "down", interrupted="the lab goes on ending; mobictl lab ls shows when it is gone")
def down(session: Session, lab: LabArgument) -> None:
    """End a lab: its guests, their disks, its networks."""
    found = session.call("lab.down", build(api.LabArguments, "lab.down", lab=lab), timeout=UP_TIMEOUT)
    session.show(found, f"{lab}: gone", *unconfirmed(found))


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
