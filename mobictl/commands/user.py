# SPDX-License-Identifier: Apache-2.0
"""`mobictl user`: the people who have logged in."""

from __future__ import annotations

from typing import Annotated

import typer

from mobictl import tables
from mobictl.command import application, command
from mobictl.options import build
from mobictl.session import Session
from mobictl.tables import Column
from proto import api

app = application("Users: people who have logged in with a token.")

COLUMNS = (
    Column("USER", "name"),
    Column("ROLE", "role"),
    Column("ID", "user"),
    Column("TOKEN", "token"),
)


@command(app, "ls")
def ls(session: Session) -> None:
    """List the people who have logged in."""
    rows = session.call("user.ls")
    session.show(rows, tables.table(rows, COLUMNS, "nobody has logged in"))


@command(app, "rm")
def rm(
    session: Session,
    user: Annotated[str, typer.Argument(metavar="USER", help="A name or an id, as in user ls.")],
) -> None:
    """Take a user's key back: it opens nothing any more."""
    row = session.call("user.rm", build(api.UserArguments, "user.rm", user=user))
    session.show(row, f"{row['name']}: removed")
