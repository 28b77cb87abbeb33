# SPDX-License-Identifier: Apache-2.0
"""`mobictl vm exec`, `console`, `logs`, `cp`: bytes in and out of guests."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import trio
import typer

from mobictl import terminal
from mobictl.client import Client, PeerLost, Request, new_key
from mobictl.command import Exit, command
from mobictl.commands.vm import app
from mobictl.options import VmArgument, build
from mobictl.progress import Reporter, reporting
from mobictl.session import Session
from proto import api
from proto.api import OperationError
from proto.units import format_size

ESCAPE = 0x1D
"""Ctrl-], as in telnet and virsh: the one key that a console keeps for itself."""
CHUNK = 128 << 10


def exit_code(result: dict[str, Any]) -> int:
    """A program's exit code as a shell would say it: 128 + n when signal n ended it."""
    signal = result.get("signal")
    if signal:
        return 128 + int(signal)
    code = result.get("code")
    return int(code) if code is not None else 1


@command(app, "exec", context_settings={"ignore_unknown_options": True})
def exec_(
    session: Session,
    vm: VmArgument,
    argv: Annotated[list[str], typer.Argument(metavar="-- CMD…", help="The program and its arguments.")],
    *,
    tty: Annotated[bool, typer.Option("--tty", "-t", help="Give the program a terminal.")] = False,
    no_input: Annotated[
        bool, typer.Option("--no-stdin", "-n", help="Do not pass on standard input.")
    ] = False,
    env: Annotated[
        list[str] | None, typer.Option("--env", "-e", metavar="NAME=VALUE", help="A variable.")
    ] = None,
    cwd: Annotated[str | None, typer.Option("--cwd", "-w", metavar="DIR", help="Where it starts.")] = None,
) -> None:
    """Run a program in a guest; its input, output and exit code are this command's own."""
    variables = dict(_variable(text) for text in env or [])
    args = build(api.VmExec, "vm.exec", vm=vm, argv=argv, env=variables, cwd=cwd, tty=tty)
    outputs: dict[int, bytearray] = {1: bytearray(), 2: bytearray()}

    def show(channel: int, data: bytes) -> None:
        if session.json:
            outputs.setdefault(channel, bytearray()).extend(data)
        else:
            terminal.write_output(data, 2 if channel == 2 else 1)

    async def work(client: Client) -> dict[str, Any]:
        async with client.request("vm.exec", args) as request, trio.open_nursery() as nursery:
            if no_input:
                await request.send({"channel": 0, "data": b""})
            else:
                nursery.start_soon(_send_input, request)
            async for item in request:
                show(int(item["channel"]), bytes(item["data"]))
            nursery.cancel_scope.cancel()
        result: dict[str, Any] = await request.result()
        return result

    try:
        if tty:
            with terminal.raw_mode():
                result = session.run(work)
        else:
            result = session.run(work)
    except PeerLost as error:
        raise _cut_off(vm, "the program", error) from None
    if session.json:
        texts = {name: outputs[c].decode(errors="replace") for name, c in (("stdout", 1), ("stderr", 2))}
        session.show({**result, **texts})
    raise Exit(exit_code(result))


def _cut_off(vm: str, what: str, error: PeerLost) -> OperationError:
    """What was under way cannot be taken up by another peer: what came and went meanwhile is lost."""
    text = f"{error.message}: {what} in {vm} was cut off, and may have gone on for a while"
    return OperationError("unreachable", text, f"see what became of it, with: mobictl vm exec {vm} -- ps")


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise typer.BadParameter(f"{text!r} is not NAME=VALUE", param_hint="--env")
    return name, value


async def _send_input(request: Request) -> None:
    """Pass standard input on, its end too, as an empty piece."""
    while True:
        data = await terminal.read_input()
        try:
            await request.send({"channel": 0, "data": data})
        except OperationError:
            # The connection's end is told by the request itself.
            return
        if not data:
            return


@command(app, "console")
def console(session: Session, vm: VmArgument) -> None:
    """Sit at a guest's console; leave it with Ctrl-]."""
    args = build(api.VmArguments, "vm.console", vm=vm)
    if sys.stdin.isatty():
        session.note(f"console of {vm}; leave it with Ctrl-]")

    async def work(client: Client) -> None:
        async with client.request("vm.console", args) as request, trio.open_nursery() as nursery:
            nursery.start_soon(_keys, request, nursery.cancel_scope)
            async for item in request:
                terminal.write_output(bytes(item["data"]))
            nursery.cancel_scope.cancel()

    try:
        with terminal.raw_mode():
            session.run(work)
    except PeerLost as error:
        raise _cut_off(vm, "the console", error) from None
    if sys.stdin.isatty():
        session.note("")


async def _keys(request: Request, done: trio.CancelScope) -> None:
    """Keys to the console until Ctrl-]; the end of an input that is a file or pipe ends it too."""
    while True:
        data = await terminal.read_input()
        before, escape, _ = data.partition(bytes([ESCAPE]))
        if before:
            try:
                await request.send({"data": before})
            except OperationError:
                return
        if escape or not data:
            done.cancel()
            return


@command(app, "logs")
def logs(
    session: Session,
    vm: VmArgument,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what comes, until Ctrl-C.")
    ] = False,
) -> None:
    """Print what a guest wrote to its console."""
    kept = bytearray()
    after: list[int] | None = None

    async def work(client: Client) -> None:
        nonlocal after
        args = build(api.VmLogs, "vm.logs", vm=vm, follow=follow, after=after)
        async with client.request("vm.logs", args) as request:
            async for item in request:
                after = item.get("position")
                if session.json and not follow:
                    kept.extend(item["data"])
                else:
                    terminal.write_output(bytes(item["data"]))

    try:
        session.persist(work)
    except KeyboardInterrupt:
        if not follow:
            raise
    if session.json and not follow:
        session.show({"vm": vm, "log": kept.decode(errors="replace")})


def guest_path(text: str) -> tuple[str, str] | None:
    """`protocol:/etc/hosts` → (guest, path); None for a path of this machine."""
    guest, colon, path = text.partition(":")
    if not colon or not guest or guest.startswith((".", "/")):
        return None
    if not path.startswith("/"):
        raise OperationError(
            "bad-argument", f"{text!r}: a path in a guest begins with /", f"as in {guest}:/root/{path}"
        )
    return guest, path


@command(app, "cp")
def cp(
    session: Session,
    source: Annotated[str, typer.Argument(metavar="SRC", help="A file, or GUEST:/path.")],
    target: Annotated[str, typer.Argument(metavar="DST", help="A file or directory, or GUEST:/path.")],
) -> None:
    """Copy a file into a guest or out of it."""
    here, there = guest_path(source), guest_path(target)
    if (here is None) == (there is None):
        text = (
            "one of the two must be in a guest, as GUEST:/path"
            if here is None
            else "only one may be in a guest"
        )
        raise OperationError(
            "bad-argument", f"{source} and {target}: {text}", "mobictl vm cp file GUEST:/root/file"
        )
    with reporting(session, "copy") as report:
        done = (
            _get(session, *here, target, report)
            if here
            else _put(session, source, *(there or ("", "")), report)
        )
    session.show(done, f"{source} → {target}: {format_size(done['size'])}")


def _put(session: Session, source: str, guest: str, path: str, report: Reporter) -> dict[str, Any]:
    try:
        file = open(source, "rb")  # noqa: SIM115 - it is closed below, its errors are told here
        info = os.fstat(file.fileno())
    except OSError as error:
        raise OperationError("failed", f"{source} cannot be read: {(error.strerror or '').lower()}") from None
    with file:
        if not stat.S_ISREG(info.st_mode):
            raise OperationError(
                "bad-argument", f"{source} is no regular file", "pack a directory with tar first"
            )
        if path.endswith("/"):
            path += os.path.basename(source)
        mode = stat.S_IMODE(info.st_mode) & 0o777
        args = build(api.VmPut, "vm.put", vm=guest, path=path, mode=mode, size=info.st_size)
        key = new_key()

        async def work(client: Client) -> Any:
            sent = file.seek(0)
            async with client.request("vm.put", args, key=key) as request:
                while not request.ended:
                    data = file.read(CHUNK)
                    await request.send({"data": data})
                    sent += len(data)
                    report.amount("copy", sent, info.st_size)
                    if not data:
                        break
                return await request.result()

        result: dict[str, Any] = session.persist(work)
    return result


def _get(session: Session, guest: str, path: str, target: str, report: Reporter) -> dict[str, Any]:
    args = build(api.VmGet, "vm.get", vm=guest, path=path)
    place = Path(target)
    if place.is_dir():
        place /= os.path.basename(path)
    try:
        fd, temporary = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
    except OSError as error:
        raise OperationError(
            "failed", f"{place} cannot be written: {(error.strerror or '').lower()}"
        ) from None

    async def work(client: Client) -> Any:
        got = file.truncate(file.seek(0))
        async with client.request("vm.get", args) as request:
            async for item in request:
                file.write(item["data"])
                got += len(item["data"])
                report.amount("copy", got, item.get("size"))
            return await request.result()

    try:
        with open(fd, "wb") as file:
            result: dict[str, Any] = session.persist(work)
        os.chmod(temporary, int(result.get("mode") or 0o644) & 0o777)
        os.rename(temporary, place)
    except OSError as error:
        raise OperationError(
            "failed", f"{place} cannot be written: {(error.strerror or '').lower()}"
        ) from None
    finally:
        Path(temporary).unlink(missing_ok=True)
    return result
