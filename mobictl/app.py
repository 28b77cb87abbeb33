# SPDX-License-Identifier: Apache-2.0
"""`mobictl`: all commands put together. A command is registered here once the operation behind it works."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from mobictl.command import (
    PREFIX,
    DirOption,
    JsonOption,
    PeerOption,
    QuietOption,
    application,
    command,
)
from mobictl.commands import doctor, events, image, lab, net, peer, up, user, vm, vm_io, vm_migrate, wan

app = application("Networks of virtual machines that live: one file, any host, moved while they run.", PREFIX)


def _version(wanted: bool) -> None:
    if wanted:
        try:
            print(f"mobictl {version('mobitopolo')}")  # noqa: T201 - this is the output
        except PackageNotFoundError:
            print("mobictl (not installed, run from its source)")  # noqa: T201
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    *,
    peer_: PeerOption = None,
    dir_: DirOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    version_: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, allow_from_autoenv=False, help="Say the version."
        ),
    ] = False,
) -> None:
    """Options before the command hold for it as those behind it do."""
    context.obj = {"peer": peer_, "dir": dir_, "json": json, "quiet": quiet}


command(app, "up", interrupted="the peers that were started were ended again")(up.up)
command(app, "down", interrupted="some may still run; mobictl down again ends the rest")(up.down)
command(app, "status")(peer.status)
command(app, "login")(peer.login)
command(app, "leader")(peer.leader)
app.add_typer(peer.app, name="peer")
app.add_typer(user.app, name="user")
app.add_typer(wan.app, name="wan")
app.add_typer(lab.app, name="lab")
app.add_typer(vm.app, name="vm")
app.add_typer(net.app, name="net")
app.add_typer(image.app, name="image")
command(app, "events")(events.events)
command(app, "doctor")(doctor.doctor)

# Their commands register themselves with the group of vm.
__all__ = ["app", "vm_io", "vm_migrate"]
