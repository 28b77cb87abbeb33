# SPDX-License-Identifier: Apache-2.0
"""`mobictl image`: what guests can be made of."""

from __future__ import annotations

from mobictl import tables
from mobictl.command import application, command
from mobictl.session import Session
from mobictl.tables import Column

app = application("Images: what guests are made of.")

COLUMNS = (
    Column("IMAGE", "image"),
    Column("SIZE", "size", tables.size, right=True),
    Column("HASH", "hash", lambda value: str(value)[:16]),
)


@command(app, "ls")
def ls(session: Session) -> None:
    """List the images that the asked peer has."""
    rows = session.call("image.ls")
    session.show(rows, tables.table(rows, COLUMNS, "no images; make them with: make setup"))
